"""What waits on the host, as starts and ends of copies: behind `bind`, so that `overlap` can set them apart.

    autopar::offload(x)        offload_start(x), arrived
    autopar::fetch(x)          fetch_start(x, device), arrived

For a compiler, which knows neither, both stay what they are; only the device is said.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar.offload import ARRIVED, FETCH, FETCH_START, HOSTED, OFFLOAD_START
from autopar.passes import edit


def hosted(gm: fx.GraphModule, device: torch.device, eager: bool) -> fx.GraphModule:
    """Rewrite a bound local graph, which is changed, as described above. device: on which the rank computes."""
    for node in [n for n in gm.graph.nodes if n.target in HOSTED]:
        args = (node.args[0], device) if node.target is FETCH else (node.args[0],)
        if not eager:
            node.args = args
            continue
        with gm.graph.inserting_before(node):
            start = gm.graph.call_function(FETCH_START if node.target is FETCH else OFFLOAD_START, args)
        edit.inherit(start, node)
        start.meta["val"] = node.meta["val"]
        node.target, node.args = ARRIVED, (start,)
    return gm


__all__ = ["hosted"]
