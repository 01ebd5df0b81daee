"""From program and state to the numbers of one axis's integer program, and back.

The other axes are fixed as `state` says, so every price here is that of the full multi-axis specs: the objective is the
price of the whole plan, not of one axis's share of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from autopar.costmodel.choices import Option, Pins, Space, State
from autopar.costmodel.comm import Comm
from autopar.costmodel.compress import gradient_links, gradient_seconds
from autopar.costmodel.edges import GRAD, Edge, Kept, kept_of
from autopar.costmodel.host_state import update_seconds
from autopar.costmodel.items import Meta
from autopar.costmodel.legal import adds_wide
from autopar.costmodel.memory import Policy
from autopar.costmodel.ops import Compute
from autopar.costmodel.problem import AFTER, INF, Consumer, Flow, Group, Keep, Problem
from autopar.errors import ConstraintError
from autopar.graph import BACKWARD
from autopar.rule import WHOLE
from autopar.spec import Spec, local_shape

#: In place of a way to reduce a gradient: the reader's cast comes first (`legal.adds_wide`).
WIDE = "wide"
#: A tensor, how it may come (and how its parameter is gathered), and how it may be wanted (and reduced).
_Ways = tuple[Meta, tuple[tuple[Spec, str], ...], tuple[tuple[Spec, str], ...]]


@dataclass
class Prices:
    """All that costs are computed from."""

    space: Space
    edges: list[Edge]
    compute: Compute
    comm: Comm
    policy: Policy
    costs: dict[_Ways, list[list[float]]] = field(default_factory=dict)  # seconds, and by tier, of ways seen before
    tiers: dict[_Ways, list[list[tuple[float, ...]]]] = field(default_factory=dict)

    @functools.cached_property
    def kept(self) -> list[Kept]:
        """What the forward keeps for the backward."""
        return kept_of(self.space.fold)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.space.mesh.sizes

    def op_seconds(self, cls: int, row: tuple) -> float:  # type: ignore[type-arg]
        """Seconds of one member of an op class."""
        return self.compute.seconds(self.space.fold.first(cls), row)

    def update_seconds(self, cls: int, spec: Spec, state: str) -> float:
        """Seconds of the optimizer's update of one parameter, whose state lies where `state` says."""
        item = self.space.fold.first(cls)
        return update_seconds(self.compute.machine.device, self.policy, item, spec, self.sizes, state)


def bring_seconds(comm: Comm, meta: Meta, src: Spec, dst: Spec, reduce: str = "") -> float:
    """Seconds of one redistribution. `reduce`: of a gradient, how it is reduced; empty for all others."""
    if reduce:
        return gradient_seconds(comm, meta, src, dst, reduce)
    return comm.seconds(meta.shape, meta.itemsize, src, dst)


@dataclass
class Axis:
    """A Problem and what its numbers stand for."""

    problem: Problem
    classes: list[int]  # class of every group
    options: list[list[Option]]  # of every group


