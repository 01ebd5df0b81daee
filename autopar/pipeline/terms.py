"""The terms of a loss, and what each is multiplied with and divided by, read off the graph from its end up.

A term ends at a sum, or where reading ends. What it is divided by (or multiplied with) is a number, what no row has a
part in, or follows from inputs alone: a number of labels, a guard against none. Those are computed for every
micro-batch and for the batch when they come.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopar.graph import LOOKS, Program, Sink, Value, named_arguments, resolve
from autopar.pipeline.regions import closure, regions_of

aten = torch.ops.aten
#: Losses that give their sum and what it would have to be divided by.
NLL: frozenset[Any] = frozenset({aten.nll_loss_forward.default, aten.nll_loss2d_forward.default})
SUMS: frozenset[Any] = frozenset({aten.sum.default, aten.sum.dim_IntList})
DIVIDES: frozenset[Any] = frozenset({aten.div.Tensor, aten.div.Scalar})
TIMES: frozenset[Any] = frozenset({aten.mul.Tensor, aten.mul.Scalar})
ADDS: frozenset[Any] = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.rsub.Tensor,
        aten.rsub.Scalar,
    }
)
WHERE: frozenset[Any] = frozenset({aten.where.self, aten.where.ScalarOther})
_FILLS: frozenset[Any] = frozenset({aten.full.default, aten.full_like.default, aten.new_full.default})
_ZEROS: frozenset[Any] = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})
#: What `reduction` is for a sum.
_SUMMED = 2
#: Kinds of terms: a sum over the batch, one that no row has a part in, and what is neither or cannot be read.
SUM, SAME, OTHER = "sum", "same", "other"


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        kind: SUM, SAME or OTHER. end: where reading ended. elements: of a sum, how many are added up.
        number, under, over: what it is divided by: a number, and values that follow from inputs alone (free, or the
            count of an op in NLL), divided by, and multiplied with.
        masks: if one of these values, or labels of an op in NLL, has nothing but zeros, the sum is 0. A value with
            False stands for its opposite.
    """

    kind: str = OTHER
    end: Value | None = None
    elements: int = 0
    number: float = 1.0
    under: tuple[fx.Node, ...] = ()
    over: tuple[fx.Node, ...] = ()
    masks: tuple[tuple[fx.Node, bool], ...] = ()

    @property
    def where(self) -> str:
        """Address of the op that it ends at."""
        return "a number" if self.end is None else str(self.end.node.meta.get("address", self.end.node.name))


