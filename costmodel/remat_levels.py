"""How much less a micro-batch may keep, and what it takes: levels for the stages of a pipeline.

A stage holds what it keeps of a micro-batch for all that are in flight, and what its backward computes again for the
one that it works on. So a level is judged by what is kept between forward and backward, not by a peak: with the columns
of `costmodel.remat`, of which those of (5) at one moment only, when the backward begins,

    min  sum_c n s r + sum_v n d m      such that  sum_v n size k <= part of what is kept anyway,

for a few parts, down to all that layers do not hand on to each other. What they hand on is kept: with it, a copy in one
layer would be wanted by all layers behind, and by the stage behind.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from autopar.costmodel.copies import starred
from autopar.costmodel.devices import Device
from autopar.costmodel.ilp import solve_linear
from autopar.costmodel.memory import Policy
from autopar.costmodel.model import Linear, Terms
from autopar.costmodel.remat import GAP, SECONDS, Remat, Version
from autopar.costmodel.remat_search import Rematerialiser
from autopar.graph import Program
from autopar.plan import Plan
from autopar.recompute import RECOMPUTE

#: Parts of what can be let go of that a level keeps; and of levels between.
PARTS, BETWEEN = (0.7, 0.4, 0.0), (0.9, 0.8, 0.55, 0.25, 0.12)
#: Prices of a byte where two answers take as long, in shares of all seconds.
TIE = 1e-4


def levels(program: Program, plan: Plan, device: str | Device, parts: Sequence[float] = PARTS) -> list[dict[str, str]]:
    """What `Plan.saved` may say, each keeping less than the one before; the first, to keep everything, is not told.

    program: of one micro-batch. plan: of it, which says nothing of that yet, on the mesh of a stage.
    parts: of what can be let go of, decreasing: what levels keep. Behind the last, one that keeps less yet.
    """
    search = Rematerialiser(program, plan, device, None, Policy(program.training, optimizer=plan.optimizer))
    remat = search.remat
    allowed = frozenset(remat.classes) - search.narrow
    chosen = [_least(remat, allowed, part) for part in parts]
    layer = [frozenset(remat.classes) - {z} for z in search.narrow]  # by hand: a layer keeps one of what it hands on
    if layer:
        chosen.append(min(layer, key=lambda classes: (kept(remat, classes), sorted(classes))))
    out: list[dict[str, str]] = []
    before = kept(remat, frozenset())
    for classes in chosen:
        size = kept(remat, classes)
        if size < before * (1 - GAP):
            before = size
            again = {i.name: RECOMPUTE if remat.fold.of[i.index] in classes else None for i in remat.forward}
            out.append(starred(again))
    return out


def kept(remat: Remat, copied: Collection[int]) -> float:
    """Bytes of a micro-batch between forward and backward, if these classes are copied."""
    needed: set[Version] = set()
    size = 0.0
    stack = [v for v, life in remat.lives.items() if life.last >= 0]
    while stack:
        version = stack.pop()
        if version in needed:
            continue
        needed.add(version)
        item = remat.items.items[version.tensor.item]
        if _again(remat, version, copied):
            stack += remat.operands(item)
        else:
            size += remat.size(version)
    return size


def _again(remat: Remat, version: Version, copied: Collection[int]) -> bool:
    return remat.fold.of[version.tensor.item] in copied


def _least(remat: Remat, allowed: Collection[int], part: float) -> frozenset[int]:
    """The classes of least seconds, of those allowed, that keep no more than the part of what they can let go of."""
    most, least = kept(remat, frozenset()), kept(remat, frozenset(allowed))
    linear = Linear()
    seconds = {c: remat.seconds(c) * len(remat.fold.members[c]) for c in remat.classes}
    scale = 1e3 / max(sum(seconds.values()), 1e-12)
    copy = {c: linear.column(seconds[c] * scale, binary=True) for c in sorted(allowed)}
    free = {c: linear.column() for c in remat.reads if c not in seconds}
    need = {v: linear.column() for v in remat.members}
    sizes = {v: remat.size(m[0]) * len(m) for v, m in remat.members.items()}
    keep = {v: linear.column(1e3 * TIE * size / max(most, 1.0)) for v, size in sizes.items()}
    for version, members in remat.members.items():
        if any(remat.lives[m].last >= 0 for m in members):
            linear.row({need[version]: 1.0}, 1.0, 1.0)
    for cls, reads in remat.reads.items():
        again = copy.get(cls, free.get(cls))
        for version in reads if again is not None else ():
            assert again is not None
            linear.row({need[version]: 1.0, again: -1.0}, 0.0, math.inf)
    for version, members in remat.members.items():
        sources = {copy[c] for c in remat.sources(members[0].tensor) if c in copy}
        own = free.get(version.tensor.item)
        terms: Terms = {keep[version]: 1.0, need[version]: -1.0, **dict.fromkeys(sources, 1.0)}
        if own is not None:
            terms[own] = 1.0
        linear.row(terms, 0.0, math.inf)
        each = remat.moved(members[0])
        if each is not None:
            moved = linear.column(each * len(members) * scale)
            for source in sources:
                linear.row({moved: 1.0, need[version]: -1.0, source: -1.0}, -1.0, math.inf)
    limit = least + part * (most - least)
    row = {keep[v]: size / max(most, 1.0) for v, size in sizes.items()}
    linear.row(row, -math.inf, limit / max(most, 1.0) * (1 + GAP))
    values = solve_linear(linear, SECONDS, GAP)
    return frozenset(allowed) if values is None else frozenset(c for c, column in copy.items() if values[column] > 0.5)


__all__ = ["BETWEEN", "PARTS", "kept", "levels"]
