"""What a plan says about every tensor, and whether it may: the planner's checker, and the first thing a price needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from autopar.compression import Compression
from autopar.costmodel.items import Item, Items, items_of
from autopar.costmodel.optimizers import OPTIMIZERS, optimizer_of
from autopar.errors import ConstraintError, PlanError, RuleError
from autopar.graph import Program, pattern
from autopar.offload import HOSTED
from autopar.plan import DEVICE, GATHER, REDUCE, STATE, Plan, Storage, storage_shards
from autopar.precision import ADDED, FULL
from autopar.recompute import original, traveller
from autopar.rule import WHOLE, BoundRule, Choice, following
from autopar.spec import Placement, R, Shape, Spec, format_placements, is_valid, layout
from autopar.together import check_together

valid = lru_cache(maxsize=1 << 18)(is_valid)


@dataclass(frozen=True)
class Specs:
    """Spec of every operand and result of every item, in item order."""

    ins: list[tuple[Spec, ...]]
    outs: list[tuple[Spec, ...]]


def op_specs(rule: BoundRule, row: Sequence[Choice]) -> tuple[tuple[Spec, ...], tuple[Spec, ...]]:
    """Specs of operands and results of an op under one choice per mesh axis.

    Raises:
        RuleError: as `BoundRule.placements`.
    """
    per_axis = [rule.placements(c) for c in row]
    ins = tuple(tuple(a[0][i] for a in per_axis) for i in range(len(rule.ins)))
    outs = tuple(tuple(a[1][i] for a in per_axis) for i in range(len(rule.outs)))
    return ins, outs


def op_fits(item: Item, rule: BoundRule, row: Sequence[Choice], sizes: tuple[int, ...]) -> bool:
    """Whether every factor, operand and result divides evenly under `row`."""
    if not rule.fits(row, sizes):
        return False
    ins, outs = op_specs(rule, row)
    return all(valid(m.shape, s, sizes) for m, s in zip(item.in_meta, ins)) and all(
        m is None or valid(m.shape, s, sizes) for m, s in zip(item.outs, outs)
    )


def storage_places(shape: Shape, size: int) -> tuple[Placement, ...]:
    """What one axis of `size` may do to a stored parameter: whole, or a plain shard of a divisible dim."""
    dims = [d for d, n in enumerate(shape) if size > 1 and n and n % size == 0]
    return (R, *(Placement("S", d) for d in dims))


def check_plan(program: Program, plan: Plan) -> None:
    """Raise unless `plan` is legal for `program`; hand-edited plans come through here before they run.

    Raises:
        PlanError: it names an op, parameter, input or output that the program does not have, a factor the op does not
            have or may not split, a split that does not divide, a partial sum that nothing produces, or an optimizer
            that nobody knows. Says which.
    """
    plan_specs(items_of(program, plan.saved), plan)


def plan_specs(items: Items, plan: Plan, like: Sequence[int] | None = None) -> Specs:
    """Spec of every operand and result under a plan. Raises PlanError as `check_plan`.

    like: for every item the first that the plan, the planner's own, treats in the same way: only that one is looked at.
    Gradients lie as their own parameters do, or are left as sums that PowerSGD is to reduce.
    """
    sizes = plan.mesh.sizes
    whole: Spec = (R,) * len(sizes)
    _check_names(items, plan)
    check_together(plan)
    try:
        optimizer_of(plan.optimizer)
    except ConstraintError as error:
        what = f"those known are {', '.join(OPTIMIZERS)}" if ":" not in plan.optimizer else str(error)
        raise PlanError(f"the plan is for optimizer {plan.optimizer!r}; {what}") from None
    compression = Compression.parse(plan.compression)
    ins: list[tuple[Spec, ...]] = []
    outs: list[tuple[Spec, ...]] = []
    known: dict[tuple[int, tuple[Choice, ...]], _OpSpecs] = {}  # ops of one signature share their rule
    found: tuple[tuple[Spec, ...], tuple[Spec, ...]]
    for item in items.items:
        if like is not None and like[item.index] != item.index and item.kind != "grad":
            ins.append(ins[like[item.index]])
            outs.append(outs[like[item.index]])
            continue
        if item.kind == "op":
            rule = items.rule(item)
            row = _row(item, rule, plan, outs)
            op = known.get((id(rule), row))
            if op is None:
                op = known[id(rule), row] = _checked(item, rule, row, plan)
            ins.append(op.ins)
            outs.append(op.outs)
            _check_partial(item, op.partial, outs, plan)
            if adds_wide(item):
                _check_wide(item, op.ins[0], outs, plan)
            continue
        if item.kind == "param":
            found = ((), (_stored(plan, item),))
        elif item.kind == "input":
            found = ((), (tuple(plan.inputs.get(item.name, whole)),))
        elif item.kind == "grad":
            param = items.items[items.param[item.name]]
            spec, home = _stored(plan, param), outs[item.ins[0].item][item.ins[0].index]
            meta = items.meta(item.ins[0])
            if compression is not None and meta.dtype.is_floating_point:
                spec = compression.left(meta.shape, home, spec, sizes)
            found = ((spec,), ())
        elif item.kind == "output":
            found = ((tuple(plan.outputs.get(item.name, whole)),), ())
        else:
            found = ((whole,) * len(item.ins), (whole,) * len(item.outs))
        ins.append(found[0])
        outs.append(found[1])
        _check_layouts(item, found, plan)
        _check_partial(item, _partial(found[0], sizes), outs, plan)
    return Specs(ins, outs)


def row_of(items: Items, plan: Plan, specs: Specs, item: Item) -> tuple[Choice, ...]:
    """What an op does on every axis of more than one device."""
    row = _row(item, items.rule(item), plan, specs.outs)
    return tuple(c if n > 1 else WHOLE for c, n in zip(row, plan.mesh.sizes))


def spelled_out(items: Items, plan: Plan, specs: Specs) -> Plan:
    """The plan with the choices of what waits on the host, which follow from where that is made, among its own."""
    hosted = [i for i in items.items if i.node is not None and i.node.target in HOSTED and plan.named(i.name) is None]
    return replace(plan, choices={**plan.choices, **{i.name: row_of(items, plan, specs, i) for i in hosted}})


def left_to_follow(items: Items, plan: Plan) -> Plan:
    """The plan without choices of what waits on the host that follow anyway: they go with what is edited then."""
    hosted = [i for i in items.items if i.node is not None and i.node.target in HOSTED]
    if not hosted:
        return plan
    outs = plan_specs(items, plan).outs
    bare = replace(plan, choices={a: c for a, c in plan.choices.items() if traveller(a) is None})
    other = {i.name: row for i in hosted if (row := plan.choice(i.name)) != _row(i, items.rule(i), bare, outs)}
    return replace(bare, choices={**bare.choices, **other})


def _row(item: Item, rule: BoundRule, plan: Plan, outs: Sequence[tuple[Spec, ...]]) -> tuple[Choice, ...]:
    """The choices of an op: what waits on the host lies there as it was made, unless the plan names it."""
    assert item.node is not None
    if item.node.target in HOSTED and plan.named(item.name) is None:
        (operand,) = item.ins
        return following(rule, outs[operand.item][operand.index])
    return tuple(plan.choice(item.name))


def adds_wide(item: Item) -> bool:
    """Whether an item is the cast of a gradient from low precision of which partial sums are added up behind it."""
    return item.kind == "op" and item.node is not None and item.node.meta.get(ADDED) == FULL


class _OpSpecs(NamedTuple):
    """Specs of an op under its choices. partial: operand, axis and placement of what it takes as a partial sum."""

    ins: tuple[Spec, ...]
    outs: tuple[Spec, ...]
    partial: list[tuple[int, int, Placement]]


def _checked(item: Item, rule: BoundRule, row: tuple[Choice, ...], plan: Plan) -> _OpSpecs:
    """Specs of an op, which do not depend on its neighbours. Raises PlanError where its choices are not legal."""
    sizes = plan.mesh.sizes
    if len(row) != len(sizes):
        raise PlanError(f"{item.name}: the plan has {len(row)} choices for {len(sizes)} mesh axes")
    try:
        found = op_specs(rule, row)
    except RuleError as error:
        allowed = ", ".join(rule.splittable()) or "none"
        raise PlanError(f"{item.name}: {error}; its splittable factors are: {allowed}") from None
    _check_layouts(item, found, plan)
    if not rule.fits(row, sizes):
        chosen, factors = " ".join(str(c) for c in row), dict(rule.sizes)
        raise PlanError(f"{item.name}: choice '{chosen}' does not divide its factors {factors} on {plan.mesh}")
    return _OpSpecs(*found, _partial(found[0], sizes))


def _partial(ins: Sequence[Spec], sizes: Sequence[int]) -> list[tuple[int, int, Placement]]:
    return [
        (position, axis, place)
        for position, spec in enumerate(ins)
        for axis, place in enumerate(spec)
        if place.kind == "P" and sizes[axis] > 1
    ]


def _stored(plan: Plan, item: Item) -> Spec:
    assert item.source is not None
    names = (item.name, *item.source.aliases)
    for name in names:
        if name in plan.storage:
            return tuple(plan.storage[name].spec)
    return (R,) * len(plan.mesh.sizes)


def storage_of(plan: Plan, item: Item) -> Storage:
    """Storage of a parameter item, under its name or a tied one."""
    assert item.source is not None
    for name in (item.name, *item.source.aliases):
        if name in plan.storage:
            return plan.storage[name]
    return plan.stored(item.name)


def _check_layouts(item: Item, found: tuple[tuple[Spec, ...], tuple[Spec, ...]], plan: Plan) -> None:
    sizes = plan.mesh.sizes
    metas = [*zip(item.in_meta, found[0]), *zip(item.outs, found[1])]
    for meta, spec in metas:
        if meta is not None and not valid(meta.shape, spec, sizes):
            try:
                layout(meta.shape, spec, sizes)
            except ValueError as error:
                raise PlanError(
                    f"{item.name}: {format_placements(spec)} does not fit shape {meta.shape} "
                    f"on mesh {plan.mesh}: {error}"
                ) from None


def _check_partial(
    item: Item, partial: list[tuple[int, int, Placement]], outs: list[tuple[Spec, ...]], plan: Plan
) -> None:
    """A partial sum that an item takes must be what its producer makes; nothing else can make one."""
    for position, axis, place in partial:
        tensor = item.ins[position]
        made = outs[tensor.item][tensor.index][axis]
        if made != place:
            raise PlanError(
                f"{item.name}: choice {plan.choice(item.name)[axis]} on axis {plan.mesh.names[axis]} lets a "
                f"{place} through operand {position}, but its producer gives {made}"
            )


def _check_wide(item: Item, spec: Spec, outs: list[tuple[Spec, ...]], plan: Plan) -> None:
    """Partial sums of low precision must pass the cast of a gradient that is to be added up in fp32."""
    tensor = item.ins[0]
    for have, want, name, size in zip(outs[tensor.item][tensor.index], spec, plan.mesh.names, plan.mesh.sizes):
        if have.kind == "P" and have != want and size > 1:
            raise PlanError(
                f"{item.name}: on axis {name} a gradient of low precision is added up before its cast; let the partial "
                'sums pass the cast, or plan with reduce_dtype= of the low precision'
            )


def _check_names(items: Items, plan: Plan) -> None:
    ops = {i.name for i in items.items if i.kind == "op"}
    others = [address for address in plan.choices if address not in ops]
    patterns = {pattern(name) for name in ops} if others else set()
    for address in others:
        # What was said of a copy, or of a way to the host, stays when `saved` does not have it any more.
        made = original(address) or (traveller(address) or ("",))[0]
        if address not in patterns and made not in ops and made not in patterns:
            raise PlanError(
                f"the plan names the op {address!r}, which the program does not have; was it made for another model?"
            )
    names = {kind: {i.name for i in items.items if i.kind == kind} for kind in ("input", "output", "buffer")}
    for what, given in (("input", plan.inputs), ("output", plan.outputs)):
        for name, spec in given.items():
            if name not in names[what]:
                has = ", ".join(sorted(names[what])) or "none"
                raise PlanError(f"the plan names the {what} {name!r}; the program has {has}")
            if len(spec) != len(plan.mesh.sizes) or not storage_shards(tuple(spec)):
                raise PlanError(
                    f"{what} {name}: {format_placements(tuple(spec))} must be whole or a plain shard per axis"
                )
    for name, stored in plan.storage.items():
        if name not in items.param and name not in names["buffer"]:
            raise PlanError(f"the plan stores {name!r}, which is no parameter or buffer of the program")
        if len(stored.spec) != len(plan.mesh.sizes) or not storage_shards(tuple(stored.spec)):
            raise PlanError(
                f"{name}: storage {format_placements(tuple(stored.spec))} must be whole or a plain shard per axis"
            )
        if name in names["buffer"] and any(p.kind != "R" for p in stored.spec):
            raise PlanError(f"buffer {name} must be stored whole on every axis")
        if stored.gather not in GATHER or stored.reduce not in REDUCE:
            raise PlanError(f"{name}: {stored.gather!r}, {stored.reduce!r} are not one of {GATHER} and {REDUCE}")
        if stored.state not in STATE:
            raise PlanError(f"{name}: {stored.state!r} is not one of {STATE}")
        if name in names["buffer"] and stored.state != DEVICE:
            raise PlanError(f"buffer {name} has no optimizer state that could lie on the {stored.state}")
