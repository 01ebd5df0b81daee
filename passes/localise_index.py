"""Local versions of ops with global indices, where the indexed dim is split: foreign indices are masked.

A shard answers for the indices it holds and gives zero for the others, so that results are partial sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from autopar.passes.local_call import Emitter, Localiser
from autopar.spec import Radix

aten = torch.ops.aten

#: The class index that no shard holds.
IGNORED = -100


def _count(e: Emitter, like: fx.Node, size: int) -> fx.Node:
    """0 .. size - 1 on the device of `like`: `arange` would name the device that the model was captured on."""
    ones = e.add(aten.new_ones.default, like, [size], dtype=torch.int64)
    return e.add(aten.sub.Scalar, e.add(aten.cumsum.default, ones, 0), 1)


def global_index(e: Emitter, like: fx.Node, digits: tuple[Radix, ...]) -> fx.Node:
    """1-D int64 tensor of the global indices this rank holds along a dim of that layout, on the device of `like`."""
    count, stride = 1, 1
    pieces: list[tuple[int, int]] = []
    for digit in reversed(digits):
        if digit.axis is None:
            pieces.insert(0, (digit.size, stride))
            count *= digit.size
        stride *= digit.size
    total: fx.Node | None = None
    for i, (size, step) in enumerate(pieces):
        term = _count(e, like, size)
        if step != 1:
            term = e.add(aten.mul.Scalar, term, step)
        term = e.add(aten.reshape.default, term, [size if j == i else 1 for j in range(len(pieces))])
        total = term if total is None else e.add(aten.add.Tensor, total, term)
    if total is None:
        total = _count(e, like, 1)
    total = e.add(aten.reshape.default, total, [count])
    start = e.offset(digits)
    return total if isinstance(start, int) else e.add(aten.add.Scalar, total, start)


def to_local(e: Emitter, index: fx.Node, digits: tuple[Radix, ...]) -> tuple[fx.Node, fx.Node]:
    """(whether this rank holds the index, its local index) for global indices into a dim of that layout.

    The local index is in range only where the rank holds it; negative or too big global indices are held by nobody.
    """
    total = 1
    for digit in digits:
        total *= digit.size
    held = e.add(aten.ge.Scalar, index, 0)
    held = e.add(aten.logical_and.default, held, e.add(aten.lt.Scalar, index, total))
    local: fx.Node | None = None
    stride, local_stride = 1, 1
    for digit in reversed(digits):
        # This digit of the index: (index // stride) % size.
        value = index if stride == 1 else e.add(aten.div.Scalar_mode, index, stride, rounding_mode="floor")
        if digit is not digits[0]:
            value = e.add(aten.remainder.Scalar, value, digit.size)
        if digit.axis is not None:
            mine = e.add(aten.eq.Scalar, value, e.coordinate(digit.axis))
            held = e.add(aten.logical_and.default, held, mine)
        else:
            term = value if local_stride == 1 else e.add(aten.mul.Scalar, value, local_stride)
            local = term if local is None else e.add(aten.add.Tensor, local, term)
            local_stride *= digit.size
        stride *= digit.size
    if local is None:
        local = e.add(aten.zeros_like.default, index)
    return held, local


def masked(e: Emitter, index: fx.Node, digits: tuple[Radix, ...], other: int) -> tuple[fx.Node, fx.Node]:
    """(whether foreign, the local index with `other` in place of foreign ones); wrong ones are left to the kernel."""
    held, local = to_local(e, index, digits)
    foreign = e.add(aten.logical_not.default, held)
    local = e.add(aten.masked_fill.Scalar, local, foreign, other)
    wrong, total = _wrong(e, index, digits)
    return foreign, e.add(aten.masked_fill.Scalar, local, wrong, total)


def _wrong(e: Emitter, index: fx.Node, digits: tuple[Radix, ...]) -> tuple[fx.Node, int]:
    """(whether no rank holds the index, an index that every shard's kernel refuses): a wrong id is no zero row."""
    total = math.prod(digit.size for digit in digits)
    negative = e.add(aten.lt.Scalar, index, 0)
    return e.add(aten.logical_or.default, negative, e.add(aten.ge.Scalar, index, total)), total


def _zeroed(e: Emitter, x: fx.Node, foreign: fx.Node) -> list[fx.Node | None]:
    return e.final(aten.masked_fill.Scalar, x, foreign, 0)


def _embedding(e: Emitter) -> list[fx.Node | None]:
    if not e.axes("v"):
        return e.same()
    foreign, local = masked(e, e.named["indices"], e.digits(0, 0), 0)
    rows = e.add(aten.embedding.default, e.named["weight"], local)
    return _zeroed(e, rows, e.add(aten.unsqueeze.default, foreign, -1))


def _embedding_backward(e: Emitter) -> list[fx.Node | None]:
    rows = e.shape[0]
    if not e.axes("v"):
        return e.same(num_weights=rows)
    index, padding = e.named["indices"], e.named["padding_idx"]
    held, local = to_local(e, index, e.out_digits(0))
    if padding >= 0:
        held = e.add(aten.logical_and.default, held, e.add(aten.ne.Scalar, index, padding))
    # The kernel skips rows equal to padding_idx: foreign ones become -1, and so does that.
    local = e.add(aten.masked_fill.Scalar, local, e.add(aten.logical_not.default, held), -1)
    local = e.add(aten.contiguous.default, local)
    return e.same(indices=local, num_weights=rows, padding_idx=-1)


def _gather(e: Emitter) -> list[fx.Node | None]:
    if not e.axes("v"):
        return e.same()
    d = e.named["dim"] % len(e.shape)
    foreign, local = masked(e, e.named["index"], e.digits(0, d), 0)
    return _zeroed(e, e.add(aten.gather.default, e.named["self"], d, local), foreign)


def _index_select(e: Emitter) -> list[fx.Node | None]:
    if not e.axes("v"):
        return e.same()
    d = e.named["dim"] % len(e.shape)
    foreign, local = masked(e, e.named["index"], e.digits(0, d), 0)
    rows = e.add(aten.index_select.default, e.named["self"], d, local)
    return _zeroed(e, rows, e.add(aten.reshape.default, foreign, [-1] + [1] * (len(e.shape) - 1 - d)))


def _shared(argument: str) -> Localiser:
    """Scattering with sum: where the positions are split, each shard adds to its share of `self`."""

    def localise(e: Emitter) -> list[fx.Node | None]:
        parts = e.parts(*(f for f in e.call.bound.rule.plus))
        return e.same() if parts == 1 else e.same(**{argument: e.add(aten.mul.Scalar, e.named[argument], 1.0 / parts)})

    return localise


def _nll(e: Emitter) -> list[fx.Node | None]:
    """nll_loss forward and backward over a shard of the classes: foreign targets are ignored ones."""
    if not e.axes("k"):
        return e.same()
    rank = len(e.named["self"].meta["val"].shape)
    target, ignore = e.named["target"], e.named["ignore_index"]
    digits = e.digits(e.operand("self"), 0 if rank == 1 else 1)
    held, local = to_local(e, target, digits)
    held = e.add(aten.logical_and.default, held, e.add(aten.ne.Scalar, target, ignore))
    local = e.add(aten.masked_fill.Scalar, local, e.add(aten.logical_not.default, held), IGNORED)
    wrong, total = _wrong(e, target, digits)
    wrong = e.add(aten.logical_and.default, wrong, e.add(aten.ne.Scalar, target, ignore))
    local = e.add(aten.masked_fill.Scalar, local, wrong, total)
    return e.same(target=e.add(aten.contiguous.default, local), ignore_index=IGNORED)


LOCALISERS: dict[Any, Localiser] = {
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.gather.default: _gather,
    aten.index_select.default: _index_select,
    **dict.fromkeys(
        (aten.scatter_add.default, aten.index_add.default, aten.index_put.default, aten._unsafe_index_put.default),
        _shared("self"),
    ),
    **dict.fromkeys(
        (
            aten.nll_loss_forward.default,
            aten.nll_loss_backward.default,
            aten.nll_loss2d_forward.default,
            aten.nll_loss2d_backward.default,
        ),
        _nll,
    ),
}
