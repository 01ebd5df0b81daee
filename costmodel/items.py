"""The program as numbered items: what fold, layouts, prices and plans walk over instead of an fx graph.

An item is an op, a source (param, buffer, input, tangent, seed, constant) or a sink (output, new buffer, grad). Items
are in graph order, sinks last. A tensor is (item, result index); a sink has one operand and no result.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from autopar.costmodel.rules import rule_for, signature
from autopar.errors import PlanError
from autopar.graph import FORWARD, Program, Source, is_op, operands, resolve, results
from autopar.recompute import recomputed
from autopar.rule import BoundRule
from autopar.spec import Shape


class Tensor(NamedTuple):
    """Result `index` of item `item`."""

    item: int
    index: int  # type: ignore[assignment]


class Meta(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass
class Item:
    """One op, source or sink.

    Attributes:
        name: the op's address, or the name of the source or sink.
        signature: ops of one number are alike in all that a rule or a price depends on (`rules.signature`).
        constant: depends on no source: the same on every rank at no cost.
    """

    index: int
    kind: str
    name: str
    phase: str
    ins: tuple[Tensor, ...]
    in_meta: tuple[Meta, ...]
    outs: tuple[Meta | None, ...]
    node: fx.Node | None = None
    source: Source | None = None
    signature: int = -1
    constant: bool = False


@dataclass
class Items:
    """All items of a program, who uses which tensor, and the rules."""

    program: Program
    items: list[Item]
    users: dict[Tensor, list[tuple[int, int]]]  # tensor -> [(item, operand)]
    param: dict[str, int] = field(default_factory=dict)  # parameter name (and aliases) -> its source item
    _rules: dict[int, BoundRule] = field(default_factory=dict)

    def rule(self, item: Item) -> BoundRule:
        """The rule of an op; ops of one signature share it."""
        found = self._rules.get(item.signature)
        if found is None:
            assert item.node is not None
            found = self._rules[item.signature] = rule_for(item.node)
        return found

    def meta(self, tensor: Tensor) -> Meta:
        found = self.items[tensor.item].outs[tensor.index]
        assert found is not None
        return found

    def ops(self) -> list[Item]:
        return [i for i in self.items if i.kind == "op"]


def _meta(val: torch.Tensor | None) -> Meta | None:
    return None if val is None else Meta(tuple(int(n) for n in val.shape), val.dtype)


def items_of(program: Program, saved: Mapping[str, str] | None = None) -> Items:
    """Number the items of a program; with `Plan.saved`, of what `autopar.recompute` makes of it.

    Raises:
        PlanError: a shape of the program is symbolic; the planner needs numbers. Or as `recomputed`.
    """
    program = recomputed(program, saved or {})
    sources = {s.node: s for s in program.sources}
    items: list[Item] = []
    number: dict[fx.Node, int] = {}
    by_name: dict[str, Tensor] = {}
    users: dict[Tensor, list[tuple[int, int]]] = {}
    param: dict[str, int] = {}
    signatures: dict[Hashable, int] = {}

    def add(item: Item) -> None:
        items.append(item)
        for position, tensor in enumerate(item.ins):
            users.setdefault(tensor, []).append((item.index, position))

    for node in program.gm.graph.nodes:
        index = len(items)
        source = sources.get(node.name)
        if source is None and not is_op(node):
            if node.op == "call_function":
                value = resolve(node)
                by_name[node.name] = Tensor(number[value.node], value.index)
            elif node.op == "get_attr":
                number[node] = index
                add(Item(index, "constant", str(node.target), FORWARD, (), (), _results(node), node, constant=True))
            continue
        number[node] = index
        if source is not None:
            phase = source.phase
            constant = source.kind == "constant"
            add(Item(index, source.kind, source.name, phase, (), (), _results(node), node, source, constant=constant))
            if source.kind == "param":
                param.update({name: index for name in (source.name, *source.aliases)})
            continue
        ins = tuple(Tensor(number[v.node], v.index) for v in operands(node))
        in_meta = tuple(m for t in ins if (m := items[t.item].outs[t.index]) is not None)
        constant = all(items[t.item].constant for t in ins)
        add(
            Item(
                index,
                "op",
                node.meta["address"],
                node.meta.get("phase", FORWARD),
                ins,
                in_meta,
                _results(node),
                node,
                None,
                signatures.setdefault(signature(node), len(signatures)),
                constant,
            )
        )
    by_name.update({node.name: Tensor(at, 0) for node, at in number.items()})
    for sink in program.sinks:
        if sink.node is None:
            continue
        found = by_name[sink.node]
        tensor = Tensor(found.item, found.index or sink.index)
        meta = items[tensor.item].outs[tensor.index]
        if meta is None:
            continue
        add(Item(len(items), _SINK[sink.kind], sink.name, sink.phase, (tensor,), (meta,), ()))
    return Items(program, items, users, param)


#: A sink's kind as an item, apart from the source of the same name.
_SINK = {"output": "output", "buffer": "buffer_new", "grad": "grad"}


def _results(node: fx.Node) -> tuple[Meta | None, ...]:
    for val in results(node):
        if val is not None and any(not isinstance(n, int) for n in val.shape):
            raise PlanError(
                f"{node.name} has the symbolic shape {tuple(val.shape)}; a plan needs numbers: "
                "capture with the batch size that will be run"
            )
    return tuple(_meta(v) for v in results(node))
