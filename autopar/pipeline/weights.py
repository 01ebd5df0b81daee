"""How much of a batch's loss a micro-batch's loss is.

A loss over a batch is most often a sum over its rows divided by something that the parameters have no part in: a number
of elements, of labels that are not ignored, or a count that the user passes; or several such terms added up. Then the
loss of the batch is the sum of the micro-batches' losses, each times (its divisor / the batch's): exact also where
micro-batches have unequally many labels. Terms that are the same for every batch (a penalty on parameters) go with any
weights that add up to 1, and so, on average, does what is no sum over rows.

`terms.py` beside reads the terms off the graph. A term may ask for nothing: a micro-batch without labels adds nothing
to it, whatever its weight. Where the terms ask for different weights, one loss cannot have them all: if one is a sum
and another a mean, the loss is refused; if they are means over different counts, the first is exact, and the user is
told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autopar.errors import BatchError
from autopar.graph import Program, Value
from autopar.pipeline.terms import OTHER, SAME, SUM, Divisor, Term, divisor

Tensors = Mapping[str, torch.Tensor]

#: Relative difference of weights that is rounding.
_ROUNDING = 1e-5
#: Weights that add up to so many times what they should are those of a sum where a mean is, or the other way round.
_FAR = 1.5


@dataclass(frozen=True)
class Weights:
    """The weight of every micro-batch's loss. inexact: why they do not give the loss of the batch; "": they do."""

    values: list[float]
    inexact: str = ""


def divisors(
    one: Program, whole: Program, loss: str, count: int, scale: Callable[[Value], float | None] = lambda value: None
) -> tuple[Divisor, Divisor] | None:
    """What the loss called so is divided by: in the program of one of `count` micro-batches, and of the whole batch.

    None if no term of it is known to be a sum over the batch.

    Args:
        scale: a value of `whole` -> what the sum of the micro-batches' values is multiplied by to give it; None where
            it is not known to be such a sum. Those are sums nevertheless if they have `count` times the elements.
    """
    found = []
    for program in (one, whole):
        sink = next(s for s in program.sinks if s.kind == "output" and s.name == loss)
        found.append(divisor(program, sink))
    small, large = found
    if len(small.terms) != len(large.terms):
        return None
    pairs = [_paired(a, b, count, scale) for a, b in zip(small.terms, large.terms)]
    if not any(a.kind == SUM for a, _ in pairs):
        return None
    return Divisor(one, tuple(a for a, _ in pairs)), Divisor(whole, tuple(b for _, b in pairs))


def _paired(a: Term, b: Term, count: int, scale: Callable[[Value], float | None]) -> tuple[Term, Term]:
    """A term of a micro-batch's loss and of the batch's, of one kind."""
    share = scale(b.end) if b.end is not None and b.kind != SAME else None
    if share is None and a.kind == b.kind == SUM and a.elements * count == b.elements:
        share = 1.0
    if share is not None:
        return replace(a, kind=SUM, number=a.number * share), replace(b, kind=SUM)
    kind = SAME if a.kind == b.kind == SAME else OTHER
    return replace(a, kind=kind), replace(b, kind=kind)


def weights(of: tuple[Divisor, Divisor], rows: Sequence[Tensors], whole: Tensors, buffers: Tensors) -> Weights:
    """The weight of every micro-batch's loss.

    Args:
        of: as `divisors` gives it. rows: the inputs of every micro-batch. whole: those of the batch.

    Raises:
        BatchError: the loss adds a sum over rows to a term that is none; it names both.
    """
    return _Weighing(of, rows, whole, buffers).weights()


#: What a term asks for, by micro-batch: a weight, or None where it does not matter.
_Asked = list[float | None]


