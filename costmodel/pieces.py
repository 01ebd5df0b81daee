"""A program as a chain of pieces that pipeline stages are made of: where it may be cut, and what each piece costs.

Places to cut at are the gaps of the forward's sequence over which few bytes go: those that no gap in the neighbourhood
(a quarter of a stage's computation to either side) beats, so that no block is cut in the middle for the last per cent
of balance. What a piece costs is priced as the planner prices: seconds of its ops and of the communication that they
wait for, bytes by the specs of its tensors. All of it is of one micro-batch under one plan of the ranks of a stage.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import fx

from autopar.costmodel import liveness
from autopar.costmodel.copies import Copies
from autopar.costmodel.devices import Device, machine
from autopar.costmodel.items import Items, Tensor, items_of
from autopar.costmodel.legal import Specs, plan_specs
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.simulate import run
from autopar.costmodel.stages_chain import Additive, Option, Twice
from autopar.costmodel.tasks import Tasks
from autopar.graph import VIEWS, Program, Value, resolve
from autopar.offload import OFFLOAD
from autopar.pipeline.assign import Assignment, assign
from autopar.pipeline.regions import Regions, nbytes, regions_of
from autopar.plan import Plan
from autopar.recompute import traveller
from autopar.spec import local_shape

#: A gap with so much more bytes than the least in the neighbourhood is as good.
_TOLERANCE = 1.001


@dataclass(frozen=True)
class Pieces:
    """A chain, and where its pieces begin.

    Attributes:
        starts: addresses of the first ops of pieces 1, 2, ...
        crossing: names and bytes of what crosses the gap before each of them.
        again: seconds of a micro-batch in which every piece computes again what its forward has not kept.
    """

    chain: Additive
    starts: tuple[str, ...]
    crossing: tuple[tuple[tuple[str, int], ...], ...]
    again: tuple[float, ...]


def pieces_of(
    program: Program,
    plan: Plan,
    device: str | Device,
    *,
    stages: int,
    micro: int,
    starts: Sequence[str] = (),
    copies: int = 0,
) -> Pieces:
    """The pieces of `program`, which is of one micro-batch, under `plan`, of the mesh of a stage.

    stages: how many there will be at most: places to cut at are chosen for that. micro: micro-batches of a batch.
    starts: addresses at which pieces begin, if that is settled. copies: of its parameters that a rank keeps besides.
    """
    return _Pieces(program, plan, device, stages, micro, starts, copies).run()


class _Pieces:
    def __init__(
        self,
        program: Program,
        plan: Plan,
        device: str | Device,
        stages: int,
        micro: int,
        starts: Sequence[str],
        copies: int,
    ) -> None:
        self.starts = frozenset(starts)
        self.plan, self.stages, self.micro, self.copies = plan, stages, micro, copies
        self.policy = Policy(program.training, optimizer=plan.optimizer)
        self.items: Items = items_of(program, plan.saved)
        self.program = program
        self.specs: Specs = plan_specs(self.items, plan)
        self.where = machine(device, plan.mesh)
        # Cut is what there is before anything is computed again: a copy goes with its op.
        self.regions: Regions = regions_of(program)
        self.index = {i.node.name: i.index for i in self.items.items if i.node is not None}
        self.again = Copies(self.items.program) if plan.saved else None
        self.nodes = {i.name: i.node for i in self.items.items if i.kind == "op"}
        compute = Compute(self.items, self.where)
        self.tasks = Tasks(self.items, plan, self.specs, compute, self.where)
        self.timeline = run(self.items, plan, self.specs, compute, self.policy)

    def run(self) -> Pieces:
        seconds, late = self._seconds()
        sequence, live = self.regions.sequence, self.regions.live()
        ends = list(accumulate(seconds.get(n.meta["address"], 0.0) for n in sequence))
        if self.starts:
            gaps = [i for i, n in enumerate(sequence) if n.meta["address"] in self.starts]
        else:
            found = candidates([nbytes(v) for v in live], [len(v) for v in live], ends, self.stages)
            apart = self._apart()
            gaps = self._trained([gap for gap in found if gap not in apart])
        where = assign(self.regions, gaps)
        self.places = {n.meta["address"]: at for n, at in where.forward.items()}
        parts, twice = self._parts(where, len(gaps) + 1, seconds, late)
        back = self._returning(where)
        chain_gaps = []
        for number, gap in enumerate(gaps):
            forward = sum(self._bytes(v) for v in live[gap])
            backward = sum(self._bytes(v) for v, (start, end) in back.items() if end <= number < start)
            chain_gaps.append((forward, backward))
        crossing = tuple(tuple((v.node.name, nbytes([v])) for v in live[gap]) for gap in gaps)
        starts = tuple(sequence[gap].meta["address"] for gap in gaps)
        chain = Additive([[p] for p in parts], chain_gaps, self.micro, twice)
        return Pieces(chain, starts, crossing, tuple(self.repeats))

    def _apart(self) -> set[int]:
        """Gaps that would part a buffer that changes from one of its readers: one stage has it."""
        nodes = {n.name: n for n in self.program.gm.graph.nodes}
        at = {n: i for i, n in enumerate(self.regions.sequence)}
        sources = {s.name: nodes[s.node] for s in self.program.of_kind("buffer")}
        found: set[int] = set()
        for sink in self.program.sinks:
            if sink.kind == "buffer" and sink.node is not None and sink.name in sources:
                ends = (resolve(nodes[sink.node]).node, *sources[sink.name].users)
                places = [at[n] for n in ends if n in at]
                found.update(range(min(places, default=0) + 1, max(places, default=0) + 1))
        return found

    def _trained(self, gaps: Sequence[int]) -> list[int]:
        """The gaps between which every piece has something to train: every rank steps an optimizer."""
        trainable = {s.name for s in self.program.of_kind("param") if s.trainable}
        reads = [bool(trainable & set(self.regions.reads(n).params)) for n in self.regions.sequence]
        if not trainable:
            return list(gaps)
        kept: list[int] = []
        for gap in gaps:
            if any(reads[kept[-1] if kept else 0 : gap]) and any(reads[gap:]):
                kept.append(gap)
        return kept

    # ---- seconds -----------------------------------------------------------------------------------------------

    def _seconds(self) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Seconds by address, with what the op waits for; and of what only outputs read: per micro-batch, per step.

        Of what runs beside computation only a part is waited for: the one by which all adds up to the simulated step.
        """
        addresses = {i.name for i in self.items.items if i.kind == "op"}
        alone = sum(task.seconds for task in self.tasks.all if task.stream < 0)
        beside = sum(task.seconds for task in self.tasks.all if task.stream >= 0)
        simulated = self.timeline.step_s - self.timeline.update_s
        part = min(1.0, max(0.0, simulated - alone) / beside) if beside else 0.0
        seconds: dict[str, float] = {}
        late: dict[str, tuple[float, float]] = {}
        waiting: list[tuple[str, str, float]] = []
        for task in self.tasks.all:
            if task.stream < 0 and task.name in addresses:
                seconds[task.name] = seconds.get(task.name, 0.0) + task.seconds + sum(s for *_, s in waiting)
                waiting.clear()
            else:
                value = task.seconds if task.stream < 0 else part * task.seconds
                waiting.append((task.kind, task.name.split(" ", 1)[-1], value))
        for kind, name, value in waiting:  # gradients on their way home
            each, once = late.get(name, (0.0, 0.0))
            late[name] = (each, once + value) if kind == "all_reduce" else (each + value, once)
        return seconds, late

    # ---- pieces ------------------------------------------------------------------------------------------------

    def _parts(
        self, where: Assignment, count: int, seconds: Mapping[str, float], late: Mapping[str, tuple[float, float]]
    ) -> tuple[list[Option], list[Twice]]:
        table = _Sums(count)
        sent = self._sent_back(where)
        for node, at in where.forward.items():
            table.add(at, forward=seconds.get(node.meta["address"], 0.0))
        for node, at in where.backward.items():
            address = node.meta.get("address")
            if address is None:
                continue
            kind = "input_grad" if node in sent else "weight_grad"
            each, once = late.get(address, (0.0, 0.0))
            table.add(at, **{kind: seconds.get(address, 0.0)})
            table.add(at, weight_grad=each, update=once)
        early = self.again.early(sent) if self.again else set()
        self.repeats = [0.0] * count
        for address, op in (self.again.of if self.again else {}).items():
            if op in self.places:  # else every stage has it for itself
                kind = "input_grad" if self.nodes[address] in early else "weight_grad"
                table.add(self.places[op], **{kind: seconds.get(address, 0.0)})
                self.repeats[self.places[op]] += seconds.get(address, 0.0)
        self._state(where, table)
        self._flights(where, sent, early, table)
        moving, gathered = self._moving(where, count)
        slack = 1 + self.where.device.slack
        parts = [
            replace(part, transient_bytes=size, saved_bytes=part.saved_bytes + more)
            for part, size, more in zip(table.parts, moving, gathered)
        ]
        return [_larger(p, slack) for p in parts], [Twice(a, b, _larger(o, slack)) for a, b, o in table.twice]

    def _sent_back(self, where: Assignment) -> set[fx.Node]:
        """Ops that a gradient which leaves its piece is computed from; of the first piece, what serves several."""
        found: set[fx.Node] = set()
        stack = [v.node for v in self._returning(where)]
        serves: dict[fx.Node, int] = {}
        for terms in where.terms.values():
            for value in terms:
                serves[value.node] = serves.get(value.node, 0) + 1
        for node in reversed(self.regions.backward):
            if where.backward.get(node) == 0 and serves.get(node, 0):
                for value in self.regions.reads(node).grads:
                    serves[value.node] = serves.get(value.node, 0) + serves[node]
                if serves[node] > 1:
                    stack.append(node)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(v.node for v in self.regions.reads(node).grads)
        return found

    def _returning(self, where: Assignment) -> dict[Value, tuple[int, int]]:
        """Gradients that leave their piece -> (from, to the first that reads them)."""
        found: dict[Value, tuple[int, int]] = {}
        for node, at in where.backward.items():
            if node.op == "placeholder":
                continue
            for value in self.regions.reads(node).grads:
                start = where.backward.get(value.node, at)
                if at < start:
                    found[value] = (start, min(at, found.get(value, (start, at))[1]))
        return found

    # ---- bytes -------------------------------------------------------------------------------------------------

    def _state(self, where: Assignment, table: _Sums) -> None:
        """Parameters, gradients, optimizer state, buffers. What several pieces read, a stage of them has once."""
        sizes, device = self.plan.mesh.sizes, self.where.device
        for item in self.items.items:
            if item.kind == "param" and item.name in where.params:
                spec = self.specs.outs[item.index][0]
                held = self.policy.stored(item, spec, sizes)
                # The gradient of a micro-batch is there before it is added to the sum of those before it.
                more = held["gradients"] * (self.micro > 1) + held["parameters"] * self.copies
                update = device.update_seconds(self.policy.update_bytes(item, spec, sizes))
                table.add_once(where.params[item.name], static_bytes=sum(held.values()) + more, update=update)
            elif item.kind == "buffer" and item.node is not None:
                names = {n.name for n in item.node.users}
                readers = {at for n, at in where.forward.items() if n.name in names}
                table.add_once(readers, static_bytes=self._bytes(Value(item.node, 0)))

    def _flights(self, where: Assignment, sent: set[fx.Node], early: set[fx.Node], table: _Sums) -> None:
        """What is kept of a micro-batch in flight. What several pieces' backwards read, a stage of them keeps once."""
        saved: dict[tuple[fx.Node, int], set[int]] = {}
        waits: dict[tuple[fx.Node, int], set[int]] = {}
        for node, at in where.backward.items():
            if node.op == "placeholder":
                continue
            reads = self.regions.reads(node)
            kept = self.again.values(node) if self.again else reads.values
            for value in kept:
                base = _base(value)
                saved.setdefault((base.node, base.index), set()).add(at)
            late = () if node in sent else self.again.waits(node, early) if self.again else kept
            for value in late:
                base = _base(value)
                waits.setdefault((base.node, base.index), set()).add(at)
            for value in reads.grads if node not in sent else ():
                base = _base(value)
                if base.node in sent:
                    waits.setdefault((base.node, base.index), set()).add(at)
        for (source, index), places in saved.items():
            if source.target is OFFLOAD:
                continue  # that is on the host
            table.add_once(places, saved_bytes=self._bytes(Value(source, index)))
        for (source, index), places in waits.items():
            table.add_once(places, pending_bytes=self._bytes(Value(source, index)))

    def _moving(self, where: Assignment, count: int) -> tuple[list[float], list[float]]:
        """Per piece: bytes at most, beside all that is kept, while its ops run, and of the batch, which every rank is
        given; and bytes of what is gathered and kept from forward to backward."""
        at = {n.meta["address"]: p for n, p in (*where.forward.items(), *where.backward.items()) if "address" in n.meta}
        copies = self.again.of if self.again else {}
        names = (
            (i.index, copies.get(i.name) or (traveller(i.name) or (i.name,))[0])
            for i in self.items.items
            if i.kind == "op"
        )
        piece = {index: at[name] for index, name in names if name in at}
        device = self.where.device
        moving, kept = liveness.moving(
            self.items, self.plan, self.specs, piece, count, device.gloo, device.weights_from
        )  # fmt: skip
        inputs = [Value(i.node, 0) for i in self.items.items if i.kind == "input" and i.node is not None]
        given = nbytes(inputs) + sum(map(self._bytes, inputs))  # the batch, and this rank's pieces of it
        return [size + given * self.micro for size in moving], kept

    def _bytes(self, value: Value) -> float:
        """Bytes of a value on one rank."""
        spec = self.specs.outs[self.index[value.node.name]][value.index]
        meta = self.items.meta(Tensor(self.index[value.node.name], value.index))
        count = 1
        for n in local_shape(meta.shape, spec, self.plan.mesh.sizes):
            count *= n
        return float(count * meta.itemsize)


