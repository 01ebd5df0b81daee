"""Calls for the truth machine: at least one of every op of the table.

`HAND` is written out, by family. Pointwise ops need no more than their schema: `automatic` makes their operands.
Values are small integers in float64 where the op allows (so that nothing is lost in sums), never zero, positive or
in a range where the op's domain asks for it; labels contain ignored ones, indices repeat."""

from __future__ import annotations

from typing import Any

import torch

from tests.truth import Case

aten = torch.ops.aten
_rng = torch.Generator().manual_seed(20240)


def num(*shape: int) -> torch.Tensor:
    """Integers from -8 to 8 without zero, as float64."""
    return torch.randint(1, 9, shape, generator=_rng).double() * (torch.randint(0, 2, shape, generator=_rng) * 2 - 1)


def real(*shape: int) -> torch.Tensor:
    """In (-1.5, 1.5)."""
    return (torch.rand(shape, generator=_rng, dtype=torch.float64) - 0.5) * 3


def unit(*shape: int) -> torch.Tensor:
    """In (0.1, 0.9)."""
    return torch.rand(shape, generator=_rng, dtype=torch.float64) * 0.8 + 0.1


def whole(high: int, *shape: int) -> torch.Tensor:
    """Integers in [0, high)."""
    return torch.randint(0, high, shape, generator=_rng)


def flag(*shape: int) -> torch.Tensor:
    """Booleans."""
    return torch.rand(shape, generator=_rng) < 0.6


def different(*shape: int) -> torch.Tensor:
    """A shuffled range: no two alike, so that an order is unique."""
    count = 1
    for n in shape:
        count *= n
    return torch.randperm(count, generator=_rng).double().reshape(shape) - count // 3 + 0.5


