"""The search under a limit of bytes: placement, what the backward computes again and what waits on the host, together.

Without a limit everything is kept. Where the quickest plan does not fit, memory can be had in two ways: by cutting more
(`costmodel.sweep`, with the limit) and by keeping less (`costmodel.remat_search`). The plans of a ladder
of limits, from none to the one asked for, each keep less until they fit; the simulated step decides between them. The
best is then planned once more with its copies in the program, where they are ops like any other.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autopar.costmodel.devices import Device, Link
from autopar.costmodel.fold import Fold
from autopar.costmodel.memory import Policy
from autopar.costmodel.remat_search import Rematerialiser
from autopar.costmodel.sweep import Found, Search
from autopar.errors import ConstraintError, SolverError
from autopar.graph import Program
from autopar.plan import Plan

#: Where between the limit and the peak of the plan without one the rungs of the ladder are.
RUNGS = (0.3, 0.65)
#: Of programs of more than LARGE ops, no plans are looked for if even what keeps least misses the limit by FAR: with
#: what is done by hand, beside which the best was seen to save no more.
LARGE, FAR = 5000, 1.2
#: Seconds to look for what one plan need not keep, however late it is.
GRACE = 6.0
#: By what part a plan must be quicker than another one to be looked at.
LEAST_GAIN = 1e-4


@dataclass
class Budget:
    """Looks for the quickest plan within a limit.

    Attributes:
        search: a search for a limit; None: without one. orders: of the mesh axes.
        again: the best plan for the program that keeps as little as that of a plan, or None.
        deadline: of `time.perf_counter`. recompute, offload: whether anything may be computed again, and wait on the
            host.
        binding: whether the limit keeps out what may be quicker. bases: placements that have been looked at then.
        quick: whether a plan that fits will do, which need not be the quickest.
    """

    program: Program
    device: Device
    links: Mapping[str, Link] | None
    policy: Policy
    fold: Fold
    limit: float | None
    deadline: float
    orders: list[list[int]]
    search: Callable[[float | None], Search]
    again: Callable[[Plan], Found | None]
    progress: Callable[[str, float], None]
    recompute: bool
    offload: bool
    quick: bool = False
    _least: Found | None = None
    _of_least: Rematerialiser | None = None
    binding: bool = False
    bases: list[Found] = field(default_factory=list)

    @functools.cached_property
    def free(self) -> Found:
        """The quickest if memory were no matter."""
        found = self.search(None).run(self.orders)
        assert found is not None  # without a limit there is always a plan
        return found

    def run(self, hopeful: bool, tight: bool = False) -> Found | None:
        """The best that fits; None if none was found.

        hopeful: whether parameters and their like may fit at all. tight: whether they take most of the limit.
        """
        if self.limit is None:
            return self.search(None).run(self.orders)
        large = self.keeps_less and hopeful and self._large
        self.binding = True
        if large and tight and self._far():
            return None
        search = self.search(self.limit)
        search.hasty = self.keeps_less
        found = search.run(self.orders) if hopeful else None
        self.binding = found is None or search.binding
        if not self.keeps_less or not hopeful or not self.binding:
            return found  # the last: of a limit that is no matter
        if found is None and large and self._far():
            return None
        if self.quick:
            return found or self.keeping(self.least())
        if found is not None and not quicker(self.free, found):
            self.binding = False
            return found
        self.bases = bases = [self.free]
        for rung in RUNGS if self._divisible() else ():
            limit = self.limit + rung * max(0.0, self.free.peak - self.limit)
            if self._late():
                break
            if self._least is None or self._least.peak < limit:
                bases += self._plans(limit)
        if found is None:
            bases.append(self.least())
        for base in different(bases):
            if found is not None and (self._late() or not quicker(base, found)):
                continue  # what does less is not quicker than what does more
            self.progress("keeping less", 0.95)
            kept = self.keeping(base)
            if kept is not None and (found is None or quicker(kept, found)):
                found = kept
        if found is None:
            return search.labour(self.orders)
        if found.plan.saved and self._divisible() and not self._late():
            better = self._again(found.plan)
            if better is not None and better.peak <= self.limit and quicker(better, found):
                found = better
        return found

    def least(self) -> Found:
        """About the least memory that placement alone needs."""
        if self._least is None:
            self._least = self.search(self.limit).least(self.orders)
        return self._least

    def smallest(self) -> Found:
        """About the least memory that any plan needs, with what can be computed again."""
        least = self.least()
        if not self.keeps_less or (self.limit is not None and least.peak <= self.limit):
            return least
        return self.shrunk(least)

    def shrunk(self, base: Found) -> Found:
        """A placement with as little kept as it can be; itself where no answer to that is found."""
        try:
            found = self._rematerialiser(base).smallest()
        except SolverError:  # what the placement alone needs is an answer, too
            return base
        return replace(base, plan=found.plan, timeline=found.timeline, price=found.price)

    def _far(self) -> bool:
        """Whether the plan of least memory, with all but what layers hand on computed again, is far above the limit."""
        assert self.limit is not None
        try:
            return self._rematerialiser(self.least()).by_hand().peak > FAR * self.limit
        except SolverError:
            return False

    def _plans(self, limit: float) -> list[Found]:
        search = self.search(limit)
        search.hasty = True
        found = search.run(self.orders)
        return [] if found is None else [found]

    def _again(self, like: Plan) -> Found | None:
        """Planned once more; None where what the user pins, or the time that is left, allows no answer to that."""
        try:
            return self.again(like)
        except (ConstraintError, SolverError):
            return None

    def keeping(self, base: Found) -> Found | None:
        """A plan that keeps less, within the limit; None if none was found, or not in time."""
        assert self.limit is not None
        try:
            search = self._rematerialiser(base)
            if self._large and search.by_hand().peak > FAR * self.limit:
                return None
            found = search.within(self.limit)
        except SolverError:
            return None
        if found is None:
            return None
        return replace(base, plan=found.plan, timeline=found.timeline, price=found.price)

    def _rematerialiser(self, base: Found) -> Rematerialiser:
        """That of a base; of the least one, which is looked at twice, the same again: it knows what it has priced."""
        deadline = max(self.deadline, time.perf_counter() + GRACE)
        if base is self._least and self._of_least is not None:
            self._of_least.deadline = deadline
            return self._of_least
        made = Rematerialiser(
            self.program, base.plan, self.device, self.links, self.policy, self.fold.items, self.fold, deadline,
            self.recompute, self.offload,
        )  # fmt: skip
        if base is self._least:
            self._of_least = made
        return made

    @property
    def keeps_less(self) -> bool:
        """Whether anything need not be kept."""
        return self.program.training and (self.recompute or (self.offload and self.device.host is not None))

    @property
    def _large(self) -> bool:
        """Whether it takes long to price anything."""
        return len(self.fold.items.items) > LARGE

    def _divisible(self) -> bool:
        return any(self.orders)

    def _late(self) -> bool:
        return time.perf_counter() > self.deadline


def different(found: Sequence[Found]) -> list[Found]:
    """One of each plan, the quickest first."""
    kept: list[Found] = []
    plans: list[Plan] = []
    for one in sorted(found, key=lambda f: f.timeline.step_s):
        if one.plan not in plans:
            plans.append(one.plan)
            kept.append(one)
    return kept


def quicker(one: Found, other: Found) -> bool:
    """Whether it is worth looking at: by more than LEAST_GAIN."""
    return one.timeline.step_s < other.timeline.step_s * (1 - LEAST_GAIN)


__all__ = ["RUNGS", "Budget", "different", "quicker"]
