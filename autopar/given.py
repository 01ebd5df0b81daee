"""A plan that the user gives, perhaps edited: whether it is for what is compiled."""

from __future__ import annotations

from dataclasses import replace

from autopar.costmodel import planner
from autopar.errors import PlanError
from autopar.graph import Program
from autopar.options import Asked
from autopar.plan import Plan
from autopar.precision import AUTO, Precision
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
    """Raise unless a plan fits what is compiled, whose local batches come in `pieces`.

    Raises:
        PlanError: it is for another mesh or model, not legal, or takes inputs otherwise than local batches bring them.
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


def decisions(plan: Plan) -> str:
    """What of a plan changes graphs, and plans to come; seconds and notes differ where every rank plans by itself."""
    return replace(plan, predicted={}, solver={}, target={}, notes=()).to_json()


def precision_of(plan: Plan, compute: str | None, reduce: str | None) -> Precision:
    """The precision of a given plan, where `compute` and `reduce` are asked for (None: anything, as "auto").

    Raises:
        PlanError: it is another one.
    """
    own = plan.computes
    for option, asked, planned in (("precision", compute, own.compute), ("reduce_dtype", reduce, own.reduce)):
        if option == "reduce_dtype" and compute == AUTO and own.dtype is None:
            continue  # it was said for the low precision, which was not the quicker one
        if asked not in (None, AUTO, planned):
            raise PlanError(
                f"{option}={asked} is asked for, and the plan was made for {planned}; leave it out, or plan again"
            )
    return own


__all__ = ["check_given", "check_plan", "decisions", "precision_of"]
