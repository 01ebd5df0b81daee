"""Large float32 products on the CPU by oneDNN, where it was measured to be quicker than the BLAS that torch calls.

Only products whose first operand lies in memory row by row, as in the forward of a layer and in the gradient of its
input: of the gradient of a weight, where both operands lie column by column, neither library is the quicker.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar.linear import linear
from autopar.passes import edit

aten = torch.ops.aten
_TURNS = (aten.permute.default, aten.transpose.int, aten.t.default)


def products(gm: fx.GraphModule, least: float, eager: bool) -> fx.GraphModule:
    """Replace products of at least `least` FLOPs in a bound local graph. `gm` is changed.

    It may write in place already. `eager`: it will run op by op, not through a compiler.
    """
    for node in list(gm.graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, left, right = node.args
        (rows, inner), columns = edit.shape(left), edit.shape(right)[1]
        wide = 2.0 * rows * inner * columns >= least and node.meta["val"].dtype is torch.float32
        if not wide or left.target in _TURNS or (bias and edit.shape(bias[0]) != (columns,)):
            continue
        turned = right.target in _TURNS
        with gm.graph.inserting_before(node):
            weight = right.args[0] if turned else edit.call(gm.graph, aten.t.default, right, like=node)
            function = linear if eager else torch.ops.autopar.linear.default
            new = edit.call(gm.graph, function, left, weight, bias[0] if bias else None, like=node)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        if turned and not right.users:
            gm.graph.erase_node(right)
    gm.recompile()
    return gm


__all__ = ["products"]
