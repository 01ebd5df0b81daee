"""What one plan keeps from forward to backward: what is read where, when it is alive, what it takes to do without it.

All of it is of the classes of a folded program. `costmodel.remat_program` makes an integer program of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from autopar.costmodel.comm import Comm
from autopar.costmodel.fold import Fold
from autopar.costmodel.items import Item, Items, Tensor
from autopar.costmodel.legal import Specs
from autopar.costmodel.liveness import Steps
from autopar.costmodel.ops import Compute
from autopar.costmodel.tape import MAYBE, Buffer, Event, Tape
from autopar.graph import BACKWARD, FORWARD, MOVES, VIEWS
from autopar.plan import Plan
from autopar.reshard import steps
from autopar.rule import WHOLE
from autopar.spec import Spec, local_shape

#: Part of the computation of a half of the step that ways to and from the host can hide behind, until a simulation has
#: shown it: they begin late, end early, and come in bursts.
USABLE, LEAST_USABLE = 0.8, 0.3


class Chosen(NamedTuple):
    """Classes of ops: those of which the backward has copies, and those whose results wait on the host."""

    again: frozenset[int] = frozenset()
    away: frozenset[int] = frozenset()


class Version(NamedTuple):
    """A tensor in a spec."""

    tensor: Tensor
    spec: Spec


#: First and last moment of the backward at which a version is read.
Spans = Mapping[Version, tuple[float, float]]


@dataclass
class _Life:
    """When a version is alive, in moments of a step that keeps everything.

    made: where. read: its last reader in the forward. first, last: readers in the backward. by: ops of the forward
    that read it.
    """

    made: int
    read: int = -1
    first: float = math.inf
    last: float = -1.0
    by: list[int] = field(default_factory=list)


class Remat:
    """Of one plan, everything but the limit and the places of copies.

    Attributes:
        classes: those of the forward that compute: what may be copied, or wait on the host.
        hosts: whether anything may wait there. usable: u of (7) of the program. room: bytes on the host.
    """

    def __init__(self, items: Items, folded: Fold, plan: Plan, specs: Specs, compute: Compute, comm: Comm, tape: Tape):
        self.items, self.fold, self.plan, self.specs = items, folded, plan, specs
        self.compute, self.comm, self.tape = compute, comm, tape
        self.hosts = compute.machine.device.host is not None
        self.usable = USABLE
        self.room = math.inf
        self.sizes = plan.mesh.sizes
        self.walk = Steps(tape)
        self.totals: list[float] = []
        self.walk.peak(0.0, lambda event, totals, alive: self.totals.append(sum(totals.values())))
        self.split = len(self.walk.forward)  # moments before it are the forward's
        events = [*self.walk.forward, *self.walk.backward]
        self.at = self._places(events)
        self._held(events)
        self.forward = [i for i in items.items if i.kind == "op" and i.phase == FORWARD and not i.constant]
        self.inside = {i.index for i in self.forward}
        self.lives = self._lives()
        self.classes = sorted({folded.of[i.index] for i in self.forward if not self._free(i)})
        self._group()
        self.likely = self.spans(self.classes)  # where the last answer does not tell

    def narrow(self, classes: Collection[int]) -> None:
        """What hands on from layer to layer: if one of it is copied, the others are likely to be kept.

        Were all copied, a copy in one layer would be wanted as soon as the backward begins, by all layers behind.
        """
        likely = dict(self.likely)
        for cls in classes:
            spans = self.spans(set(self.classes) - (set(classes) - {cls}))
            for version, life in self.lives.items():
                read = any(self.fold.of[i] == cls for i in life.by)
                if read and likely[version][0] < spans[version][0] < math.inf:
                    likely[version] = spans[version]
        self.likely = likely

    # ---- what is read where ------------------------------------------------------------------------------------

    def _places(self, events: list[Event]) -> dict[int, int]:
        """Item -> the moment of its last event, in its own phase: moves of the forward are made again in the other."""
        found: dict[int, int] = {}
        for at, event in enumerate(events):
            owner = self.tape.owner.get(event)
            if owner is not None and (at < self.split) == (self.items.items[owner].phase == FORWARD):
                found[owner] = at
        return found

    def _held(self, events: list[Event]) -> None:
        """When a step that keeps everything holds what: `saved` to its last reader, the results of moves from there."""
        self.saved = {b.base for b in self.walk.saved}
        self.outputs = {b.base for b in self.tape.outputs}
        self.again: dict[Buffer, int] = {}
        self.used: dict[Buffer, int] = {}
        for at, event in enumerate(events):
            for x in event.outs:
                if at >= self.split:
                    self.again.setdefault(x.base, at)
            for x in (*event.ins, *event.outs):
                self.used[x.base] = at

    def buffer(self, version: Version) -> Buffer:
        """What holds a version."""
        tensor, spec = version
        found = self.tape.brought.get((tensor, spec, FORWARD)) if spec != self.home(tensor) else None
        return (found or self.tape.made[tensor]).base

    def span_held(self, version: Version) -> tuple[int, int]:
        """First and last moment of the backward at which a step that keeps everything holds a version; none: (1, 0)."""
        buffer = self.buffer(version)
        last = self.used.get(buffer, -1)
        if buffer in self.outputs:
            return 0, len(self.totals)
        if buffer in self.saved:
            return 0, last
        return (self.again[buffer], last) if buffer in self.again else (1, 0)

    def _free(self, item: Item) -> bool:
        assert item.node is not None
        return item.node.target in MOVES

    def _alias(self, item: Item) -> bool:
        assert item.node is not None
        return item.node.target in VIEWS or item.node.target in MAYBE

    def home(self, tensor: Tensor) -> Spec:
        """Where a tensor is made."""
        return self.specs.outs[tensor.item][tensor.index]

    def roots(self, tensor: Tensor, spec: Spec) -> list[Version]:
        """What memory a version is, seen through views; nothing if it is there anyway."""
        if tensor.item not in self.inside:
            return []
        if spec == self.home(tensor) and self._alias(self.items.items[tensor.item]):
            return self.operands(self.items.items[tensor.item])
        return [Version(tensor, spec)]

    def operands(self, item: Item) -> list[Version]:
        """What an op reads, seen through views."""
        return [v for t, s in zip(item.ins, self.specs.ins[item.index]) for v in self.roots(t, s)]

    def _wanted(self, item: Item) -> list[Version]:
        """What an op of the backward has of the forward."""
        found: list[Version] = []
        for tensor, spec in zip(item.ins, self.specs.ins[item.index]):
            home = self.home(tensor)
            if spec != home and (tensor, spec, FORWARD) not in self.tape.brought and tensor.item in self.inside:
                moves = steps(self.items.meta(tensor).shape, home, spec, self.sizes)
                if not moves or moves[0].kind != "local_chunk":  # the backward moves it; a piece is cut by the forward
                    spec = home
            found += self.roots(tensor, spec)
        return found

    def _lives(self) -> dict[Version, _Life]:
        lives: dict[Version, _Life] = {}

        def of(version: Version) -> _Life:
            if version not in lives:
                lives[version] = _Life(self.at.get(version.tensor.item, 0))
            return lives[version]

        for item in self.forward:
            here = self.at.get(item.index, 0)
            for index, meta in enumerate(item.outs):
                if meta is not None and not self._alias(item):
                    of(Version(Tensor(item.index, index), self.specs.outs[item.index][index]))
            if self._alias(item):
                continue
            for version in self.operands(item):
                life = of(version)
                life.read = max(life.read, here)
                life.by.append(item.index)
        for item in self.items.items:
            if item.kind == "op" and item.phase == BACKWARD and item.index in self.at:
                here = self.at[item.index]
                for version in self._wanted(item):
                    life = of(version)
                    life.first, life.last = min(life.first, here), max(life.last, here)
        return lives

    # ---- classes -----------------------------------------------------------------------------------------------

    def key(self, version: Version) -> Version:
        """A version of the class."""
        return Version(Tensor(self.fold.of[version.tensor.item], version.tensor.index), version.spec)

    def _group(self) -> None:
        self.members: dict[Version, list[Version]] = {}
        for version in self.lives:
            self.members.setdefault(self.key(version), []).append(version)
        self.reads: dict[int, set[Version]] = {}  # class -> what its members read
        for item in self.forward:
            if not self._alias(item):
                self.reads.setdefault(self.fold.of[item.index], set()).update(map(self.key, self.operands(item)))

    def size(self, version: Version) -> float:
        """Bytes on a rank."""
        meta = self.items.meta(version.tensor)
        return float(math.prod(local_shape(meta.shape, version.spec, self.sizes)) * meta.itemsize)

    def seconds(self, cls: int) -> float:
        """Seconds of an op."""
        item = self.fold.first(cls)
        row = tuple(c if n > 1 else WHOLE for c, n in zip(self.plan.choice(item.name), self.sizes))
        return self.compute.seconds(item, row)

    def total(self, cls: int) -> float:
        """Seconds of all ops of a class."""
        return self.seconds(cls) * len(self.fold.members[cls])

    def waiting(self, cls: int) -> list[float]:
        """Bytes of each tensor that a member of a class makes for the backward: what would wait on the host."""
        mine = [m[0] for v, m in self.members.items() if v.tensor.item == cls and v.spec == self.home(m[0].tensor)]
        return [self.size(v) for v in mine if self.lives[v].last >= 0]

    def sent(self, cls: int) -> float:
        """Seconds of one way between device and host of what a member of a class makes for the backward."""
        host = self.compute.machine.device.host
        assert host is not None
        return sum(host.link.latency + size / host.link.bandwidth for size in self.waiting(cls))

    def halves(self) -> tuple[float, float]:
        """Seconds of computation of forward and backward."""
        found = [0.0, 0.0]
        for cls in range(len(self.fold.members)):
            item = self.fold.first(cls)
            if item.kind == "op":
                found[item.phase == BACKWARD] += self.total(cls)
        return found[0], found[1]

    def learn(self, chosen: Chosen, exposed: float) -> None:
        """Fit `usable` so that the program's seconds of waiting for the host are those that were simulated."""
        ways = sum(self.sent(c) * len(self.fold.members[c]) for c in chosen.away)
        forward, backward = self.halves()
        backward += sum(map(self.total, chosen.again))

        def told(usable: float) -> float:
            return max(0.0, ways - usable * forward) + max(0.0, ways - usable * backward)

        low, high = (0.0, 1.0) if told(self.usable) < exposed else (self.usable, 1.0)
        for _ in range(20):
            mid = (low + high) / 2
            if told(mid) > exposed:
                low = mid
            else:
                high = mid
        self.usable = max(high, LEAST_USABLE) if low else self.usable

    def moved(self, version: Version) -> float | None:
        """Seconds to bring a version to its spec; None if it is made there."""
        home = self.home(version.tensor)
        if version.spec == home:
            return None
        meta = self.items.meta(version.tensor)
        return self.comm.seconds(meta.shape, meta.itemsize, home, version.spec)

    def sources(self, tensor: Tensor) -> list[int]:
        """The classes of which one must be copied for the backward to have a copy of a tensor, which was moved."""
        item = self.items.items[tensor.item]
        if not self._free(item):
            return [self.fold.of[tensor.item]]
        return [c for t in item.ins if t.item in self.inside for c in self.sources(t)]

    # ---- when copies run ---------------------------------------------------------------------------------------

    def spans(self, copied: Collection[int]) -> Spans:
        """First and last moment of the backward at which a version is read, if these classes are copied."""
        when: dict[int, float] = {}  # op of the forward -> when its copy runs
        made: dict[int, list[Version]] = {}
        for version in self.lives:
            made.setdefault(version.tensor.item, []).append(version)
        found: dict[Version, tuple[float, float]] = {}
        for item in reversed(self.forward):
            first = math.inf
            for version in made.get(item.index, ()):
                life = self.lives[version]
                times = [when[i] for i in life.by if when.get(i, math.inf) < math.inf]
                span = min([life.first, *times]), max([life.last, *times])
                found[version] = span
                first = min(first, span[0])
            if self._free(item) or self.fold.of[item.index] in copied:
                when[item.index] = first
        return found


__all__ = ["USABLE", "Chosen", "Remat", "Version"]
