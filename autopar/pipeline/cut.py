"""A program cut into pipeline stages, each a program of its own.

A stage's program has, besides what it takes from the whole one (parameters, buffers, inputs, outputs of its own ops),

* a source of kind input for each activation that it receives, and a late one for each gradient;
* a sink of kind output for each activation that it sends on, and a late one for each gradient that it sends back.

Their names ("%add_7", "%mul_55") are those of the values in the whole program, the same on both sides of a boundary.
What crosses several boundaries is handed on by the stages between: they have it as a source and as a sink. So all
communication is between neighbours, and a stage can be planned, lowered and run as any other program.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autopar.errors import PlanError
from autopar.graph import BACKWARD, Program, Sink, Source, Value, resolve
from autopar.pipeline.assign import Assignment, assign
from autopar.pipeline.regions import Regions, regions_of

_ADD = torch.ops.aten.add.Tensor


@dataclass
class Stage:
    """One stage.

    Attributes:
        program: what it computes. Parameters that other stages have too keep their name; the gradient is this stage's
            share of it.
        index, count: which of how many it is.
        receives, sends: names of the activations that come from the stage before, and go to the next.
        receives_back, sends_back: names of the gradients that come from the next stage, and go to the one before.
        shared: parameters that other stages have too -> those stages (this one included).
    """

    program: Program
    index: int
    count: int
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    receives_back: tuple[str, ...]
    sends_back: tuple[str, ...]
    shared: dict[str, tuple[int, ...]]


def cut(program: Program, starts: Sequence[str], regions: Regions | None = None) -> list[Stage]:
    """The stages of `program`. `starts`: addresses of the ops with which stages 1, 2, ... begin.

    Raises:
        PlanError: an address is none of an op at which a stage can begin, or they are not in the order of the program;
            a buffer that changes is read in a stage that does not change it.
    """
    regions = regions or regions_of(program)
    places = {n.meta["address"]: i for i, n in enumerate(regions.sequence)}
    at: list[int] = []
    for address in starts:
        if address not in places:
            raise PlanError(
                f"a stage cannot begin at {address!r}: the program has no such op, or one that no stage has for itself "
                "alone (a view of a parameter, a mask); `autopar explain` lists the places"
            )
        at.append(places[address])
    if at != sorted(set(at)) or (at and at[0] == 0):
        raise PlanError(f"stages begin at {', '.join(starts)}, which is not the order of the program's ops")
    return _Cutter(program, regions, assign(regions, at)).stages()


class _Cutter:
    def __init__(self, program: Program, regions: Regions, where: Assignment) -> None:
        self.program, self.regions, self.where = program, regions, where
        self.nodes = {n.name: n for n in program.gm.graph.nodes}
        self.ranges: dict[Value, tuple[int, int]] = {}  # gradient that is sent back -> (from stage, to stage)
        for node in regions.backward:
            if node in where.backward:
                for value in regions.reads(node).grads:
                    self._goes(value, where.backward[node])

    def _goes(self, value: Value, to: int) -> None:
        if value.node in self.where.backward:
            start = self.where.backward[value.node]
            if to < start:
                low = min(to, self.ranges.get(value, (start, to))[1])
                self.ranges[value] = (start, low)

    def stages(self) -> list[Stage]:
        self._check_buffers()
        return [_Maker(self, index).stage() for index in range(self.where.count)]

    def _check_buffers(self) -> None:
        sinks = ((s.name, self.where.outputs.get(i)) for i, s in enumerate(self.program.sinks) if s.kind == "buffer")
        owners = {name: at for name, at in sinks if at is not None}
        places = {self.nodes[s.node]: s.name for s in self.program.of_kind("buffer") if s.name in owners}
        for node, stage in {**self.where.forward, **self.where.backward}.items():
            for other in node.all_input_nodes:
                name = places.get(other)
                if name is not None and owners[name] != stage:
                    raise PlanError(
                        f"buffer {name} is changed in stage {owners[name]} and read in stage {stage} (by {node.name}); "
                        "cut the model elsewhere, so that one stage has it"
                    )

    def crossing(self, boundary: int) -> list[Value]:
        """Activations sent from stage `boundary` to the next, in the order of the program."""
        where = self.where
        return [v for v, last in sorted(where.last.items(), key=self._order) if where.produced(v) <= boundary < last]

    def returning(self, boundary: int) -> list[Value]:
        """Gradients sent from stage `boundary + 1` to the one before."""
        return [v for v, (start, end) in sorted(self.ranges.items(), key=self._order) if end <= boundary < start]

    def _order(self, item: tuple[Value, Any]) -> tuple[str, int]:
        return item[0].node.name, item[0].index


def name_of(value: Value) -> str:
    """What a value that crosses a boundary is called."""
    several = isinstance(value.node.meta["val"], (tuple, list))
    return f"%{value.node.name}.{value.index}" if several else f"%{value.node.name}"


class _Maker:
    """Builds the program of one stage."""

    def __init__(self, cutter: _Cutter, index: int) -> None:
        self.cutter, self.index = cutter, index
        self.whole, self.regions, self.where = cutter.program, cutter.regions, cutter.where
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.given: dict[Value, fx.Node] = {}
        self.sources: list[Source] = []

    def stage(self) -> Stage:
        index, cutter, where = self.index, self.cutter, self.where
        receives = cutter.crossing(index - 1) if index else []
        sends = cutter.crossing(index) if index < where.count - 1 else []
        back = cutter.returning(index) if index < where.count - 1 else []
        sends_back = cutter.returning(index - 1) if index else []
        own = [i for i, at in where.outputs.items() if at == index]
        terms = {n: [v for v in values if where.backward.get(v.node) == index] for n, values in where.terms.items()}
        params = [name for name, stages in where.params.items() if index in stages]

        needed = self._needed([self._sink_value(i).node for i in own])
        self._sources(needed, params, receives, back)
        for node in self.whole.gm.graph.nodes:
            if node in needed and node.op != "placeholder":
                self._copy(node)
        sinks, results = self._sinks(own, sends, sends_back, {n: t for n, t in terms.items() if n in params})
        self.graph.output(tuple(results))
        shared = {name: where.params[name] for name in params if len(where.params[name]) > 1}
        a, b, c, d = (tuple(map(name_of, values)) for values in (receives, sends, back, sends_back))
        return Stage(self._program(sinks), index, where.count, a, b, c, d, shared)

    # ---- what is in it -----------------------------------------------------------------------------------------

    def _sink_value(self, position: int) -> Value:
        sink = self.whole.sinks[position]
        value = resolve(self.cutter.nodes[str(sink.node)])
        return Value(value.node, value.index or sink.index)

    def _needed(self, ends: Iterable[fx.Node]) -> set[fx.Node]:
        """Nodes of the whole program that stand in this stage, placeholders included."""
        where, regions = self.where, self.regions
        mine = {n for n, at in where.forward.items() if at == self.index}
        mine |= {n for n, at in where.backward.items() if at == self.index}
        everywhere = regions.free | set(regions.parameter) | regions.helpers
        out = set(mine)
        wanted = [n for node in mine for n in node.all_input_nodes] + list(ends)
        stack = wanted
        while stack:
            node = stack.pop()
            if node in out:
                continue
            base = resolve(node).node
            if base is not node:  # a pick: with what it picks from, which is here or is received
                stack.append(base)
                if base in mine or base in everywhere:
                    out.add(node)
            elif node in everywhere or node.op == "placeholder":
                out.add(node)
                stack.extend(node.all_input_nodes)
        return out

    def _sources(
        self, needed: set[fx.Node], params: Sequence[str], receives: Sequence[Value], back: Sequence[Value]
    ) -> None:
        before = [s for s in self.whole.sources if s.kind != "tangent"]
        tangents = [s for s in self.whole.sources if s.kind == "tangent"]
        for source in before:
            node = self.cutter.nodes[source.node]
            if source.name in params if source.kind == "param" else self._has(source, node, needed):
                self.env[node] = self._place(source, node, node.meta["val"])
        for value in receives:
            self.given[value] = self._place(Source("input", name_of(value), ""), value.node, value.val)
        for value in back:
            self.given[value] = self._place(Source("input", name_of(value), "", late=True), value.node, value.val)
        for source in tangents:
            node = self.cutter.nodes[source.node]
            if self.where.backward[node] == self.index:
                self.env[node] = self._place(source, node, node.meta["val"])

    def _has(self, source: Source, node: fx.Node, needed: set[fx.Node]) -> bool:
        if node in needed:
            return True
        mine = (self.whole.sinks[i] for i, at in self.where.outputs.items() if at == self.index)
        return source.kind == "buffer" and any(s.kind == "buffer" and s.name == source.name for s in mine)

    def _place(self, source: Source, like: fx.Node, val: Any) -> fx.Node:
        name = like.name if like.op == "placeholder" else f"from_{source.name[1:].replace('.', '_')}"
        node = self.graph.placeholder(name)
        node.meta["val"] = val
        node.meta["phase"] = source.phase
        node.meta["module"] = like.meta.get("module", "")
        self.sources.append(replace(source, node=node.name))
        return node

    def _copy(self, node: fx.Node) -> None:
        if node.op == "call_function" and node.target is operator.getitem and resolve(node) in self.given:
            self.env[node] = self.given[resolve(node)]
            return
        self.env[node] = self.graph.node_copy(node, self._at)

    def _at(self, node: fx.Node) -> fx.Node:
        if node in self.env:
            return self.env[node]
        return self.given[resolve(node)]

    def _value(self, value: Value) -> tuple[fx.Node, int]:
        """The node here that has a value, and which of its results it is."""
        if value in self.given:
            return self.given[value], 0
        return self.env[value.node], value.index

    # ---- what comes out ----------------------------------------------------------------------------------------

    def _sinks(
        self, own: Sequence[int], sends: Sequence[Value], back: Sequence[Value], terms: dict[str, list[Value]]
    ) -> tuple[list[Sink], list[Any]]:
        sinks: list[Sink] = []
        results: list[Any] = []

        def add(sink: Sink, value: Value | None) -> None:
            node, index = (None, 0) if value is None else self._value(value)
            sinks.append(replace(sink, node=None if node is None else node.name, index=index))
            results.append(None if node is None else self._picked(node, index))

        for i in own:
            add(self.whole.sinks[i], self._sink_value(i))
        for value in sends:
            add(Sink("output", name_of(value), None), value)
        for source in self.sources:
            if source.kind == "param" and source.trainable:
                add(Sink("grad", source.name, None), self._sum(terms.get(source.name, [])))
        for value in back:
            add(Sink("output", name_of(value), None, late=True), value)
        return sinks, results

    def _picked(self, node: fx.Node, index: int) -> fx.Node:
        if not isinstance(node.meta["val"], (tuple, list)):
            return node
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == index:
                return user
        picked = self.graph.call_function(operator.getitem, (node, index))
        picked.meta.update(phase=node.meta["phase"], module=node.meta.get("module", ""), val=node.meta["val"][index])
        return picked

    def _sum(self, terms: list[Value]) -> Value | None:
        """This stage's share of a gradient."""
        if not terms:
            return None
        total = terms[0]
        for count, term in enumerate(terms[1:]):
            node, other = (self._picked(*self._value(v)) for v in (total, term))
            added = self.graph.call_function(_ADD, (node, other))
            added.meta.update(phase=BACKWARD, module=node.meta.get("module", ""), val=node.meta["val"])
            added.meta["address"] = f"{BACKWARD}:{added.meta['module']}/shared#{count}"
            total = Value(added, 0)
            self.given[total] = added
        return total

    def _program(self, sinks: list[Sink]) -> Program:
        whole = self.whole
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        gm = fx.GraphModule({k: getattr(whole.gm, k) for k in used}, self.graph)
        digest = hashlib.sha256(f"{whole.fingerprint} stage {self.index} of {self.where.count}".encode())
        for node in self.graph.nodes:
            digest.update(str(node.meta.get("address", node.name)).encode())
        inputs = {s.name for s in self.sources if s.kind == "input"}
        return Program(
            gm=gm,
            sources=tuple(self.sources),
            sinks=tuple(sinks),
            training=whole.training,
            fingerprint=digest.hexdigest(),
            pack=whole.pack,
            flatten=whole.flatten,
            batch_dims={k: v for k, v in whole.batch_dims.items() if k in inputs},
            notes=list(whole.notes),
            precision=dict(whole.precision),
        )


__all__ = ["Stage", "cut", "name_of"]
