"""A chain some of whose stages have been looked at as they are: their bytes are put in place of those that add up.

What pieces add up to is near, for every stage that there might be; a limit of bytes is kept by what a stage really
holds. So a search chooses, what it chose is measured, and it chooses again. Of stages that nobody has measured, what
was found of others of the same plan is taken for likely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from autopar.costmodel.stage_memory import Held
from autopar.costmodel.stages_answer import Candidate
from autopar.costmodel.stages_chain import SAVED, STATIC, TRANSIENT, Additive, Alternatives, Floats, Option
from autopar.costmodel.stages_table import shape

#: Columns that are measured.
_COLUMNS = (STATIC, SAVED, TRANSIENT)
#: Stands for options of which nothing has been measured.
_ANY = -1


@dataclass(frozen=True)
class Measured:
    """A Chain: `chain`, with what is known better.

    Attributes:
        known: (first piece, last piece, option) -> what the stage holds.
    """

    chain: Additive | Alternatives
    known: dict[tuple[int, int, int], Held] = field(default_factory=dict)

    @property
    def pieces(self) -> int:
        """As of any Chain."""
        return self.chain.pieces

    def gap_bytes(self, at: int) -> tuple[float, float]:
        """As of any Chain."""
        return self.chain.gap_bytes(at)

    def options(self, first: int, last: int) -> Sequence[Option]:
        """As of any Chain."""
        factors = self._factors()
        return [self._option(first, last, k, o, factors) for k, o in enumerate(self.chain.options(first, last))]

    def stages(self) -> Iterator[tuple[int, Floats]]:
        """As `Additive.stages`."""
        factors = self._factors()
        places: dict[int, list[tuple[int, int, Held]]] = {}
        for (first, last, k), held in self.known.items():
            places.setdefault(first, []).append((last, k, held))
        for first, block in self.chain.stages():
            out = block.copy()
            for k in range(out.shape[1]) if factors else ():
                out[:, k, list(_COLUMNS)] *= factors.get(k, factors[_ANY])
            for last, k, held in places.get(first, ()):
                out[last - first - 1, k, list(_COLUMNS)] = (held.static, held.saved, held.transient)
            yield first, out

    def learn(self, cuts: Sequence[int], option: int, found: Sequence[Held]) -> None:
        """What stages with these cuts hold in an option."""
        for first, last, held in zip(cuts, cuts[1:], found):
            self.known[first, last, option] = held

    def knows(self, cuts: Sequence[int], option: int) -> bool:
        """Whether all stages with these cuts have been measured in an option."""
        return all((first, last, option) in self.known for first, last in pairwise(cuts))

    def unknown(self, candidate: Candidate) -> list[int]:
        """The options of a candidate that have not been measured where it has them."""
        spans = zip(candidate.cuts, candidate.cuts[1:], candidate.choices)
        return sorted({k for first, last, k in spans if (first, last, k) not in self.known})

    def exact(self, candidate: Candidate, ranks: int) -> Candidate:
        """A candidate all of whose stages are known, with what they hold."""
        spans = zip(candidate.cuts, candidate.cuts[1:], candidate.choices, candidate.options)
        options = [self._option(first, last, k, option, {}) for first, last, k, option in spans]
        made = shape(candidate.schedule, ranks, candidate.micro)
        numbers = np.zeros((made.stages, made.memory.shape[2]))
        numbers[:, : len(options[0].numbers())] = [o.numbers() for o in options]
        peaks = tuple(map(float, made.peaks(numbers)))
        return replace(candidate, options=tuple(options), peak_bytes=peaks)

    def _option(self, first: int, last: int, k: int, option: Option, factors: dict[int, Floats]) -> Option:
        held = self.known.get((first, last, k))
        if held is None:
            likely = factors.get(k, factors.get(_ANY, np.ones(len(_COLUMNS)))) * [option.numbers()[c] for c in _COLUMNS]
            held = Held(*map(float, likely))
        return held.into(option)

    def _factors(self) -> dict[int, Floats]:
        """Option -> by what its numbers are off, where some have been measured; and of all that have."""
        sums: dict[int, Floats] = {}
        for (first, last, k), held in self.known.items():
            told = self.chain.options(first, last)[k].numbers()
            line = np.array([[held.static, held.saved, held.transient], [told[c] for c in _COLUMNS]])
            for key in (k, _ANY):
                sums[key] = sums.get(key, np.zeros_like(line)) + line
        return {k: np.where(told > 0, held / np.where(told > 0, told, 1.0), 1.0) for k, (held, told) in sums.items()}


__all__ = ["Measured"]