class _Sums:
    """Options of pieces, as they add up.

    Attributes:
        parts: of every piece. twice: (a piece, a later one, what the later has that is the earlier's too).
    """

    def __init__(self, count: int) -> None:
        self.parts = [_NOTHING] * count
        self.twice: list[tuple[int, int, Option]] = []

    def add(self, at: int, **more: float) -> None:
        """To one piece."""
        self.parts[at] = _sum(self.parts[at], more)

    def add_once(self, places: Iterable[int], **more: float) -> None:
        """To several pieces, which together have it once."""
        ordered = sorted(set(places))
        for at in ordered:
            self.add(at, **more)
        self.twice += [(a, b, _sum(_NOTHING, more)) for a, b in pairwise(ordered)]


_NOTHING = Option(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _sum(option: Option, more: Mapping[str, float]) -> Option:
    """With so much more of some numbers."""
    return replace(option, **{k: getattr(option, k) + v for k, v in more.items()})


def _larger(option: Option, factor: float) -> Option:
    """With so many times the bytes."""
    return replace(
        option,
        static_bytes=factor * option.static_bytes,
        saved_bytes=factor * option.saved_bytes,
        pending_bytes=factor * option.pending_bytes,
        transient_bytes=factor * option.transient_bytes,
    )


def _base(value: Value) -> Value:
    """The value whose memory a view shows."""
    while value.node.target in VIEWS and value.node.all_input_nodes:
        value = resolve(value.node.all_input_nodes[0])
    return value


def candidates(sizes: Sequence[int], counts: Sequence[int], ends: Sequence[float], stages: int) -> list[int]:
    """Places of the sequence at which a stage may begin, increasing.

    Args:
        sizes, counts: bytes and number of the values that cross each gap (one more than ops).
        ends: seconds of the ops up to each, included.
    """
    if not ends:
        return []
    reach = ends[-1] / stages / 4
    before = [0.0, *ends]  # seconds before each gap
    out: list[int] = []
    for gap in range(1, len(ends)):
        low = bisect.bisect_left(before, before[gap] - reach, 1, len(ends))
        high = bisect.bisect_right(before, before[gap] + reach, low, len(ends))
        near = range(low, high)
        least = min(sizes[i] for i in near)
        if sizes[gap] > least * _TOLERANCE:
            continue
        if counts[gap] > min(counts[i] for i in near if sizes[i] <= least * _TOLERANCE):
            continue
        out.append(gap)
    return out


__all__ = ["Pieces", "candidates", "pieces_of"]
