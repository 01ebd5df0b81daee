"""Local versions of ops whose shards talk: the softmax family over a split dim.

Each shard reduces its part of a row, the row results travel (small: the dim is gone), and every shard finishes its
part."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.passes.local_call import Emitter, Localiser

aten = torch.ops.aten
_LOW = (torch.float16, torch.bfloat16)


def _split_axes(e: Emitter) -> list[int]:
    return e.axes(*e.call.bound.rule.inner)


def _accurate(e: Emitter, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`x` in the precision the whole kernel computes in: float32 for the 16-bit types."""
    want = torch.float32 if dtype in _LOW else dtype
    return x if x.meta["val"].dtype == want else e.add(aten._to_copy.default, x, dtype=want)


def _finish(e: Emitter, target: Any, *args: Any) -> list[fx.Node | None]:
    """Append the last op, then a cast where the result is kept in fewer bits."""
    if args[0].meta["val"].dtype == e.dtype:
        return e.final(target, *args)
    return e.final(aten._to_copy.default, e.add(target, *args), dtype=e.dtype)


def _softmax(e: Emitter) -> list[fx.Node | None]:
    axes = _split_axes(e)
    if not axes:
        return e.same()
    log = e.node.target is aten._log_softmax.default
    dim = [e.named["dim"]]
    x = _accurate(e, e.named["self"], e.dtype)
    top = e.all_reduce(e.add(aten.amax.default, x, dim, True), axes, "max")
    shifted = e.add(aten.sub.Tensor, x, top)
    power = e.add(aten.exp.default, shifted)
    total = e.all_reduce(e.add(aten.sum.dim_IntList, power, dim, True), axes, "sum")
    if log:
        return _finish(e, aten.sub.Tensor, shifted, e.add(aten.log.default, total))
    return _finish(e, aten.div.Tensor, power, total)


def _softmax_backward(e: Emitter) -> list[fx.Node | None]:
    axes = _split_axes(e)
    if not axes:
        return e.same()
    dim = [e.named["dim"]]
    grad, out = (_accurate(e, e.named[n], e.named[n].meta["val"].dtype) for n in ("grad_output", "output"))
    if e.node.target is aten._log_softmax_backward_data.default:
        total = e.all_reduce(e.add(aten.sum.dim_IntList, grad, dim, True), axes, "sum")
        return _finish(e, aten.sub.Tensor, grad, e.add(aten.mul.Tensor, e.add(aten.exp.default, out), total))
    weighted = e.add(aten.mul.Tensor, grad, out)
    total = e.all_reduce(e.add(aten.sum.dim_IntList, weighted, dim, True), axes, "sum")
    return _finish(e, aten.sub.Tensor, weighted, e.add(aten.mul.Tensor, out, total))


def _logsumexp(e: Emitter) -> list[fx.Node | None]:
    axes = _split_axes(e)
    if not axes:
        return e.same()
    keep = bool(e.named["keepdim"])
    dim = list(e.named["dim"])
    own = e.add(aten.logsumexp.default, _accurate(e, e.named["self"], e.dtype), dim, keep)
    top = e.all_reduce(own, axes, "max")
    # A row of minus infinities has no finite maximum to shift by.
    shift = e.add(aten.masked_fill.Scalar, top, e.add(aten.isinf.default, top), 0.0)
    part = e.add(aten.exp.default, e.add(aten.sub.Tensor, own, shift))
    total = e.all_reduce(part, axes, "sum")
    return _finish(e, aten.add.Tensor, e.add(aten.log.default, total), shift)


LOCALISERS: dict[Any, Localiser] = {
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default), _softmax),
    **dict.fromkeys((aten._softmax_backward_data.default, aten._log_softmax_backward_data.default), _softmax_backward),
    aten.logsumexp.default: _logsumexp,
}
