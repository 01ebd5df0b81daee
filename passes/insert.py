"""From the global graph and a plan to the local graph: the only place that decides where communication stands.

Every op is emitted at its local shape (`passes/localise.py`); where an operand lies otherwise than the op's choice
asks, the steps of `autopar.reshard` are put in between. What has once been brought to a spec is reused by every later
reader, so that a tensor travels once per (value, spec): the forward's copy serves the backward too. The exception is a
parameter stored with gather "twice" (ZeRO-3): its backward readers bring it again, and the forward's copy can be freed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.compression import Compression
from autopar.errors import PlanError, RuleError
from autopar.graph import BACKWARD, FORWARD, Draft, Program, Sink, Source, Value, is_op, operands, resolve, results
from autopar.mesh import Mesh
from autopar.offload import HOSTED
from autopar.passes.localise import LocalCall, emit
from autopar.passes.redistribute import redistribute
from autopar.plan import Plan
from autopar.recompute import recomputed
from autopar.rule import WHOLE, BoundRule, Choice, following
from autopar.spec import R, Spec, format_spec, is_valid, local_shape

#: The bound rule of an op node; the driver passes `autopar.costmodel.rules.rule_for`.
RuleOf = Callable[[fx.Node], BoundRule]


@dataclass(frozen=True)
class LocalProgram:
    """A local graph with symbolic collectives, the same for every rank.

    Placeholders and outputs are those of the program, in its order, each in the spec given here.
    """

    gm: fx.GraphModule
    program: Program
    mesh: Mesh
    source_specs: tuple[Spec, ...]
    sink_specs: tuple[Spec, ...]


def insert_collectives(program: Program, plan: Plan, rule_of: RuleOf, defer: bool = False) -> LocalProgram:
    """Build the local graph of `program` under `plan`.

    defer: gradients will be added up over micro-batches, and are left unreduced on axes where their parameter is whole.

    Raises:
        PlanError: a choice of the plan is not legal; names the op, the choice and the reason.
        SpecError: a redistribution the plan implies cannot be made.
    """
    return _Inserter(recomputed(program, plan.saved), plan, rule_of, defer).run()


class _Inserter:
    def __init__(self, program: Program, plan: Plan, rule_of: RuleOf, defer: bool) -> None:
        self.program, self.plan, self.rule_of, self.defer = program, plan, rule_of, defer
        self.mesh, self.sizes = plan.mesh, plan.mesh.sizes
        self.compression = Compression.parse(plan.compression)
        self.whole: Spec = (R,) * len(self.sizes)
        self.graph = fx.Graph()
        self.home: dict[Value, Spec] = {}  # where each value is produced
        self.at: dict[tuple[Value, Spec, str], fx.Node] = {}  # what is at hand: (value, spec, phase it was brought in)
        self.regather: set[Value] = set()

    def run(self) -> LocalProgram:
        nodes = {n.name: n for n in self.program.gm.graph.nodes}
        ends: list[tuple[Any, Spec]] = [(sink.constant, self.whole) for sink in self.program.sinks]
        readers: dict[fx.Node, list[int]] = {}
        for i, sink in enumerate(self.program.sinks):
            if sink.node is not None:
                readers.setdefault(resolve(nodes[sink.node]).node, []).append(i)
        source_specs = [self._source(nodes[s.node], s) for s in self.program.sources]
        constants = {}
        for node in self.program.gm.graph.nodes:
            if node.op == "get_attr":
                local = self.graph.get_attr(str(node.target))
                local.meta.update(node.meta)
                constants[str(node.target)] = getattr(self.program.gm, str(node.target))
                self._own(Value(node, 0), self.whole, local)
            elif is_op(node):
                self._op(node)
            # What leaves is brought home at once: an unreduced gradient need not live on.
            for i in readers.get(node, ()):
                sink = self.program.sinks[i]
                ends[i] = self._sink(sink, Value(node, resolve(nodes[str(sink.node)]).index or sink.index))
        self.graph.output(tuple(local for local, _ in ends))
        self.graph.eliminate_dead_code()
        gm = Draft(constants, self.graph)
        return LocalProgram(gm, self.program, self.mesh, tuple(source_specs), tuple(spec for _, spec in ends))

    def _source(self, node: fx.Node, source: Source) -> Spec:
        kind, name, spec = source.kind, source.name, self.whole
        if kind in ("param", "buffer"):
            spec = self.plan.stored(name).spec
            if self.plan.stored(name).gather == "twice":
                self.regather.add(Value(node, 0))
        elif kind == "input":
            spec = self.plan.inputs.get(name, self.whole)
        shape = Value(node, 0).shape
        self._check(spec, shape, f"{kind} {name}")
        local = self.graph.placeholder(node.name)
        local.meta["phase"] = source.phase
        piece = local_shape(shape, spec, self.sizes)
        local.meta["val"] = torch.empty(piece, dtype=node.meta["val"].dtype, device="meta")
        self._own(Value(node, 0), spec, local)
        return spec

    def _own(self, value: Value, spec: Spec, local: fx.Node) -> None:
        self.home[value] = spec
        self.at[value, spec, FORWARD] = self.at[value, spec, BACKWARD] = local

    def _op(self, node: fx.Node) -> None:
        address = node.meta["address"]
        bound = self.rule_of(node)
        choices = self._choices(node, address, bound)
        try:
            columns = [bound.placements(c if n > 1 else WHOLE) for c, n in zip(choices, self.sizes)]
        except RuleError as error:
            raise PlanError(f"plan is not legal at {address}: {error}") from None
        if not bound.fits(choices, self.sizes):
            text, factors = " ".join(str(c) for c in choices), dict(bound.sizes)
            raise PlanError(f"plan is not legal at {address}: '{text}' does not divide {factors} on {self.mesh}")
        in_specs = tuple(tuple(ins[i] for ins, _ in columns) for i in range(len(bound.ins)))
        out_specs = tuple(tuple(outs[i] for _, outs in columns) for i in range(len(bound.outs)))
        values, outs = operands(node), results(node)
        for i, (spec, value) in enumerate(zip(in_specs, values)):
            self._check(spec, value.shape, f"operand {i} of {address}")
        for i, (spec, val) in enumerate(zip(out_specs, outs)):
            if val is not None:
                self._check(spec, tuple(val.shape), f"result {i} of {address}")
        phase = node.meta["phase"]
        locals_ = [self._bring(v, s, phase, address) for v, s in zip(values, in_specs)]
        call = LocalCall(bound, choices, in_specs, out_specs, self.mesh)
        for i, local in enumerate(emit(self.graph, node, locals_, call)):
            if local is not None:
                self._own(Value(node, i), out_specs[i], local)

    def _choices(self, node: fx.Node, address: str, bound: BoundRule) -> tuple[Choice, ...]:
        """What the plan has an op do: what waits on the host lies there as it was made, unless the plan names it."""
        if node.target in HOSTED and self.plan.named(address) is None:
            return following(bound, self.home[operands(node)[0]])
        return self.plan.choice(address)

    def _bring(self, value: Value, spec: Spec, phase: str, reader: str) -> fx.Node:
        """The local node that holds `value` in `spec`, made if it is not at hand."""
        places = (phase, FORWARD) if phase == BACKWARD and value not in self.regather else (phase,)
        for place in places:
            found = self.at.get((value, spec, place))
            if found is not None:
                return found
        home = self.home[value]
        for have, want, name in zip(home, spec, self.mesh.names):
            if want.kind == "P" and have != want and self.mesh.sizes[self.mesh.axis(name)] > 1:
                raise PlanError(
                    f"plan is not legal at {reader}: it lets a partial value through on axis {name}, "
                    f"but {value.node.name} is produced as {format_spec(home, len(value.shape), self.mesh.names)}"
                )
        start = self.at[value, home, phase]
        before = len(self.graph.nodes)
        local = redistribute(self.graph, start, value.shape, home, spec, self.mesh)
        if len(self.graph.nodes) > before:
            marks = {"regather": True} if value in self.regather and phase == BACKWARD else {}
            _mark(start, local, phase, marks)
        self.at[value, spec, phase] = local
        return local

    def _sink(self, sink: Sink, value: Value) -> tuple[fx.Node, Spec]:
        phase, spec = sink.phase, self.whole
        if sink.kind == "output":
            spec = self.plan.outputs.get(sink.name, self.whole)
        elif sink.kind == "grad":
            spec = self.plan.stored(sink.name).spec
            self._check(spec, value.shape, f"gradient of {sink.name}")
            left = self._left(value, spec)
            if self.defer:
                spec = tuple(h if h.kind == "P" and s.kind == "R" else s for h, s in zip(self.home[value], spec))
            elif left != spec:
                spec = left
            elif self.plan.stored(sink.name).reduce == "all_reduce":
                reduced = tuple(R if p.kind == "P" else p for p in self.home[value])
                local = self._bring(value, reduced, phase, f"gradient of {sink.name}")
                # ZeRO-1 asked for the whole gradient: the two steps are not to be merged into a scatter.
                _mark(self.at[value, self.home[value], phase], local, phase, {"keep": True})
                out = redistribute(self.graph, local, value.shape, reduced, spec, self.mesh)
                _mark(local, out, phase, {})
                return out, spec
        self._check(spec, value.shape, f"{sink.kind} {sink.name}")
        return self._bring(value, spec, phase, f"{sink.kind} {sink.name}"), spec

    def _left(self, value: Value, stored: Spec) -> Spec:
        """Where a gradient is left for the runtime to compress and reduce; `stored` if that is not what it does."""
        val = value.node.meta["val"]
        val = val[value.index] if isinstance(val, (tuple, list)) else val
        if self.compression is None or not val.dtype.is_floating_point:
            return stored
        return self.compression.left(value.shape, self.home[value], stored, self.sizes)

    def _check(self, spec: Spec, shape: tuple[int, ...], what: str) -> None:
        if not is_valid(shape, spec, self.sizes):
            text = format_spec(spec, len(shape), self.mesh.names)
            raise PlanError(f"plan is not legal at {what}: shape {shape} cannot be split as {text} on {self.mesh}")


def _mark(start: fx.Node, end: fx.Node, phase: str, marks: dict[str, bool]) -> None:
    """Give phase and marks to the chain of nodes that leads from `start` (not included) to `end`."""
    node = end
    while node is not start:
        node.meta["phase"] = phase
        node.meta.update(marks)
        node = node.all_input_nodes[0]
