"""Plans with a pipeline: the plan of the mesh without the pipeline's axis, and back.

Along the pipeline's axis nothing is split, so that a plan with it is one without it, with a hole in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from autopar.mesh import Mesh
from autopar.plan import Pipeline, Plan
from autopar.rule import Choice
from autopar.spec import R, Spec

#: Name of the mesh axis along which stages stand, unless a plan says another.
AXIS = "pp"
#: What a schedule of the user's own is called in a plan.
OWN = "table"
#: The mesh of a stage that has one rank.
ALONE = Mesh(("rank",), (1,))
T = TypeVar("T")


def inner_mesh(mesh: Mesh, axis: str) -> Mesh:
    """The mesh of one stage: that without `axis`.

    Raises:
        MeshError: there is no such axis.
    """
    at = mesh.axis(axis)
    names, sizes = _without(mesh.names, at), _without(mesh.sizes, at)
    return Mesh(names, sizes) if names else ALONE


def inner(plan: Plan) -> Plan:
    """The plan on the mesh of one stage; without `pipeline`."""
    assert plan.pipeline is not None
    mesh, at = inner_mesh(plan.mesh, plan.pipeline.axis), plan.mesh.axis(plan.pipeline.axis)

    def spec(found: Spec) -> Spec:
        return _without(found, at) or (R,)

    return replace(
        plan,
        mesh=mesh,
        choices={k: _without(row, at) or (Choice(),) for k, row in plan.choices.items()},
        storage={k: replace(s, spec=spec(s.spec)) for k, s in plan.storage.items()},
        inputs=_each(plan.inputs, spec),
        outputs=_each(plan.outputs, spec),
        pipeline=None,
    )


def outer(plan: Plan, mesh: Mesh, pipeline: Pipeline) -> Plan:
    """Inverse of `inner`: the plan of one stage's mesh as one on `mesh`, with the pipeline."""
    at = mesh.axis(pipeline.axis)
    alone = len(mesh.names) == 1

    def spec(found: Spec) -> Spec:
        return (R,) if alone else (*found[:at], R, *found[at:])

    def row(found: tuple[Choice, ...]) -> tuple[Choice, ...]:
        return (Choice(),) if alone else (*found[:at], Choice(), *found[at:])

    return replace(
        plan,
        mesh=mesh,
        choices={k: row(v) for k, v in plan.choices.items()},
        storage={k: replace(s, spec=spec(s.spec)) for k, s in plan.storage.items()},
        inputs=_each(plan.inputs, spec),
        outputs=_each(plan.outputs, spec),
        pipeline=pipeline,
    )


def _without(row: tuple[T, ...], at: int) -> tuple[T, ...]:
    return row[:at] + row[at + 1 :]


def _each(specs: Mapping[str, Spec], change: Callable[[Spec], Spec]) -> dict[str, Spec]:
    return {k: change(s) for k, s in specs.items()}


__all__ = ["ALONE", "AXIS", "OWN", "inner", "inner_mesh", "outer"]
