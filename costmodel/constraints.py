"""User constraints: what they may say, and the pins that follow.

Keys and values of the mapping:

* mesh axis -> strategy: `ddp`, `zero1`, `zero2`, `zero3`, `tp`, `tp_sp`, `replicate`;
* glob of parameter names -> `shard(DIM, AXIS)`, `replicate`, `replicate(AXIS)`: where the parameter is stored;
* glob of op addresses -> `AXIS:CHOICE`, e.g. `{"fwd:*.mlp.down_proj/mm#0": "tp:k"}`: what the op does on an axis.

A constraint on names wins over a strategy of its axis. Constraints on names are read in the order of the mapping: where
two match the same parameter or op, the later wins on the mesh axes that it speaks of, and the earlier stays in force on
the others. `replicate` without an axis speaks of all. So write the general pattern first.

ddp, zero*: every op that runs over the batch splits it there. Parameters are stored whole (ddp) or sharded; gathered
once (zero1, zero2) or again for the backward (zero3); gradients all-reduced (ddp, zero1) or reduce-scattered.
tp: batch and sequence are never split there, and a matmul or convolution with a parameter is split if anything else
of it can be. tp_sp: the batch is never split, and every op that can be split otherwise is.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from autopar.costmodel.choices import Pins
from autopar.costmodel.edges import param_readers
from autopar.costmodel.fold import Fold
from autopar.costmodel.items import Item, Items
from autopar.costmodel.legal import op_fits
from autopar.costmodel.ops import global_flops
from autopar.costmodel.taint import BATCH, Mark, batch_choices, marks_of
from autopar.errors import ConstraintError, RuleError
from autopar.mesh import Mesh
from autopar.rule import WHOLE, Choice
from autopar.spec import Placement, R, S, Spec

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "tp", "tp_sp", "replicate")
DATA = frozenset({"ddp", "zero1", "zero2", "zero3"})


@dataclass(frozen=True)
class _Stored:
    """A parameter constraint: `place` on `axis` (None: on every axis)."""

    key: str
    value: str
    names: frozenset[str]
    axis: int | None
    place: Placement


@dataclass(frozen=True)
class _Op:
    """An op constraint."""

    key: str
    value: str
    names: frozenset[str]
    axis: int
    choice: Choice


@dataclass
class Wishes:
    """Parsed constraints."""

    mesh: Mesh
    strategies: dict[int, str] = field(default_factory=dict)
    stored: list[_Stored] = field(default_factory=list)
    ops: list[_Op] = field(default_factory=list)
    marks: list[frozenset[Mark]] = field(default_factory=list)
    contractions: frozenset[int] = frozenset()

    @classmethod
    def parse(cls, constraints: Mapping[str, str], items: Items, mesh: Mesh) -> Wishes:
        """Read the constraints and find what they name.

        Raises:
            ConstraintError: a key matches nothing, a value cannot be read, or the batch does not divide.
        """
        wishes = cls(mesh)
        for key, value in constraints.items():
            if key in mesh.names:
                if value not in STRATEGIES:
                    raise ConstraintError(f"constraint {key!r}: {value!r} is no strategy; use {', '.join(STRATEGIES)}")
                wishes.strategies[mesh.axis(key)] = value
            elif re.match(r"(shard|replicate)\b", value):
                wishes.stored += _stored(key, value, items, mesh)
            else:
                wishes.ops.append(_op(key, value, items, mesh))
        if any(mesh.sizes[a] > 1 for a in wishes.strategies):
            wishes = wishes.marked(items)
            wishes.check(items)
        return wishes

    def marked(self, items: Items) -> Wishes:
        """These wishes with what strategies are defined by: the loops over the batch, and the contractions."""
        return self if self.marks else replace(self, marks=marks_of(items), contractions=_contractions(items))

    def check(self, items: Items) -> None:
        """Every strategy over the batch needs one that divides.

        Raises:
            ConstraintError: the batch does not divide, or there is none.
        """
        _check_batch(self, items)

    def mark(self, item: Item) -> Hashable:
        """Items that constraints treat differently differ in this."""
        named = tuple(item.name in names for names in [w.names for w in self.stored] + [w.names for w in self.ops])
        marks = self.marks[item.index] if self.marks else None
        return named, marks, item.index in self.contractions

    def data_axes(self) -> tuple[int, ...]:
        """Axes pinned to a strategy that splits the batch."""
        return tuple(a for a, s in sorted(self.strategies.items()) if s in DATA)


def pin(wishes: Wishes, fold: Fold, offered: list[tuple[Choice, ...]]) -> Pins:
    """The pins that follow from the wishes; adds to `offered` the batch splits that strategies ask for.

    Raises:
        ConstraintError: a constraint cannot be met; says why, with the numbers.
    """
    pins = Pins()
    for cls in range(len(fold.members)):
        item = fold.first(cls)
        if item.kind == "param":
            _pin_param(wishes, item, cls, pins)
        elif item.kind == "op" and not item.constant:
            for axis, strategy in wishes.strategies.items():
                if wishes.mesh.sizes[axis] > 1:
                    _pin_op(wishes, fold, cls, axis, strategy, offered, pins)
            for wish in wishes.ops:
                if item.name in wish.names and wishes.mesh.sizes[wish.axis] > 1:
                    _pin_named(wish, wishes.mesh, fold, cls, offered, pins)
    return pins


# ---- parsing -------------------------------------------------------------------------------------------------------


def _stored(key: str, value: str, items: Items, mesh: Mesh) -> list[_Stored]:
    found = frozenset(items.items[i].name for name, i in items.param.items() if fnmatchcase(name, key))
    if not found:
        some = ", ".join(list(items.param)[:3])
        raise ConstraintError(f"constraint {key!r} matches no parameter; they are named like {some}")
    shard = re.fullmatch(r"shard\(\s*(-?\d+)\s*,\s*(\w+)\s*\)", value)
    whole = re.fullmatch(r"replicate(?:\(\s*(\w+)\s*\))?", value)
    if not shard and not whole:
        raise ConstraintError(
            f"constraint {key!r}: cannot read {value!r}; write shard(DIM, AXIS), replicate or replicate(AXIS)"
        )
    name = shard[2] if shard else whole[1] if whole else None
    if name is not None and name not in mesh.names:
        raise ConstraintError(f"constraint {key!r}: mesh {mesh} has no axis {name!r}")
    if not shard:
        return [_Stored(key, value, found, None if name is None else mesh.axis(name), R)]
    axis = mesh.axis(str(name))
    out: dict[int, set[str]] = {}
    for param in sorted(found):
        meta = items.items[items.param[param]].outs[0]
        assert meta is not None
        dim = int(shard[1]) + (len(meta.shape) if int(shard[1]) < 0 else 0)
        if not 0 <= dim < len(meta.shape):
            raise ConstraintError(f"constraint {key!r}: {param} has {len(meta.shape)} dims, so no dim {shard[1]}")
        if meta.shape[dim] % mesh.sizes[axis]:
            raise ConstraintError(
                f"constraint {key!r}: dim {dim} of {param} has {meta.shape[dim]} elements, which axis {name} of size "
                f"{mesh.sizes[axis]} does not divide; shard another dim or change the mesh"
            )
        out.setdefault(dim, set()).add(param)
    return [_Stored(key, value, frozenset(names), axis, S(dim)) for dim, names in out.items()]


def _op(key: str, value: str, items: Items, mesh: Mesh) -> _Op:
    found = frozenset(i.name for i in items.items if i.kind == "op" and fnmatchcase(i.name, key))
    if not found:
        params = any(fnmatchcase(n, key) for n in items.param)
        hint = (
            "it names parameters: write shard(DIM, AXIS), replicate or replicate(AXIS)"
            if params
            else f"keys are a mesh axis ({', '.join(mesh.names)}), a glob of parameter names, or a glob of op addresses"
        )
        raise ConstraintError(f"constraint {key!r}: {value!r} matches no op; {hint}")
    axis, colon, choice = value.partition(":")
    if not colon or axis not in mesh.names:
        raise ConstraintError(
            f"constraint {key!r}: cannot read {value!r}; write AXIS:CHOICE with an axis of mesh {mesh}"
        )
    try:
        parsed = Choice.parse(choice)
    except RuleError as error:
        raise ConstraintError(f"constraint {key!r}: {error}") from None
    return _Op(key, value, found, mesh.axis(axis), parsed)


def _contractions(items: Items) -> frozenset[int]:
    """Matmuls and convolutions that read a parameter, directly or through views and casts."""
    flops: dict[Hashable, bool] = {}
    found = set()
    for index in param_readers(items):
        item = items.items[index]
        if item.signature not in flops:
            assert item.node is not None
            flops[item.signature] = global_flops(item.node) > 0
        if flops[item.signature]:
            found.add(index)
    return frozenset(found)


def _check_batch(wishes: Wishes, items: Items) -> None:
    """Every strategy over the batch needs one that divides."""
    parts, names = 1, []
    for axis in wishes.data_axes():
        parts *= wishes.mesh.sizes[axis]
        names.append(f"{wishes.mesh.names[axis]}={wishes.strategies[axis]}")
    if parts == 1:
        return
    batches = {
        i.name: i.outs[0].shape[items.program.batch_dims[i.name]]
        for i in items.items
        if i.kind == "input" and i.outs[0] is not None and i.name in items.program.batch_dims
    }
    if not batches:
        raise ConstraintError(f"constraint {', '.join(names)} splits the batch, but no input has a known batch dim")
    for name, size in batches.items():
        if size % parts:
            raise ConstraintError(
                f"constraint {', '.join(names)} splits the batch into {parts}, but input {name} has a batch of {size}; "
                f"use a batch that {parts} divides, or another strategy for the axis"
            )


# ---- pins ----------------------------------------------------------------------------------------------------------


def _pin_param(wishes: Wishes, item: Item, cls: int, pins: Pins) -> None:
    meta = item.outs[0]
    assert meta is not None
    used = {s for a, s in wishes.strategies.items() if wishes.mesh.sizes[a] > 1}
    for axis, strategy in wishes.strategies.items():
        size = wishes.mesh.sizes[axis]
        if strategy in ("ddp", "replicate") or size == 1:
            pins.storage[cls, axis] = (R,)
        elif strategy in DATA:
            # Dim 0 if it divides, else the longest that does; whole only where nothing does.
            dims = [d for d, n in enumerate(meta.shape) if n and n % size == 0]
            dims.sort(key=lambda d: (d != 0, -meta.shape[d]))
            pins.storage[cls, axis] = tuple(S(d) for d in dims) + (R,)
        pins.why[cls, axis] = f"constraint {wishes.mesh.names[axis]}={strategy}"
    if "zero3" in used:
        pins.gather[cls] = "twice"
    elif used & DATA:
        pins.gather[cls] = "once"
    if used & DATA:
        pins.reduce[cls] = "reduce_scatter" if used & {"zero2", "zero3"} else "all_reduce"
    for wish in wishes.stored:
        if item.name in wish.names:
            for axis in range(len(wishes.mesh.sizes)) if wish.axis is None else (wish.axis,):
                pins.storage[cls, axis] = (wish.place,)
                pins.why[cls, axis] = f"constraint {wish.key!r}: {wish.value!r}"


def _pin_op(
    wishes: Wishes, fold: Fold, cls: int, axis: int, strategy: str, offered: list[tuple[Choice, ...]], pins: Pins
) -> None:
    item, sizes = fold.first(cls), wishes.mesh.sizes
    rule = fold.items.rule(item)
    marks = wishes.marks[item.index]
    through = frozenset(c for c in offered[cls] if c.through >= 0)
    pins.why[cls, axis] = f"constraint {wishes.mesh.names[axis]}={strategy}"

    def fits(choice: Choice) -> bool:
        if choice.factor and choice.factor not in rule.splittable():
            return False
        return op_fits(item, rule, tuple(choice if a == axis else WHOLE for a in range(len(sizes))), sizes)

    if strategy == "replicate":
        pins.choices[cls, axis] = frozenset({WHOLE})
        return
    if strategy in DATA:
        batch = frozenset(c for c in batch_choices(marks) if fits(c))
        offered[cls] = (*offered[cls], *(c for c in sorted(batch) if c not in offered[cls]))
        rest = frozenset({WHOLE, *through})
        if item.node is not None and item.node.target is torch.ops.aten._to_copy.default:
            rest |= {c for c in offered[cls] if fits(c)}  # a parameter is cast where it lies, and so is its gradient
        pins.choices[cls, axis] = batch or rest
        return
    banned = {m for m in marks if strategy == "tp" or m.what == BATCH}
    splits = frozenset(
        c
        for c in offered[cls]
        if c.factor and fits(c) and not any(m.at == c.factor and m.touches(c.outer) for m in banned)
    )
    must = strategy == "tp_sp" or item.index in wishes.contractions
    pins.choices[cls, axis] = splits | through if must and splits else splits | through | {WHOLE}
    if must and splits and strategy == "tp":
        pins.choices[cls, axis] = splits


def _pin_named(wish: _Op, mesh: Mesh, fold: Fold, cls: int, offered: list[tuple[Choice, ...]], pins: Pins) -> None:
    item, axis = fold.first(cls), wish.axis
    rule = fold.items.rule(item)
    about = f"constraint {wish.key!r}: {wish.value!r}"
    allowed = ", ".join(rule.splittable()) or "none"
    if wish.choice.factor and wish.choice.factor not in rule.splittable():
        raise ConstraintError(f"{about}: {item.name} cannot split {wish.choice.factor!r}; its factors are: {allowed}")
    if wish.choice.through >= len(rule.rule.linear):
        raise ConstraintError(f"{about}: {item.name} has {len(rule.rule.linear)} linear groups")
    if not op_fits(item, rule, tuple(wish.choice if a == axis else WHOLE for a in range(len(mesh.sizes))), mesh.sizes):
        raise ConstraintError(
            f"{about}: factor {wish.choice.factor} of {item.name} has {rule.sizes[wish.choice.factor]} elements, which "
            f"axis {mesh.names[axis]} of size {mesh.sizes[axis]} does not divide at {wish.choice}"
        )
    if wish.choice not in offered[cls]:
        offered[cls] = (*offered[cls], wish.choice)
    pins.choices[cls, axis] = frozenset({wish.choice})
    pins.why[cls, axis] = about


__all__ = ["DATA", "STRATEGIES", "Spec", "Wishes", "pin"]
