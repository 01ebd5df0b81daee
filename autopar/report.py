"""A plan in words: by layer, which factor lies on which axis, where parameters are stored, time and memory.

Pure functions from plain data to tables and text; nothing here prints.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from autopar.graph import pattern
from autopar.plan import Plan, Storage
from autopar.rule import Choice
from autopar.spec import Spec, format_spec

#: What the factors of an op mean to a reader: op -> factor -> words. Ops that are not here show the bare factor.
FACTORS: dict[str, dict[str, str]] = {
    "mm": {"i": "tokens", "j": "output features", "k": "input features, then summed"},
    "bmm": {"b": "batch", "i": "rows", "j": "columns", "k": "inner dim, then summed"},
}
#: Ops that say most about a module, most telling first.
TELLING = (
    "mm",
    "bmm",
    "scaled_dot_product_attention",
    "convolution",
    "embedding",
    "nll_loss_forward",
    "native_layer_norm",
)


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


def bytes_(value: float) -> str:
    """`80e9` -> `80 GB` (decimal units)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


# ---- words ---------------------------------------------------------------------------------------------------------


def choice_words(op: str, choice: Choice) -> str:
    """What one axis does at one op: `output features`, `partial sums pass`, `-`."""
    if choice.through >= 0:
        return "partial sums pass"
    if not choice.factor:
        return "-"
    stem = op.partition("#")[0]
    known = FACTORS.get(stem) or FACTORS.get(stem.partition(".")[0]) or {}
    word = known.get(choice.factor, f"{stem} dim {choice.factor}")
    return word if choice.outer == 1 else f"{word} (in {choice.outer} blocks)"


def storage_words(storage: Storage, names: Sequence[str]) -> str:
    """Where a parameter lies and how it travels: `[dp, tp] gathered for each use`."""
    ndim = 1 + max((p.dim for p in storage.spec if p.kind == "S"), default=-1)
    if ndim == 0:
        return "whole on every rank"
    text = format_spec(storage.spec, ndim, names)
    gather = "gathered again for backward" if storage.gather == "twice" else "kept for backward if gathered"
    reduce = "" if storage.reduce == "reduce_scatter" else ", gradient all-reduced"
    return f"{text} {gather}{reduce}"


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


def layers(plan: Plan) -> list[Layer]:
    """The forward of a plan by module, in program order; repeated modules folded."""
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
    rows = []
    for module in dict.fromkeys([*told, *stored]):
        ops = _telling(told.get(module, {}))
        if not ops and module not in stored:
            continue
        splits = tuple(
            "; ".join(dict.fromkeys(choice_words(op, row[axis]) for op, row in ops.items())) or "-"
            for axis in range(len(plan.mesh.sizes))
        )
        places = tuple(f"{', '.join(leaves)}: {words}" for words, leaves in stored.get(module, {}).items())
        rows.append(Layer(module or "(root)", max(1, len(copies.get(module, ()))), places, splits))
    return rows


def _star(module: str) -> str:
    return pattern(module + "/")[:-1]


def _telling(ops: Mapping[str, tuple[Choice, ...]]) -> dict[str, tuple[Choice, ...]]:
    """The ops of a module that say most about it."""
    for stem in TELLING:
        found = {k: v for k, v in ops.items() if k.partition("#")[0].partition(".")[0].endswith(stem)}
        if found:
            return found
    return {}


# ---- tables --------------------------------------------------------------------------------------------------------


def show(plan: Plan) -> list[RenderableType]:
    """The whole report of a plan: heading, layers, inputs and outputs, time, memory, notes."""
    parts: list[RenderableType] = [heading(plan), layer_table(plan)]
    if plan.predicted:
        parts.append(predicted_table(plan))
    parts += [f"note: {note}" for note in plan.notes]
    return parts


def heading(plan: Plan) -> str:
    """Target, mesh, strategy in words, and what the solver proved."""
    what = plan.target.get("text")
    lines = [f"Plan{f' of {what}' if what else ''} on {plan.mesh} ({plan.mesh.num_devices} devices)", strategy(plan)]
    status = plan.solver.get("status")
    if status:
        gap = plan.solver.get("gap")
        lines.append(f"solver: {status}" + (f", gap {100 * gap:.2g} %" if isinstance(gap, (int, float)) else ""))
    inputs = [f"{k} {_spec(v, plan.mesh.names)}" for k, v in plan.inputs.items()]
    outputs = [f"{k} {_spec(v, plan.mesh.names)}" for k, v in plan.outputs.items()]
    if inputs or outputs:
        lines.append(f"inputs: {', '.join(inputs) or '-'}; outputs: {', '.join(outputs) or '-'}")
    return "\n".join(lines)


def _spec(spec: Spec, names: Sequence[str]) -> str:
    ndim = 1 + max((p.dim for p in spec if p.kind == "S"), default=-1)
    return format_spec(spec, ndim, names) if any(p.kind != "R" for p in spec) else "whole"


def layer_table(plan: Plan) -> Table:
    """One row per module, repeated layers folded."""
    table = Table(title=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("parameters", overflow="fold")
    for name, size in zip(plan.mesh.names, plan.mesh.sizes):
        table.add_column(f"{name}={size} splits", overflow="fold")
    for row in layers(plan):
        title = f"{row.module} (x{row.copies})" if row.copies > 1 else row.module
        table.add_row(title, "\n".join(row.storage) or "-", *row.splits)
    return table


def predicted_table(plan: Plan) -> Table:
    """Predicted seconds, collectives and bytes of one rank."""
    table = Table(title="Predicted, per rank and step", pad_edge=False, title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for what, value in flatten(plan.predicted):
        table.add_row(what, value)
    return table


def flatten(predicted: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Rows (`memory parameters`, `1.2 GB`) of nested figures; units from the name: `_s` seconds, memory in bytes."""
    for key, value in predicted.items():
        label = f"{prefix} {key}".strip()
        if isinstance(value, Mapping):
            yield from flatten(value, label)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if key.endswith("_s"):
                yield label.removesuffix("_s"), seconds(value)
            elif "memory" in label or "bytes" in label:
                yield label.replace("_bytes", ""), bytes_(value)
            else:
                yield label, f"{value:.6g}"
        else:
            yield label, str(value)


def compare_table(rows: Iterable[tuple[str, float, float]], unit: str = "s") -> Table:
    """Predicted against measured: (what, predicted, measured) -> a table with their ratio."""
    shape = seconds if unit == "s" else bytes_
    table = Table(title="Predicted against measured", pad_edge=False, title_justify="left")
    for column in ("what", "predicted", "measured", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, predicted, measured in rows:
        ratio = f"{measured / predicted:.2f}" if predicted else "-"
        table.add_row(what, shape(predicted), shape(measured), ratio)
    return table


def text(parts: Iterable[RenderableType], width: int = 100) -> str:
    """Plain text of tables, without colour, as wide as asked."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, emoji=False, markup=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
