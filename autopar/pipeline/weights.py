"""How much of a batch's loss a micro-batch's loss is.

A loss over a batch is most often a sum over its rows divided by something that the parameters have no part in: a number
of elements, of labels that are not ignored, or a count that the user passes; or several such terms added up. Then the
loss of the batch is the sum of the micro-batches' losses, each times (its divisor / the batch's): exact also where
micro-batches have unequally many labels. Terms that are the same for every batch (a penalty on parameters) go with any
weights that add up to 1, and so, on average, does what is no sum over rows.

Where the terms ask for different weights, one loss cannot have them all: micro-batches then count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopar.graph import LOOKS, Program, Sink, Value, named_arguments, resolve
from autopar.pipeline.regions import closure, regions_of

aten = torch.ops.aten
#: Losses that give their sum and what it would have to be divided by.
_NLL: frozenset[Any] = frozenset({aten.nll_loss_forward.default, aten.nll_loss2d_forward.default})
_SUMS: frozenset[Any] = frozenset({aten.sum.default, aten.sum.dim_IntList})
_DIVIDES: frozenset[Any] = frozenset({aten.div.Tensor, aten.div.Scalar})
_TIMES: frozenset[Any] = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_ADDS: frozenset[Any] = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar})
#: What `reduction` is for a sum.
_SUMMED = 2
#: Relative difference of weights that is rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        elements: how many are summed; 0: the term is no sum.
        number, under, over: what the sum is divided by: a number, and values that follow from inputs alone (free, or
            the count of an op in _NLL), divided by, and multiplied with.
    """

    elements: int = 0
    number: float = 1.0
    under: tuple[fx.Node, ...] = ()
    over: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Divisor:
    """What a loss is divided by, term by term."""

    program: Program
    terms: tuple[Term, ...]
    _known: dict[tuple[fx.Node, ...], list[fx.Node]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, inputs: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> float:
        """The divisor of the first term for these inputs."""
        return self.values(inputs, buffers)[0]

    def values(self, inputs: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> list[float]:
        """The divisors of all terms that are sums, for these inputs."""
        given = {**buffers, **inputs}
        out = []
        for term in self.terms:
            if term.elements:
                total = term.number
                for node in term.under:
                    total *= float(self._value(node, given))
                for node in term.over:
                    total /= float(self._value(node, given)) or float("nan")
                out.append(total)
        return out

    @property
    def mixed(self) -> bool:
        """Whether there are terms that are no sums."""
        return not all(term.elements for term in self.terms)

    def _value(self, node: fx.Node, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if node.target not in _NLL:
            return self._free((node,), given)[node]
        named = named_arguments(node.target, node.args, node.kwargs)
        target, weight = named["target"], named["weight"]
        found = self._free(tuple(n for n in (target, weight) if n is not None), given)
        labels, kept = found[target], found[target] != named["ignore_index"]
        if weight is None:
            return kept.sum()
        return found[weight][labels.masked_fill(~kept, 0)].mul(kept).sum()

    def _free(self, wanted: tuple[fx.Node, ...], given: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
        graph = self.program.gm.graph
        if wanted not in self._known:
            inside = closure(wanted, set(graph.nodes))
            self._known[wanted] = [n for n in graph.nodes if n in inside]
        sources = {s.node: s.name for s in self.program.sources}
        values: dict[fx.Node, Any] = {}
        for node in self._known[wanted]:
            if node.op == "placeholder":
                values[node] = given[sources[node.name]].cpu()  # a program speaks of the CPU, whatever it runs on
            elif node.op == "get_attr":
                values[node] = getattr(self.program.gm, str(node.target))
            else:
                target: Any = aten.reshape.default if node.target is aten.view.default else node.target
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = target(*args, **kwargs)
        return values


def divisors(one: Program, whole: Program, loss: str, count: int) -> tuple[Divisor, Divisor] | None:
    """What the loss called so is divided by: in the program of one of `count` micro-batches, and of the whole batch.

    None if no term of it is a sum over the batch.
    """
    found = []
    for program in (one, whole):
        sink = next(s for s in program.sinks if s.kind == "output" and s.name == loss)
        found.append(divisor(program, sink))
    small, large = found
    if len(small.terms) != len(large.terms):
        return None
    pairs = [
        (a, b) if a.elements * count == b.elements else (Term(), Term()) for a, b in zip(small.terms, large.terms)
    ]
    if not any(a.elements for a, _ in pairs):
        return None
    return Divisor(one, tuple(a for a, _ in pairs)), Divisor(whole, tuple(b for _, b in pairs))


def weights(
    of: tuple[Divisor, Divisor],
    rows: Sequence[Mapping[str, torch.Tensor]],
    whole: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
) -> list[float] | None:
    """The weight of every micro-batch's loss; None where the terms of the loss ask for different ones.

    Args:
        of: as `divisors` gives it. rows: the inputs of every micro-batch. whole: those of the batch.
    """
    one, all_ = of
    total = all_.values(whole, buffers)
    # A batch without any label has no loss: as the whole does, its parts divide by zero.
    table = [[a / b if b else float("nan") for a, b in zip(one.values(row, buffers), total)] for row in rows]
    for row in table:
        if any(abs(other - row[0]) > _ROUNDING * abs(row[0]) for other in row[1:]):
            return None
    found = [row[0] for row in table]
    if one.mixed and abs(sum(found) - 1.0) > _ROUNDING:
        return None
    return found


def divisor(program: Program, loss: Sink) -> Divisor:
    """The terms of `loss`, and what each is divided by."""
    return _Reader(program).read(loss)


#: A scalar, and what it is divided by.
_Rest = tuple[Value, Term]


class _Reader:
    """Reads the terms of a loss, from the end of its graph up."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.free = regions_of(program).free
        varying = {s.node for s in program.sources if s.kind == "seed" or s.name in program.batch_dims}
        self.varies: set[fx.Node] = set()  # what differs between micro-batches
        for node in program.gm.graph.nodes:
            if node.name in varying or any(n in self.varies for n in node.all_input_nodes):
                self.varies.add(node)

    def read(self, loss: Sink) -> Divisor:
        """All terms, in the order in which they are added."""
        top = resolve(self.program.node(str(loss.node)))
        terms: list[Term] = []
        stack: list[_Rest | Term] = [(Value(top.node, top.index or loss.index), Term())]
        while stack:
            rest = stack.pop()
            if isinstance(rest, Term):
                terms.append(rest)
            else:
                stack += reversed(self._down(*rest))
        return Divisor(self.program, tuple(terms))

    def _down(self, value: Value, term: Term) -> Sequence[_Rest | Term]:
        """What a scalar, divided as `term` says, is made of; a Term where that ends."""
        node, target = value.node, value.node.target
        if node.op != "call_function" or node not in self.varies or value.val.numel() != 1:
            return [Term()]
        first = resolve(node.all_input_nodes[0])
        if target in LOOKS or target is aten.neg.default or (target in _SUMS and first.val.numel() == 1):
            return [(first, term)]
        if target in _NLL and value.index == 0:
            named = named_arguments(target, node.args, node.kwargs)
            summed = named["reduction"] == _SUMMED
            return [replace(term, elements=resolve(named["target"]).val.numel())] if summed else [Term()]
        if target in _SUMS:
            return [replace(term, elements=first.val.numel())]
        if target in _ADDS:
            return [(resolve(a), term) if isinstance(a, fx.Node) else Term() for a in node.args[:2] if a != 0]
        if target in _DIVIDES and not node.kwargs:
            return self._scaled(node.args[0], node.args[1], term, under=True)
        if target in _TIMES:
            a, b = node.args[:2]
            swap = isinstance(a, fx.Node) and isinstance(b, fx.Node) and self._known(a) is not None
            return self._scaled(b, a, term, under=False) if swap else self._scaled(a, b, term, under=False)
        return [Term()]

    def _scaled(self, x: Any, by: Any, term: Term, under: bool) -> Sequence[_Rest | Term]:
        """`x` divided by, or times `by`."""
        if not isinstance(x, fx.Node):
            return [Term()]
        if isinstance(by, fx.Node):
            known = self._known(by)
            if known is None:
                return [Term()]
            more = (known,) if known in self.varies else ()  # what never varies is in all divisors alike
            term = replace(term, under=term.under + more) if under else replace(term, over=term.over + more)
        elif not by:
            return [Term()]
        else:
            term = replace(term, number=term.number * by if under else term.number / by)
        return [(resolve(x), term)]

    def _known(self, node: fx.Node) -> fx.Node | None:
        """What gives a factor's value: one that follows from inputs, or is the same for all micro-batches."""
        while node.target in LOOKS and node not in self.free:
            node = node.all_input_nodes[0]
        if node not in self.varies or node in self.free:
            return node if resolve(node).val.numel() == 1 else None
        value = resolve(node)
        if value.node.target in _NLL and value.index == 1:
            named = named_arguments(value.node.target, value.node.args, value.node.kwargs)
            if all(n is None or n in self.free for n in (named["target"], named["weight"])):
                return value.node
        return None


__all__ = ["Divisor", "Term", "divisor", "divisors", "weights"]
