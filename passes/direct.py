"""Call ops by torch's own Python functions, where there is one: the last touch to a graph that runs op by op.

An `OpOverload` is called through a schema that is read at run time; `torch.mm` and its kin parse their arguments in
code made for them. The same kernels run. Graphs that other passes or a compiler will still read keep their overloads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Overload -> the function that parses the same arguments in the same order into it.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.mul.Scalar: torch.mul,  # as the kernel of a tensor and a number does itself
    aten.div.Scalar: torch.div,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.neg.default: torch.neg,
    aten.rsqrt.default: torch.rsqrt,
    aten.exp.default: torch.exp,
    aten.tanh.default: torch.tanh,
    aten.relu.default: torch.relu,
    aten.sigmoid.default: torch.sigmoid,
    aten.where.self: torch.where,
    aten.lerp.Scalar: torch.lerp,
    aten.embedding.default: torch.embedding,
    aten.convolution.default: torch.convolution,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean,
    aten.t.default: torch.t,
    aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose,
    aten.reshape.default: torch.reshape,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.select.int: torch.select,
    aten.view.default: torch.Tensor.view,
    aten.expand.default: torch.Tensor.expand,
    aten.contiguous.default: torch.Tensor.contiguous,
    aten.add_.Tensor: torch.Tensor.add_,
    aten.mul_.Tensor: torch.Tensor.mul_,
    aten.copy_.default: torch.Tensor.copy_,
}


def direct(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace the targets of calls as described above. `gm` is changed."""
    for node in gm.graph.nodes:
        function = _FUNCTIONS.get(node.target) if node.op == "call_function" else None
        # The name of a dtype or of the first operand is spelt otherwise by some of them.
        if function is not None and not set(node.kwargs) - {"alpha", "memory_format"}:
            node.target = function
    gm.recompile()
    return gm


__all__ = ["direct"]
