"""How much of a batch's loss a micro-batch's loss is.

A loss over a batch is most often a sum over its rows divided by something that the parameters have no part in: a number
of elements, of labels that are not ignored, or a count that the user passes. Then the loss of the batch is the sum of
the micro-batches' losses, each times (its divisor / the batch's): exact also where micro-batches have unequally many
labels. Any other loss (a sum with an auxiliary one, say) counts as the mean of those of the micro-batches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.graph import LOOKS, Program, Sink, named_arguments
from autopar.pipeline.regions import closure, regions_of

aten = torch.ops.aten
#: Losses that give their sum and what it would have to be divided by.
_NLL = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
_SUMS = (aten.sum.default, aten.sum.dim_IntList)


@dataclass(frozen=True)
class Divisor:
    """What a loss is divided by: numbers, and values that follow from inputs alone."""

    program: Program
    number: float
    nodes: tuple[fx.Node, ...]  # free, or the second result of an op in _NLL

    def __call__(self, inputs: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> float:
        """The divisor for these inputs."""
        total = self.number
        for node in self.nodes:
            total *= float(self._value(node, {**buffers, **inputs}))
        return total

    def _value(self, node: fx.Node, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if node.target not in _NLL:
            return self._free([node], given)[node]
        named = named_arguments(node.target, node.args, node.kwargs)
        target, weight = named["target"], named["weight"]
        found = self._free([n for n in (target, weight) if n is not None], given)
        labels, kept = found[target], found[target] != named["ignore_index"]
        if weight is None:
            return kept.sum()
        return found[weight][labels.clamp(min=0)].mul(kept).sum()

    def _free(self, wanted: list[fx.Node], given: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
        sources = {s.node: s.name for s in self.program.sources}
        graph = self.program.gm.graph
        values: dict[fx.Node, Any] = {}
        for node in [n for n in graph.nodes if n in closure(wanted, set(graph.nodes))]:
            if node.op == "placeholder":
                values[node] = given[sources[node.name]]
            elif node.op == "get_attr":
                values[node] = getattr(self.program.gm, str(node.target))
            else:
                target: Callable[..., Any] = aten.reshape.default if node.target is aten.view.default else node.target  # type: ignore[assignment]
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = target(*args, **kwargs)
        return values


def divisor(program: Program, loss: Sink) -> Divisor | None:
    """What `loss` is divided by, if it is a sum over the batch that is divided so, at most."""
    free = regions_of(program).free
    number, nodes = 1.0, []
    node = program.node(str(loss.node))
    while True:
        args = node.args
        if node.target in LOOKS:
            node = node.all_input_nodes[0]
        elif node.target is operator.getitem and args[0].target in _NLL:  # type: ignore[union-attr]
            summed = named_arguments(args[0].target, args[0].args, args[0].kwargs)["reduction"] == 2  # type: ignore[union-attr]
            return Divisor(program, number, tuple(nodes)) if args[1] == 0 and summed else None
        elif node.target in _SUMS:
            return Divisor(program, number, tuple(nodes))
        elif node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(args[0], fx.Node):
            by = args[1]
            if not isinstance(by, fx.Node):
                number *= float(by)  # type: ignore[arg-type]
            elif by in free:
                nodes.append(by)
            elif by.target is operator.getitem and by.args[0].target in _NLL and by.args[1] == 1:  # type: ignore[union-attr]
                named = named_arguments(by.args[0].target, by.args[0].args, by.args[0].kwargs)  # type: ignore[union-attr]
                if not all(n is None or n in free for n in (named["target"], named["weight"])):
                    return None
                nodes.append(by.args[0])  # type: ignore[arg-type]
            else:
                return None
            node = args[0]
        elif node.target is aten.mul.Tensor and isinstance(args[0], fx.Node) and not isinstance(args[1], fx.Node):
            number /= float(args[1])  # type: ignore[arg-type]
            node = args[0]
        else:
            return None


__all__ = ["Divisor", "divisor"]
