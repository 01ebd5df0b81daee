"""Cut a backward graph in two: gradients of inputs, which the stage before waits for, and gradients of weights.

The first half (I) holds what the gradients that are sent back are computed from; the second (W) the rest. Where nothing
is sent back, W is what serves the gradient of one parameter only: the chain that leads there would otherwise all be W,
and there would be nothing to put off. (Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 2, splits every
linear layer so; here it is the graph that says what belongs where.)

What W reads of I's values is handed over; a convolution's backward, which gives both gradients at once, is done in two.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.passes import edit

aten = torch.ops.aten


@dataclass(frozen=True)
class Halves:
    """The two halves.

    Attributes:
        inputs: placeholders: those of the whole at `input_reads`. Outputs: what is sent back, then what W reads.
        weights: placeholders: those of the whole at `weight_reads`, then what I has handed over. Outputs: the
            gradients of parameters.
        handed_bytes: bytes of what is handed over, on one rank.
    """

    inputs: fx.GraphModule
    weights: fx.GraphModule
    input_reads: tuple[int, ...]
    weight_reads: tuple[int, ...]
    handed_bytes: int


def halves(gm: fx.GraphModule, sent: Sequence[bool]) -> Halves:
    """Cut a backward graph as `passes.partition` makes it. `sent`: of each output, whether it is sent back.

    `gm` is not changed.
    """
    gm = edit.copy(gm)
    _part_convolutions(gm)
    places = edit.placeholders(gm)
    values: list[Any] = list(edit.output_node(gm).args[0])  # type: ignore[arg-type]
    back = [v for v, s in zip(values, sent) if s]
    grads = [v for v, s in zip(values, sent) if not s]
    early = _ancestors([v for v in back if isinstance(v, fx.Node)]) if any(sent) else _common(gm, grads)
    # One result of several is handed over, not all of them.
    early |= {n for n in gm.graph.nodes if edit.is_pick(n) and n.args[0] in early}
    handed: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in early or node.op == "output":
            continue
        handed.update(dict.fromkeys(n for n in node.all_input_nodes if n in early and n.op != "placeholder"))
    handed.update(dict.fromkeys(v for v in grads if isinstance(v, fx.Node) and v in early and v.op != "placeholder"))
    carried = [n for n in handed if not _number(n)]
    inputs, input_reads = _graph(gm, places, early, (), [*back, *carried])
    late = {n for n in gm.graph.nodes if n not in early or _number(n)}
    weights, weight_reads = _graph(gm, places, late, carried, grads)
    return Halves(inputs, weights, input_reads, weight_reads, sum(edit.nbytes(n) for n in carried))


def _number(node: fx.Node) -> bool:
    return edit.is_index_arithmetic(node)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _common(gm: fx.GraphModule, grads: Sequence[Any]) -> set[fx.Node]:
    """The nodes that several gradients are computed from."""
    serves: dict[fx.Node, set[int]] = {}
    for number, value in enumerate(grads):
        if isinstance(value, fx.Node):
            serves.setdefault(value, set()).add(number)
    for node in reversed(gm.graph.nodes):
        if node.op != "output" and node in serves:
            for other in node.all_input_nodes:
                at = serves.setdefault(other, set())
                if len(at) < 2:
                    at.update(serves[node])
    several = [n for n, at in serves.items() if len(at) > 1 and n.op != "placeholder"]
    return _ancestors(several)


def _graph(
    gm: fx.GraphModule,
    places: Sequence[fx.Node],
    inside: set[fx.Node],
    given: Sequence[fx.Node],
    outputs: Sequence[Any],
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The graph of `inside` that makes `outputs` of placeholders and `given`; which placeholders it reads."""
    live: set[fx.Node] = set()
    stack = [n for n in outputs if isinstance(n, fx.Node)]
    known = set(given)
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            if node not in known:
                stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    reads = tuple(i for i, n in enumerate(places) if n in live)
    for node in (*(places[i] for i in reads), *given):
        env[node] = graph.placeholder(node.name)
        env[node].meta.update(node.meta)
    for node in gm.graph.nodes:
        if node in live and node not in env:
            assert node in inside, node.name
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[v] if isinstance(v, fx.Node) else v for v in outputs))
    out = edit.module(gm, graph)
    out.recompile()
    return out, reads


def _part_convolutions(gm: fx.GraphModule) -> None:
    """convolution_backward for the input's gradient, and another for the weight's and bias's."""
    for node in list(gm.graph.nodes):
        if node.target is not aten.convolution_backward.default:
            continue
        *args, mask = node.args
        picks = [n for n in node.users if n.target is operator.getitem]
        if len(picks) != len(node.users) or not mask[0] or not any(mask[1:]):
            continue
        with gm.graph.inserting_before(node):
            parts = []
            for kept in ([True, False, False], [False, *mask[1:]]):
                part = gm.graph.call_function(node.target, (*args, kept))
                part.meta.update(node.meta)
                part.meta["val"] = tuple(v if k else None for v, k in zip(node.meta["val"], kept))
                parts.append(part)
        for pick in picks:
            pick.args = (parts[0 if pick.args[1] == 0 else 1], pick.args[1])
        gm.graph.erase_node(node)


__all__ = ["Halves", "halves"]
