"""The price of a plan on the unfolded program: seconds, collectives and memory, independent of how the plan was found.

Seconds are computation + communication + optimizer update, one after the other (no overlap). Memory is a walk over the
local program in graph order: a tensor lives from its making to its last reader, views share their base's memory, a
redistributed copy lives to the last reader that wants it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopar.costmodel.comm import Comm
from autopar.costmodel.devices import Device, Link, machine
from autopar.costmodel.edges import roots
from autopar.costmodel.items import Item, Items, Tensor, items_of
from autopar.costmodel.legal import Specs, plan_specs, storage_of
from autopar.costmodel.lower import bring_seconds
from autopar.costmodel.memory import KINDS, Policy
from autopar.costmodel.ops import Compute
from autopar.graph import BACKWARD, Program
from autopar.plan import Plan
from autopar.rule import WHOLE
from autopar.spec import R, Spec, local_shape


@dataclass(frozen=True)
class Price:
    """Seconds of a step and bytes per rank. `memory` by kind, at the moment of the peak; `peak_bytes` is their sum."""

    compute_s: float
    comm_s: float
    update_s: float
    memory: Mapping[str, float]
    peak_bytes: float
    collectives: Mapping[str, int] = field(default_factory=dict)

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
        device: preset name or Device. optimizer_bytes: per parameter element; None: two values of its dtype (Adam).
        links: axis name -> Link, in place of the device's.

    Raises:
        PlanError: the plan is not legal for the program.
        MeshError: unknown device or axis.
    """
    items = program if isinstance(program, Items) else items_of(program)
    specs = plan_specs(items, plan)
    where = machine(device, plan.mesh, links)
    policy = Policy(items.program.training, optimizer_bytes)
    return _Pricer(items, plan, specs, Compute(items, where), Comm(where), policy).run()


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
        compute, seconds = 0.0, {}
        for item in self.items.items:
            if item.kind == "op":
                key = (item.signature, self._row(item))
                if key not in seconds:
                    seconds[key] = self.compute.seconds(item, key[1])
                compute += seconds[key]
        comm, counts = self._comm()
        update = sum(
            self.policy.update_bytes(i, self.specs.outs[i.index][0], sizes) / self.compute.machine.device.traffic()
            for i in self.items.items
            if i.kind == "param"
        )
        memory = _Walk(self).run()
        return Price(compute, comm, update, memory, sum(memory.values()), dict(sorted(counts.items())))

    def _row(self, item: Item) -> tuple[Any, ...]:
        return tuple(c if n > 1 else WHOLE for c, n in zip(self.plan.choice(item.name), self.plan.mesh.sizes))

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
                mid = tuple(R if p.kind == "P" else p for p in src) if reduce == "all_reduce" else src
                counts += self.comm.counts(meta.shape, src, mid) + self.comm.counts(meta.shape, mid, dst)
        return total, counts


Copy = tuple[Tensor, Spec, str]  # tensor, where it lies, phase of its readers ("" : both)


