"""Choose a plan: fold, offer, then solve one mesh axis after the other, in both orders, and keep the best.

A joint program over two axes is too big (its flows grow with the square of the placements), so each axis is solved with
the others fixed, two or three times over; the memory limit is loose for what the unsolved axes can still divide. The
program's memory is a linear stand-in; the priced peak decides, and while it is above the limit the stand-in is
tightened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autopar.costmodel.choices import Space, State
from autopar.costmodel.comm import Comm
from autopar.costmodel.constraints import Wishes, pin
from autopar.costmodel.devices import Device, Link, Machine, machine
from autopar.costmodel.edges import edges_of
from autopar.costmodel.fold import fold
from autopar.costmodel.ilp import NoOption, Problem, Solution, evaluate, solve
from autopar.costmodel.items import items_of
from autopar.costmodel.layouts import candidates
from autopar.costmodel.legal import check_plan
from autopar.costmodel.lower import Axis, Prices, current, lift, lower
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.price import Price, price
from autopar.costmodel.rules import report
from autopar.costmodel.shuffle import random_plan
from autopar.errors import ConstraintError, InfeasibleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.plan import fold as fold_choices
from autopar.spec import R, S, Spec

#: Sweeps over the axes per order; stop earlier when a sweep gains less than GAIN.
SWEEPS, GAIN = 3, 1e-3
#: How often the stand-in for memory is tightened when the priced peak is above the limit.
ROUNDS = 4
#: Part of a device's memory that the planner may fill when the user gives no limit.
USABLE = 0.92

Progress = Callable[[str, float], None]


def plan(
    program: Program,
    mesh: Mesh,
    *,
    device: str | Device = "cpu",
    memory_limit: int | None = None,
    constraints: Mapping[str, str] | None = None,
    optimizer_bytes: float | None = None,
    inputs: str = "global",
    input_specs: Mapping[str, Spec] | None = None,
    output_specs: str = "replicated",
    links: Mapping[str, Link] | None = None,
    time_limit: float = 30.0,
    progress: Progress | None = None,
) -> Plan:
    """Where everything of `program` lies on `mesh`, chosen for the shortest predicted step that fits in memory.

    Args:
        device: preset name (`autopar.costmodel.devices.DEVICES`) or Device.
        memory_limit: bytes per rank; None: 92 % of the device's memory, no limit on the cpu.
        constraints: axis -> strategy, parameter glob -> storage, or op glob -> choice; see `costmodel.constraints`.
        optimizer_bytes: optimizer state per parameter element; None: two values of the parameter's dtype (Adam).
        inputs: "global": the whole batch is on every rank; "local": each rank has its piece of the batch, split over
            every axis pinned to ddp or zero*, or over the first axis if none is.
        input_specs: where inputs lie, by name; wins over `inputs`.
        output_specs: "replicated", or "free": outputs with dims may be left split (plain shards).
        links: axis -> Link, in place of the device's.
        time_limit: seconds for all solves together.
        progress: called with what is being done and the part done, 0 to 1.

    Raises:
        InfeasibleError: no plan found fits the memory limit; says by how much and of what kind.
        ConstraintError: a constraint names nothing or cannot be met.
        SolverError: the solver ended without a usable answer.
    """
    return _Planner(
        program,
        mesh,
        machine(device, mesh, links),
        memory_limit,
        dict(constraints or {}),
        optimizer_bytes,
        inputs,
        input_specs,
        output_specs == "free",
        links,
        time_limit,
        progress or (lambda what, done: None),
    ).run()


@dataclass
class _Best:
    """A complete state with its price."""

    state: State
    plan: Plan
    price: Price
    solves: list[Solution] = field(default_factory=list)  # the last one of every axis


@dataclass
class _Planner:
    program: Program
    mesh: Mesh
    where: Machine
    memory_limit: float | None
    constraints: dict[str, str]
    optimizer_bytes: float | None
    inputs: str
    input_specs: Mapping[str, Spec] | None
    free_outputs: bool
    links: Mapping[str, Link] | None
    time_limit: float
    progress: Progress
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("fold", "layouts", "build", "solve", "price"), 0.0)
    )
    solves: list[Solution] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Plan:
        if self.memory_limit is None and self.where.device.memory is not None:
            self.memory_limit = self.where.device.memory * USABLE
        self.deadline = time.perf_counter() + self.time_limit
        self.progress("folding repeated layers", 0.0)
        with _Clock(self.seconds, "fold"):
            self.items = items_of(self.program)
            wishes = Wishes.parse(self.constraints, self.items, self.mesh)
            self.fold = fold(self.items, mark=wishes.mark)
        self.progress("collecting layouts", 0.1)
        with _Clock(self.seconds, "layouts"):
            offered = candidates(self.fold, self.mesh.sizes)
            placed = self._inputs(wishes)
            pins = pin(wishes, self.fold, offered)
            self.space = Space(self.fold, self.mesh, offered, placed, pins, self.free_outputs)
            self.prices = Prices(
                self.space,
                edges_of(self.fold),
                Compute(self.items, self.where),
                Comm(self.where),
                Policy(self.program.training, self.optimizer_bytes),
            )
        best = self._search()
        self.progress("done", 1.0)
        return self._finish(best)

    # ---- search ------------------------------------------------------------------------------------------------

    def _search(self) -> _Best:
        axes = [a for a, n in enumerate(self.mesh.sizes) if n > 1]
        orders = [axes] if len(axes) < 2 else [axes, axes[::-1]]
        found: list[_Best] = []
        for number, order in enumerate(orders):
            self.progress(f"solving axes {', '.join(self.mesh.names[a] for a in order) or 'none'}", 0.2 + 0.35 * number)
            self._share = (len(orders) - number) * max(1, len(order))
            candidate = self._order(order)
            if candidate is not None:
                found.append(candidate)
        if not found:
            least = self._least(axes)
            if least.price.peak_bytes > (self.memory_limit or 0.0):
                raise self._infeasible(least.price)
            found.append(least)
        return min(found, key=lambda b: b.price.step_s)

    def _order(self, order: list[int]) -> _Best | None:
        """Solve the axes in this order until it fits; None if it does not."""
        # Without a limit the program is smaller; most plans fit anyway.
        limit: float | None = None
        for _ in range(ROUNDS):
            state = self._sweeps(order, limit)
            if state is None:
                return None
            best = self._priced(state)
            best.solves = self.solves[-len(order) :] if order else []
            if self.memory_limit is None or best.price.peak_bytes <= self.memory_limit:
                return best
            if not order:
                return None
            if limit is None:
                limit = self.memory_limit
                continue
            # The stand-in counted less than the walk: take the difference off, and a little more.
            proxy = self._proxy(state, order[-1])
            limit = min(limit * 0.98, proxy - (best.price.peak_bytes - self.memory_limit) * 1.05)
            if limit <= 0:
                return None
        return None

    def _sweeps(self, order: list[int], limit: float | None) -> State | None:
        """Sweep until nothing changes or is gained; None if the stand-in cannot meet the limit."""
        state = self.space.start()
        if not order:
            return state
        last = math.inf
        best: tuple[float, State] | None = None
        quiet = 0  # axes in a row whose solution stayed as it was
        for sweep in range(SWEEPS if len(order) > 1 else 1):
            for position, axis in enumerate(order):
                unsolved = math.prod(self.mesh.sizes[a] for a in order[position + 1 :]) if sweep == 0 else 1
                before = state
                state, seconds, fits = self._solve(state, axis, limit, unsolved)
                quiet = quiet + 1 if sweep and state == before else 0
                if fits and unsolved == 1 and (best is None or seconds < best[0]):
                    best = (seconds, state)
                if quiet >= len(order) - 1 and sweep:
                    return best[1] if best else None
            if time.perf_counter() > self.deadline or (fits and last - seconds < GAIN * seconds):
                break
            last = seconds if fits else math.inf
        return best[1] if best else None

    def _solve(self, state: State, axis: int, limit: float | None, unsolved: int) -> tuple[State, float, bool]:
        """One axis: the new state, its seconds, and whether it meets the limit; if none does, the least over it."""
        with _Clock(self.seconds, "build"):
            lowered = lower(self.prices, state, axis, None if limit is None else limit * unsolved, self._tie())
        spare = max(2.0, (self.deadline - time.perf_counter()) / max(1, self._share))
        answer = self._ask(lowered, axis, spare)
        fits = answer is not None
        if answer is None:
            lowered.problem.penalty = self._penalty(lowered.problem)
            answer = self._ask(lowered, axis, spare)
            assert answer is not None  # with a penalty every choice is feasible
        return lift(self.prices, axis, lowered, answer.choice, state), answer.seconds, fits

    def _ask(self, lowered: Axis, axis: int, spare: float) -> Solution | None:
        try:
            answer = solve(lowered.problem, spare)
        except NoOption as error:
            cls = lowered.classes[error.group]
            why = self.space.pins.why.get((cls, axis), "a constraint on its neighbours")
            raise ConstraintError(
                f"{why} cannot be met at {self.fold.first(cls).name}: no choice of its neighbours on axis "
                f"{self.mesh.names[axis]} gives what it needs (a partial sum must be made by a producer); loosen it"
            ) from None
        if answer is not None:
            self.solves.append(answer)
            self.seconds["build"] += answer.build_s
            self.seconds["solve"] += answer.solve_s
        return answer

    def _tie(self) -> float:
        return 1e-9

    def _penalty(self, problem: Problem) -> float:
        """Seconds per byte that outweigh any gain in time: the whole step for a hundredth of the limit."""
        total = sum(max(g.cost) for g in problem.groups) + sum(
            f.count * max((c for line in f.cost for c in line if c < math.inf), default=0.0) for f in problem.flows
        )
        return 100 * max(total, 1e-9) / max(problem.limit or 1.0, 1.0)

    def _proxy(self, state: State, axis: int) -> float:
        """What the stand-in counts for a state."""
        lowered = lower(self.prices, state, axis, math.inf, 0.0)
        return evaluate(lowered.problem, current(lowered, axis, state))[1]

    # ---- results -----------------------------------------------------------------------------------------------

    def _priced(self, state: State) -> _Best:
        """Unfold a state and price it anew; the folded objective must agree."""
        with _Clock(self.seconds, "price"):
            made = self._plan(state)
            found = price(self.items, made, self.where.device, optimizer_bytes=self.optimizer_bytes, links=self.links)
        lowered = lower(self.prices, state, 0, None, 0.0)
        folded = evaluate(lowered.problem, current(lowered, 0, state))[0]
        assert math.isclose(folded, found.step_s, rel_tol=1e-6), f"folded {folded} s, unfolded {found.step_s} s"
        return _Best(state, made, found)

    def _plan(self, state: State) -> Plan:
        choices, storage, outputs = {}, {}, {}
        whole: Spec = (R,) * len(self.mesh.sizes)
        for item in self.items.items:
            cls = self.fold.of[item.index]
            if item.kind == "op":
                choices[item.name] = state.rows[cls]
            elif item.kind == "param":
                storage[item.name] = state.storage[cls]
            elif item.kind == "output":
                outputs[item.name] = state.outputs.get(cls, whole)
        names = [s.name for s in self.program.of_kind("input")]
        return Plan(
            mesh=self.mesh,
            fingerprint=self.program.fingerprint,
            choices=choices,
            storage=storage,
            inputs={n: tuple(self.space.inputs.get(n, whole)) for n in names},
            outputs=outputs,
        )

    def _finish(self, best: _Best) -> Plan:
        statuses = {s.status for s in best.solves}
        last = best.solves[-1] if best.solves else None
        if any(s.solver == "CBC" for s in self.solves):
            self.notes.append("solved by CBC, because highspy is not installed: slower, and its gap is not known")
        gap = max((s.gap for s in best.solves), default=0.0)
        solver: dict[str, Any] = {
            "status": "feasible" if "feasible" in statuses else "optimal",
            "gap": gap if gap < math.inf else None,
            "solver": last.solver if last else "none needed",
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "solves": len(self.solves),
            "variables": max((s.variables for s in self.solves), default=0),
            "rows": max((s.rows for s in self.solves), default=0),
            "classes": len(self.fold.members),
            "items": len(self.items.items),
        }
        predicted = {**best.price.as_dict(), "device": self.where.device.name}
        if self.memory_limit is not None:
            predicted["memory_limit"] = round(self.memory_limit)
        p = best.plan
        return Plan(
            mesh=p.mesh,
            fingerprint=p.fingerprint,
            choices=fold_choices(p.choices),
            storage=p.storage,
            inputs=p.inputs,
            outputs=p.outputs,
            predicted=predicted,
            solver=solver,
            notes=(*self.notes, *report()),
        )

    def _least(self, axes: list[int]) -> _Best:
        """About the least memory that any plan needs: the stand-in minimised, whatever the time."""
        assert self.memory_limit is not None
        state = self.space.start()
        for _ in range(2):
            for axis in axes:
                lowered = lower(self.prices, state, axis, self.memory_limit / 100, 0.0)
                lowered.problem.penalty = self._penalty(lowered.problem)
                answer = solve(lowered.problem, 10.0)
                assert answer is not None
                state = lift(self.prices, axis, lowered, answer.choice, state)
        return self._priced(state)

    def _infeasible(self, least: Price) -> InfeasibleError:
        """What the plan of least memory needs, by kind."""
        assert self.memory_limit is not None
        kinds = ", ".join(f"{k} {_gb(v)}" for k, v in least.memory.items() if v >= 0.5)
        need = least.peak_bytes
        pinned = " under these constraints" if self.constraints else ""
        return InfeasibleError(
            f"no plan fits {_gb(self.memory_limit)} per device on mesh {self.mesh}{pinned}; the best found needs "
            f"{_gb(need)}, {_gb(need - self.memory_limit)} more\n  ({kinds}).\n"
            f"  Give at least {math.ceil(need)} bytes (memory_limit), a smaller batch, or a bigger mesh."
        )

    def _inputs(self, wishes: Wishes) -> dict[str, Spec]:
        whole: Spec = (R,) * len(self.mesh.sizes)
        given = {s.name: whole for s in self.program.of_kind("input")}
        if self.inputs == "local":
            axes = wishes.data_axes() or (0,)
            for name, dim in self.program.batch_dims.items():
                if name in given:
                    given[name] = tuple(S(dim) if a in axes else R for a in range(len(self.mesh.sizes)))
        for name, spec in (self.input_specs or {}).items():
            given[name] = tuple(spec)
        return given


def _gb(size: float) -> str:
    """Bytes with one decimal in the largest unit that is not below one."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


class _Clock:
    """Adds the seconds of a block to an entry."""

    def __init__(self, into: dict[str, float], key: str):
        self.into, self.key = into, key

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.key] += time.perf_counter() - self.start


__all__ = ["check_plan", "plan", "price", "random_plan"]
