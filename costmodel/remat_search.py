"""A plan that keeps less: which of its ops the backward does again so that the peak is within a limit.

`costmodel.remat` is solved, its answer made into a program, and that program's peak and step taken as those of any
other. What the answer missed by is taken off the limit, and where its copies run is told to the next solve.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from autopar.costmodel.comm import Comm
from autopar.costmodel.devices import Device, Link, machine
from autopar.costmodel.fold import Fold, fold
from autopar.costmodel.items import Items, Tensor, items_of
from autopar.costmodel.legal import plan_specs
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.pieces import candidates
from autopar.costmodel.price import Price, price
from autopar.costmodel.remat import Remat
from autopar.costmodel.simulate import Timeline, run
from autopar.costmodel.tape import record
from autopar.graph import Program, pattern
from autopar.pipeline.regions import nbytes, regions_of
from autopar.plan import Plan
from autopar.recompute import KEEP, RECOMPUTE

#: The layer of an op: its address up to the first number in it.
_LAYER = re.compile(r"[^/]*?[.]\d+(?=[./])")
#: Solves for one limit, and how near to it the peak of an answer ends them. Copies that are then tried without.
ROUNDS, NEAR, TRIALS = 10, 0.01, 8
#: Ops that are priced, at most, when the least is looked for: the answer must not hang on how busy the machine is, as
#: a limit that is asked for because of it must be enough.
WORK = 60_000
#: By what parts of the peak less is asked for, when the least is looked for.
STEPS = (0.1, 0.03, NEAR)


Judge = Callable[[frozenset[int]], frozenset[int]]


@dataclass
class Kept:
    """A plan with what its backward computes again, priced and simulated."""

    plan: Plan
    price: Price
    timeline: Timeline
    classes: frozenset[int]

    @property
    def peak(self) -> float:
        """Bytes per rank."""
        return self.price.peak_bytes


class Rematerialiser:
    """Looks for what one plan may do again. `plan` says nothing of that yet."""

    def __init__(
        self, program: Program, plan: Plan, device: str | Device, links: Mapping[str, Link] | None, policy: Policy,
        items: Items | None = None, folded: Fold | None = None, deadline: float = math.inf,
    ) -> None:  # fmt: skip
        self.program, self.plan, self.links, self.policy = program, plan, links, policy
        self.deadline = deadline
        self.items = items or items_of(program)
        self.fold = folded or fold(self.items)
        self.where = machine(device, plan.mesh, links)
        self.seen: dict[frozenset[int], Kept] = {}
        self.visited: dict[frozenset[int], Kept] | None = None  # while the least is looked for, what has come by
        specs = plan_specs(self.items, plan)
        compute, comm = Compute(self.items, self.where), Comm(self.where)
        tape = record(self.items, plan, specs, self.where.device.gloo, self.where.device.weights_from)
        self.remat = Remat(self.items, self.fold, plan, specs, compute, comm, tape)
        self.narrow = self._narrow()
        self.remat.narrow(self.narrow)
        self.base = self.measured(frozenset())

    def within(self, limit: float) -> Kept | None:
        """The quickest that was found of those whose peak is at most `limit`; None if none was."""
        if self.base.peak <= limit:
            return self.base
        found = [self._within(limit, judge) for judge in (self._exactly, self._nearly)]
        if not any(found):
            found += [kept for kept in self._by_hand() if kept.peak <= limit]
        best = min((k for k in found if k is not None), key=_seconds, default=None)
        return None if best is None else self._improved(best, limit)

    def _within(self, limit: float, judge: Judge) -> Kept | None:
        best: Kept | None = None
        aim, copied = limit, judge(frozenset())  # the limit that the program is given, and what it takes for copied
        low, high = 0.0, math.inf  # limits of which the answer has fitted, and has not
        for _ in range(ROUNDS):
            if self._late():
                break
            answer, told = self._answer(aim, copied)
            found = self.measured(answer)
            if found.peak <= limit:
                best = min((k for k in (best, found) if k is not None), key=_seconds)
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
            copied = judge(answer)
        return best

    def _improved(self, best: Kept, limit: float) -> Kept:
        """Without copies that it fits without, those that take longest tried first."""
        order = sorted(best.classes, key=lambda c: -self.remat.seconds(c) * len(self.fold.members[c]))
        for cls in order[:TRIALS] if not self._late() else ():
            found = self.measured(best.classes - {cls})
            if found.peak <= limit and _seconds(found) < _seconds(best):
                best = found
        return best

    def _answer(self, limit: float | None, copied: Collection[int]) -> tuple[frozenset[int], float]:
        """What to copy for a limit, and the peak that the program tells; if it cannot be met, what comes nearest."""
        part, rest = self._room()
        found = None if limit is None else self.remat.solve(limit / part - rest, copied)
        found = found or self.remat.solve(None, copied)
        assert found is not None  # without a limit there is always one
        return found[0], (found[1] + rest) * part

    def smallest(self) -> Kept:
        """The answer of least peak: what the backward can do again, as far as that takes less. However late it is."""
        self.visited = {frozenset(): self.base}
        try:
            return self._smallest()
        finally:
            self.visited = None

    def _smallest(self) -> Kept:
        assert self.visited is not None
        self._by_hand()
        for judge in (self._exactly, self._nearly):
            copied = judge(frozenset())
            for _ in range(ROUNDS):
                answer, _ = self._answer(None, copied)
                if answer in self.visited or self._late():
                    break
                self.measured(answer)
                copied = judge(answer)
        best = min(self.visited.values(), key=lambda kept: kept.peak)
        for step in STEPS:
            while not self._late() and (less := self.within((1 - step) * best.peak)) is not None:
                best = less
        return best

    def by_hand(self) -> Kept:
        """All of a layer again but what it hands on."""
        return self.measured(frozenset(self.remat.classes) - self.narrow)

    def _by_hand(self) -> list[Kept]:
        """What is done by hand: all of a layer but what it hands on, or but one of that. However late it is."""
        every = frozenset(self.remat.classes)
        found = [self.by_hand()]
        for one in sorted(self.narrow)[:TRIALS]:
            if self._spent():
                break
            found.append(self.measured(every - {one}))
        return found

    def _late(self) -> bool:
        """Whether the time is up: what has been found so far is the answer."""
        return time.perf_counter() > self.deadline if self.visited is None else self._spent()

    def _spent(self) -> bool:
        """Whether enough was priced for the least."""
        return self.visited is not None and len(self.visited) * len(self.items.items) > WORK

    # Where a copy runs depends on what else is copied. What the next solve takes for copied, by the last answer:

    def _exactly(self, answer: frozenset[int]) -> frozenset[int]:
        """Just that: where little is copied, the next answer will not be far from it."""
        return answer

    def _nearly(self, answer: frozenset[int]) -> frozenset[int]:
        """Everything, but of what goes from layer to layer only what the answer has.

        Were that copied too, a copy in one layer would be wanted as soon as the backward begins, by all layers behind.
        """
        return frozenset(self.remat.classes) - (self.narrow - answer)

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

    def measured(self, classes: frozenset[int]) -> Kept:
        """The plan that does these classes again."""
        if classes not in self.seen:
            made = replace(self.plan, saved=self._saved(classes))
            items = self.items if not classes else items_of(self.program, made.saved)
            cost = price(
                items, made, self.where.device, optimizer_bytes=self.policy.optimizer_bytes, links=self.links
            )  # fmt: skip
            specs = plan_specs(items, made)
            timeline = run(items, made, specs, Compute(items, self.where), Comm(self.where), self.policy)
            self.seen[classes] = Kept(made, cost, timeline, classes)
        if self.visited is not None:
            self.visited[classes] = self.seen[classes]
        return self.seen[classes]

    def _room(self) -> tuple[float, float]:
        """What the allocator makes of a byte, and bytes that are there all the time."""
        memory = self.base.price.memory
        used = sum(memory.values()) - memory["slack"]
        fixed = sum(memory[kind] for kind in ("parameters", "optimizer", "buffers", "inputs"))
        return 1 + memory["slack"] / max(used, 1.0), fixed

    def _saved(self, classes: Collection[int]) -> dict[str, str]:
        """What the plan says: starred where all layers agree."""
        groups: dict[str, dict[str, bool]] = {}
        for item in self.remat.forward:
            groups.setdefault(pattern(item.name), {})[item.name] = self.fold.of[item.index] in classes
        found: dict[str, str] = {}
        for star, members in groups.items():
            again = sum(members.values())
            if again == len(members):
                found[star] = RECOMPUTE
            elif 2 * again > len(members):
                found[star] = RECOMPUTE
                found.update({name: KEEP for name, yes in members.items() if not yes})
            else:
                found.update({name: RECOMPUTE for name, yes in members.items() if yes})
        return found


def _seconds(kept: Kept) -> float:
    return kept.timeline.step_s


__all__ = ["Kept", "Rematerialiser"]
