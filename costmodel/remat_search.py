"""A plan that keeps less: what the backward does again and what waits on the host, so that the peak is within a limit.

`costmodel.remat_program` is solved, its answer made into a program, and that program's peak and step taken as those of
any other. What the answer missed by is taken off the limit, and where its copies run is told to the next solve.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate

from autopar.costmodel.comm import Comm
from autopar.costmodel.copies import starred
from autopar.costmodel.devices import Device, Link, machine
from autopar.costmodel.fold import Fold, fold
from autopar.costmodel.items import Items, Tensor, items_of
from autopar.costmodel.legal import plan_specs
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.pieces import candidates
from autopar.costmodel.price import Price, priced
from autopar.costmodel.remat import USABLE, Chosen, Remat
from autopar.costmodel.remat_program import solve
from autopar.costmodel.simulate import Timeline, run
from autopar.costmodel.tape import record
from autopar.graph import Program, pattern
from autopar.offload import COPIES
from autopar.pipeline.regions import nbytes, regions_of
from autopar.plan import Plan
from autopar.recompute import OFFLOADED, RECOMPUTE

#: The layer of an op: its address up to the first number in it.
_LAYER = re.compile(r"[^/]*?[.]\d+(?=[./])")
#: Solves for one limit, and how near to it the peak of an answer ends them.
ROUNDS, NEAR = 10, 0.01
#: Of an answer, copies and ways to the host that are tried without, and exchanges of one copy for another that are
#: tried; by hand, results of which one is handed on.
SHED, EXCHANGES, TRIALS = 24, 48, 8
#: How many copies to and from the host may be under way, that are tried besides: more than most plans need.
FLIGHTS = (4, 8)
#: Plans that are priced, at most, when the least is looked for or exchanges are tried: WORK over the square of the ops,
#: which is as long as it takes; for the least FEWEST anyway. The answer must not hang on how busy the machine is, as a
#: limit that is asked for because of it must be enough.
WORK, FEWEST = 4e8, 5
#: By what parts of the peak less is asked for, when the least is looked for.
STEPS = (0.1, 0.03, NEAR)


Judge = Callable[[Chosen], frozenset[int]]


@dataclass(eq=False)
class Kept:
    """A plan with what its backward computes again or fetches, priced and simulated."""

    plan: Plan
    price: Price
    simulated: Callable[[], Timeline]
    chosen: Chosen
    copies: int = COPIES
    room: float = math.inf  # bytes on the host

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated step; of what does not fit, nobody asks."""
        return self.simulated()

    @property
    def peak(self) -> float:
        """Bytes per rank; of what the host has no room for, no device is enough."""
        return self.price.peak_bytes if self.price.host_bytes <= self.room else math.inf


