"""Rules of ops that move elements without computing: views, permutations, slices, joins, and constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from autopar.costmodel.rules_call import Call, Dims, Maker, names, text, whole, wrap

aten = torch.ops.aten


def view_dims(old: Sequence[int], new: Sequence[int]) -> tuple[Dims, Dims, dict[str, int]]:
    """Dims of a view from `old` to `new`, as compounds of the factors both share, and those sizes no dim tells.

    Both shapes are read as mixed-radix numbers from the left. While the sizes divide each other their common factor is
    a loop of both. Where they do not, the greatest common divisor still is, and the rest, up to the next place where
    the products meet, is never split.

    >>> view_dims((2, 3, 8), (6, 2, 4))
    (['a', 'b', '(c d)'], ['(a b)', 'c', 'd'], {})
    """
    if math.prod(old) == 0:
        return whole(old, "x"), whole(new, "y"), {}
    sizes: dict[str, int] = {}
    rest = False
    sides: tuple[list[list[str]], list[list[str]]] = ([[] for _ in old], [[] for _ in new])
    fresh = iter([f"{c}{i or ''}" for i in range(9) for c in "abcdefghijklmnopqrstuvwxyz"])

    def put(side: int, dim: int, size: int) -> None:
        name = next(fresh)
        sizes[name] = size
        sides[side][dim].append(f"{name}^")

    i = j = 0
    left = right = 1
    while True:
        while i < len(old) and left == 1:
            left, i = old[i], i + 1
        while j < len(new) and right == 1:
            right, j = new[j], j + 1
        if left == right == 1:
            break
        common = math.gcd(left, right)
        if common > 1:
            name = next(fresh)
            sizes[name] = common
            sides[0][i - 1].append(name)
            sides[1][j - 1].append(name)
            left, right = left // common, right // common
        if left != 1 and right != 1:
            # Neither divides the other: swallow dims until the products meet again.
            rest = True
            totals, at, shapes = [left, right], [i, j], (old, new)
            put(0, i - 1, left)
            put(1, j - 1, right)
            while totals[0] != totals[1]:
                side = 0 if totals[0] < totals[1] else 1
                size = shapes[side][at[side]]
                if size != 1:
                    put(side, at[side], size)
                totals[side] *= size
                at[side] += 1
            i, j = at
            left = right = 1
    dims = [[compound(d) for d in side] for side in sides]
    return dims[0], dims[1], sizes if rest else {}


def compound(factors: Sequence[str]) -> str:
    """One dim from its factors, outermost first."""
    return "1" if not factors else factors[0] if len(factors) == 1 else f"({' '.join(factors)})"


def view(call: Call) -> str:
    """view, reshape, squeeze, unsqueeze: only the shapes matter."""
    old, new, sizes = view_dims(call.ins[0], call.out)
    return text([old], [new], call.linear((0,)), sizes=sizes)


def permute(call: Call) -> str:
    """permute, transpose, t: which dim goes where is read from the arguments."""
    rank = len(call.ins[0])
    if call.target is aten.permute.default:
        order = [wrap(d, rank) for d in call.arg("dims")]
    else:
        a, b = (0, rank - 1) if call.target is aten.t.default else (call.dim("dim0"), call.dim("dim1"))
        order = list(range(rank))
        if rank:
            order[a], order[b] = order[b], order[a]
    dims = names(rank)
    return text([dims], [[dims[d] for d in order]], call.linear((0,)))


def expand(call: Call) -> str:
    """A dim of size one, or one that is not there, becomes a loop of the result only."""
    out = names(len(call.out))
    lead = len(call.out) - len(call.ins[0])
    ins = ["1" if n == 1 else out[lead + i] for i, n in enumerate(call.ins[0])]
    return text([ins], [["1" if n == 1 else d for d, n in zip(out, call.out)]], call.linear((0,)))


def repeat(call: Call) -> str:
    """Each dim of the result is (times, old)."""
    out = names(len(call.out))
    lead = len(call.out) - len(call.ins[0])
    dims = []
    for i, d in enumerate(out):
        times = call.arg("repeats")[i]
        dims.append(compound([f"r{i}"] * (times != 1) + [d] * (i >= lead)))
    return text([out[lead:]], [dims], call.linear((0,)))


def window(whole_size: int, pieces: Sequence[tuple[int, int]]) -> tuple[str, list[str], dict[str, int]]:
    """Dims of a tensor in which pieces (offset, length) lie, `(z^ y)`, of the pieces, `(m^ y)` each, and the size of y.

    y is the block size that offsets and lengths share: shards of y see every piece in proportion.
    """
    block = math.gcd(whole_size, *(n for piece in pieces for n in piece))
    if block == 0:
        return "z^", [f"m{i}^" for i in range(len(pieces))], {}
    inner = [
        compound([f"m{i}^"] * (length != block) + ["y"]) if length else f"m{i}^" for i, (_, length) in enumerate(pieces)
    ]
    told = block == whole_size or any(length == block for _, length in pieces)
    return compound(["z^"] * (block != whole_size) + ["y"]), inner, {} if told else {"y": block}


def slice_range(call: Call, size: int) -> tuple[int, int, int]:
    """(start, end, step) of a slice of a dim of `size`, as PyTorch clamps them."""
    return slice(call.arg("start"), call.arg("end"), call.arg("step")).indices(size)


def slice_(call: Call) -> str:
    """slice.Tensor and, with operand and result exchanged, slice_backward."""
    backward = call.target is aten.slice_backward.default
    small, large = (call.ins[0], call.out) if backward else (call.out, call.ins[0])
    d = wrap(call.arg("dim"), len(large))
    dims = names(len(large))
    start, _, step = slice_range(call, large[d])
    outer, inner, sizes = window(large[d], [(start, small[d])]) if step == 1 else ("z^", ["m0^"], {})
    big, little = list(dims), list(dims)
    big[d], little[d] = outer, inner[0]
    return text([little if backward else big], [big if backward else little], call.linear((0,)), sizes=sizes)


def slice_scatter(call: Call) -> str:
    """slice_scatter, select_scatter: a tensor and what overwrites a part of it; linear in both together."""
    shape = call.ins[0]
    d, dims = call.dim(), names(len(shape))
    if call.target is aten.select_scatter.default:
        base = [n + "^" * (i == d) for i, n in enumerate(dims)]
        return text([base, dims[:d] + dims[d + 1 :]], [base], call.linear((0, 1)))
    start, _, step = slice_range(call, shape[d])
    outer, inner, sizes = window(shape[d], [(start, call.ins[1][d])]) if step == 1 else ("z^", ["m0^"], {})
    base = [outer if i == d else n for i, n in enumerate(dims)]
    part = [inner[0] if i == d else n for i, n in enumerate(dims)]
    return text([base, part], [base], call.linear((0, 1)), sizes=sizes)


def glu(call: Call) -> str:
    """glu and its backward: one dim is (two halves, rest); the rest splits."""
    own = call.at("self") or 0
    rank = len(call.ins[own])
    d, dims = wrap(call.arg("dim"), rank), names(rank)
    big = [f"(z^ {n})" if i == d else n for i, n in enumerate(dims)]
    if call.target is aten.glu.default:
        return text([big], [dims])
    return text([dims, big], [big], call.linear((0,)))


def pixel_shuffle(call: Call) -> str:
    """pixel_shuffle: channels (c r r) go into space, whose order would change; unshuffle is the reverse."""
    down = call.target is aten.pixel_unshuffle.default
    lead = names(len(call.out) - 3)
    many, few = [*lead, "(c u^ v^)", "h^", "w^"], [*lead, "c", "y^", "x^"]
    factor = call.arg("downscale_factor" if down else "upscale_factor")
    return text([few if down else many], [many if down else few], call.linear((0,)), sizes={"u": factor, "v": factor})


def pad(call: Call) -> str:
    """constant_pad_nd: a padded dim keeps the block that its size and the pads share."""
    pads, dims = call.arg("pad"), names(len(call.ins[0]))
    ins, outs = list(dims), list(dims)
    sizes: dict[str, int] = {}
    for i in range(len(pads) // 2):
        d = len(dims) - 1 - i
        left, right = pads[2 * i], pads[2 * i + 1]
        if left or right:
            n = call.ins[0][d]
            block = math.gcd(n, left, right) if left >= 0 and right >= 0 and n else 1
            ins[d] = compound([f"x{d}^"] * (block != n) + [dims[d]] * (block > 1))
            outs[d] = compound([f"z{d}^"] + [dims[d]] * (block > 1))
            if 1 < block:
                sizes[dims[d]] = block
    linear = call.linear((0,)) if call.arg("value") == 0 else []
    return text([ins], [outs], linear, sizes=sizes)


def cat(call: Call) -> str:
    """Pieces along a dim: shards of the block they share hold their part of every piece."""
    rank = len(call.out)
    d = wrap(call.arg("dim"), rank)
    used = [i for i, s in enumerate(call.ins) if len(s) == rank and not (s == (0,) and rank > 1)]
    offsets = [sum(call.ins[j][d] for j in used[:k]) for k in range(len(used))]
    outer, inner, block = window(call.out[d], [(o, call.ins[i][d]) for o, i in zip(offsets, used)])
    dims = names(rank)
    ins = [whole(s, f"e{i}_") for i, s in enumerate(call.ins)]
    for k, i in enumerate(used):
        ins[i] = [inner[k] if j == d else n for j, n in enumerate(dims)]
    out = [outer if j == d else n for j, n in enumerate(dims)]
    return text(ins, [out], call.linear(tuple(range(len(call.ins)))), sizes=block)


def split(call: Call) -> str:
    """split, split_with_sizes, chunk: the mirror of cat."""
    shape = call.ins[0]
    d = call.dim()
    sizes = [s[d] for s in call.outs if s is not None]
    offsets = [sum(sizes[:k]) for k in range(len(sizes))]
    outer, inner, block = window(shape[d], list(zip(offsets, sizes)))
    dims = names(len(shape))
    ins = [outer if j == d else n for j, n in enumerate(dims)]
    outs = [[piece if j == d else n for j, n in enumerate(dims)] for piece in inner]
    return text([ins], outs, call.linear((0,)), sizes=block)


def stack(call: Call) -> str:
    """A new dim that is never split."""
    d = wrap(call.arg("dim"), len(call.out))
    dims = names(len(call.out))
    return text(
        [dims[:d] + dims[d + 1 :]] * len(call.ins),
        [dims[:d] + [dims[d] + "^"] + dims[d + 1 :]],
        call.linear(tuple(range(len(call.ins)))),
    )


def unbind(call: Call) -> str:
    """One dim goes."""
    d = call.dim()
    dims = names(len(call.ins[0]))
    rest = dims[:d] + dims[d + 1 :]
    return text([dims[:d] + [dims[d] + "^"] + dims[d + 1 :]], [rest] * len(call.outs), call.linear((0,)))


def select_backward(call: Call) -> str:
    """The dim that select took comes back, zero but in one place."""
    d = wrap(call.arg("dim"), len(call.out))
    dims = names(len(call.out))
    return text([dims[:d] + dims[d + 1 :]], [dims[:d] + [dims[d] + "^"] + dims[d + 1 :]], call.linear((0,)))


def whole_dims(*arguments: str, linear: bool = True) -> Maker:
    """Same shape in and out; the dims an argument names stay whole (flip, roll, cumsum)."""

    def maker(call: Call) -> str:
        fixed = set().union(*(call.dims(a) for a in arguments))
        dims = [n + "^" * (i in fixed) for i, n in enumerate(names(len(call.ins[0])))]
        return text([dims], [dims] * len(call.outs), call.linear((0,)) if linear else [])

    return maker


def last_whole(count: int) -> Maker:
    """Same shape in and out; the last `count` dims stay whole (tril, triu)."""

    def maker(call: Call) -> str:
        rank = len(call.ins[0])
        dims = [n + "^" * (i >= rank - count) for i, n in enumerate(names(rank))]
        return text([dims], [dims], call.linear((0,)))

    return maker


def constant(call: Call) -> str:
    """full, zeros, new_ones ...: any piece is made on the spot; an operand only lends dtype and device."""
    dims = names(len(call.out))
    same = [s == call.out for s in call.ins]
    return text([dims if like else whole(s, f"x{i}_") for i, (like, s) in enumerate(zip(same, call.ins))], [dims])


def ranged(call: Call) -> str:
    """arange, linspace, eye: every element knows its global place, so nothing is split."""
    return text([], [[n + "^" for n in names(len(call.out))]])


def diagonal(call: Call) -> str:
    """The two dims of the diagonal are whole; it comes last."""
    rank = len(call.ins[0])
    taken = {call.dim("dim1"), call.dim("dim2")}
    dims = names(rank)
    ins = [n + "^" * (i in taken) for i, n in enumerate(dims)]
    return text([ins], [[n for i, n in enumerate(dims) if i not in taken] + ["diag^"]], call.linear((0,)))


def unfold(call: Call) -> str:
    """Tensor.unfold: windows along one dim, which stays whole."""
    d = call.dim("dimension")
    dims = names(len(call.ins[0]))
    ins, outs = list(dims), list(dims)
    ins[d], outs[d] = "x^", "y^"
    return text([ins], [outs + ["z^"]], call.linear((0,)))


TABLE: dict[Any, Maker | str] = {
    **dict.fromkeys(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten.reshape.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        view,
    ),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), permute),
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    **dict.fromkeys((aten.slice.Tensor, aten.slice_backward.default), slice_),
    **dict.fromkeys((aten.slice_scatter.default, aten.select_scatter.default), slice_scatter),
    **dict.fromkeys((aten.glu.default, aten.glu_backward.default), glu),
    **dict.fromkeys((aten.pixel_shuffle.default, aten.pixel_unshuffle.default), pixel_shuffle),
    aten.select.int: unbind,
    aten.select_backward.default: select_backward,
    aten.constant_pad_nd.default: pad,
    aten.cat.default: cat,
    aten.stack.default: stack,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), split),
    aten.unbind.int: unbind,
    **dict.fromkeys((aten.flip.default, aten.roll.default), whole_dims("dims")),
    aten.cumsum.default: whole_dims("dim"),
    **dict.fromkeys(
        (aten.cumprod.default, aten.logcumsumexp.default, aten.cummax.default, aten.cummin.default),
        whole_dims("dim", linear=False),
    ),
    **dict.fromkeys((aten.tril.default, aten.triu.default), last_whole(2)),
    aten.diagonal.default: diagonal,
    aten.unfold.default: unfold,
    **dict.fromkeys(
        (
            aten.full.default,
            aten.zeros.default,
            aten.ones.default,
            aten.empty.memory_format,
            aten.scalar_tensor.default,
            aten.new_zeros.default,
            aten.new_ones.default,
            aten.new_full.default,
            aten.new_empty.default,
            aten.empty_like.default,
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
        ),
        constant,
    ),
    **dict.fromkeys(
        (
            aten.arange.default,
            aten.arange.start,
            aten.arange.start_step,
            aten.linspace.default,
            aten.eye.default,
            aten.eye.m,
        ),
        ranged,
    ),
}
