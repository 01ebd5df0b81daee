"""Tensors grouped by (producer class, reader classes): what the prices of communication and memory count.

Tensors of one group cost the same under any folded plan, so each group is priced once, times its count; that keeps a
folded price equal to the price of the unfolded program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from autopar.costmodel.fold import Fold
from autopar.costmodel.items import Items, Meta, Tensor
from autopar.graph import BACKWARD, COPIES, FORWARD, LOOKS, VIEWS

aten = torch.ops.aten
#: Ops that rearrange, and that the runtime runs with the collective before or behind them; as `passes/edit.py`.
MOVES = VIEWS | COPIES

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
    forward to backward (0: none, or counted with another tensor of the same memory). `late`: computation need not wait
    for its transport: it comes from where a parameter rests, or goes where a gradient rests, through moves only."""

    cls: int
    index: int
    meta: Meta
    readers: tuple[Reader, ...]
    count: int
    saved: float
    late: bool = False


def edges_of(fold: Fold) -> list[Edge]:
    """Every group of tensors that is read by anything."""
    items = fold.items
    saved = saved_tensors(items)
    resting, leaving = late_tensors(items)
    groups: dict[tuple[int, int, frozenset[Reader], float, bool], int] = {}
    for tensor, users in items.users.items():
        readers = set()
        for user, operand in users:
            item = items.items[user]
            if item.kind == "grad":
                readers.add(Reader(fold.of[items.param[item.name]], GRAD, BACKWARD))
            else:
                readers.add(Reader(fold.of[user], operand, item.phase))
        late = tensor in resting or tensor in leaving
        key = (fold.of[tensor.item], tensor.index, frozenset(readers), saved.get(tensor, 0.0), late)
        groups[key] = groups.get(key, 0) + 1
    out = []
    for (cls, index, readers_, kept, late), count in groups.items():
        meta = fold.first(cls).outs[index]
        assert meta is not None
        ordered = tuple(sorted(readers_, key=lambda r: (r.cls, r.operand)))
        out.append(Edge(cls, index, meta, ordered, count, kept, late))
    return out


def roots(items: Items) -> dict[Tensor, Tensor]:
    """For every tensor the one whose memory it shares: itself, or what a chain of views started from."""
    root: dict[Tensor, Tensor] = {}
    for item in items.items:
        view = item.kind == "op" and item.node is not None and item.node.target in VIEWS
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


def late_tensors(items: Items) -> tuple[set[Tensor], set[Tensor]]:
    """Tensors that are parameters seen through moves, and those that only gradients' storage reads, through moves."""
    resting: set[Tensor] = set()
    moves = {i.index for i in items.items if i.node is not None and i.kind == "op" and i.node.target in MOVES}
    for item in items.items:
        moved = item.index in moves and bool(item.ins) and all(t in resting for t in item.ins)
        if item.kind == "param" or moved:
            resting.update(Tensor(item.index, k) for k in range(len(item.outs)))
    leaving: set[Tensor] = set()
    for item in reversed(items.items):
        for k in range(len(item.outs)):
            users = items.users.get(Tensor(item.index, k), ())
            if users and all(
                items.items[u].kind == "grad"
                or (u in moves and all(Tensor(u, j) in leaving for j in range(len(items.items[u].outs))))
                for u, _ in users
            ):
                leaving.add(Tensor(item.index, k))
    return resting, leaving


def param_readers(items: Items) -> list[int]:
    """Ops with an operand that is a parameter, directly or through views and casts; those views are not listed."""
    derived: set[Tensor] = {Tensor(i.index, 0) for i in items.items if i.kind == "param"}
    found = []
    for item in items.items:
        if item.kind == "op" and any(t in derived for t in item.ins):
            if item.node is not None and item.node.target in LOOKS:
                derived.update(Tensor(item.index, k) for k in range(len(item.outs)))
            else:
                found.append(item.index)
    return found
