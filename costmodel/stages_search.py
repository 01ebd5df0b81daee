"""The least of the largest row over all ways through a layered graph: equations (5) to (9) of `costmodel.stages`.

A way is one edge (a stage: first piece, last piece, option) per layer. A row is linear: coefficients [stages, COLUMNS]
on the numbers of the edges. Objective rows are to be small, limit rows must not exceed 1. No schedule is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autopar.costmodel.stages_chain import Edges, Floats, Ints

#: Relative: values closer than this are equal.
EQUAL = 1e-9
#: Rows closer than this, in units of the value looked for, are one row.
_ROUND = 12
#: A way: the edge of every stage.
Way = tuple[int, ...]
#: Subgradient steps: before any edge is removed, when a bound far off may do; and behind.
FIRST, TURNS = 8, 30
#: How often prices are looked for, and the share of the gap that has to be closed by it to go on.
PRICES, LEAST_GAIN = 12, 0.02
#: Rounds of looking near a good way, and how many pieces off.
NEARBY, REACH = 8, 6
#: Beams over everything, and how many numbers for the edges are too many for them, as a multiple of what they may keep.
ROUNDS, TOO_MUCH = 6, 1.0
#: Ways judged at once, and at most behind one beam; of those, the ways whose rows are added.
AT_ONCE, MOST, TEACH = 256, 4096, 8


@dataclass
class Rows:
    """Rows that bound a value v from below: coefficients . numbers <= share v + fixed.

    Attributes:
        coefficients: [rows, stages, COLUMNS]. share: 1 of an objective row, 0 of a limit. fixed: 0 of an objective
            row, 1 of a limit, and in between for sums of both.
    """

    coefficients: Floats
    share: Floats
    fixed: Floats

    @classmethod
    def of(cls, objective: Floats, limits: Floats) -> Rows:
        """Objective rows and limits."""
        share = np.concatenate([np.ones(len(objective)), np.zeros(len(limits))])
        return cls(np.concatenate([objective, limits]), share, 1 - share)

    def __len__(self) -> int:
        return len(self.share)

    def joined(self, other: Rows) -> Rows:
        """Both, each row once."""
        every = np.concatenate([self.coefficients, other.coefficients])
        share, fixed = np.concatenate([self.share, other.share]), np.concatenate([self.fixed, other.fixed])
        # Seconds and bytes have units that are worlds apart: what is small is judged in every column by itself.
        top = np.abs(every).max((0, 1), initial=0.0)
        scaled = (every / np.where(top > 0, top, 1.0)).reshape(len(every), -1)
        keys = np.concatenate([scaled, share[:, None], fixed[:, None]], 1)
        once = np.sort(np.unique(np.round(keys, _ROUND), axis=0, return_index=True)[1])
        return Rows(every[once], share[once], fixed[once])

    def summed(self, weights: Floats) -> Rows:
        """One row: the sum of all, each times its weight."""
        return Rows(
            np.tensordot(weights, self.coefficients, 1)[None],
            np.array([weights @ self.share]),
            np.array([weights @ self.fixed]),
        )

    def least(self, values: Floats) -> Floats:
        """The least v that values [..., rows] allow; infinite where a limit is exceeded."""
        limits = self.share == 0
        v = ((values - self.fixed)[..., ~limits] / self.share[~limits]).max(-1, initial=-np.inf)
        broken = (values[..., limits] > self.fixed[limits] * (1 + EQUAL)).any(-1)
        return np.where(broken, np.inf, v)


@dataclass
class Layers:
    """The edges that every stage may be, and shortest ways through them.

    Attributes:
        edges: of the chain. keep: per stage, which of them, in order.
    """

    edges: Edges
    keep: list[Ints]

    @classmethod
    def of(cls, edges: Edges, allowed: Sequence[NDArray[np.bool_]]) -> Layers:
        """Of the edges that each stage may be, those that a whole way passes."""
        stages, end = len(allowed), edges.pieces
        kept = [
            mask & (edges.first >= i) & (edges.last <= end - (stages - 1 - i)) & ((edges.first == 0) == (i == 0))
            & ((edges.last == end) == (i == stages - 1)) for i, mask in enumerate(allowed)
        ]  # fmt: skip
        reached = np.zeros(end + 1, dtype=bool)
        reached[0] = True
        for i in range(stages):
            kept[i] &= reached[edges.first]
            reached = np.zeros(end + 1, dtype=bool)
            reached[edges.last[kept[i]]] = True
        for i in reversed(range(stages)):
            kept[i] &= reached[edges.last]
            reached = np.zeros(end + 1, dtype=bool)
            reached[edges.first[kept[i]]] = True
        return cls(edges, [np.flatnonzero(mask) for mask in kept])

    def __len__(self) -> int:
        return len(self.keep)

    @cached_property
    def empty(self) -> bool:
        """Whether there is no way."""
        return any(not len(k) for k in self.keep)

    @cached_property
    def numbers(self) -> list[Floats]:
        """Per stage: [edges, COLUMNS]."""
        return [self.edges.numbers[k] for k in self.keep]

    @cached_property
    def first(self) -> list[Ints]:
        """Per stage: first piece of every edge."""
        return [self.edges.first[k] for k in self.keep]

    @cached_property
    def last(self) -> list[Ints]:
        """Per stage: where every edge ends."""
        return [self.edges.last[k] for k in self.keep]

    @cached_property
    def start(self) -> list[Ints]:
        """Per stage, [pieces + 2]: where the edges from every piece begin."""
        return [np.searchsorted(f, np.arange(self.edges.pieces + 2)) for f in self.first]

    @cached_property
    def _by_first(self) -> list[tuple[Ints, Ints]]:
        """Per stage: the first pieces there are, and where the edges from each begin."""
        return [np.unique(first, return_index=True) for first in self.first]

    @cached_property
    def _by_last(self) -> list[tuple[Ints, Ints, Ints]]:
        """Per stage: the order by last piece, the last pieces there are, and where each begins in that order."""
        found = []
        for last in self.last:
            order = np.argsort(last, kind="stable")
            ends, begins = np.unique(last[order], return_index=True)
            found.append((order, ends, begins))
        return found

    def seconds(self, stage: int, coefficients: Floats) -> Floats:
        """[edges, rows]: what every edge of a stage adds to every row."""
        return self.numbers[stage] @ coefficients[:, stage].T

    def behind(self, coefficients: Floats, costs: Sequence[Floats] | None = None) -> list[Floats]:
        """Per stage and at the end, [pieces + 1, rows]: least sum from a piece to the end, every row for itself."""
        shape = (self.edges.pieces + 1, len(coefficients))
        at = np.full(shape, np.inf)
        at[-1] = 0.0
        found = [at]
        for i in reversed(range(len(self))):
            cost = self.seconds(i, coefficients) if costs is None else costs[i]
            pieces, begins = self._by_first[i]
            at = np.full(shape, np.inf)
            at[pieces] = np.minimum.reduceat(cost + found[0][self.last[i]], begins, axis=0)
            found.insert(0, at)
        return found

    def before(self, coefficients: Floats, costs: Sequence[Floats]) -> list[Floats]:
        """As `behind`, from the beginning to a piece."""
        shape = (self.edges.pieces + 1, len(coefficients))
        at = np.full(shape, np.inf)
        at[0] = 0.0
        found = [at]
        for i in range(len(self)):
            order, ends, begins = self._by_last[i]
            line = (costs[i] + found[-1][self.first[i]])[order]
            at = np.full(shape, np.inf)
            at[ends] = np.minimum.reduceat(line, begins, axis=0)
            found.append(at)
        return found

    def shortest(self, coefficients: Floats) -> tuple[float, Way]:
        """(value, way) of one row [stages, COLUMNS]; there must be a way."""
        return self._shortest([self.numbers[i] @ coefficients[i] for i in range(len(self))])

    def _shortest(self, costs: Sequence[Floats]) -> tuple[float, Way]:
        """The same from what every edge costs, per stage [edges]."""
        at = np.full(self.edges.pieces + 1, np.inf)
        at[-1] = 0.0
        through = []
        for i in reversed(range(len(self))):
            line = costs[i] + at[self.last[i]]
            pieces, begins = self._by_first[i]
            at = np.full(self.edges.pieces + 1, np.inf)
            at[pieces] = np.minimum.reduceat(line, begins)
            through.append(line)
        piece, way = 0, []
        for i, line in enumerate(reversed(through)):
            begin, end = self.start[i][piece], self.start[i][piece + 1]
            edge = int(begin + line[begin:end].argmin())
            way.append(int(self.keep[i][edge]))
            piece = int(self.last[i][edge])
        return float(at[0]), tuple(way)

    def levelled(self, weights: Sequence[Floats]) -> Way:
        """A way whose largest weight is least; weights: per stage, [edges]. Beyond that, sums of squares decide."""
        best = np.full(self.edges.pieces + 1, np.inf)
        best[0] = -np.inf
        for i, weight in enumerate(weights):
            order, ends, begins = self._by_last[i]
            line = np.maximum(best[self.first[i]], weight)[order]
            best = np.full(self.edges.pieces + 1, np.inf)
            best[ends] = np.minimum.reduceat(line, begins)
        top = best[-1] * (1 + EQUAL)
        inside = Layers.of(self.edges, [_mask(len(self.edges), k[w <= top]) for k, w in zip(self.keep, weights)])
        places = [np.searchsorted(k, kept) for k, kept in zip(self.keep, inside.keep)]
        return inside._shortest([(weight[at] / (top or 1.0)) ** 2 for weight, at in zip(weights, places)])[1]

    def near(self, cuts: Sequence[float], reach: int) -> Layers:
        """Only stages that begin and end within so many pieces of some cuts, [stages + 1]."""
        kept = []
        for i, keep in enumerate(self.keep):
            close = (np.abs(self.first[i] - cuts[i]) <= reach) & (np.abs(self.last[i] - cuts[i + 1]) <= reach)
            kept.append(_mask(len(self.edges), keep[close]))
        return Layers.of(self.edges, kept)

    def within(self, rows: Rows, value: float) -> Layers:
        """Without the edges that no way below `value` passes: (7)."""
        costs = [self.seconds(i, rows.coefficients) for i in range(len(self))]
        behind, before = self.behind(rows.coefficients, costs), self.before(rows.coefficients, costs)
        kept = []
        for i in range(len(self)):
            through = costs[i] + before[i][self.first[i]] + behind[i + 1][self.last[i]]
            kept.append(_mask(len(self.edges), self.keep[i][rows.least(through) < value * (1 - EQUAL)]))
        return Layers.of(self.edges, kept)


def _mask(size: int, kept: Ints) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=bool)
    mask[kept] = True
    return mask


@dataclass
class Priced:
    """What `dual` found: a lower bound of v, the weights and the one row that prove it, ways met meanwhile, and the
    mean of the late ones: its numbers [stages, COLUMNS] and cuts [stages + 1]. The mean is no way, but of all mixtures
    of ways it comes near the best for the rows (Shor 1985; Sherali and Choi 1996)."""

    bound: float
    weights: Floats
    row: Rows
    ways: list[Way]
    numbers: Floats
    cuts: Floats


def dual(layers: Layers, rows: Rows, target: float, turns: int, start: Floats | None = None) -> Priced:
    """Weights of the rows whose sum bounds v best, by subgradients with Polyak's step towards `target`: (6).

    Weights of objective rows sum to one. Stops where the bound reaches `target`.
    """
    objective = rows.share > 0
    weights = np.where(objective, 1.0 / objective.sum(), 0.0)
    if start is not None and start.sum() > 0:
        weights[: len(start)], weights[len(start) :] = start, 0.0
    bound, best = -np.inf, weights
    met: list[tuple[Way, float]] = []
    pace, stale = 1.0, 0
    for _ in range(turns):
        row = rows.summed(weights)
        value, way = layers.shortest(row.coefficients[0])
        here = value - float(row.fixed[0])
        stale += 1
        if here > bound:
            stale = 0 if here > bound + 1e-4 * abs(target - bound) else stale
            bound, best = here, weights
        slope = (rows.coefficients * layers.edges.numbers[list(way)]).sum((1, 2)) - rows.fixed
        slope = np.where(objective, slope - slope[objective].mean(), slope)
        slope = np.where(~objective & (weights <= 0) & (slope < 0), 0.0, slope)
        steep = float(slope @ slope)
        step = pace * max(target - here, 1e-6) / max(steep, 1e-24)
        met.append((way, step))
        if bound >= target * (1 - EQUAL) or steep <= 1e-24:
            break
        if stale >= 4:
            pace, stale, weights = pace / 2, 0, best
        weights = weights + step * slope
        weights = np.where(objective, _simplex(weights, objective), np.maximum(weights, 0.0))
    late = met[len(met) // 2 :]
    share = np.array([step for _, step in late])
    ways = np.array([way for way, _ in late])
    share /= share.sum()
    numbers = np.tensordot(share, layers.edges.numbers[ways], 1)
    ends = np.concatenate([layers.edges.first[ways], layers.edges.last[ways[:, -1:]]], 1)
    return Priced(bound, best, rows.summed(best), list(dict.fromkeys(w for w, _ in met)), numbers, share @ ends)


def _simplex(weights: Floats, of: NDArray[np.bool_]) -> Floats:
    """The nearest point whose entries `of` are not negative and sum to one.

    Source: Held, Wolfe, Crowder, "Validation of subgradient optimization" (1974).
    """
    ordered = np.sort(weights[of])[::-1]
    level = (np.cumsum(ordered) - 1) / np.arange(1, len(ordered) + 1)
    count = int(np.flatnonzero(ordered > level)[-1])
    return np.maximum(weights - level[count], 0.0)


def beam(layers: Layers, rows: Rows, value: float, work: int) -> tuple[list[Way], Floats, float]:
    """Ways whose rows allow less than `value`, best first, with what they allow; and what was left out allows: (8).

    Grows all ways stage by stage. Where more than `work` numbers would have to be kept at once, the ones that allow
    least are: the third answer is the least that one left out could come to, infinite where none was.
    """
    behind = layers.behind(rows.coefficients)
    pieces, sums = np.zeros(1, dtype=np.int64), np.zeros((1, len(rows)))
    history: list[tuple[Ints, Ints]] = []
    dropped, allowed = np.inf, np.zeros(1)
    for i in range(len(layers)):
        start = layers.start[i]
        begins, counts = start[pieces], start[pieces + 1] - start[pieces]
        parent = np.repeat(np.arange(len(pieces)), counts)
        edge = np.arange(len(parent)) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        grown = sums[parent] + layers.seconds(i, rows.coefficients)[edge]
        allowed = rows.least(grown + behind[i + 1][layers.last[i][edge]])
        order = np.argsort(allowed, kind="stable")
        order = order[: int(np.searchsorted(allowed[order], value * (1 - EQUAL)))]
        room = len(order)
        if i + 1 < len(layers):
            after = layers.last[i][edge[order]]
            width = layers.start[i + 1][after + 1] - layers.start[i + 1][after]
            room = max(1, int(np.searchsorted(np.cumsum(width) * len(rows), work, side="right")))
        if room < len(order):
            dropped = min(dropped, float(allowed[order[room]]))
            order = order[:room]
        allowed, sums, pieces = allowed[order], grown[order], layers.last[i][edge[order]]
        history.append((parent[order], layers.keep[i][edge[order]]))
    ways = np.empty((len(pieces), len(layers)), dtype=np.int64)
    at = np.arange(len(pieces))
    for i in reversed(range(len(layers))):
        parent, chosen = history[i]
        ways[:, i] = chosen[at]
        at = parent[at]
    return [tuple(way) for way in ways.tolist()], allowed, dropped


class Judge(Protocol):
    """What a way is really worth, in the unit of the rows."""

    def values(self, ways: Sequence[Way]) -> Floats:
        """Of ways that keep the limits."""

    def rows(self, numbers: Floats) -> Rows:
        """Rows that hold for all ways, and are met with equality at numbers [candidates, stages, COLUMNS]."""


@dataclass
class Least:
    """The best way found (None: none below the value given), its value, and a value that none is below.

    judged: how many were.
    """

    way: Way | None
    value: float
    bound: float
    judged: int = 0

    @property
    def proved(self) -> bool:
        """Whether none is better."""
        return self.bound >= self.value * (1 - EQUAL)


def minimise(layers: Layers, rows: Rows, judge: Judge, value: float, *, start: Way | None, work: int) -> Least:
    """The way of least value below `value`: (9).

    Args:
        start: a way to begin with, if one is known. work: numbers that a beam may keep.
    """
    return _Minimum(layers, rows, judge, value, start, work).run()


class _Minimum:
    def __init__(self, layers: Layers, rows: Rows, judge: Judge, value: float, start: Way | None, work: int):
        self.layers, self.rows, self.judge, self.work = layers, rows, judge, work
        self.least = Least(None, value, -np.inf)
        self.start = start
        self.seen: set[Way] = set()
        self.weights: Floats | None = None
        self.priced = rows  # the sums that prove the best bounds

    def run(self) -> Least:
        """See `minimise`."""
        if not self._price(FIRST, 1):
            self._narrow()
            if not self._done() and not self._price(TURNS, PRICES):
                self._nearby()
                self._everywhere()
        return self.least

    def _done(self) -> bool:
        if self.layers.empty:
            self._prove(np.inf)
        return self.least.proved

    def _prove(self, bound: float) -> None:
        self.least.bound = min(max(self.least.bound, bound), self.least.value)

    def _narrow(self) -> None:
        self.layers = self.layers.within(self.rows.joined(self.priced), self.least.value)

    def _price(self, turns: int, times: int) -> bool:
        """Raise the bound, learning the longest paths of mixtures of ways; whether that is the end."""
        for _ in range(times):
            if self._done():
                return True
            before = self.least.bound
            priced = dual(self.layers, self.rows, self.least.value, turns, self.weights)
            self.weights, self.priced, self.mean = priced.weights, priced.row, priced.cuts
            self._prove(priced.bound)
            self._judged(priced.ways[-AT_ONCE:])
            self.rows = self.rows.joined(self.judge.rows(priced.numbers[None]))
            if self.least.bound < before + LEAST_GAIN * (self.least.value - before):
                break
        return self._done()

    def _nearby(self) -> None:
        """Look for better ways near the best known, and near the mean of the ways that the prices point to."""
        edges = self.layers.edges
        around = [list(self.mean)]
        for _ in range(NEARBY):
            value = self.least.value
            best = self.least.way or self.start
            if best is not None:
                around.append([*edges.first[list(best)].tolist(), edges.pieces])
            for cuts in around:
                near = self.layers.near(cuts, REACH)
                if not near.empty:
                    self._judged(beam(near, self.rows, self.least.value, self.work // 8)[0][: AT_ONCE // 4])
            around = []
            if self.least.value > value * (1 - 1e-4):
                break

    def _everywhere(self) -> None:
        """Enumerate what is left, if it is not hopelessly much."""
        for _ in range(ROUNDS):
            before = self.least.value, self.least.bound, len(self.rows)
            self._narrow()
            if self._done() or sum(map(len, self.layers.keep)) * len(self.rows) > TOO_MUCH * self.work:
                break
            ways, allowed, dropped = beam(
                self.layers, self.rows.joined(self.priced), self.least.value, self.work
            )
            for at in range(0, len(ways), AT_ONCE):
                if allowed[at] >= self.least.value * (1 - EQUAL):
                    break
                if at >= MOST:
                    dropped = min(dropped, float(allowed[at]))
                    break
                self._judged(ways[at : at + AT_ONCE])
            self._prove(dropped)
            if self._done() or (self.least.value, self.least.bound, len(self.rows)) == before:
                break
            self._price(TURNS, 1)

    def _judged(self, ways: Sequence[Way]) -> None:
        """Judge the ways that are new and keep the limits, and learn from some of them."""
        least, numbers = self.least, self.layers.edges.numbers
        fresh = [way for way in dict.fromkeys(ways) if way not in self.seen]
        self.seen.update(fresh)
        if fresh:
            sums = np.tensordot(numbers[np.array(fresh)], self.rows.coefficients, ((1, 2), (1, 2)))
            fresh = [way for way, value in zip(fresh, self.rows.least(sums).tolist()) if value < np.inf]
        if not fresh:
            return
        values = self.judge.values(fresh)
        least.judged += len(fresh)
        order = np.argsort(values, kind="stable").tolist()
        if values[order[0]] < least.value:
            least.way, least.value = fresh[order[0]], float(values[order[0]])
        taught = dict.fromkeys([*order[: TEACH // 2], *range(min(len(fresh), TEACH // 2))])
        self.rows = self.rows.joined(self.judge.rows(numbers[np.array([fresh[i] for i in taught])]))


__all__ = ["EQUAL", "Judge", "Layers", "Least", "Priced", "Rows", "Way", "beam", "dual", "minimise"]
