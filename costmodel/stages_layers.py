"""Rows and layers: a linear bound on what a way through a layered graph costs, and the graph.

A way is one edge (a stage: first piece, last piece, option) per layer. A row is linear: coefficients [stages, COLUMNS]
on the numbers of the edges. Objective rows are to be small, limit rows must not exceed 1. No schedule is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.costmodel.stages_chain import Edges, Floats, Ints

#: Relative: values closer than this are equal.
EQUAL = 1e-9
#: Rows closer than this, relative to the largest number in them, are one row.
_ALIKE = 1e-12
#: A way: the edge of every stage.
Way = tuple[int, ...]


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
        """These, and those of the others that are new, in order."""
        share, fixed = np.concatenate([self.share, other.share]), np.concatenate([self.fixed, other.fixed])
        every = np.concatenate([self.coefficients, other.coefficients])
        flat = np.concatenate([every.reshape(len(every), -1), share[:, None], fixed[:, None]], 1)
        near = _ALIKE * max(np.abs(flat).max(initial=0.0), 1e-300)
        keep = list(range(len(self)))
        for k in range(len(self), len(every)):
            if not (np.abs(flat[keep] - flat[k]).max(1, initial=0.0) <= near).any():
                keep.append(k)
        return Rows(every[keep], share[keep], fixed[keep])

    def part(self, begin: int) -> Rows:
        """Those from number `begin` on."""
        return Rows(self.coefficients[begin:], self.share[begin:], self.fixed[begin:])

    def summed(self, weights: Floats) -> Rows:
        """One row: the sum of all, each times its weight."""
        return Rows(
            np.tensordot(weights, self.coefficients, 1)[None],
            np.array([weights @ self.share]),
            np.array([weights @ self.fixed]),
        )

    def least(self, values: Floats) -> Floats:
        """The least v that values [..., rows] allow; infinite where a limit is exceeded."""
        limits = self.share <= EQUAL
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
    def of(cls, edges: Edges, allowed: Sequence[Ints]) -> Layers:
        """Of the edges that each stage may be (in order), those that a whole way passes."""
        stages, end = len(allowed), edges.pieces
        keep = []
        reached = np.zeros(end + 1, dtype=bool)
        reached[0] = True
        for i, edge in enumerate(allowed):
            last = edges.last[edge]
            whole = last == end if i == stages - 1 else last <= end - (stages - 1 - i)
            keep.append(edge[whole & reached[edges.first[edge]]])
            reached = np.zeros(end + 1, dtype=bool)
            reached[edges.last[keep[i]]] = True
        for i in reversed(range(stages)):
            keep[i] = keep[i][reached[edges.last[keep[i]]]]
            reached = np.zeros(end + 1, dtype=bool)
            reached[edges.first[keep[i]]] = True
        return cls(edges, keep)

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
    def _columns(self) -> list[Floats]:
        """Per stage: [COLUMNS, edges], which is twice as quick to sum up for one row."""
        return [np.ascontiguousarray(self.edges.numbers[k].T) for k in self.keep]

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
        return self._shortest([line @ columns for line, columns in zip(coefficients, self._columns)])

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
        inside = Layers.of(self.edges, [k[w <= top] for k, w in zip(self.keep, weights)])
        places = [np.searchsorted(k, kept) for k, kept in zip(self.keep, inside.keep)]
        return inside._shortest([(weight[at] / (top or 1.0)) ** 2 for weight, at in zip(weights, places)])[1]

    def near(self, cuts: Sequence[float], reach: int) -> Layers:
        """Only stages that begin and end within so many pieces of some cuts, [stages + 1]."""
        kept = []
        for i, keep in enumerate(self.keep):
            close = (np.abs(self.first[i] - cuts[i]) <= reach) & (np.abs(self.last[i] - cuts[i + 1]) <= reach)
            kept.append(keep[close])
        return Layers.of(self.edges, kept)

    def within(self, rows: Rows, value: float) -> Layers:
        """Without the edges that no way below `value` passes: (7)."""
        costs = [self.seconds(i, rows.coefficients) for i in range(len(self))]
        behind, before = self.behind(rows.coefficients, costs), self.before(rows.coefficients, costs)
        kept = []
        for i in range(len(self)):
            through = costs[i] + before[i][self.first[i]] + behind[i + 1][self.last[i]]
            kept.append(self.keep[i][rows.least(through) < value * (1 - EQUAL)])
        return Layers.of(self.edges, kept)


__all__ = ["EQUAL", "Layers", "Rows", "Way"]
