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

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.graph import FORWARD, named_arguments
from autopar.passes import edit

aten = torch.ops.aten
_MEAN = 1  # ATen's number of that reduction


def cross_entropy(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a symbolic local joint graph, still the CPU's, as described above. `gm` is changed.

    What stays as it is: logarithms that something else reads, which are there anyway; weights of classes; logits of
    more dims than two; classes that are split over ranks; means, which the capture takes apart; and so few classes that
    nothing is gained.
    """
    for node in list(gm.graph.nodes):
        if node.target is aten._log_softmax.default:
            losses = _losses(node)
            if losses:
                _rewrite(gm.graph, node, losses)
    edit.remove_dead(gm)
    gm.recompile()
    return gm


@dataclass(frozen=True)
class _Loss:
    """A gradient of a cross entropy to its logits: arguments of nll_loss_backward, and the node that it ends in."""

    seed: fx.Node
    label: fx.Node
    ignored: int
    end: fx.Node


def _losses(log_p: fx.Node) -> list[_Loss]:
    """Those that start from `log_p`, if nothing else does and rewriting them pays; else none."""
    rows, classes = edit.shape(log_p) if len(edit.shape(log_p)) == 2 else (0, 0)
    kept = 2 * _wide(log_p).itemsize  # of a row
    if log_p.meta.get("phase") != FORWARD or log_p.args[1] not in (1, -1) or not rows:
        return []
    if classes * log_p.meta["val"].dtype.itemsize <= kept:
        return []
    found = []
    for user in _users(log_p):
        if user.target is aten._log_softmax_backward_data.default and _origin(user.args[1]) is log_p:
            loss = _origin(user.args[0])
            if loss.target is not aten.nll_loss_backward.default:
                return []
            given = named_arguments(loss.target, loss.args, loss.kwargs)
            if given["weight"] is not None or given["reduction"] == _MEAN:
                return []
            found.append(_Loss(given["grad_output"], given["target"], given["ignore_index"], user))
        elif user.target not in (aten.nll_loss_forward.default, aten.nll_loss_backward.default):
            return []
    return found


def _origin(node: Any) -> fx.Node:
    while node.target is aten.contiguous.default:
        node = node.args[0]
    return node


def _users(node: fx.Node) -> list[fx.Node]:
    """Who reads the node, or what `contiguous` makes of it."""
    out = []
    for user in node.users:
        out += _users(user) if user.target is aten.contiguous.default else [user]
    return out


def _wide(node: fx.Node) -> torch.dtype:
    """The dtype in which torch computes: of half precision, float32."""
    dtype = node.meta["val"].dtype
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _rewrite(graph: fx.Graph, log_p: fx.Node, losses: list[_Loss]) -> None:
    def call(target: Any, *args: Any) -> fx.Node:
        return edit.call(graph, target, *args, like=log_p)

    x: Any = log_p.args[0]
    with graph.inserting_before(log_p):
        logits = _cast(graph, x, _wide(x), log_p)
        largest = call(aten.amax.default, logits, [1], True)
        less = call(aten.sub.Tensor, logits, largest)
        log = call(aten.log.default, call(aten.sum.dim_IntList, call(aten.exp.default, less), [1], True))
        new = _cast(graph, call(aten.sub.Tensor, less, log), log_p.meta["val"].dtype, log_p)
    log_p.replace_all_uses_with(new)
    for loss in losses:
        with graph.inserting_before(loss.end):
            loss.end.replace_all_uses_with(_gradient(graph, x, largest, log, loss))


def _gradient(graph: fx.Graph, x: fx.Node, largest: fx.Node, log: fx.Node, loss: _Loss) -> fx.Node:
    """Append dx, [rows, classes], of one loss."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return edit.call(graph, target, *args, like=loss.end, **kwargs)

    wide, host = _wide(x), torch.device("cpu")
    less = call(aten.sub.Tensor, _cast(graph, x, wide, loss.end), largest)
    p = call(aten.exp.default, call(aten.sub.Tensor, less, log))
    zero = call(aten.full.default, [], 0.0, dtype=loss.seed.meta["val"].dtype, device=host)
    counts = call(aten.ne.Scalar, loss.label, loss.ignored)
    scale = _cast(graph, call(aten.where.self, counts, loss.seed, zero), wide, loss.end)
    classes = call(aten.arange.default, edit.shape(x)[1], dtype=torch.int64, device=host)
    hit = call(aten.eq.Tensor, call(aten.unsqueeze.default, loss.label, 1), classes)
    error = call(aten.where.self, hit, call(aten.sub.Tensor, p, 1.0), p)
    grad = call(aten.mul.Tensor, error, call(aten.unsqueeze.default, scale, 1))
    return _cast(graph, grad, loss.end.meta["val"].dtype, loss.end)


def _cast(graph: fx.Graph, value: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    same = value.meta["val"].dtype is dtype
    return value if same else edit.call(graph, aten._to_copy.default, value, like=like, dtype=dtype)


__all__ = ["cross_entropy"]
