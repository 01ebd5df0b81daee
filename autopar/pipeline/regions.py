"""What of a program may be cut into pipeline stages, and what crosses each gap.

Forward nodes are of three sorts:

* *derived*: views and casts of one parameter. They never cross a cut: a stage that reads them has the parameter;
* *free*: computed from inputs, constants and buffers that never change, and not random: masks, position ids, rotary
  tables, shifted labels. Every rank has the inputs, so a stage that reads them computes them;
* the *sequence*: the rest, in the order of the trace. A cut is a gap in it.

Values of the sequence that the forward reads behind a gap cross it. (What only the backward reads does not: it is
saved.) Of the backward's nodes, those that depend on no gradient are *helpers*: they stand wherever they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from autopar.graph import BACKWARD, LOOKS, Program, Source, Value, is_op, resolve


class Reads(NamedTuple):
    """What a node reads, through helpers: values of the sequence, gradients, and parameters by name."""

    values: dict[Value, None]
    grads: dict[Value, None]
    params: dict[str, None]


@dataclass(frozen=True)
class Regions:
    """The sorts of the nodes of a program.

    Attributes:
        sequence: the forward ops that are neither derived nor free, in order.
        backward: the ops that depend on a gradient that comes in (a tangent), in order.
        parameter: a parameter's placeholder, or a node derived of it -> the parameter's name.
        free: nodes and placeholders that every stage can have for itself.
        late: tangents, and what depends on them.
        helpers: ops of the backward that are none of these.
    """

    program: Program
    sequence: tuple[fx.Node, ...]
    backward: tuple[fx.Node, ...]
    parameter: dict[fx.Node, str]
    free: set[fx.Node]
    late: set[fx.Node]
    helpers: set[fx.Node]
    _reads: dict[fx.Node, Reads] = field(default_factory=dict, repr=False)

    def reads(self, node: fx.Node) -> Reads:
        """What an op of the sequence, of the backward, or a helper reads."""
        found = self._reads.get(node)
        if found is None:
            found = self._reads[node] = Reads({}, {}, {})
            for other in node.all_input_nodes:
                value = resolve(other)
                if other in self.parameter:
                    found.params[self.parameter[other]] = None
                elif value.node in self.helpers:
                    through = self.reads(value.node)
                    found.values.update(through.values)
                    found.grads.update(through.grads)
                    found.params.update(through.params)
                elif value.node in self.late:
                    found.grads[value] = None
                elif value.node not in self.free and value.node.op == "call_function":
                    found.values[value] = None
        return found

    def live(self) -> list[dict[Value, None]]:
        """For every gap, the i-th before sequence[i] (the last behind all of them): the values that cross it."""
        at = {node: i for i, node in enumerate(self.sequence)}
        last: dict[Value, int] = {}
        for i, node in enumerate(self.sequence):
            last.update(dict.fromkeys(self.reads(node).values, i))
        starts: list[list[Value]] = [[] for _ in range(len(at) + 1)]
        ends: list[list[Value]] = [[] for _ in range(len(at) + 1)]
        for value, i in last.items():
            starts[at[value.node] + 1].append(value)
            ends[i + 1].append(value)
        alive: dict[Value, None] = {}
        out = []
        for begins, stops in zip(starts, ends):
            alive.update(dict.fromkeys(begins))
            for value in stops:
                alive.pop(value, None)
            out.append(dict(alive))
        return out


def regions_of(program: Program) -> Regions:
    """Sort the nodes of a program."""
    sources = {s.node: s for s in program.sources}
    changed = {s.name for s in program.sinks if s.kind == "buffer" and s.node is not None}
    parameter: dict[fx.Node, str] = {}
    free: set[fx.Node] = set()
    late: set[fx.Node] = set()
    helpers: set[fx.Node] = set()
    sequence: list[fx.Node] = []
    backward: list[fx.Node] = []
    for node in program.gm.graph.nodes:
        source = sources.get(node.name)
        ins = node.all_input_nodes
        if source is not None and source.kind == "param":
            parameter[node] = source.name
        elif source is not None and source.phase == BACKWARD:
            late.add(node)
        elif node.op == "get_attr" or (source is not None and _at_hand(source, changed)):
            free.add(node)
        elif node.op == "call_function" and not is_op(node):
            for sort in (free, late, helpers):
                if ins[0] in sort:
                    sort.add(node)
            if ins[0] in parameter:
                parameter[node] = parameter[ins[0]]
        elif node.op == "call_function":
            if any(n in late for n in ins):
                late.add(node)
                backward.append(node)
            elif node.target in LOOKS and len(ins) == 1 and ins[0] in parameter:
                parameter[node] = parameter[ins[0]]
            elif all(n in free for n in ins):
                free.add(node)
            elif node.meta.get("phase") == BACKWARD:
                helpers.add(node)
            else:
                sequence.append(node)
    return Regions(program, tuple(sequence), tuple(backward), parameter, free, late, helpers)


def _at_hand(source: Source, changed: set[str]) -> bool:
    """Whether every stage has the source, unchanged, at every micro-batch. Seeds are not: nothing is drawn twice."""
    return source.kind in ("input", "constant") or (source.kind == "buffer" and source.name not in changed)


def closure(wanted: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """`wanted` of `inside`, and all that they are computed from there."""
    found: set[fx.Node] = set()
    stack = [n for n in wanted if n in inside]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(n for n in node.all_input_nodes if n in inside)
    return found


def nbytes(values: Iterable[Value]) -> int:
    """Bytes of the values."""
    return sum(v.val.numel() * v.val.dtype.itemsize for v in values)


__all__ = ["Reads", "Regions", "closure", "nbytes", "regions_of"]
