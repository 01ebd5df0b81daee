"""One schedule with one number of micro-batches: the best cut and options for it, and what is proved about the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

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
    unbeaten,
)
from autopar.costmodel.stages_layers import EQUAL, Layers, Rows, Way
from autopar.costmodel.stages_search import Least, minimise
from autopar.costmodel.stages_table import Shape, shape
from autopar.pipeline.schedules import schedule

#: Of ways judged together, how many are remembered.
REMEMBERED = 16
#: Cuts this close, relative, are no alternatives.
SLOWER = 1e-4
_TIMES = [FORWARD, INPUT, WEIGHT, UPDATE]
_BYTES = list(range(STATIC, TRANSIENT + 1))


@dataclass(frozen=True)
class _Time:
    """Judges ways by the simulated time of a step, in units of `unit` seconds; infinite where they exceed a limit.

    Attributes:
        limits: [rows, stages, COLUMNS], bytes over the limit, of ranks with several stages. met: seconds of good ways.
    """

    shape: Shape
    edges: Edges
    unit: float
    limits: Floats
    met: dict[Way, float]

    def values(self, ways: Sequence[Way]) -> Floats:
        numbers = self.edges.numbers[np.array(ways)]
        seconds = np.full(len(ways), np.inf)
        keep = np.flatnonzero(self._held(numbers).max(1, initial=0.0) <= 1 + EQUAL)
        seconds[keep] = self.shape.makespans(numbers[keep])
        for k in np.argsort(seconds, kind="stable")[: min(REMEMBERED, len(keep))].tolist():
            self.met[ways[k]] = float(seconds[k])
        return seconds / self.unit

    def rows(self, numbers: Floats) -> Rows:
        """Longest paths, and the fullest moment where it is over the limit."""
        held = self._held(numbers)
        over = np.unique(held.argmax(1)[held.max(1) > 1]) if held.size else np.zeros(0, dtype=np.int64)
        return Rows.of(self.shape.critical(numbers) / self.unit, self.limits[over])

    def _held(self, numbers: Floats) -> Floats:
        """[candidates, limits]"""
        return np.tensordot(numbers, self.limits, ((1, 2), (1, 2)))


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
        self.bound = self._simple()
        self.judged = 0
        self.fits = True
        self._begun: Floats | None = None
        self._unit = 1.0
        self._met: dict[Way, float] = {}  # seconds of the best ways judged

    def _simple(self) -> float:
        """A bound that needs no table: (5).

        On a line, rank r begins behind the forwards of the ranks before it, and ends before their backwards, unless
        these are split: T >= m w[r] + sum_{s<r} f w[s], w being the work of a stage, and f the part of it, all or the
        least share that is forward. These rows at weights of (1 - f/m)^(R-1-r) sum to w alike for all stages.
        """
        known, work = schedule(self.name), self.edges.least_work
        if known.placement != "line" or known.asynchronous or not work < np.inf:
            return self.micro * work / self.ranks
        share = 1.0
        if known.splits:
            share = float((self.edges.numbers[:, FORWARD] / np.maximum(self.edges.work, 1e-300)).min())
        if share < EQUAL:
            return self.micro * work / self.ranks
        return share * work / (1 - (1 - share / self.micro) ** self.ranks)

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

    @property
    def other(self) -> Way | None:
        """The best way met of another cut than the best, and slower than it; None if there was none."""
        cut = [self.span(edge) for edge in self.way or ()]
        slower = [way for way, seconds in self._met.items() if seconds > self.seconds * (1 + SLOWER)]
        others = [way for way in slower if [self.span(edge) for edge in way] != cut]
        return min(others, key=lambda way: self._met[way], default=None)

    # ---- the stages there may be -----------------------------------------------------------------------------------

    @cached_property
    def _busy(self) -> Floats:
        """[edges]: seconds that an edge keeps its rank busy in a step, whichever stage it is."""
        return self.micro * self.edges.work + self.edges.numbers[:, UPDATE]

    @cached_property
    def _own(self) -> list[Floats]:
        """Per stage, [rows, its bytes]: what it alone holds at one time, all that could be its peak."""
        found = []
        for stage in range(self.shape.stages):
            rows = np.unique(self.shape.memory[:, stage][:, _BYTES], axis=0)
            found.append(rows[[not ((rows >= line).all(1) & (rows > line).any(1)).any() for line in rows]])
        return found

    def _layers(self, seconds: float, caps: Sequence[float] | None = None) -> Layers:
        """Stages that alone keep the limit, or their own caps, and keep their rank busy for `seconds` at most."""
        quick = np.flatnonzero(self._busy <= seconds)
        if self.limit is None:
            return self._of([quick] * self.shape.stages, self._times)
        held = np.ascontiguousarray(self.edges.numbers[quick][:, _BYTES].T)
        found: dict[tuple[bytes, float], Ints] = {}
        allowed = []
        for rows, cap in zip(self._own, caps or [self.limit] * self.shape.stages):
            key = rows.tobytes(), cap
            if key not in found:
                found[key] = quick[(rows @ held).max(0) <= cap * (1 + EQUAL)]
            allowed.append(found[key])
        # Where no stages share a rank, bytes are no matter any more.
        return self._of(allowed, self._times if caps or not len(self._together) else None)

    def _of(self, allowed: Sequence[Ints], numbers: Floats | None) -> Layers:
        """Of the edges that each stage may be, those that no other equals or beats in all numbers [edges, numbers]."""
        if numbers is not None:
            found: dict[int, Ints] = {}
            for keep in allowed:
                if id(keep) not in found:
                    here = unbeaten(self.edges.first[keep], self.edges.last[keep], numbers[keep])
                    found[id(keep)] = keep[here]
            allowed = [found[id(keep)] for keep in allowed]
        if self.cuts is not None:
            spans = zip(allowed, self.cuts, self.cuts[1:])
            allowed = [k[(self.edges.first[k] == a) & (self.edges.last[k] == b)] for k, a, b in spans]
        return Layers.of(self.edges, allowed)

    @cached_property
    def _times(self) -> Floats:
        """[edges, times that the schedule can tell apart]"""
        times = self.edges.numbers[:, _TIMES]
        if schedule(self.name).splits:
            return times
        return np.stack([times[:, 0], times[:, 1] + times[:, 2], times[:, 3]], 1)

    @cached_property
    def _together(self) -> Ints:
        """Memory rows in which several stages share one rank."""
        return np.flatnonzero(self.shape.memory.any(2).sum(1) > 1)

    # ---- finding ---------------------------------------------------------------------------------------------------

    def begin(self, below: float) -> None:
        """A first way, with stages as level as they can be; none if they all keep a rank busy for `below` or more."""
        way = self._level(None, below)
        if way is None:
            self.bound = max(self.bound, below)
            self.fits = below < np.inf
            return
        self._begun = self.numbers(way)
        self._unit = float(self.shape.makespans(self._begun[None])[0])
        if not self._offer(way, self._unit):
            # Stages of one rank that keep caps whose sum is the limit keep the limit: shares as they are now.
            assert self.limit is not None
            held = (self.shape.memory * self._begun).sum(2)
            caps = [0.0] * self.shape.stages
            for rank in range(self.ranks):
                rows = held[self.shape.memory_rank == rank]
                moment = rows[rows.sum(1).argmax()]
                for stage in np.flatnonzero(moment):
                    caps[stage] = self.limit * moment[stage] / moment.sum()
            way = self._level(caps, below)
            if way is not None:
                self._offer(way, float(self.shape.makespans(self.numbers(way)[None])[0]))

    def _level(self, caps: Sequence[float] | None, below: float) -> Way | None:
        """A way whose busiest stage is as little busy as can be; None: there is none that is for less than `below`."""
        below = min(below, float(self._busy.max(initial=0.0)))
        top = 1.3 * self.micro * self.edges.least_work / self.shape.stages
        while True:
            top = min(top, below)
            layers = self._layers(top, caps)
            if not layers.empty:
                return layers.levelled([self._busy[keep] for keep in layers.keep])
            if top >= below:
                return None
            top *= 2

    def _offer(self, way: Way, seconds: float) -> bool:
        """Whether a way keeps the limit; it may be the best then."""
        self.judged += 1
        within = self.limit is None or self.shape.peaks(self.numbers(way)).max() <= self.limit * (1 + EQUAL)
        if within and seconds < self.seconds:
            self.way, self.seconds = way, seconds
            self._met[way] = seconds
        return within

    def improve(self, below: float, work: int, glance: bool = False) -> None:
        """Look for ways of fewer seconds than `below` and than the best known, or prove that there are none.

        glance: as `minimise`.
        """
        below = min(below, self.seconds)
        if not self.fits or self.bound >= below * (1 - EQUAL):
            return
        assert self._begun is not None and below < np.inf
        layers = self._layers(below)
        limits = _none(self.shape.stages) if self.limit is None else self.shape.memory[self._together] / self.limit
        judge = _Time(self.shape, self.edges, self._unit, limits, self._met)
        rows = judge.rows(self._begun[None]).joined(Rows.of(self.shape.passes / self._unit, limits[:0]))
        found = minimise(layers, rows, judge, below / self._unit, start=self.way, work=work, glance=glance)
        self.judged += found.judged
        self.bound = max(self.bound, found.bound * self._unit)
        if found.way is not None and found.value * self._unit < self.seconds:
            self.way, self.seconds = found.way, found.value * self._unit

    def fit(self, work: int) -> None:
        """Where no way is known yet: look for one that keeps the limit, or prove that there is none."""
        if self.fits and self.way is None and self.limit is not None:
            least = self.least_bytes(work, self.limit)
            if least.way is not None and least.value <= self.limit * (1 + EQUAL):
                self._offer(least.way, float(self.shape.makespans(self.numbers(least.way)[None])[0]))
            elif least.bound >= self.limit * (1 - EQUAL):
                self.fits, self.bound = False, np.inf

    def least_bytes(self, work: int, enough: float | None = None) -> Least:
        """The way whose fullest rank holds least, however long it takes; value and bound in bytes.

        enough: any way that holds no more will do, and that there is none is all that has to be proved.
        """
        numbers = self.edges.numbers[:, _BYTES]
        columns = np.ascontiguousarray(numbers.T)
        known = {rows.tobytes(): rows for rows in self._own}
        most = {key: (rows @ columns).max(0) for key, rows in known.items()}
        alone = [most[rows.tobytes()] for rows in self._own]
        top = max(max(line.min(initial=np.inf) for line in alone), 1.0)
        while True:
            within = {key: np.flatnonzero(line <= top) for key, line in most.items()}
            layers = self._of([within[rows.tobytes()] for rows in self._own], numbers)
            if not layers.empty:
                break
            if top >= max(line.max(initial=0.0) for line in alone):
                return Least(None, np.inf, np.inf)
            top *= 2
        way = layers.levelled([line[keep] for line, keep in zip(alone, layers.keep)])
        unit = float(self.shape.peaks(self.numbers(way)).max())
        every = Rows.of(self.shape.memory / unit, _none(self.shape.stages))
        below, stop = 1.0, -np.inf
        if enough is not None:
            if unit <= enough:
                return Least(way, unit, 0.0)
            below = stop = enough * (1 + EQUAL) / unit
        judge = _Bytes(self.edges, every)
        found = minimise(layers, every, judge, below, start=way, work=work, enough=stop)
        return Least(found.way or way, (found.value if found.way else 1.0) * unit, found.bound * unit)


__all__ = ["Pair"]
