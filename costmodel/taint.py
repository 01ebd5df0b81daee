"""Which loops of which op run over the batch or the sequence: what strategies such as ddp and tp are defined by.

The batch dims of the inputs (and, for token ids, masks and (batch, sequence, features) inputs, the dim after them) are
carried through the rules' factors to every op. In a flattened dim a mark covers a range of the factor: from `outer`,
over `extent` elements.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.costmodel.items import Item, Items, Tensor
from autopar.rule import BoundRule, Choice, Operand

BATCH, SEQUENCE = "batch", "sequence"


@dataclass(frozen=True, order=True)
class Mark:
    """Of one factor (of an op) or dim (of a tensor), seen as (outer, extent, rest): the extent runs over `what`.

    head: it holds the outermost part of the batch or sequence, where a split of it starts.
    """

    what: str
    at: str | int
    outer: int
    extent: int
    head: bool = True

    def touches(self, outer: int) -> bool:
        """Whether a split at `outer` cuts it."""
        return self.outer <= outer < self.outer * self.extent


def marks_of(items: Items) -> list[frozenset[Mark]]:
    """Marks on the factors of every op, by item; empty for sources, sinks and untouched ops."""
    tensors: dict[Tensor, frozenset[Mark]] = {}
    out: list[frozenset[Mark]] = []
    for item in items.items:
        if item.kind == "input":
            tensors[Tensor(item.index, 0)] = _input(items, item)
        found: frozenset[Mark] = frozenset()
        if item.kind == "op" and any(tensors.get(t) for t in item.ins):
            rule = items.rule(item)
            found = frozenset(
                mark
                for tensor, operand in zip(item.ins, rule.ins)
                for mark in _factors(rule, operand, tensors.get(tensor))
            )
            for index, operand in enumerate(rule.outs):
                tensors[Tensor(item.index, index)] = _dims(rule, operand, found)
        out.append(found)
    return out


def batch_choices(marks: frozenset[Mark]) -> frozenset[Choice]:
    """The choices that split the batch at an op."""
    return frozenset(Choice(str(m.at), m.outer) for m in marks if m.what == BATCH and m.head)


def _input(items: Items, item: Item) -> frozenset[Mark]:
    dim = items.program.batch_dims.get(item.name)
    meta = item.outs[0]
    if dim is None or meta is None:
        return frozenset()
    found = [Mark(BATCH, dim, 1, meta.shape[dim])]
    rank = len(meta.shape)
    tokens = not meta.dtype.is_floating_point and rank >= 2
    if dim + 1 < rank and (tokens or rank == 3):
        found.append(Mark(SEQUENCE, dim + 1, 1, meta.shape[dim + 1]))
    return frozenset(m for m in found if m.extent > 1)


def _factors(rule: BoundRule, operand: Operand, marks: frozenset[Mark] | None) -> list[Mark]:
    """Marks on dims of an operand -> marks on the op's factors."""
    found = []
    for mark in marks or ():
        before = 1
        for name in (operand or ())[mark.at] if operand is not None and int(mark.at) < len(operand) else ():  # type: ignore[index]
            size = rule.sizes[name]
            found += _overlap(mark, name, before, size)
            before *= size
    return found


def _overlap(mark: Mark, name: str, before: int, size: int) -> list[Mark]:
    low, high = max(before, mark.outer), min(before * size, mark.outer * mark.extent)
    if low >= high or low % before or high % low:
        return []
    return [Mark(mark.what, name, low // before, high // low, mark.head and low == mark.outer)]


def _dims(rule: BoundRule, operand: Operand, marks: frozenset[Mark]) -> frozenset[Mark]:
    """Marks on an op's factors -> marks on the dims of a result."""
    found = set()
    for mark in marks:
        place = rule.position(operand, str(mark.at))
        if place is not None:
            found.add(Mark(mark.what, place[0], place[1] * mark.outer, mark.extent, mark.head))
    return frozenset(found)
