"""The price of a plan on the unfolded program: seconds, collectives and memory, independent of how the plan was found.

Seconds are computation + communication + optimizer update, one after the other (no overlap). Memory is
`costmodel.liveness`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopar.compression import Compression
from autopar.costmodel.comm import Comm
from autopar.costmodel.compress import works
from autopar.costmodel.devices import Device, Link, machine
from autopar.costmodel.host_state import update_seconds
from autopar.costmodel.items import Items, items_of
from autopar.costmodel.legal import Specs, plan_specs, row_of, storage_of
from autopar.costmodel.liveness import peak
from autopar.costmodel.lower import bring_seconds
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.graph import Program
from autopar.offload import OFFLOAD
from autopar.plan import DEVICE, Plan
from autopar.spec import R, local_shape


@dataclass(frozen=True)
class Price:
    """Seconds of a step and bytes per rank. `memory` by kind, at the moment of the peak; `peak_bytes` is their sum.

    `host`: bytes on the host by kind, if the plan keeps anything there.
    """

    compute_s: float
    comm_s: float
    update_s: float
    memory: Mapping[str, float]
    peak_bytes: float
    collectives: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=dict)

    @property
    def host_bytes(self) -> float:
        """Bytes on the host."""
        return sum(self.host.values())

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return self.compute_s + self.comm_s + self.update_s

    def as_dict(self) -> dict[str, Any]:
        """For `Plan.predicted`: plain numbers, bytes rounded."""
        return {
            "step_s": self.step_s,
            "compute_s": self.compute_s,
            "comm_s": self.comm_s,
            "update_s": self.update_s,
            "memory": {k: round(v) for k, v in self.memory.items()},
            "peak_bytes": round(self.peak_bytes),
            "collectives": dict(self.collectives),
            **({"host": {k: round(v) for k, v in self.host.items()}} if self.host else {}),
        }


def price(
    program: Program | Items,
    plan: Plan,
    device: str | Device = "cpu",
    *,
    optimizer_bytes: float | None = None,
    links: Mapping[str, Link] | None = None,
) -> Price:
    """Price any legal plan, edited by hand or not.

    Args:
        device: preset name or Device.
        optimizer_bytes: bytes of optimizer state per parameter element, in place of what the plan's class keeps.
        links: axis name -> Link, in place of the device's.

    Raises:
        PlanError: the plan is not legal for the program.
        MeshError: unknown device or axis.
    """
    items = program if isinstance(program, Items) else items_of(program, plan.saved)
    where = machine(device, plan.mesh, links)
    policy = Policy(items.program.training, optimizer_bytes, plan.optimizer)
    return priced(items, plan, plan_specs(items, plan), Compute(items, where), policy)


def priced(items: Items, plan: Plan, specs: Specs, compute: Compute, policy: Policy) -> Price:
    """`price` with everything looked up already, for callers that simulate as well."""
    comm = Comm(compute.machine, Compression.parse(plan.compression))
    return _Pricer(items, plan, specs, compute, comm, policy).run()


@dataclass
class _Pricer:
    items: Items
    plan: Plan
    specs: Specs
    compute: Compute
    comm: Comm
    policy: Policy

    def run(self) -> Price:
        sizes = self.plan.mesh.sizes
        compute, host = 0.0, Counter[str]()
        for item in self.items.items:
            if item.kind == "op":
                compute += self.compute.seconds(item, row_of(self.items, self.plan, self.specs, item))
                if item.node is not None and item.node.target is OFFLOAD:
                    meta, spec = item.in_meta[0], self.specs.outs[item.index][0]
                    host["activations"] += math.prod(local_shape(meta.shape, spec, sizes)) * meta.itemsize
        comm, counts = self._comm()
        for work in works(self.items, self.plan, self.specs):
            compute += sum(work.compute(self.compute.machine))
            comm += work.sent(self.compute.machine)
            counts["all_reduce"] += 2 * len(work.axes)
        device = self.compute.machine.device
        update = 0.0
        for item in self.items.items:
            if item.kind == "param":
                spec, state = self.specs.outs[item.index][0], storage_of(self.plan, item).state
                update += update_seconds(device, self.policy, item, spec, sizes, state)
                if state != DEVICE:
                    host.update(self.policy.hosted(item, spec, sizes))  # type: ignore[arg-type]
        memory = peak(self.items, self.plan, self.specs, self.policy, device.slack, device.gloo, device.weights_from)
        return Price(compute, comm, update, memory, sum(memory.values()), dict(sorted(counts.items())), dict(host))

    def _comm(self) -> tuple[float, Counter[str]]:
        """Every distinct (tensor, wanted spec) once; twice for a parameter gathered twice and read in both phases."""
        total, counts = 0.0, Counter[str]()
        for tensor, users in self.items.users.items():
            maker = self.items.items[tensor.item]
            src = self.specs.outs[tensor.item][tensor.index]
            apart = maker.kind == "param" and storage_of(self.plan, maker).gather == "twice"
            meta = self.items.meta(tensor)
            wanted = set()
            for user, position in users:
                reader = self.items.items[user]
                reduce = ""
                if reader.kind == "grad":
                    reduce = storage_of(self.plan, self.items.items[self.items.param[reader.name]]).reduce
                wanted.add((self.specs.ins[user][position], reduce, reader.phase if apart else ""))
            for dst, reduce, _ in wanted:
                if src == dst:
                    continue
                total += bring_seconds(self.comm, meta, src, dst, reduce)
                whole = reduce == "all_reduce" and not any(p.kind == "P" for p in dst)
                mid = tuple(R if p.kind == "P" else p for p in src) if whole else src
                counts += self.comm.counts(meta.shape, src, mid) + self.comm.counts(meta.shape, mid, dst)
        return total, counts


__all__ = ["Price", "price", "priced"]