def _shapes() -> list[Case]:
    x = num(4, 8, 12)
    return [
        Case(aten.view.default, (x, [32, 2, 6])),
        Case(aten.view.default, (num(32, 24), [4, 8, 2, 6, 2])),
        Case(aten.view.default, (num(12, 8), [8, 12])),
        Case(aten.view.default, (num(4, 1, 6), [2, 2, 6, 1])),
        Case(aten.view.default, (num(20, 4), [8, 10])),
        Case(aten.view.default, (num(), [1, 1])),
        Case(aten._unsafe_view.default, (x, [4, 96])),
        Case(aten.reshape.default, (x, [-1, 12])),
        Case(aten.squeeze.default, (num(4, 1, 8),)),
        Case(aten.squeeze.dim, (num(4, 1, 2), 1)),
        Case(aten.squeeze.dims, (num(2, 1, 2, 1), [0, 1, 3])),
        Case(aten.unsqueeze.default, (num(4, 8), -1)),
        Case(aten.permute.default, (x, [0, 2, 1])),
        Case(aten.permute.default, (x, [-1, 0, 1])),
        Case(aten.transpose.int, (x, -1, 0)),
        Case(aten.t.default, (num(4, 8),)),
        Case(aten.expand.default, (num(4, 1, 8), [2, 4, 8, -1])),
        Case(aten.expand.default, (num(), [4, 8])),
        Case(aten.repeat.default, (num(4, 8), [2, 1, 4])),
        Case(aten.slice.Tensor, (x, 2, 0, 6)),
        Case(aten.slice.Tensor, (x, 1, 2, -2)),
        Case(aten.slice.Tensor, (x, 1, 0, 9223372036854775807)),
        Case(aten.slice.Tensor, (x, 1, 1, 8, 2)),
        Case(aten.slice.Tensor, (x, 0, 1)),
        Case(aten.slice_backward.default, (num(4, 8, 6), [4, 8, 12], 2, 6, 12, 1)),
        Case(aten.slice_backward.default, (num(4, 4, 12), [4, 8, 12], 1, 0, 8, 2)),
        Case(aten.slice_scatter.default, (x, num(4, 4, 12), 1, 4, 8)),
        Case(aten.slice_scatter.default, (x, num(4, 4, 12), 1, 0, 8, 2)),
        Case(aten.select_scatter.default, (x, num(4, 12), 1, 2)),
        Case(aten.glu.default, (real(4, 8, 6), 1)),
        Case(aten.glu_backward.default, (num(4, 4, 6), real(4, 8, 6), 1)),
        Case(aten.pixel_shuffle.default, (num(2, 16, 2, 2), 2)),
        Case(aten.pixel_unshuffle.default, (num(2, 4, 4, 4), 2)),
        Case(aten.select.int, (x, 1, -1)),
        Case(aten.select_backward.default, (num(4, 12), [4, 8, 12], 1, 3)),
        Case(aten.constant_pad_nd.default, (num(4, 8), [4, 8], 0.0)),
        Case(aten.constant_pad_nd.default, (num(4, 8), [0, 0, 4, 0], 2.0)),
        Case(aten.constant_pad_nd.default, (num(4, 8), [1, -2], 0.0)),
        Case(aten.cat.default, ([x, num(4, 8, 12)], 2)),
        Case(aten.cat.default, ([x, num(4, 8, 4), num(4, 8, 8)], -1)),
        Case(aten.cat.default, ([whole(9, 4), whole(9, 6)],)),
        Case(aten.stack.default, ([num(4, 8), num(4, 8), num(4, 8)], 1)),
        Case(aten.split.Tensor, (x, 4, 2)),
        Case(aten.split.Tensor, (num(4, 10), 4, 1)),
        Case(aten.split_with_sizes.default, (x, [4, 8], 2)),
        Case(aten.unbind.int, (num(3, 4, 8),)),
        Case(aten.flip.default, (x, [1])),
        Case(aten.roll.default, (x, [1, 3], [0, 2])),
        Case(aten.roll.default, (num(4, 8), [3])),
        Case(aten.cumsum.default, (x, 1)),
        Case(aten.cumsum.default, (whole(9, 4, 8), -1)),
        Case(aten.cumprod.default, (real(4, 8), 1)),
        Case(aten.logcumsumexp.default, (real(4, 8), 1)),
        Case(aten.cummax.default, (different(4, 8), 1)),
        Case(aten.cummin.default, (different(4, 8), 1)),
        Case(aten.tril.default, (num(4, 8, 8), -1)),
        Case(aten.triu.default, (num(4, 8, 8), 1)),
        Case(aten.diagonal.default, (num(4, 8, 8), 0, 1, 2)),
        Case(aten.unfold.default, (num(4, 8), 1, 4, 2)),
        Case(aten.full.default, ([4, 8], 2.0)),
        Case(aten.zeros.default, ([4, 8],)),
        Case(aten.ones.default, ([4, 8],)),
        Case(aten.empty.memory_format, ([4, 8],), skip_results=(0,)),
        Case(aten.scalar_tensor.default, (3.0,)),
        Case(aten.new_zeros.default, (num(3), [4, 8])),
        Case(aten.new_ones.default, (num(4, 8), [4, 8])),
        Case(aten.new_full.default, (num(3), [4, 8], 5.0)),
        Case(aten.new_empty.default, (num(3), [4, 8]), skip_results=(0,)),
        Case(aten.empty_like.default, (num(4, 8),), skip_results=(0,)),
        Case(aten.zeros_like.default, (num(4, 8),)),
        Case(aten.ones_like.default, (num(4, 8),)),
        Case(aten.full_like.default, (num(4, 8), 3.0)),
        Case(aten.arange.default, (8,)),
        Case(aten.arange.start, (2, 10)),
        Case(aten.arange.start_step, (0, 16, 2)),
        Case(aten.linspace.default, (0.0, 1.0, 8)),
        Case(aten.eye.default, (8,)),
        Case(aten.eye.m, (4, 8)),
    ]


