"""Decompositions applied while capturing: what a sharding rule could not say, rewritten in ops where it can.

Five ideas:

* A mean is a sum divided by a count known for the whole tensor (or, for losses that ignore labels, counted over it):
  the mean of means over shards is not the mean. So `mean`, `var`, mean-reduced losses and batch statistics become sums.
* A bias added inside a matrix product or convolution would be added once per shard of the contracted dim; it becomes an
  add of its own.
* Batch norm is the sums that its statistics need, and the kernels for given statistics, which split along every dim.
* Views are told as views: what torch calls an unsafe split shares memory with its operand, but its schema hides it.
* Random ops become `aten.rand` / `aten.randn` of float32 (`autopar/decompose_random.py`), which clean-up turns into
  `autopar::uniform` / `normal`.

Each function has the signature of the op it replaces and gives the same results; one that returns NotImplemented leaves
the op as it is. Formulas for backward ops follow from the forward ones; those of batch norm are the standard ones
(Ioffe and Szegedy, arXiv:1502.03167, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor
aten = torch.ops.aten

#: op overload -> function; filled by `decomposes`.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

_NONE, _MEAN, _SUM = 0, 1, 2  # the `reduction` argument of losses
_HALF = (torch.float16, torch.bfloat16)


def decomposes(*ops: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the decomposition of `ops`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            DECOMPOSITIONS[op] = function
        return function

    return register


# ---- means and variances -------------------------------------------------------------------------------------------


def _dims(x: Tensor, dim: Sequence[int] | int | None) -> list[int]:
    """Non-negative dims; all of them for None or an empty list."""
    if isinstance(dim, int):
        dim = [dim]
    return [d % max(x.dim(), 1) for d in dim] if dim else list(range(x.dim()))


def _count(x: Tensor, dims: Sequence[int]) -> int:
    return math.prod(x.shape[d] for d in dims) if x.dim() else 1


def _wide(x: Tensor) -> Tensor:
    """Half-precision input is computed with in float32, as the fused ops do."""
    return x.to(torch.float32) if x.dtype in _HALF else x


@decomposes(aten.mean.dim)
def _mean_dim(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    dims, want = _dims(x, dim), dtype or x.dtype
    # The sum of float16 numbers may be out of range where their mean is not.
    total = aten.sum.dim_IntList(x, dims, keepdim, dtype=torch.float32 if want in _HALF else dtype)
    return aten.div.Scalar(total, _count(x, dims)).to(want)


@decomposes(aten.mean.default)
def _mean(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return _mean_dim(x, None, dtype=dtype)


def _variance(x: Tensor, dim: Any, correction: float | None, keepdim: bool) -> tuple[Tensor, Tensor]:
    dims, wide = _dims(x, dim), _wide(x)
    count = _count(x, dims)
    mean = aten.div.Scalar(aten.sum.dim_IntList(wide, dims, True), count)
    centred = wide - mean
    square = centred.abs() ** 2 if x.is_complex() else centred * centred
    var = aten.div.Scalar(
        aten.sum.dim_IntList(square, dims, keepdim), max(count - (1 if correction is None else correction), 0)
    )
    mean = mean if keepdim else mean.reshape(var.shape)
    return (var.to(x.dtype), mean.to(x.dtype)) if x.dtype in _HALF else (var, mean)


@decomposes(aten.var.correction)
def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _variance(x, dim, correction, keepdim)[0]


@decomposes(aten.std.correction)
def _std(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return torch.sqrt(_variance(x, dim, correction, keepdim)[0])


@decomposes(aten.var_mean.correction)
def _var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    return _variance(x, dim, correction, keepdim)


@decomposes(aten.std_mean.correction)
def _std_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    var, mean = _variance(x, dim, correction, keepdim)
    return torch.sqrt(var), mean


# ---- views ---------------------------------------------------------------------------------------------------------


@decomposes(aten.unsafe_split.Tensor)
def _unsafe_split(x: Tensor, split_size: int, dim: int = 0) -> list[Tensor]:
    return aten.split.Tensor(x, split_size, dim)  # type: ignore[no-any-return]


@decomposes(aten.unsafe_split_with_sizes.default)
def _unsafe_split_with_sizes(x: Tensor, split_sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    return aten.split_with_sizes.default(x, split_sizes, dim)  # type: ignore[no-any-return]


# ---- products with a bias ------------------------------------------------------------------------------------------


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _plus(bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * bias + alpha * product; as in the fused op, beta = 0 ignores the bias, NaN included."""
    product = _scaled(product, alpha)
    return (
        product.expand(torch.broadcast_shapes(bias.shape, product.shape))
        if beta == 0
        else (product + _scaled(bias, beta))
    )


