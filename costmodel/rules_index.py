"""Rules of ops that read or write by index. Indices are global: where an indexed dim is split, the local op masks."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from autopar.costmodel.rules_call import Call, Dims, Maker, Operand, floats, names, replicated, text, whole

aten = torch.ops.aten


def gather(call: Call) -> str:
    """gather: shards of the gathered dim answer for the indices they hold, zero elsewhere: a partial sum."""
    rank = len(call.ins[0])
    if rank == 0:
        return replicated(call)
    d = call.dim()
    source, index = names(rank), names(rank)
    for i in range(rank):
        if i == d:
            source[i] = "v+" if floats(call.dtypes[0]) else "v^"
        elif call.ins[0][i] != call.ins[1][i]:
            source[i], index[i] = f"x{i}^", f"y{i}^"
    return text([source, index], [index], call.linear((0,)))


def scatter(call: Call) -> str:
    """scatter.src, .value, scatter_add, scatter_reduce: dims that index and tensor share are split.

    scatter_add may also split the scattered positions: each shard then adds its part to its share of `self`.
    """
    rank = len(call.ins[0])
    if rank == 0:
        return replicated(call)
    d = call.dim()
    adds = call.target is aten.scatter_add.default
    base, index, src = names(rank), names(rank), names(rank)
    at = call.at("src")
    given = call.ins[at] if at is not None else call.ins[1]
    for i in range(rank):
        if i == d:
            base[i], index[i] = "v^", "k+" if adds and floats(call.dtypes[0]) else "k^"
            src[i] = index[i] if given[i] == call.ins[1][i] else "s^"
            if src[i] == "s^":
                index[i] = "k^"
        elif not call.ins[0][i] == call.ins[1][i] == given[i]:
            base[i], index[i], src[i] = f"x{i}^", f"y{i}^", f"z{i}^"
    if at is not None:
        linear = call.linear((0, at)) if call.target is not aten.scatter_reduce.two else []
        return text([base, index, src], [base], linear)
    zero = call.target is aten.scatter.value and call.arg("value") == 0
    return text([base, index], [base], call.linear((0,)) if zero else [])


def _indexed(call: Call, rank: int) -> tuple[list[int], list[int], int, bool]:
    """(indexed dims, operand numbers of their indices, where the index dims lie in the result, no index is a mask)."""
    entries = call.arg("indices")
    dims = [d for d, e in enumerate(entries) if isinstance(e, Operand)]
    numbers = [e.number for e in entries if isinstance(e, Operand)]
    adjacent = all(b == a + 1 for a, b in itertools.pairwise(dims))
    integers = all(call.dtypes[n] not in (torch.bool, torch.uint8) for n in numbers)
    return dims, numbers, dims[0] if adjacent and dims else 0, integers


def _index_dims(call: Call, rank: int) -> tuple[Dims, list[Dims], Dims, int]:
    """Dims of the tensor indexed, of each index, and of the result; and how many dims the indices broadcast to."""
    dims, numbers, place, _ = _indexed(call, rank)
    shape = torch.broadcast_shapes(*(call.ins[n] for n in numbers))
    own = names(rank)
    source = [f"v{i}^" if i in dims else n for i, n in enumerate(own)]
    loops = [f"k{i}" for i in range(len(shape))]
    indices = []
    for n in numbers:
        lead = len(shape) - len(call.ins[n])
        indices.append(["1" if s == 1 else loops[lead + i] for i, s in enumerate(call.ins[n])])
    rest = [n for i, n in enumerate(own) if i not in dims]
    result = rest[:place] + ["1" if s == 1 else k for k, s in zip(loops, shape)] + rest[place:]
    return source, indices, result, len(shape)


def index(call: Call) -> str:
    """index.Tensor: the values index globally, so indexed dims are whole; index shapes and the other dims split."""
    rank = len(call.ins[0])
    dims, numbers, _, integers = _indexed(call, rank)
    if not integers or not dims:
        return replicated(call)
    source, indices, result, _ = _index_dims(call, rank)
    ins: list[Dims] = [source] + [[]] * (len(call.ins) - 1)
    for n, i in zip(numbers, indices):
        ins[n] = i
    return text(ins, [result], call.linear((0,)))


def index_put(call: Call) -> str:
    """index_put: as index, reversed. Accumulating, shards of the positions each add to their share of `self`."""
    rank = len(call.ins[0])
    dims, numbers, _, integers = _indexed(call, rank)
    if not integers or not dims:
        return replicated(call)
    source, indices, window, _ = _index_dims(call, rank)
    sums = bool(call.arg("accumulate")) and floats(call.dtypes[0])
    mark = "+" if sums else "^"

    def marked(dims_: Dims) -> Dims:
        return [n + mark if n.startswith("k") and n[1:].isdigit() else n for n in dims_]

    at = call.at("values")
    assert at is not None
    lead = len(window) - len(call.ins[at])
    values = ["1" if s == 1 else window[lead + i] for i, s in enumerate(call.ins[at])]
    ins: list[Dims] = [source] + [[]] * (len(call.ins) - 1)
    for n, i in zip(numbers, indices):
        ins[n] = marked(i)
    ins[at] = marked(values)
    return text(ins, [source], call.linear((0, at)) if sums else [])


def index_select(call: Call) -> str:
    """index_select: as gather with one index for all rows."""
    rank = len(call.ins[0])
    if rank == 0 or len(call.ins[1]) == 0:
        return replicated(call)
    d = call.dim()
    dims = names(rank)
    source = [("v+" if floats(call.dtypes[0]) else "v^") if i == d else n for i, n in enumerate(dims)]
    return text([source, ["k"]], [["k" if i == d else n for i, n in enumerate(dims)]], call.linear((0,)))


def index_add(call: Call) -> str:
    """index_add: shards of the added rows each add to their share of `self`."""
    rank = len(call.ins[0])
    if rank == 0 or len(call.ins[1]) == 0:
        return replicated(call)
    d = call.dim()
    dims = names(rank)
    k = "k+" if floats(call.dtypes[0]) else "k^"
    base = ["v^" if i == d else n for i, n in enumerate(dims)]
    source = [k if i == d else n for i, n in enumerate(dims)]
    return text([base, [k], source], [base], call.linear((0, 2)))


def embedding(call: Call) -> str:
    """embedding: a shard of the vocabulary looks up what it holds, zero elsewhere: a partial sum."""
    dims = names(len(call.ins[1]))
    return text([["v+", "z"], dims], [[*dims, "z"]], call.linear((0,)))


def embedding_backward(call: Call) -> str:
    """embedding_dense_backward: positions add up; a shard of the vocabulary keeps its own rows.

    Scaled by frequency it needs all positions: they stay whole.
    """
    mark = "^" if call.arg("scale_grad_by_freq") else "+"
    dims = [n + mark for n in names(len(call.ins[1]))]
    vocab = "v^" if call.arg("scale_grad_by_freq") else "v"
    return text([[*dims, "z"], dims], [[vocab, "z"]], call.linear((0,)))


def _take_whole(call: Call) -> str:
    return text([whole(s, f"x{i}_") for i, s in enumerate(call.ins)], [whole(call.out, "y")], call.linear((0,)))


TABLE: dict[Any, Maker | str] = {
    aten.gather.default: gather,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two), scatter),
    **dict.fromkeys((aten.index.Tensor, aten._unsafe_index.Tensor), index),
    **dict.fromkeys((aten.index_put.default, aten._unsafe_index_put.default), index_put),
    aten.index_select.default: index_select,
    aten.index_add.default: index_add,
    aten.embedding.default: embedding,
    aten.embedding_dense_backward.default: embedding_backward,
    aten.take.default: _take_whole,
}
