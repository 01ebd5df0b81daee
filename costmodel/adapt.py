"""The same plan for a scaled-down program: every choice that is still legal is kept, the others become whole.

Used to prove a plan for a model too big for this machine on a small one of the same kind: addresses name the same ops
(layers that are gone are dropped), factors have the same names, only their sizes differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.costmodel.fold import fold
from autopar.costmodel.items import Item, Items, items_of
from autopar.costmodel.layouts import candidates
from autopar.costmodel.legal import op_fits, op_specs, valid
from autopar.errors import RuleError
from autopar.graph import Program, pattern
from autopar.mesh import Mesh
from autopar.offload import HOSTED
from autopar.plan import Plan, Storage
from autopar.recompute import present
from autopar.rule import WHOLE, Choice, following
from autopar.spec import R, Spec

_Row = tuple[Choice, ...]


@dataclass(frozen=True)
class Adapted:
    """The adapted plan, and how much of the given one it keeps.

    Attributes:
        kept: decisions that split or pass something, and were kept as they are.
        total: such decisions.
        changed: where the small program does not allow the decision: address, parameter or input.
    """

    plan: Plan
    kept: int
    total: int
    changed: tuple[str, ...]


def adapt(program: Program, plan: Plan, mesh: Mesh) -> Adapted:
    """`plan` for `program` on `mesh`, which has the plan's axes with other sizes.

    A strided split whose stride does not fit any more becomes one that does; what cannot be split at all becomes whole.
    """
    assert mesh.names == plan.mesh.names
    saved = present(program, plan.saved)
    items = items_of(program, saved)
    folded = fold(items, small=len(items.items) + 1)
    offered = candidates(folded, mesh.sizes)
    stars = {pattern(a): row for a, row in plan.storage.items()}
    outs: list[tuple[Spec, ...]] = []
    choices: dict[str, _Row] = {}
    storage: dict[str, Storage] = {}
    inputs: dict[str, Spec] = {}
    changed: list[str] = []
    kept = total = 0
    whole: Spec = (R,) * len(mesh.sizes)

    def count(name: str, want: Sequence[object], got: Sequence[object], neutral: object) -> None:
        nonlocal kept, total
        for size, a, b in zip(mesh.sizes, want, got):
            if size > 1 and a != neutral:
                total += 1
                kept += a == b
                if a != b:
                    changed.append(name)

    for item in items.items:
        if item.kind == "op" and item.node is not None and item.node.target in HOSTED and plan.named(item.name) is None:
            (operand,) = item.ins  # it lies on the host as it was made, here too: the small plan need not say so
            rule = items.rule(item)
            outs.append(op_specs(rule, following(rule, outs[operand.item][operand.index]))[1])
        elif item.kind == "op":
            want = plan.choice(item.name)
            row = _nearest(items, item, want, offered[folded.of[item.index]], outs, mesh.sizes)
            count(item.name, want, row, WHOLE)
            choices[item.name] = row
            outs.append(op_specs(items.rule(item), row)[1])
        elif item.kind == "param":
            assert item.source is not None and item.outs[0] is not None
            names = (item.name, *item.source.aliases)
            given = next((plan.storage[n] for n in names if n in plan.storage), None)
            stored = given or next((stars[pattern(n)] for n in names if pattern(n) in stars), Storage(whole))
            spec = _fit(item.outs[0].shape, stored.spec, mesh.sizes)
            count(item.name, stored.spec, spec, R)
            storage[item.name] = replace(stored, spec=spec)
            outs.append((spec,))
        elif item.kind == "input":
            assert item.outs[0] is not None
            asked = plan.inputs.get(item.name, whole)
            inputs[item.name] = _fit(item.outs[0].shape, asked, mesh.sizes)
            count(item.name, asked, inputs[item.name], R)
            outs.append((inputs[item.name],))
        else:
            outs.append((whole,) * len(item.outs))
    small = Plan(
        mesh=mesh,
        fingerprint=program.fingerprint,
        choices=choices,
        storage=storage,
        inputs=inputs,
        outputs={s.name: whole for s in program.sinks if s.kind == "output" and s.node is not None},
        optimizer=plan.optimizer,
        saved=saved,
        copies=plan.copies,
        precision=program.precision,
    )
    return Adapted(small, kept, total, tuple(dict.fromkeys(changed)))


def _nearest(
    items: Items,
    item: Item,
    want: _Row,
    offered: Sequence[Choice],
    outs: Sequence[tuple[Spec, ...]],
    sizes: tuple[int, ...],
) -> _Row:
    """The legal row nearest to `want`: as it is, else with other strides, else whole on as few axes as possible."""
    axes = []
    for size, choice in zip(sizes, want):
        others = [c for c in offered if c.factor == choice.factor and c != choice] if choice.factor else []
        axes.append(list(dict.fromkeys([choice, *others, WHOLE])) if size > 1 else [choice])
    rows = sorted(itertools.product(*axes), key=lambda row: sum(c != w for c, w in zip(row, want)))
    return next(row for row in rows if _legal(items, item, row, outs, sizes))


def _legal(items: Items, item: Item, row: _Row, outs: Sequence[tuple[Spec, ...]], sizes: tuple[int, ...]) -> bool:
    rule = items.rule(item)
    try:
        ins, _ = op_specs(rule, row)
    except RuleError:
        return False  # the small op lacks the factor (its size is one)
    for tensor, spec in zip(item.ins, ins):
        made = outs[tensor.item][tensor.index]
        if any(p.kind == "P" and n > 1 and made[a] != p for a, (p, n) in enumerate(zip(spec, sizes))):
            return False
    return op_fits(item, rule, row, sizes)


def _fit(shape: tuple[int, ...], spec: Spec, sizes: tuple[int, ...]) -> Spec:
    """The spec with as few axes as possible made whole so that it divides the shape."""
    options = itertools.product(*[(p, R) if p != R else (R,) for p in spec])
    return next(s for s in sorted(options, key=lambda s: s.count(R)) if valid(shape, s, sizes))
