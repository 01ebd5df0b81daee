"""One schedule with one number of micro-batches: the best cut and options for it, and what is proved about the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autopar.costmodel.stages_chain import (
    COLUMNS,
    FORWARD,
    INPUT,
    STATIC,
    TRANSIENT,
    UPDATE,
    WEIGHT,
    Edges,
    Floats,
    Ints,
)
from autopar.costmodel.stages_search import EQUAL, Layers, Least, Rows, Way, minimise
from autopar.costmodel.stages_table import Shape, shape
from autopar.pipeline.schedules import schedule

#: Stages made slower by so much, one rank after the other, to learn paths that matter: a little, and beyond all others.
SLOWER = (1.25, 100.0)
#: Of ways judged together, how many are remembered.
REMEMBERED = 16
_TIMES = [FORWARD, INPUT, WEIGHT, UPDATE]
_BYTES = list(range(STATIC, TRANSIENT + 1))


@dataclass(frozen=True)
class _Time:
    """Judges ways by the simulated time of a step, in units of `unit` seconds."""

    shape: Shape
    edges: Edges
    unit: float
    met: dict[Way, float]

    def values(self, ways: Sequence[Way]) -> Floats:
        seconds = self.shape.makespans(self.edges.numbers[np.array(ways)])
        for k in np.argsort(seconds, kind="stable")[:REMEMBERED].tolist():
            self.met[ways[k]] = float(seconds[k])
        return seconds / self.unit

    def rows(self, numbers: Floats) -> Rows:
        found = Rows.of(self.shape.critical(numbers) / self.unit, _none(self.shape.stages))
        return found.joined(found)


@dataclass(frozen=True)
class _Bytes:
    """Judges ways by the bytes of the fullest rank: the largest of its rows, all of them known."""

    edges: Edges
    all: Rows

    def values(self, ways: Sequence[Way]) -> Floats:
        sums = np.tensordot(self.edges.numbers[np.array(ways)], self.all.coefficients, ((1, 2), (1, 2)))
        return self.all.least(sums)

    def rows(self, numbers: Floats) -> Rows:
        return Rows.of(_none(self.all.coefficients.shape[1]), _none(self.all.coefficients.shape[1]))


def _none(stages: int) -> Floats:
    return np.zeros((0, stages, len(COLUMNS)))


class Pair:
    """A schedule and a number of micro-batches.

    Attributes:
        way, seconds: the best found, None and infinite if none. bound: no way takes fewer seconds.
        judged: ways simulated. fits: False once it is proved that no way keeps the limit.
    """

    def __init__(
        self,
        name: str,
        micro: int,
        edges: Edges,
        ranks: int,
        limit: float | None,
        overlap: bool = True,
        cuts: Sequence[int] | None = None,
    ):
        self.name, self.micro, self.edges, self.limit = name, micro, edges, limit
        self.ranks, self.overlap, self.cuts = ranks, overlap, cuts
        self.way: Way | None = None
        self.seconds = np.inf
        self.bound = micro * edges.least_work / ranks
        self.judged = 0
        self.fits = True
        self._begun: Floats | None = None
        self._unit = 1.0
        self._met: dict[Way, float] = {}  # seconds of the best ways judged

    @cached_property
    def shape(self) -> Shape:
        """Its table, compiled."""
        return shape(self.name, self.ranks, self.micro, self.overlap)

    def numbers(self, way: Way) -> Floats:
        """[stages, COLUMNS]"""
        return self.edges.numbers[list(way)]

    def span(self, edge: int) -> tuple[int, int]:
        """First and last piece of an edge, the last not included."""
        return int(self.edges.first[edge]), int(self.edges.last[edge])

    def quickest(self, stage: int, way: Way) -> float:
        """Seconds that a stage of a way would keep its rank busy in a step, in its quickest option."""
        return float(self._busy[stage][self.edges.of(*self.span(way[stage]))].min())

    @property
    def other(self) -> Way | None:
        """The best way met of another cut than the best; None if there was none."""
        cut = [self.span(edge) for edge in self.way or ()]
        others = [way for way in self._met if [self.span(edge) for edge in way] != cut]
        return min(others, key=lambda way: self._met[way], default=None)

    # ---- the stages there may be -----------------------------------------------------------------------------------

    @cached_property
    def _busy(self) -> list[Floats]:
        """Per stage, [edges]: seconds that it keeps its rank busy in a step."""
        passes = self.shape.passes.sum(0)
        found: dict[bytes, Floats] = {}
        return [found.setdefault(line.tobytes(), self.edges.numbers[:, _TIMES] @ line[_TIMES]) for line in passes]

    @cached_property
    def _fitting(self) -> list[NDArray[np.bool_]]:
        """Per stage, [edges]: whether it alone keeps the limit."""
        everything = np.ones(len(self.edges), dtype=bool)
        if self.limit is None:
            return [everything] * self.shape.stages
        top = self.limit * (1 + EQUAL)
        found: dict[bytes, NDArray[np.bool_]] = {}
        for rows in self._own:
            if rows.tobytes() not in found:
                found[rows.tobytes()] = np.asarray((self.edges.numbers[:, _BYTES] @ rows.T <= top).all(1))
        return [found[rows.tobytes()] for rows in self._own]

    @cached_property
    def _own(self) -> list[Floats]:
        """Per stage, [rows, its bytes]: what it alone holds at one time, all that could be its peak."""
        found = []
        for stage in range(self.shape.stages):
            rows = np.unique(self.shape.memory[:, stage][:, _BYTES], axis=0)
            found.append(rows[[not ((rows >= line).all(1) & (rows > line).any(1)).any() for line in rows]])
        return found

    @cached_property
    def _cut(self) -> list[NDArray[np.bool_]]:
        """Per stage, [edges]: whether it is of the cut asked for, if one is."""
        if self.cuts is None:
            return [np.ones(len(self.edges), dtype=bool)] * self.shape.stages
        return [(self.edges.first == a) & (self.edges.last == b) for a, b in zip(self.cuts, self.cuts[1:])]

    def _layers(self, seconds: float) -> Layers:
        """Stages that alone keep the limit, and keep their rank busy for `seconds` at most."""
        masks = [f & c & (b <= seconds) for f, c, b in zip(self._fitting, self._cut, self._busy)]
        layers = Layers.of(self.edges, masks)
        if self.limit is None or not self._together:  # then bytes are no matter any more
            layers.keep = [_unbeaten(self.edges, keep, self._times) for keep in layers.keep]
        return layers

    @cached_property
    def _times(self) -> Floats:
        """[edges, times that the schedule can tell apart]"""
        times = self.edges.numbers[:, _TIMES]
        if schedule(self.name).splits:
            return times
        return np.stack([times[:, 0], times[:, 1] + times[:, 2], times[:, 3]], 1)

    @cached_property
    def _together(self) -> list[int]:
        """Memory rows in which several stages share one rank."""
        return [v for v, row in enumerate(self.shape.memory) if row.any(1).sum() > 1]

    def _limits(self, layers: Layers) -> Floats:
        """Memory rows over the limit, of those that some way could exceed."""
        if self.limit is None:
            return _none(self.shape.stages)
        rows = self.shape.memory[self._together] / self.limit
        most = np.zeros(len(rows))
        for stage in range(len(layers)):
            most += layers.seconds(stage, rows).max(0, initial=0.0)
        return rows[most > 1.0]

    # ---- finding ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A first way, with stages as level as they can be."""
        top = 1.3 * self.shape.steps * self.micro * self.edges.least_work / self.shape.stages
        layers = self._layers(top)
        while layers.empty and top < max(b.max(initial=0.0) for b in self._busy):
            top = max(2 * top, 1e-300)
            layers = self._layers(top)
        if layers.empty:
            self.fits, self.bound = False, np.inf
            return
        way = layers.levelled([b[k] for b, k in zip(self._busy, layers.keep)])
        self._begun = self.numbers(way)
        self._unit = float(self.shape.makespans(self._begun[None])[0])
        self._offer(way, self._unit)

    def _offer(self, way: Way, seconds: float) -> None:
        self.judged += 1
        if self._within(way) and seconds < self.seconds:
            self.way, self.seconds = way, seconds
            self._met[way] = seconds

    def _within(self, way: Way) -> bool:
        return self.limit is None or bool(self.shape.peaks(self.numbers(way)).max() <= self.limit * (1 + 2 * EQUAL))

    def improve(self, below: float, work: int) -> None:
        """Look for ways of fewer seconds than `below` and than the best known, or prove that there are none."""
        below = min(below, self.seconds)
        if not self.fits or self.bound >= below * (1 - EQUAL):
            return
        assert self._begun is not None and below < np.inf
        layers = self._layers(below)
        judge = _Time(self.shape, self.edges, self._unit, self._met)
        numbers = np.repeat(self._begun[None], 1 + len(SLOWER) * self.ranks, 0)
        for k, line in enumerate(numbers[1:]):
            rank, factor = k // len(SLOWER), SLOWER[k % len(SLOWER)]
            line[np.ix_([s for s, h in enumerate(self.shape.home) if h == rank], _TIMES)] *= factor
        rows = judge.rows(numbers).joined(Rows.of(self.shape.passes / self._unit, self._limits(layers)))
        found = minimise(layers, rows, judge, below / self._unit, start=self.way, work=work)
        self.judged += found.judged
        self.bound = max(self.bound, found.bound * self._unit)
        if found.way is not None and found.value * self._unit < self.seconds:
            assert self._within(found.way), "a way over the limit has come out of the search"
            self.way, self.seconds = found.way, found.value * self._unit

    def fit(self, work: int) -> None:
        """Where no way is known yet: look for one that keeps the limit, or prove that there is none."""
        if self.fits and self.way is None and self.limit is not None:
            least = self.least_bytes(work)
            if least.way is not None and least.value <= self.limit * (1 + EQUAL):
                self._offer(least.way, float(self.shape.makespans(self.numbers(least.way)[None])[0]))
            elif least.bound > self.limit * (1 + EQUAL):
                self.fits, self.bound = False, np.inf

    def least_bytes(self, work: int) -> Least:
        """The way whose fullest rank holds least, however long it takes; value and bound in bytes."""
        bytes_ = self.edges.numbers[:, _BYTES]
        alone = [(bytes_ @ rows.T).max(1) for rows in self._own]
        top = max(min(line[c].min(initial=np.inf) for line, c in zip(alone, self._cut)), 1.0)
        while True:
            layers = Layers.of(self.edges, [c & (line <= top) for line, c in zip(alone, self._cut)])
            if not layers.empty:
                break
            if top >= max(line.max(initial=0.0) for line in alone):
                return Least(None, np.inf, np.inf)
            top *= 2
        layers.keep = [_unbeaten(self.edges, keep, bytes_) for keep in layers.keep]
        way = layers.levelled([line[keep] for line, keep in zip(alone, layers.keep)])
        unit = float(self.shape.peaks(self.numbers(way)).max())
        every = Rows.of(self.shape.memory / unit, _none(self.shape.stages))
        found = minimise(layers, every, _Bytes(self.edges, every), 1.0, start=way, work=work)
        return Least(found.way or way, found.value * unit, found.bound * unit)


def _unbeaten(edges: Edges, keep: Ints, numbers: Floats) -> Ints:
    """Of the options of one stage, those that no other equals or beats in every number [edges, numbers]."""
    line, first, last = numbers[keep], edges.first[keep], edges.last[keep]
    beaten = np.zeros(len(keep), dtype=bool)
    for shift in range(1, len(keep)):
        a, b = slice(None, -shift), slice(shift, None)
        same = (first[a] == first[b]) & (last[a] == last[b])
        if not same.any():
            break
        beaten[b] |= same & (line[a] <= line[b]).all(1)
        beaten[a] |= same & (line[b] <= line[a]).all(1) & (line[b] < line[a]).any(1)
    return keep[~beaten]


__all__ = ["Pair"]
