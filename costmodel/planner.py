"""Choose a plan: fold, offer, search (`costmodel.sweep`), and say what was found, or what would have to change."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autopar.collector import resting_collector
from autopar.compression import Compression
from autopar.costmodel.budget import Budget
from autopar.costmodel.choices import Pins, Space, State
from autopar.costmodel.comm import Comm
from autopar.costmodel.compress import compressed_note
from autopar.costmodel.constraints import Wishes, pin
from autopar.costmodel.devices import Device, Link, Machine, machine
from autopar.costmodel.edges import edges_of
from autopar.costmodel.fold import fold
from autopar.costmodel.host_search import HostSearch
from autopar.costmodel.ilp import Solution
from autopar.costmodel.items import Item, items_of
from autopar.costmodel.layouts import candidates
from autopar.costmodel.legal import check_plan, left_to_follow, plan_specs
from autopar.costmodel.lower import Prices
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.price import Price, price
from autopar.costmodel.rules import report
from autopar.costmodel.shuffle import random_plan
from autopar.costmodel.simulate import Timeline, simulate
from autopar.costmodel.sweep import Found, Search, experts
from autopar.errors import InfeasibleError, PlanError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.offload import COPIES
from autopar.plan import DEVICE, HOST, Plan, Storage
from autopar.plan import fold as fold_choices
from autopar.rule import Choice
from autopar.spec import R, S, Spec, local_shape
from autopar.units import bytes_

#: Part of a limit of which what stays must be more, for it to be asked first whether anything fits.
TIGHT = 0.6
#: Part of a device's memory that the planner may fill when the user gives no limit.
USABLE = 0.92

_TRANSFERRED = ("decided for another batch size; priced for this one",)

Progress = Callable[[str, float], None]


def plan(
    program: Program,
    mesh: Mesh,
    *,
    device: str | Device = "cpu",
    memory_limit: int | None = None,
    constraints: Mapping[str, str] | None = None,
    optimizer_bytes: float | None = None,
    optimizer: str = "adamw",
    inputs: str = "global",
    input_specs: Mapping[str, Spec] | None = None,
    output_specs: str = "replicated",
    links: Mapping[str, Link] | None = None,
    storage: Mapping[str, Storage] | None = None,
    choices: Mapping[str, Sequence[Choice]] | None = None,
    recompute: bool = True,
    offload: bool = True,
    host_state: bool = False,
    compression: str | None = None,
    quick: bool = False,
    time_limit: float = 30.0,
    progress: Progress | None = None,
) -> Plan:
    """Where everything of `program` lies on `mesh`, chosen for the shortest predicted step that fits in memory.

    Args:
        device: preset name (`autopar.costmodel.devices.DEVICES`) or Device.
        memory_limit: bytes per rank; None: 92 % of the device's memory, no limit on the cpu.
        constraints: axis -> strategy, parameter glob -> storage, or op glob -> choice; see `costmodel.constraints`.
        optimizer: its class, which says what state it keeps (`costmodel.optimizers`).
        optimizer_bytes: bytes of optimizer state per parameter element, in place of what the class keeps.
        inputs: "global": the whole batch is on every rank; "local": each rank has its piece of the batch, split over
            every axis pinned to ddp or zero*, or over the first axis if none is.
        input_specs: where inputs lie, by name; wins over `inputs`.
        output_specs: "replicated", or "free": outputs with dims may be left split (plain shards).
        links: axis -> Link, in place of the device's.
        storage: where parameters lie already, by name: they stay there.
        choices: what ops do already, by address, one choice per axis: they keep doing it.
        recompute: whether the backward may compute again what the forward need not keep then, where that takes less
            time than cutting more; False: nothing is computed twice.
        offload: whether what the backward reads may wait on the host, likewise, on a device that has one.
        host_state: whether gradients and optimizer state may lie on the host of a device that has one, where that takes
            less time than what else makes it fit: the module must step the optimizer itself then (`train_step`).
        compression: of gradients that are reduced, as text (`autopar.compression`).
        quick: one order of the axes, no experts' plans, and no ladder of limits: a plan that fits, near the quickest;
            and where none does, no search for the least.
        time_limit: seconds for all solves together.
        progress: called with what is being done and the part done, 0 to 1.

    Raises:
        InfeasibleError: no plan found fits the memory limit; says by how much and of what kind. What else would fit
            `autopar.fixes` looks for.
        ConstraintError: a constraint names nothing or cannot be met.
        SolverError: the solver ended without a usable answer.
    """
    with resting_collector():
        return _Planner(
            program,
            mesh,
            machine(device, mesh, links),
            memory_limit,
            dict(constraints or {}),
            optimizer_bytes,
            optimizer,
            inputs,
            input_specs,
            output_specs == "free",
            links,
            dict(storage or {}),
            {address: tuple(row) for address, row in (choices or {}).items()},
            recompute,
            offload,
            host_state,
            quick,
            time_limit,
            progress or (lambda what, done: None),
            compression,
        ).run()


def transfer(
    program: Program, plan: Plan, *, device: str | Device = "cpu", memory_limit: int | None = None
) -> Plan | None:
    """The decisions of a plan for another size of the same program; None if they are not legal here or do not fit.

    Args: as `plan`.
    """
    found = replace(plan, fingerprint=program.fingerprint, notes=(*plan.notes, *_TRANSFERRED))
    try:
        check_plan(program, found)
        cost = price(program, found, device)
    except PlanError:  # the sizes cannot be split so
        return None
    where = machine(device, plan.mesh, None).device
    limit = memory_limit if memory_limit is not None else where.memory and where.memory * USABLE
    if limit is not None and cost.peak_bytes > limit:
        return None
    kept = {k: v for k, v in plan.predicted.items() if k in ("device", "memory_limit")}
    predicted = {**figures(cost, simulate(program, found, device)), **kept}
    return replace(found, notes=tuple(dict.fromkeys(found.notes)), predicted=predicted)


def figures(cost: Price, timeline: Timeline) -> dict[str, Any]:
    """What `Plan.predicted` says: the price by part, one after the other, and the simulated step (`step_s`), of which
    `exposed_s` is spent waiting for communication."""
    return {**cost.as_dict(), "step_s": timeline.step_s, "exposed_s": timeline.exposed_s, "serial_s": cost.step_s}


@dataclass
class _Planner:
    program: Program
    mesh: Mesh
    where: Machine
    memory_limit: float | None
    constraints: dict[str, str]
    optimizer_bytes: float | None
    optimizer: str
    inputs: str
    input_specs: Mapping[str, Spec] | None
    free_outputs: bool
    links: Mapping[str, Link] | None
    storage: dict[str, Storage]
    choices: dict[str, tuple[Choice, ...]]
    recompute: bool
    offload: bool
    host_state: bool
    quick: bool
    time_limit: float
    progress: Progress
    compression: str | None
    hosts: bool = False  # the optimizer state of all parameters lies on the host
    saved: Mapping[str, str] = field(default_factory=dict)
    copies: int = COPIES
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("fold", "layouts", "build", "solve", "price"), 0.0)
    )
    solves: list[Solution] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> Plan:
        self.prepare()
        best = self._search()
        self.progress("done", 1.0)
        return self._finish(best)

    def prepare(self) -> None:
        """Fold, and collect what may be chosen."""
        if self.memory_limit is None and self.where.device.memory is not None:
            self.memory_limit = self.where.device.memory * USABLE
        self.deadline = time.perf_counter() + self.time_limit
        self.progress("folding repeated layers", 0.0)
        with _Clock(self.seconds, "fold"):
            self.items = items_of(self.program, self.saved)
            wishes = Wishes.parse(self.constraints, self.items, self.mesh)
            self.strategies = wishes.strategies
            self.fold = fold(self.items, mark=lambda item: (wishes.mark(item), self._kept(item)))
        self.progress("collecting layouts", 0.1)
        with _Clock(self.seconds, "layouts"):
            offered = candidates(self.fold, self.mesh.sizes)
            placed = self._inputs(wishes)
            pins = pin(wishes, self.fold, offered)
            self._keep(pins, offered)
            self.space = Space(self.fold, self.mesh, offered, placed, pins, self.free_outputs)
            self.prices = Prices(
                self.space,
                edges_of(self.fold),
                Compute(self.items, self.where),
                Comm(self.where, Compression.parse(self.compression)),
                Policy(self.program.training, self.optimizer_bytes, self.optimizer),
            )
            self.experts = [] if self.quick else experts(self.prices, wishes)

    def _kept(self, item: Item) -> Storage | tuple[Choice, ...] | None:
        if item.kind == "op":
            return self.choices.get(item.name)
        return self.storage.get(item.name) if item.kind == "param" else None

    def _keep(self, pins: Pins, offered: list[tuple[Choice, ...]]) -> None:
        """Pin the parameters that lie somewhere already, and the ops that are decided."""
        for cls in range(len(self.fold.members)):
            held = self._kept(self.fold.first(cls))
            if self.hosts and self.fold.first(cls).kind == "param":
                pins.state[cls] = HOST
            if isinstance(held, Storage):
                pins.gather[cls], pins.reduce[cls], pins.state[cls] = held.gather, held.reduce, held.state
                for axis, place in enumerate(held.spec):
                    pins.storage[cls, axis] = (place,)
                    pins.why[cls, axis] = "where the parameter lies since the first call"
            elif held is not None:
                offered[cls] = tuple(dict.fromkeys((*offered[cls], *held)))
                for axis, choice in enumerate(held):
                    pins.choices[cls, axis] = frozenset({choice})
                    pins.why[cls, axis] = "what the given plan decides"

    # ---- search ------------------------------------------------------------------------------------------------

    def _search(self) -> Found:
        axes = [a for a, n in enumerate(self.mesh.sizes) if n > 1]
        # An axis with a strategy goes first: one without might take what the strategy needs, such as the batch.
        free = [a for a in axes if a not in self.strategies]
        fixed = [a for a in axes if a in self.strategies]
        orders = [axes] if len(axes) < 2 else [fixed + free, fixed[::-1] + free[::-1]]
        budget = self._budget(orders[:1] if self.quick else orders)
        least = self._held()
        best = budget.run(self._below(least), self.memory_limit is not None and least > TIGHT * self.memory_limit)
        aside: HostSearch | None = None
        if self.host_state and self.program.training:
            aside = HostSearch(budget, lambda: self._hosting().search(self.memory_limit), frozenset(self.storage))
            best = aside.run(best) if self._below(self._held(HOST)) else best
        if best is None:
            best = (budget.least if self.quick else budget.smallest if aside is None else aside.smallest)()
            if self.memory_limit is not None and best.peak > self.memory_limit:
                raise self._infeasible(best)
        return best

    def _budget(self, orders: list[list[int]]) -> Budget:
        return Budget(
            self.program, self.where.device, self.links, self.prices.policy, self.fold, self.memory_limit,
            self.deadline, orders, self.search, lambda like: self._again(like, orders), self.progress,
            self.recompute, self.offload, self.quick,
        )  # fmt: skip

    def _again(self, like: Plan, orders: list[list[int]]) -> Found | None:
        """The best plan within the limit for the program that keeps as little as that of a plan."""
        other = replace(
            self, saved=dict(like.saved), copies=like.copies, progress=lambda what, done: None,
            seconds=dict(self.seconds),
        )  # fmt: skip
        other.prepare()
        other.deadline = self.deadline
        found = other.search(self.memory_limit).run(orders)
        return found and replace(found, plan=left_to_follow(other.items, found.plan))

    def _hosting(self) -> _Planner:
        """The same planner with the state of all parameters on the host."""
        other = replace(self, hosts=True, progress=lambda what, done: None, seconds=dict(self.seconds))
        other.prepare()
        other.deadline = self.deadline
        return other

    def _below(self, size: float) -> bool:
        """Whether it is within the limit."""
        return self.memory_limit is None or size <= self.memory_limit

    def _held(self, state: str = DEVICE) -> float:
        """Bytes of parameters, gradients and optimizer state on a rank if all are cut into equal pieces.

        state: where that lies which is not said.
        """
        whole: Spec = (R,) * len(self.mesh.sizes)
        policy, total = self.prices.policy, 0.0
        for item in self.items.items:
            if item.kind == "param":
                own = self.space.pins.state.get(self.fold.of[item.index], state)
                total += sum(policy.stored(item, whole, self.mesh.sizes, own).values())
        return total / self.mesh.num_devices

    def search(self, limit: float | None) -> Search:
        """A search over what has been prepared, for a limit in bytes."""
        return Search(
            self.prices,
            self._plan,
            limit,
            self.deadline,
            self.links,
            self.seconds,
            self.progress,
            self.experts,
            self.solves,
        )

    # ---- results -----------------------------------------------------------------------------------------------

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
            optimizer=self.optimizer,
            saved=self.saved,
            copies=self.copies,
            compression=self.compression,
            precision=self.program.precision,
        )

    def _finish(self, best: Found) -> Plan:
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
            "outputs": "free" if self.free_outputs else "replicated",
        }
        if self.constraints:
            solver["constraints"] = dict(self.constraints)
        solver.update({name: False for name in ("recompute", "offload") if not getattr(self, name)})
        if self.host_state:
            solver["host_state"] = True
        assert best.price is not None
        predicted = {**figures(best.price, best.timeline), "device": self.where.device.name}
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
            optimizer=p.optimizer,
            saved=p.saved,
            copies=p.copies,
            compression=p.compression,
            precision=p.precision,
            predicted=predicted,
            solver=solver,
            notes=tuple(
                dict.fromkeys(
                    (
                        *self.program.notes,
                        *self.notes,
                        *compressed_note(self.items, p),
                        *report(i.node for i in self.items.items if i.kind == "op" and i.node),
                    )
                )
            ),
        )

    def _infeasible(self, least: Found) -> InfeasibleError:
        """What the plan of least memory needs, by kind; what would fit is looked for by whoever asked."""
        assert self.memory_limit is not None and least.price is not None
        kinds = ", ".join(f"{k} {bytes_(v)}" for k, v in least.price.memory.items() if v >= 0.5)
        need = least.peak
        pinned = " under these constraints" if self.constraints else ""
        return InfeasibleError(
            f"no plan fits {bytes_(self.memory_limit)} per device on mesh {self.mesh}{pinned}; the best found needs "
            f"{bytes_(need)}, {bytes_(need - self.memory_limit)} more\n  ({kinds}).{self._too_large(least.plan)}\n"
            f"  Give at least {math.ceil(need)} bytes (memory_limit).",
            math.ceil(need),
            least.price.memory,
            limit=self.memory_limit,
            step_s=least.timeline.step_s,
            mesh=str(self.mesh),
        )

    def _too_large(self, plan: Plan) -> str:
        """Of what alone is larger than the limit: words about the largest; else nothing."""
        assert self.memory_limit is not None
        items = items_of(self.program, plan.saved)
        specs, most = plan_specs(items, plan), (0.0, "")
        for item in items.items:
            for meta, spec in zip(item.outs, specs.outs[item.index]):
                if meta is not None:
                    size = float(math.prod(local_shape(meta.shape, spec, self.mesh.sizes)) * meta.itemsize)
                    most = max(most, (size, item.name))
        if most[0] <= self.memory_limit:
            return ""
        return f"\n  {most[1]} alone makes {bytes_(most[0])} on a rank, as finely as it can be cut here."

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


class _Clock:
    """Adds the seconds of a block to an entry."""

    def __init__(self, into: dict[str, float], key: str):
        self.into, self.key = into, key

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.key] += time.perf_counter() - self.start


__all__ = ["check_plan", "plan", "price", "random_plan"]
