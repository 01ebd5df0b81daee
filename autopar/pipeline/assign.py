"""Every op of a program to a pipeline stage, given where the forward's sequence is cut.

The forward follows from the cuts. In the backward gradients flow from late stages to early ones, so that each boundary
parts its ops in two: those on the late side, with all that they are computed from, and the rest. An op that reads a
saved value must be where that value is, one that reads a parameter where the parameter is, and a parameter's gradient
has to come out where the parameter lives. What that leaves open is settled by a minimum cut: the fewest bytes sent
back. (As each value is sent once, however many read it, values are the vertices whose capacities are cut; Picard and
Queyranne, "On the structure of all minimum cuts", 1980, for the closure of each side.) The boundaries are taken from
the last to the first, each within what the one before has left.

The gradient of a parameter that several stages use is a sum, whose terms stay where they arise: what is left to do,
once a step, is to add what its stages have.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx

from autopar.graph import Sink, Value, resolve
from autopar.pipeline.regions import Regions, nbytes

_ADD = torch.ops.aten.add.Tensor


@dataclass
class Assignment:
    """Where everything is.

    Attributes:
        count: number of stages.
        forward: op of the sequence -> stage.
        backward: op of the backward, or tangent -> stage; the sums in `terms` are in none.
        last: value of the sequence -> the last stage that has it (sent on from the one that computes it).
        params: parameter -> the stages that have it, in order.
        terms: parameter -> the values whose sum is its gradient.
        outputs: position of a sink that is an output or a new buffer -> stage.
    """

    count: int
    forward: dict[fx.Node, int]
    backward: dict[fx.Node, int]
    last: dict[Value, int]
    params: dict[str, tuple[int, ...]]
    terms: dict[str, tuple[Value, ...]]
    outputs: dict[int, int] = field(default_factory=dict)

    def produced(self, value: Value) -> int:
        """The stage that computes a value of the sequence."""
        return self.forward[value.node]


def assign(regions: Regions, starts: Sequence[int]) -> Assignment:
    """Stages of all ops. `starts`: place in the sequence of the first op of stages 1, 2, ..., increasing."""
    program = regions.program
    forward = {node: bisect.bisect_right(starts, i) for i, node in enumerate(regions.sequence)}
    count = len(starts) + 1
    last: dict[Value, int] = {}
    used: dict[str, set[int]] = {s.name: set() for s in program.of_kind("param")}
    for node, stage in forward.items():
        reads = regions.reads(node)
        for value in reads.values:
            last[value] = max(last.get(value, forward[value.node]), stage)
        for name in reads.params:
            used[name].add(stage)
    nodes = {n.name: n for n in program.gm.graph.nodes}
    found = Assignment(count, forward, {}, last, {}, {})
    for i, sink in enumerate(program.sinks):
        if sink.node is not None and sink.kind in ("output", "buffer"):
            found.outputs[i] = _where(found, resolve(nodes[sink.node]).node)
    sums: set[fx.Node] = set()
    for sink in program.sinks:
        if sink.kind == "grad" and sink.node is not None:
            found.terms[sink.name] = _terms(regions, sink, nodes[sink.node], sums, len(used[sink.name]) > 1)
    at = {s.name: found.outputs[i] for i, s in enumerate(program.sinks) if i in found.outputs}
    for source in program.of_kind("tangent"):
        found.backward[nodes[source.node]] = at[source.name]
    _Backward(regions, found, used, sums).run()
    for name, stages in used.items():
        found.params[name] = tuple(sorted(stages)) or (0,)
    return found


def _where(found: Assignment, node: fx.Node) -> int:
    """The stage of a forward node; what every stage could compute is on the last."""
    return found.forward.get(node, found.count - 1)


def _terms(regions: Regions, sink: Sink, node: fx.Node, sums: set[fx.Node], split: bool) -> tuple[Value, ...]:
    """The terms of a gradient; that of a parameter of one stage only is left as it is. `sums`: adds taken apart."""
    top = resolve(node)
    top = Value(top.node, top.index or sink.index)
    terms: list[Value] = []
    stack = [top]
    while stack:
        value = stack.pop()
        adds = value.node
        plain = adds.target is _ADD and not adds.kwargs and all(isinstance(a, fx.Node) for a in adds.args)
        users = len(adds.users)
        if split and plain and users == 1 and all(n in regions.late for n in adds.all_input_nodes):
            sums.add(adds)
            stack += [resolve(a) for a in reversed(adds.args)]  # type: ignore[arg-type]
        else:
            terms.append(value)
    return tuple(terms)


class _Backward:
    def __init__(
        self, regions: Regions, found: Assignment, used: dict[str, set[int]], sums: set[fx.Node]
    ) -> None:
        self.regions, self.found, self.used = regions, found, used
        self.nodes = [*found.backward, *(n for n in regions.backward if n not in sums)]
        inside = set(self.nodes)
        self.users: dict[fx.Node, dict[fx.Node, None]] = {n: {} for n in self.nodes}
        self.inputs: dict[fx.Node, list[Value]] = {}
        for node in self.nodes:
            self.inputs[node] = [v for v in regions.reads(node).grads if v.node in inside]
            for value in self.inputs[node]:
                self.users[value.node][node] = None
        self.low, self.high = self._bounds()

    def _bounds(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """The stages an op may be in, for what it reads and what it is the gradient of."""
        found, low, high = self.found, {}, {}
        for node in self.nodes:
            reads = self.regions.reads(node)
            where = [(found.produced(v), found.last.get(v, found.produced(v))) for v in reads.values]
            where += [(min(self.used[p]), max(self.used[p])) for p in reads.params if self.used[p]]
            if node in found.backward:
                where.append((found.backward[node],) * 2)
            low[node] = max((a for a, _ in where), default=0)
            high[node] = min((b for _, b in where), default=found.count - 1)
        for name, terms in found.terms.items():
            stages = self.used[name] or {0}
            for value in terms:
                low[value.node] = max(low.get(value.node, 0), min(stages))
                high[value.node] = min(high.get(value.node, found.count - 1), max(stages))
        return low, high

    def run(self) -> None:
        found = self.found
        late: set[fx.Node] = set()
        stage = dict.fromkeys(self.nodes, 0)
        for boundary in reversed(range(found.count - 1)):
            late = self._late(boundary, late)
            for node in late:
                stage[node] = max(stage[node], boundary + 1)
        found.backward.update(stage)
        for node, at in stage.items():
            reads = self.regions.reads(node)
            for value in reads.values:  # where bounds cross, the value is sent on to where it is read
                found.last[value] = max(found.last.get(value, found.produced(value)), at)
            for name in reads.params:
                self.used[name].add(at)
        for name, terms in found.terms.items():
            self.used[name].update(stage[value.node] for value in terms if value.node in stage)

    def _late(self, boundary: int, before: set[fx.Node]) -> set[fx.Node]:
        """The ops behind the boundary between stages `boundary` and `boundary + 1`."""
        late = self._with_inputs([*before, *(n for n in self.nodes if self.low[n] > boundary)])
        early: set[fx.Node] = set()
        for node in self.nodes:  # in order, so that readers come behind what they read
            if node not in late and (self.high[node] <= boundary or any(v.node in early for v in self.inputs[node])):
                early.add(node)
        open_ = [n for n in self.nodes if n not in late and n not in early]
        return late | self._least(open_, late, early) if open_ else late

    def _with_inputs(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        out: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in out:
                out.add(node)
                stack.extend(v.node for v in self.inputs[node])
        return out

    def _least(self, open_: list[fx.Node], late: set[fx.Node], early: set[fx.Node]) -> set[fx.Node]:
        """Which of the open ops are late, so that the fewest bytes cross; of equal cuts, the one with the most."""
        graph = nx.DiGraph()
        graph.add_node("late")
        graph.add_node("early")
        values: dict[Value, list[fx.Node]] = {}
        around = {*open_, *(v.node for n in open_ for v in self.inputs[n])}
        for node in around:
            for reader in self.users[node]:
                for value in self.inputs[reader]:
                    if value.node is node:
                        values.setdefault(value, []).append(reader)

        def side(node: fx.Node) -> object:
            return "late" if node in late else "early" if node in early else node

        for value, readers in values.items():
            # One byte more for each value: of cuts with equal bytes, the fewest tensors.
            graph.add_edge(side(value.node), value, capacity=nbytes([value]) + 1)
            for reader in readers:
                graph.add_edge(value, side(reader), capacity=math.inf)
        for node in open_:
            for value in self.inputs[node]:
                graph.add_edge(node, side(value.node), capacity=math.inf)
        for a in list(graph.predecessors("late")):
            graph.remove_edge(a, "late")
        for b in list(graph.successors("early")):
            graph.remove_edge("early", b)
        _, (behind, _) = nx.minimum_cut(graph, "late", "early")
        return {n for n in open_ if n in behind}


__all__ = ["Assignment", "assign"]