@dataclass(frozen=True)
class Divisor:
    """What a loss is divided by, term by term."""

    program: Program
    terms: tuple[Term, ...]
    _known: dict[tuple[fx.Node, ...], list[fx.Node]] = field(default_factory=dict, repr=False, compare=False)

    def scales(self, inputs: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> list[float]:
        """What every term is multiplied with, for these inputs; not finite where that is a division by 0."""
        given = {**buffers, **inputs}
        out = []
        for term in self.terms:
            scale = 1.0 / term.number
            for node in term.under:
                value = float(self._value(node, given))
                scale = scale / value if value else math.nan
            for node in term.over:
                scale *= float(self._value(node, given))
            out.append(scale)
        return out

    def empty(self, term: int, inputs: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> bool:
        """Whether a sum is certainly 0 for these inputs: it has no rows that count."""
        given = {**buffers, **inputs}
        for node, positive in self.terms[term].masks:
            found = self._counted(node, given) if node.target in NLL else self._free((node,), given)[node]
            if not bool(found.any() if positive else found.logical_not().any()):
                return True
        return False

    def _value(self, node: fx.Node, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._counted(node, given).sum() if node.target in NLL else self._free((node,), given)[node]

    def _counted(self, node: fx.Node, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Which labels of an op in NLL count, or how much."""
        named = named_arguments(node.target, node.args, node.kwargs)
        target, weight = named["target"], named["weight"]
        found = self._free(tuple(n for n in (target, weight) if n is not None), given)
        labels, kept = found[target], found[target] != named["ignore_index"]
        if weight is None:
            return kept
        return found[weight][labels.masked_fill(~kept, 0)].mul(kept)

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


def divisor(program: Program, loss: Sink) -> Divisor:
    """The terms of `loss`, and what each is divided by."""
    return _Reader(program).read(loss)


def counted(value: Value, free: Collection[fx.Node]) -> bool:
    """Whether a value follows from inputs alone: it is free, or the number of labels of an op in NLL."""
    if value.node in free:
        return True
    if value.node.target not in NLL or value.index != 1:
        return False
    named = named_arguments(value.node.target, value.node.args, value.node.kwargs)
    return all(n is None or n in free for n in (named["target"], named["weight"]))


def is_zero(x: Any) -> bool:
    """Whether an argument is 0, or a tensor made of zeros."""
    if not isinstance(x, fx.Node):
        return isinstance(x, (int, float)) and x == 0
    while x.target in LOOKS:
        x = x.all_input_nodes[0]
    if x.target in _FILLS:
        return named_arguments(x.target, x.args, x.kwargs)["fill_value"] == 0
    return x.target in _ZEROS or (x.target is aten.scalar_tensor.default and x.args[0] == 0)


#: A scalar, and what it is divided by.
_Rest = tuple[Value, Term]


class _Reader:
    """Reads the terms of a loss, from the end of its graph up."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.free = regions_of(program).free
        varying = {s.node for s in program.sources if s.kind == "seed" or s.name in program.batch_dims}
        self.varies: set[fx.Node] = set()  # what differs between micro-batches
        self.plain: set[fx.Node] = set()  # what depends on shapes only, and is a number here
        for node in program.gm.graph.nodes:
            if node.name in varying or any(n in self.varies for n in node.all_input_nodes):
                self.varies.add(node)
            elif node.op == "get_attr" or (
                node.op == "call_function" and all(n in self.plain for n in node.all_input_nodes)
            ):
                self.plain.add(node)

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
        term = replace(term, end=value)
        if node not in self.varies:
            return [replace(term, kind=SAME)]
        if node.op != "call_function" or value.val.numel() != 1:
            return [term]
        first = resolve(node.all_input_nodes[0])
        if target in LOOKS or target is aten.neg.default or (target in SUMS and first.val.numel() == 1):
            return [(first, term)]
        if target in NLL and value.index == 0:
            named = named_arguments(target, node.args, node.kwargs)
            elements = resolve(named["target"]).val.numel()
            counts = counted(Value(node, 1), self.free)
            masks = ((node, True),) if counts else ()
            summed = named["reduction"] == _SUMMED
            return [replace(term, kind=SUM, elements=elements, masks=masks) if summed else term]
        if target in SUMS:
            return [replace(term, kind=SUM, elements=first.val.numel(), masks=self._masks(first))]
        if target in ADDS:
            both = [a for a in node.args[:2] if a != 0]
            same = replace(term, kind=SAME, end=None)
            return [(resolve(a), term) if isinstance(a, fx.Node) else same for a in both]
        if target in DIVIDES and not node.kwargs:
            return self._scaled(node.args[0], node.args[1], term, under=True)
        if target in TIMES:
            a, b = node.args[:2]
            swap = isinstance(a, fx.Node) and isinstance(b, fx.Node) and self._factor(a) is not None
            return self._scaled(b, a, term, under=False) if swap else self._scaled(a, b, term, under=False)
        if target in WHERE and is_zero(node.args[2]):  # a guard: times 1 or 0
            return self._scaled(node.args[1], node.args[0], term, under=False)
        return [term]

    def _scaled(self, x: Any, by: Any, term: Term, under: bool) -> Sequence[_Rest | Term]:
        """`x` divided by, or times `by`."""
        if not isinstance(x, fx.Node):
            return [term]
        if isinstance(by, fx.Node):
            known = self._factor(by)
            if known is None:
                return [term]
            if known in self.plain:
                by = float(Divisor(self.program, ())._free((known,), {})[known])
            else:
                more = (known,) if known in self.varies else ()  # what never varies is in all divisors alike
                term = replace(term, under=term.under + more) if under else replace(term, over=term.over + more)
                return [(resolve(x), term)]
        if not by:
            return [term]
        return [(resolve(x), replace(term, number=term.number * by if under else term.number / by))]

    def _factor(self, node: fx.Node) -> fx.Node | None:
        """What gives a factor's value: one that follows from inputs, or is the same for all micro-batches."""
        while node.target in LOOKS and node not in self.free:
            node = node.all_input_nodes[0]
        if node not in self.varies or node in self.free:
            return node if resolve(node).val.numel() == 1 else None
        value = resolve(node)
        return value.node if value.node.target in NLL and counted(value, self.free) else None

    def _masks(self, value: Value) -> tuple[tuple[fx.Node, bool], ...]:
        """What the elements of a sum are multiplied with, of what follows from inputs alone and differs."""
        found: list[tuple[fx.Node, bool]] = []

        def note(mask: Any, positive: bool = True) -> bool:
            known = isinstance(mask, fx.Node) and mask in self.free and mask in self.varies
            if known:
                found.append((mask, positive))
            return known

        while value.node.op == "call_function":
            node, target = value.node, value.node.target
            following = node.args[0] if node.args else None
            if target in TIMES and note(node.args[0]):
                following = node.args[1]
            elif target in TIMES:
                note(node.args[1])
            elif target in WHERE and is_zero(node.args[2]):
                note(node.args[0])
                following = node.args[1]
            elif target is aten.masked_fill.Scalar and node.args[2] == 0:
                note(node.args[1], positive=False)
            elif target in NLL and value.index == 0:
                if counted(Value(node, 1), self.free):
                    found.append((node, True))
                break
            elif target not in LOOKS | SUMS | DIVIDES | {aten.neg.default}:
                break
            if not isinstance(following, fx.Node):
                break
            value = resolve(following)
        return tuple(found)


__all__ = [
    "ADDS", "DIVIDES", "NLL", "OTHER", "SAME", "SUM", "SUMS", "TIMES", "WHERE", "Divisor", "Term", "counted",
    "divisor", "is_zero",
]  # fmt: skip
