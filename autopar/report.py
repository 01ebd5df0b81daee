"""A plan in words: by layer, which factor lies on which axis, where parameters are stored, time and memory.

Pure functions from plain data to tables and text; nothing here prints.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.graph import pattern
from autopar.plan import HOST, Plan, Storage
from autopar.recompute import OFFLOADED, RECOMPUTE
from autopar.rule import Choice
from autopar.spec import Spec, format_spec
from autopar.units import bytes_

_ACTIVATION = {"a": "batch", "b": "sequence", "c": "features"}
#: What the factors of an op mean to a reader: part of the op's name -> factor -> words, most telling op first.
#: The factors are those of the rule table; an op or factor that is not here shows as it is.
FACTORS: dict[str, dict[str, str]] = {
    "mm": {"i": "tokens", "j": "output features", "k": "input features, then summed"},
    "scaled_dot_product": {"b": "batch", "h": "heads", "g": "heads of a group", "s": "query positions"},
    "bmm": {"b": "batch x heads", "i": "rows", "j": "columns", "k": "inner dim, then summed"},
    "convolution": {"n": "batch", "c": "input channels, then summed", "o": "output channels", "g": "groups"},
    "embedding": {**_ACTIVATION, "v": "vocabulary, then summed", "z": "features"},
    "nll_loss_forward": {"k": "classes, then summed", "a": "tokens, then summed"},
    "native_layer_norm": _ACTIVATION,
    "pow": _ACTIVATION,
    "batch_norm": {"a": "batch", "b": "channels"},
    "mul": _ACTIVATION,
    "add": _ACTIVATION,
}


@dataclass(frozen=True)
class Layer:
    """One row of the report: a module (`*` for repeated ones), its parameters, and what each axis splits in it."""

    module: str
    copies: int
    storage: tuple[str, ...]
    splits: tuple[str, ...]


# ---- numbers -------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """`0.0123` -> `12.3 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns" if value else "0 s"


# ---- words ---------------------------------------------------------------------------------------------------------


def choice_words(op: str, choice: Choice) -> str:
    """What one axis does at one op: `output features`, `partial sums pass`, `-`."""
    if choice.through >= 0:
        return "partial sums pass"
    if not choice.factor:
        return "-"
    stem = _telling(op)
    word = FACTORS[stem].get(choice.factor) if stem else None
    word = word or f"{op} {choice.factor}"
    return word if choice.outer == 1 else f"{word} (in {choice.outer} blocks)"


def storage_words(storage: Storage, names: Sequence[str]) -> str:
    """Where a parameter lies and how it travels: `dim 0 over dp, gathered again for backward`."""
    cuts: dict[int, list[str]] = {}
    for name, place in zip(names, storage.spec):
        if place.kind == "S":
            cuts.setdefault(place.dim, []).append(name)
    words = [f"dim {dim} over {' and '.join(axes)}" for dim, axes in sorted(cuts.items())] or ["whole"]
    if cuts and storage.gather == "twice":
        words.append("gathered again for backward")
    if cuts and storage.reduce == "all_reduce":
        words.append("gradient all-reduced")
    if storage.state == HOST:
        words.append("optimizer state on the host")
    return ", ".join(words)


def strategy(plan: Plan) -> str:
    """The mesh axes in a word each, from how parameters and main ops use them: `dp: data + ZeRO-3, tp: tensor`."""
    words = []
    for axis, name in enumerate(plan.mesh.names):
        factors = {
            c[axis].factor
            for a, c in plan.choices.items()
            if a.startswith("fwd:") and _op(a).partition(".")[0] == "mm" and c[axis].factor
        }
        kinds = [w for f, w in (("i", "data"), ("j", "tensor"), ("k", "tensor")) if f in factors]
        stored = [s for s in plan.storage.values() if s.spec[axis].kind == "S"]
        if "data" in kinds and stored and "tensor" not in kinds:
            kinds.append("ZeRO-3" if any(s.gather == "twice" for s in stored) else "ZeRO")
        words.append(f"{name}: {' + '.join(dict.fromkeys(kinds)) or 'whole'}")
    return ", ".join(words)


def _op(address: str) -> str:
    return address.rpartition("/")[2].partition("#")[0]


def _module(address: str) -> str:
    return address.partition(":")[2].rpartition("/")[0]


def layers(plan: Plan, merged: bool = True) -> list[Layer]:
    """The forward of a plan by module, in program order; repeated modules folded, and equal neighbours (`merged`)."""
    stored: dict[str, dict[str, list[str]]] = {}
    copies: dict[str, set[str]] = {}
    for name, storage in plan.storage.items():
        module, _, leaf = name.rpartition(".")
        star = _star(module)
        copies.setdefault(star, set()).add(module)
        group = stored.setdefault(star, {}).setdefault(storage_words(storage, plan.mesh.names), [])
        if leaf not in group:
            group.append(leaf)
    told: dict[str, dict[str, tuple[Choice, ...]]] = {}
    for address, choices in plan.choices.items():
        if address.startswith("fwd:"):
            told.setdefault(_star(_module(address)), {})[_op(address) + "#" + address.rpartition("#")[2]] = choices
    rows: list[Layer] = []
    for module in dict.fromkeys([*told, *stored]):
        ops = _most_telling(told.get(module, {}))
        if module not in stored and not any(c.factor for row in ops.values() for c in row):
            continue
        splits = tuple(
            "; ".join(dict.fromkeys(choice_words(op.partition("#")[0], row[axis]) for op, row in ops.items())) or "-"
            for axis in range(len(plan.mesh.sizes))
        )
        places = tuple(f"{', '.join(leaves)}: {words}" for words, leaves in stored.get(module, {}).items())
        rows.append(Layer(module or "(loss)", len(copies.get(module, ())) or _copies(module, copies), places, splits))
    return _merge(rows) if merged else rows


def _copies(module: str, copies: Mapping[str, set[str]]) -> int:
    """How often a module without parameters repeats: as often as the modules inside or around it."""
    if "*" not in module:
        return 1
    near = [len(found) for star, found in copies.items() if star.startswith(module + ".")]
    around = [len(found) for star, found in copies.items() if star.startswith(module.rpartition("*")[0] + "*")]
    return max(near or around or [1])


def _merge(rows: list[Layer]) -> list[Layer]:
    """Modules of one parent that say the same become `parent.{a, b}`."""
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for row in rows:
        parent, _, leaf = row.module.rpartition(".")
        key = (parent, *_says(row)) if parent and leaf != "*" else (row.module,)
        groups.setdefault(key, []).append(row)
    return [
        members[0] if len(members) == 1 else replace(members[0], module=_together([row.module for row in members]))
        for members in groups.values()
    ]


def _together(modules: list[str]) -> str:
    """`a.b, a.c` -> `a.{b, c}`."""
    return f"{modules[0].rpartition('.')[0]}.{{{', '.join(m.rpartition('.')[2] for m in modules)}}}"


def _says(row: Layer) -> tuple[object, ...]:
    return row.copies, row.storage, row.splits


def _star(module: str) -> str:
    return pattern(module + "/")[:-1]


def _telling(op: str) -> str:
    """The entry of `FACTORS` for an op, or nothing."""
    stem = op.partition(".")[0]
    return stem if stem in FACTORS else next((key for key in FACTORS if key in stem and key not in ("mm", "add")), "")


def _most_telling(ops: Mapping[str, tuple[Choice, ...]]) -> dict[str, tuple[Choice, ...]]:
    """The ops of a module that say most about it."""
    for key in FACTORS:
        found = {op: row for op, row in ops.items() if _telling(op.partition("#")[0]) == key}
        if found:
            return found
    return {}


# ---- tables --------------------------------------------------------------------------------------------------------


def show(plan: Plan) -> list[RenderableType]:
    """The whole report of a plan: heading, layers, time and memory, notes."""
    # Text, not str: rich would take `[dp]` for markup.
    parts: list[RenderableType] = [Text(heading(plan)), layer_table(plan)]
    if plan.saved:
        parts.append(Text(kept_text(plan)))
    if plan.predicted:
        parts.append(Text(predicted_text(plan.predicted)))
    tried = plan.solver.get("meshes")
    if isinstance(tried, (list, tuple)) and len(tried) > 1:
        parts.append(mesh_table(plan, tried))
    return parts + [Text(f"note: {note}") for note in plan.notes]


def kept_text(plan: Plan) -> str:
    """What is not kept for the backward, by module; a star stands for all layers but those named besides."""
    lines = []
    for kind, text in ((RECOMPUTE, "computed again in the backward"), (OFFLOADED, "waits on the host")):
        stars = {address for address, how in plan.saved.items() if how == kind}
        modules: dict[str, list[str]] = {}
        for address, how in plan.saved.items():
            op = address.rpartition("/")[2].removesuffix("#0")
            if how == kind:
                modules.setdefault(_module(address) or "(root)", []).append(op)
            elif pattern(address) in stars:
                modules.setdefault(_module(address) or "(root)", []).append(f"not {op}")
        if modules:
            lines.append(f"{text}: " + "; ".join(f"{m}: {', '.join(ops)}" for m, ops in modules.items()))
    return "\n".join(lines) or "everything is kept for the backward"


def heading(plan: Plan) -> str:
    """Target, mesh, strategy in words, and what the solver proved."""
    what = plan.target.get("text")
    lines = [f"Plan{f' of {what}' if what else ''} on {plan.mesh} ({plan.mesh.num_devices} devices)", strategy(plan)]
    status = plan.solver.get("status")
    if status:
        gap = plan.solver.get("gap")
        lines.append(f"solver: {status}" + (f", gap {100 * gap:.2g} %" if isinstance(gap, (int, float)) else ""))
    if plan.precision:
        lines.append(f"precision: {plan.computes}")
    if plan.optimizer != "adamw":
        lines.append(f"optimizer: {plan.optimizer}")
    if plan.compression is not None:
        lines.append(f"gradients travel compressed: {plan.compression}")
    inputs = [f"{k} {_spec(v, plan.mesh.names)}" for k, v in plan.inputs.items()]
    outputs = [f"{k} {_spec(v, plan.mesh.names)}" for k, v in plan.outputs.items()]
    if inputs or outputs:
        lines.append(f"inputs: {', '.join(inputs) or '-'}; outputs: {', '.join(outputs) or '-'}")
    return "\n".join(lines)


def _spec(spec: Spec, names: Sequence[str]) -> str:
    ndim = 1 + max((p.dim for p in spec if p.kind == "S"), default=-1)
    return format_spec(spec, ndim, names) if any(p.kind != "R" for p in spec) else "whole"


def layer_table(plan: Plan) -> Table:
    """One row per module, repeated layers folded: what each axis splits in its main op, where its parameters lie."""
    table = plain_table()
    table.add_column("module", overflow="fold", ratio=4)
    for name, size in zip(plan.mesh.names, plan.mesh.sizes):
        table.add_column(f"{name}={size} splits", overflow="fold", ratio=3)
    table.add_column("parameters are stored", overflow="fold", ratio=4)
    blank = [""] * (len(plan.mesh.sizes) + 1)
    rows = layers(plan)
    stack = ""
    for row in rows:
        prefix = row.module[: row.module.rfind("*") + 1]
        if prefix and prefix != stack:
            # One heading for the repeated layers, its own splits (residual adds) beside it.
            own = next((r for r in rows if r.module == prefix), None)
            times = own.copies if own else row.copies
            table.add_row(f"{prefix} (x{times})", *([*own.splits, "\n".join(own.storage) or "-"] if own else blank))
        stack = prefix
        if row.module != prefix or not prefix:
            title = f"  {row.module[len(prefix) + 1 :]}" if prefix else row.module
            table.add_row(title, *row.splits, "\n".join(row.storage) or "-")
    return table


def mesh_table(plan: Plan, tried: Sequence[Mapping[str, Any]]) -> Table:
    """The shapes that a search has tried, best first: step, what it is slower by, memory, or why there is no plan.

    tried: as `costmodel.search.best_plan` lists them in `Plan.solver["meshes"]`.
    """
    table = plain_table()
    table.add_column("mesh tried", overflow="fold")
    for name in ("step", "difference", "memory per rank"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    best = plan.predicted.get("step_s")
    for row in tried:
        if "step_s" not in row:
            table.add_row(str(row["mesh"]), "-", "-", "-", str(row.get("reason", "")))
            continue
        chosen = row["mesh"] == str(plan.mesh)
        later = "" if chosen or best is None else f"+{seconds(row['step_s'] - best)}"
        table.add_row(
            str(row["mesh"]), seconds(row["step_s"]), later, bytes_(row["peak_bytes"]), "chosen" if chosen else ""
        )
    return table


def plain_table() -> Table:
    """A table as all of ours look."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


_PARTS = {"compute_s": "compute", "comm_s": "communication", "update_s": "optimizer"}


def predicted_text(predicted: Mapping[str, Any]) -> str:
    """Predicted seconds, bytes and collectives of one rank, a line each."""
    lines = []
    if "step_s" in predicted:
        waited = predicted.get("exposed_s")
        if waited is None:
            parts = [f"{word} {seconds(predicted[key])}" for key, word in _PARTS.items() if key in predicted]
        else:
            update = predicted.get("update_s", 0.0)
            busy = predicted["step_s"] - waited - update
            parts = [f"compute {seconds(busy)}", f"waiting {seconds(waited)}", f"optimizer {seconds(update)}"]
        on = f" on {predicted['device']}" if "device" in predicted else ""
        lines.append(
            f"predicted step{on}: {seconds(predicted['step_s'])}"
            + (f" = {' + '.join(parts)}" if parts else "")
            + (f"; communication {seconds(predicted['comm_s'])} in all" if waited is not None else "")
        )
    memory = predicted.get("memory", {})
    if memory:
        kinds = ", ".join(f"{kind} {bytes_(value)}" for kind, value in memory.items() if value)
        total = predicted.get("peak_bytes", sum(memory.values()))
        lines.append(f"predicted memory per rank: {bytes_(total)} ({kinds})")
    host = predicted.get("host", {})
    if host:
        kinds = ", ".join(f"{kind} {bytes_(value)}" for kind, value in host.items() if value)
        lines.append(f"on the host: {bytes_(sum(host.values()))} ({kinds})")
    collectives = predicted.get("collectives", {})
    if collectives:
        lines.append("collectives per step: " + ", ".join(f"{n} {kind}" for kind, n in collectives.items()))
    return "\n".join(lines)


def text(parts: Iterable[RenderableType], width: int = 100) -> str:
    """Plain text of tables, without colour, as wide as asked."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, emoji=False, markup=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
