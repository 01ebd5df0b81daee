"""A pipeline within a limit of bytes: stages chosen by what adds up, judged by what they hold, and chosen again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autopar.costmodel import stages
from autopar.costmodel.stage_memory import Held
from autopar.costmodel.stages_measured import Measured
from autopar.errors import InfeasibleError
from autopar.graph import Program
from autopar.plan import Plan

#: How often stages are chosen and measured.
ROUNDS = 8
#: Cuts for which all plans are measured.
CUTS = 3
#: Where what adds up says that nothing fits, it may say too much: limits to choose by, as multiples of that asked for.
MORE = (1.0, 1.1, 1.3, 1.6, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Means:
    """By what a limit may be met.

    Attributes:
        held: (program of a micro-batch, plan, addresses at which stages begin, micro-batches) -> what stages hold.
        levels: (program, plan, parts of what can be let go of) -> what `Plan.saved` may say; None: nothing is computed
            again.
    """

    held: Callable[[Program, Plan, Sequence[str], int], Sequence[Held]]
    levels: Callable[[Program, Plan, Sequence[float]], Sequence[Mapping[str, str]]] | None = None


@dataclass(frozen=True)
class Measurable:
    """Of one number of micro-batches: what stages are cut from, and what it takes to measure them.

    plans: of every option. starts: addresses at which pieces begin, but for the first.
    """

    program: Program
    plans: Sequence[Plan]
    starts: Sequence[str]
    chain: Measured


def measured(choice: stages.Choice, among: Mapping[int, Measurable], means: Means, ranks: int) -> stages.Choice:
    """A choice, its best with what its stages really hold."""
    chain = among[choice.best.micro].chain
    _learn(choice.best, chain.unknown(choice.best), among, means)
    return replace(choice, best=chain.exact(choice.best, ranks))


def _learn(best: stages.Candidate, options: Iterable[int], among: Mapping[int, Measurable], means: Means) -> None:
    """Measure the stages of a candidate in these options."""
    of = among[best.micro]
    starts = [of.starts[c - 1] for c in best.cuts[1:-1]]
    for k in options:
        if not of.chain.knows(best.cuts, k):
            of.chain.learn(best.cuts, k, means.held(of.program, of.plans[k], starts, best.micro))


def fitted(among: Mapping[int, Measurable], limit: float, judged: Mapping[str, Any], means: Means) -> stages.Choice:
    """The quickest stages found of those that hold no more than the limit. judged: of `stages.choose`.

    Raises:
        InfeasibleError: none was found; says by how much, and where. Others: as `stages.choose`.
    """
    found: stages.Choice | None = None
    chains = {micro: of.chain for micro, of in among.items()}
    looked: set[tuple[int, tuple[int, ...]]] = set()
    for _ in range(ROUNDS):
        tried = (stages.possible(chains, limit=limit * more, **judged) for more in MORE)
        choice = next((c for c in tried if c is not None), None)
        if choice is None:
            break
        new = among[choice.best.micro].chain.unknown(choice.best)
        choice = measured(choice, among, means, judged["ranks"])
        fits = max(choice.best.peak_bytes) <= limit
        if fits and (found is None or choice.best.seconds < found.best.seconds):
            found = choice
        place = choice.best.micro, choice.best.cuts
        if place not in looked and (fits or not new) and len(looked) < CUTS:
            looked.add(place)  # other plans for the same stages may hold less than adds up, too
            _learn(choice.best, range(len(among[place[0]].plans)), among, means)
        elif not new or (found is not None and choice.best.seconds >= found.best.seconds and not fits):
            break
    return found or _least(among, limit, judged, means)


def _least(among: Mapping[int, Measurable], limit: float, judged: Mapping[str, Any], means: Means) -> stages.Choice:
    """What adds up may be less than what is held: the least is measured until it is known.

    Raises:
        InfeasibleError: with the least, unless what was measured last does fit.
    """
    chains = {micro: of.chain for micro, of in among.items()}
    while True:
        try:
            return measured(stages.choose(chains, limit=limit, **judged), among, means, judged["ranks"])
        except InfeasibleError as error:
            least = stages.possible(chains, limit=error.least, **judged) if error.least > 0 else None
            if least is None or not among[least.best.micro].chain.unknown(least.best):
                raise
            measured(least, among, means, judged["ranks"])


__all__ = ["Means", "Measurable", "fitted", "measured"]
