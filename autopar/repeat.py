"""The joint graph of a whole stack from that of its first few layers: their part repeated, if it is periodic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.assemble import ROLE, Role
from autopar.call import SYMBOLIC
from autopar.depth import KEPT, Stack


class _Unlike(Exception):
    """The graph is not periodic, as `unroll` reads it."""


def unroll(graph: fx.Graph, stack: Stack, text: Callable[[Any], str | None]) -> fx.Graph | None:
    """The joint graph of the whole stack from that of its first `KEPT` layers, `graph`; None if it is not periodic.

    Both with a `Role` on every placeholder and result, and `meta["module"]` where known. `graph` is not changed.
    `text`: of a symbolic size.
    """
    try:
        return _Unrolled(_Parts(graph, stack, text)).graph
    except _Unlike:
        return None


class _Parts:
    """A graph of `KEPT` layers in the segments of its layers, forward and backward, and the nodes around them.

    Attributes:
        order: nodes outside, and (layer, pass) where a segment stands.
        segments: (layer, pass) -> its nodes; pass 0 goes up through the layers, pass 1 down.
        home: node in a segment -> (layer, pass, position).
    """

    def __init__(self, graph: fx.Graph, stack: Stack, text: Callable[[Any], str | None]) -> None:
        self.old, self.stack, self.text = graph, stack, text
        self.order: list[fx.Node | tuple[int, int]] = []
        self.segments: dict[tuple[int, int], list[fx.Node]] = {}
        self.home: dict[fx.Node, tuple[int, int, int]] = {}
        sizes: dict[fx.Node, None] = {}  # of the batch alone: not a part of the layer that asks first
        for node in graph.nodes:
            given = all(n.op == "placeholder" or n in sizes for n in node.all_input_nodes)
            if node.op == "call_function" and isinstance(node.meta.get("val"), SYMBOLIC) and given:
                sizes[node] = None
        self.order += sizes
        self.sizes = sizes
        nodes = [n for n in graph.nodes if n.op in ("call_function", "get_attr") and n not in sizes]
        layers = self._layers(nodes)
        begun = -1
        for at, (node, layer) in enumerate(zip(nodes, layers)):
            if layer is None:
                self.order.append(node)
                continue
            if node.op == "get_attr" and not self._vanishes(node):
                raise _Unlike  # of all layers, others might hold other values
            if at == 0 or layers[at - 1] != layer:
                begun += 1
                expected = (begun, 0) if begun < KEPT else (2 * KEPT - 1 - begun, 1)
                if begun >= 2 * KEPT or layer != expected[0]:
                    raise _Unlike
                self.order.append(expected)
                self.segments[expected] = []
            segment = self.segments[expected]
            self.home[node] = (*expected, len(segment))
            segment.append(node)
        if begun + 1 != 2 * KEPT:
            raise _Unlike
        self._compare()

    def _layers(self, nodes: Sequence[fx.Node]) -> list[int | None]:
        """The layer of every node. What says nothing, between two ops of the stack, belongs to the first of them.

        But where the backward begins: that is the widest gap between two ops of the last layer.
        """
        found: list[int | None] = []
        for node in nodes:
            where = self.stack.split(node.meta.get("module", ""))
            found.append(None if where is None else where[0])
        known = [at for at, layer in enumerate(found) if layer is not None]
        gaps = [(a, b) for a, b in itertools.pairwise(known) if b - a > 1]
        turns = [gap for gap in gaps if found[gap[0]] == found[gap[1]] == KEPT - 1]
        if not turns:
            raise _Unlike
        gaps.remove(max(turns, key=lambda gap: gap[1] - gap[0]))
        for a, b in gaps:
            found[a + 1 : b] = [found[a]] * (b - a - 1)
        return found

    def _compare(self) -> None:
        """Neighbours in the middle must be equal, one layer apart.

        The lowest of them reads what the first layer has made, and in the backward the highest what the last has, which
        may be others: there only the ops are compared.
        """
        for which in (0, 1):
            for layer in range(1, KEPT - 2):
                a, b = self.segments[layer, which], self.segments[layer + 1, which]
                if list(map(self._what, a)) != list(map(self._what, b)):
                    raise _Unlike
                inner = layer == KEPT - 3 if which == 0 else layer == 1
                if inner and any(self._told(x, layer) != self._told(y, layer + 1) for x, y in zip(a, b)):
                    raise _Unlike

    def _vanishes(self, constant: fx.Node) -> bool:
        """Whether it is empty, of one dim, and read by nothing but a `cat` with something else: `canonicalise` then
        leaves it out."""
        copies = set(constant.users)
        readers = {user for copy in copies for user in copy.users}
        return (
            tuple(self._constant(constant).shape) == (0,)
            and {n.target for n in copies} <= {torch.ops.aten.lift_fresh_copy.default}
            and {n.target for n in readers} <= {torch.ops.aten.cat.default}
            and all(any(part.meta["val"].dim() != 1 for part in n.args[0]) for n in readers)  # type: ignore[union-attr]
        )

    def _constant(self, node: fx.Node) -> torch.Tensor:
        return getattr(self.old.owning_module, str(node.target))  # type: ignore[no-any-return]

    def _what(self, node: fx.Node) -> Any:
        """What a node does; of a constant, which has a name of its own in every layer, what it is."""
        if node.op != "get_attr":
            return node.target
        constant = self._constant(node)
        return constant.dtype, tuple(constant.shape)

    def _told(self, node: fx.Node, layer: int) -> Any:
        def tell(arg: fx.Node) -> Any:
            if arg in self.home:
                other, which, at = self.home[arg]
                return ("node", other - layer, which, at)
            if arg in self.sizes:  # every layer asks anew
                return ("size", self.text(arg.meta["val"]))
            where = self.owner(arg)
            return ("outside", arg.name) if where is None else ("state", where[0] - layer, where[1])

        module = self.stack.split(node.meta.get("module", ""))
        return fx.map_arg((node.args, node.kwargs), tell), module and module[1]

    def owner(self, node: fx.Node) -> tuple[int, str] | None:
        """Layer and name there of the parameter or buffer that a placeholder is; None for all else."""
        role: Role | None = node.meta.get(ROLE) if node.op == "placeholder" else None
        return self.stack.split(role.name) if role is not None and role.kind == "state" else None


class _Unrolled:
    """The graph of all layers. Layers are numbered as in the whole stack, templates as in the trace."""

    def __init__(self, parts: _Parts) -> None:
        self.parts, self.stack, self.graph = parts, parts.stack, fx.Graph()
        self.outside: dict[fx.Node, fx.Node] = {}
        self.inside: dict[tuple[int, int, int], fx.Node] = {}
        self.state: dict[tuple[int, str], fx.Node] = {}
        for node in parts.old.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
        for item in parts.order:
            if isinstance(item, fx.Node):
                self.outside[item] = self._copy(item, self._of_outside, item.meta)
            else:
                self._segment(*item)
        self._output()

    def _placeholder(self, node: fx.Node) -> None:
        where = self.parts.owner(node)
        if where is None:
            self.outside[node] = self._copy(node, self._of_outside, node.meta)
            return
        for layer in self.stack.like(where[0]):
            role = replace(node.meta[ROLE], name=self.stack.join(layer, where[1]))
            self.state[layer, where[1]] = self._copy(node, self._of_outside, {**node.meta, ROLE: role})

    def _segment(self, template: int, which: int) -> None:
        layers = self.stack.like(template)
        for layer in layers if which == 0 else reversed(layers):
            find = self._finder(template, layer)
            for at, node in enumerate(self.parts.segments[template, which]):
                meta = dict(node.meta)
                if "module" in meta:
                    meta["module"] = self._renamed(meta["module"], layer)
                self.inside[layer, which, at] = self._copy(node, find, meta)

    def _finder(self, template: int, layer: int) -> Callable[[fx.Node], fx.Node]:
        """What a layer reads in the place of what its template reads."""

        def find(arg: fx.Node) -> fx.Node:
            owner = self.parts.owner(arg)
            if owner is not None:
                return self._known(self.state, (layer + owner[0] - template, owner[1]))
            if arg not in self.parts.home:
                return self.outside[arg]
            other, which, at = self.parts.home[arg]
            if abs(other - template) > 1:
                raise _Unlike
            return self._known(self.inside, (layer + other - template, which, at))

        return find

    def _of_outside(self, arg: fx.Node) -> fx.Node:
        if arg in self.outside:
            return self.outside[arg]
        owner = self.parts.owner(arg)
        if owner is not None:
            return self._known(self.state, (self._end(owner[0]), owner[1]))
        other, which, at = self.parts.home[arg]
        return self._known(self.inside, (self._end(other), which, at))

    def _end(self, template: int) -> int:
        if template not in (0, KEPT - 1):
            raise _Unlike
        return self.stack.like(template)[0]

    @staticmethod
    def _known(table: dict[Any, fx.Node], key: Any) -> fx.Node:
        if key not in table:
            raise _Unlike
        return table[key]

    def _copy(self, node: fx.Node, find: Callable[[fx.Node], fx.Node], meta: dict[str, Any]) -> fx.Node:
        made = self.graph.node_copy(node, find)
        made.meta = dict(meta)
        if made.op == "placeholder":
            made.target = made.name  # in code that is written for the graph, the name of the argument
        return made

    def _output(self) -> None:
        old = self.parts.old.output_node()
        values: list[Any] = []
        roles: list[Role | None] = []
        results: Any = old.args[0]
        pairs = zip(results, old.meta[ROLE])
        for template, group in itertools.groupby(pairs, lambda pair: self._template(pair[1])):
            found = list(group)
            if template is None:
                values += [self._of_outside(v) if isinstance(v, fx.Node) else v for v, _ in found]
                roles += [role for _, role in found]
                continue
            for layer in self.stack.like(template):
                find = self._finder(template, layer)
                values += [find(v) if isinstance(v, fx.Node) else v for v, _ in found]
                roles += [replace(role, name=self._renamed(role.name, layer)) for _, role in found]
        made = self.graph.output(tuple(values))
        made.meta = {**old.meta, ROLE: roles}

    def _template(self, role: Role | None) -> int | None:
        """The layer whose gradient or new buffer a result is."""
        where = self.stack.split(role.name) if role is not None and role.kind in ("grad", "buffer") else None
        return None if where is None else where[0]

    def _renamed(self, name: str, layer: int) -> str:
        where = self.stack.split(name)
        return name if where is None else self.stack.join(layer, where[1])


__all__ = ["unroll"]
