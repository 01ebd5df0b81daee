"""The last rung of the ladder under a limit of bytes (`costmodel.budget`): optimizer state and gradients on the host.

Where the limit keeps out what is quicker, parameters whose state lies on the host make room for a placement that does
less, or does less twice. Of each placement that has been looked at, and of the best one if all state were there, the
fewest go that make it fit: from the last layers on, whose gradients the backward has first, and small parameters last.
Some of them may go together with what the backward computes again. The simulated step decides
between that and all that was found without.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from autopar.costmodel.budget import RUNGS, Budget, different, quicker
from autopar.costmodel.devices import machine
from autopar.costmodel.legal import plan_specs, storage_of
from autopar.costmodel.ops import Compute
from autopar.costmodel.optimizers import ELEMENT_WISE, optimizer_of
from autopar.costmodel.price import price
from autopar.costmodel.simulate import run
from autopar.costmodel.sweep import Found, Search
from autopar.plan import DEVICE, HOST, Plan


@dataclass
class HostSearch:
    """Looks for quicker plans within the limit of `budget`, which has been searched already.

    Attributes:
        everything: makes a search in which the state of every parameter is on the host, but for those in `given`.
        given: parameters whose storage has been said already: their state stays where it is.
    """

    budget: Budget
    everything: Callable[[], Search]
    given: frozenset[str] = frozenset()

    def run(self, found: Found | None) -> Found | None:
        """The quickest that fits: `found`, which needs no host, or one that does."""
        budget, limit = self.budget, self.budget.limit
        if limit is None or not budget.binding or not self._open:
            return found
        tried: list[tuple[Found, Found | None]] = []  # a placement, and with the fewest on the host that make it fit
        for number, base in enumerate(self._bases(found)):
            # The quickest is tried however late it is.
            if found is not None and ((number and self._late()) or not quicker(base, found)):
                continue  # what goes to the host takes time besides
            budget.progress("keeping less on the device", 0.97)
            alone = self.fewest(base, limit)
            tried.append((base, alone))
            if alone is not None and (found is None or quicker(alone, found)):
                found = alone
        if not budget.keeps_less:
            return found
        # Those that come off best alone are tried together with recomputation.
        tried.sort(key=lambda pair: (pair[0] if pair[1] is None else pair[1]).timeline.step_s)
        together = (some for base, alone in tried[:2] for some in self._together(base, alone))
        for number, some in enumerate(together):
            if self._late() and (number or found is not None):
                break  # where nothing fits yet, one is looked at however late it is
            if found is None or quicker(some, found):
                kept = budget.keeping(some)
                if kept is not None and (found is None or quicker(kept, found)):
                    found = kept
        return found

    def smallest(self) -> Found:
        """About the least memory that any plan needs, with what can go to the host and what can be computed again."""
        budget = self.budget
        best = budget.smallest()
        if not self._open:
            return best
        bases = [budget.least()]
        if self._apart:
            bases.append(self._bare(self._search.least(budget.orders)))
        for base in bases:
            there = self.measured(base, self.order(base.plan))
            found = [there]
            if budget.keeps_less:
                found.append(budget.shrunk(there))
            best = min([best, *found], key=lambda f: f.peak)
        return best

    def fewest(self, base: Found, limit: float) -> Found | None:
        """The placement with the fewest parameters in `order` on the host that make it fit; None if all do not."""
        order = self.order(base.plan)
        if not order:
            return None
        low, high = 0, len(order)  # does not fit, and does
        best = self.measured(base, order)
        if best.peak > limit:
            return None
        while high - low > 1:
            mid = (low + high) // 2
            found = self.measured(base, order[:mid])
            if found.peak <= limit:
                high, best = mid, found
            else:
                low = mid
        return best

    def order(self, plan: Plan) -> list[str]:
        """Parameters in the order in which they go to the host: late ones first, whose copies are hidden by the most.

        Last those that the link takes longer to begin with than to carry. No more than the host has room for.
        """
        policy, sizes, host = self.budget.policy, plan.mesh.sizes, self.budget.device.host
        assert host is not None
        small, room = host.link.latency * host.link.bandwidth, host.memory
        found = []
        for item in self.budget.fold.items.items:
            if item.kind != "param":
                continue
            spec = storage_of(plan, item).spec
            if item.name in self.given:
                room -= sum(policy.hosted(item, spec, sizes).values()) if storage_of(plan, item).state == HOST else 0.0
                continue
            cut = any(p.kind != "R" and n > 1 for p, n in zip(spec, sizes))
            held = policy.hosted(item, spec, sizes)
            if held["gradients"] and not (cut and not self._apart):
                found.append((held["gradients"] < small, -item.index, item.name, sum(held.values())))
        there = accumulate(size for *_, size in sorted(found))
        return [name for (*_, name, _), size in zip(sorted(found), there) if size <= room]

    def measured(self, base: Found, names: Sequence[str]) -> Found:
        """The placement with these parameters on the host, and no others but those `given`, priced and simulated."""
        budget, items, there = self.budget, self.budget.fold.items, frozenset(names)
        storage = {
            n: s if n in self.given else replace(s, state=HOST if n in there else DEVICE)
            for n, s in base.plan.storage.items()
        }
        plan = replace(base.plan, storage=storage)
        cost = price(
            items, plan, budget.device, optimizer_bytes=budget.policy.optimizer_bytes, links=budget.links
        )  # fmt: skip
        where = machine(budget.device, plan.mesh, budget.links)
        timeline = run(items, plan, plan_specs(items, plan), Compute(items, where), budget.policy)
        return replace(base, plan=plan, price=cost, timeline=timeline)

    # ---- inside ------------------------------------------------------------------------------------------------

    @property
    def _open(self) -> bool:
        """Whether there is a parameter of which it is still to be said where its state lies, and that makes room."""
        if self.budget.device.host is None:
            return False  # the device is the host: it is the same memory
        return any(i.kind == "param" and i.name not in self.given for i in self.budget.fold.items.items)

    @property
    def _apart(self) -> bool:
        """Whether pieces of a parameter can be stepped by themselves."""
        return optimizer_of(self.budget.policy.optimizer).name.lower() in ELEMENT_WISE

    @functools.cached_property
    def _search(self) -> Search:
        return self.everything()

    def _bases(self, found: Found | None) -> list[Found]:
        """Placements, with nothing on the host but what is `given`, the quickest first."""
        budget = self.budget
        bases = [budget.free, *budget.bases]
        if self._apart and not self._late():
            best = self._search.run(budget.orders)
            bases += [] if best is None else [self._bare(best)]
        if found is None:
            bases.append(budget.least())
        return different(bases)

    def _bare(self, found: Found) -> Found:
        return self.measured(found, ())

    def _together(self, base: Found, alone: Found | None) -> Iterator[Found]:
        """The placement with less on the host than makes it fit; with all, if all do not."""
        order = self.order(base.plan)
        if alone is None:
            yield self.measured(base, order)
            return
        needed = sum(name not in self.given for name in alone.plan.on_host)
        for count in sorted({round(part * needed) for part in RUNGS} - {0, needed}):
            yield self.measured(base, order[:count])

    def _late(self) -> bool:
        return time.perf_counter() > self.budget.deadline


__all__ = ["HostSearch"]
