"""Whether the rows of a batch see each other: what a micro-batch has of every value of the forward.

The forward of the whole batch is walked once, beside that of one of `count` micro-batches. Of every value is kept in
which ways micro-batches may have it:

* R: each has all of it. S: each has its rows. P: those of the micro-batches add up to it;
* COUNT: a count or the like, which each has of its own rows. TERMS: a scalar made of sums and counts, a loss, whose
  terms `autopar.pipeline.terms` reads;
* NUMBER: along a dim, the number of the row. SORTED: its rows, but sorted (by expert, say), each its own.

An op is as good for micro-batches as for the batch if its rule has a choice that asks of the operands what is there,
without talk between shards. An op that has none mixes rows: a micro-batch computes something else there.

A value may also be that of a micro-batch times a number (`scale`), where the model divides by the length of the batch.
BatchNorm sees micro-batches, as everywhere: its statistics are taken for the batch's.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from autopar.costmodel.rules import qualified_name, rule_for
from autopar.costmodel.rules_call import Call, Operand
from autopar.costmodel.rules_math import TABLE as ARITHMETIC
from autopar.graph import LOOKS, Program, Sink, Source, Value, is_op, named_arguments, operands, resolve, results
from autopar.pipeline.regions import closure, regions_of
from autopar.pipeline.terms import ADDS, DIVIDES, SUMS, TIMES, WHERE, counted, is_zero
from autopar.rule import WHOLE, BoundRule, Choice, Dim
from autopar.rule import Operand as Dims
from autopar.spec import P, Placement, R, S

aten = torch.ops.aten
COUNT, TERMS = Placement("count"), Placement("terms")
NUMBER, SORTED = "number", "sorted"
#: Kinds of what a micro-batch has a part of.
_SPLIT = frozenset({"S", NUMBER, SORTED})
_FILLS = frozenset(
    {
        aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.scalar_tensor.default,
        aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
        aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    }
)  # fmt: skip
_RANGES = frozenset(
    {
        aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.eye.default,
        aten.eye.m,
    }
)  # fmt: skip
_RANDOM = frozenset({"autopar::uniform", "autopar::normal"})
#: Ops whose factor v is split by local ops that know where in the batch they are, as a micro-batch does not.
_LOOKUPS = frozenset({aten.gather.default, aten.index_select.default, aten.embedding.default})
#: Ops that add to their first operand, which micro-batches would do once each.
_ADDING = frozenset({aten.scatter_add.default, aten.index_add.default, aten.index_put.default})
_READS = frozenset({aten.index.Tensor, aten._unsafe_index.Tensor})
_WRITES = frozenset({aten.index_put.default, aten._unsafe_index_put.default})
_SORTS = frozenset({aten.sort.default, aten.sort.stable})
#: Products of rows sorted by expert with their expert's matrix.
_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})


class Held(NamedTuple):
    """One way in which micro-batches have a value: the batch's is `scale` times what they have."""

    place: Placement
    scale: float = 1.0


Ways = frozenset[Held]
_ALL: Ways = frozenset({Held(R)})
_NONE: Ways = frozenset()


@dataclass(frozen=True)
class Rows:
    """What micro-batches have of every value; nothing of what follows from one that mixes rows.

    mixing: the ops that mix rows, of those that are computed from none.
    """

    held: dict[Value, Ways]
    mixing: tuple[fx.Node, ...]

    def scale(self, value: Value) -> float | None:
        """Of a value that is a sum of the micro-batches': times what; None if it is none."""
        return next((h.scale for h in self.held.get(value, _NONE) if h.place == P()), None)

    def unlike(self, value: Value, place: Placement) -> bool:
        """Whether micro-batches certainly have the value in another way than in `place`."""
        held = self.held.get(value, _NONE)
        return bool(held) and Held(place) not in held


def rows_of(one: Program, whole: Program, count: int, wanted: Iterable[Sink]) -> Rows:
    """Walk the forward of `whole` as far as `wanted` outputs need it; `one`: that of one of `count` micro-batches."""
    ends = [whole.node(str(s.node)) for s in wanted if s.node is not None]
    walk = _Walk(one, whole, count, closure(ends, set(whole.gm.graph.nodes)))
    for node in whole.gm.graph.nodes:
        if node in walk.inside:
            walk.visit(node)
    return Rows(walk.held, tuple(walk.mixing))