def _math() -> list[Case]:
    x = num(4, 8, 12)
    cases = [
        Case(aten.add.Tensor, (x, num(12)), {"alpha": 2}),
        Case(aten.add.Tensor, (x, 1.5)),
        Case(aten.add.Tensor, (whole(9, 4, 8), whole(9, 4, 8))),
        Case(aten.mul.Tensor, (x, num(4, 1, 1))),
        Case(aten.mul.Tensor, (x, 0.5)),
        Case(aten.mul.Tensor, (num(4, 8), flag(4, 8))),
        Case(aten.div.Tensor, (x, num(8, 1))),
        Case(aten.div.Tensor, (x, 4.0)),
        Case(aten.div.Tensor_mode, (x, num(4, 8, 12)), {"rounding_mode": "floor"}),
        Case(aten.div.Scalar_mode, (x, 3.0), {"rounding_mode": "trunc"}),
        Case(aten.where.self, (flag(4, 1, 12), x, num(12))),
        Case(aten.where.self, (flag(4, 8), num(4, 8), num())),
        Case(aten.where.ScalarSelf, (flag(4, 8), 0.0, num(4, 8))),
        Case(aten.where.ScalarOther, (flag(4, 8), num(4, 8), 2.0)),
        Case(aten.masked_fill.Scalar, (x, flag(4, 1, 12), 0.0)),
        Case(aten.masked_fill.Scalar, (x, flag(4, 1, 12), -5.0)),
        Case(aten.masked_fill.Tensor, (x, flag(4, 8, 12), num())),
        Case(aten._to_copy.default, (x,), {"dtype": torch.float64}),
        Case(aten._to_copy.default, (x,), {"dtype": torch.int64}),
        Case(aten._to_copy.default, (flag(4, 8),), {"dtype": torch.float64}),
        Case(aten.clone.default, (x,), {"memory_format": torch.contiguous_format}),
        Case(aten.copy.default, (x, num(8, 1))),
        Case(aten.fill.Tensor, (x, num())),
        Case(aten.fill.Scalar, (x, 3.0)),
        Case(aten.bucketize.Tensor, (x, torch.tensor([-3.0, 0.0, 3.0, 5.0], dtype=torch.float64))),
        Case(aten.hardtanh_backward.default, (num(4, 8), real(4, 8), -1.0, 1.0)),
        Case(aten._prelu_kernel.default, (num(4, 8), num(1, 8))),
        Case(aten._prelu_kernel_backward.default, (num(4, 8), num(1, 8), num(4, 8))),
        Case(aten.copysign.Tensor, (num(4, 8), num(4, 1))),
        Case(aten.heaviside.default, (num(4, 8), num(8))),
        Case(aten.floor_divide.Scalar, (num(4, 8), 3.0)),
        Case(aten.pow.Tensor_Scalar, (x, 2)),
        Case(aten.pow.Scalar, (2.0, real(4, 8))),
        Case(aten.lerp.Scalar, (x, num(4, 8, 12), 0.25)),
        Case(aten.polar.default, (num(4, 8), real(4, 8))),
        Case(aten.complex.default, (num(4, 8), num(4, 8))),
        Case(aten.view_as_complex.default, (num(4, 8, 2),)),
        Case(aten.view_as_real.default, (torch.complex(num(4, 8), num(4, 8)),)),
        Case(aten.real.default, (torch.complex(num(4, 8), num(4, 8)),)),
        Case(aten.imag.default, (torch.complex(num(4, 8), num(4, 8)),)),
        *(
            Case(op, (torch.complex(num(4, 8), num(4, 8)),))
            for op in (aten._conj.default, aten._conj_physical.default, aten.conj_physical.default)
        ),
        Case(aten.angle.default, (torch.complex(num(4, 8), num(4, 8)),)),
        Case(aten.sum.default, (x,)),
        Case(aten.sum.default, (flag(4, 8),)),
        Case(aten.sum.dim_IntList, (x, [1, -1])),
        Case(aten.sum.dim_IntList, (x, [0], True)),
        Case(aten.mean.default, (x,)),
        Case(aten.mean.dim, (x, [1], True)),
        *(
            Case(op, (x, [1]), {"keepdim": True})
            for op in (aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction)
        ),
        Case(aten.prod.default, (num(4, 8),)),
        Case(aten.prod.dim_int, (num(4, 8), 1)),
        *(Case(op, (flag(4, 8),)) for op in (aten.any.default, aten.all.default)),
        *(Case(op, (flag(4, 8, 12), 1)) for op in (aten.any.dim, aten.all.dim)),
        *(Case(op, (flag(4, 8, 12), [1, 2])) for op in (aten.any.dims, aten.all.dims)),
        Case(aten.count_nonzero.dim_IntList, (x, [1])),
        *(Case(op, (different(4, 8, 12), 1, True)) for op in (aten.argmax.default, aten.argmin.default)),
        Case(aten.argmax.default, (different(4, 8),)),
        *(Case(op, (different(4, 8, 12), 1)) for op in (aten.max.dim, aten.min.dim)),
        *(Case(op, (different(4, 8, 12), [1])) for op in (aten.amax.default, aten.amin.default)),
        Case(aten.amax.default, (whole(99, 4, 8), [-1], True)),
        *(Case(op, (different(4, 8),)) for op in (aten.max.default, aten.min.default)),
        *(Case(aten.linalg_vector_norm.default, (x, p, [1], True)) for p in (1, 2, float("inf"), float("-inf"))),
        Case(aten._softmax.default, (real(4, 8, 12), -1, False)),
        Case(aten._softmax.default, (real(4, 8).masked_fill(whole(2, 4, 8) > 0, -1e30), 1, False)),
        Case(aten._log_softmax.default, (real(4, 8, 12), 1, False)),
        Case(aten._safe_softmax.default, (real(4, 8), -1)),
        Case(aten._softmax_backward_data.default, (x, torch.softmax(real(4, 8, 12), -1), -1, torch.float64)),
        Case(aten._log_softmax_backward_data.default, (x, torch.log_softmax(real(4, 8, 12), 1), 1, torch.float64)),
        Case(aten.logsumexp.default, (real(4, 8, 12), [-1])),
        Case(aten.logsumexp.default, (real(4, 8, 12), [1, 2], True)),
        Case(aten.topk.default, (different(4, 8, 12), 4, 1)),
        Case(aten.sort.default, (different(4, 8, 12), 1)),
        Case(aten.sort.stable, (whole(5, 4, 8),), {"stable": True, "dim": -1}),
        Case(aten.kthvalue.default, (different(4, 8, 12), 2, 1)),
        Case(aten.median.dim, (different(4, 8, 12), 1, True)),
        Case(aten.mode.default, (whole(3, 4, 8), 1)),
        Case(aten.mm.default, (num(4, 8), num(8, 12))),
        Case(aten.bmm.default, (num(2, 4, 8), num(2, 8, 12))),
        Case(aten.mv.default, (num(4, 8), num(8))),
        Case(aten.dot.default, (num(8), num(8))),
        Case(aten.addmm.default, (num(12), num(4, 8), num(8, 12))),
        Case(aten.addmm.default, (num(4, 12), num(4, 8), num(8, 12)), {"beta": 2, "alpha": 3}),
        Case(aten.baddbmm.default, (num(2, 1, 12), num(2, 4, 8), num(2, 8, 12))),
        Case(aten._fft_r2c.default, (num(4, 8), [1], 0, True), tolerance=1e-8),
        Case(aten._fft_c2c.default, (torch.complex(num(4, 8), num(4, 8)), [1], 0, True), tolerance=1e-8),
        Case(aten._fft_c2r.default, (torch.complex(num(4, 5), num(4, 5)), [1], 2, 8), tolerance=1e-8),
        Case(aten.histc.default, (num(4, 8), 8, -9, 9)),
        Case(aten.histc.default, (num(16), 8)),
        Case(aten.bincount.default, (whole(9, 16), None, 12)),
    ]
    return cases + _grouped()


