"""The least of what ways are worth: by prices, by looking near good ways, and by enumerating what is left.

Equations (7) to (9) of `costmodel.stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.costmodel.stages_chain import Floats, Ints
from autopar.costmodel.stages_layers import EQUAL, Layers, Rows, Way
from autopar.costmodel.stages_prices import Judge, price

#: Shortest ways asked for: before any edge is removed, where a bound far off may do; behind; between beams.
FIRST, TURNS, AGAIN = 8, 60, 20
#: Rounds of looking near a good way; how many pieces off, by turns.
NEARBY, REACH = 12, (6, 2)
#: Beams over everything, and the part of the gap that one has to close for another.
ROUNDS, WORTH = 8, 0.1
#: Ways judged at once, and at most behind one beam; of those, the ways whose rows are added.
AT_ONCE, MOST, TEACH = 256, 4096, 8


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
    layers: Layers,
    rows: Rows,
    judge: Judge,
    value: float,
    *,
    start: Way | None,
    work: int,
    glance: bool = False,
    enough: float = -np.inf,
) -> Least:
    """The way of least value below `value`: (9).

    Args:
        start: a way to begin with, if one is known. work: numbers that a beam may keep. glance: look only where good
            ways are near; nothing much will be proved. enough: stop at a way of this value or less.
    """
    minimum = _Minimum(layers, rows, judge, value, start, work, enough)
    return minimum.glance() if glance else minimum.run()


class _Minimum:
    def __init__(
        self,
        layers: Layers,
        rows: Rows,
        judge: Judge,
        value: float,
        start: Way | None,
        work: int,
        enough: float,
    ):
        self.layers, self.rows, self.judge, self.work, self.enough = layers, rows, judge, work, enough
        self.least = Least(None, value, -np.inf)
        self.start = start
        self.seen: set[Way] = set()
        self.met = [] if start is None else [start]
        self.priced = rows  # the sum that proves the best bound
        self.mean: Sequence[float] = ()

    def run(self) -> Least:
        """See `minimise`."""
        if not self._price(FIRST):
            self._narrow()
            if not self._price(TURNS):
                self._nearby(NEARBY)
                self._everywhere()
        return self.least

    def glance(self) -> Least:
        """See `minimise`."""
        if not self._price(AGAIN):
            self._nearby(len(REACH))
        return self.least

    def _done(self) -> bool:
        if self.layers.empty:
            self._prove(np.inf)
        return self.least.proved or self.least.value <= self.enough

    def _prove(self, bound: float) -> None:
        self.least.bound = min(max(self.least.bound, bound), self.least.value)

    def _narrow(self) -> None:
        """Leave out edges that cannot be of a better way; by the prices alone, where there are very many."""
        rows = self.priced if self._crowded() else self.rows.joined(self.priced)
        self.layers = self.layers.within(rows, self.least.value)

    def _crowded(self) -> bool:
        return sum(map(len, self.layers.keep)) * len(self.rows) > self.work

    def _price(self, turns: int) -> bool:
        """Raise the bound; whether that is the end."""
        if not self._done():
            found = price(self.layers, self.rows, self.judge, self.least.value, turns, self.met)
            self.rows, self.priced, self.met, self.mean = found.rows, found.row, found.ways, found.cuts.tolist()
            self._prove(found.bound)
        return self._done()

    def _nearby(self, turns: int) -> None:
        """Look for better ways near the best known, and near the mean of the ways that the prices point to."""
        edges = self.layers.edges
        missed = 0
        for turn in range(turns):
            value = self.least.value
            best = self.least.way or self.start
            around = [self.mean] if turn < len(REACH) or best is None else []
            if best is not None:
                around.append([*edges.first[list(best)].tolist(), edges.pieces])
            for cuts in around:
                self._near(self.layers.near(cuts, REACH[turn % len(REACH)]))
            missed = missed + 1 if self.least.value > value * (1 - 1e-4) else 0
            if missed == len(REACH) or self._done():
                break

    def _near(self, near: Layers) -> None:
        if near.empty:
            return
        found = price(near, self.rows, self.judge, self.least.value, AGAIN, [self.start] if self.start else [])
        self.rows = found.rows
        if found.bound < self.least.value * (1 - EQUAL):
            rows = self.rows.joined(found.row)
            ways, _, _ = beam(near, rows, self.least.value, self.work // len(REACH) ** 2)
            self._judged(ways[: AT_ONCE // 2])

    def _everywhere(self) -> None:
        """Enumerate what is left, if it is not hopelessly much."""
        for _ in range(ROUNDS):
            value, bound = self.least.value, self.least.bound
            self._narrow()
            if self._done() or self._crowded():
                break
            ways, allowed, dropped = beam(self.layers, self.rows.joined(self.priced), self.least.value, self.work)
            for at in range(0, len(ways), AT_ONCE):
                if allowed[at] >= self.least.value * (1 - EQUAL):
                    break
                if at >= MOST:
                    dropped = min(dropped, float(allowed[at]))
                    break
                self._judged(ways[at : at + AT_ONCE])
            self._prove(dropped)
            if self._done() or (self.least.value == value and self.least.bound < bound + WORTH * (value - bound)):
                break
            self._price(AGAIN)

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


__all__ = ["Least", "beam", "minimise"]
