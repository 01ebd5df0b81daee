"""Tensors grouped by (producer class, reader classes): what the prices of communication and memory count.

Tensors of one group cost the same under any folded plan, so each group is priced once, times its count; that keeps a
folded price equal to the price of the unfolded program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.costmodel.fold import Fold
from autopar.costmodel.items import Items, Meta, Tensor
from autopar.costmodel.ops import VIEWS
from autopar.graph import BACKWARD, FORWARD, op_name

#: Operand number that stands for "the gradient of this parameter", read at the parameter's storage.
GRAD = -1


@dataclass(frozen=True)
class Reader:
    """A class that reads a tensor: `operand` of class `cls` (GRAD: the storage of parameter class `cls`)."""

    cls: int
    operand: int
    phase: str


@dataclass(frozen=True)
class Edge:
    """`count` tensors made as result `index` of class `cls` and read alike. `saved`: bytes per element kept from
    forward to backward (0: none, or counted with another tensor of the same memory)."""

    cls: int
    index: int
    meta: Meta
    readers: tuple[Reader, ...]
    count: int
    saved: float


def edges_of(fold: Fold) -> list[Edge]:
    """Every group of tensors that is read by anything."""
    items = fold.items
    saved = saved_tensors(items)
    groups: dict[tuple[int, int, frozenset[Reader], float], int] = {}
    for tensor, users in items.users.items():
        readers = set()
        for user, operand in users:
            item = items.items[user]
            if item.kind == "grad":
                readers.add(Reader(fold.of[items.param[item.name]], GRAD, BACKWARD))
            else:
                readers.add(Reader(fold.of[user], operand, item.phase))
        key = (fold.of[tensor.item], tensor.index, frozenset(readers), saved.get(tensor, 0.0))
        groups[key] = groups.get(key, 0) + 1
    out = []
    for (cls, index, readers_, kept), count in groups.items():
        meta = fold.first(cls).outs[index]
        assert meta is not None
        ordered = tuple(sorted(readers_, key=lambda r: (r.cls, r.operand)))
        out.append(Edge(cls, index, meta, ordered, count, kept))
    return out


def roots(items: Items) -> dict[Tensor, Tensor]:
    """For every tensor the one whose memory it shares: itself, or what a chain of views started from."""
    root: dict[Tensor, Tensor] = {}
    for item in items.items:
        view = item.kind == "op" and item.node is not None and op_name(item.node) in VIEWS
        for index, meta in enumerate(item.outs):
            if meta is not None:
                tensor = Tensor(item.index, index)
                root[tensor] = root[item.ins[0]] if view and item.ins else tensor
    return root


def saved_tensors(items: Items) -> dict[Tensor, float]:
    """Activations that the backward reads -> bytes per element. Of views of one memory, one tensor stands for all."""
    root = roots(items)
    found: dict[Tensor, float] = {}
    taken: set[Tensor] = set()
    for tensor, users in items.users.items():
        maker, base = items.items[tensor.item], root[tensor]
        if maker.phase != FORWARD or maker.constant or items.items[base.item].kind != "op" or base in taken:
            continue
        if any(items.items[u].phase == BACKWARD for u, _ in users):
            taken.add(base)
            meta, under = items.meta(tensor), items.meta(base)
            share = min(1.0, math.prod(under.shape) / max(1, math.prod(meta.shape)))
            found[tensor] = meta.itemsize * share
    return found


#: Ops through which a parameter is still seen as itself.
LOOKS = VIEWS | {"aten._to_copy", "aten.clone"}


def param_readers(items: Items) -> list[int]:
    """Ops with an operand that is a parameter, directly or through views and casts; those views are not listed."""
    derived: set[Tensor] = {Tensor(i.index, 0) for i in items.items if i.kind == "param"}
    found = []
    for item in items.items:
        if item.kind == "op" and any(t in derived for t in item.ins):
            if item.node is not None and op_name(item.node) in LOOKS:
                derived.update(Tensor(item.index, k) for k in range(len(item.outs)))
            else:
                found.append(item.index)
    return found
