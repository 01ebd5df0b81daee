"""Fused kernels again, for graphs that run op by op: planning wants one form per idea, execution the fewest kernels.

* A product and the bias added to it: `addmm`. (The capture takes it apart, for a bias inside a product would be added
  once per shard; here all that is settled.)
* The gradients of batch norm, where the sums that its statistics need are this rank's alone: one kernel.
* The sum of the gradients of two parts of a tensor (rotary embeddings): `cat`, without zeros and without a sum.
"""

from __future__ import annotations

import operator
from typing import Any, TypeGuard

import torch
from torch import fx

from autopar.passes import edit

aten = torch.ops.aten

_FLAT = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def fuse(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a bound, functional local graph as described above. `gm` is changed."""
    for node in list(gm.graph.nodes):
        if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            _bias(gm.graph, node)
            _halves(gm.graph, node)
        elif node.target is aten.mul.Tensor:
            _batch_norm(gm.graph, node)
    edit.remove_dead(gm)
    gm.recompile()
    return gm


def _bias(graph: fx.Graph, node: fx.Node) -> None:
    """product + bias, with changes of shape between that keep the last dim, is addmm and those changes."""
    for flat, bias in (node.args, node.args[::-1]):
        if not isinstance(flat, fx.Node) or not isinstance(bias, fx.Node) or len(edit.shape(bias)) != 1:
            continue
        product = flat
        while product.target in _FLAT and len(product.users) == 1:
            product = product.args[0]  # type: ignore[assignment]
        same = product.meta["val"].dtype is bias.meta["val"].dtype is node.meta["val"].dtype
        if product.target is not aten.mm.default or len(product.users) > 1 or not same:
            continue
        width = edit.shape(product)[1]
        if edit.shape(flat)[-1] != width or edit.shape(bias) != (width,) or edit.shape(flat) != edit.shape(node):
            continue
        with graph.inserting_before(node):
            out = edit.call(graph, aten.addmm.default, bias, *product.args, like=node)
            if edit.shape(out) != edit.shape(node):
                out = edit.call(graph, aten.view.default, out, list(edit.shape(node)), like=node)
        node.replace_all_uses_with(out)
        return


def _halves(graph: fx.Graph, node: fx.Node) -> None:
    """slice_backward(a, [0, n)) + slice_backward(b, [n, end)) is cat([a, b])."""
    parts = [n for n in node.args if isinstance(n, fx.Node) and n.target is aten.slice_backward.default]
    if len(parts) != 2 or any(len(n.users) > 1 or n.kwargs or n.args[5] != 1 for n in parts):
        return
    first, second = sorted(parts, key=lambda n: n.args[3])  # type: ignore[arg-type, return-value]
    dim, length = first.args[2], edit.shape(node)[first.args[2]]  # type: ignore[index]
    tiles = first.args[3] == 0 and first.args[4] == second.args[3] and second.args[4] >= length  # type: ignore[operator]
    if not tiles or second.args[2] != dim or edit.shape(first) != edit.shape(second):
        return
    with graph.inserting_before(node):
        out = edit.call(graph, aten.cat.default, [first.args[0], second.args[0]], dim, like=node)
    node.replace_all_uses_with(out)


def _batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """What `autopar.decompose` makes of the backward of batch norm, if no sum is another rank's too, is its kernel.

    (g - normalised(x, sum of g * normal, sum of g) / count) * scale, the sums by the kernel for given statistics.
    """
    difference, scale = node.args
    if not isinstance(scale, fx.Node) or scale.target not in _FLAT or not _called(difference, aten.sub.Tensor):
        return
    grad: Any
    correction: Any
    grad, correction = difference.args
    norm = _picked(correction, aten._native_batch_norm_legit_no_training.default, 0)
    if norm is None:
        return
    of_norm: tuple[Any, ...] = norm.args
    x, grad_weight, grad_bias, mean, var, _, eps = of_norm
    kernel = aten.native_batch_norm_backward.default
    sums = _picked(grad_weight, kernel, 1)
    if sums is None or _picked(grad_bias, kernel, 2) is not sums or not _called(var, aten.pow.Tensor_Scalar):
        return
    rstd, weight = var.args[0], sums.args[2]
    mine = _called(scale.args[0], aten.mul.Tensor) and scale.args[0].args in ((rstd, weight), (weight, rstd))
    count = edit.nbytes(x) // edit.nbytes(mean)  # of one dtype
    given = sums.args[:2] == (grad, x) and sums.args[3:8] == (mean, var, mean, rstd, False)
    part: Any = difference.kwargs.get("alpha", 1)
    whole = var.args[1] == -2 and eps == sums.args[8] == 0 and abs(part * count - 1) < 1e-9
    if not (mine and given and whole):
        return
    with graph.inserting_before(sums):
        fused = graph.call_function(kernel, (grad, x, weight, None, None, mean, rstd, True, 0.0, [True] * 3))
        edit.inherit(fused, sums)
        like = (node, grad_weight, grad_bias)
        fused.meta["val"] = tuple(n.meta["val"] for n in like)
        parts = [graph.call_function(operator.getitem, (fused, i)) for i in range(3)]
    for new, old in zip(parts, like):
        edit.inherit(new, old)
        new.meta["val"] = old.meta["val"]
        old.replace_all_uses_with(new)


def _called(node: Any, target: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.target is target


def _picked(node: Any, target: Any, index: int) -> fx.Node | None:
    """The call of `target` of which the node picks result `index`."""
    if not _called(node, operator.getitem) or node.args[1] != index or not _called(node.args[0], target):
        return None
    return node.args[0]


__all__ = ["fuse"]
