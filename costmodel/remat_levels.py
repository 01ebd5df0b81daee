"""How much less a micro-batch may keep, and what it takes: levels for the stages of a pipeline.

A stage holds what it keeps of a micro-batch for all that are in flight, and what its backward computes again, or has
back from the host, for the one that it works on. So a level is judged by what is kept between forward and backward, not
by a peak: with the columns of `costmodel.remat`, of which those of (5) at one moment only, when the backward begins,

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
from autopar.costmodel.model import Linear, Terms
from autopar.costmodel.remat import GAP, SECONDS, Chosen, Remat, Version
from autopar.costmodel.remat_search import Rematerialiser
from autopar.graph import Program
from autopar.plan import Plan
from autopar.recompute import OFFLOADED, RECOMPUTE

#: Parts of what can be let go of that a level keeps; and of levels between.
PARTS, BETWEEN = (0.7, 0.4, 0.0), (0.9, 0.8, 0.55, 0.25, 0.12)
#: Whole micro-batches on the host of one rank, at most: it has as many in flight as there are stages, or about twice as
#: many, each of its own stage's layers.
_FLIGHTS = 2
#: Prices of a byte where two answers take as long, in shares of all seconds.
TIE = 1e-4


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
        chosen = [_least(remat, allowed, part) for part in parts]
        layer = [Chosen(frozenset(remat.classes) - {z}) for z in search.narrow]  # by hand: it keeps one of what it gets
        if layer:
            chosen.append(min(layer, key=lambda c: (kept(remat, c), sorted(c.again))))
        out += _falling(remat, chosen)
    if away and remat.hosts:
        sent = frozenset(c for c in remat.classes if remat.sent(c))
        found = [c for part in parts if (c := _least(remat, allowed, part, sent)).away]
        out += _falling(remat, [c for c in found if _FLIGHTS * _hosted(remat, c) <= search.room])
    return out


def _falling(remat: Remat, chosen: Iterable[Chosen]) -> list[dict[str, str]]:
    """What plans say of these, as far as each keeps less than all before it."""
    out: list[dict[str, str]] = []
    before = kept(remat, Chosen())
    for one in chosen:
        size = kept(remat, one)
        if size < before * (1 - GAP):
            before = size
            out.append(starred({i.name: _said(one, remat.fold.of[i.index]) for i in remat.forward}))
    return out


def _hosted(remat: Remat, chosen: Chosen) -> float:
    """Bytes of a micro-batch on the host."""
    return sum(sum(remat.waiting(c)) * len(remat.fold.members[c]) for c in chosen.away)


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


def _least(
    remat: Remat, allowed: Collection[int], part: float, sent: Collection[int] = frozenset()
) -> Chosen:  # fmt: skip
    """What takes least seconds of all that keep no more than the part of what they can let go of.

    allowed: classes that may be computed again. sent: those that may wait on the host.
    """
    most, least = kept(remat, Chosen()), kept(remat, Chosen(frozenset(allowed), frozenset(sent) - frozenset(allowed)))
    linear = Linear()
    seconds = {c: remat.seconds(c) * len(remat.fold.members[c]) for c in remat.classes}
    scale = 1e3 / max(sum(seconds.values()), 1e-12)
    copy = {c: linear.column(seconds[c] * scale, binary=True) for c in sorted(allowed)}
    away = {c: linear.column(TIE * remat.sent(c) * scale, binary=True) for c in sorted(sent)}
    for c in away.keys() & copy.keys():
        linear.row({copy[c]: 1.0, away[c]: 1.0}, -math.inf, 1.0)
    if away:
        ways = {away[c]: remat.sent(c) * len(remat.fold.members[c]) * scale for c in away}
        more = {copy[c]: -remat.usable * seconds[c] * scale for c in copy}
        for half, busy in zip(remat.halves(), (ways, {**ways, **more})):
            waited = linear.column(1.0, high=math.inf)
            linear.row({**busy, waited: -1.0}, -math.inf, remat.usable * half * scale)
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
        sources = {columns[c] for columns in (copy, away) for c in remat.sources(members[0].tensor) if c in columns}
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
    if values is None:
        return Chosen(frozenset(allowed), frozenset(sent) - frozenset(allowed))
    return Chosen(*(frozenset(c for c, column in cols.items() if values[column] > 0.5) for cols in (copy, away)))


__all__ = ["BETWEEN", "PARTS", "kept", "levels"]