class _Walk:
    """The state of a walk: `held` of the values so far. inside: the nodes that are asked about."""

    def __init__(self, one: Program, whole: Program, count: int, inside: set[fx.Node]) -> None:
        self.program, self.count, self.inside = whole, count, inside
        self.sources = {s.node: s for s in whole.sources}
        self.free = regions_of(whole).free
        self.twins = _twins(one, whole)
        #: Whether micro-batches have one row: views of it come in another order, so that twins need not be such.
        self.single = any(_length(whole, s) == count for s in whole.of_kind("input") if s.name in whole.batch_dims)
        self.constants = {n.target: getattr(one.gm, str(n.target)) for n in one.gm.graph.nodes if n.op == "get_attr"}
        buffers = (s.name.rpartition(".") for s in whole.of_kind("buffer"))
        self.norms = {module for module, _, name in buffers if name == "running_mean"}
        self.held: dict[Value, Ways] = {}
        self.mixing: list[fx.Node] = []

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            source = self.sources[node.name]
            dim = self.program.batch_dims.get(source.name) if source.kind == "input" else None
            self.held[Value(node, 0)] = _ALL if dim is None else frozenset({Held(S(dim))})
        elif node.op == "get_attr":
            self.held[Value(node, 0)] = self._constant(node)
        elif is_op(node):
            self._op(node)

    def _constant(self, node: fx.Node) -> Ways:
        """Of a tensor that the trace has kept: it may have been made for this length of the batch."""
        own, other = getattr(self.program.gm, str(node.target)), self.constants.get(node.target)
        if other is None or own.is_meta or other.is_meta:
            return _ALL
        if own.shape == other.shape:
            return _ALL if torch.equal(own, other) else frozenset({Held(COUNT)}) if own.numel() == 1 else _NONE
        for dim in range(own.dim()):
            if _cut(own.shape, dim, self.count) == tuple(other.shape):
                if all(torch.equal(piece, other) for piece in own.chunk(self.count, dim)):
                    return frozenset({Held(S(dim))})
        return _NONE

    # ---- ops ---------------------------------------------------------------------------------------------------

    def _op(self, node: fx.Node) -> None:
        values = operands(node)
        ins = [self.held[v] for v in values]
        found = [_NONE] * len(results(node))
        if all(ins):  # else it follows from what is told of already
            found = self._ways(node, values, ins)
            if not all(found) and self.single and self.twins.pop(node, None) is not None:
                found = self._ways(node, values, ins)
            if not all(found):
                self.mixing.append(node)
                found = [_NONE] * len(found)
        for index, ways in enumerate(found):
            self.held[Value(node, index)] = ways

    def _ways(self, node: fx.Node, values: Sequence[Value], ins: Sequence[Ways]) -> list[Ways]:
        """In which ways results are held; a result without any where there is none."""
        found = self._special(node, ins)
        if found is None:
            found = self._by_rule(node, ins)
        if found is None:
            found = self._scalars(node, values, ins)
        return [_NONE] * len(results(node)) if found is None else found

    def _special(self, node: fx.Node, ins: Sequence[Ways]) -> list[Ways] | None:
        """Of ops of which more is known here than their rule says; None: ask the rule."""
        target, name, twin = node.target, qualified_name(node.target), self.twins.get(node)
        if target in _FILLS or name in _RANDOM:
            if twin is not None and _filling(node) != _filling(twin):
                return [frozenset({Held(COUNT)}) if Call(node).out == () else _NONE]
            found = self._anywhere(node, "S")
            return [found[0] | {Held(P())}] if is_zero(node) and Held(R) in found[0] else found
        if target in _RANGES:
            if twin is not None and _literals(node) == _literals(twin):
                return [_ALL]
            return self._anywhere(node, NUMBER) if _counts_rows(node) else [_ALL if twin is None else _NONE]
        if target in _SORTS and not operands(node)[0].val.is_floating_point() and Call(node).out != ():
            dim = Call(node).dim()
            if ins[0] == {Held(S(dim))}:
                return [frozenset({Held(Placement(SORTED, dim))})] * len(results(node))
        if name in _GROUPED and len(Call(node).out) == len(Call(node).ins[0]) == 2 and ins[1] == _ALL:
            return [frozenset(h for h in ins[0] if h.place.dim == 0)]
        if target in _READS | _WRITES and any(h.place.kind == SORTED for held in ins for h in held):
            return self._anywhere(node, "S", SORTED)
        return None

    def _anywhere(self, node: fx.Node, *kinds: str) -> list[Ways]:
        """Results that are whole, or a part along any dim that fits their shapes."""
        found = []
        for index, shape in enumerate(Call(node).outs):
            places = [R, *(Placement(kind, dim) for kind in kinds for dim in range(len(shape or ())))]
            found.append(frozenset(Held(p) for p in places if self._fits(node, index, p)))
        return found

    def _by_rule(self, node: fx.Node, ins: Sequence[Ways]) -> list[Ways] | None:
        rule = rule_for(node)
        kinds: list[tuple[str, ...]] = [("S",), (SORTED,)]
        if node.target in LOOKS:
            kinds.append((NUMBER,))
        elif node.target in _READS | _WRITES:
            own = self._of_rows(node, rule, ins)
            if own is not None:
                rule, kinds = own, [("S", NUMBER)]
        found: list[set[Held]] = [set() for _ in rule.outs]
        for choice in self._choices(node, rule, ins):
            for mixed in kinds:
                outs = self._under(node, rule, choice, ins, mixed)
                for ways, held in zip(found, outs or ()):
                    ways.add(held)
        return [frozenset(ways) for ways in found] if any(found) else None

    def _choices(self, node: fx.Node, rule: BoundRule, ins: Sequence[Ways]) -> list[Choice]:
        """Those that could ask for what is there."""
        found: dict[Choice, None] = {WHOLE: None}
        for operand, held in zip(rule.ins, ins):
            for h in held:
                choice = rule.factor_at(operand, h.place.dim, h.place.outer) if h.place.kind in _SPLIT else None
                if choice is not None:
                    found[choice] = None
        read = {name for operand in rule.ins for dim in operand or () for name in dim}
        found.update({Choice(f): None for f in rule.splittable() if f not in read})
        found.update({Choice(through=g): None for g in range(len(rule.rule.linear))})
        talk = rule.rule.inner | ({"v"} if node.target in _LOOKUPS else set())
        return [c for c in found if c.factor not in talk and rule.fits((c,), (self.count,))]

    def _under(
        self, node: fx.Node, rule: BoundRule, choice: Choice, ins: Sequence[Ways], kinds: tuple[str, ...]
    ) -> list[Held] | None:
        """What is held of every result under a choice; None if it asks for what is not there.

        kinds: of what a micro-batch has a part of, those that operands may be; the results are of the first.
        """
        need, give = rule.placements(choice)
        parts = []
        for held, place in zip(ins, need):
            allowed = {place} if place.kind != "S" else {place._replace(kind=kind) for kind in kinds}
            part = next((h for h in held if h.place in allowed), None)
            if part is None:
                return None
            parts.append(part)
        scale = self._scale(node, rule, parts)
        if scale is None or any(p.kind == "P" and p.reduce != "sum" for p in give):
            return None
        if node.target in _ADDING and choice.through < 0 and P() in give and not is_zero(node.args[0]):
            return None
        out = []
        for index, place in enumerate(give):
            if place.kind == "S":
                place = place._replace(kind=kinds[0])
            if not self._fits(node, index, place):
                return None
            if place == P() and self._is_norm(node):
                place = R
            out.append(Held(place, scale))
        return out

    def _scale(self, node: fx.Node, rule: BoundRule, parts: Sequence[Held]) -> float | None:
        """What the results are to be multiplied with; None if the op is not linear in what operands are."""
        factor, twin = 1.0, self.twins.get(node)
        if twin is not None and node.target in ARITHMETIC and not self._is_norm(node):
            own, other = _literals(node), _literals(twin)
            if own != other:
                if node.target not in TIMES | DIVIDES or len(parts) != 1 or len(own) != 1 or not (own[0] and other[0]):
                    return None
                factor = own[0] / other[0] if node.target in TIMES else other[0] / own[0]
        scaled = {i: h.scale for i, h in enumerate(parts) if h.scale != 1.0}
        if not scaled:
            return factor
        first = next(iter(scaled.values()))
        if set(scaled.values()) == {first} and any(set(group) == set(scaled) for group in rule.rule.linear):
            return factor * first
        return None

    def _is_norm(self, node: fx.Node) -> bool:
        """Whether an op belongs to a BatchNorm."""
        return node.meta.get("module", "") in self.norms

    def _fits(self, node: fx.Node, index: int, place: Placement) -> bool:
        """Whether a micro-batch's result, if it is read, has the shape that such a part of the batch's has."""
        own, twin = results(node)[index], self.twins.get(node)
        if own is None or not self._is_read(node, index):
            return True
        other = None if twin is None else results(twin)[index]
        if place.kind not in _SPLIT:
            return other is None or own.shape == other.shape
        cut = _cut(own.shape, place.dim, self.count)
        return cut is not None and (other is None or cut == tuple(other.shape))

    def _is_read(self, node: fx.Node, index: int) -> bool:
        """Whether the walk comes by a result again: kernels also return what only they can read."""
        if len(results(node)) == 1:
            return True
        return any(u in self.inside and u.target is operator.getitem and u.args[1] == index for u in node.users)

    def _of_rows(self, node: fx.Node, rule: BoundRule, ins: Sequence[Ways]) -> BoundRule | None:
        """The rule of an op one of whose indices is the number of the row: what it reads or writes is that row."""
        for dim, entry in enumerate(Call(node).arg("indices")):
            if not isinstance(entry, Operand) or Held(S(dim)) not in ins[0]:
                continue
            own = rule.ins[entry.number]
            number = next((h.place.dim for h in ins[entry.number] if h.place.kind == NUMBER), None)
            if number is None or own is None or not own[number]:
                continue
            loop, text = own[number], rule.rule
            new = replace(
                text,
                ins=(_put(text.ins[0], dim, loop), *text.ins[1:]),
                outs=(_put(text.outs[0], dim, loop),) if node.target in _WRITES else text.outs,
                plus=text.plus - {*loop},
                never=text.never - {*loop},
            )
            return BoundRule(new, rule.sizes)
        return None

    # ---- scalars -----------------------------------------------------------------------------------------------

    def _scalars(self, node: fx.Node, values: Sequence[Value], ins: Sequence[Ways]) -> list[Ways] | None:
        """Of counts, and of what a loss is made of behind its sums."""
        vals = [v for v in results(node) if v is not None]
        small, target = all(v.numel() == 1 for v in vals), node.target
        rowless = node in self.twins and all(self._fits(node, i, R) for i in range(len(results(node))))
        if (small and node in self.free) or (rowless and not any(v.is_floating_point() for v in vals)):
            return [frozenset({Held(COUNT)})] * len(results(node))
        if not small or any(v.val.numel() != 1 for v in values):
            return None
        sums = [v for v, held in zip(values, ins) if not self._is_count(v, held)]
        fine = target in ADDS or target in LOOKS or target in SUMS or target is aten.neg.default
        fine = fine or (target in TIMES and len(sums) <= 1)
        if target in DIVIDES and not node.kwargs:
            fine = not _among(node.args[1], sums)
        if target in WHERE and is_zero(node.args[2]):
            fine = not _among(node.args[0], sums)
        return [frozenset({Held(TERMS)})] if fine else None

    def _is_count(self, value: Value, held: Ways) -> bool:
        return counted(value, self.free) or any(h.place in (R, COUNT) for h in held)


