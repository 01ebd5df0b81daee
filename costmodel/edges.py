"""Tensors grouped by (producer class, reader classes): what the prices of communication and memory count.

Tensors of one group cost the same under any folded plan, so each group is priced once, times its count; that keeps a
folded price equal to the price of the unfolded program.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from autopar.costmodel.fold import Fold
from autopar.costmodel.items import Items, Meta, Tensor
from autopar.graph import BACKWARD, FORWARD, LOOKS, MOVES, VIEWS
from autopar.offload import OFFLOAD

aten = torch.ops.aten
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
    """`count` tensors made as result `index` of class `cls` and read alike. `late`: computation need not wait for its
    transport: it comes from where a parameter rests, or goes where a gradient rests, through moves only."""

    cls: int
    index: int
    meta: Meta
    readers: tuple[Reader, ...]
    count: int
    late: bool = False


@dataclass(frozen=True)
class Kept:
    """`count` activations of shape `meta` that the classes of `readers` read in the backward, in `size` bytes per
    element: in every distinct layout in which they want it, it is kept from forward to backward."""

    meta: Meta
    readers: tuple[Reader, ...]
    count: int
    size: float


def edges_of(fold: Fold) -> list[Edge]:
    """Every group of tensors that is read by anything."""
    items = fold.items
    resting, leaving = late_tensors(items)
    groups: dict[tuple[int, int, frozenset[Reader], bool], int] = {}
    for tensor, users in items.users.items():
        readers = set()
        for user, operand in users:
            item = items.items[user]
            if item.kind == "grad":
                readers.add(Reader(fold.of[items.param[item.name]], GRAD, BACKWARD))
            else:
                readers.add(Reader(fold.of[user], operand, item.phase))
        late = tensor in resting or tensor in leaving
        key = (fold.of[tensor.item], tensor.index, frozenset(readers), late)
        groups[key] = groups.get(key, 0) + 1
    out = []
    for (cls, index, readers_, late), count in groups.items():
        meta = fold.first(cls).outs[index]
        assert meta is not None
        ordered = tuple(sorted(readers_, key=lambda r: (r.cls, r.operand)))
        out.append(Edge(cls, index, meta, ordered, count, late))
    return out


def kept_of(fold: Fold) -> list[Kept]:
    """What the forward keeps for the backward.

    What moves make of a tensor (views, casts, copies) is kept as the smaller of the two, and of all that are read in
    the shape that most readers want: the others are made from it. A view keeps all that it is a view of.
    """
    items = fold.items
    root, memory = _roots(items, MOVES), _roots(items, VIEWS)
    families: dict[Tensor, dict[tuple[int, ...], list[Tensor]]] = {}
    for tensor in items.users:
        base = root[tensor]
        maker = items.items[base.item]
        kept = items.items[tensor.item].phase == FORWARD and maker.kind == "op" and not maker.constant
        kept = kept and (maker.node is None or maker.node.target is not OFFLOAD)  # that is on the host
        if kept and _readers(fold, tensor):
            families.setdefault(base, {}).setdefault(items.meta(tensor).shape, []).append(tensor)
    groups: dict[tuple[Meta, frozenset[Reader], float], int] = {}
    for base, shapes in families.items():
        tensors = max(shapes.values(), key=lambda family: sum(len(_readers(fold, t)) for t in family))
        readers = frozenset(r for t in tensors for r in _readers(fold, t))
        least = min(tensors, key=lambda t: items.meta(t).itemsize)
        meta = items.meta(least)
        held = min(_bytes(items.meta(t)) for t in (base, memory[least]))
        key = (meta, readers, held / max(1, math.prod(meta.shape)))
        groups[key] = groups.get(key, 0) + 1
    return [
        Kept(meta, tuple(sorted(readers, key=lambda r: (r.cls, r.operand))), count, size)
        for (meta, readers, size), count in groups.items()
    ]


def _readers(fold: Fold, tensor: Tensor) -> list[Reader]:
    """Who reads a tensor in the backward."""
    found = ((fold.items.items[user], operand) for user, operand in fold.items.users.get(tensor, ()))
    return [
        Reader(fold.of[u.index], operand, BACKWARD) for u, operand in found if u.phase == BACKWARD and u.kind == "op"
    ]


def _bytes(meta: Meta) -> float:
    return float(meta.itemsize * math.prod(meta.shape))


def _roots(items: Items, moves: Collection[object]) -> dict[Tensor, Tensor]:
    """For every tensor what it can be made from by `moves`: itself, or what a chain of those of one operand started
    from."""
    root: dict[Tensor, Tensor] = {}
    for item in items.items:
        moved = item.kind == "op" and item.node is not None and item.node.target in moves and len(item.ins) == 1
        for index, meta in enumerate(item.outs):
            if meta is not None:
                tensor = Tensor(item.index, index)
                root[tensor] = root[item.ins[0]] if moved else tensor
    return root


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
