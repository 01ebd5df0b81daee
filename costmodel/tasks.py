"""The local program of a plan as tasks, small collectives merged: what `costmodel.simulate` runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from autopar.costmodel.comm import collective_seconds, copy_seconds, sent_seconds
from autopar.costmodel.devices import Link, Machine
from autopar.costmodel.items import Item, Items, Meta, Tensor
from autopar.costmodel.legal import Specs, row_of, storage_of
from autopar.costmodel.ops import Compute
from autopar.graph import BACKWARD, MOVES
from autopar.offload import FETCH, HOSTED
from autopar.plan import DEVICE, Plan
from autopar.reshard import Step, steps
from autopar.spec import R, Spec

aten = torch.ops.aten
#: As `passes/bucket.py` and `passes/overlap.py`.
BUCKET_BYTES = 25 << 20
AHEAD_BYTES, PENDING_BYTES = 2 * BUCKET_BYTES, 4 * BUCKET_BYTES
TWO = 2

REDUCTIONS, AHEAD = ("all_reduce", "reduce_scatter"), ("all_gather", "all_to_all")
KINDS = (*REDUCTIONS, *AHEAD)
#: Copies to the host and back, each way a stream.
DOWN, UP = "to host", "from host"


@dataclass(eq=False, slots=True)
class Task:
    """An op (`stream` -1, `lazy` False), a move (-1, True), or a collective or copy to or from the host on a stream."""

    name: str
    phase: str
    seconds: float
    stream: int
    lazy: bool
    srcs: list[Task]
    kind: str = ""
    key: tuple[Any, ...] = ()  # collectives of one key may share a bucket
    before: float = 0.0  # bytes on one rank on either side
    after: float = 0.0
    packed: bool = False  # what it sends has been copied into order
    unpacked: bool = False  # what it brings will be
    product: bool = False  # a product of matrices: written where it is wanted
    pack: float = 0.0  # seconds of computation to fill a bucket, and to empty it
    unpack: float = 0.0
    leaves: bool = False  # only the output reads it
    first_use: float = math.inf
    into: Task | None = None  # the bucket that it travels in
    missing: int = 0  # ops it waits for
    issued: int = -1  # number of ops that had run when it was issued
    end: float = 0.0
    done: bool = False
    at: float = 0.0  # when computation was there where it is done


class Tasks:
    """The local program of a plan as tasks, in graph order."""

    def __init__(self, items: Items, plan: Plan, specs: Specs, compute: Compute, where: Machine) -> None:
        self.items, self.plan, self.specs, self.compute, self.where = items, plan, specs, compute, where
        self.all: list[Task] = []
        tiers: dict[Link, int] = {}
        self.tier = [tiers.setdefault(link, len(tiers)) for link in where.links]
        names: list[list[str]] = [[] for _ in tiers]
        for name, tier in zip(plan.mesh.names, self.tier):
            names[tier].append(name)
        self.streams = ["+".join(row) for row in names]
        if where.device.host is not None and any(_way(i) for i in items.items):
            self.streams += [DOWN, UP]
        self.home: list[Task | None] = [None] * len(items.items)  # what makes the results of an item; None: nothing
        self.at: dict[tuple[Tensor, Spec, str, str], Task | None] = {}  # what has been brought
        self._kinds: dict[int, tuple[bool, bool]] = {}  # by signature: a move, a product
        self.ends: list[Task] = []  # what the output reads
        self.hosted: list[tuple[Item, Task | None]] = []  # parameters of the host; their gradients
        self._ways: dict[tuple[Meta, Spec, Spec, str], list[tuple[Step, float]]] = {}
        self.twice = {i.index for i in items.items if i.kind == "param" and storage_of(plan, i).gather == "twice"}
        for item in items.items:
            if item.kind == "op":
                self._op(item, row_of(items, plan, specs, item))
            elif item.kind == "grad":
                held = storage_of(plan, items.items[items.param[item.name]])
                left = any(p.kind == "P" for p in specs.ins[item.index][0])  # the rest is not the graph's
                made = self._bring(item, 0, "" if left else held.reduce)
                self._end(made)
                if held.state != DEVICE:
                    self.hosted.append((items.items[items.param[item.name]], made))
            elif item.ins:
                self._end(self._bring(item, 0, ""))

    def _op(self, item: Item, row: tuple[Any, ...]) -> None:
        seconds = self.compute.seconds(item, row)
        srcs = [t for k in range(len(item.ins)) if (t := self._bring(item, k, "")) is not None]
        way = _way(item)
        if way and self.where.device.host is not None:
            stream = self.streams.index(way)
            task = Task(item.name, item.phase, seconds, stream, False, srcs, way, (way, stream))
            self.all.append(task)
            self.home[item.index] = task
            return
        kinds = self._kinds.get(item.signature)
        if kinds is None:
            assert item.node is not None
            kinds = self._kinds[item.signature] = item.node.target in MOVES, item.node.target is aten.mm.default
        task = Task(item.name, item.phase, seconds, -1, kinds[0], srcs)
        task.product = kinds[1]
        self.all.append(task)
        self.home[item.index] = task

    def _end(self, task: Task | None) -> None:
        if task is not None:
            self.ends.append(task)

    def _bring(self, reader: Item, position: int, reduce: str) -> Task | None:
        """What makes operand `position` of `reader` in the spec that it wants; None: it is there from the start."""
        tensor, dst = reader.ins[position], self.specs.ins[reader.index][position]
        src = self.specs.outs[tensor.item][tensor.index]
        home = self.home[tensor.item]
        if src == dst:
            return home
        phase = reader.phase if tensor.item in self.twice else ""
        key = (tensor, dst, phase, reduce)
        if key not in self.at:
            again = phase == BACKWARD
            self.at[key] = self._travel(tensor, src, dst, reduce, home, reader.phase, again)
        return self.at[key]

    def _travel(
        self, tensor: Tensor, src: Spec, dst: Spec, reduce: str, home: Task | None, phase: str, again: bool
    ) -> Task | None:
        meta, last = self.items.meta(tensor), home
        name = self.items.items[tensor.item].name
        for step, seconds in self._way(meta, src, dst, reduce):
            before, after = (math.prod(s) * meta.itemsize for s in (step.before, step.after))
            if step.stacks:
                last = self._copy(f"pieces of {name}", phase, before, last)
            srcs = [] if last is None else [last]
            collective = step.kind != "local_chunk"
            last = Task(
                f"{step.kind} {name}",
                phase,
                seconds,
                self.tier[step.axis] if collective else -1,
                not collective,
                srcs,
                step.kind,
                (step.kind, step.axis, step.reduce, meta.dtype, phase, again),
                before,
                after,
                step.stacks,
                step.unpacks,
            )
            self.all.append(last)
            if step.unpacks:
                last = self._copy(f"pieces of {name}", phase, after, last)
        return last

    def _copy(self, name: str, phase: str, size: float, src: Task | None) -> Task:
        """A move that brings pieces together, or puts them in place."""
        made = Task(name, phase, copy_seconds(size, self.where), -1, True, [] if src is None else [src])
        self.all.append(made)
        return made

    def _way(self, meta: Meta, src: Spec, dst: Spec, reduce: str) -> list[tuple[Step, float]]:
        key = (meta, src, dst, reduce)
        found = self._ways.get(key)
        if found is None:
            mid = tuple(R if p.kind == "P" else p for p in src) if reduce == "all_reduce" else src
            sizes = self.plan.mesh.sizes
            moves = [*steps(meta.shape, src, mid, sizes), *steps(meta.shape, mid, dst, sizes)]
            found = self._ways[key] = [(s, sent_seconds(s, meta.itemsize, self.where)) for s in moves]
        return found


def _way(item: Item) -> str:
    """The stream of an op that brings something to or from the host; "" for others."""
    if item.node is None or item.node.target not in HOSTED:
        return ""
    return UP if item.node.target is FETCH else DOWN


# ---- buckets -------------------------------------------------------------------------------------------------------


def bucket(tasks: Tasks) -> None:
    """Merge small collectives as `passes/bucket.py` does: one latency for many."""
    _first_uses(tasks)
    gathers, reductions = _gathers(tasks), _reductions(tasks)
    gathers.sort(key=lambda pair: pair[0].first_use)
    for found in (gathers, reductions):
        open_: dict[tuple[Any, ...], list[Task]] = {}
        filled: dict[tuple[Any, ...], float] = {}
        groups: list[list[Task]] = []
        for task, level in found:
            size, key = max(task.before, task.after), (*task.key, *level)
            if size >= BUCKET_BYTES:
                continue
            if key not in open_ or filled[key] + size > BUCKET_BYTES:
                open_[key], filled[key] = [], 0.0
                groups.append(open_[key])
            open_[key].append(task)
            filled[key] += size
        for group in groups:
            if len(group) > 1:
                tasks.all.append(_merge(tasks, group))


def _merge(tasks: Tasks, group: list[Task]) -> Task:
    first = group[0]
    before, after = sum(t.before for t in group), sum(t.after for t in group)
    together = collective_seconds(first.kind, first.key[1], before, after, tasks.where)
    seconds = min(together, sum(t.seconds for t in group))  # a measured curve may bend
    made = Task(
        f"{first.name} and {len(group) - 1} more",
        first.phase,
        seconds,
        first.stream,
        False,
        [s for t in group for s in t.srcs],
        first.kind,
        first.key,
        before,
        after,
        leaves=first.leaves,
        first_use=min(t.first_use for t in group),
    )
    made.pack, made.unpack = _copies(group, tasks.where)
    for task in group:
        task.into = made
    return made


def _copies(group: list[Task], where: Machine) -> tuple[float, float]:
    """Seconds to pack a bucket and to unpack it, beside what is copied into order anyway; as `passes/bucket.py`.

    A product is written into a bucket of sums at once; what is reduced is handed out as views of the bucket.
    """
    kind = group[0].kind
    packed = sum(t.before for t in group if not t.packed and not (kind == "all_reduce" and _is_product(t.srcs)))
    unpacked = sum(t.after for t in group if not t.unpacked) if kind == "all_gather" else 0.0
    seconds = [copy_seconds(size, where) if size else 0.0 for size in (packed, unpacked)]
    return seconds[0], seconds[1]


def _is_product(srcs: list[Task]) -> bool:
    while len(srcs) == 1 and srcs[0].lazy and not srcs[0].seconds:
        srcs = srcs[0].srcs
    return len(srcs) == 1 and srcs[0].product


def _first_uses(tasks: Tasks) -> None:
    """For every move and collective the first op (by number in `all`) that needs it, and whether only outputs do."""
    for number in range(len(tasks.all) - 1, -1, -1):
        task = tasks.all[number]
        use = task.first_use if task.lazy or task.stream >= 0 else number
        for src in task.srcs:
            src.first_use = min(src.first_use, use)
    leaving(tasks)


def leaving(tasks: Tasks) -> None:
    """Find out which moves and collectives only the output reads."""
    for task in tasks.all:
        task.leaves = task.first_use == math.inf and (task.stream >= 0 or task.lazy)


def _gathers(tasks: Tasks) -> list[tuple[Task, tuple[int, int]]]:
    """Gathers of what is there from the start, with the numbers of gathers before and behind each."""
    before: dict[int, int] = {}
    inside: list[Task] = []
    for task in tasks.all:
        if (task.lazy or task.kind == "all_gather") and all(id(s) in before for s in task.srcs):
            before[id(task)] = max((before[id(s)] + (s.kind == "all_gather") for s in task.srcs), default=0)
            inside.append(task)
    behind = _behind(inside, ("all_gather",))
    return [(t, (before[id(t)], behind.get(id(t), 0))) for t in inside if t.kind == "all_gather"]


def _reductions(tasks: Tasks) -> list[tuple[Task, tuple[int, int]]]:
    """Reductions that reach only the output, with the numbers of collectives before and behind each."""
    other: set[int] = set()  # read by something that computes
    inside: list[Task] = []
    for task in reversed(tasks.all):
        if task.leaves and id(task) not in other:
            inside.append(task)
        else:
            other.update(id(s) for s in task.srcs)
    inside.reverse()
    behind = _behind(inside, KINDS)
    before: dict[int, int] = {}
    for task in inside:
        before[id(task)] = max((before[id(s)] + (s.kind in KINDS) for s in task.srcs if id(s) in before), default=0)
    return [(t, (before[id(t)], behind.get(id(t), 0))) for t in inside if t.kind in REDUCTIONS]


def _behind(tasks: list[Task], kinds: tuple[str, ...]) -> dict[int, int]:
    """By id, the largest number of collectives of these kinds behind each that another of `tasks` reads."""
    behind: dict[int, int] = {}
    for task in reversed(tasks):
        for src in task.srcs:
            found = behind.get(id(task), 0) + (task.kind in kinds)
            behind[id(src)] = max(behind.get(id(src), 0), found)
    return behind
