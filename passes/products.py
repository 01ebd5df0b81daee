"""Large float32 products on the CPU by oneDNN, where it was measured to be quicker than the BLAS that torch calls.

Two kinds, measured apart: the first operand lies in memory row by row, as in the forward of a layer and in the gradient
of its input; or both lie column by column, as in the gradient of a weight. Of those the first is copied, and what a
bucket wants is computed beside it and copied there: nothing for thin ones. `costmodel.tape` counts that memory.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from autopar.linear import THIN, linear
from autopar.passes import edit

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.mm.out, aten.addmm.default)
_TURNS = (aten.permute.default, aten.transpose.int, aten.t.default)


def products(gm: fx.GraphModule, least: float | None, of_weights: float | None, eager: bool) -> fx.GraphModule:
    """Replace products of at least `least`, of the second kind `of_weights`, FLOPs in a bound graph. `gm` is changed.

    It may write in place already. None: no product of the kind. `eager`: it will run op by op, not through a compiler.
    """
    least, of_weights = (math.inf if flops is None else flops for flops in (least, of_weights))
    for node in list(gm.graph.nodes):
        place = node.kwargs.get("out")
        if node.target not in _PRODUCTS or (node.kwargs and place is None):
            continue
        *bias, left, right = node.args
        (rows, inner), columns = edit.shape(left), edit.shape(right)[1]
        if left.target in _TURNS:
            large = 2.0 * rows * inner * columns >= of_weights and min(inner, columns) >= THIN
        else:
            large = 2.0 * rows * inner * columns >= least
        if not large or node.meta["val"].dtype is not torch.float32 or (bias and edit.shape(bias[0]) != (columns,)):
            continue
        turned = right.target in _TURNS
        with gm.graph.inserting_before(node):
            weight = right.args[0] if turned else edit.call(gm.graph, aten.t.default, right, like=node)
            function = linear if eager else torch.ops.autopar.linear.default
            new = edit.call(gm.graph, function, left, weight, bias[0] if bias else None, like=node)
            if place is not None:
                new = edit.call(gm.graph, aten.copy_.default, place, new, like=node)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        if turned and not right.users:
            gm.graph.erase_node(right)
    gm.recompile()
    return gm


__all__ = ["products"]