@decomposes(aten.addmm.default)
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, aten.mm(a, b), beta, alpha)


@decomposes(aten.baddbmm.default)
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, aten.bmm(a, b), beta, alpha)


@decomposes(aten.addbmm.default)
def _addbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, aten.bmm(a, b).sum(0), beta, alpha)


@decomposes(aten.addmv.default)
def _addmv(bias: Tensor, a: Tensor, v: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, aten.mv(a, v), beta, alpha)


@decomposes(aten.addr.default)
def _addr(bias: Tensor, u: Tensor, v: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, u.unsqueeze(1) * v.unsqueeze(0), beta, alpha)


@decomposes(aten.mv.default)
def _mv(a: Tensor, v: Tensor) -> Tensor:
    return aten.mm(a, v.unsqueeze(1)).squeeze(1)


@decomposes(aten.dot.default)
def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum()


@decomposes(aten.addcmul.default)
def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + _scaled(a * b, value)


@decomposes(aten.addcdiv.default)
def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + _scaled(a / b, value)


@decomposes(aten.convolution.default)
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    if bias is None:
        return NotImplemented
    out = aten.convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)
    return out + bias.view([-1] + [1] * (out.dim() - 2))


@decomposes(aten.convolution_backward.default)
def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    if not output_mask[2]:
        return NotImplemented
    grad_bias = aten.sum.dim_IntList(grad, [d for d in range(grad.dim()) if d != 1])
    if not output_mask[0] and not output_mask[1]:
        return None, None, grad_bias
    grad_x, grad_weight, _ = aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, transposed, output_padding, groups,
        [output_mask[0], output_mask[1], False],
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias


# ---- losses --------------------------------------------------------------------------------------------------------


