"""Rules of arithmetic: pointwise ops with broadcasting, reductions, products, transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from autopar.costmodel.rules_call import Call, Dims, Maker, names, replicated, text, whole, wrap
from autopar.precision import ADDED, FULL

aten = torch.ops.aten


def broadcast(call: Call) -> tuple[list[Dims], list[Dims]]:
    """Dims of operands that broadcast against the result, aligned from the right."""
    return broadcast_to(call, call.out)


def broadcast_to(call: Call, full: Sequence[int]) -> tuple[list[Dims], list[Dims]]:
    """Dims of operands that broadcast against `full`; and those of `full` for each result."""
    out = names(len(full))

    def operand(shape: Sequence[int]) -> Dims:
        lead = len(out) - len(shape)
        return ["1" if n == 1 else out[lead + i] for i, n in enumerate(shape)]

    return [operand(s) for s in call.ins], [operand(full)] * len(call.outs)


def pointwise(*groups: Sequence[int]) -> Maker:
    """Element by element with broadcasting; linear in each group of operand numbers."""

    def maker(call: Call) -> str:
        ins, outs = broadcast(call)
        return text(ins, outs, call.linear(*groups))

    return maker


def add(call: Call) -> str:
    """add, sub: linear in both tensors together; with a scalar it is affine, so in nothing."""
    ins, outs = broadcast(call)
    return text(ins, outs, call.linear((0, 1)) if len(ins) == 2 else [])


def div(call: Call) -> str:
    """div: linear in the numerator unless it rounds."""
    ins, outs = broadcast(call)
    return text(ins, outs, call.linear((call.at("self"),)) if call.named.get("rounding_mode") is None else [])


def where(call: Call) -> str:
    """where: jointly linear in its branches; a branch that is a scalar must be zero."""
    ins, outs = broadcast(call)
    branches = [call.at("self"), call.at("other")]
    tensors = [b for b in branches if b is not None]
    scalars = [call.arg(n) for n, b in zip(("self", "other"), branches) if b is None]
    return text(ins, outs, call.linear(tensors) if not any(scalars) else [])


def masked_fill(call: Call) -> str:
    """masked_fill: with zero it is a product with a mask; a value tensor is a second branch."""
    ins, outs = broadcast(call)
    value = call.at("value")
    if value is not None:
        return text(ins, outs, call.linear((0, value)))
    return text(ins, outs, call.linear((0,)) if call.arg("value") == 0 else [])


def ternary_product(call: Call) -> str:
    """addcmul (a + v b c) and addcdiv (a + v b / c): a with b, and for addcmul a with c."""
    ins, outs = broadcast(call)
    groups = [(0, 1)] + [(0, 2)] * (call.target is aten.addcmul.default)
    return text(ins, outs, call.linear(*groups))


def to_copy(call: Call) -> str:
    """_to_copy: linear only between floats (a partial sum must not be cut to integers).

    The cast of a gradient that is to be added up in low precision takes no partial sums: they come to it added up.
    """
    ins, outs = broadcast(call)
    same = call.dtypes[0].is_complex <= (call.out_dtypes[0] or call.dtypes[0]).is_complex
    same = same and call.node.meta.get(ADDED, FULL) == FULL
    return text(ins, outs, call.linear((0,)) if same else [])


def fill(call: Call) -> str:
    """copy, fill: only the shape of the first operand matters; linear in what is written."""
    ins, outs = broadcast(call)
    return text(ins, outs, call.linear((1,)) if len(ins) == 2 else [])


def loss(call: Call) -> str:
    """Losses element by element: partial where summed; where averaged, the local op scales by the global count."""
    ins, _ = broadcast_to(call, call.ins[0])
    linear = call.linear((call.at("weight"),))
    if call.arg("reduction") == 0:
        return text(ins, [ins[0]], linear)
    return text([[d if d == "1" else d + "+" for d in dims] for dims in ins], [[]], linear)


def loss_backward(call: Call) -> str:
    """Their backwards: linear in the gradient, which is a scalar where the loss was reduced."""
    ins, outs = broadcast(call)
    return text(ins, outs, call.linear((0,), (call.at("weight"),)))


def bucketize(call: Call) -> str:
    """bucketize: the boundaries are whole."""
    dims = names(len(call.ins[0]))
    return text([dims, ["z^"]], [dims])


def reduction(plus: bool, kind: str = "sum", linear: bool = False) -> Maker:
    """sum, amax, mean: reduced dims give partial results (`plus`), or stay whole."""

    def maker(call: Call) -> str:
        return reduced(call, plus, kind, linear)

    return maker


def reduced(call: Call, plus: bool, kind: str = "sum", linear: bool = False) -> str:
    """The rule of a reduction over the argument `dim` (all dims if it has none)."""
    gone = call.dims()
    keep = bool(call.named.get("keepdim", False))
    all_dims = names(len(call.ins[0]))
    mark = "+" if plus else "^"
    ins = [n + mark * (i in gone) for i, n in enumerate(all_dims)]
    out = ["1" if i in gone else n for i, n in enumerate(all_dims) if keep or i not in gone]
    return text([ins], [out] * len(call.outs), call.linear((0,)) if linear else [], reduce=kind)


def extremum(kind: str) -> Maker:
    """amax, amin: partial by maximum or minimum; booleans have none that can be communicated."""

    def maker(call: Call) -> str:
        return reduced(call, call.dtypes[0] != torch.bool, kind)

    return maker


def vector_norm(call: Call) -> str:
    """linalg_vector_norm: orders 1 and infinity combine; others would need roots of sums."""
    order = float(call.arg("ord"))
    if order == 1:
        return reduced(call, True)
    return reduced(call, math.isinf(order), "min" if order < 0 else "max")


def softmax(call: Call) -> str:
    """Softmax family: shards of the softmax dim exchange the row maximum and the row sum."""
    d = call.dim()
    dims = [n + "*" * (i == d) for i, n in enumerate(names(len(call.ins[0])))]
    backward = len(call.ins) == 2
    return text([dims] * len(call.ins), [dims], call.linear((0,)) if backward else [])


def safe_softmax(call: Call) -> str:
    """_safe_softmax: rows may be empty; the softmax dim stays whole."""
    d = call.dim()
    dims = [n + "^" * (i == d) for i, n in enumerate(names(len(call.ins[0])))]
    return text([dims], [dims])


def logsumexp(call: Call) -> str:
    """logsumexp: as softmax, for one dim; more dims stay whole."""
    gone, keep = call.dims(), bool(call.named.get("keepdim", False))
    mark = "*" if len(gone) == 1 else "^"
    dims = names(len(call.ins[0]))
    ins = [n + mark * (i in gone) for i, n in enumerate(dims)]
    return text([ins], [["1" if i in gone else n for i, n in enumerate(dims) if keep or i not in gone]])


def ordered(call: Call) -> str:
    """topk, sort, kthvalue, median: along one dim, which stays whole; its size may change or go."""
    d = call.dim() if len(call.ins[0]) else 0
    dims = names(len(call.ins[0]))
    keep = call.outs[0] is not None and len(call.out) == len(dims)
    ins = [n + "^" * (i == d) for i, n in enumerate(dims)]
    one = bool(dims) and keep and call.out[d] == 1
    out = [("1" if one else "y^") if i == d else n for i, n in enumerate(dims) if keep or i != d]
    return text([ins], [out] * len(call.outs))


def addmm(call: Call) -> str:
    """addmm, baddbmm: the local op scales the added term by 1 / shards where k is split."""
    batched = call.target is aten.baddbmm.default
    lead = ["b"] * batched
    out = [*lead, "i", "j"]
    bias = ["1" if n == 1 else d for n, d in zip(call.ins[0], out[3 - len(call.ins[0]) - (not batched) :])]
    return text([bias, [*lead, "i", "k+"], [*lead, "k+", "j"]], [out], call.linear((0, 1), (0, 2)))


def grouped_mm(call: Call) -> str:
    """_grouped_mm: the grouped dim is cut at run-time offsets, so it and the experts stay whole."""
    if call.at("bias") is not None:
        return replicated(call)
    # Kernels want rows that are a multiple of 16 bytes long: blocks of that size stay whole.
    block = 16 // call.dtypes[0].itemsize
    shapes = (*call.ins[0], *call.ins[1])
    if any(n % block for n in shapes[-2:] + (call.ins[0][-1],)):
        return replicated(call)
    k, n, m = "(k+ u^)", "(n w^)", "(m q^)"
    ranks = (len(call.ins[0]), len(call.ins[1]))
    ins: list[Dims]
    ins, out = {
        (2, 3): ([["t^", k], ["e^", k, n]], ["t^", n]),
        (3, 2): ([["e^", m, k], [k, "t^"]], [m, "t^"]),
        (2, 2): ([[m, "k^"], ["k^", n]], ["e^", m, n]),
        (3, 3): ([["e", m, k], ["e", k, n]], ["e", m, n]),
    }[ranks]
    used = " ".join(d for dims in ins for d in dims)
    sizes = {f: block for f in "uwq" if f"{f}^" in used}
    extra = [["e^"]] if call.at("offs") is not None else []
    return text(ins + extra, [out], call.linear((0,), (1,)), sizes=sizes)


def view_as_complex(call: Call) -> str:
    """view_as_complex, view_as_real: the pair of real and imaginary part stays whole."""
    long, short = sorted((call.ins[0], call.out), key=len, reverse=True)
    dims = names(len(short))
    pair = [*dims, "p^"]
    real_in = len(call.ins[0]) == len(long)
    return text([pair if real_in else dims], [dims if real_in else pair], call.linear((0,)))


def fft(call: Call) -> str:
    """_fft_*: transformed dims stay whole."""
    gone = {wrap(d, len(call.ins[0])) for d in call.arg("dim")}
    dims = names(len(call.ins[0]))
    return text(
        [[f"{n}^" if i in gone else n for i, n in enumerate(dims)]],
        [[f"y{i}^" if i in gone else n for i, n in enumerate(dims)]],
        call.linear((0,)),
    )


def histc(call: Call) -> str:
    """histc, bincount: counts of pieces add up if the bins do not depend on the data."""
    if call.target is aten.bincount.default:
        return text([whole(s, f"x{i}_") for i, s in enumerate(call.ins)], [whole(call.out, "y")])
    mark = "+" if call.arg("min") != call.arg("max") else "^"
    return text([[n + mark for n in names(len(call.ins[0]))]], [["z^"]])


def _ops(text_: str) -> list[Any]:
    return [getattr(getattr(aten, n.partition(".")[0]), n.partition(".")[2] or "default") for n in text_.split()]


def _each(names_: str, maker: Maker | str) -> dict[Any, Maker | str]:
    return dict.fromkeys(_ops(names_), maker)


TABLE: dict[Any, Maker | str] = {
    # Nonlinear in everything.
    **_each(
        "abs acos acosh asin asinh atan atanh ceil clamp clamp.Tensor clamp_max clamp_max.Tensor clamp_min "
        "clamp_min.Tensor cos cosh digamma elu erf erfc erfinv exp exp2 expm1 floor frac gelu hardsigmoid hardswish "
        "hardtanh isfinite isinf isnan leaky_relu lgamma log log10 log1p log2 logit mish reciprocal relu round "
        "rsqrt sigmoid sign silu sin sinh softplus sqrt tan tanh trunc atan2 fmod.Scalar fmod.Tensor hypot "
        "logaddexp maximum minimum fmax fmin pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar remainder.Scalar "
        "remainder.Tensor floor_divide floor_divide.Scalar copysign.Tensor nan_to_num angle sgn "
        "log_sigmoid_forward celu square selu isposinf isneginf logaddexp2 heaviside threshold",
        pointwise(),
    ),
    **_each(
        "eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor gt.Scalar gt.Tensor "
        "ge.Scalar ge.Tensor logical_and logical_or logical_xor logical_not bitwise_and.Tensor bitwise_and.Scalar "
        "bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor bitwise_xor.Scalar bitwise_not "
        "bitwise_left_shift.Tensor bitwise_right_shift.Tensor __rshift__.Scalar __lshift__.Scalar",
        pointwise(),
    ),
    # Linear in the first operand: scalings, and backwards in the gradient.
    **_each(
        "neg clone alias detach lift_fresh_copy mul.Scalar div.Scalar real imag _conj _conj_physical conj_physical",
        pointwise((0,)),
    ),
    **_each(
        "gelu_backward silu_backward threshold_backward tanh_backward sigmoid_backward elu_backward "
        "hardtanh_backward leaky_relu_backward hardswish_backward hardsigmoid_backward softplus_backward "
        "mish_backward log_sigmoid_backward native_dropout_backward logit_backward",
        pointwise((0,)),
    ),
    **_each("add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor", add),
    **_each("mul.Tensor", pointwise((0,), (1,))),
    **_each("div.Tensor div.Tensor_mode div.Scalar_mode", div),
    **_each("where.self where.ScalarSelf where.ScalarOther", where),
    **_each("masked_fill.Scalar masked_fill.Tensor", masked_fill),
    **_each("addcmul addcdiv", ternary_product),
    **_each("lerp.Scalar", pointwise((0, 1))),
    **_each("lerp.Tensor", pointwise((0, 1))),
    **_each("complex", pointwise((0, 1))),
    **_each("polar", pointwise((0,))),
    **_each("_to_copy", to_copy),
    **_each("copy fill.Tensor fill.Scalar", fill),
    **_each("binary_cross_entropy mse_loss smooth_l1_loss huber_loss soft_margin_loss", loss),
    **_each(
        "binary_cross_entropy_backward mse_loss_backward smooth_l1_loss_backward huber_loss_backward "
        "soft_margin_loss_backward",
        loss_backward,
    ),
    **_each("bucketize.Tensor", bucketize),
    **_each("_prelu_kernel", pointwise()),
    **_each("_prelu_kernel_backward xlogy.Tensor", pointwise((0,))),
    **_each("sum sum.dim_IntList count_nonzero.dim_IntList", reduction(True, linear=True)),
    **_each("mean mean.dim", reduction(False, linear=True)),
    **_each(
        "var.correction std.correction var_mean.correction std_mean.correction prod prod.dim_int any any.dim "
        "any.dims all all.dim all.dims argmax argmin max.dim min.dim",
        reduction(False),
    ),
    **_each("amax max", extremum("max")),
    **_each("amin min", extremum("min")),
    **_each("linalg_vector_norm", vector_norm),
    **_each("_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data", softmax),
    **_each("_safe_softmax", safe_softmax),
    **_each("logsumexp", logsumexp),
    **_each("topk sort sort.stable kthvalue median.dim mode", ordered),
    aten.mm.default: "i k+, k+ j -> i j ; linear 0 | 1",
    aten.bmm.default: "b i k+, b k+ j -> b i j ; linear 0 | 1",
    aten.mv.default: "i k+, k+ -> i ; linear 0 | 1",
    aten.dot.default: "k+, k+ -> ; linear 0 | 1",
    **_each("addmm baddbmm", addmm),
    **_each("_grouped_mm", grouped_mm),
    **_each("view_as_complex view_as_real", view_as_complex),
    **_each("_fft_r2c _fft_c2r _fft_c2c", fft),
    **_each("histc bincount", histc),
}
