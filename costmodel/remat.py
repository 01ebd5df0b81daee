"""What the forward does not keep, for one plan: an integer program over the classes of a folded program.

For an op c of the forward: r[c] = 1 if the backward has a copy of it, h[c] = 1 if what it makes waits on the host
(`autopar.recompute`). For a value v that an op makes, or that has been brought to another spec: need[v] = 1 if the
backward reads it, k[v] = 1 if the forward keeps it for that. With n members in a class, s seconds of an op, d of
bringing a value to a spec, w of a way to or from the host, and F and B seconds of computation in the two halves:

    (1)  need[v] = 1                                                  of what an op of the backward reads
    (2)  need[v] >= r[c]                                              of what a copied op reads
    (3)  k[v] >= need[v] - r[c] - h[c]                                of what c makes: kept, made again, or fetched
    (4)  m[v] >= need[v] + r[c] + h[c] - 1                            and brought to its spec again, if it was moved
    (5)  fixed(t) + sum_v size (a0(t) + (a1(t) - a0(t)) k + (a2(t) - a0(t)) (need - k)) <= limit    at every moment t
    (6)  r[c] + h[c] <= 1
    (7)  e >= sum_c n w h - u F,  f >= sum_c n w h - u (B + sum_c n s r)    what is waited for
    (8)  sum_c n b h <= host                                          b: bytes that wait there, of each member
    min  sum_c n s r + sum_v n d m + e + f

Moves (views, casts) cost nothing: they are made again from what they read, or kept where that takes less. The moments
of (5) are those of a step that keeps everything. Of the members of v, a1(t) are alive at t if it is kept, a2(t) if it
is made again or fetched, a0(t) if the backward needs it in no way; fixed(t) is the rest. That is exact but for tensors
on their way, and for where copies run: right before their first reader, which depends on what else is copied; it is
taken from the last answer. So the program is solved a few times, and `costmodel.remat_search` measures each answer on
the program that it makes.

Sources: Jain et al., "Checkmate" (2020), for rematerialisation as an integer program; here the backward runs once, in
order, so that a copy has one place, and the program does not grow with the square of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np

from autopar.costmodel.comm import Comm
from autopar.costmodel.fold import Fold
from autopar.costmodel.ilp import solve_linear
from autopar.costmodel.items import Item, Items, Tensor
from autopar.costmodel.legal import Specs
from autopar.costmodel.liveness import Steps
from autopar.costmodel.model import Linear, Terms
from autopar.costmodel.ops import Compute
from autopar.costmodel.remat_terms import Chosen, Life, Spans, Version
from autopar.costmodel.tape import MAYBE, Buffer, Event, Tape
from autopar.graph import BACKWARD, FORWARD, MOVES, VIEWS
from autopar.plan import Plan
from autopar.reshard import steps
from autopar.rule import WHOLE
from autopar.spec import Spec, local_shape

#: Relative gap of a solve, and its seconds.
GAP, SECONDS = 1e-3, 10.0
#: Seconds of all ops are 1000: what a byte costs of as many as there are, where time is the same, and where only
#: bytes count.
TIE, LEAST = 1e-2, 1e6
#: Of the members of a class, whose moments have a row.
ENDS = (0.0, 0.5, 1.0)
#: Part of the computation of a half of the step that ways to and from the host can hide behind, until a simulation has
#: shown it: they begin late, end early, and come in bursts.
USABLE, LEAST_USABLE = 0.8, 0.3


class Remat:
    """The program of one plan, of which everything but the limit and the places of copies is known.

    Attributes:
        classes: those of the forward that compute: what may be copied, or wait on the host.
        hosts: whether anything may wait there. usable: u of (7). room: bytes on the host.
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

    def solve(
        self, limit: float | None, copied: Collection[int], copies: bool, hosts: bool
    ) -> tuple[Chosen, float] | None:
        """What not to keep so that at most `limit` bytes come and go, and how many then do; None if there is no way.

        limit: None: so that as few as possible do. copied: the classes by which it is judged where copies run. copies,
        hosts: whether anything may be copied, and wait on the host.
        """
        if limit is None:  # as few as possible, and of those that are about as few the quickest
            program = _Program(self, copied, None, copies, hosts)
            values = solve_linear(program.linear, SECONDS, GAP)
            assert values is not None  # everything may be kept
            limit = program.most(values) * (1 + GAP)
        program = _Program(self, copied, limit, copies, hosts)
        values = solve_linear(program.linear, SECONDS, GAP)
        if values is None:
            return None
        again, away = (frozenset(c for c, col in cols.items() if values[col] > 0.5) for cols in program.decided)
        return Chosen(again, away), program.most(values)

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

    def _lives(self) -> dict[Version, Life]:
        lives: dict[Version, Life] = {}

        def of(version: Version) -> Life:
            if version not in lives:
                lives[version] = Life(self.at.get(version.tensor.item, 0))
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
        for cls, members in enumerate(self.fold.members):
            item = self.fold.first(cls)
            if item.kind == "op":
                found[item.phase == BACKWARD] += self.seconds(cls) * len(members)
        return found[0], found[1]

    def learn(self, chosen: Chosen, exposed: float) -> None:
        """Fit `usable` so that the program's seconds of waiting for the host are those that were simulated."""
        ways = sum(self.sent(c) * len(self.fold.members[c]) for c in chosen.away)
        forward, backward = self.halves()
        backward += sum(self.seconds(c) * len(self.fold.members[c]) for c in chosen.again)

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


