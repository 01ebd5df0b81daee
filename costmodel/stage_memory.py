"""What the stages of a pipeline hold, to the byte: each stage's own program, walked as its rank runs it.

`costmodel.pieces` adds numbers of pieces up, for every stage that there might be; here a few stages are looked at as
they are: with their own copies in the backward, buckets and gathers. A gradient is added to the sum of those of the
micro-batches before, and left unreduced on axes where its parameter is whole (`passes.insert`, defer) until all are
added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.costmodel.devices import Device
from autopar.costmodel.items import Item, Items, Tensor, items_of
from autopar.costmodel.legal import Specs, plan_specs
from autopar.costmodel.liveness import BUCKET_BYTES, PENDING_BYTES, Steps, scratch
from autopar.costmodel.memory import Policy
from autopar.costmodel.stage_plans import stage_plans
from autopar.costmodel.stages_chain import Option
from autopar.costmodel.tape import Buffer, record
from autopar.graph import Program
from autopar.pipeline.cut import Stage
from autopar.plan import Plan
from autopar.spec import Spec, local_shape

#: Sends of a rank that may be on their way (`autopar.runtime.executor`).
IN_FLIGHT = 16


@dataclass(frozen=True)
class Held:
    """Bytes of one rank of a stage.

    Attributes:
        static: parameters, optimizer state, buffers, and the sum of gradients if there are several micro-batches.
        saved: of every micro-batch in flight, messages that it came with included.
        transient: beside these, at most, while an action of the stage runs; with the batch.
    """

    static: float
    saved: float
    transient: float

    def into(self, option: Option) -> Option:
        """An option with these bytes; what waits for weight gradients stays as it is."""
        return replace(
            option, static_bytes=self.static, saved_bytes=self.saved, transient_bytes=self.transient
        )  # fmt: skip


def held(
    program: Program, plan: Plan, stages: Sequence[Stage], micro: int, device: Device, copies: int = 0
) -> list[Held]:
    """Of every stage of `program`, which is of one micro-batch, under `plan`, of the mesh of a stage.

    stages: the program, cut. copies: of its parameters that a rank keeps besides.

    Raises:
        PlanError: the plan is not legal.
    """
    given = 0.0
    for source in program.of_kind("input"):
        val, spec = program.node(source.node).meta["val"], plan.inputs.get(source.name)
        piece = tuple(val.shape) if spec is None else local_shape(tuple(val.shape), spec, plan.mesh.sizes)
        # The batch, and this rank's pieces of it.
        given += micro * val.dtype.itemsize * float(val.numel() + math.prod(piece))
    return [
        _Stage(stage, mine, micro, device, copies, given).held()
        for stage, mine in zip(stages, stage_plans(program, plan, stages))
    ]


class _Stage:
    def __init__(self, stage: Stage, plan: Plan, micro: int, device: Device, copies: int, given: float) -> None:
        self.stage, self.plan, self.micro, self.device = stage, plan, micro, device
        self.copies, self.given = copies, given
        self.items = items_of(stage.program, plan.saved)
        self.specs, self.plan = _deferred(self.items, plan)
        self.tape = record(self.items, self.plan, self.specs, device.gloo, device.weights_from)
        self.policy = Policy(stage.program.training, optimizer=plan.optimizer)

    def held(self) -> Held:
        slack = 1 + self.device.slack
        steps = Steps(self.tape)
        kept, early, late = steps.micro_batch()
        read = {x.base for event in steps.backward for x in event.ins}
        received = {self._source(name): self._bytes(name) for name in self.stage.receives}
        back = sum(map(self._bytes, self.stage.receives_back))
        whole = sum(received.values())
        come = whole if read.intersection(received) else 0.0  # tensors of one message are views of one buffer
        saved = kept + come
        # A message is on its way here while the one before is worked on.
        ahead = 0.0 if self.device.gloo else whole  # gloo's place is taken by what has been sent: `_leaving`
        transient = max(early + whole - saved + back, late - kept + back + ahead, self._end() - saved)
        return Held(slack * self._static(), slack * saved, slack * (max(transient, 0.0) + self.given))

    def _source(self, name: str) -> Buffer:
        return self.tape.made[Tensor(self._input(name).index, 0)]

    def _input(self, name: str) -> Item:
        return next(i for i in self.items.items if i.kind == "input" and i.name == name)

    def _bytes(self, name: str) -> float:
        item = self._input(name)
        return self._size(item, self.specs.outs[item.index][0])

    def _size(self, item: Item, spec: Spec) -> float:
        meta = item.outs[0]
        assert meta is not None
        return float(math.prod(local_shape(meta.shape, spec, self.plan.mesh.sizes)) * meta.itemsize)

    def _static(self) -> float:
        """What is there all the time."""
        total = self._leaving()
        for item in self.items.items:
            if item.kind == "param":
                stored = self.policy.stored(item, self.specs.outs[item.index][0], self.plan.mesh.sizes)
                total += stored["parameters"] * (1 + self.copies) + stored["optimizer"]
            elif item.kind == "buffer":
                total += self._size(item, self.specs.outs[item.index][0])
            elif item.kind == "grad" and self.micro > 1:
                total += self._sunk(item)
        return total

    def _sunk(self, item: Item) -> float:
        """Bytes of what leaves: a gradient, as it is added up, or what is sent."""
        (meta,), (spec,) = item.in_meta, self.specs.ins[item.index]
        return float(math.prod(local_shape(meta.shape, spec, self.plan.mesh.sizes)) * meta.itemsize)

    def _leaving(self) -> float:
        """Messages that are sent and not waited for: gloo does not tell before that one has arrived."""
        ways = (self.stage.sends, self.stage.sends_back)
        sent = {i.name: self._sunk(i) for i in self.items.items if i.kind == "output"}
        sizes = [sum(sent[name] for name in names) for names in ways]
        most = (IN_FLIGHT + 1) // max(sum(map(bool, sizes)), 1)
        # When the last gradient is sent back, little else is there any more.
        going = min(self.micro, most) * sizes[0] + min(self.micro - 1, most) * sizes[1]
        return going if self.device.gloo else 0.0

    def _end(self) -> float:
        """When no micro-batch is in flight: the buckets that reduce the sums, or the update."""
        unreduced = (
            i for i in self.items.items if i.kind == "grad" and any(p.kind == "P" for p in self.specs.ins[i.index][0])
        )
        small = sum(size for size in map(self._sunk, unreduced) if size < BUCKET_BYTES)
        return max(min(small, PENDING_BYTES), scratch(self.items, self.plan, self.specs, self.policy, self.device.gloo))


def _deferred(items: Items, plan: Plan) -> tuple[Specs, Plan]:
    """Gradients as they are added up: unreduced where the parameter is whole; the rest is scattered at once."""
    specs = plan_specs(items, plan)
    ins = list(specs.ins)
    for item in items.items:
        if item.kind == "grad":
            made = specs.outs[item.ins[0].item][item.ins[0].index]
            ins[item.index] = (
                tuple(h if h.kind == "P" and s.kind == "R" else s for h, s in zip(made, ins[item.index][0])),
            )
    storage = {name: replace(s, reduce="reduce_scatter") for name, s in plan.storage.items()}
    return Specs(ins, specs.outs), replace(plan, storage=storage)


__all__ = ["Held", "held"]
