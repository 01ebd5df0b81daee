"""A plan that is given, perhaps edited: whether it is for this program, and legal."""

from __future__ import annotations

from autopar.costmodel import planner
from autopar.errors import PlanError
from autopar.graph import Program
from autopar.options import Asked
from autopar.plan import Plan
from autopar.spec import R, Spec, format_spec


def check_plan(program: Program, plan: Plan) -> None:
    """Raise unless `plan`, perhaps edited, was made for `program` and is legal for it.

    Raises:
        PlanError: says what does not fit.
    """
    if plan.fingerprint != program.fingerprint:
        raise PlanError(
            f"the plan is for another model (fingerprint {plan.fingerprint[:12]}, this one has "
            f"{program.fingerprint[:12]}): other layers, sizes or dtypes, or another mode; plan again for this model"
        )
    planner.check_plan(program, plan)


def check_given(plan: Plan, program: Program, asked: Asked, pieces: dict[str, Spec] | None) -> None:
    """Raise unless a plan is what was asked for, is legal, and takes local batches where `pieces` says that they lie.

    Raises:
        PlanError: says what does not fit.
    """
    if plan.mesh != asked.mesh:
        raise PlanError(
            f"the plan is for mesh {plan.mesh}, the module is compiled for {asked.mesh}; plan again for this mesh"
        )
    check_plan(program, plan)
    whole: Spec = (R,) * len(plan.mesh.sizes)
    for name, spec in (pieces or {}).items():
        given = plan.inputs.get(name, whole)
        if any(g != p for g, p, axis in zip(given, spec, plan.mesh.names) if axis in asked.data_axes):
            raise PlanError(
                f"local batches bring input {name} as {format_spec(spec, 1, plan.mesh.names)}, the plan takes it as "
                f'{format_spec(given, 1, plan.mesh.names)}; make the plan with batch="local", or pass global batches'
            )


__all__ = ["check_given", "check_plan"]