def _grouped() -> list[Case]:
    def small(*shape: int) -> torch.Tensor:
        return num(*shape).float()

    offs = torch.tensor([8, 16], dtype=torch.int32)
    return [
        Case(aten._grouped_mm.default, (small(16, 32), small(2, 32, 16), offs)),
        Case(aten._grouped_mm.default, (small(2, 16, 32), small(32, 16), offs)),
        Case(aten._grouped_mm.default, (small(16, 16), small(16, 32), offs)),
        Case(aten._grouped_mm.default, (small(2, 16, 32), small(2, 32, 16))),
    ]


def _index() -> list[Case]:
    rows = num(16, 4)
    return [
        Case(aten.gather.default, (num(4, 8), 1, whole(8, 4, 6))),
        Case(aten.gather.default, (num(4, 8), 0, whole(4, 2, 8))),
        Case(aten.gather.default, (whole(9, 4, 8), 1, whole(8, 4, 6))),
        Case(aten.gather.default, (num(4, 8, 4), 1, whole(8, 2, 8, 4))),
        Case(aten.scatter.src, (num(4, 8), 1, torch.stack([torch.randperm(8)[:4] for _ in range(4)]), num(4, 4))),
        Case(aten.scatter.value, (num(4, 8), 1, whole(8, 4, 2), 0)),
        Case(aten.scatter.value, (num(4, 8), 1, whole(8, 4, 2), 3.0)),
        Case(aten.scatter_add.default, (num(4, 8), 1, whole(8, 4, 6), num(4, 6))),
        Case(aten.scatter_add.default, (num(4, 8), 1, whole(8, 2, 6), num(4, 8))),
        Case(aten.scatter_reduce.two, (num(4, 8), 1, whole(8, 4, 6), num(4, 6), "amax")),
        Case(aten.index.Tensor, (num(6, 8, 4), [whole(6, 4, 2)])),
        Case(aten.index.Tensor, (num(6, 8, 4), [None, whole(8, 4)])),
        Case(aten.index.Tensor, (num(6, 8, 4), [whole(6, 4, 1), None, whole(4, 2)])),
        Case(aten.index.Tensor, (num(6, 8, 4), [whole(6, 4, 1), whole(8, 2)])),
        Case(aten.index.Tensor, (num(6, 8), [flag(6)])),
        Case(aten._unsafe_index.Tensor, (num(4, 8, 4), [None, whole(8, 4)])),
        Case(aten.index_put.default, (num(6, 8), [whole(6, 4)], num(4, 8), True)),
        Case(aten.index_put.default, (num(6, 8, 4), [None, whole(8, 4)], num(6, 4, 1), True)),
        Case(aten.index_put.default, (num(6, 8), [torch.randperm(6)[:4]], num(4, 8))),
        Case(aten._unsafe_index_put.default, (num(6, 8), [whole(6, 4)], num(8), True)),
        Case(aten.index_select.default, (num(4, 8), 1, whole(8, 6))),
        Case(aten.index_select.default, (num(8, 4, 2), 0, whole(8, 6))),
        Case(aten.index_add.default, (num(4, 8), 1, whole(8, 6), num(4, 6))),
        Case(aten.index_add.default, (num(4, 8), 0, whole(4, 2), num(2, 8)), {"alpha": 2}),
        Case(aten.embedding.default, (rows, whole(16, 4, 8))),
        Case(aten.embedding.default, (rows, whole(16, 4, 8), 3)),
        Case(aten.embedding_dense_backward.default, (num(4, 8, 4), whole(16, 4, 8), 16, -1, False)),
        Case(aten.embedding_dense_backward.default, (num(4, 8, 4), whole(16, 4, 8), 16, 3, False)),
        Case(aten.embedding_dense_backward.default, (num(4, 8, 4), whole(16, 4, 8), 16, -1, True)),
        Case(aten.take.default, (num(4, 8), whole(32, 6))),
    ]


