"""Find the repeats first: items that play the same role in repeated layers form one class and share one decision.

Weisfeiler-Lehman refinement: items start with a colour of what they are (op, arguments, shapes, module path with layer
numbers starred) and are refined a few rounds by the colours of their neighbours, so that the ends of a stack of layers
may differ from its middle. Prices stay exact under any partition, because edges are counted by (producer class,
consumer class); folding only ties decisions together. Small programs are not folded at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from autopar.costmodel.items import Item, Items, Tensor
from autopar.graph import op_name, pattern

#: Programs of fewer items decide every item by itself.
SMALL = 250
ROUNDS = 3


@dataclass
class Fold:
    """Classes of items. `of[i]` is the class of item i; `members[c]` its items in graph order."""

    items: Items
    of: list[int]
    members: list[list[int]]
    _producers: list[list[set[Tensor]]] = field(default_factory=list)

    def first(self, cls: int) -> Item:
        """The item that stands for its class."""
        return self.items.items[self.members[cls][0]]

    @functools.cached_property
    def like(self) -> list[int]:
        """For every item the first of its class."""
        return [self.members[c][0] for c in self.of]

    def producers(self, cls: int) -> list[set[Tensor]]:
        """For every operand of a class: the (class, result) pairs it may come from."""
        if not self._producers:
            for group in self.members:
                row: list[set[Tensor]] = [set() for _ in self.items.items[group[0]].ins]
                for m in group:
                    for position, t in enumerate(self.items.items[m].ins):
                        row[position].add(Tensor(self.of[t.item], t.index))
                self._producers.append(row)
        return self._producers[cls]


def fold(
    items: Items, small: int = SMALL, rounds: int = ROUNDS, mark: Callable[[Item], Hashable] = lambda item: None
) -> Fold:
    """Partition the items; in programs of fewer than `small` items every class has one member.

    mark: items of different marks are never in one class (a constraint names one and not the other).
    """
    num = len(items.items)
    if num < small:
        return Fold(items, list(range(num)), [[i] for i in range(num)])
    colour = _intern([(_seed(i), mark(i)) for i in items.items])
    users: list[list[tuple[int, int, int]]] = [[] for _ in range(num)]
    for item in items.items:
        for position, tensor in enumerate(item.ins):
            users[tensor.item].append((tensor.index, item.index, position))
    for _ in range(rounds):
        colour = _intern(
            [
                (
                    colour[item.index],
                    tuple((colour[t.item], t.index) for t in item.ins),
                    frozenset((index, colour[user], position) for index, user, position in users[item.index]),
                )
                for item in items.items
            ]
        )
    members: list[list[int]] = [[] for _ in range(max(colour) + 1)]
    for index, c in enumerate(colour):
        members[c].append(index)
    return Fold(items, colour, members)


def _seed(item: Item) -> Hashable:
    if item.kind == "op":
        module = pattern(item.name.rpartition("/")[0] + "/")
        return (item.kind, item.phase, module, _role(item), item.in_meta, item.outs, item.constant)
    trainable = item.source is not None and item.source.trainable
    return (item.kind, item.phase, pattern(item.name + "."), item.in_meta, item.outs, trainable)


def _role(item: Item) -> Hashable:
    """The op's signature; of random ops without the number of the stream, which is different at every call."""
    assert item.node is not None
    if op_name(item.node).startswith("autopar."):
        return op_name(item.node)
    return item.signature


def _intern(keys: list[Hashable]) -> list[int]:
    """Numbers in order of first appearance."""
    known: dict[Hashable, int] = {}
    return [known.setdefault(k, len(known)) for k in keys]
