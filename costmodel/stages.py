"""Stages, micro-batches and schedule of a pipeline, chosen together by simulated time. Numbers only.

Given a chain of N pieces for every number of micro-batches m; R ranks; schedules, each with a table for (R, m), its
stages s = 0 .. S-1 and the ranks they are on. A stage made of pieces a to b in option o has numbers q[a,b,o]: seconds
of F, I, W, U, bytes of four kinds, and seconds of the messages over the gap before it.

    (1)  0 = c[0] < c[1] < ... < c[S] = N,  o[s] an option of pieces c[s] to c[s+1]         a way
    (2)  T = max over paths p of  sum_s p[s] . q[c[s],c[s+1],o[s]]                          seconds of a step
    (3)  sum_s v[s] . q[c[s],c[s+1],o[s]] <= limit    for all moments v of every rank       bytes
    min  T over all ways, numbers of micro-batches and schedules

(2) and (3) are exact. In a table everything has its order, so simulating it (`autopar.pipeline.clock`) is finding a
longest path through a graph that the table alone decides; p[s] counts how often a path passes each number of stage s.
And what a rank holds is decided by the order of its row: v[s] counts how much of what (`costmodel.stages_table`).
There are far too many paths to write down. But each of them is a bound, and simulating a way tells which is longest:

    (4)  T >= sum_s p[s] . q    for any path: at first the longest of level ways, and of these with one slow rank
    (5)  T >= m / R times the least work of a micro-batch                             before any table is made
    (6)  T >= min over ways of  sum_p l[p] (sum_s p[s] . q) + sum_v u[v] (sum_s v[s] . q / limit - 1)
                                                                                      for any l >= 0 of sum 1, u >= 0

The right side of (6) is a shortest path through S layers of edges (a, b, o): dynamic programming, linear in the number
of edges. Its best value over l and u is that of the linear relaxation of an integer program: a binary column for every
layer and edge, as much flow into every piece as out of it, (3), t >= the paths (4), and t minimised. That program has
millions of columns, and a shortest path for its structure, so its relaxation is solved by prices (Held and Karp 1971;
Geoffrion 1974), not written down. What the relaxation leaves open is branched upon:

    (7)  an edge goes if by some row of (3), (4) or (6) the least sum before it, its own, and the least behind it come
         to the best T known (of (3): exceed the limit)
    (8)  what is left is enumerated stage by stage, and beginnings go as in (7); where there are too many, the ones with
         the least bounds stay, and the least bound of what went is remembered
    (9)  ways that come out are simulated; their longest paths join (4); on with (6)

A schedule with a number of micro-batches is done when nothing is left, or nothing that went is bounded by less than the
best T. When all are done, the best is optimal, by proof; else the least bound is told, as a gap. Nothing hangs on how
quick the machine is, and problems with few ways always end with the proof.

Built by: `Edges` (1), `Shape` (2, 3), `Pair` (4, 5), `dual` (6), `Layers.within` (7), `beam` (8), `minimise` (9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.costmodel.stages_answer import (
    Candidate,
    Choice,
    Parts,
    candidate,
    infeasible,
    why,
)
from autopar.costmodel.stages_chain import Additive, Alternatives, Chain, Link, Option, edges
from autopar.costmodel.stages_pairs import Pair
from autopar.costmodel.stages_search import EQUAL, Way
from autopar.costmodel.stages_table import SEGMENT
from autopar.errors import ScheduleError
from autopar.pipeline.schedules import SCHEDULES, schedule

#: Schedules whose steps end together: what is chosen from unless asked otherwise.
SYNCHRONOUS = tuple(name for name, known in SCHEDULES.items() if not known.asynchronous)
#: Numbers that a beam may hold.
WORK = 1_000_000


def choose(
    chains: Mapping[int, Chain],
    *,
    ranks: int,
    link: Link,
    limit: float | None = None,
    schedules: Sequence[str] = SYNCHRONOUS,
    top: int = 5,
    overlap: bool = True,
    spare: Mapping[int, Chain] | None = None,
) -> Choice:
    """The cut, options, number of micro-batches and schedule of least simulated time.

    Args:
        chains: number of micro-batches of a step -> the chain as it is for micro-batches of that size.
        ranks: of the pipeline; a schedule with chunks has so many times more stages. link: between neighbours.
        limit: bytes that a rank may hold; None for no limit.
        schedules: by name. Of asynchronous ones, which pay for speed with staleness, so that time alone is no fair
            judge, a segment of `SEGMENT` updates is simulated, and a step is its share of that.
        top: runners-up to return. overlap: whether messages travel while ranks compute, as the clock has it.
        spare: chains as `chains`, of which one is only proposed, if nothing else fits.

    Raises:
        InfeasibleError: nothing fits the limit; says by how much, where, and what would.
        ScheduleError: no schedule can run any of these numbers of micro-batches on so many ranks and pieces.
    """
    question = _Question(dict(chains), ranks, link, limit, tuple(schedules), top, overlap, None)
    return _answer(question, spare or {})


def possible(
    chains: Mapping[int, Chain], *, ranks: int, link: Link, limit: float, schedules: Sequence[str] = SYNCHRONOUS
) -> Choice | None:
    """As `choose`; None if nothing was found that fits the limit, or no schedule can run: `choose` says why."""
    question = _Question(dict(chains), ranks, link, limit, tuple(schedules), 5, True, None)
    search = _Search(question)
    return search.run() if search.pairs else None


def uniform(
    chains: Mapping[int, Chain],
    *,
    ranks: int,
    starts: Sequence[int],
    link: Link,
    limit: float | None = None,
    schedules: Sequence[str] = SYNCHRONOUS,
    top: int = 5,
    overlap: bool = True,
) -> Choice:
    """As `choose`, with equal numbers of layers in all stages: what is usually done, for comparison.

    The first stage has what comes before the first layer besides, the last what comes behind the last; where layers
    cannot be dealt out equally, the first stages have one more. Options are still chosen.

    Args:
        starts: the pieces with which layers begin, in order. Others: as `choose`.

    Raises:
        As `choose`.
    """
    question = _Question(dict(chains), ranks, link, limit, tuple(schedules), top, overlap, tuple(starts))
    return _answer(question, {})


@dataclass(frozen=True)
class _Question:
    """As `choose`; starts: as `uniform`, None if stages may be cut anywhere."""

    chains: Mapping[int, Chain]
    ranks: int
    link: Link
    limit: float | None
    schedules: tuple[str, ...]
    top: int
    overlap: bool
    starts: tuple[int, ...] | None

    def refusal(self, name: str, micro: int) -> str:
        """Why a schedule cannot run so many micro-batches; nothing if it can."""
        known, pieces = schedule(name), self.chains[micro].pieces
        stages = self.ranks * known.chunks
        if stages > pieces:
            return f"{stages} stages need as many pieces, and there are {pieces}"
        if self.starts is not None and stages > len(self.starts):
            return f"{stages} stages need as many layers, and there are {len(self.starts)}"
        return known.allows(self.ranks, micro)

    def cuts(self, stages: int, pieces: int) -> tuple[int, ...] | None:
        """Where the stages must begin, and the end; None if anywhere."""
        if self.starts is None:
            return None
        each, over = divmod(len(self.starts), stages)
        return (0, *(self.starts[s * each + min(s, over)] for s in range(1, stages)), pieces)


class _Search:
    """All schedules and numbers of micro-batches of a question."""

    def __init__(self, question: _Question):
        self.question = question
        self.excluded: dict[tuple[str, int], str] = {}
        self.pairs: list[Pair] = []
        for micro, chain in question.chains.items():
            names = []
            for name in question.schedules:
                refused = question.refusal(name, micro)
                if refused:
                    self.excluded[name, micro] = refused
                else:
                    names.append(name)
            stages = [question.ranks * schedule(name).chunks for name in names]
            table = edges(chain, question.link, min(stages)) if stages else None
            for name, many in zip(names, stages):
                assert table is not None
                cuts = question.cuts(many, chain.pieces)
                self.pairs.append(Pair(name, micro, table, question.ranks, question.limit, question.overlap, cuts))

    def run(self) -> Choice | None:
        """The best; None if nothing was found that fits."""
        top = self.question.top
        for pair in sorted(self.pairs, key=lambda p: p.bound):
            if pair.bound < self._seconds(top):
                pair.begin()
        if self._seconds(0) == math.inf:
            for pair in self.pairs:
                pair.fit(WORK)
        if self._seconds(0) == math.inf:
            return None
        for pair in sorted(self.pairs, key=lambda p: (p.seconds, p.bound)):
            pair.improve(self._seconds(0), WORK)
        ranked = sorted((p for p in self.pairs if p.way is not None), key=lambda p: p.seconds)
        for pair in ranked[1 : top + 1]:  # of these it is only known that they cannot beat the best
            pair.improve(pair.seconds, WORK // 4)
        return self._choice(ranked[0], sorted(ranked[1:], key=lambda p: p.seconds)[:top])

    def _seconds(self, place: int) -> float:
        """Of the best pair, or of the one that comes so many places behind it; infinite if there are fewer."""
        known = sorted(p.seconds for p in self.pairs)
        return known[place] if place < len(known) else math.inf

    def _choice(self, first: Pair, rest: Sequence[Pair]) -> Choice:
        best = self._candidate(first, first.way)
        losers = [self._candidate(pair, pair.way) for pair in rest]
        if first.other is not None:
            losers.append(self._candidate(first, first.other))
        losers = sorted(losers, key=lambda c: c.seconds)[: self.question.top]
        bound = min(best.seconds, *(p.bound for p in self.pairs))
        gap = 1 - bound / best.seconds if best.seconds else 0.0
        unfit = {(p.name, p.micro): "nothing fits the limit" for p in self.pairs if not p.fits}
        return Choice(
            best,
            tuple(replace(c, why=why(c, best, self.question.limit)) for c in losers),
            "optimal" if gap <= EQUAL else "feasible",
            gap if gap > EQUAL else 0.0,
            bound,
            sum(p.judged for p in self.pairs),
            {**self.excluded, **unfit},
        )

    def _candidate(self, pair: Pair, way: Way | None) -> Candidate:
        assert way is not None
        chain = self.question.chains[pair.micro]
        options = [chain.options(*pair.span(edge))[int(pair.edges.option[edge])] for edge in way]
        return candidate(pair, way, options)


def _answer(question: _Question, spare: Mapping[int, Chain]) -> Choice:
    search = _Search(question)
    if not search.pairs:
        reasons = "\n".join(f"  {name}, {m} micro-batches: {text}" for (name, m), text in search.excluded.items())
        raise ScheduleError(
            f"no schedule can run on {question.ranks} ranks; give other numbers of micro-batches, other schedules, or "
            f"fewer ranks\n{reasons}"
        )
    choice = search.run()
    if choice is not None:
        return choice
    least = [(pair, pair.least_bytes(WORK)) for pair in search.pairs]
    pair, found = min(least, key=lambda p: p[1].value)
    if found.way is None or question.limit is None:
        raise ScheduleError(
            f"the pieces cannot be cut in {question.ranks} stages or more: every stage of a cut needs an option, and "
            "some pieces have none with any neighbours"
        )
    others = tuple(name for name in SYNCHRONOUS if name not in question.schedules)
    near = {
        "another schedule": replace(question, schedules=others),
        "more micro-batches": replace(question, chains=spare),
        "more ranks": replace(question, ranks=2 * question.ranks),
    }
    fitting = {words: _Search(replace(asked, top=0)).run() for words, asked in near.items()}
    proved = not any(p.fits for p in search.pairs)
    raise infeasible(pair, found, question.limit, {w: c.best for w, c in fitting.items() if c is not None}, proved)


__all__ = [
    "SEGMENT",
    "SYNCHRONOUS",
    "Additive",
    "Alternatives",
    "Candidate",
    "Chain",
    "Choice",
    "Link",
    "Option",
    "Parts",
    "choose",
    "possible",
    "uniform",
]
