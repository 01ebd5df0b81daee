"""Which strided splits are worth offering: those that some neighbour can use without moving data.

A factor f can be split plainly (`f`) or seen as (outer, f / outer) with the second part split (`f@outer`). Only a few
values of `outer` matter: those that a view, a permutation or a matmul next door turns a plain split into. They are
found by carrying every placement over every edge, in both directions, until nothing new appears.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from autopar.costmodel.fold import Fold
from autopar.rule import WHOLE, Choice
from autopar.spec import Placement, S

#: Strided variants kept per factor of an op, in order of discovery (nearest first).
MAX_STRIDED = 4


def candidates(fold: Fold, sizes: Sequence[int]) -> list[tuple[Choice, ...]]:
    """For every class of ops the choices one axis may have, whole first; empty for sources and sinks.

    sizes: the mesh's axis sizes; a candidate is kept if an axis of one of these sizes divides it.
    """
    parts = sorted({s for s in sizes if s > 1})
    offered: list[dict[Choice, None]] = [{} for _ in fold.members]
    strided: dict[tuple[int, str], int] = {}
    queue: deque[tuple[int, Choice]] = deque()
    consumers: dict[tuple[int, int], set[tuple[int, int]]] = {}

    def offer(cls: int, choice: Choice) -> None:
        size = fold.items.rule(fold.first(cls)).sizes[choice.factor]
        if choice in offered[cls] or not any(size % (choice.outer * p) == 0 for p in parts):
            return
        if choice.outer > 1:
            key = (cls, choice.factor)
            if strided.get(key, 0) >= MAX_STRIDED:
                return
            strided[key] = strided.get(key, 0) + 1
        offered[cls][choice] = None
        queue.append((cls, choice))

    def carry(cls: int, at: Placement, operand: int, result: int) -> None:
        """Offer class `cls` what places `at` on one of its operands or results."""
        item = fold.first(cls)
        if item.kind != "op" or item.constant:
            return
        rule = fold.items.rule(item)
        choice = rule.factor_at(rule.ins[operand] if operand >= 0 else rule.outs[result], at.dim, at.outer)
        if choice is not None:
            offer(cls, choice)

    ops = [c for c in range(len(fold.members)) if fold.first(c).kind == "op"]
    for cls in range(len(fold.members)):
        for position, producers in enumerate(fold.producers(cls)):
            for producer in producers:
                consumers.setdefault((producer.item, producer.index), set()).add((cls, position))
    for cls in ops:
        offered[cls][WHOLE] = None
        if not fold.first(cls).constant:
            for factor in fold.items.rule(fold.first(cls)).splittable():
                offer(cls, Choice(factor))
    for cls in range(len(fold.members)):
        if fold.first(cls).kind in ("param", "input"):
            stored = fold.first(cls).outs[0]
            for dim in range(len(stored.shape) if stored else 0):
                for user, position in sorted(consumers.get((cls, 0), ())):
                    carry(user, S(dim), position, -1)
    while queue:
        cls, choice = queue.popleft()
        ins, outs = fold.items.rule(fold.first(cls)).placements(choice)
        for position, place in enumerate(ins):
            if place.kind == "S":
                for producer in sorted(fold.producers(cls)[position]):
                    carry(producer.item, place, -1, producer.index)
        for index, place in enumerate(outs):
            if place.kind == "S":
                for user, position in sorted(consumers.get((cls, index), ())):
                    carry(user, place, position, -1)
    for cls in ops:
        if not fold.first(cls).constant:
            rule = fold.items.rule(fold.first(cls))
            offered[cls].update({Choice(through=g): None for g in range(len(rule.rule.linear))})
    return [tuple(row) for row in offered]
