"""The search: one mesh axis after the other, in both orders, and what experts would do besides.

A joint program over two axes is too big (its flows grow with the square of the placements), so each axis is solved with
the others fixed, two or three times over; the memory limit is loose for what the unsolved axes can still divide. The
program's memory is a linear stand-in; the priced peak decides, and while it is above the limit the stand-in is
tightened. Expert plans (`costmodel.seeds`) are candidates too, and the best ones are improved by a sweep each.
Between candidates the simulated step decides (`costmodel.simulate`).

The first sweeps take communication and computation one after the other: that program is integral nearly always and
solved in no time. The best plan is then improved by a sweep that knows what can be hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from autopar.costmodel.choices import Pins, State
from autopar.costmodel.constraints import Wishes
from autopar.costmodel.devices import Link
from autopar.costmodel.ilp import Solution, solve
from autopar.costmodel.legal import plan_specs
from autopar.costmodel.lower import Axis, Prices, current, lift, lower, offered
from autopar.costmodel.price import Price, price
from autopar.costmodel.problem import PHASES, Loads, NoOption, Problem, evaluate, loads
from autopar.costmodel.seeds import pinned, strategies
from autopar.costmodel.simulate import Timeline, run
from autopar.errors import ConstraintError
from autopar.plan import Plan

#: Sweeps over the axes per order; stop earlier when a sweep gains less than GAIN.
SWEEPS, GAIN = 3, 1e-3
#: How many experts' plans are improved by a sweep, the quickest first: a slower one may lead further.
IMPROVED = 3
#: And how many times slower than the best one may be: a sixth is the most that a sweep was seen to take off.
SLOWER = 1.25
#: How many times slower a sweep of the second order may be than what the first came to: those that follow were seen to
#: gain less.
BEHIND = 1.15
#: How often the stand-in for memory is tightened when the priced peak is above the limit.
ROUNDS = 4
#: Part of a phase that a window of gathers can use, until a simulation has shown it.
USABLE = 0.9
#: Part of the limit below which the stand-in is not tightened: it has told nothing about this plan.
LEAST = 0.05
#: Seconds of a tie-breaker: less than anything that is priced.
TIE = 1e-9
#: Largest relative gap of a solve; sweeps repeat, so a smaller one is not worth its time.
GAP = 1e-3


@dataclass
class Found:
    """A complete state with its plan and its simulated step.

    price: where known. solves: the last of every axis. seed: an expert's plan.
    """

    state: State
    plan: Plan
    timeline: Timeline
    price: Price | None = None
    solves: list[Solution] = field(default_factory=list)
    seed: bool = False

    @property
    def peak(self) -> float:
        """Bytes per rank."""
        assert self.price is not None
        return self.price.peak_bytes


@dataclass
class Search:
    """Looks for the plan of the shortest simulated step that fits.

    Attributes:
        make: the plan of a state. limit: bytes per rank, None for none. deadline: of `time.perf_counter`.
        links: as `costmodel.planner.plan`. clock: seconds by what they went to; "build", "solve", "price" grow.
    """

    prices: Prices
    make: Callable[[State], Plan]
    limit: float | None
    deadline: float
    links: Mapping[str, Link] | None
    clock: dict[str, float]
    progress: Callable[[str, float], None]
    experts: list[Pins]
    solves: list[Solution] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.space = self.prices.space
        self.mesh, self.items = self.space.mesh, self.space.fold.items
        self.usable = [[USABLE] * self.prices.comm.tiers for _ in range(PHASES)]
        self.overlap = False  # whether the program knows that late transports hide; it is easier without
        self.tight = False  # a plan without regard to the limit did not fit
        self.binding = False  # nor did something that may have been quicker
        self.patient = False  # nothing fits so far: no short cuts
        self.hasty = False  # there are other ways to make it fit
        self.short = math.inf  # bytes by which the stand-in counts less than the price, the least that was seen
        self.share = 1
        self.serial: dict[float | None, float] = {}  # limit -> seconds of the best sweep without overlap

    def run(self, orders: list[list[int]]) -> Found | None:
        """The best that fits; None if none was found."""
        seeds = self._seeds(orders[0])
        found: list[Found] = []
        for number, order in enumerate(orders):
            if found and self._late():
                break
            names = ", ".join(self.mesh.names[a] for a in order) or "none"
            self.progress(f"solving axes {names}", 0.3 + 0.3 * number)
            self.share = (len(orders) - number) * max(1, len(order))
            candidate = self._order(order, self.space.start(), beat=min(map(_seconds, found), default=math.inf))
            if candidate is not None:
                found.append(candidate)
        best = min(found, key=_seconds, default=None)
        # What can be hidden is learnt from the quickest: only there it decides.
        if best is not None and not self._late() and self._learn(min([best, *seeds[:1]], key=_seconds)):
            self.progress("hiding communication", 0.85)
            self.overlap = True
            best = self._order(orders[0], best.state, 1, 2, _seconds(best)) or best
        self.share = max(1, len(orders[0]))
        for number, seed in enumerate(seeds[:IMPROVED]):
            self.progress("improving experts' plans", 0.9 + 0.03 * number)
            beat = math.inf if best is None else _seconds(best)
            if _seconds(seed) > SLOWER * beat:
                break
            if _seconds(seed) < beat:
                if self._fits(seed):
                    best, beat = seed, _seconds(seed)
                else:
                    self.binding = True
            if best is None or not self._late():
                best = self._order(orders[0], seed.state, 1, 2, beat) or best
        return best or (None if self.hasty else self.labour(orders))

    def labour(self, orders: list[list[int]]) -> Found | None:
        """As `run` when nothing has fitted: without short cuts."""
        self.patient, best = True, None
        for order in orders:
            best = best or self._order(order, self.space.start())
        return best

    # ---- experts -----------------------------------------------------------------------------------------------

    def _seeds(self, order: list[int]) -> list[Found]:
        """Expert plans, the quickest first. What they expose teaches what can be hidden."""
        found: list[Found] = []
        for number, pins in enumerate(self.experts):
            self.progress("trying experts' plans", 0.2 + 0.1 * number / len(self.experts))
            self.share = 8
            state = self.space.start()
            try:
                for axis in order:
                    state = self._solve(state, axis, None, 1, pins)[0]
            except ConstraintError:  # the strategy cannot be met here, or not with what the user asks
                continue
            same = any(f.state == state for f in found)
            if not same and offered(lower(self.prices, state, 0, None, 0.0), 0, state) is not None:
                found.append(self._simulated(state, seed=True))
        found.sort(key=_seconds)
        for seed in found[:2]:
            self._learn(seed)
        return found

    def _learn(self, found: Found) -> bool:
        """Fit the usable part so that the program's exposed seconds of a plan are the simulated ones.

        Returns whether there is anything to hide.
        """
        here = self._loads(found.state)
        if here is None:
            return False
        late = max((max(row) for row in here.late), default=0.0)
        if late < 0.01 * found.timeline.step_s:
            return False  # nothing to learn from
        exposed = found.timeline.exposed_s - sum(map(sum, here.block))
        low, high = 0.0, 1.0
        for _ in range(20):
            mid = (low + high) / 2
            if here.exposed([[mid] * len(row) for row in self.usable]) > exposed:
                low = mid
            else:
                high = mid
        self.usable = [[high] * len(row) for row in self.usable]
        return True

    def _loads(self, state: State) -> Loads | None:
        """Where the program sees the seconds of a state go; None of an expert's, if the user's pins do not offer it."""
        lowered = lower(self.prices, state, 0, None, 0.0, self.usable)
        choice = offered(lowered, 0, state)
        return None if choice is None else loads(lowered.problem, choice, self.prices.comm.tiers)

    # ---- sweeps ------------------------------------------------------------------------------------------------

    def _late(self) -> bool:
        """Whether the time is up: what would only improve on a plan is left out."""
        return time.perf_counter() > self.deadline

    def _order(
        self, order: list[int], start: State, sweeps: int = SWEEPS, rounds: int = ROUNDS, beat: float = math.inf
    ) -> Found | None:
        """Solve the axes in this order, tightening the stand-in until it fits.

        None if it does not in `rounds`, or takes `beat` seconds a step or more: what is not quicker is not even priced.
        """
        # Without a limit the program is smaller; most plans fit anyway.
        limit = None
        if self.tight and self.limit is not None:
            limit = self.limit - (0.0 if self.patient or self.short == math.inf else self.short)
        for _ in range(rounds):
            before = len(self.solves)
            state = self._sweeps(order, limit, start, sweeps)
            if state is None:
                return None
            found = self._simulated(state)
            if _seconds(found) >= beat:  # a tighter limit would not make it quicker
                return None
            found.solves = self.solves[max(before, len(self.solves) - len(order)) :]
            if self._fits(found):
                return found
            if not order:
                return None
            self.tight = self.binding = True
            assert self.limit is not None
            if limit is None:
                limit = self.limit
                continue
            # The stand-in counted less than the walk: take the difference off, and a little more.
            proxy = self._proxy(state, order[-1])
            self.short = min(self.short, max(0.0, found.peak - proxy))
            limit = min(limit * 0.98, proxy - (found.peak - self.limit) * 1.05)
            if not self.patient:
                start, sweeps = state, 1  # little has to change
            if limit < LEAST * self.limit:
                return None
        return None

    def _sweeps(self, order: list[int], limit: float | None, start: State, sweeps: int) -> State | None:
        """Sweep until nothing changes or is gained; None if the stand-in cannot meet the limit."""
        state = start
        if not order:
            return state
        last = math.inf
        best: tuple[float, State] | None = None
        quiet = 0  # axes in a row whose solution stayed as it was
        blank = start == self.space.start()
        for sweep in range(sweeps if len(order) > 1 else 1):
            for position, axis in enumerate(order):
                first = sweep == 0 and blank
                unsolved = math.prod(self.mesh.sizes[a] for a in order[position + 1 :]) if first else 1
                before = state
                state, seconds, fits = self._solve(state, axis, limit, unsolved)
                quiet = quiet + 1 if not first and state == before else 0
                if fits and unsolved == 1 and (best is None or seconds < best[0]):
                    best = (seconds, state)
                if quiet >= len(order) - 1 and not first:
                    return self._settled(best, limit)
            gained = last - seconds if fits else math.inf
            if self._late() or gained < GAIN * seconds:
                break
            other = self.serial.get(limit, math.inf)
            short_cuts = fits and not self.patient and not self.overlap
            if short_cuts and (gained < seconds - other or seconds > BEHIND * other):
                break  # it will not come near the other order any more
            last = seconds if fits else math.inf
        return self._settled(best, limit)

    def _settled(self, best: tuple[float, State] | None, limit: float | None) -> State | None:
        if best is None:
            return None
        if not self.overlap:
            self.serial[limit] = min(self.serial.get(limit, math.inf), best[0])
        return best[1]

    def _solve(
        self, state: State, axis: int, limit: float | None, unsolved: int, pins: Pins | None = None
    ) -> tuple[State, float, bool]:
        """One axis: the new state, its seconds, and whether it meets the limit; if none does, the least over it."""
        began = time.perf_counter()
        bound = None if limit is None else limit * unsolved
        lowered = lower(self.prices, state, axis, bound, TIE, self.usable if self.overlap else None, pins)
        self.clock["build"] += time.perf_counter() - began
        spare = max(1.5, (self.deadline - time.perf_counter()) / max(1, self.share) / 2)
        start = None if pins else offered(lowered, axis, state)
        answer = self.ask(lowered, axis, spare, start)
        fits = answer is not None
        if answer is None:
            lowered.problem.penalty = penalty(lowered.problem)
            answer = self.ask(lowered, axis, spare, start)
            assert answer is not None  # with a penalty every choice is feasible
        return lift(self.prices, axis, lowered, answer.choice, state), answer.step, fits

    def ask(self, lowered: Axis, axis: int, spare: float, start: Sequence[int] | None = None) -> Solution | None:
        """The answer to the program of one axis in at most `spare` seconds; None if none meets the limit.

        Raises:
            ConstraintError: a constraint leaves a class no choice that its neighbours can meet.
        """
        try:
            answer = solve(lowered.problem, spare, GAP, start)
        except NoOption as error:
            cls = lowered.classes[error.group]
            why = self.space.pins.why.get((cls, axis), "a constraint on its neighbours")
            raise ConstraintError(
                f"{why} cannot be met at {self.space.fold.first(cls).name}: no choice of its neighbours on axis "
                f"{self.mesh.names[axis]} gives what it needs (a partial sum must be made by a producer); loosen it"
            ) from None
        if answer is not None:
            self.solves.append(answer)
            self.clock["build"] += answer.build_s
            self.clock["solve"] += answer.solve_s
        return answer

    def least(self, orders: list[list[int]]) -> Found:
        """About the least memory that any plan needs: of the stand-in minimised.

        Whatever the limit is, it is the same plan: a limit that was asked for because of it is enough.
        """
        return min(map(self._least, orders), key=lambda found: found.peak)

    def _least(self, axes: list[int]) -> Found:
        """The plan of the smallest stand-in, whatever its time."""
        state = self.space.start()
        for _ in range(2):
            for axis in axes:
                lowered = lower(self.prices, state, axis, 1.0, 0.0)
                # Far below what any plan needs, so that every byte counts.
                lowered.problem.limit = max(1.0, 1e-4 * sum(max(g.memory) for g in lowered.problem.groups))
                lowered.problem.penalty = penalty(lowered.problem)
                answer = self.ask(lowered, axis, 10.0)
                assert answer is not None
                state = lift(self.prices, axis, lowered, answer.choice, state)
        found = self._simulated(state)
        self._price(found)
        return found

    def _proxy(self, state: State, axis: int) -> float:
        """What the stand-in counts for a state."""
        lowered = lower(self.prices, state, axis, math.inf, 0.0)
        return evaluate(lowered.problem, current(lowered, axis, state))[1]

    # ---- candidates --------------------------------------------------------------------------------------------

    def _simulated(self, state: State, seed: bool = False) -> Found:
        """Unfold a state and simulate it."""
        began = time.perf_counter()
        made, prices = self.make(state), self.prices
        specs = plan_specs(self.items, made, self.space.fold.like)
        timeline = run(self.items, made, specs, prices.compute, prices.policy)
        self.clock["price"] += time.perf_counter() - began
        return Found(state, made, timeline, seed=seed)

    def _fits(self, found: Found) -> bool:
        """Price a candidate, and whether it is within the limit."""
        self._price(found)
        return self.limit is None or found.peak <= self.limit

    def _price(self, found: Found) -> None:
        """Price a candidate anew; the folded serial objective must agree."""
        if found.price is not None:
            return
        began = time.perf_counter()
        policy = self.prices.policy
        found.price = price(
            self.items,
            found.plan,
            self.prices.compute.machine.device,
            optimizer_bytes=policy.optimizer_bytes,
            links=self.links,
        )
        lowered = lower(self.prices, found.state, 0, None, 0.0)
        folded = evaluate(lowered.problem, current(lowered, 0, found.state))[0]
        serial = found.price.step_s
        assert math.isclose(folded, serial, rel_tol=1e-6), f"folded {folded} s, unfolded {serial} s"
        self.clock["price"] += time.perf_counter() - began


def penalty(problem: Problem) -> float:
    """Seconds per byte that outweigh any gain in time: the whole step for a hundredth of the limit."""
    total = sum(max(g.cost) for g in problem.groups) + sum(
        f.count * max((c for line in f.cost for c in line if c < math.inf), default=0.0) for f in problem.flows
    )
    return 100 * max(total, 1e-9) / max(problem.limit or 1.0, 1.0)


def experts(prices: Prices, wishes: Wishes) -> list[Pins]:
    """Pins of the strategies worth trying; before anything has asked the space for options."""
    space = prices.space
    rows = strategies(space.mesh, wishes)
    if not rows or not space.fold.items.program.training:
        return []
    return pinned(rows, wishes.marked(space.fold.items), space.fold, space.offered, space.pins)


def _seconds(found: Found) -> float:
    return found.timeline.step_s


__all__ = ["Found", "Search", "experts", "penalty"]
