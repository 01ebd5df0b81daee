"""On gloo: reduce_scatters, and small all_reduces, as exchanges of pieces that are summed where they arrive.

Torch's gloo has no reduce_scatter of its own: it reduces all of the tensor on every rank and throws the rest away
(`ProcessGroupGloo::_reduce_scatter_base`), so that each rank sends 2 (n - 1) / n of the tensor, in two rounds. In an
all_to_all it sends (n - 1) / n, in one. A small all_reduce, of which only the rounds count, is an all_to_all of copies.
Every sum runs over the ranks in order, and half precision is summed in float32 (`aten.sum` does), so the result is at
least as exact, and alike on all ranks.

Other passes know the reductions only: this is the last that changes what is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autopar.mesh import Mesh
from autopar.passes import edit
from autopar.passes.bind import IN_PLACE_REDUCE, WAIT, functional
from autopar.reshard import SMALL_EXCHANGE

aten = torch.ops.aten
_REDUCE: dict[str, Any] = {"sum": aten.sum.dim_IntList, "max": aten.amax.default, "min": aten.amin.default}
_ALL_REDUCES = (functional.all_reduce.default, IN_PLACE_REDUCE)


def exchange(gm: fx.GraphModule, mesh: Mesh, group_names: Mapping[str, str]) -> fx.GraphModule:
    """Rewrite the reductions of a bound graph as described above. `gm` is changed.

    group_names: as `bind` was given; which says how many ranks a group has.
    """
    sizes = {name: mesh.sizes[mesh.axis(axis)] for axis, name in group_names.items()}
    for node in list(gm.graph.nodes):
        if node.target is functional.reduce_scatter_tensor.default and node.args[1] in _REDUCE:
            x, reduce, parts, group = node.args
            _exchange(gm.graph, node, x, reduce, parts, group)
        elif node.target in _ALL_REDUCES and node.args[1] in _REDUCE:
            x, reduce, group = node.args
            parts = sizes[group]
            if edit.nbytes(x) * parts <= SMALL_EXCHANGE:
                with gm.graph.inserting_before(node):
                    flat = edit.call(gm.graph, aten.reshape.default, x, [x.meta["val"].numel()], like=x)
                    copies = edit.call(gm.graph, aten.repeat.default, flat, [parts], like=x)
                _exchange(gm.graph, node, copies, reduce, parts, group)
    gm.recompile()
    return gm


def _exchange(graph: fx.Graph, start: fx.Node, x: fx.Node, reduce: str, parts: int, group: str) -> None:
    """Send `x`, the pieces for all ranks one behind the other, and reduce what arrives to what `start` gave."""
    rows = edit.shape(x)[0] // parts
    start.target = functional.all_to_all_single.default
    start.args = (x, [rows] * parts, [rows] * parts, group)
    start.meta["val"] = x.meta["val"]
    for wait in [u for u in start.users if u.target is WAIT]:
        val = wait.meta["val"]
        wait.meta["val"] = start.meta["val"]
        readers = list(wait.users)
        with graph.inserting_after(wait):
            stacked = edit.call(graph, aten.view.default, wait, [parts, *val.shape], like=wait)
        # An integer sum would be an int64.
        kwargs = {"dtype": val.dtype} if reduce == "sum" else {}
        with graph.inserting_after(stacked):
            out = edit.call(graph, _REDUCE[reduce], stacked, [0], like=wait, **kwargs)
        for reader in readers:
            reader.replace_input_with(wait, out)


__all__ = ["exchange"]