class Rematerialiser:
    """Looks for what one plan need not keep. `plan` says nothing of that yet.

    recompute, offload: whether anything may be computed again, and may wait on the host, if the device has one.
    """

    def __init__(
        self, program: Program, plan: Plan, device: str | Device, links: Mapping[str, Link] | None, policy: Policy,
        items: Items | None = None, folded: Fold | None = None, deadline: float = math.inf, recompute: bool = True,
        offload: bool = True,
    ) -> None:  # fmt: skip
        self.program, self.plan, self.links, self.policy = program, plan, links, policy
        self.deadline, self.recompute = deadline, recompute
        self.items = items or items_of(program)
        self.fold = folded or fold(self.items)
        self.where = machine(device, plan.mesh, links)
        self.seen: dict[tuple[Chosen, int], Kept] = {}
        self.visited: dict[tuple[Chosen, int], Kept] | None = None  # while the least is looked for, what has come by
        specs = plan_specs(self.items, plan)
        compute, comm = Compute(self.items, self.where), Comm(self.where)
        tape = record(self.items, plan, specs, self.where.device.gloo, self.where.device.weights_from)
        self.remat = Remat(self.items, self.fold, plan, specs, compute, comm, tape)
        self.hosts = offload and self.remat.hosts
        self.room = math.inf if self.where.device.host is None else self.where.device.host.memory
        self.narrow = self._narrow()
        self.handed = self._handed()
        self.remat.narrow(self.narrow)
        self.base = self.measured(Chosen())
        self.remat.room = max(0.0, self.room - self.base.price.host_bytes)  # beside what lies there anyway

    def within(self, limit: float) -> Kept | None:
        """The quickest that was found of those whose peak is at most `limit`; None if none was."""
        if self.base.peak <= limit:
            return self.base
        for hosts in self._ways():
            for judge in (self._exactly, self._nearly):
                self._look(limit, judge, hosts)
        # Whatever has come by and fits, not only what was looked for.
        best = min((kept for kept in self.seen.values() if kept.peak <= limit), key=_seconds, default=None)
        starts = [best or self._first_by_hand(limit)]
        # The program sees no further than its moments: what is done by hand is a start, too.
        starts += [] if self._late() else [k for k in self._tried(self.handed) if k.peak <= limit]
        found = [self._improved(start, limit) for start in dict.fromkeys(starts) if start is not None]
        best = min(found, key=_seconds, default=None)
        if best is None or self.visited is not None:  # for the least it is no matter how quick it is
            return best
        return self._exchanged(best, limit)

    def _ways(self) -> list[bool]:
        """Whether anything waits on the host, in the answers to look for."""
        return [hosts for hosts, allowed in ((False, self.recompute), (True, self.hosts)) if allowed]

    def _look(self, limit: float, judge: Judge, hosts: bool) -> None:
        """Measure answers to the program until one is near the limit, and within it."""
        aim, copied = limit, judge(Chosen())  # the limit that the program is given, and what it takes for copied
        self.remat.usable = USABLE
        low, high = 0.0, math.inf  # limits of which the answer has fitted, and has not
        for _ in range(ROUNDS):
            if self._late():
                break
            answer, told, met = self._answer(aim, copied, hosts)
            found = self.measured(answer)
            tried = self._flown(found, limit)
            if answer.away:
                self.remat.learn(answer, tried.timeline.exposed_s - self.base.timeline.exposed_s)
            if found.peak <= limit:
                low = max(low, aim)
                if found.peak >= (1 - NEAR) * limit:
                    break
            else:
                high = min(high, aim)
            aim = limit - (found.peak - told)
            if not low < aim < high:  # it has been there, or what runs where has changed
                aim = (low + high) / 2 if high < math.inf else low * (1 + NEAR)
            if high - low < NEAR / 4 * limit:
                break
            before, copied = copied, judge(answer)
            if not met and found.peak > limit and copied == before and not answer.away:
                break  # the next answer, too, would be what comes nearest (of ways to the host it would know more)

    def _improved(self, best: Kept, limit: float) -> Kept:
        """Without copies, and ways to the host, that it fits without, those that take longest tried first."""
        again, away = best.chosen
        order = sorted(again, key=lambda c: -self.remat.total(c))[:SHED]
        order += sorted(away, key=lambda c: -self.remat.sent(c) * len(self.fold.members[c]))[:SHED]
        for cls in order:
            if self._late():
                break
            found = self.measured(Chosen(best.chosen.again - {cls}, best.chosen.away - {cls}), best.copies)
            if found.peak <= limit and _seconds(found) < _seconds(best):
                best = found
        return best

    def _exchanged(self, best: Kept, limit: float) -> Kept:
        """With a quicker copy in the place of one, while that fits: the longest first, for what is quickest."""
        left = min(EXCHANGES, int(self._most()))
        while True:
            for chosen in self._exchanges(best.chosen, limit - best.peak):
                if self._late() or not left:
                    return best
                left -= (chosen, best.copies) not in self.seen
                found = self.measured(chosen, best.copies)
                if found.peak <= limit and _seconds(found) < _seconds(best):
                    best = found
                    break
            else:
                return best

    def _exchanges(self, chosen: Chosen, room: float) -> Iterator[Chosen]:
        """One copy for another that is quicker and lets go of as many bytes, but for those there is room for."""
        again, away = chosen
        others = set(self.remat.classes) - again - away
        seconds = {c: self.remat.total(c) for c in again | others}
        size = {c: sum(self.remat.waiting(c)) * len(self.fold.members[c]) for c in seconds}
        for one in sorted(again, key=lambda c: -seconds[c]):
            for other in sorted(others, key=lambda c: seconds[c]):
                if seconds[other] < seconds[one] and size[other] > 0 and size[other] >= size[one] - room:
                    yield Chosen(again - {one} | {other}, away)

    def _flown(self, kept: Kept, limit: float) -> Kept:
        """With more copies under way while that is quicker and fits; with fewer, if only that fits."""
        if not kept.chosen.away or self._late():
            return kept
        if kept.peak > limit:
            fewer = self.measured(kept.chosen, 1) if kept.peak <= (1 + 4 * NEAR) * limit else kept
            return fewer if fewer.peak <= limit else kept
        for copies in FLIGHTS:
            more = self.measured(kept.chosen, copies)
            if more.peak > limit or _seconds(more) >= _seconds(kept):
                break
            kept = more
        return kept

    def _answer(self, limit: float | None, copied: Collection[int], hosts: bool) -> tuple[Chosen, float, bool]:
        """What not to keep for a limit, or what comes nearest; the peak that the program tells; whether it is met."""
        part, rest = self._room()
        found = None if limit is None else solve(self.remat, limit / part - rest, copied, self.recompute, hosts)
        met = found is not None
        found = found or solve(self.remat, None, copied, self.recompute, hosts)
        assert found is not None  # without a limit there is always one
        return found[0], (found[1] + rest) * part, met

    def smallest(self) -> Kept:
        """The answer of least peak: all that need not be kept, as far as that takes less. However late it is."""
        self.visited = {(Chosen(), COPIES): self.base}
        try:
            return self._smallest()
        finally:
            self.visited = None

    def _smallest(self) -> Kept:
        assert self.visited is not None
        for _ in self._by_hand():
            pass
        for judge in (self._exactly, self._nearly):
            copied = judge(Chosen())
            for _ in range(ROUNDS):
                answer, *_ = self._answer(None, copied, self.hosts)
                if (answer, 1 if answer.away else COPIES) in self.visited or self._late():
                    break
                self.measured(answer, 1)
                copied = judge(answer)
        best = min(self.visited.values(), key=lambda kept: kept.peak)
        for step in STEPS:
            while not self._late() and (less := self.within((1 - step) * best.peak)) is not None:
                best = less
        return best

    def by_hand(self) -> Kept:
        """What layers hand on is kept, or waits on the host; all else is computed again, or waits there."""
        return min(self._tried(self.handed), key=lambda kept: kept.peak)

    def _tried(self, handed: frozenset[int]) -> Iterator[Kept]:
        every = frozenset(self.remat.classes)
        tried = [Chosen(every - handed)] if self.recompute else []
        if self.hosts:
            tried.append(Chosen(every - handed, handed) if self.recompute else Chosen(away=every))
        return (self.measured(chosen, 1) for chosen in tried)

    def _by_hand(self) -> Iterator[Kept]:
        """What is done by hand: all of a layer but what it hands on, or but one of that, in all layers or in some."""
        yield from self._tried(self.handed)
        stars = {z: pattern(self.fold.first(z).name) for z in self.handed}
        alone = frozenset(z for z, star in stars.items() if "*" not in star)  # of no layer
        layers = dict.fromkeys(star for z, star in sorted(stars.items()) if z not in alone)
        groups = [alone.union(z for z in stars if stars[z] == star) for star in layers]
        for handed in [*groups, *(frozenset({one}) for one in sorted(self.narrow))][:TRIALS]:
            if self._spent():
                break
            yield from self._tried(handed)

    def _first_by_hand(self, limit: float) -> Kept | None:
        """The quickest of what is done by hand that fits; if it is late already, the first of what is done mostly."""
        best: Kept | None = None
        for kept in self._tried(self.handed) if self._late() else self._by_hand():
            if kept.peak <= limit and (best is None or _seconds(kept) < _seconds(best)):
                best = kept
            if best is not None and self._late():
                break
        return best

    def _late(self) -> bool:
        """Whether the time is up: what has been found so far is the answer."""
        return time.perf_counter() > self.deadline if self.visited is None else self._spent()

    def _spent(self) -> bool:
        """Whether enough was priced for the least."""
        return self.visited is not None and len(self.visited) > max(FEWEST, self._most())

    def _most(self) -> float:
        """Plans of this size that are priced in about WORK."""
        return WORK / len(self.items.items) ** 2

    # Where a copy runs depends on what else is copied. What the next solve takes for copied, by the last answer:

    def _exactly(self, answer: Chosen) -> frozenset[int]:
        """Just that: where little is copied, the next answer will not be far from it."""
        return answer.again

    def _nearly(self, answer: Chosen) -> frozenset[int]:
        """Everything, but of what goes from layer to layer only what the answer has.

        Were that copied too, a copy in one layer would be wanted as soon as the backward begins, by all layers behind.
        """
        return frozenset(self.remat.classes) - (self.narrow - answer.again)

    def _narrow(self) -> frozenset[int]:
        """Classes of what is handed on where the forward is narrow: from layer to layer."""
        remat, regions = self.remat, regions_of(self.items.program)
        number = {i.node: i.index for i in remat.forward}
        live = regions.live()
        seconds = [remat.seconds(self.fold.of[number[n]]) if n in number else 0.0 for n in regions.sequence]
        layers = {m.group() for n in regions.sequence if (m := _LAYER.match(n.meta["address"]))}
        sizes, counts = [nbytes(v) for v in live], [len(v) for v in live]
        gaps = candidates(sizes, counts, list(accumulate(seconds)), max(2, len(layers)))
        crossing = {v for gap in gaps for v in live[gap] if v.node in number}
        tensors = (Tensor(number[v.node], v.index) for v in crossing)
        versions = (v for t in tensors for v in remat.roots(t, remat.home(t)))
        return frozenset(self.fold.of[v.tensor.item] for v in versions)

    def _handed(self) -> frozenset[int]:
        """These in all layers alike: the last one, behind which there is no gap of their kind, hands on to the head."""
        stars = {pattern(self.fold.first(z).name) for z in self.narrow}
        return frozenset(self.fold.of[i.index] for i in self.remat.forward if pattern(i.name) in stars)

    def measured(self, chosen: Chosen, copies: int = COPIES) -> Kept:
        """The plan that does not keep this, with so many copies to and from the host under way."""
        copies = copies if chosen.away else COPIES
        if (chosen, copies) not in self.seen:
            made = replace(self.plan, saved=self._saved(chosen), copies=copies)
            items = self.items if not any(chosen) else items_of(self.program, made.saved)
            specs, compute = plan_specs(items, made), Compute(items, self.where)
            simulated = partial(run, items, made, specs, compute, self.policy)
            cost = priced(items, made, specs, compute, self.policy)
            self.seen[chosen, copies] = Kept(made, cost, simulated, chosen, copies, self.room)
        if self.visited is not None:
            self.visited[chosen, copies] = self.seen[chosen, copies]
        return self.seen[chosen, copies]

    def _room(self) -> tuple[float, float]:
        """What the allocator makes of a byte, and bytes that are there all the time."""
        memory = self.base.price.memory
        used = sum(memory.values()) - memory["slack"]
        fixed = sum(memory[kind] for kind in ("parameters", "optimizer", "buffers", "inputs"))
        return 1 + memory["slack"] / max(used, 1.0), fixed

    def _saved(self, chosen: Chosen) -> dict[str, str]:
        """What the plan says: starred where most layers agree."""
        how = {**dict.fromkeys(chosen.away, OFFLOADED), **dict.fromkeys(chosen.again, RECOMPUTE)}
        return starred({i.name: how.get(self.fold.of[i.index]) for i in self.remat.forward})


def _seconds(kept: Kept) -> float:
    return kept.timeline.step_s


__all__ = ["Kept", "Rematerialiser"]
