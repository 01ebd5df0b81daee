"""How the runtime calls a graph that runs op by op: with one list, which the graph empties.

A caller that holds the arguments keeps them alive for the whole call. What the forward saves is most of the memory of a
training step, and the backward needs each tensor of it for a moment only: a graph that owns its arguments lets go of
each behind its last reader.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from autopar.passes import edit
from autopar.passes.bind import GATHER_INTO, IN_PLACE_REDUCE, STARTS

_STARTS = frozenset({*STARTS, GATHER_INTO, IN_PLACE_REDUCE})


def boxed(gm: fx.GraphModule, gated: bool = False, taken: Mapping[int, str] | None = None) -> fx.GraphModule:
    """A module of one argument: the list of what `gm`, a bound local graph, takes one by one. It is left empty.

    gated: the list begins with a function of nothing. It is called once, right before the first collective (at the end
    if there is none): what it waits for runs beside the computation up to there, and if it raises, no other rank waits
    for a collective of this one.

    taken: position of a result -> its name: the list begins with a function, which is called with the name and the
    result as soon as that is there; the graph then lets go of it, and returns None in its place.
    """
    assert not (gated and taken)  # both would be the first of the list
    graph = fx.Graph()
    box = graph.placeholder("box")
    env: dict[fx.Node, fx.Node] = {}
    first = graph.call_function(operator.getitem, (box, 0)) if gated or taken else None
    gate = first if gated else None
    results = list(edit.output_node(gm).args[0])  # type: ignore[arg-type]
    leaving: dict[fx.Node, list[str]] = {}
    for position, name in (taken or {}).items():
        if results[position] is not None:
            leaving.setdefault(results[position], []).append(name)
            results[position] = None
    for at, node in enumerate(edit.placeholders(gm), int(first is not None)):
        env[node] = graph.create_node("call_function", operator.getitem, (box, at), name=node.name)
        env[node].meta.update(node.meta)
    graph.call_method("clear", (box,))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            for name in leaving.get(node, ()):
                graph.call_function(hand_over, (first, name, env[node]))
            continue
        if gate is not None and (node.target in _STARTS or node.op == "output"):
            graph.call_function(call, (gate,))
            gate = None
        if node.op == "output":
            graph.output(tuple(env[r] if isinstance(r, fx.Node) else r for r in results))
            continue
        env[node] = graph.node_copy(node, lambda n: env[n])
        # Nothing writes to a result behind the node that it is: for the graph, results are in use to the end.
        for name in leaving.get(node, ()):
            graph.call_function(hand_over, (first, name, env[node]))
    return fx.GraphModule(gm, graph)


def call(function: Callable[[], object]) -> None:
    """Call it."""
    function()


def hand_over(function: Callable[[str, Any], object], name: str, value: Any) -> None:
    """Call it with what it takes."""
    function(name, value)


__all__ = ["boxed"]
