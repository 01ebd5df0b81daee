"""Run passes over a graph: copy once; after every pass lint, verify, time, count what changed, dump.

A pass is a function `(fx.GraphModule) -> fx.GraphModule` that may change its argument; what else it needs is bound
with `functools.partial`. With `AUTOPAR_DUMP=dir` in the environment every stage is written to `dir/TITLE/NN-PASS.txt`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from autopar.errors import PassError
from autopar.graph import op_name
from autopar.mesh import Mesh
from autopar.passes import edit
from autopar.passes.verify import signature, verify

Pass = Callable[[fx.GraphModule], fx.GraphModule]
DUMP = "AUTOPAR_DUMP"


@dataclass(frozen=True)
class Stage:
    """One pass that ran: seconds, nodes after it, and by how much the number of each op changed."""

    name: str
    seconds: float
    nodes: int
    changes: Mapping[str, int]

    def __str__(self) -> str:
        diff = ", ".join(f"{k} {v:+d}" for k, v in sorted(self.changes.items())) or "no change of ops"
        return f"{self.name:<12}{self.seconds:8.3f} s {self.nodes:6d} nodes  {diff}"


@dataclass(frozen=True)
class Report:
    """What every pass did, in order; `str` is the table."""

    title: str
    stages: tuple[Stage, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all passes, checks not counted."""
        return sum(s.seconds for s in self.stages)

    def __str__(self) -> str:
        return "\n".join([f"{self.title}: {len(self.stages)} passes, {self.seconds:.3f} s", *map(str, self.stages)])


def run(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    mesh: Mesh | None = None,
    title: str = "joint",
    deep: bool = False,
    dump: str | None = None,
) -> tuple[fx.GraphModule, Report]:
    """The graph after `passes`, and what they did. `gm` is not changed.

    Args:
        gm: a local graph.
        passes: in order.
        mesh: for the verifier, if known.
        title: folder of the dump and head of the report. Processes that share a folder give different titles.
        deep: let the verifier run every op on meta tensors.
        dump: folder for the stages; default: the environment variable AUTOPAR_DUMP; none if that is empty.

    Raises:
        PassError: a pass failed, or left a graph that breaks an invariant; names the pass and the node.
    """
    folder = dump if dump is not None else os.environ.get(DUMP, "")
    target = Path(folder) / title if folder else None
    gm = edit.copy(gm)
    _check("before the first pass", gm, mesh, deep)
    before, counts = signature(gm), _count(gm)
    _dump(target, 0, "input", gm)
    stages = []
    for number, step in enumerate(passes, 1):
        name = pass_name(step)
        began = time.perf_counter()
        try:
            gm = step(gm)
        except Exception as error:
            kind = "" if isinstance(error, PassError) else f"{type(error).__name__}: "
            raise PassError(f"pass {name}: {kind}{error}") from error
        seconds = time.perf_counter() - began
        _check(f"after pass {name}", gm, mesh, deep)
        if signature(gm) != before:
            raise PassError(f"after pass {name}: {_difference(before, signature(gm))}")
        new = _count(gm)
        changes = {k: new[k] - counts[k] for k in sorted({*new, *counts}) if new[k] != counts[k]}
        stages.append(Stage(name, seconds, len(gm.graph.nodes), changes))
        counts = new
        _dump(target, number, name, gm)
    gm.recompile()
    return gm, Report(title, tuple(stages))


def pass_name(step: Pass) -> str:
    """Name of the function, seen through `functools.partial`."""
    inner: Any = step
    while hasattr(inner, "func"):
        inner = inner.func
    return getattr(inner, "__name__", type(inner).__name__)


def describe(gm: fx.GraphModule) -> str:
    """The graph as readable text: one line per node, with dtype, local shape and phase."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            values = ", ".join(str(v) for v in node.args[0])
            lines.append(f"return {values}")
            continue
        if node.op == "call_function":
            parts = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
            what = f"{op_name(node).removeprefix('aten.')}({', '.join(parts)})"
        else:
            what = node.op
        marks = [m for m in ("regather", "keep") if node.meta.get(m)]
        notes = " ".join([node.meta.get("phase", ""), *marks, node.meta.get("module", "")]).strip()
        lines.append(f"{node.name}: {_type(node.meta.get('val'))} = {what}" + (f"  # {notes}" if notes else ""))
    return "\n".join(lines) + "\n"


def _check(when: str, gm: fx.GraphModule, mesh: Mesh | None, deep: bool) -> None:
    try:
        gm.graph.lint()
        verify(gm, mesh=mesh, deep=deep)
    except (PassError, RuntimeError, ValueError) as error:
        raise PassError(f"{when}: {error}") from error


def _difference(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    for what, old, new in (("placeholders", before[0], after[0]), ("outputs", before[1], after[1])):
        if len(old) != len(new):
            return f"the graph had {len(old)} {what}, it has {len(new)}"
        for i, (a, b) in enumerate(zip(old, new)):
            if a != b:
                return f"{what[:-1]} {i} was {a}, it is {b}"
    return "nothing changed"


def _count(gm: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(n) for n in gm.graph.nodes if n.op == "call_function")


def _dump(folder: Path | None, number: int, name: str, gm: fx.GraphModule) -> None:
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02d}-{name}.txt").write_text(describe(gm), encoding="utf-8")
        except OSError as error:
            raise PassError(f"cannot write the stages to {folder}: {error}; set {DUMP} to a folder of yours") from None


def _text(arg: Any) -> str:
    if isinstance(arg, (tuple, list)):
        return "[" + ", ".join(_text(a) for a in arg) + "]"
    return str(arg).removeprefix("torch.")


def _type(val: Any) -> str:
    if isinstance(val, (tuple, list)):
        return "(" + ", ".join(_type(v) for v in val) + ")"
    if isinstance(val, torch.Tensor):
        short = str(val.dtype).removeprefix("torch.")
        for long, letter in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
            if short.startswith(long):
                short = letter + short.removeprefix(long)
                break
        return f"{short}[{', '.join(map(str, val.shape))}]"
    return "int" if val is None or isinstance(val, int) else type(val).__name__
