"""The graph that ends an accumulation: what is left to be done to gradients that were added up before being reduced.

A parameter that is whole on an axis gets a gradient that is a sum over that axis. If several micro-batches are added up
anyway, it is enough to reduce their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from autopar.graph import BACKWARD, Draft
from autopar.passes.insert import LocalProgram
from autopar.passes.redistribute import redistribute
from autopar.plan import Plan
from autopar.spec import local_shape


@dataclass(frozen=True)
class Reduction:
    """A symbolic graph from the sums of the parameters `names` to their gradients as they are stored, in that order."""

    gm: fx.GraphModule
    names: tuple[str, ...]


def reduction(local: LocalProgram, plan: Plan) -> Reduction | None:
    """What is left to do for a local program that was made with `defer`; None if there is nothing."""
    graph, outputs = fx.Graph(), []
    found: list[str] = []
    for sink, spec in zip(local.program.sinks, local.sink_specs):
        if sink.kind != "grad" or sink.node is None:
            continue
        stored = plan.stored(sink.name).spec
        if spec == stored:
            continue
        val = local.program.node(sink.node).meta["val"]
        val = val[sink.index] if isinstance(val, (tuple, list)) else val
        node = graph.placeholder(f"sum_{len(found)}")
        piece = local_shape(tuple(val.shape), spec, plan.mesh.sizes)
        node.meta.update(phase=BACKWARD, module="", val=torch.empty(piece, dtype=val.dtype, device="meta"))
        out = redistribute(graph, node, tuple(val.shape), spec, stored, plan.mesh)
        step = out
        while step is not node:
            step.meta["phase"] = BACKWARD
            step = step.all_input_nodes[0]
        outputs.append(out)
        found.append(sink.name)
    if not found:
        return None
    graph.output(tuple(outputs))
    return Reduction(Draft({}, graph), tuple(found))


__all__ = ["Reduction", "reduction"]