class _Program:
    """Columns and rows, with the numbers of the equations above."""

    def __init__(
        self, remat: Remat, copied: Collection[int], limit: float | None, copies: bool, hosts: bool
    ) -> None:  # fmt: skip
        self.remat, self.limit = remat, limit
        self.linear = Linear()
        self.scale = 1e3 / max(sum(remat.seconds(c) * len(remat.fold.members[c]) for c in remat.classes), 1e-12)
        self.copy = {
            c: self.linear.column(remat.seconds(c) * len(remat.fold.members[c]) * self.scale, binary=True)
            for c in remat.classes
        }
        self.away: dict[int, int] = {}
        self.decided = self.copy, self.away
        if hosts and remat.hosts:
            self._hosted()
        for column in () if copies else self.copy.values():
            self.linear.row({column: 1.0}, 0.0, 0.0)
        self.free = {c: self.linear.column() for c in remat.reads if c not in self.copy}
        self.need = {v: self.linear.column() for v in remat.members}
        unit = self.unit = max(max(remat.totals), 1.0)
        # Of what takes as long, the least bytes.
        self.keep = {v: self.linear.column(TIE * remat.size(m[0]) * len(m) / unit) for v, m in remat.members.items()}
        self.top = None if limit is not None else self.linear.column(LEAST, high=math.inf)  # the limit, in units
        self.moments: list[tuple[Terms, float]] = []
        self._needs()
        self._kept()
        self._moments(remat.spans(copied), remat.likely)

    def _hosted(self) -> None:
        """(6), (7) and (8)."""
        remat, row = self.remat, self.linear.row
        ways: dict[int, float] = {}
        bytes_: dict[int, float] = {}
        for cls, copy in self.copy.items():
            seconds = remat.sent(cls) * len(remat.fold.members[cls]) * self.scale
            if seconds:
                away = self.away[cls] = self.linear.column(TIE * seconds, binary=True)
                ways[away] = seconds
                bytes_[away] = sum(remat.waiting(cls)) * len(remat.fold.members[cls])
                row({copy: 1.0, away: 1.0}, -math.inf, 1.0)
        forward, backward = (remat.usable * seconds * self.scale for seconds in remat.halves())
        again = {
            column: -remat.usable * remat.seconds(c) * len(remat.fold.members[c]) * self.scale
            for c, column in self.copy.items()
        }
        for hidden, terms in ((forward, ways), (backward, {**ways, **again})):
            exposed = self.linear.column(1.0, high=math.inf)
            row({**terms, exposed: -1.0}, -math.inf, hidden)
        if sum(bytes_.values()) > remat.room:
            row({column: size / max(remat.room, 1.0) for column, size in bytes_.items()}, -math.inf, 1.0)

    def _needs(self) -> None:
        """(1) and (2)."""
        for version, members in self.remat.members.items():
            if any(self.remat.lives[m].last >= 0 for m in members):
                self.linear.row({self.need[version]: 1.0}, 1.0, 1.0)
        for cls, reads in self.remat.reads.items():
            for version in reads:
                again = self.copy.get(cls, self.free.get(cls))
                assert again is not None
                self.linear.row({self.need[version]: 1.0, again: -1.0}, 0.0, math.inf)

    def _kept(self) -> None:
        """(3) and (4)."""
        remat, row = self.remat, self.linear.row
        for version, members in remat.members.items():
            need, keep, cls = self.need[version], self.keep[version], version.tensor.item
            seconds = remat.moved(members[0])
            if seconds is None:
                again = self.copy.get(cls, self.free.get(cls))
                terms: Terms = {keep: 1.0, need: -1.0}
                if again is not None:
                    terms[again] = 1.0
                if cls in self.away:
                    terms[self.away[cls]] = 1.0
                row(terms, 0.0, math.inf)
                continue
            # Copied is what one of its sources is a copy of, or comes from the host.
            made = remat.sources(members[0].tensor)
            sources = sorted({columns[c] for columns in self.decided for c in made if c in columns})
            row({keep: 1.0, need: -1.0, **dict.fromkeys(sources, 1.0)}, 0.0, math.inf)
            moved = self.linear.column(seconds * len(members) * self.scale)
            for source in sources:
                row({moved: 1.0, need: -1.0, source: -1.0}, -1.0, math.inf)

    def _moments(self, spans: Spans, all_: Spans) -> None:
        """(5)."""
        remat, split = self.remat, self.remat.split
        when = np.array(sorted(self._chosen()))
        late = when >= split
        fixed = np.array([remat.totals[t] for t in when])
        rows: list[Terms] = [{} for _ in when]
        for version, members in remat.members.items():
            lives = [remat.lives[m] for m in members]
            made = np.array([x.made for x in lives])
            read = np.array([max(x.read, x.made) for x in lives])
            taken = [spans[m] if spans[m][0] < math.inf else all_[m] for m in members]
            first = np.array([a for a, _ in taken])
            last = np.array([max(b, x.last) for (_, b), x in zip(taken, lives)])
            begin, end = (np.array(x) for x in zip(*map(remat.span_held, members)))
            out = np.array([remat.buffer(m) in remat.outputs for m in members])
            t = when[:, None]
            early = ~late
            none = ((made <= t) & ((t <= read) & early[:, None] | out)).sum(1)  # outputs are always there
            kept = np.where(late, ((t <= last) | out).sum(1), (made <= t).sum(1))
            again = np.where(late, ((first <= t) & (t <= last) | out).sum(1), none)
            handed = begin == 0  # to the backward, by a step that keeps everything
            held = np.where(
                late, ((begin <= t) & (t <= end)).sum(1), ((made <= t) & ((t <= read) | handed)).sum(1)
            )  # fmt: skip
            size = remat.size(members[0])
            fixed -= size * (held - none)
            keep, need = self.keep[version], self.need[version]
            for at in np.nonzero((kept != none) | (again != none))[0]:
                terms = rows[at]
                up = size * float(again[at] - none[at])
                terms[keep] = terms.get(keep, 0.0) + size * float(kept[at] - none[at]) - up
                if up:
                    terms[need] = terms.get(need, 0.0) + up
        for terms, rest in zip(rows, fixed):
            self.moments.append((terms, float(rest)))
            scaled = {c: v / self.unit for c, v in terms.items() if v}
            if self.top is not None:
                scaled[self.top] = -1.0
            self.linear.row(scaled, -math.inf, ((self.limit or 0.0) - float(rest)) / self.unit)

    def most(self, values: list[float]) -> float:
        """Bytes that come and go at most."""
        return max(rest + sum(values[c] * v for c, v in terms.items()) for terms, rest in self.moments)

    def _chosen(self) -> Iterable[int]:
        """Moments that have a row: of every class those of its first members, its last ones, and between."""
        remat = self.remat
        for members in remat.fold.members:
            times = sorted(remat.at[i] for i in members if i in remat.at)
            if times:
                yield from {times[round(part * (len(times) - 1))] for part in ENDS}


__all__ = ["USABLE", "Chosen", "Remat", "Version"]
