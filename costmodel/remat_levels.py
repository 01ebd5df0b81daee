"""How much less a micro-batch may keep, and what it takes: levels for the stages of a pipeline.

A stage holds what it keeps of a micro-batch for all that are in flight, and what its backward computes again, or has
back from the host, for the one that it works on. So a level is judged by what is kept between forward and backward, not
by a peak: with the columns of `costmodel.remat_program`, and (5) at one moment only, when the backward begins,

    min  sum_c n s r + sum_v n d m + e + f      such that  sum_v n size k <= part of what is kept anyway,

for a few parts, down to all that layers do not hand on to each other. What they hand on is not computed again: with it,
a copy in one layer would be wanted by all layers behind, and by the stage behind. It may wait on the host.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from autopar.costmodel.copies import starred
from autopar.costmodel.devices import Device
from autopar.costmodel.ilp import solve_linear
from autopar.costmodel.memory import Policy
from autopar.costmodel.remat import Chosen, Remat, Version
from autopar.costmodel.remat_program import GAP, SECONDS, Columns
from autopar.costmodel.remat_search import Rematerialiser
from autopar.graph import Program
from autopar.plan import Plan
from autopar.recompute import OFFLOADED, RECOMPUTE

#: Parts of what can be let go of that a level keeps; and of levels between.
PARTS, BETWEEN = (0.7, 0.4, 0.0), (0.9, 0.8, 0.55, 0.25, 0.12)
#: Whole micro-batches on the host of one rank, at most: it has as many in flight as there are stages, or about twice as
#: many, each of its own stage's layers.
_FLIGHTS = 2
#: What keeping everything costs where two answers take as long; seconds of all ops are 1000.
TIE = 0.1


def levels(
    program: Program, plan: Plan, device: str | Device, parts: Sequence[float] = PARTS, again: bool = True,
    away: bool = False,
) -> list[dict[str, str]]:  # fmt: skip
    """What `Plan.saved` may say, each keeping less than the one before; the first, to keep everything, is not told.

    Those that only compute again come first; then, from the start once more, those that let something wait on the host.

    program: of one micro-batch. plan: of it, which says nothing of that yet, on the mesh of a stage.
    parts: of what can be let go of, decreasing: what levels keep. Behind the last, one that keeps less yet.
    again, away: whether the backward may compute again, and whether what it reads may wait on the host.
    """
    search = Rematerialiser(program, plan, device, None, Policy(program.training, optimizer=plan.optimizer))
    remat = search.remat
    allowed = frozenset(remat.classes) - search.narrow if again else frozenset()
    out: list[dict[str, str]] = []
    if again:
        chosen = [_least(remat, allowed, part, False) for part in parts]
        layer = [Chosen(frozenset(remat.classes) - {z}) for z in search.narrow]  # by hand: it keeps one of what it gets
        if layer:
            chosen.append(min(layer, key=lambda c: (kept(remat, c), sorted(c.again))))
        out += _falling(remat, chosen)
    if away and remat.hosts:
        remat.room /= _FLIGHTS
        hosted = [_least(remat, allowed, part, True) for part in parts]
        out += _falling(remat, [c for c in hosted if c and c.away])
    return out


def _falling(remat: Remat, chosen: Iterable[Chosen | None]) -> list[dict[str, str]]:
    """What plans say of these, as far as each keeps less than all before it."""
    out: list[dict[str, str]] = []
    before = kept(remat, Chosen())
    for one in chosen:
        if one is None:
            continue
        size = kept(remat, one)
        if size < before * (1 - GAP):
            before = size
            out.append(starred({i.name: _said(one, remat.fold.of[i.index]) for i in remat.forward}))
    return out


def _said(chosen: Chosen, cls: int) -> str | None:
    return RECOMPUTE if cls in chosen.again else OFFLOADED if cls in chosen.away else None


def kept(remat: Remat, chosen: Chosen) -> float:
    """Bytes of a micro-batch on the device between forward and backward."""
    needed: set[Version] = set()
    size = 0.0
    stack = [v for v, life in remat.lives.items() if life.last >= 0]
    while stack:
        version = stack.pop()
        if version in needed:
            continue
        needed.add(version)
        item = remat.items.items[version.tensor.item]
        made = remat.fold.of[item.index]
        if made in chosen.again:
            stack += remat.operands(item)
        elif not chosen.away.intersection(remat.sources(version.tensor)):
            size += remat.size(version)
    return size


def _least(remat: Remat, allowed: Collection[int], part: float, hosts: bool) -> Chosen | None:
    """What takes least seconds of all that keep no more than the part of what they can let go of; None if nothing does.

    allowed: classes that may be computed again. hosts: whether anything may wait there.
    """
    sent = frozenset(c for c in remat.classes if hosts and c not in allowed and remat.sent(c))
    most, least = kept(remat, Chosen()), kept(remat, Chosen(frozenset(allowed), sent))
    program = Columns(remat, allowed, hosts, TIE / max(most, 1.0))
    limit = least + part * (most - least)
    row = {program.keep[v]: size / max(most, 1.0) for v, size in program.sizes.items()}
    program.linear.row(row, -math.inf, limit / max(most, 1.0) * (1 + GAP))
    values = solve_linear(program.linear, SECONDS, GAP)
    return None if values is None else program.chosen(values)


__all__ = ["BETWEEN", "PARTS", "kept", "levels"]