def lower(
    prices: Prices,
    state: State,
    axis: int,
    limit: float | None,
    tie: float,
    usable: Sequence[Sequence[float]] | None = None,
    pins: Pins | None = None,
) -> Axis:
    """The integer program of `axis` with the other axes as in `state`.

    limit: bytes per rank for what the program's linear proxy counts, None for no limit. tie: seconds of a tie-breaker.
    usable: by phase and tier, see `costmodel.problem.Problem`; None: nothing overlaps. pins: in place of the space's.

    Raises:
        ConstraintError: the pins leave a class no option.
    """
    space, fold, sizes = prices.space, prices.space.fold, prices.sizes
    classes: list[int] = []
    options: list[list[Option]] = []
    groups: list[Group] = []
    group_of: dict[int, int] = {}
    for cls in range(len(fold.members)):
        item = fold.first(cls)
        if item.kind == "grad":
            continue
        found = space.options(cls, axis, state, pins)
        if not found:
            why = space.pins.why.get((cls, axis), f"mesh {space.mesh}")
            raise ConstraintError(
                f"{why} leaves {item.name} no choice on axis {space.mesh.names[axis]} of size {sizes[axis]} that "
                f"divides its shapes {[list(m.shape) for m in item.in_meta]} together with the other axes; "
                "loosen it, or change the mesh or the batch"
            )
        group_of[cls] = len(groups)
        classes.append(cls)
        options.append(found)
        groups.append(_group(prices, state, cls, axis, found, tie))
    problem = Problem(groups, limit=limit, usable=usable)
    for edge in prices.edges:
        _edge(prices, state, edge, group_of, options, problem)
    if limit is not None:
        problem.keeps = [_keep(kept, group_of, options, sizes) for kept in prices.kept]
    for item in fold.items.items:
        if item.kind in ("buffer", "input"):
            meta = item.outs[0]
            if meta is not None:
                spec = options[group_of[fold.of[item.index]]][0].outs[0]
                problem.fixed += math.prod(local_shape(meta.shape, spec, sizes)) * meta.itemsize
    return Axis(problem, classes, options)


def lift(prices: Prices, axis: int, lowered: Axis, choice: Sequence[int], state: State) -> State:
    """The state after a solution of `lowered`."""
    out = state.copy()
    for cls, options, picked in zip(lowered.classes, lowered.options, choice):
        prices.space.decide(out, cls, axis, options[picked])
    return out


def current(lowered: Axis, axis: int, state: State) -> list[int]:
    """The choice that leaves `state` as it is: a start for comparisons. The state must be among what is offered."""
    found = offered(lowered, axis, state)
    assert found is not None
    return found


def offered(lowered: Axis, axis: int, state: State) -> list[int] | None:
    """The choice that leaves `state` as it is; None if pins do not allow it."""
    out = []
    for cls, options in zip(lowered.classes, lowered.options):
        number: int | None = 0
        if cls in state.rows:
            number = next((i for i, o in enumerate(options) if o.value == state.rows[cls][axis]), None)
        elif cls in state.storage:
            held = state.storage[cls]
            same = (i for i, o in enumerate(options) if o.outs[0] == held.spec and o.gather == held.gather)
            number = next(same, None)
        elif cls in state.outputs:
            number = next((i for i, o in enumerate(options) if o.ins[0] == state.outputs[cls]), 0)
        if number is None:
            return None
        out.append(number)
    return out


def _group(prices: Prices, state: State, cls: int, axis: int, options: list[Option], tie: float) -> Group:
    item, count = prices.space.fold.first(cls), len(prices.space.fold.members[cls])
    cost, ties, memory, grown = ([0.0] * len(options) for _ in range(4))
    for i, option in enumerate(options):
        if item.kind == "op":
            row = (*state.rows[cls][:axis], option.value, *state.rows[cls][axis + 1 :])
            cost[i] = prices.op_seconds(cls, row) * count
            # Prefer plain splits to strided ones, and nothing to something.
            ties[i] = tie * count * ((2 if option.value.outer > 1 else 0) + (option.value != WHOLE))  # type: ignore[union-attr]
        elif item.kind == "param":
            where = state.storage[cls].state
            cost[i] = prices.update_seconds(cls, option.outs[0], where) * count
            held = prices.policy.stored(item, option.outs[0], prices.sizes, where)
            memory[i] = (held["parameters"] + held["optimizer"]) * count
            grown[i] = held["gradients"] * count
            place = option.outs[0][axis]
            ties[i] = tie * count * ((place.kind == "S") * (1 + 0.1 * place.dim) + 0.5 * (option.gather == "twice"))
    phase = AFTER if item.kind == "param" else int(item.phase == BACKWARD)
    return Group(cost, ties, memory, phase, grown if any(grown) else None)


