"""Fused kernels again, for graphs that run op by op: planning wants one form per idea, execution the fewest kernels.

* A product and the bias added to it: `addmm`. (The capture takes it apart, for a bias inside a product would be added
  once per shard; here all that is settled.)
* The sum of the gradients of two parts of a tensor (rotary embeddings): `cat`, without zeros and without a sum.
"""

from __future__ import annotations

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


__all__ = ["fuse"]