def _nll(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def forward(
        x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        if reduction != _MEAN:
            return NotImplemented
        loss, total_weight = op(x, target, weight, _SUM, ignore_index)
        if x.dtype in _HALF:  # as for a mean: the sum may be out of range
            each, _ = op(x, target, weight, _NONE, ignore_index)
            loss = aten.sum.dim_IntList(each, list(range(each.dim())), dtype=torch.float32)
        return (loss / total_weight).to(x.dtype), total_weight

    return forward


def _nll_backward(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def backward(
        grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
        total_weight: Tensor,
    ) -> Tensor:  # fmt: skip
        if reduction != _MEAN:
            return NotImplemented
        return op(grad / total_weight, x, target, weight, _SUM, ignore_index, total_weight)

    return backward


for _forward, _backward in (
    (aten.nll_loss_forward.default, aten.nll_loss_backward.default),
    (aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default),
):
    decomposes(_forward)(_nll(_forward))
    decomposes(_backward)(_nll_backward(_backward))


def _reduced(each: Tensor, reduction: int) -> Tensor:
    """The losses of all elements, reduced."""
    if reduction == _NONE:
        return each
    return _mean(each) if reduction == _MEAN else aten.sum.dim_IntList(each, list(range(each.dim())))


def _pointwise_loss(op: torch._ops.OpOverload, at: int) -> Callable[..., Any]:
    """The loss of every element, then a sum; argument `at` is the reduction."""

    def forward(*args: Any) -> Tensor:
        reduction = args[at] if len(args) > at else _MEAN
        if reduction == _NONE:
            return NotImplemented
        padded = list(args) + [None] * (at - len(args))
        return _reduced(op(*padded[:at], _NONE, *args[at + 1 :]), reduction)

    return forward


def _pointwise_loss_backward(op: torch._ops.OpOverload, at: int) -> Callable[..., Any]:
    def backward(grad: Tensor, *args: Any) -> Tensor:
        reduction = args[at] if len(args) > at else _MEAN
        if reduction == _NONE:
            return NotImplemented
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
        each = aten.div.Scalar(grad, math.prod(shape)) if reduction == _MEAN else grad
        padded = list(args) + [None] * (at - len(args))
        return op(each.expand(shape), *padded[:at], _NONE, *args[at + 1 :])

    return backward


for _forward, _backward, _at in (
    (aten.smooth_l1_loss.default, aten.smooth_l1_loss_backward.default, 2),
    (aten.huber_loss.default, aten.huber_loss_backward.default, 2),
    (aten.soft_margin_loss.default, aten.soft_margin_loss_backward.default, 2),
    (aten.binary_cross_entropy.default, aten.binary_cross_entropy_backward.default, 3),
):
    decomposes(_forward)(_pointwise_loss(_forward, _at))
    decomposes(_backward)(_pointwise_loss_backward(_backward, _at))


@decomposes(aten.mse_loss.default)
def _mse_loss(x: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    error = x - target
    return _reduced(error * error, reduction)


@decomposes(aten.mse_loss_backward.default)
def _mse_loss_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    error = x - target
    return error * (grad * (2.0 / error.numel() if reduction == _MEAN else 2.0))


@decomposes(aten.binary_cross_entropy_with_logits.default)
def _bce_with_logits(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = _MEAN
) -> Tensor:
    log_weight = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    each = (1 - target) * x - log_weight * aten.log_sigmoid_forward(x)[0]
    return _reduced(each if weight is None else each * weight, reduction)


# ---- batch norm ----------------------------------------------------------------------------------------------------


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View a vector over channels so that it broadcasts against `x` of shape [N, C, ...]."""
    return v.view([1, -1] + [1] * (x.dim() - 2))


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Output, saved mean, saved 1/deviation (both empty when not training), new running mean and variance."""
    wide = _wide(x)
    saved_mean = saved_rstd = x.new_empty((0,), dtype=wide.dtype)
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        count = _count(x, dims)
        mean = aten.div.Scalar(aten.sum.dim_IntList(wide, dims), count)
        centred = wide - _per_channel(mean, x)
        square = aten.sum.dim_IntList(centred * centred, dims)
        var = aten.div.Scalar(square, count)
        saved_mean, saved_rstd = mean, torch.rsqrt(var + eps)
        if running_mean is not None and running_var is not None:
            unbiased = aten.div.Scalar(square, max(count - 1, 1))
            running_mean = _moved(running_mean, mean, momentum)
            running_var = _moved(running_var, unbiased, momentum)
    else:
        assert running_mean is not None and running_var is not None, "batch norm in eval mode has running statistics"
        mean, var = _wide(running_mean), _wide(running_var)
    out = _normalised(wide, mean, var, weight, bias, eps)
    return out.to(x.dtype), saved_mean, saved_rstd, running_mean, running_var


def _moved(running: Tensor, found: Tensor, momentum: float) -> Tensor:
    """A running statistic, moved towards that of the batch."""
    return aten.lerp.Scalar(_wide(running), found, momentum).to(running.dtype)


def _normalised(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias: the kernel of batch norm with statistics that are given."""
    weight, bias = (None if v is None else v.to(x.dtype) for v in (weight, bias))
    return aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, 0.0, eps)[0]  # type: ignore[no-any-return]


@decomposes(aten._native_batch_norm_legit_functional.default)
def _batch_norm_functional(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    return _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)


@decomposes(aten._batch_norm_with_update_functional.default)
def _batch_norm_with_update(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    out, mean, rstd, new_mean, new_var = _batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
    return out, mean, rstd, x.new_empty((0,), dtype=torch.uint8), new_mean, new_var


@decomposes(aten._batch_norm_no_update.default)
def _batch_norm_no_update(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    out, mean, rstd, _, _ = _batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)
    return out, mean, rstd, x.new_empty((0,), dtype=torch.uint8)


@decomposes(aten._native_batch_norm_legit_no_training.default)
def _batch_norm_no_training(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    if _alike(x, weight, bias, running_mean, running_var):
        return NotImplemented
    return _batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)[:3]


def _alike(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels of batch norm take the tensors as they are."""
    return x.dtype not in _HALF and all(v is None or v.dtype is x.dtype for v in others)


@decomposes(aten._native_batch_norm_legit.no_stats)
def _batch_norm_no_stats(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Any, ...]:
    return _batch_norm(x, weight, bias, None, None, True, momentum, eps)[:3]


@decomposes(aten.native_batch_norm.default)
def _native_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float,
) -> tuple[Any, ...]:  # fmt: skip
    if training and running_mean is not None:
        return NotImplemented  # it would change the running statistics in place
    return _batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)[:3]


@decomposes(aten.native_batch_norm_backward.default)
def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, train: bool, eps: float, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    given = not train and mean is not None and mean.numel() > 0
    if given and _alike(x, grad, weight, running_mean, running_var, mean, rstd):
        return NotImplemented
    return _batch_norm_gradients(grad, x, weight, running_mean, running_var, mean, rstd, train, eps, output_mask)


@decomposes(aten.batch_norm_backward.default)
def _batch_norm_update_backward(
    grad: Tensor, x: Tensor, weight: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, update: bool, eps: float, output_mask: Sequence[bool], reserve: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    return _batch_norm_gradients(grad, x, weight, running_mean, running_var, mean, rstd, update, eps, output_mask)


def _batch_norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, train: bool, eps: float, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    wide, g = _wide(x), _wide(grad)
    weight = None if weight is None else weight.to(wide.dtype)
    if not train:
        assert running_mean is not None and running_var is not None, "batch norm in eval mode has running statistics"
        mean, var = _wide(running_mean), _wide(running_var)
        rstd = torch.rsqrt(var + eps)
        of_x, of_weight, of_bias = _given_statistics(g, wide, weight, mean, var, rstd, eps, output_mask)
        return None if of_x is None else of_x.to(x.dtype), of_weight, of_bias
    assert mean is not None and rstd is not None, "batch norm in training mode saves its statistics"
    count = _count(x, [d for d in range(x.dim()) if d != 1])
    var = rstd**-2  # as the kernels take it, without eps
    weight = torch.ones_like(rstd) if weight is None else weight  # CUDA's kernel makes gradients like it
    _, grad_weight, grad_bias = _given_statistics(g, wide, weight, mean, var, rstd, 0.0, [False, True, True])
    assert grad_weight is not None and grad_bias is not None
    grad_x = None
    if output_mask[0]:
        # (g - (mean of g + normal * mean of (g * normal))) * scale
        correction = _normalised(wide, mean, var, grad_weight, grad_bias, 0.0)
        scale = _per_channel(rstd * weight, x)
        grad_x = (torch.sub(g, correction, alpha=1 / count) * scale).to(x.dtype)
    return grad_x, grad_weight if output_mask[1] else None, grad_bias if output_mask[2] else None


def _given_statistics(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, rstd: Tensor, eps: float,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of input, weight and bias, where the statistics are none of the input's.

    They are told twice: CPUs read them as running statistics, CUDA as saved ones.
    """
    kernel = aten.native_batch_norm_backward.default
    return kernel(grad, x, weight, mean, var, mean, rstd, False, eps, mask)  # type: ignore[no-any-return]
