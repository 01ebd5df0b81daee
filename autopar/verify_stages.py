"""The pipeline of a plan, for the small model that proves it: as many stages, of fewer layers.

Micro-batches, schedule and the decisions inside stages are those of the plan where the small model allows. Stages begin
where the plan says if the small model has these places, else so that they are level.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.costmodel.adapt import Adapted, adapt
from autopar.costmodel.pieces import pieces_of
from autopar.errors import PlanError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.pipeline.plans import OWN, inner, inner_mesh, outer
from autopar.pipeline.schedules import schedule
from autopar.pipeline.table import homes
from autopar.pipeline.tables import micro_of, read
from autopar.plan import Pipeline, Plan
from autopar.stage_search import balanced


def stages_on(pipeline: Pipeline, plan: Plan, mesh: Mesh) -> int:
    """Number of stages on the small mesh.

    Raises:
        PlanError: the pipeline has a table of its own, for more ranks than the small mesh has; or it steps the
            optimizer on its way, so that it is equal to one device only up to staleness.
    """
    ranks, full = (m.sizes[m.axis(pipeline.axis)] for m in (mesh, plan.mesh))
    if pipeline.schedule == OWN:
        if ranks != full:
            raise PlanError(
                f"the plan has a table of its own for {full} ranks along {pipeline.axis}, and only {ranks} of them run "
                f"here; allow more processes: --procs {mesh.num_devices // ranks * full}"
            )
        return len(homes(read(pipeline.table)))
    if schedule(pipeline.schedule).asynchronous:
        raise PlanError(
            f"schedule {pipeline.schedule} steps the optimizer on its way, so that weights are stale by design and no "
            "plan of it equals one device; to prove the stages, plan with schedule 1f1b and verify that"
        )
    return ranks * schedule(pipeline.schedule).chunks


def micro_on(pipeline: Pipeline, ranks: int, rows: int) -> int:
    """Number of micro-batches of `rows`: the plan's, or the nearest below that divides them and the schedule allows.

    Raises:
        PlanError: none is.
    """
    if pipeline.schedule == OWN:
        wanted = [micro_of(read(pipeline.table))]
    else:
        refuses = schedule(pipeline.schedule).allows
        wanted = [m for m in range(min(pipeline.micro, rows), 0, -1) if not refuses(ranks, m)]
        wanted += [m for m in range(pipeline.micro + 1, rows + 1) if not refuses(ranks, m)]
    found = next((m for m in wanted if rows % m == 0), None)
    if found is None:
        raise PlanError(
            f"a batch of {rows} rows cannot be divided as schedule {pipeline.schedule} on {ranks} ranks wants it; plan "
            "with a larger --batch"
        )
    return found


def adapt_stages(program: Program, plan: Plan, mesh: Mesh, stages: int, micro: int) -> Adapted:
    """As `adapt`, for a plan with a pipeline and the program of one of `micro` micro-batches."""
    pipeline = plan.pipeline
    assert pipeline is not None
    small = adapt(program, inner(plan), inner_mesh(mesh, pipeline.axis))
    addresses = {n.meta["address"] for n in program.gm.graph.nodes if "address" in n.meta}
    starts = pipeline.starts
    if len(starts) != stages - 1 or not addresses.issuperset(starts):
        pieces = pieces_of(program, small.plan, "cpu", stages=2 * stages, micro=micro)
        if pieces.chain.pieces < stages:
            raise PlanError(
                f"the small model can be cut into {pieces.chain.pieces} stages at most, the plan has {stages} on "
                f"{mesh}; verify with fewer processes (--procs)"
            )
        work = [pieces.chain.options(i, i + 1)[0].work for i in range(pieces.chain.pieces)]
        starts = tuple(pieces.starts[c - 1] for c in balanced(work, stages))
    made = Pipeline(pipeline.axis, starts, micro, pipeline.schedule, pipeline.table)
    moved = starts != pipeline.starts
    return replace(
        small,
        plan=outer(small.plan, mesh, made),
        kept=small.kept + (not moved),
        total=small.total + 1,
        changed=(*small.changed, *(["where stages begin"] if moved else [])),
    )


__all__ = ["adapt_stages", "micro_on", "stages_on"]
