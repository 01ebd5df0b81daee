"""What a choice of stages comes out as: candidates with their time taken apart, and why each lost, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from autopar.costmodel.stages_chain import PENDING, SAVED, SEND_B, SEND_F, STATIC, TRANSIENT, Option
from autopar.costmodel.stages_pairs import Pair
from autopar.costmodel.stages_search import Least, Way
from autopar.costmodel.stages_table import costs
from autopar.errors import InfeasibleError
from autopar.pipeline.clock import run

#: Parts of a difference smaller than this share of it are not told.
_TOLD = 0.05
#: Columns of bytes, as they are called.
KINDS = {STATIC: "static", SAVED: "saved", PENDING: "pending", TRANSIENT: "transient"}


@dataclass(frozen=True)
class Parts:
    """Where the seconds of a step go; they add up to it.

    Attributes:
        work: what a rank computes with the quickest options, the mean of all ranks. memory: what slower options, which
            hold less, add to that. imbalance: what the busiest rank computes beyond the mean. bubble: what it waits,
            if messages took no time. communication: what messages add.
    """

    work: float
    memory: float
    imbalance: float
    bubble: float
    communication: float

    @property
    def seconds(self) -> float:
        """Their sum."""
        return self.work + self.memory + self.imbalance + self.bubble + self.communication


@dataclass(frozen=True)
class Candidate:
    """A way to run a chain as a pipeline, as the clock sees it.

    Attributes:
        schedule, micro: by name, and micro-batches of a step. cuts: where the stages begin, and the end: stage s is
            made of pieces cuts[s] to cuts[s + 1]. choices: the option of every stage, as numbered by `Chain.options`.
        options: the options themselves. seconds: of a step. peak_bytes: of every rank. parts: of the seconds.
        why: why it lost; empty of the best.
    """

    schedule: str
    micro: int
    cuts: tuple[int, ...]
    choices: tuple[int, ...]
    options: tuple[Option, ...]
    seconds: float
    peak_bytes: tuple[float, ...]
    parts: Parts
    why: str = ""

    def __str__(self) -> str:
        text = (
            f"{self.schedule}, {self.micro} micro-batches, cuts {' '.join(map(str, self.cuts))}: "
            f"{duration(self.seconds)}, {size(max(self.peak_bytes))} on the fullest rank"
        )
        return f"{text}; {self.why}" if self.why else text


@dataclass(frozen=True)
class Choice:
    """The answer of `choose`.

    Attributes:
        best: the quickest candidate. runners: others, the quickest first; the best found of another schedule or number
            of micro-batches each, and of the best's own schedule and number the best found of another cut.
        status: "optimal": nothing else is quicker, by proof; or "feasible". gap: how much quicker, at most, relative.
        bound: no candidate takes fewer seconds. simulated: how many candidates were.
        excluded: (schedule, micro-batches) -> why it is out of the question.
    """

    best: Candidate
    runners: tuple[Candidate, ...]
    status: str
    gap: float
    bound: float
    simulated: int
    excluded: Mapping[tuple[str, int], str]

    def __str__(self) -> str:
        proof = self.status if self.status == "optimal" else f"{self.status}, within {100 * self.gap:.2g} %"
        lines = [f"{self.best} ({proof}; {self.simulated} simulated)", *(f"  {runner}" for runner in self.runners)]
        lines += [f"  {name}, {micro} micro-batches: {why}" for (name, micro), why in self.excluded.items()]
        return "\n".join(lines)


def candidate(pair: Pair, way: Way, options: Sequence[Option]) -> Candidate:
    """A way of a pair, run by the clock."""
    numbers, shape = pair.numbers(way), pair.shape
    timeline = run(shape.table, costs(numbers), shape.overlap)
    seconds = timeline.makespan / shape.steps
    assert abs(seconds - shape.makespans(numbers[None])[0]) <= 1e-9 * seconds, "the clock and its compiled form differ"
    silent = numbers.copy()
    silent[:, [SEND_F, SEND_B]] = 0.0
    quiet = float(shape.makespans(silent[None])[0])
    busy = (shape.passes * numbers).sum((1, 2))
    quickest = sum(pair.quickest(stage, way) for stage in range(shape.stages)) / shape.ranks
    mean, most = float(busy.mean()), float(busy.max())
    first, last = pair.edges.first[list(way)], pair.edges.last[list(way)]
    return Candidate(
        pair.name,
        pair.micro,
        (*first.tolist(), int(last[-1])),
        tuple(pair.edges.option[list(way)].tolist()),
        tuple(options),
        seconds,
        tuple(map(float, timeline.peak_bytes)),
        Parts(quickest, mean - quickest, most - mean, quiet - most, seconds - quiet),
    )


def why(loser: Candidate, best: Candidate, limit: float | None) -> str:
    """By what a candidate loses against the best."""
    more = loser.seconds - best.seconds
    if more <= 1e-9 * best.seconds:
        return "as quick"
    told = {f.name: getattr(loser.parts, f.name) - getattr(best.parts, f.name) for f in fields(Parts)}
    ranked = sorted((name for name in told if abs(told[name]) >= _TOLD * more), key=lambda name: -told[name])
    text = ", ".join(f"{name} {'+' if told[name] > 0 else '-'}{duration(abs(told[name]))}" for name in ranked)
    text = f"{duration(more)} ({100 * more / best.seconds:.2g} %) slower: {text}"
    if limit is not None and told["memory"] >= _TOLD * more:
        names = ", ".join(dict.fromkeys(option.name or "slower options" for option in loser.options))
        text += f" ({names}, to fit {size(limit)})"
    return text


def infeasible(pair: Pair, least: Least, limit: float, near: Mapping[str, Candidate], proved: bool) -> InfeasibleError:
    """The error of a limit that nothing fits.

    Args:
        pair, least: what needs least. near: what else would fit, by what it takes. proved: that nothing fits.
    """
    assert least.way is not None
    numbers, shape = pair.numbers(least.way), pair.shape
    held = shape.memory * numbers
    moment = int(held.sum((1, 2)).argmax())
    stage = int(held[moment].sum(1).argmax())
    first, last = pair.span(least.way[stage])
    kinds = []
    for column, name in KINDS.items():
        count = shape.memory[moment, :, column].sum()
        times = f" in {count:.0f} micro-batches" if column in (SAVED, PENDING) and count else ""
        kinds.append(f"{name} {size(float(held[moment][:, column].sum()))}{times}")
    cut = f"{pair.edges.pieces} pieces cut for {shape.ranks} ranks"
    sure = "the least" if proved and least.proved else "the least found"
    lines = [
        f"{'nothing' if proved else 'nothing found'} fits {size(limit)} per rank: {cut}; {sure}, {pair.name} with "
        f"{pair.micro} micro-batches, needs {size(least.value)}, {size(least.value - limit)} more, on rank "
        f"{int(shape.memory_rank[moment])}, stage {stage} (pieces {first} to {last - 1})",
        f"  ({', '.join(kinds)}).",
        f"  Give at least {math.ceil(least.value)} bytes (limit)",
    ]
    lines += [f"  or {words}: {other}" for words, other in near.items()]
    if not near:
        lines[-1] += ", or smaller micro-batches, or many more ranks: neither another schedule fits nor twice the ranks"
    return InfeasibleError(
        "\n".join(lines),
        math.ceil(least.value),
        {name: float(held[moment][:, column].sum()) for column, name in KINDS.items()},
        limit=limit,
        step_s=float(shape.makespans(numbers[None])[0]),
        stages=_by_stage(held),
        way=(
            pair.micro,
            (*(pair.span(edge)[0] for edge in least.way), pair.span(least.way[-1])[1]),
            tuple(pair.edges.option[list(least.way)].tolist()),
        ),
    )


def _by_stage(held: NDArray[np.float64]) -> list[dict[str, float]]:
    """Of every stage, bytes by kind at the moment at which it holds most. held: [moments, stages, columns]."""
    found = []
    for stage in range(held.shape[1]):
        moment = int(held[:, stage].sum(1).argmax())
        found.append({name: float(held[moment, stage, column]) for column, name in KINDS.items()})
    return found


def duration(seconds: float) -> str:
    """Seconds with four digits, in the largest unit that is not below one."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def size(amount: float) -> str:
    """Bytes with two decimals in the largest unit that is not below one."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= factor:
            return f"{amount / factor:.2f} {unit}"
    return f"{amount:.0f} B"
