"""A step of one rank, simulated: a stream of computation and one of communication per link tier.

Independent of the integer program and its assumptions on overlap: the local program is walked in the order in which
`passes/overlap.py` would issue it, after merging small collectives as `passes/bucket.py` would. In short,

* ops run in graph order on the stream of computation; moves (views, casts, slices) run when they are first needed;
* a reduction is issued when its operand exists, a gather or all-to-all ahead of its first use within a window of bytes,
  nearest use first; one that reads another collective, half way from that to its first use, if it is a reduction that
  only the output reads, when the next of the other's kind is issued;
* a copy to the host is issued when its operand exists, copies from there ahead of their first use, nearest use first;
  of each so many are on their way as the plan says, then the oldest is waited for;
* a collective starts when it is issued and its link is free, and is waited for at its first use; what only the
  output reads is pending, within a window of bytes, until the end of its phase;
* the optimizer's update comes after the backward; what the host does for it, as `costmodel/host_state.py`;
* where computation and communication take the same cores, computation loses a part of every second in which the other
  runs beside it (`Device.beside`), which counts as waiting; copies to and from the host take none.

Axes with the same link share one stream: two collectives cannot both have all of a link. Buckets are packed when they
are issued, and unpacked when they are waited for. Linear in the program.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from autopar.compression import BF16
from autopar.costmodel.compress import append_powersgd, narrow
from autopar.costmodel.devices import Device, Link, machine
from autopar.costmodel.host_state import Aside, host_seconds
from autopar.costmodel.items import Items, items_of
from autopar.costmodel.legal import Specs, plan_specs, storage_of
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.tasks import AHEAD, AHEAD_BYTES, BUCKET_BYTES, DOWN, PENDING_BYTES, TWO, UP, Task, Tasks, bucket
from autopar.graph import BACKWARD, FORWARD, Program
from autopar.plan import DEVICE, Plan

COMPUTE = "compute"


class Span(NamedTuple):
    """Something that ran from `start` to `end` (seconds from the start of the step) on `stream`."""

    name: str
    stream: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Seconds of one step. step_s = compute_s + exposed_s + update_s.

    Attributes:
        compute_s: the stream of computation is busy (slices included). comm_s: sum over all collectives.
        exposed_s: the stream of computation waits for collectives or for copies to and from the host, or is slowed down
            by collectives. update_s: the optimizer's update, from the end of the backward on.
        copies_s: of `compute_s`, what packs and unpacks buckets.
        streams: busy seconds of every stream of communication, by the names of its axes; and of what waits on the host,
            "to host" and "from host", if anything does and the device has one.
        host_s: busy seconds of all copies to and from the host: of what waits there, and for its part of the update.
        spans: what ran when, if asked for; as if nothing slowed down.
    """

    step_s: float
    compute_s: float
    comm_s: float
    exposed_s: float
    update_s: float
    copies_s: float = 0.0
    streams: Mapping[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    host_s: float = 0.0


def simulate(
    program: Program | Items,
    plan: Plan,
    device: str | Device = "cpu",
    links: Mapping[str, Link] | None = None,
    *,
    policy: Policy | None = None,
    overlap: bool = True,
    spans: bool = False,
) -> Timeline:
    """Simulate any legal plan.

    Args:
        device: preset name or Device. links: axis name -> Link, in place of the device's.
        policy: what the optimizer keeps, for its update; None: as the class that the plan names.
        overlap: False: every collective is waited for at once and travels alone; the sum of all seconds then.
        spans: keep what ran when.

    Raises:
        PlanError: the plan is not legal for the program.
        MeshError: unknown device or axis.
    """
    items = program if isinstance(program, Items) else items_of(program, plan.saved)
    where = machine(device, plan.mesh, links)
    policy = policy or Policy(items.program.training, optimizer=plan.optimizer)
    return run(items, plan, plan_specs(items, plan), Compute(items, where), policy, overlap, spans)


def run(
    items: Items,
    plan: Plan,
    specs: Specs,
    compute: Compute,
    policy: Policy,
    overlap: bool = True,
    spans: bool = False,
) -> Timeline:
    """`simulate` with everything looked up already, for callers that price as well."""
    tasks = Tasks(items, plan, specs, compute, compute.machine)
    clock = _Clock(tasks, spans)
    if overlap:
        bucket(tasks)
    if plan.compression == BF16:
        narrow(tasks)
    elif plan.compression is not None:
        append_powersgd(tasks)
    for phase in (FORWARD, BACKWARD):
        _Phase(tasks, clock, phase, overlap).run()
    for task in tasks.all:  # moves that nobody has read
        clock.need(task)
    device, sizes = compute.machine.device, plan.mesh.sizes
    own = sum(
        device.update_seconds(policy.update_bytes(i, specs.outs[i.index][0], sizes))
        for i in items.items
        if i.kind == "param" and storage_of(plan, i).state == DEVICE
    )
    links = [i for i, name in enumerate(tasks.streams) if name not in (DOWN, UP)]
    ways = [i for i, name in enumerate(tasks.streams) if name in (DOWN, UP)]
    carried = sum(clock.carried[i] for i in links)
    talked = max([clock.now, *(clock.free[i] for i in links)])
    now = max([talked, *clock.free])
    # Of collectives, what computation has not waited for runs beside it.
    hidden = max(carried - (talked - clock.busy - clock.host_waits), 0.0)
    lost = device.beside * min(hidden, clock.busy)
    aside = Aside(device)
    for item, made in tasks.hosted:
        seconds = host_seconds(device, policy, item, specs.outs[item.index][0], sizes)
        aside.work.append((_there(made), seconds))
    update = aside.update(now + lost, own, overlap)
    if spans and update:
        clock.spans.append(Span("update", COMPUTE, now, now + update))
    return Timeline(
        step_s=now + lost + update,
        compute_s=clock.busy,
        comm_s=carried,
        exposed_s=now - clock.busy + lost,
        update_s=update,
        copies_s=clock.copies,
        streams=dict(zip(tasks.streams, clock.carried)),
        host_s=sum(clock.carried[i] for i in ways) + aside.carried,
        spans=tuple(clock.spans),
    )


# ---- time ----------------------------------------------------------------------------------------------------------


class _Clock:
    """Where the streams are."""

    def __init__(self, tasks: Tasks, keep: bool) -> None:
        self.tasks, self.keep = tasks, keep
        self.now = 0.0  # the stream of computation
        self.busy = 0.0
        self.copies = 0.0  # of that, in and out of buckets
        self.host_waits = 0.0  # seconds waited for copies to and from the host
        self.free = [0.0] * len(tasks.streams)
        self.carried = [0.0] * len(tasks.streams)
        self.steps = 0  # ops that have run
        self.spans: list[Span] = []
        self.flying: dict[int, float] = {}  # gathers issued and not waited for (by id) -> bytes
        self.pending: deque[Task] = deque()  # reductions issued that only the output reads
        self.held = 0.0  # their bytes
        self.leaving: deque[Task] = deque()  # copies to the host issued
        self.coming: set[int] = set()  # copies from there issued and not waited for (by id)
        self.sent: list[Task] = []  # issued since `_Phase` has last looked

    def need(self, task: Task) -> None:
        """Bring computation to where `task` is done: run it, or wait for it."""
        stack = [task]
        while stack:
            top = stack[-1]
            if top.into is not None:
                top = stack[-1] = top.into
            if top.done:
                stack.pop()
                continue
            missing = [s for s in top.srcs if not (s.into or s).done] if top.issued < 0 else []
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if top.stream < 0:
                self._compute(top)
                continue
            if top.issued < 0:
                self._send(top)
            self._wait(top)

    def issue(self, task: Task) -> None:
        """Issue a collective; what it reads is waited for."""
        for src in task.srcs:
            self.need(src)
        if task.issued < 0:
            self._send(task)

    def _compute(self, task: Task) -> None:
        self._work(task.name, task.seconds)
        task.done, task.at = True, self.now

    def _work(self, name: str, seconds: float) -> None:
        if self.keep and seconds:
            self.spans.append(Span(name, COMPUTE, self.now, self.now + seconds))
        self.now += seconds
        self.busy += seconds

    def _copy(self, name: str, seconds: float) -> None:
        self._work(name, seconds)
        self.copies += seconds

    def _send(self, task: Task) -> None:
        self._copy(f"pack {task.name}", task.pack)
        start = max(self.now, self.free[task.stream])
        task.end = self.free[task.stream] = start + task.seconds
        task.issued = self.steps
        self.sent.append(task)
        self.carried[task.stream] += task.seconds
        if self.keep:
            self.spans.append(Span(task.name, self.tasks.streams[task.stream], start, task.end))
        if task.kind in AHEAD:
            self.flying[id(task)] = task.after
        elif task.kind == UP:
            self.coming.add(id(task))
        elif task.kind == DOWN:
            self.leaving.append(task)
        elif task.leaves:
            self.pending.append(task)
            self.held += task.before

    def _wait(self, task: Task) -> None:
        if task.kind in (DOWN, UP):
            self.host_waits += max(task.end - self.now, 0.0)
        self.now = max(self.now, task.end)
        self._copy(f"unpack {task.name}", task.unpack)
        task.done, task.at = True, self.now
        if task.kind in AHEAD:
            self.flying.pop(id(task), None)
        elif task.kind == UP:
            self.coming.discard(id(task))
        elif task.leaves:
            self.held -= task.before

    def full(self, unit: Task) -> bool:
        """Whether a gather, or a copy from the host, has to wait until another one is used."""
        if unit.kind == UP:
            return len(self.coming) >= self.tasks.plan.copies
        if unit.kind not in AHEAD:
            return False
        more = unit.after
        return len(self.flying) >= TWO and sum(self.flying.values()) + more > AHEAD_BYTES

    def drain(self, limit: float) -> None:
        """Wait for the oldest reductions while too many are pending; the newest is always allowed."""
        while len(self.leaving) > self.tasks.plan.copies:
            leaving = self.leaving.popleft()
            if not leaving.done:
                self._wait(leaving)
        while len(self.pending) > 1 and self.held > limit:
            oldest = self.pending.popleft()
            if not oldest.done:
                self._wait(oldest)


class _Phase:
    """The forward or the backward, issued in the order of `passes/overlap.py`."""

    def __init__(self, tasks: Tasks, clock: _Clock, phase: str, overlap: bool) -> None:
        self.everything, self.clock, self.overlap = tasks.all, clock, overlap
        mine = [t for t in tasks.all if t.phase == phase and t.into is None]
        self.ops = [t for t in mine if t.stream < 0 and not t.lazy]
        self.units = [t for t in mine if t.stream >= 0]
        self.ends = [t for t in tasks.ends if t.phase == phase]
        self.gathers: list[tuple[float, int, Task]] = []  # heap: may be issued ahead
        self.fetches: list[tuple[float, int, Task]] = []  # heap: copies from the host that may be
        # Heap: step, number, count; the first task was issued, the second reads it, and waits until that has had time.
        self.later: list[tuple[int, int, int, Task, Task]] = []
        self.pushed = 0
        self.next: dict[tuple[Any, ...], list[tuple[Task, Task]]] = {}  # lane -> pairs of which the second may be next
        self.released: set[tuple[int, int]] = set()
        self.start = clock.steps
        self.at = [n for n, t in enumerate(tasks.all) if t.phase == phase and t.stream < 0 and not t.lazy]
        self.readers: dict[int, list[Task]] = {}
        self.number = {id(t): n for n, t in enumerate(self.units)}
        self.after: dict[int, list[Task]] = {}  # collective -> collectives that read it

    def run(self) -> None:
        if self.overlap:
            self._prepare(self.everything)
            self._issue()
        for op in self.ops:
            self.clock.need(op)
            self.clock.steps += 1
            if self.overlap:
                for unit in self.readers.get(id(op), ()):
                    unit.missing -= 1
                    if not unit.missing:
                        self._ready(unit)
                self._issue()
                self.clock.drain(PENDING_BYTES)
        for unit in self.units if self.overlap else ():
            self.clock.issue(unit)
        for unit in self.units:
            self.clock.need(unit)
        for end in self.ends:
            self.clock.need(end)

    def _prepare(self, everything: list[Task]) -> None:
        roots: dict[int, list[Task]] = {}  # ops and collectives that a move reads, through moves
        for task in everything:
            if task.lazy:
                roots[id(task)] = _through(task, roots)
        for unit in self.units:
            waits = [t for t in _through(unit, roots) if not t.done]
            unit.missing = len(waits)
            for task in waits:
                where = self.after if task.stream >= 0 else self.readers
                where.setdefault(id(task), []).append(unit)
            if not waits:
                self._ready(unit)

    def _ready(self, unit: Task) -> None:
        """A reduction is issued at once, a gather when it is near enough."""
        if unit.issued >= 0:
            return
        key = unit.first_use if unit.kind in AHEAD or unit.kind == UP else -1.0
        heap = self.fetches if unit.kind == UP else self.gathers
        heapq.heappush(heap, (key, self.number[id(unit)], unit))

    def _issue(self) -> None:
        clock = self.clock
        while True:
            for unit in clock.sent:
                self._sent(unit)
            clock.sent.clear()
            while self.later and self.later[0][0] <= clock.steps:
                *_, before, unit = heapq.heappop(self.later)
                pair = id(before), id(unit)
                if pair in self.released:
                    continue
                self.released.add(pair)
                unit.missing -= 1
                if not unit.missing:
                    self._ready(unit)
            for heap in (self.gathers, self.fetches):
                if heap and (heap[0][2].issued >= 0 or not clock.full(heap[0][2])):
                    break
            else:
                return
            unit = heap[0][2]
            if unit.issued < 0:
                clock.issue(unit)
            heapq.heappop(heap)

    def _sent(self, unit: Task) -> None:
        """A collective has been issued: when may those be that read it, or the one before it in its lane?"""
        lane = unit.key[:2]
        waiting = self.next.pop(lane, [])
        for before, reader in waiting:
            self._push(max(self.clock.steps, before.issued + 1), before, reader)
        for reader in self.after.pop(id(unit), ()):
            self._push(self._due(unit, reader), unit, reader)
            if reader.leaves:
                self.next.setdefault(lane, []).append((unit, reader))

    def _push(self, due: int, before: Task, unit: Task) -> None:
        self.pushed += 1
        heapq.heappush(self.later, (due, self.number[id(unit)], self.pushed, before, unit))

    def _due(self, before: Task, unit: Task) -> int:
        """The last step at which a unit that reads another one has to wait, as `passes/overlap.py` has it."""
        use = self.start + bisect.bisect_left(self.at, unit.first_use)
        return before.issued + max(1, (use - before.issued) // 2)


def _there(task: Task | None) -> float:
    """When a gradient can be copied: moves are made as soon as what they read is there, or has been waited for."""
    latest, stack = 0.0, [] if task is None else [task]
    while stack:
        top = stack.pop()
        top = top.into or top
        latest = max(latest, 0.0 if top.lazy else top.at)
        stack += top.srcs if top.lazy else ()
    return latest


def _through(task: Task, roots: dict[int, list[Task]]) -> list[Task]:
    """What is not a move among what a task reads, behind the moves."""
    found: dict[int, Task] = {}
    for src in task.srcs:
        src = src.into or src
        found.update((id(t), t) for t in (roots[id(src)] if src.lazy else (src,)))
    return list(found.values())


__all__ = ["AHEAD_BYTES", "BUCKET_BYTES", "COMPUTE", "PENDING_BYTES", "Span", "Timeline", "run", "simulate"]