_UNARY_POSITIVE = {aten.acosh.default}


def automatic(op: Any) -> Case:
    """A case of a pointwise op, from its schema: broadcasting tensors in (0.1, 0.9), or integers or booleans."""
    name = op._schema.name.removeprefix("aten::")
    bits = name.startswith(("bitwise", "__"))
    backward = name.endswith("_backward")
    args: list[Any] = []
    count = 0
    for spec in op._schema.arguments:
        kind = str(spec.type)
        if kind == "Tensor" or (kind == "Optional[Tensor]" and name.startswith("clamp") and spec.name == "min"):
            shape = (4, 1, 8) if count and not backward else (4, 6, 8)
            if bits:
                x: Any = whole(4, *shape)
            elif name.startswith("logical") or spec.name == "mask":
                x = flag(*shape)
            elif name in ("eq", "ne", "le", "ge", "gt", "lt"):
                x = whole(3, *shape).double()
            else:
                x = unit(*shape) + (1 if op in _UNARY_POSITIVE else 0)
                if name in ("round", "ceil", "floor", "trunc", "frac", "sign", "remainder", "fmod", "floor_divide"):
                    x = x * 5 - 1.3
            args.append(x)
            count += 1
        elif spec.kwarg_only:
            break
        elif spec.has_default_value() and kind != "Optional[number]":
            args.append(spec.default_value)
        elif "number" in kind or kind == "float":
            args.append(2 if bits else 0.5)
        elif kind == "bool":
            args.append(False)
        else:
            args.append(None)
    if name == "log_sigmoid_backward":
        args[2] = aten.log_sigmoid_forward(args[1])[1]
    return Case(op, tuple(args))


#: Written out here; layers, losses and attention are in `truth_cases_nn`.
HAND: list[Case] = [*_shapes(), *_math(), *_index()]
