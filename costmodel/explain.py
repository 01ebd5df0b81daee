"""Why a plan is as it is: what else could have been chosen at one place, what that would cost, and what decided.

A plan is laid out over classes of repeated layers (those that the plan treats alike), with the prices that the planner
goes by. One class is then changed on one mesh axis to everything else that it may do, twice over:

* with its neighbours as they are: what changes is its own work and the communication on its edges;
* with the whole axis solved anew round the change: the true next best, as the neighbours follow.

Numbers come from `lower`, `ilp` and `price`; there is no formula here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from autopar.compression import Compression
from autopar.costmodel.choices import Option, Pins, Space, State
from autopar.costmodel.comm import Comm
from autopar.costmodel.constraints import Wishes, pin
from autopar.costmodel.devices import Device, Link, Machine, machine
from autopar.costmodel.edges import edges_of
from autopar.costmodel.fold import fold
from autopar.costmodel.ilp import solve
from autopar.costmodel.items import Item, Items, items_of
from autopar.costmodel.layouts import candidates
from autopar.costmodel.legal import plan_specs, spelled_out, storage_of
from autopar.costmodel.lower import Axis, Prices, current, lift, lower
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.price import Price, price
from autopar.costmodel.problem import PHASES, NoOption, evaluate, loads, overlapped
from autopar.costmodel.simulate import Timeline, simulate
from autopar.costmodel.taint import Mark, marks_of
from autopar.costmodel.tally import Movement, compute_seconds, movements, touching, update_seconds
from autopar.errors import SolverError
from autopar.graph import Program
from autopar.plan import Plan, Storage
from autopar.rule import WHOLE, Choice
from autopar.spec import R, Spec

#: Seconds that a solve round one change may take.
TIME_LIMIT = 20.0
#: How many other storages of a parameter are solved round; those cheapest with fixed neighbours come first.
SOLVED = 2
#: Prefer the plain over the strange where times are equal, as the planner does.
TIE = 1e-9
#: Parts of the memory limit tried in turn: the linear stand-in counts a little less than the priced peak.
TIGHTER = (1.0, 0.97, 0.9)


@dataclass(frozen=True)
class Change:
    """From the plan to another: differences, positive where the other costs more.

    step_s: of the simulated steps, which is what plans are chosen by. compute_s, comm_s, update_s: by part, one after
    the other. peak_bytes: of the priced peaks. over: bytes by which the other misses the memory limit; 0 where it fits
    or there is none.
    appears, goes: the communication that is new, and that is gone, dearest first. work: classes that compute longer or
    shorter, with seconds, largest first.
    """

    step_s: float
    compute_s: float
    comm_s: float
    update_s: float
    peak_bytes: float
    over: float
    memory: Mapping[str, float]
    appears: tuple[Movement, ...]
    goes: tuple[Movement, ...]
    work: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Other:
    """Another decision for one class on one axis. followers: classes that would decide otherwise with it."""

    value: Choice | Storage | Spec
    change: Change
    followers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """One class on one axis: what is chosen, and what comes next.

    Attributes:
        value: the choice of an op, the storage of a parameter.
        fixed: other decisions with the neighbours as they are, fastest first.
        impossible: decisions that the neighbours as they are do not allow (a partial sum that nobody makes).
        free: the best with another decision here, the axis solved anew; None if there is no other, or nothing that the
            neighbours could follow.
        barred: what would be the best with another decision here, but misses the memory limit.
        why: the constraint that pins it, if one does.
    """

    cls: int
    axis: int
    value: Choice | Storage | Spec
    fixed: tuple[Other, ...]
    impossible: tuple[Choice | Storage | Spec, ...]
    free: Other | None = None
    barred: Other | None = None
    why: str = ""


@dataclass
class Bench:
    """A plan laid out for questions. `space` has no pins; `pins` are those of the user's constraints."""

    items: Items
    plan: Plan
    where: Machine
    prices: Prices
    pins: Pins
    state: State
    limit: float | None
    optimizer_bytes: float | None = None
    links: Mapping[str, Link] | None = None
    usable: Sequence[Sequence[float]] | None = None  # what of a phase can hide transports, see `costmodel.problem`
    _lowered: dict[int, Axis] = field(default_factory=dict)
    _price: Price | None = None
    _step: Timeline | None = None
    _marks: list[frozenset[Mark]] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        program: Program | Items,
        plan: Plan,
        device: str | Device,
        *,
        constraints: Mapping[str, str] | None = None,
        memory_limit: float | None = None,
        optimizer_bytes: float | None = None,
        links: Mapping[str, Link] | None = None,
        free_outputs: bool = False,
    ) -> Bench:
        """Lay out a legal plan; arguments as of `planner.plan`.

        Raises:
            PlanError: the plan is not legal for the program.
            ConstraintError: a constraint names nothing.
        """
        items = program if isinstance(program, Items) else items_of(program, plan.saved)
        plan = spelled_out(items, plan, plan_specs(items, plan))
        wishes = Wishes.parse(dict(constraints or {}), items, plan.mesh)
        # What the plan treats differently is never one class, so that a class has one decision.
        folded = fold(items, small=0, mark=lambda item: (wishes.mark(item), _decided(plan, item)))
        offered = candidates(folded, plan.mesh.sizes)
        pins = pin(wishes, folded, offered)
        state = _state(folded.members, items, plan)
        for c, row in state.rows.items():
            offered[c] = tuple(dict.fromkeys((*offered[c], *row)))
        bare = Pins()
        for c, held in state.storage.items():
            if held.gather == "twice" and all(p.kind == "R" for p in held.spec):
                bare.gather[c] = held.gather  # an edited plan may say so; the planner offers it to shards only
            bare.state[c] = held.state
        where = machine(device, plan.mesh, links)
        space = Space(folded, plan.mesh, offered, dict(plan.inputs), bare, free_outputs)
        prices = Prices(
            space,
            edges_of(folded),
            Compute(items, where),
            Comm(where, Compression.parse(plan.compression)),
            Policy(items.program.training, optimizer_bytes, plan.optimizer),
        )
        bench = cls(items, plan, where, prices, pins, state, memory_limit, optimizer_bytes, links)
        bench.usable = bench._fitted()
        return bench

    # ---- prices ------------------------------------------------------------------------------------------------

    @property
    def price(self) -> Price:
        """Of the plan itself."""
        if self._price is None:
            self._price = self.priced(self.state)
        return self._price

    def priced(self, state: State) -> Price:
        """Time and memory of a state, unfolded."""
        return price(
            self.items, self.to_plan(state), self.where.device, optimizer_bytes=self.optimizer_bytes, links=self.links
        )

    def simulated(self, state: State) -> Timeline:
        """The step of a state with computation and communication side by side."""
        policy = self.prices.policy
        return simulate(self.items, self.to_plan(state), self.where.device, self.links, policy=policy)

    @property
    def step(self) -> Timeline:
        """The simulated step of the plan itself."""
        if self._step is None:
            self._step = self.simulated(self.state)
        return self._step

    def to_plan(self, state: State) -> Plan:
        """A state as a plan, entries by exact address."""
        choices, storage, outputs = {}, {}, dict(self.plan.outputs)
        for item in self.items.items:
            c = self.prices.space.fold.of[item.index]
            if item.kind == "op":
                choices[item.name] = state.rows[c]
            elif item.kind == "param":
                storage[item.name] = state.storage[c]
            elif item.kind == "output" and c in state.outputs:
                outputs[item.name] = state.outputs[c]
        return replace(self.plan, choices=choices, storage=storage, outputs=outputs)

    def lowered(self, axis: int) -> Axis:
        """The axis's numbers round the plan as it is."""
        if axis not in self._lowered:
            self._lowered[axis] = lower(self.prices, self.state, axis, None, 0.0, self.usable)
        return self._lowered[axis]

    # ---- questions ---------------------------------------------------------------------------------------------

    def ask(self, cls: int, axis: int, *, solved: bool = True) -> Verdict:
        """What class `cls` does on `axis`, what else it could do, and what that would cost.

        solved: also solve the axis anew round another decision, which takes seconds on a large model.
        """
        lowered = self.lowered(axis)
        group = lowered.classes.index(cls)
        options = lowered.options[group]
        start = current(lowered, axis, self.state)
        trials: list[tuple[float, Option]] = []
        impossible: list[Choice | Storage | Spec] = []
        for number, option in enumerate(options):
            if number == start[group]:
                continue
            trial = [*start[:group], number, *start[group + 1 :]]
            if evaluate(lowered.problem, trial)[0] < math.inf:
                trials.append((overlapped(lowered.problem, trial), option))
            else:
                impossible.append(self._value(cls, option))
        if cls in self.pins.gather and (cls, axis) not in self.pins.storage:
            # A strategy of another axis fixes how it is gathered.
            trials = [t for t in trials if t[1].gather == self.pins.gather[cls]]
        trials.sort(key=lambda t: t[0])
        fixed = tuple(
            Other(self._value(cls, option), self.change(self._with(cls, axis, option))) for _, option in trials
        )
        fixed = tuple(sorted(fixed, key=lambda o: o.change.step_s))
        free, barred = (
            self._solved(cls, axis, options, start[group], [o for _, o in trials]) if solved else (None, None)
        )
        why = self.pins.why.get((cls, axis), "")
        return Verdict(cls, axis, self._value(cls, options[start[group]]), fixed, tuple(impossible), free, barred, why)

    def role(self, cls: int, choice: Choice) -> str:
        """What a choice of an op splits: "batch", "sequence", another factor by name, or "" for nothing."""
        if not self._marks:
            self._marks = marks_of(self.items)
        found = {
            m.what
            for m in self._marks[self.prices.space.fold.members[cls][0]]
            if m.at == choice.factor and m.touches(choice.outer)
        }
        return (
            found.pop() if len(found) == 1 else choice.factor or (f"+{choice.through}" if choice.through >= 0 else "")
        )

    def followers(self, state: State) -> tuple[int, ...]:
        """Classes that decide otherwise in `state` than in the plan."""
        old = self.state
        different = [c for c, row in state.rows.items() if row != old.rows[c]]
        different += [c for c, s in state.storage.items() if s != old.storage[c]]
        different += [c for c, s in state.outputs.items() if s != old.outputs[c]]
        return tuple(sorted(different))

    def _fitted(self) -> list[list[float]]:
        """What of a phase can hide transports, so that the objective exposes as much of the plan as the simulation."""
        tiers = self.prices.comm.tiers
        usable = [[1.0] * tiers for _ in range(PHASES)]
        lowered = lower(self.prices, self.state, 0, None, 0.0, usable)
        here = loads(lowered.problem, current(lowered, 0, self.state), tiers)
        exposed = self.step.exposed_s - sum(map(sum, here.block))
        low, high = 0.0, 1.0
        for _ in range(20):
            mid = (low + high) / 2
            low, high = (mid, high) if here.exposed([[mid] * tiers] * PHASES) > exposed else (low, mid)
        return [[high] * tiers for _ in range(PHASES)]

    # ---- parts -------------------------------------------------------------------------------------------------

    def _value(self, cls: int, option: Option) -> Choice | Storage | Spec:
        if cls in self.state.storage:
            return replace(self.state.storage[cls], spec=option.outs[0], gather=option.gather)
        if cls in self.state.outputs:
            return option.ins[0]
        assert isinstance(option.value, Choice)
        return option.value

    def _with(self, cls: int, axis: int, option: Option) -> State:
        state = self.state.copy()
        self.prices.space.decide(state, cls, axis, option)
        return state

    def change(self, state: State) -> Change:
        """From the plan to `state`."""
        changed = self.followers(state)
        edges = sorted({n for c in changed for n in touching(self.prices, c)})
        before = {m.key: m for m in movements(self.prices, self.state, edges)}
        after = {m.key: m for m in movements(self.prices, state, edges)}
        appears = [m for k, m in after.items() if k not in before]
        goes = [m for k, m in before.items() if k not in after]
        seconds = self._work(state, changed)
        priced = self.priced(state)
        old = self.price
        over = max(0.0, priced.peak_bytes - self.limit) if self.limit is not None else 0.0
        return Change(
            step_s=self.simulated(state).step_s - self.step.step_s,
            compute_s=priced.compute_s - old.compute_s,
            comm_s=priced.comm_s - old.comm_s,
            update_s=priced.update_s - old.update_s,
            peak_bytes=priced.peak_bytes - old.peak_bytes,
            over=over,
            memory={k: v - old.memory[k] for k, v in priced.memory.items() if v != old.memory[k]},
            appears=tuple(sorted(appears, key=lambda m: -m.total)),
            goes=tuple(sorted(goes, key=lambda m: -m.total)),
            work=seconds,
        )

    def _work(self, state: State, changed: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
        """Seconds by which each changed class computes (or updates) longer, largest first."""
        found = []
        for measure in (compute_seconds, update_seconds):
            now, then = (measure(self.prices, _only(s, changed)) for s in (self.state, state))
            found += [(c, then[c] - now[c]) for c in then if then[c] != now[c]]
        return tuple(sorted(found, key=lambda pair: -abs(pair[1])))

    def _solved(
        self, cls: int, axis: int, options: list[Option], chosen: int, best: list[Option]
    ) -> tuple[Other | None, Other | None]:
        """The best plan that decides otherwise here, with all else on this axis free: within the limit, and beyond."""
        trials: list[Pins] = []
        if cls in self.state.storage:
            # Whole instead of split, or gathered otherwise; which dim is split says less.
            now, firsts = self._stored(options[chosen], axis), dict[object, Option]()
            for option in best:
                if self._stored(option, axis) != now:
                    firsts.setdefault(self._stored(option, axis), option)
            for option in [*firsts.values(), *best][:SOLVED]:
                place = option.outs[0][axis]
                trials.append(Pins(storage={(cls, axis): (place,)}, gather={cls: option.gather}))
        elif cls in self.state.rows:
            taken = options[chosen].value
            assert isinstance(taken, Choice)
            others = [o.value for n, o in enumerate(options) if n != chosen and isinstance(o.value, Choice)]
            different = [c for c in others if self.role(cls, c) != self.role(cls, taken)]
            if different or others:
                trials.append(Pins(choices={(cls, axis): frozenset(different or others)}))
        fits: list[Other] = []
        beyond: list[Other] = []
        for pins in trials:
            for state in self._solve_pinned(axis, pins):
                value = state.storage[cls] if cls in state.storage else state.rows[cls][axis]
                rest = tuple(c for c in self.followers(state) if c != cls)
                other = Other(value, self.change(state), rest)
                (beyond if other.change.over else fits).append(other)
        return tuple(min(found, key=lambda o: o.change.step_s, default=None) for found in (fits, beyond))  # type: ignore[return-value]

    @staticmethod
    def _stored(option: Option, axis: int) -> tuple[str, str]:
        return option.outs[0][axis].kind, option.gather

    def _solve_pinned(self, axis: int, pins: Pins) -> list[State]:
        """The axis solved with more pins than the user's: without a memory limit, and if that misses it, within."""
        merged = Pins(
            {**self.pins.choices, **pins.choices},
            {**self.pins.storage, **pins.storage},
            {**self.pins.gather, **self.prices.space.pins.gather, **pins.gather},
            dict(self.pins.reduce),
            dict(self.pins.why),
        )
        found: list[State] = []
        for part in (None,) if self.limit is None else (None, *TIGHTER):
            limit = None if part is None else part * (self.limit or 0.0)
            lowered = lower(self.prices, self.state, axis, limit, TIE, self.usable, merged)
            try:
                answer = solve(lowered.problem, TIME_LIMIT)
            except NoOption:
                return []  # no neighbour can go with it, whatever it does
            except SolverError:
                return found  # out of time under the limit: what misses the limit is still an answer
            if answer is None:
                return found
            state = lift(self.prices, axis, lowered, answer.choice, self.state)
            fits = self.limit is None or self.priced(state).peak_bytes <= self.limit
            if fits or not found:
                found.append(state)
            if fits:
                return found
        return found


def _only(state: State, classes: tuple[int, ...]) -> State:
    return State(
        {c: state.rows[c] for c in classes if c in state.rows},
        {c: state.storage[c] for c in classes if c in state.storage},
        {},
    )


def _decided(plan: Plan, item: Item) -> object:
    if item.kind == "op":
        return plan.choice(item.name)
    if item.kind == "param":
        return storage_of(plan, item)
    if item.kind in ("input", "output"):
        return (plan.inputs if item.kind == "input" else plan.outputs).get(item.name)
    return None


def _state(members: list[list[int]], items: Items, plan: Plan) -> State:
    """The plan as a state; axes of size 1 split nothing."""
    sizes = plan.mesh.sizes
    whole: Spec = (R,) * len(sizes)
    state = State({}, {}, {})
    for cls, group in enumerate(members):
        item = items.items[group[0]]
        if item.kind == "op":
            state.rows[cls] = tuple(c if n > 1 else WHOLE for c, n in zip(plan.choice(item.name), sizes))
        elif item.kind == "param":
            held = storage_of(plan, item)
            spec = tuple(p if n > 1 else R for p, n in zip(held.spec, sizes))
            state.storage[cls] = replace(held, spec=spec)
        elif item.kind == "output":
            state.outputs[cls] = tuple(plan.outputs.get(item.name, whole))
    return state


__all__ = ["Bench", "Change", "Other", "Verdict"]
