"""Reductions of gradients travel as bfloat16: half the bytes of float32, and as many digits fewer.

What is reduced (a bucket of many gradients, mostly) is cast before it travels and cast back behind; as torch's
`bf16_compress_hook` for DistributedDataParallel. Sums over ranks are then made in bfloat16.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar.graph import BACKWARD
from autopar.passes import edit
from autopar.passes.bucket import behind_of, reductions_of

aten = torch.ops.aten


def compress(gm: fx.GraphModule) -> fx.GraphModule:
    """Cast sums of wider floats that only the output of the backward reads. After `bucket`.

    `gm` may be changed; use what is returned.
    """
    travels = []
    for node in reductions_of(gm):
        dtype = node.meta["val"].dtype
        wider = dtype.is_floating_point and dtype.itemsize > torch.bfloat16.itemsize
        if not wider or node.meta.get("phase") != BACKWARD or edit.symbolic_args(node)[-1] != "sum":
            continue
        x, *how = edit.symbolic_args(node)
        with gm.graph.inserting_before(node):
            small = edit.call(gm.graph, aten._to_copy.default, x, like=node, dtype=torch.bfloat16)
            travel = edit.call(gm.graph, node.target, small, *how, like=node)
            back = edit.call(gm.graph, aten._to_copy.default, travel, like=node, dtype=dtype)
        node.replace_all_uses_with(back)
        gm.graph.erase_node(node)
        travels.append(travel)
    if not travels:
        return gm
    # As behind a bucket: what only brings a gradient to the output must not wait for it in between.
    late = behind_of(travels)
    gm = edit.stable_sort(gm, key=late.__contains__)
    gm.recompile()
    return gm


__all__ = ["compress"]
