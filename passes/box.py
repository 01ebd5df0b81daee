"""How the runtime calls a graph that runs op by op: with one list, which the graph empties.

A caller that holds the arguments keeps them alive for the whole call. What the forward saves is most of the memory of a
training step, and the backward needs each tensor of it for a moment only: a graph that owns its arguments lets go of
each behind its last reader.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import fx

from autopar.passes import edit
from autopar.passes.bind import GATHER_INTO, IN_PLACE_REDUCE, STARTS

_STARTS = frozenset({*STARTS, GATHER_INTO, IN_PLACE_REDUCE})


def boxed(gm: fx.GraphModule, gated: bool = False) -> fx.GraphModule:
    """A module of one argument: the list of what `gm`, a bound local graph, takes one by one. It is left empty.

    gated: the list begins with a function of nothing. It is called once, right before the first collective (at the end
    if there is none): what it waits for runs beside the computation up to there, and if it raises, no other rank waits
    for a collective of this one.
    """
    graph = fx.Graph()
    box = graph.placeholder("box")
    env: dict[fx.Node, fx.Node] = {}
    gate = graph.call_function(operator.getitem, (box, 0)) if gated else None
    for at, node in enumerate(edit.placeholders(gm), int(gated)):
        env[node] = graph.create_node("call_function", operator.getitem, (box, at), name=node.name)
        env[node].meta.update(node.meta)
    graph.call_method("clear", (box,))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        if gate is not None and (node.target in _STARTS or node.op == "output"):
            graph.call_function(call, (gate,))
            gate = None
        env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(gm, graph)


def call(function: Callable[[], object]) -> None:
    """Call it."""
    function()


__all__ = ["boxed"]
