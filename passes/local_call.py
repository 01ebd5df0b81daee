"""What the local version of one op is made of: local operands, choices, and nodes appended with their shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.errors import PassError
from autopar.graph import named_arguments, op_name, resolve, results
from autopar.mesh import Mesh
from autopar.passes import collectives as c
from autopar.rule import BoundRule, Choice
from autopar.spec import Radix, Shape, Spec, layout, local_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class LocalCall:
    """One op under a plan.

    Attributes:
        bound: its rule with global sizes.
        choices: one per mesh axis.
        in_specs, out_specs: where operands and results lie, from the choices.
        mesh: the mesh.
    """

    bound: BoundRule
    choices: tuple[Choice, ...]
    in_specs: tuple[Spec, ...]
    out_specs: tuple[Spec, ...]
    mesh: Mesh


class Emitter:
    """Appends the local version of global `node` to `graph`.

    Attributes:
        operands: local operands, in rule order.
        shapes: local shapes of the results (None: absent).
        named: arguments by schema name, with local operands.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, operands: list[fx.Node], call: LocalCall) -> None:
        self.graph, self.node, self.operands, self.call, self.mesh = graph, node, operands, call, call.mesh
        self.globals = results(node)
        self.shapes: list[Shape | None] = [
            None if v is None else local_shape(v.shape, s, self.mesh.sizes)
            for v, s in zip(self.globals, call.out_specs)
        ]
        args, kwargs = self._substitute()
        self.args, self.kwargs = args, kwargs
        self._named: dict[str, Any] | None = None

    @property
    def named(self) -> dict[str, Any]:
        if self._named is None:
            self._named = named_arguments(self.node.target, self.args, self.kwargs)
        return self._named

    def _substitute(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        feed = iter(self.operands)

        def visit(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                value = resolve(arg).val
                # Results that are numbers (the longest sequence of an attention) are constants of the call.
                return next(feed) if isinstance(value, torch.Tensor) else value
            if isinstance(arg, (list, tuple)):
                return [visit(a) for a in arg]
            return arg

        args = tuple(visit(a) for a in self.node.args)
        kwargs = {k: visit(v) for k, v in self.node.kwargs.items()}
        if next(feed, None) is not None:
            raise PassError(f"{op_name(self.node)} got {len(self.operands)} local operands, more than it takes")
        return args, kwargs

    # ---- what was chosen ------------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        """Local shape of the first result."""
        shape = self.shapes[0]
        assert shape is not None
        return shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first result."""
        val = self.globals[0]
        assert val is not None
        return val.dtype

    def axes(self, *factors: str) -> list[int]:
        """Mesh axes (of more than one device) that split one of the factors."""
        return [a for a, ch in enumerate(self.call.choices) if ch.factor in factors and self.mesh.sizes[a] > 1]

    def parts(self, *factors: str) -> int:
        """Into how many pieces the factors are split together."""
        out = 1
        for a in self.axes(*factors):
            out *= self.mesh.sizes[a]
        return out

    def operand(self, name: str) -> int:
        """Number of the operand given for a tensor argument."""
        return self.operand_of(self.named[name])

    def operand_of(self, node: fx.Node) -> int:
        """Number of a local operand."""
        return next(i for i, n in enumerate(self.operands) if n is node)

    def digits(self, number: int, dim: int) -> tuple[Radix, ...]:
        """Layout of one dim of an operand."""
        return layout(self.global_shape(number), self.call.in_specs[number], self.mesh.sizes)[dim]

    def out_digits(self, dim: int, number: int = 0) -> tuple[Radix, ...]:
        """Layout of one dim of a result."""
        val = self.globals[number]
        assert val is not None
        return layout(tuple(val.shape), self.call.out_specs[number], self.mesh.sizes)[dim]

    def global_shape(self, number: int) -> Shape:
        """Global shape of an operand."""
        shape = []
        for dim in self.call.bound.ins[number] or ():
            n = 1
            for factor in dim:
                n *= self.call.bound.sizes[factor]
            shape.append(n)
        return tuple(shape)

    # ---- appending ------------------------------------------------------------------------------------------

    def add(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """Append an op of one result; its shape and dtype come from running it on meta tensors."""
        node = self._append(target, args, kwargs)
        if "device" in kwargs:
            kwargs = kwargs | {"device": "meta"}
        val = target(*fx.map_arg(args, _meta), **fx.map_arg(kwargs, _meta))
        node.meta["val"] = torch.empty(tuple(val.shape), dtype=val.dtype, device="meta")
        return node

    def final(self, target: Any, /, *args: Any, **kwargs: Any) -> list[fx.Node | None]:
        """Append the op that gives the results, at their local shapes, and pick them."""
        node = self._append(target, args, kwargs)
        vals = [
            None if v is None or s is None else torch.empty(s, dtype=v.dtype, device="meta")
            for v, s in zip(self.globals, self.shapes)
        ]
        if not isinstance(self.node.meta["val"], (tuple, list)):
            node.meta["val"] = vals[0]
            return [node]
        node.meta["val"] = tuple(vals)
        picked: list[fx.Node | None] = []
        for i, val in enumerate(vals):
            if val is None:
                picked.append(None)
                continue
            pick = self._append(operator.getitem, (node, i), {})
            pick.meta["val"] = val
            picked.append(pick)
        return picked

    def same(self, /, **changes: Any) -> list[fx.Node | None]:
        """The op itself with some arguments changed, by schema name."""
        if not changes:
            return self.final(self.node.target, *self.args, **self.kwargs)
        named = self.named | changes
        args, kwargs = [], {}
        for spec in self.node.target._schema.arguments:  # type: ignore[union-attr]
            if spec.kwarg_only:
                if spec.name in self.kwargs or spec.name in changes:
                    kwargs[spec.name] = named[spec.name]
            else:
                args.append(named[spec.name])
        return self.final(self.node.target, *args, **kwargs)

    def all_reduce(self, x: fx.Node, axes: list[int], reduce: str) -> fx.Node:
        """Reduce `x` over mesh axes, one after the other."""
        for a in axes:
            x = self.add(aten.contiguous.default, x)
            x = c.emit(self.graph, c.all_reduce, x, self.mesh.names[a], self.mesh.sizes[a], reduce)
            self._inherit(x)
        return x

    def offset(self, digits: tuple[Radix, ...]) -> fx.Node | int:
        """Global index of the first element this rank holds along a dim: an int node, 0 if the dim is whole."""
        total: fx.Node | int = 0
        stride = 1
        for digit in reversed(digits):
            if digit.axis is not None:
                place = self._append(c.coordinate, (self.mesh.names[digit.axis],), {})
                if stride != 1:
                    place = self._append(operator.mul, (place, stride), {})
                total = place if isinstance(total, int) else self._append(operator.add, (total, place), {})
            stride *= digit.size
        return total

    def coordinate(self, axis: int) -> fx.Node:
        """This rank's coordinate on an axis: an int node."""
        return self._append(c.coordinate, (self.mesh.names[axis],), {})

    def _append(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        if target in (c.coordinate, operator.add, operator.mul):
            node.meta["val"] = 0
        self._inherit(node)
        return node

    def _inherit(self, node: fx.Node) -> None:
        node.meta.update({k: self.node.meta[k] for k in ("phase", "module", "address") if k in self.node.meta})


def _meta(node: fx.Node) -> Any:
    return node.meta["val"]


Localiser = Callable[[Emitter], "list[fx.Node | None]"]
