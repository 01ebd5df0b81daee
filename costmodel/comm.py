"""Seconds of communication: the steps of `autopar.reshard`, priced alpha-beta per mesh axis.

With p ranks on the axis and n local bytes (the larger side of the step): gather and scatter move (p-1)/p n, an
all-reduce twice that, an all-to-all (p-1)/p of the local piece; each message round costs the link's latency,
ceil(log2 p) rounds (twice for an all-reduce). A local slice costs its memory traffic, and so does a copy that brings
pieces together or puts them in place (`Step.stacks`, `Step.unpacks`). Source: Thakur, Rabenseifner, Gropp,
"Optimization of collective communication operations in MPICH" (2005), the ring for bandwidth and the tree for latency.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from autopar.compression import Compression
from autopar.costmodel.devices import Link, Machine
from autopar.reshard import Step, steps
from autopar.spec import Shape, Spec


def step_seconds(step: Step, itemsize: int, machine: Machine) -> float:
    """Seconds of one step on one rank, copies included."""
    return sent_seconds(step, itemsize, machine) + _copies(step, itemsize, machine)


def sent_seconds(step: Step, itemsize: int, machine: Machine) -> float:
    """Seconds of one step on one rank without the copies on either side."""
    before, after = math.prod(step.before) * itemsize, math.prod(step.after) * itemsize
    if step.kind == "local_chunk":
        return 2 * after / machine.device.traffic() + machine.device.launch
    return collective_seconds(step.kind, step.axis, before, after, machine)


def _copies(step: Step, itemsize: int, machine: Machine) -> float:
    seconds = 0.0
    for needed, shape in ((step.stacks, step.before), (step.unpacks, step.after)):
        if needed:
            seconds += copy_seconds(float(math.prod(shape) * itemsize), machine)
    return seconds


def copy_seconds(size: float, machine: Machine) -> float:
    """Seconds to bring `size` bytes into another order."""
    return 2 * size / machine.device.traffic("copy", 2 * size) + machine.device.launch


def collective_seconds(kind: str, axis: int, before: float, after: float, machine: Machine) -> float:
    """Seconds of one collective on one rank that turns `before` local bytes into `after`: measured, else alpha-beta."""
    parts, link = machine.mesh.sizes[axis], machine.links[axis]
    measured = machine.device.collective(kind, parts, machine.mesh.num_devices, max(before, after))
    if measured is not None:
        return measured
    rounds = math.ceil(math.log2(parts)) * link.latency + machine.device.launch
    share = (parts - 1) / parts
    if kind == "all_reduce":
        return 2 * share * before / link.bandwidth + 2 * rounds
    # An all-gather grows to `after`, a reduce-scatter shrinks from `before`, an all-to-all keeps the size.
    return share * max(before, after) / link.bandwidth + rounds


@dataclass
class Comm:
    """Prices redistributions on one machine, each distinct one once.

    Attributes:
        compression: of gradients (`costmodel.compress`).
        tier: number of the link tier of every axis; axes with the same link share one. tiers: how many there are.
    """

    machine: Machine
    compression: Compression | None = None
    _seconds: dict[tuple[Shape, int, Spec, Spec, bool], tuple[float, tuple[float, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[Link, int] = {}
        self.tier = [known.setdefault(link, len(known)) for link in self.machine.links]
        self.tiers = len(known)

    def seconds(self, shape: Shape, itemsize: int, src: Spec, dst: Spec, half: bool = False) -> float:
        """Seconds to bring a tensor of global `shape` from `src` to `dst`; `half`: sums travel at two bytes an element.

        Raises:
            SpecError: as `autopar.reshard.steps`.
        """
        return self._found(shape, itemsize, src, dst, half)[0]

    def links(self, shape: Shape, itemsize: int, src: Spec, dst: Spec, half: bool = False) -> tuple[float, ...]:
        """Of `seconds`, those that the links of every tier are busy (local slices keep none busy)."""
        return self._found(shape, itemsize, src, dst, half)[1]

    def _found(
        self, shape: Shape, itemsize: int, src: Spec, dst: Spec, half: bool
    ) -> tuple[float, tuple[float, ...]]:
        if src == dst:
            return 0.0, (0.0,) * self.tiers
        key = (shape, itemsize, src, dst, half)
        found = self._seconds.get(key)
        if found is None:
            total, busy = 0.0, [0.0] * self.tiers
            for step in steps(shape, src, dst, self.machine.mesh.sizes):
                sent = 2 if half and step.reduce == "sum" else itemsize
                seconds = sent_seconds(step, sent, self.machine)
                total += seconds + _copies(step, itemsize, self.machine)
                if sent != itemsize:
                    casts = math.prod(step.before), math.prod(step.after)
                    total += sum(copy_seconds(n * (itemsize + sent) / 2, self.machine) for n in casts)
                if step.kind != "local_chunk":
                    busy[self.tier[step.axis]] += seconds
            found = self._seconds[key] = total, tuple(busy)
        return found

    def counts(self, shape: Shape, src: Spec, dst: Spec) -> Counter[str]:
        """Number of collectives by kind (slices not counted)."""
        moves = steps(shape, src, dst, self.machine.mesh.sizes)
        return Counter(s.kind for s in moves if s.kind != "local_chunk")
