"""Parts of a plan that do not go together, whoever has written it."""

from __future__ import annotations

from autopar.compression import Compression
from autopar.errors import PlanError
from autopar.pipeline.schedules import SCHEDULES
from autopar.plan import Plan
from autopar.precision import SCALED


def check_together(plan: Plan) -> None:
    """Raise unless the parts of a plan go together.

    Raises:
        PlanError: two that do not; says why, and which to leave out.
    """
    pipeline, compute = plan.pipeline, plan.computes.compute
    known = None if pipeline is None else SCHEDULES.get(pipeline.schedule)
    found = Compression.parse(plan.compression)
    powersgd, scaled = found is not None and found.rank > 0, compute in SCALED
    hosted = next(iter(plan.on_host), None)
    if powersgd and scaled:
        raise PlanError(
            f"the plan compresses gradients by {plan.compression} and computes in {compute}: what PowerSGD has left "
            "out would be of another scale than the next gradient; plan in bf16, which needs no scaling"
        )
    if hosted is not None and scaled:
        raise PlanError(
            f"the plan has the gradient of {hosted} on the host and computes in {compute}, whose gradients are scaled "
            "until all are known to be finite; plan again with host_state=False, or in bf16"
        )
    if hosted is not None and powersgd:
        raise PlanError(
            f"the plan has the gradient of {hosted} on the host and compresses gradients by {plan.compression}, which "
            "is done on the device behind the backward; leave one out"
        )
    if pipeline is None:
        return
    if known is not None and known.asynchronous and scaled:
        raise PlanError(
            f"the plan computes in {compute} with schedule {pipeline.schedule!r}: a stage steps with gradients before "
            "others know whether theirs overflowed, so the loss cannot be scaled; plan in bf16, which needs no scaling"
        )
    if hosted is not None:
        raise PlanError(
            f"the plan keeps the optimizer state of {hosted} on the host, which pipelines cannot do yet; take \"host\" "
            "out of its storage, or plan again"
        )
    if found is not None:
        raise PlanError(
            f"the plan compresses gradients by {plan.compression}, which pipelines cannot do yet; leave it out"
        )


__all__ = ["check_together"]