class _Weighing:
    """The weights for one batch."""

    def __init__(self, of: tuple[Divisor, Divisor], rows: Sequence[Tensors], whole: Tensors, buffers: Tensors) -> None:
        self.one, self.all = of
        self.rows, self.buffers = rows, buffers
        self.parts = [self.one.scales(row, buffers) for row in rows]
        self.total = self.all.scales(whole, buffers)
        self.lost: list[tuple[int, int]] = []  # (term, micro-batch) of which something is left out

    def weights(self) -> Weights:
        terms = self.one.terms
        sums = [j for j, term in enumerate(terms) if term.kind == SUM]
        if not all(math.isfinite(self.total[j]) for j in sums):
            # A batch without any label has no loss: as the whole does, its parts divide by zero.
            return Weights([math.nan] * len(self.rows))
        asked = {j: self._asked(j) for j in sums}
        found = self._agreed(asked)
        if found is None or self._off(found):
            for j in sums:
                self._free_where_empty(j, asked[j])
            found = self._agreed(asked)
        told = ""
        if found is None:
            self._refuse_sums(asked)
            found = self._compromise(asked)
            told = (
                f"terms of the loss ({', '.join(terms[j].where for j in sums)}) are divided by different counts, so "
                "that no weights of the micro-batches' losses give the loss of the batch: the first that is uneven "
                "counts as in the whole batch, the others nearly; divide all by the same count, or pass "
                "micro_batches=1"
            )
        off = self._off(found)
        if off and not told:
            j, ratio = off[0]
            if not self.lost and not 1 / _FAR < ratio < _FAR:
                self._refuse(sums[0], j)
            told = (
                f"a term of the loss ({terms[j].where}) counts {ratio:.3g} times what it does for the whole batch, for "
                f"the micro-batches' losses have the weights that {terms[sums[0]].where} asks for; divide both by the "
                "same count, or pass micro_batches=1"
            )
        if self.lost:
            j, k = self.lost[0]
            told = (
                f"a factor of a term of the loss ({terms[j].where}) is 0, or its divisor is, in micro-batch {k} and "
                "not in the whole batch, so that the rows of that micro-batch are left out of it; multiply each row by "
                "its own factor before adding up, or pass micro_batches=1"
            )
        return Weights(found, told)

    def _asked(self, j: int) -> _Asked:
        """What a sum asks for, so that its parts, weighed, add up to it."""
        out: _Asked = []
        for k, part in enumerate(self.parts):
            scale = part[j]
            if self.total[j] == 0:
                out.append(None if scale == 0 else 0.0)
            elif scale != 0 and math.isfinite(scale):
                out.append(self.total[j] / scale)
            else:
                if not self.one.empty(j, self.rows[k], self.buffers):
                    self.lost.append((j, k))
                # 0 / 0 must be left out. A guard that is 0 leaves itself out: any weight will do.
                out.append(None if scale == 0 else 0.0)
        return out

    def _free_where_empty(self, j: int, asked: _Asked) -> None:
        """A micro-batch of which a sum has nothing, divided by what is not 0, may have any weight."""
        for k, part in enumerate(self.parts):
            if asked[k] and math.isfinite(part[j]) and self.one.empty(j, self.rows[k], self.buffers):
                asked[k] = None

    def _agreed(self, asked: Mapping[int, _Asked]) -> list[float] | None:
        """Weights that all ask for; None if there are none."""
        out = []
        for k in range(len(self.rows)):
            wishes = [w for w in (a[k] for a in asked.values()) if w is not None]
            first = wishes[0] if wishes else 0.0
            if any(abs(w - first) > _ROUNDING * abs(first) for w in wishes):
                return None
            out.append(0.0 if self._undefined(k) else first)
        return out

    def _undefined(self, k: int) -> bool:
        """Whether some term of a micro-batch's loss is divided by 0: the loss must not be read then."""
        return not all(math.isfinite(scale) for scale in self.parts[k])

    def _off(self, found: Sequence[float]) -> list[tuple[int, float]]:
        """Terms that are no sums, with what they are multiplied by under these weights, where that is not 1."""
        out = []
        for j, term in enumerate(self.one.terms):
            if term.kind != SUM and math.isfinite(self.total[j]) and self.total[j]:
                ratio = sum(w * part[j] for w, part in zip(found, self.parts) if w) / self.total[j]
                if abs(ratio - 1.0) > _ROUNDING:
                    out.append((j, ratio))
        return out

    def _refuse_sums(self, asked: Mapping[int, _Asked]) -> None:
        """Raise if one of the terms is a sum where another is a mean."""
        totals = {j: sum(w for w in a if w) for j, a in asked.items()}
        most, least = max(totals, key=totals.__getitem__), min(totals, key=totals.__getitem__)
        if not self.lost and totals[most] > _FAR * totals[least] > 0:
            self._refuse(most, least)

    def _refuse(self, sum_: int, other: int) -> None:
        first, second = self.one.terms[sum_], self.one.terms[other]
        if second.kind == SAME:
            what = f"a term that no row of the batch has a part in ({second.where})"
            remedy = "divide the sum, and the sum alone, by the number of rows or labels in the model"
        else:
            what = f"one that is a mean or the like ({second.where})"
            remedy = "divide both by the number of rows or labels in the model, so that both are means"
        raise BatchError(
            f"the loss adds a sum over the rows of the batch ({first.where}) to {what}: a pipeline weighs the losses "
            f"of {len(self.rows)} micro-batches, and no weights give both their part in the loss of the batch; "
            f"{remedy}, or pass micro_batches=1"
        )

    def _compromise(self, asked: Mapping[int, _Asked]) -> list[float]:
        """The weights of the first term whose micro-batches differ, and 0 where a term must not be read."""

        def spread(a: _Asked) -> float:
            known = [w for w in a if w is not None]
            return max(known, default=0.0) - min(known, default=0.0)

        columns = sorted(asked.values(), key=lambda a: spread(a) <= _ROUNDING)
        out = []
        for k in range(len(self.rows)):
            wishes = [w for w in (a[k] for a in columns) if w is not None]
            out.append(0.0 if self._undefined(k) or not wishes else wishes[0])
        return out


__all__ = ["Divisor", "Term", "Weights", "divisor", "divisors", "weights"]