def _length(program: Program, source: Source) -> int:
    return int(program.node(source.node).meta["val"].shape[program.batch_dims[source.name]])


def _among(argument: Any, values: Sequence[Value]) -> bool:
    return isinstance(argument, fx.Node) and resolve(argument) in values


def _put(operand: Dims, at: int, dim: Dim) -> Dims:
    assert operand is not None
    return (*operand[:at], dim, *operand[at + 1 :])


def _cut(shape: Sequence[int], dim: int, count: int) -> tuple[int, ...] | None:
    """The shape with one dim divided; None if it cannot be."""
    if shape[dim] % count or not shape[dim]:
        return None
    return (*shape[:dim], shape[dim] // count, *shape[dim + 1 :])


def _twins(one: Program, whole: Program) -> dict[fx.Node, fx.Node]:
    """Op of the batch's program -> that of a micro-batch's, where they have as many of its kind in its module."""

    def ops(program: Program) -> dict[str, fx.Node]:
        return {n.meta["address"]: n for n in program.gm.graph.nodes if is_op(n)}

    def stem(address: str) -> str:
        return address.rpartition("#")[0]

    small, large = ops(one), ops(whole)
    few, many = Counter(map(stem, small)), Counter(map(stem, large))
    return {n: small[a] for a, n in large.items() if few[stem(a)] == many[stem(a)]}


def _literals(node: fx.Node) -> list[float]:
    """The numbers among the arguments of an op."""
    found: list[float] = []

    def visit(arg: Any) -> None:
        if isinstance(arg, (list, tuple)):
            for a in arg:
                visit(a)
        elif isinstance(arg, (int, float)) and not isinstance(arg, bool):
            found.append(arg)

    visit(node.args)
    visit(list(node.kwargs.values()))
    return found


def _filling(node: fx.Node) -> Any:
    """The number that an op fills a tensor with."""
    named = named_arguments(node.target, node.args, node.kwargs)
    return named.get("fill_value", named.get("s"))


def _counts_rows(node: fx.Node) -> bool:
    """Whether an op gives 0, 1, 2, ..."""
    named = named_arguments(node.target, node.args, node.kwargs)
    return "end" in named and named.get("start", 0) == 0 and named.get("step", 1) == 1


__all__ = ["COUNT", "NUMBER", "SORTED", "TERMS", "Held", "Rows", "rows_of"]
