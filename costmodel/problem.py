"""The numbers of one mesh axis: decisions, flows between them, what they cost. Nothing here knows a tensor or a solver.

`costmodel.ilp` writes them as an integer program; `evaluate` and `overlapped` say what a choice costs, straight from
the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from autopar.errors import SolverError

INF = math.inf
#: Phases of a step: forward, backward, and what comes after both.
PHASES, AFTER = 2, 2


class NoOption(SolverError):
    """Group `group` has no option that fits its neighbours."""

    def __init__(self, group: int):
        super().__init__(f"decision {group} has no option that fits its neighbours")
        self.group = group


@dataclass
class Group:
    """One decision: seconds, tie-breaker and bytes of every option; the phase in which its seconds pass; bytes that
    the backward adds (gradients)."""

    cost: list[float]
    tie: list[float]
    memory: list[float]
    phase: int = 0
    grown: list[float] | None = None


@dataclass
class Consumer:
    """`column[o]`: what option o of `group` asks for. `share`: consumers of one share number split one transport in
    rows that do not share everywhere."""

    group: int
    column: list[int]
    share: int = 0


@dataclass
class Flow:
    """A tensor (or `count` alike) from its producer to its consumers.

    row[o]: row of the producer's option o. cost[r][q]: seconds of one transport. memory[r][q]: bytes it leaves behind
    until the backward has read them.
    apart[r]: in this row only consumers of the same share number share, and the share is the phase.
    late: computation need not wait for it. tiers[r][q]: the seconds of `cost` that links of each tier are busy.
    phase: in which it travels, in rows that share everywhere.
    """

    group: int
    row: list[int]
    consumers: list[Consumer]
    cost: list[list[float]]
    count: float = 1.0
    memory: list[list[float]] | None = None
    apart: list[bool] | None = None
    late: bool = False
    tiers: list[list[tuple[float, ...]]] | None = None
    phase: int = 0

    def when(self, row: int, share: int) -> int:
        """The phase in which a transport from `row` for consumers of `share` travels."""
        return share if self.apart is not None and self.apart[row] else self.phase


@dataclass
class Keep:
    """Bytes kept for the backward, for every distinct column that a consumer asks for."""

    size: list[float]
    consumers: list[Consumer]


@dataclass
class Problem:
    """All numbers of one axis. `limit` in bytes, None for none; `fixed` bytes come on top.

    usable[p][t]: part of phase p's busy time that late transports on tier t can hide behind; None: nothing overlaps.
    """

    groups: list[Group]
    flows: list[Flow] = field(default_factory=list)
    keeps: list[Keep] = field(default_factory=list)
    limit: float | None = None
    fixed: float = 0.0
    penalty: float | None = None  # seconds per byte over the limit; None: the limit is hard
    usable: Sequence[Sequence[float]] | None = None


def _sent(problem: Problem, choice: Sequence[int]) -> Iterator[tuple[Flow, int, int, int]]:
    """Every distinct transport that a choice needs: flow, row, column, share."""
    for flow in problem.flows:
        r = flow.row[choice[flow.group]]
        apart = flow.apart is not None and flow.apart[r]
        for q, share in {(c.column[choice[c.group]], c.share if apart else 0) for c in flow.consumers}:
            yield flow, r, q, share


def evaluate(problem: Problem, choice: Sequence[int]) -> tuple[float, float]:
    """Seconds (one after the other, without tie-breakers) and bytes of a choice, at the fuller of two moments: between
    forward and backward, when all is kept, and behind the backward, when all has grown."""
    seconds = sum(g.cost[o] for g, o in zip(problem.groups, choice))
    turn = problem.fixed + sum(g.memory[o] for g, o in zip(problem.groups, choice))
    end = turn + sum(g.grown[o] for g, o in zip(problem.groups, choice) if g.grown)
    for flow, r, q, _ in _sent(problem, choice):
        seconds += flow.count * flow.cost[r][q]
        turn += flow.memory[r][q] if flow.memory else 0.0
    for keep in problem.keeps:
        turn += sum(keep.size[q] for q in {c.column[choice[c.group]] for c in keep.consumers})
    return seconds, max(turn, end)


@dataclass(frozen=True)
class Loads:
    """Seconds of a choice by phase, and by tier: busy (computing or waited for), late and blocking transports; `after`
    both phases."""

    busy: list[float]
    late: list[list[float]]
    block: list[list[float]]
    after: float

    def exposed(self, usable: Sequence[Sequence[float]]) -> float:
        """Seconds of late transports that nothing hides, equation (8) of `costmodel.ilp`."""
        return sum(
            max((a - u * (busy - b) for a, b, u in zip(late, block, part)), default=0.0)
            if any(a > u * (busy - b) for a, b, u in zip(late, block, part))
            else 0.0
            for busy, late, block, part in zip(self.busy, self.late, self.block, usable)
        )

    def step(self, usable: Sequence[Sequence[float]]) -> float:
        """Seconds of the step with overlap."""
        return sum(self.busy) + self.after + self.exposed(usable)


def loads(problem: Problem, choice: Sequence[int], tiers: int) -> Loads:
    """Where the seconds of a choice go."""
    busy, after = [0.0] * PHASES, 0.0
    late, block = ([[0.0] * tiers for _ in range(PHASES)] for _ in range(2))
    for group, o in zip(problem.groups, choice):
        if group.phase == AFTER:
            after += group.cost[o]
        else:
            busy[group.phase] += group.cost[o]
    for flow, r, q, share in _sent(problem, choice):
        p = flow.when(r, share)
        busy[p] += flow.count * flow.cost[r][q]
        for t, seconds in enumerate(flow.tiers[r][q] if flow.tiers and flow.cost[r][q] < INF else ()):
            (late if flow.late else block)[p][t] += flow.count * seconds
            if flow.late:
                busy[p] -= flow.count * seconds
    return Loads(busy, late, block, after)


def overlapped(problem: Problem, choice: Sequence[int]) -> float:
    """Seconds of a choice with overlap; those of `evaluate` where nothing overlaps."""
    if problem.usable is None:
        return evaluate(problem, choice)[0]
    return loads(problem, choice, len(problem.usable[0])).step(problem.usable)


def prune(problem: Problem) -> list[list[int]]:
    """Options of every group that have a partner for every flow; the rest can never be chosen.

    Raises:
        NoOption: a group has none left.
    """
    alive = [set(range(len(g.cost))) for g in problem.groups]
    touching: list[list[tuple[Flow, Consumer]]] = [[] for _ in problem.groups]
    for flow in problem.flows:
        if any(c == INF for line in flow.cost for c in line):
            for consumer in flow.consumers:
                touching[flow.group].append((flow, consumer))
                touching[consumer.group].append((flow, consumer))
    queue = {g for g, row in enumerate(touching) if row}
    while queue:
        g = queue.pop()
        for flow, consumer in touching[g]:
            rows = {flow.row[o] for o in alive[flow.group]}
            cols = {consumer.column[o] for o in alive[consumer.group]}
            good_rows = {r for r in rows if any(flow.cost[r][q] < INF for q in cols)}
            good_cols = {q for q in cols if any(flow.cost[r][q] < INF for r in rows)}
            keep_p = {o for o in alive[flow.group] if flow.row[o] in good_rows}
            keep_c = {o for o in alive[consumer.group] if consumer.column[o] in good_cols}
            for group, kept in ((flow.group, keep_p), (consumer.group, keep_c)):
                if len(kept) < len(alive[group]):
                    alive[group] &= kept
                    queue.add(group)
    empty = [g for g, options in enumerate(alive) if not options]
    if empty:
        raise NoOption(empty[0])
    return [sorted(options) for options in alive]


def dominate(problem: Problem, alive: list[list[int]]) -> tuple[list[list[int]], list[dict[int, int]]]:
    """The options that are worth offering, and for every one that is not, an option that is never worse.

    Of options that all flows see alike (the same row of costs, the same columns) only those stay that no other beats
    in seconds and in bytes.
    """
    seen: list[list[Sequence[object]]] = [[] for _ in problem.groups]
    for flow in problem.flows:
        alike: dict[object, int] = {}
        label = [
            alike.setdefault(
                (
                    tuple(flow.cost[r]),
                    tuple(flow.memory[r]) if flow.memory else (),
                    flow.apart is not None and flow.apart[r],
                    tuple(flow.tiers[r]) if flow.tiers else (),
                ),
                r,
            )
            for r in range(len(flow.cost))
        ]
        seen[flow.group].append([label[r] for r in flow.row])
        for consumer in flow.consumers:
            seen[consumer.group].append(consumer.column)
    for keep in problem.keeps:
        for consumer in keep.consumers:
            seen[consumer.group].append(consumer.column)
    out, stand = [], []
    for group, options, labels in zip(problem.groups, alive, seen):
        best: dict[tuple[object, ...], list[int]] = {}
        instead: dict[int, int] = {}
        grown = group.grown or [0.0] * len(group.cost)
        cheapest = sorted(options, key=lambda o: (group.cost[o] + group.tie[o], group.memory[o], grown[o], o))
        for o in cheapest:
            row = best.setdefault(tuple(column[o] for column in labels), [])
            less = (w for w in row if group.memory[w] <= group.memory[o] and grown[w] <= grown[o])
            winner = next(less, None)
            if winner is None:
                row.append(o)
            else:
                instead[o] = winner
        out.append(sorted(o for row in best.values() for o in row))
        stand.append(instead)
    return out, stand
