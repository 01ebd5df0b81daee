"""Seconds that gradients and optimizer state on the host take (ZeRO-Offload, Ren et al., 2021).

As `runtime/host_optimizer.py` has it: a gradient goes down the host's link as soon as the backward has it, one behind
the other, beside the computation. When the last one is there the host steps, at the bandwidth of its memory; meanwhile
the device updates the parameters whose state it has. Then the parameters go up. Where the device is the host
(`Device.host` is None), nothing runs beside anything: a copy is one of memory to memory, and the step is the device's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from autopar.costmodel.devices import Device
from autopar.costmodel.items import Item
from autopar.costmodel.memory import Policy
from autopar.plan import DEVICE
from autopar.spec import Spec


@dataclass(frozen=True)
class HostSeconds:
    """Of one parameter: its gradient goes down, the host steps it, it goes up."""

    down: float
    step: float
    up: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.down + self.step + self.up


def host_seconds(device: Device, policy: Policy, item: Item, spec: Spec, sizes: Sequence[int]) -> HostSeconds:
    """Of a parameter whose state lies on the host; nothing if it is frozen."""
    held = policy.hosted(item, spec, sizes)
    moved = policy.update_bytes(item, spec, sizes)
    if not moved:
        return HostSeconds(0.0, 0.0, 0.0)
    if device.host is None:
        down, up = (
            2 * held[kind] / device.traffic("copy", 2 * held[kind]) + device.launch
            for kind in ("gradients", "parameters")
        )
        return HostSeconds(down, device.update_seconds(moved), up)
    link = device.host.link
    down, up = (link.latency + held[kind] / link.bandwidth for kind in ("gradients", "parameters"))
    return HostSeconds(down, moved / device.host.bandwidth, up)


def update_seconds(device: Device, policy: Policy, item: Item, spec: Spec, sizes: Sequence[int], state: str) -> float:
    """Seconds of the optimizer's update of one parameter, with all that goes to and from the host for it."""
    if state == DEVICE:
        return device.update_seconds(policy.update_bytes(item, spec, sizes))
    return host_seconds(device, policy, item, spec, sizes).total


@dataclass
class Aside:
    """What the host does in one step, as it comes up.

    Attributes:
        work: per gradient, when it is there, and its seconds.
    """

    device: Device
    work: list[tuple[float, HostSeconds]] = field(default_factory=list)

    def arrived(self) -> float:
        """When the last gradient is down, the link taking one after the other; 0 if there is none."""
        at = 0.0
        for ready, seconds in sorted(self.work, key=lambda pair: pair[0]):
            at = max(at, ready) + seconds.down
        return at

    def update(self, now: float, own: float, overlap: bool = True) -> float:
        """Seconds from `now`, the end of the backward, to the last update; `own`: of the device's."""
        if self.device.host is None or not overlap or not self.work:
            return own + sum(seconds.total for _, seconds in self.work)
        step, up = (sum(getattr(s, part) for _, s in self.work) for part in ("step", "up"))
        behind = max(self.arrived(), now) + step + up
        return max(now + own, behind) - now

    @property
    def carried(self) -> float:
        """Seconds that the link is busy."""
        return sum(s.down + s.up for _, s in self.work)


__all__ = ["Aside", "HostSeconds", "host_seconds", "update_seconds"]
