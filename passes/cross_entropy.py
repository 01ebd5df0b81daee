"""Cross entropy whose backward starts from the logits, for graphs that a compiler fuses.

As it is captured, the forward keeps the logarithms of all probabilities for the backward, the largest tensor of many
language models; and the backward adds up over all classes a gradient that is nonzero at one of them. Here, of a row of
logits x with label t and s the gradient of its loss,

    log p = (x - m) - log sum exp(x - m),  m = max x
    dx    = s * (p - [class = t]),         s = 0 where t is ignored

so that the backward needs m, the logarithm of the sum, both one number a row, and x, which is kept anyway where it is
an output, or the operand of a cast. One by one these ops would take longer than torch's two: hence for compilers only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.graph import FORWARD, named_arguments
from autopar.passes import edit

aten = torch.ops.aten
_NONE, _MEAN = 0, 1  # ATen's numbers of reductions


def cross_entropy(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a symbolic local joint graph, still the CPU's, as described above. `gm` is changed.

    What has weights of classes, more dims than two, or another gradient of the logarithms stays as it is.
    """
    for node in list(gm.graph.nodes):
        if node.target is aten._log_softmax_backward_data.default:
            grad, log_p = _origin(node.args[0]), _origin(node.args[1])
            if grad.target is aten.nll_loss_backward.default and log_p.target is aten._log_softmax.default:
                loss = named_arguments(grad.target, grad.args, grad.kwargs)
                forward = log_p.meta.get("phase") == FORWARD
                if forward and loss["weight"] is None and len(edit.shape(log_p)) == 2 and node.args[2] in (1, -1):
                    _rewrite(gm.graph, log_p, loss, node)
    edit.remove_dead(gm)
    gm.recompile()
    return gm


def _origin(node: Any) -> fx.Node:
    while node.target is aten.contiguous.default:
        node = node.args[0]
    return node


def _rewrite(graph: fx.Graph, log_p: fx.Node, loss: dict[str, Any], backward: fx.Node) -> None:
    x: Any = log_p.args[0]
    half = x.meta["val"].dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if half else x.meta["val"].dtype

    def in_dtype(value: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        same = value.meta["val"].dtype is dtype
        return value if same else edit.call(graph, aten._to_copy.default, value, like=like, dtype=dtype)

    def shifted(by: fx.Node, like: fx.Node) -> fx.Node:
        return edit.call(graph, aten.sub.Tensor, in_dtype(x, wide, like), by, like=like)

    with graph.inserting_before(log_p):
        largest = edit.call(graph, aten.amax.default, in_dtype(x, wide, log_p), [1], True, like=log_p)
        less = shifted(largest, log_p)
        total = edit.call(
            graph, aten.sum.dim_IntList, edit.call(graph, aten.exp.default, less, like=log_p), [1], True, like=log_p
        )
        log = edit.call(graph, aten.log.default, total, like=log_p)
        new = in_dtype(edit.call(graph, aten.sub.Tensor, less, log, like=log_p), log_p.meta["val"].dtype, log_p)
    log_p.replace_all_uses_with(new)

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(graph, target, *args, like=backward, **kwargs)

    with graph.inserting_before(backward):
        p = call(aten.exp.default, call(aten.sub.Tensor, shifted(largest, backward), log))
        label, seed = loss["target"], loss["grad_output"]
        if loss["reduction"] == _MEAN:
            seed = call(aten.div.Tensor, seed, loss["total_weight"])
        zero = call(aten.full.default, [], 0.0, dtype=seed.meta["val"].dtype, device=torch.device("cpu"))
        counts = call(aten.ne.Scalar, label, loss["ignore_index"])
        scale = call(aten.unsqueeze.default, in_dtype(call(aten.where.self, counts, seed, zero), wide, backward), 1)
        classes = call(aten.arange.default, edit.shape(x)[1], dtype=torch.int64, device=torch.device("cpu"))
        hit = call(aten.eq.Tensor, call(aten.unsqueeze.default, label, 1), classes)
        error = call(aten.where.self, hit, call(aten.sub.Tensor, p, 1.0), p)
        grad = in_dtype(call(aten.mul.Tensor, error, scale), backward.meta["val"].dtype, backward)
    backward.replace_all_uses_with(grad)


__all__ = ["cross_entropy"]
