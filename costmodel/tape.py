"""What one rank executes under a plan, as a list of events on buffers: the lowering in outline, without a graph.

It follows `passes/`: operands are brought to the spec that their reader wants, once for all readers; collectives stage
their pieces; small gathers of parameters and reductions of gradients travel in buckets; what the backward needs is
saved or computed again. `costmodel.liveness` walks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from autopar.buffers import read_besides
from autopar.compression import BF16
from autopar.costmodel.items import Item, Items, Meta, Tensor
from autopar.costmodel.legal import Specs, storage_of
from autopar.graph import BACKWARD, FORWARD, MOVES, VIEWS, op_name
from autopar.linear import THIN
from autopar.offload import COPIES, FETCH, OFFLOAD
from autopar.plan import DEVICE, Plan
from autopar.precision import ADDED
from autopar.reshard import Step, steps
from autopar.spec import R, Spec, local_shape

aten = torch.ops.aten
#: A copy only if the operand has strides.
MAYBE = frozenset({aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default})
#: Of moves, which the backward does again (as `passes/partition.py`), what makes no more of a tensor than there is: the
#: backward's may be done by the forward (likewise).
_CUTS = (VIEWS - {aten.expand.default, aten.unfold.default}) | MAYBE
#: Kernels that are given contiguous operands (as `passes/localise.py`).
_CONTIGUOUS = ("flash_attention_for_cpu", "layer_norm", "group_norm", "embedding_dense_backward", "softmax_backward")
#: Written over an operand that dies; dense results; results as dense as their operands (as `passes/inplace.py`).
_OVER = frozenset({aten.add.Tensor, aten.mul.Tensor})
_DENSE = frozenset(
    {
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.cat.default, aten.embedding.default,
        aten.embedding_dense_backward.default,
    }
)  # fmt: skip
_POINTWISE = _OVER | {
    aten.sub.Tensor, aten.div.Tensor, aten.neg.default, aten.silu.default, aten.gelu.default,
    aten.gelu_backward.default, aten.silu_backward.default,
}  # fmt: skip
#: Kinds of placeholders that outlive the step.
HELD = {"param": "parameters", "buffer": "buffers", "input": "inputs"}


#: Bytes of an element of a gradient that was cast to travel.
HALF_BYTES = 2


@dataclass(eq=False)
class Buffer:
    """A tensor on one rank. `base`: whose memory it is (itself, or what it is a view of)."""

    size: float
    ins: tuple[Buffer, ...] = field(default=(), repr=False)  # a whole history: printing it would not end
    alias: bool = False
    free: bool = False  # computing it again costs no arithmetic
    held: str = ""  # kind of memory, of a placeholder
    kind: str = "transient"
    strided: bool = False
    dense: bool = False  # known to be contiguous, so that it may be written over
    late: bool = False  # made by the backward, which knows nothing of the strides of what it is given
    product: bool = False  # of matrices: written where it is wanted
    #: What travels to make it: held until it has arrived, at its first reader.
    sent: tuple[Buffer, ...] = field(default=(), repr=False)

    @property
    def base(self) -> Buffer:
        """The buffer whose memory this is."""
        found = self
        while found.alias:
            found = found.ins[0]
        return found


@dataclass(eq=False)
class Event:
    """Something runs: reads `ins`, makes `outs`.

    ahead: it starts a gather or all-to-all. down, up: a copy to the host, or from there. over: the result may take the
    memory of an operand that dies with it. lands: a reduction in place ends. cuts: a local chunk or view of it.
    """

    ins: tuple[Buffer, ...]
    outs: tuple[Buffer, ...]
    ahead: bool = False
    down: bool = False
    up: bool = False
    over: bool = False
    lands: bool = False
    cuts: bool = False


@dataclass(eq=False)
class Travel:
    """A gather of a parameter, or a reduction of a gradient: may share a bucket with others of its key and level.

    level: numbers of such gathers, or of collectives, before and behind it, as `passes/bucket.py` counts.
    """

    source: Buffer
    out: Buffer
    sent: float
    received: float
    key: tuple[object, ...]
    moved: bool  # the result is copied into place
    copied: bool  # the operand is copied before it is sent alone; into a bucket, all are
    exchanged: bool = False  # all that is summed arrives here
    level: tuple[int, int] = (0, 0)
    part: float = 1.0  # of its bytes that travel: less where a gradient is cast for it (`passes/compress.py`)

    @property
    def ins(self) -> tuple[Buffer, ...]:
        """As of an Event."""
        return (self.source,)

    @property
    def outs(self) -> tuple[Buffer, ...]:
        """As of an Event."""
        return (self.out,)


@dataclass
class Tape:
    """Events by phase.

    Attributes:
        copies: as of the plan.
        owner: the number of the op for which an event is there.
        made: what holds a tensor where it is made. brought: and where it has been brought, by spec and phase.
        outputs: what the forward hands out, and, for as long, new values of buffers whose old ones are kept. written:
            other new values of buffers, which are let go of when they have been written there.
        sent_back: of a stage of a pipeline: gradients that the stage before waits for.
    """

    forward: list[Event | Travel] = field(default_factory=list)
    backward: list[Event | Travel] = field(default_factory=list)
    placeholders: list[Buffer] = field(default_factory=list)
    outputs: list[Buffer] = field(default_factory=list)
    written: list[Buffer] = field(default_factory=list)
    sent_back: list[Buffer] = field(default_factory=list)
    grads: list[Buffer] = field(default_factory=list)
    owner: dict[Event | Travel, int] = field(default_factory=dict)
    made: dict[Tensor, Buffer] = field(default_factory=dict)
    brought: dict[tuple[Tensor, Spec, str], Buffer] = field(default_factory=dict)
    copies: int = COPIES

    def of(self, phase: str) -> list[Event | Travel]:
        """The events of a phase."""
        return self.backward if phase == BACKWARD else self.forward


def record(
    items: Items, plan: Plan, specs: Specs, gloo: bool = False, weights_from: float | None = None
) -> Tape:  # fmt: skip
    """The tape of one rank under `plan`; buckets are not packed yet. gloo, weights_from: as of `Device`."""
    return _Recorder(items, plan, specs, gloo, weights_from).run()


class _Recorder:
    def __init__(self, items: Items, plan: Plan, specs: Specs, gloo: bool, weights_from: float | None) -> None:
        self.items, self.plan, self.specs, self.gloo = items, plan, specs, gloo
        self.weights_from = math.inf if weights_from is None else weights_from
        self.sizes = plan.mesh.sizes
        self.tape = Tape(copies=plan.copies)
        self.at, self.made = self.tape.brought, self.tape.made
        self.again: set[int] = set()  # parameters that are gathered for each phase
        self.stored: set[Buffer] = set()  # what comes out of placeholders by moves and gathers
        self._bytes: dict[tuple[Meta, Spec], float] = {}
        self.read = set(read_besides(items.program))
        self.sinks: dict[int, list[Item]] = {}
        for item in items.items:
            if item.kind in ("grad", "output", "buffer_new"):
                self.sinks.setdefault(item.ins[0].item, []).append(item)

    def run(self) -> Tape:
        seen = {id(events): 0 for events in (self.tape.forward, self.tape.backward)}
        for item in self.items.items:
            if item.kind == "op":
                self._op(item)
            elif item.ins:
                continue  # a sink: brought home right behind its producer
            else:
                self._source(item)
            for sink in self.sinks.get(item.index, ()):
                self._sink(sink)
            for events in (self.tape.forward, self.tape.backward):
                self.tape.owner.update(dict.fromkeys(events[seen[id(events)] :], item.index))
                seen[id(events)] = len(events)
        self._levels()
        return self.tape

    def _levels(self) -> None:
        """The levels of gathers, which later moves and gathers of what they bring decide too."""
        inside = [e for e in (*self.tape.forward, *self.tape.backward) if any(x in self.stored for x in e.outs)]
        before: dict[Buffer, int] = {}
        behind: dict[Buffer, int] = {}
        for event in inside:
            count = max((before.get(x, 0) for x in event.ins), default=0) + isinstance(event, Travel)
            before.update(dict.fromkeys(event.outs, count))
        for event in reversed(inside):
            count = max(behind.get(x, 0) for x in event.outs) + isinstance(event, Travel)
            behind.update({x: max(behind.get(x, 0), count) for x in event.ins})
        for event in inside:
            if isinstance(event, Travel):
                event.level = before[event.out], behind.get(event.out, 0)

    def _source(self, item: Item) -> None:
        if not item.outs or item.outs[0] is None:
            return
        tensor, spec = Tensor(item.index, 0), self.specs.outs[item.index][0]
        size = self._size(item.outs[0], spec)
        buffer = Buffer(size, held=HELD.get(item.kind, "inputs"), free=True)
        if item.kind == "param":
            if storage_of(self.plan, item).gather == "twice":
                self.again.add(item.index)
        buffer.kind = buffer.held
        self.tape.placeholders.append(buffer)
        self.stored.add(buffer)
        self.made[tensor] = buffer

    def _op(self, item: Item) -> None:
        assert item.node is not None
        target, phase = item.node.target, item.phase
        leaves = ADDED in item.node.meta  # what is read is a gradient, on its way to where it is stored
        ins = [self._bring(t, s, phase, leaves) for t, s in zip(item.ins, self.specs.ins[item.index])]
        events = self.tape.of(phase)
        if any(part in op_name(item.node) for part in _CONTIGUOUS):
            for i, x in enumerate(ins):
                if x.strided:
                    ins[i] = Buffer(x.size, (x,), free=True)
                    events.append(Event((x,), (ins[i],)))
        apart = target is aten.mm.default and ins[0].strided and self._by_onednn(item)
        given: tuple[Buffer, ...] = ()
        if apart:
            given = (ins[0],)  # by the caller, until the product is there
            ins[0] = Buffer(ins[0].size, given)
            events.append(Event(given, (ins[0],)))
        view = target in VIEWS or (target in MAYBE and bool(ins) and not ins[0].strided)
        vals = item.node.meta["val"]
        vals = vals if isinstance(vals, (tuple, list)) else (vals,)
        outs = []
        free = target in MOVES or not ins
        for index, (meta, spec) in enumerate(zip(item.outs, self.specs.outs[item.index])):
            if meta is None:
                continue
            val = vals[index]
            if view and target is aten.view.default and ins[0].strided and not _viewable(ins[0], val):
                view = False
            strided = bool(isinstance(val, torch.Tensor) and not val.is_contiguous())
            out = Buffer(self._size(meta, spec), tuple(ins), view and bool(ins), free, strided=strided)
            out.late = phase == BACKWARD
            out.dense = target in _DENSE or (_dense(target, ins, out) and not strided)
            out.product = target is aten.mm.default and not apart
            if target is OFFLOAD:
                out.size, out.sent = 0.0, (ins[0].base,)  # on the device it takes nothing
            self.made[Tensor(item.index, index)] = out
            outs.append(out)
            if free and ins and all(x in self.stored for x in ins):
                self.stored.add(out)
        cuts, down, up = bool(ins) and target in _CUTS, target is OFFLOAD, target is FETCH
        events.append(Event((*ins, *given), tuple(outs), down=down, up=up, over=target in _OVER, cuts=cuts))

    def _by_onednn(self, item: Item) -> bool:
        """Whether a gradient of a weight is (as `passes/products.py`): of a copy of its operand, and not in place."""
        (left, right), out = self.specs.ins[item.index], item.outs[0]
        assert out is not None
        rows, inner = local_shape(item.in_meta[0].shape, left, self.sizes)
        columns = local_shape(item.in_meta[1].shape, right, self.sizes)[1]
        enough = 2.0 * rows * inner * columns >= self.weights_from
        return enough and min(inner, columns) >= THIN and out.dtype is torch.float32

    def _sink(self, item: Item) -> None:
        tensor, spec = item.ins[0], self.specs.ins[item.index][0]
        if item.kind != "grad":
            sent, tape = self._bring(tensor, spec, item.phase), self.tape
            kept = tape.written if item.kind == "buffer_new" and item.name not in self.read else tape.outputs
            (tape.sent_back if item.phase == BACKWARD else kept).append(sent)
            return
        param = self.items.items[self.items.param[item.name]]
        if storage_of(self.plan, param).reduce == "all_reduce" and not any(p.kind == "P" for p in spec):
            home = self.specs.outs[tensor.item][tensor.index]
            mid = tuple(R if p.kind == "P" else p for p in home)
            reduced = self._bring(tensor, mid, BACKWARD, grad=True)
            out = self._move(self.items.meta(tensor), reduced, mid, spec, BACKWARD, grad=True)
        else:
            out = self._bring(tensor, spec, BACKWARD, grad=True)
        out.base.kind = "gradients"
        if storage_of(self.plan, param).state == DEVICE:
            self.tape.grads.append(out)
        else:
            self.tape.backward.append(Event((out,), ()))  # copied down, and let go of

    # ---- communication -----------------------------------------------------------------------------------------

    def _bring(self, tensor: Tensor, spec: Spec, phase: str, grad: bool = False) -> Buffer:
        home = self.specs.outs[tensor.item][tensor.index]
        if spec == home:
            return self.made[tensor]
        apart = tensor.item in self.again
        for place in (phase, FORWARD) if phase == BACKWARD and not apart else (phase,):
            found = self.at.get((tensor, spec, place))
            if found is not None:
                return found
        out = self._move(self.items.meta(tensor), self.made[tensor], home, spec, phase, grad, apart)
        self.at[tensor, spec, phase] = out
        return out

    def _move(
        self, meta: Meta, x: Buffer, src: Spec, dst: Spec, phase: str, grad: bool = False, apart: bool = False
    ) -> Buffer:
        moves = steps(meta.shape, src, dst, self.sizes)
        before, behind = 0, sum(s.kind != "local_chunk" for s in moves)
        for step in moves:
            behind -= step.kind != "local_chunk"
            x = self._step(step, meta.itemsize, x, phase, grad, apart, (before, behind))
            before += step.kind != "local_chunk"
        return x

    def _step(
        self, step: Step, itemsize: int, x: Buffer, phase: str, grad: bool, apart: bool, level: tuple[int, int]
    ) -> Buffer:  # fmt: skip
        before, after = (math.prod(n) * itemsize for n in (step.before, step.after))
        events = self.tape.of(phase)
        out = Buffer(after, (x,), free=step.kind == "local_chunk", dense=True, late=phase == BACKWARD)
        if step.kind == "local_chunk":
            events.append(Event((x,), (out,), cuts=True))
            if x in self.stored:
                self.stored.add(out)
            return out
        gather, reduction = step.kind == "all_gather" and x in self.stored, grad and bool(step.reduce)
        if x.strided and step.kind != "all_to_all" and not gather:
            copy = Buffer(x.size, (x,), free=True, kind="collectives")
            events.append(Event((x,), (copy,)))
            x, out.ins = copy, (copy,)
        key = (step.kind, step.axis, step.reduce, itemsize, phase, apart)
        scatter = step.kind == "reduce_scatter"
        exchanged = scatter and self.gloo
        if gather or reduction:
            copied = x.strided if gather else scatter and step.stacks
            half = reduction and step.reduce == "sum" and self.plan.compression == BF16
            part = min(1.0, HALF_BYTES / itemsize) if half else 1.0
            events.append(Travel(x, out, before, after, key, step.unpacks, copied, exchanged, level, part))
            if gather:
                out.kind = "gathered"
                self.stored.add(out)
            return out
        if step.stacks:
            stack = Buffer(before, (x,), free=True, kind="collectives")
            events.append(Event((x,), (stack,)))
            x = stack
        if step.kind in ("all_gather", "all_to_all"):
            # What arrives, and what unpacks it: a copy unless the pieces lie in place.
            staged = Buffer(after, (x,), kind="collectives", sent=(x,))
            events.append(Event((x,), (staged,), ahead=True))
            out.ins, out.alias = (staged,), not step.unpacks
            events.append(Event((staged,), (out,)))
        elif exchanged:
            arrived = Buffer(before, (x,), kind="collectives", sent=(x,))
            out.ins = (arrived,)
            events += [Event((x,), (arrived,)), Event((arrived,), (out,))]
        else:
            events.append(Event((x,), (out,), over=step.kind == "all_reduce"))
        return out

    def _size(self, meta: Meta, spec: Spec) -> float:
        key = (meta, spec)
        found = self._bytes.get(key)
        if found is None:
            found = self._bytes[key] = float(math.prod(local_shape(meta.shape, spec, self.sizes)) * meta.itemsize)
        return found


def _dense(target: object, ins: Sequence[Buffer], out: Buffer) -> bool:
    """Whether the result is as dense as its operands are, as far as its own half of the step knows."""
    if out.alias or target is aten.clone.default:
        same = list(ins[:1])
    else:
        same = [x for x in ins if x.size == out.size] if target in _POINTWISE else []
    return bool(same) and all(x.dense and x.late == out.late for x in same)


def _viewable(x: Buffer, val: object) -> bool:
    """Whether torch made `val` of a strided operand without a copy; capture saw the same strides."""
    return isinstance(val, torch.Tensor) and not val.is_contiguous()


__all__: Sequence[str] = ["HELD", "MAYBE", "Buffer", "Event", "Tape", "Travel", "record"]
