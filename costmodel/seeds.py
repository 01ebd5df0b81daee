"""What an expert would do, as starting points: data parallel with ZeRO outside, tensor parallel inside.

A search that goes axis by axis can end in a corner that a joint decision would leave. Plans by strategy (see
`costmodel.constraints`) are joint decisions, and cheap: with every op pinned, a solve takes no time. They are
candidates themselves, and show how much of the late communication a step can hide.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.costmodel.choices import Pins
from autopar.costmodel.constraints import Wishes, pin
from autopar.costmodel.fold import Fold
from autopar.errors import ConstraintError
from autopar.mesh import Mesh
from autopar.rule import Choice

#: What the axes do from the outermost to the innermost; shorter meshes take the end of a row.
EXPERTS = (
    ("zero3", "zero3", "tp_sp"),
    ("zero2", "zero2", "tp_sp"),
    ("zero2", "zero2", "tp"),
    ("zero3", "zero3", "zero3"),
    ("zero2", "zero2", "zero2"),
    ("ddp", "ddp", "ddp"),
    ("ddp", "ddp", "tp_sp"),
    ("zero2", "tp_sp", "zero2"),
)
_ONE = (("zero3",), ("zero2",), ("ddp",), ("tp_sp",), ("tp",))


def strategies(mesh: Mesh, taken: Wishes) -> list[dict[int, str]]:
    """Axis -> strategy, for the axes that are longer than one and that the user leaves free."""
    free = [a for a, n in enumerate(mesh.sizes) if n > 1 and a not in taken.strategies]
    rows = _ONE if len(free) == 1 else EXPERTS
    return [dict(zip(free, row[-len(free) :])) for row in rows] if free else []


def pinned(
    rows: list[dict[int, str]], wishes: Wishes, fold: Fold, offered: list[tuple[Choice, ...]], own: Pins
) -> list[Pins]:
    """Pins of every row of strategies that the program allows, under those of the user.

    wishes: with `marks` and `contractions`. May add to `offered` the batch splits that a strategy asks for.
    """
    out = []
    for row in rows:
        expert = replace(wishes, strategies={**row, **wishes.strategies}, stored=[], ops=[])
        try:
            expert.check(fold.items)
            found = pin(expert, fold, offered)
        except ConstraintError:  # a batch that the axes do not divide: nothing to start from
            continue
        out.append(
            Pins(
                {**found.choices, **own.choices},
                {**found.storage, **own.storage},
                {**found.gather, **own.gather},
                {**found.reduce, **own.reduce},
                {**found.why, **own.why},
            )
        )
    return out


__all__ = ["EXPERTS", "pinned", "strategies"]
