"""Seconds of communication: the steps of `autopar.reshard`, priced alpha-beta per mesh axis.

With p ranks on the axis and n local bytes (the larger side of the step): gather and scatter move (p-1)/p n, an
all-reduce twice that, an all-to-all (p-1)/p of the local piece; each message round costs the link's latency,
ceil(log2 p) rounds (twice for an all-reduce). A local slice costs its memory traffic. Source: Thakur, Rabenseifner,
Gropp, "Optimization of collective communication operations in MPICH" (2005), the ring for bandwidth and the tree for
latency.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from autopar.costmodel.devices import Machine
from autopar.reshard import Step, steps
from autopar.spec import Shape, Spec


def step_seconds(step: Step, itemsize: int, machine: Machine) -> float:
    """Seconds of one step on one rank."""
    before, after = math.prod(step.before) * itemsize, math.prod(step.after) * itemsize
    if step.kind == "local_chunk":
        return 2 * after / machine.device.traffic() + machine.device.launch
    parts, link = machine.mesh.sizes[step.axis], machine.links[step.axis]
    rounds = math.ceil(math.log2(parts)) * link.latency + machine.device.launch
    share = (parts - 1) / parts
    if step.kind == "all_reduce":
        return 2 * share * before / link.bandwidth + 2 * rounds
    # An all-gather grows to `after`, a reduce-scatter shrinks from `before`, an all-to-all keeps the size.
    return share * max(before, after) / link.bandwidth + rounds


@dataclass
class Comm:
    """Prices redistributions on one machine, each distinct one once."""

    machine: Machine
    _seconds: dict[tuple[Shape, int, Spec, Spec], float] = field(default_factory=dict)

    def seconds(self, shape: Shape, itemsize: int, src: Spec, dst: Spec) -> float:
        """Seconds to bring a tensor of global `shape` from `src` to `dst`.

        Raises:
            SpecError: as `autopar.reshard.steps`.
        """
        if src == dst:
            return 0.0
        key = (shape, itemsize, src, dst)
        found = self._seconds.get(key)
        if found is None:
            moves = steps(shape, src, dst, self.machine.mesh.sizes)
            found = self._seconds[key] = sum(step_seconds(s, itemsize, self.machine) for s in moves)
        return found

    def counts(self, shape: Shape, src: Spec, dst: Spec) -> Counter[str]:
        """Number of collectives by kind (slices not counted)."""
        moves = steps(shape, src, dst, self.machine.mesh.sizes)
        return Counter(s.kind for s in moves if s.kind != "local_chunk")
