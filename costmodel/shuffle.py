"""Random legal plans: the best test of the lowering. Every op takes a random legal choice on every axis."""

from __future__ import annotations

import random
from collections.abc import Mapping

from autopar.costmodel.fold import fold
from autopar.costmodel.items import Item, Items, items_of
from autopar.costmodel.layouts import candidates
from autopar.costmodel.legal import adds_wide, op_fits, op_specs, storage_places, valid
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import GATHER, REDUCE, Plan, Storage
from autopar.rule import WHOLE, Choice
from autopar.spec import Placement, R, Spec


def random_plan(program: Program, mesh: Mesh, seed: int, input_specs: Mapping[str, Spec] | None = None) -> Plan:
    """A plan that is legal and otherwise senseless; the same for the same seed.

    Inputs lie as `input_specs` says, else whole; outputs and buffers whole. Partial sums pass through linear ops where
    their producers happen to give them.
    """
    rng = random.Random(seed)
    items = items_of(program)
    folded = fold(items, small=len(items.items) + 1)
    offered = candidates(folded, mesh.sizes)
    whole: Spec = (R,) * len(mesh.sizes)
    outs: list[tuple[Spec, ...]] = []
    choices: dict[str, tuple[Choice, ...]] = {}
    storage: dict[str, Storage] = {}
    for item in items.items:
        if item.kind == "op":
            row = _random_row(rng, items, item, offered[folded.of[item.index]], outs, mesh)
            choices[item.name] = row
            outs.append(op_specs(items.rule(item), row)[1])
        elif item.kind == "param":
            stored = Storage(_random_storage(rng, item, mesh), rng.choice(GATHER), rng.choice(REDUCE))
            storage[item.name] = stored
            outs.append((stored.spec,))
        elif item.kind == "input":
            outs.append(((input_specs or {}).get(item.name, whole),))
        else:
            outs.append((whole,) * len(item.outs))
    return Plan(
        mesh=mesh,
        fingerprint=program.fingerprint,
        choices=choices,
        storage=storage,
        inputs={s.name: (input_specs or {}).get(s.name, whole) for s in program.of_kind("input")},
        outputs={s.name: whole for s in program.sinks if s.kind == "output" and s.node is not None},
        precision=program.precision,
    )


def _random_row(
    rng: random.Random, items: Items, item: Item, offered: tuple[Choice, ...], outs: list[tuple[Spec, ...]], mesh: Mesh
) -> tuple[Choice, ...]:
    rule = items.rule(item)
    row = [WHOLE] * len(mesh.sizes)
    for axis in rng.sample(range(len(row)), len(row)):
        if mesh.sizes[axis] == 1:
            continue
        legal = []
        for choice in offered:
            trial = (*row[:axis], choice, *row[axis + 1 :])
            if choice.through >= 0 and any(
                outs[item.ins[i].item][item.ins[i].index][axis] != Placement("P", reduce="sum")
                for i in rule.rule.linear[choice.through]
            ):
                continue
            if choice.through < 0 and adds_wide(item):
                (tensor,) = item.ins
                if outs[tensor.item][tensor.index][axis].kind == "P":
                    continue
            if op_fits(item, rule, trial, mesh.sizes):
                legal.append(choice)
        through = [c for c in legal if c.through >= 0]
        # Chances for a partial sum to travel are rare: take half of them.
        row[axis] = rng.choice(through) if through and rng.random() < 0.5 else rng.choice(legal)
    return tuple(row)


def _random_storage(rng: random.Random, item: Item, mesh: Mesh) -> Spec:
    meta = item.outs[0]
    assert meta is not None
    spec: list[Placement] = [R] * len(mesh.sizes)
    for axis, size in enumerate(mesh.sizes):
        legal = [
            p
            for p in storage_places(meta.shape, size)
            if valid(meta.shape, (*spec[:axis], p, *spec[axis + 1 :]), mesh.sizes)
        ]
        spec[axis] = rng.choice(legal)
    return tuple(spec)
