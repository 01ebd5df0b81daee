"""The predicted memory of a rank over a step: every moment of `costmodel.liveness`, what is alive at the peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autopar.costmodel.compress import works
from autopar.costmodel.devices import Device, machine
from autopar.costmodel.items import Item, Items, items_of
from autopar.costmodel.legal import Specs, plan_specs, storage_of
from autopar.costmodel.liveness import Steps, scratch
from autopar.costmodel.memory import KINDS, Policy
from autopar.costmodel.tape import Buffer, Event, Tape, record
from autopar.graph import Program, pattern
from autopar.moments import Alive, Moment, Track
from autopar.plan import DEVICE, Plan

UPDATE = "update"


def track(program: Program | Items, plan: Plan, device: str | Device = "cpu", most: int = 12) -> Track:
    """The moments of a step of one rank under `plan`: behind every op, move and collective, then the update.

    Their largest sum is the peak that `costmodel.price` tells. most: so many of the largest tensors at the peak.

    Raises:
        PlanError: the plan is not legal for the program. MeshError: unknown device.
    """
    items = program if isinstance(program, Items) else items_of(program, plan.saved)
    specs, where = plan_specs(items, plan), machine(device, plan.mesh, None).device
    policy = Policy(items.program.training, optimizer=plan.optimizer)
    return _Tracker(items, plan, specs, policy, where).run(most)


class _Tracker:
    def __init__(self, items: Items, plan: Plan, specs: Specs, policy: Policy, device: Device) -> None:
        self.items, self.plan, self.specs, self.policy, self.device = items, plan, specs, policy, device
        self.tape = record(items, plan, specs, device.gloo, device.weights_from)
        self.steps = Steps(self.tape)
        self.held = self._held()
        self.moments: list[Moment] = []
        self.names = _Names(items, plan, self.tape)
        self.best, self.alive = -1.0, dict[Buffer, float]()

    def run(self, most: int) -> Track:
        forward = len(self.steps.forward)  # some of which, moves, the backward does once more

        def look(event: Event, totals: Mapping[str, float], alive: Mapping[Buffer, None]) -> None:
            self._add("forward" if len(self.moments) < forward else "backward", self.names.of_event(event), totals)
            if self.moments[-1].total > self.best:
                self.best, self.alive = self.moments[-1].total, {b: b.size for b in alive}

        behind = scratch(self.items, self.plan, self.specs, self.policy, self.device.gloo)
        self.steps.peak(behind, look)
        if self.tape.backward:
            grads = {b.base for b in self.tape.grads}
            self._add(UPDATE, "optimizer", {"gradients": sum(b.size for b in grads), "transient": behind})
            if self.moments[-1].total > self.best:
                self.best, self.alive = self.moments[-1].total, {b: b.size for b in grads}
                if behind:
                    self.alive[Buffer(behind)] = behind
        if not self.moments:  # nothing runs at all
            self._add("forward", "", {})
        return Track("every rank", tuple(self.moments), "ops", self._largest(most))

    def _held(self) -> dict[str, float]:
        """Bytes that are there all the time, as `liveness.peak` counts them."""
        found = dict.fromkeys(KINDS, 0.0)
        for item in self.items.items:
            if item.kind == "param":
                stored = self._stored(item)
                found["parameters"] += stored["parameters"]
                found["optimizer"] += stored["optimizer"]
        found["optimizer"] += sum(work.state_bytes for work in works(self.items, self.plan, self.specs))
        for buffer in self.tape.placeholders:
            if buffer.held != "parameters":
                found[buffer.held] += buffer.size
        return found

    def _stored(self, item: Item) -> dict[str, float]:
        state = storage_of(self.plan, item).state
        return self.policy.stored(item, self.specs.outs[item.index][0], self.plan.mesh.sizes, state)

    def _add(self, phase: str, name: str, totals: Mapping[str, float]) -> None:
        held = {kind: self.held[kind] + totals.get(kind, 0.0) for kind in KINDS}
        held["slack"] = self.device.slack * sum(held.values())
        self.moments.append(Moment(len(self.moments), phase, name, held))

    def _largest(self, most: int) -> tuple[Alive, ...]:
        found = [self.names.of_buffer(buffer, size) for buffer, size in self.alive.items() if size]
        for item in self.items.items:
            if item.kind == "param":
                module = item.name.rpartition(".")[0]
                stored = self._stored(item)
                found.append(Alive(item.name, module, "parameters", stored["parameters"]))
                found.append(Alive(f"state of {item.name}", module, "optimizer", stored["optimizer"]))
        for source, buffer in zip(_sources(self.items), self.tape.placeholders):
            if buffer.held != "parameters":
                found.append(Alive(source.name, "", buffer.held, buffer.size))
        groups: dict[tuple[str, str], Alive] = {}
        for one in found:
            if one.bytes:
                key = one.kind, pattern(one.name + ".")
                was = groups.get(key)
                groups[key] = one if was is None else _joined(was, one)
        return tuple(sorted(groups.values(), key=lambda a: -a.bytes)[:most])


def _joined(was: Alive, one: Alive) -> Alive:
    return replace(
        was,
        name=pattern(was.name + ".")[:-1],
        module=pattern(was.module + ".")[:-1],
        bytes=was.bytes + one.bytes,
        count=was.count + 1,
    )


def _sources(items: Items) -> list[Item]:
    """Items for which the tape has placeholders, in its order."""
    return [i for i in items.items if i.kind != "op" and not i.ins and i.outs and i.outs[0] is not None]


class _Names:
    """What events and buffers are, in words: the op or parameter that they come from."""

    def __init__(self, items: Items, plan: Plan, tape: Tape) -> None:
        self.items, self.tape = items, tape
        self.known: dict[Buffer, Alive] = {}
        for tensor, buffer in tape.made.items():
            self._learn(buffer, items.items[tensor.item], "")
        for (tensor, _, _), buffer in tape.brought.items():
            self._learn(buffer, items.items[tensor.item], "brought: ")
        for item, buffer in zip(_grads(items, plan), tape.grads):
            name = f"gradient of {item.name}"
            self.known[buffer.base] = Alive(name, item.name.rpartition(".")[0], "", 0.0)

    def _learn(self, buffer: Buffer, item: Item, words: str) -> None:
        module = item.name.rpartition(".")[0] if item.kind == "param" else _module(item.name)
        self.known.setdefault(buffer, Alive(words + item.name, module, "", 0.0))

    def of_buffer(self, buffer: Buffer, size: float) -> Alive:
        """What is alive in a buffer."""
        found = self.known.get(buffer)
        if found is None:
            parts = [self.known[b] for x in buffer.ins for b in (x, x.base) if b in self.known][:1]
            more = f" and {len(buffer.ins) - 1} more" if len(buffer.ins) > 1 else ""
            words = f"copy of {parts[0].name}{more}" if parts else "bucket" if buffer.kind != "transient" else "scratch"
            found = Alive(words, parts[0].module if parts else "", "", 0.0)
        return replace(found, kind=buffer.kind, bytes=size)

    def of_event(self, event: Event) -> str:
        """What runs."""
        number = self.tape.owner.get(event)
        if number is not None:
            return self.items.items[number].name
        return next((self.of_buffer(x, 0.0).name for x in (*event.outs, *event.ins)), "")


def _grads(items: Items, plan: Plan) -> list[Item]:
    """Gradients in the order in which the tape brings them home: right behind what makes them. None of the host's."""
    sinks: dict[int, list[Item]] = {}
    for item in items.items:
        if item.kind == "grad" and storage_of(plan, items.items[items.param[item.name]]).state == DEVICE:
            sinks.setdefault(item.ins[0].item, []).append(item)
    return [sink for item in items.items for sink in sinks.get(item.index, ())]


def _module(address: str) -> str:
    """`fwd:model.layers.0.mlp/mm#0` -> `model.layers.0.mlp`."""
    return address.partition(":")[2].rpartition("/")[0]


__all__ = ["UPDATE", "track"]