class _Walk:
    """Live bytes over the local program, op by op; remembers the state at the peak."""

    def __init__(self, pricer: _Pricer):
        self.p = pricer
        self.items, self.specs = pricer.items, pricer.specs
        self.sizes = pricer.plan.mesh.sizes
        self.root = roots(self.items)
        self._aliases: dict[Tensor, Copy] = {}
        self.live: dict[Copy, float] = {}
        self.kind: dict[Copy, str] = {}
        self.totals = dict.fromkeys(KINDS, 0.0)
        self.best = dict(self.totals)

    def run(self) -> dict[str, float]:
        last = self._last_uses()
        die: dict[int, list[Copy]] = {}
        for copy, at in last.items():
            die.setdefault(at, []).append(copy)
        boundary = next((i.index for i in self.items.items if i.phase == BACKWARD and i.kind == "op"), None)
        for item in self.items.items:
            if item.index == boundary:
                self._name_saved(last, boundary)
            self._item(item)
            self._peak()
            for copy in die.get(item.index, ()):
                self._free(copy)
        return self.best

    def _copies(self, item: Item) -> list[Copy]:
        """What an item reads, one per operand."""
        found: list[Copy] = []
        for tensor, spec in zip(item.ins, self.specs.ins[item.index]):
            maker = self.items.items[tensor.item]
            made = self.specs.outs[tensor.item][tensor.index]
            if spec == made:
                found.append(self._alias(tensor))
                continue
            apart = maker.kind == "param" and storage_of(self.p.plan, maker).gather == "twice"
            found.append((tensor, spec, item.phase if apart else ""))
        return found

    def _alias(self, tensor: Tensor) -> Copy:
        """The memory in which a tensor lies where it was made: follow views up while their operand did not move."""
        found = self._aliases.get(tensor)
        if found is None:
            found = self._aliases[tensor] = self._find_alias(tensor)
        return found

    def _find_alias(self, tensor: Tensor) -> Copy:
        item = self.items.items[tensor.item]
        spec = self.specs.outs[tensor.item][tensor.index]
        if self.root[tensor] == tensor:
            return (tensor, spec, "")
        return self._copies(item)[0]

    def _last_uses(self) -> dict[Copy, int]:
        last: dict[Copy, int] = {}
        for item in self.items.items:
            if item.kind == "grad":
                continue  # moved at once, see _gradients
            for copy in self._copies(item):
                last[copy] = item.index
            for index, meta in enumerate(item.outs):
                if meta is not None and self.root[Tensor(item.index, index)] == Tensor(item.index, index):
                    last.setdefault((Tensor(item.index, index), self.specs.outs[item.index][index], ""), item.index)
            first = Tensor(item.index, 0)
            if self.root.get(first, first) != first:
                # A view keeps its base alive for its own readers.
                copy = self._alias(first)
                last[copy] = max(last.get(copy, 0), item.index)
        return last

    def _item(self, item: Item) -> None:
        if item.kind == "grad":
            return
        for copy, tensor, spec in zip(self._copies(item), item.ins, self.specs.ins[item.index]):
            if copy not in self.live:
                self._make(copy, self.items.meta(tensor).shape, self.items.meta(tensor).itemsize, spec)
        for index, meta in enumerate(item.outs):
            if meta is None:
                continue
            tensor, spec = Tensor(item.index, index), self.specs.outs[item.index][index]
            copy = self._alias(tensor)
            if copy in self.live:
                continue
            if item.kind == "param":
                held = self.p.policy.stored(item, spec, self.sizes)
                self.totals["parameters"] += held["parameters"]
                self.totals["optimizer"] += held["optimizer"]
                self.live[copy], self.kind[copy] = 0.0, "parameters"
            else:
                self._make(
                    copy, meta.shape, meta.itemsize, spec, {"buffer": "buffers", "input": "inputs"}.get(item.kind)
                )
            self._gradients(tensor)

    def _gradients(self, tensor: Tensor) -> None:
        """A gradient goes to its storage as soon as it is made, and stays."""
        for user, _ in self.items.users.get(tensor, ()):
            sink = self.items.items[user]
            if sink.kind == "grad":
                param = self.items.items[self.items.param[sink.name]]
                spec = self.specs.ins[user][0]
                self.totals["gradients"] += self.p.policy.stored(param, spec, self.sizes)["gradients"]

    def _make(self, copy: Copy, shape: tuple[int, ...], itemsize: int, spec: Spec, kind: str | None = None) -> None:
        maker = self.items.items[copy[0].item]
        kind = kind or ("gathered" if maker.kind == "param" else "transient")
        size = float(math.prod(local_shape(shape, spec, self.sizes)) * itemsize)
        self.live[copy], self.kind[copy] = size, kind
        self.totals[kind] += size

    def _free(self, copy: Copy) -> None:
        if self.kind.get(copy) in ("parameters", "buffers", "inputs"):
            return
        size = self.live.pop(copy, None)
        if size is not None:
            self.totals[self.kind.pop(copy)] -= size

    def _name_saved(self, last: dict[Copy, int], boundary: int) -> None:
        """What is alive when the backward starts and read after that is an activation."""
        for copy, kind in list(self.kind.items()):
            if kind == "transient" and last.get(copy, 0) >= boundary:
                self.kind[copy] = "activations"
                self.totals["transient"] -= self.live[copy]
                self.totals["activations"] += self.live[copy]

    def _peak(self) -> None:
        if sum(self.totals.values()) > sum(self.best.values()):
            self.best = dict(self.totals)


__all__ = ["Price", "price"]
