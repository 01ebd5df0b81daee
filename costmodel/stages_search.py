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

from autopar.costmodel.stages_chain import COLUMNS, Edges, Floats, Ints

#: Relative: values closer than this are equal.
EQUAL = 1e-9
#: Rows closer than this, in units of the value looked for, are one row.
_ROUND = 12
#: A way: the edge of every stage.
Way = tuple[int, ...]
#: Subgradient steps: before any edge is removed, when a bound far off may do; and behind.
FIRST, TURNS = 8, 40
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
        keys = np.concatenate([every.reshape(len(every), -1), share[:, None], fixed[:, None]], 1)
        top = np.abs(every).max() if every.size else 1.0
        once = np.sort(np.unique(np.round(keys / (top or 1.0), _ROUND), axis=0, return_index=True)[1])
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
        used = np.flatnonzero(coefficients[:, stage].any(0))
        return self.numbers[stage][:, used] @ coefficients[:, stage][:, used].T

    def behind(self, coefficients: Floats, costs: Sequence[Floats] | None = None) -> list[Floats]:
        """Per stage and at the end, [pieces + 1, rows]: least sum from a piece to the end, every row for itself."""
        shape = (self.edges.pieces + 1, len(coefficients))
        at = np.full(shape, np.inf)
        at[-1] = 0.0
        found = [at]
        for i in reversed(range(len(self))):
            cost = self.seconds(i, coefficients) if costs is None else costs[i]
            pieces, begins = np.unique(self.first[i], return_index=True)
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
        row = coefficients[None]
        costs = [self.seconds(i, row) for i in range(len(self))]
        behind = self.behind(row, costs)
        piece, way = 0, []
        for i in range(len(self)):
            span = slice(self.start[i][piece], self.start[i][piece + 1])
            line = costs[i][span, 0] + behind[i + 1][self.last[i][span], 0]
            edge = int(self.start[i][piece] + line.argmin())
            way.append(int(self.keep[i][edge]))
            piece = int(self.last[i][edge])
        return float(behind[0][0, 0]), tuple(way)

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
        squares = []
        for i, kept in enumerate(inside.keep):
            weight = weights[i][np.searchsorted(self.keep[i], kept)]
            squares.append((weight / (top or 1.0))[:, None] ** 2)
        behind = inside.behind(np.zeros((1, len(self), len(COLUMNS))), squares)
        piece, way = 0, []
        for i in range(len(inside)):
            begin, end = inside.start[i][piece], inside.start[i][piece + 1]
            edge = int(begin + (squares[i][begin:end, 0] + behind[i + 1][inside.last[i][begin:end], 0]).argmin())
            way.append(int(inside.keep[i][edge]))
            piece = int(inside.last[i][edge])
        return tuple(way)

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
    """What `dual` found: a lower bound of v, the weights and the one row that prove it, and ways met meanwhile."""

    bound: float
    weights: Floats
    row: Rows
    ways: list[Way]


def dual(layers: Layers, rows: Rows, target: float, turns: int, start: Floats | None = None) -> Priced:
    """Weights of the rows whose sum bounds v best, by subgradients with Polyak's step towards `target`: (6).

    Weights of objective rows sum to one. Stops where the bound reaches `target`.
    """
    objective = rows.share > 0
    weights = np.where(objective, 1.0 / objective.sum(), 0.0)
    if start is not None and start.sum() > 0:
        weights[: len(start)], weights[len(start) :] = start, 0.0
    best = Priced(-np.inf, weights, rows.summed(weights), [])
    ways: dict[Way, None] = {}
    pace, stale = 1.0, 0
    for _ in range(turns):
        row = rows.summed(weights)
        value, way = layers.shortest(row.coefficients[0])
        ways[way] = None
        bound = value - float(row.fixed[0])
        stale += 1
        if bound > best.bound:
            stale = 0 if bound > best.bound + 1e-4 * abs(target - best.bound) else stale
            best = Priced(bound, weights, row, [])
        if best.bound >= target * (1 - EQUAL):
            break
        if stale >= 4:
            pace, stale, weights = pace / 2, 0, best.weights
        slope = (rows.coefficients * layers.edges.numbers[list(way)]).sum((1, 2)) - rows.fixed
        slope = np.where(objective, slope - slope[objective].mean(), slope)
        slope = np.where(~objective & (weights <= 0) & (slope < 0), 0.0, slope)
        steep = float(slope @ slope)
        if steep <= 1e-24:
            break
        weights = weights + pace * max(target - bound, 1e-6) / steep * slope
        weights = np.where(objective, _simplex(weights, objective), np.maximum(weights, 0.0))
    best.ways = list(ways)
    return best


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

    def rows(self, ways: Sequence[Way]) -> Rows:
        """Rows that are met with equality by these ways, and hold for all."""


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


def minimise(
    layers: Layers, rows: Rows, judge: Judge, value: float, *, work: int, rounds: int, turns: int = TURNS
) -> Least:
    """The way of least value below `value`: (9).

    Args:
        work: numbers that a beam may keep. rounds: beams. turns: of each `dual`.
    """
    least = Least(None, value, -np.inf)
    seen: set[Way] = set()
    weights: Floats | None = None
    for turn in range(rounds + 1):
        if layers.empty:
            least.bound = least.value
            break
        priced = dual(layers, rows, least.value, FIRST if turn == 0 else turns, weights)
        weights, before = priced.weights, (least.value, least.bound, len(rows))
        rows = _judged(least, layers, judge, rows, priced.ways, seen)
        least.bound = min(max(least.bound, priced.bound), least.value)
        if least.proved:
            break
        every = rows.joined(priced.row)
        layers = layers.within(every, least.value)
        if layers.empty:
            least.bound = least.value
            break
        if turn == 0:
            continue
        ways, allowed, dropped = beam(layers, every, least.value, work)
        for at in range(0, len(ways), AT_ONCE):
            if allowed[at] >= least.value * (1 - EQUAL):
                break
            if at >= MOST:
                dropped = min(dropped, float(allowed[at]))
                break
            rows = _judged(least, layers, judge, rows, ways[at : at + AT_ONCE], seen)
        least.bound = min(max(least.bound, dropped), least.value)
        if least.proved or (least.value, least.bound, len(rows)) == before:
            break
    return least


def _judged(least: Least, layers: Layers, judge: Judge, rows: Rows, ways: Sequence[Way], seen: set[Way]) -> Rows:
    """Judge the ways that are new and keep the limits; the rows, with those that some of them teach."""
    fresh = [way for way in dict.fromkeys(ways) if way not in seen]
    seen.update(fresh)
    if fresh:
        sums = np.tensordot(layers.edges.numbers[np.array(fresh)], rows.coefficients, ((1, 2), (1, 2)))
        fresh = [way for way, value in zip(fresh, rows.least(sums).tolist()) if value < np.inf]
    if not fresh:
        return rows
    values = judge.values(fresh)
    least.judged += len(fresh)
    order = np.argsort(values, kind="stable").tolist()
    if values[order[0]] < least.value:
        least.way, least.value = fresh[order[0]], float(values[order[0]])
    taught = dict.fromkeys([*order[: TEACH // 2], *range(min(len(fresh), TEACH // 2))])
    return rows.joined(judge.rows([fresh[i] for i in taught]))


__all__ = ["EQUAL", "Judge", "Layers", "Least", "Priced", "Rows", "Way", "beam", "dual", "minimise"]