def _edge(
    prices: Prices, state: State, edge: Edge, group_of: dict[int, int], options: list[list[Option]], problem: Problem
) -> None:
    fold, sizes = prices.space.fold, prices.sizes
    producer = group_of[edge.cls]
    stored = fold.first(edge.cls).kind == "param"
    rows: dict[tuple[Spec, str], int] = {}
    row = [rows.setdefault((o.outs[edge.index], o.gather), len(rows)) for o in options[producer]]
    wants: dict[tuple[Spec, str], int] = {}
    consumers = []
    for reader in edge.readers:
        group = group_of[reader.cls]
        reduce = state.storage[reader.cls].reduce if reader.operand == GRAD else ""
        if reader.operand == GRAD:
            specs = [o.outs[0] for o in options[group]]
        else:
            reduce = WIDE if adds_wide(fold.first(reader.cls)) else ""
            specs = [o.ins[reader.operand] for o in options[group]]
        column = [wants.setdefault((s, reduce), len(wants)) for s in specs]
        consumers.append(Consumer(group, column, int(reader.phase == BACKWARD)))
    key = (edge.meta, tuple(rows), tuple(wants))  # the same in every layer that is like it, and from sweep to sweep
    cost = prices.costs.get(key)
    if cost is None:
        cost = [[_seconds(prices, edge.meta, src, dst, reduce) for dst, reduce in wants] for src, _ in rows]
        prices.costs[key] = cost
    phase = min(c.share for c in consumers)
    flow = Flow(producer, row, consumers, cost, float(edge.count), late=edge.late, phase=phase)
    if problem.usable is not None:
        flow.tiers = prices.tiers.get(key)
        if flow.tiers is None:
            flow.tiers = [[_links(prices, edge.meta, *way) for way in line] for line in _ways(rows, wants, cost)]
            prices.tiers[key] = flow.tiers
    if stored:
        flow.apart = [gather == "twice" for _, gather in rows]
        if problem.limit is not None:
            flow.memory = [
                [
                    0.0 if gather == "twice" or dst == src else _bytes(edge.meta, dst, sizes) * edge.count
                    for dst, _ in wants
                ]
                for src, gather in rows
            ]
    if any(c for line in cost for c in line):
        problem.flows.append(flow)


def _keep(kept: Kept, group_of: dict[int, int], options: list[list[Option]], sizes: Sequence[int]) -> Keep:
    wants: dict[Spec, int] = {}
    consumers = []
    for reader in kept.readers:
        group = group_of[reader.cls]
        specs = [o.ins[reader.operand] for o in options[group]]
        consumers.append(Consumer(group, [wants.setdefault(s, len(wants)) for s in specs], 1))
    share = kept.size / kept.meta.itemsize * kept.count
    return Keep([_bytes(kept.meta, spec, sizes) * share for spec in wants], consumers)


def _ways(
    rows: dict[tuple[Spec, str], int], wants: dict[tuple[Spec, str], int], cost: list[list[float]]
) -> list[list[tuple[Spec, Spec, str, float]]]:
    return [[(src, dst, reduce, c) for (dst, reduce), c in zip(wants, line)] for (src, _), line in zip(rows, cost)]


def _links(prices: Prices, meta: Meta, src: Spec, dst: Spec, reduce: str, cost: float) -> tuple[float, ...]:
    """Seconds that the links of every tier are busy; nothing for what cannot be or costs nothing."""
    if not cost or cost == INF:
        return (0.0,) * prices.comm.tiers
    if reduce:
        return gradient_links(prices.comm, meta, src, dst, reduce)
    return prices.comm.links(meta.shape, meta.itemsize, src, dst)


def _seconds(prices: Prices, meta: Meta, src: Spec, dst: Spec, reduce: str) -> float:
    for have, want, size in zip(src, dst, prices.sizes):
        if (want.kind == "P" or (have.kind == "P" and reduce == WIDE)) and have != want and size > 1:
            return INF
    return bring_seconds(prices.comm, meta, src, dst, reduce)


def _bytes(meta: Meta, spec: Spec, sizes: Sequence[int]) -> float:
    return float(math.prod(local_shape(meta.shape, spec, sizes)) * meta.itemsize)
