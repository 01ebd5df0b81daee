"""Choosing stages, micro-batches and schedule of a pipeline: the planner for meshes with an axis of stages.

The ranks of a stage run one plan, found by the planner for the program of a micro-batch on the mesh of a stage. Its
prices per piece of the program are what the stages are then chosen by (`costmodel.stages`), for every number of
micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from typing import Any

from autopar.costmodel import planner, stages
from autopar.costmodel.devices import machine
from autopar.costmodel.pieces import pieces_of
from autopar.errors import BatchError, InfeasibleError, PlanError, ScheduleError
from autopar.graph import Program
from autopar.options import Asked
from autopar.pipeline.checks import check
from autopar.pipeline.clock import Costs, run
from autopar.pipeline.comms import has_comms, with_comms
from autopar.pipeline.plans import AXIS, OWN, inner, inner_mesh, outer
from autopar.pipeline.table import from_csv, homes
from autopar.plan import Pipeline, Plan, Storage

#: Numbers of micro-batches that are tried, in multiples of the number of ranks in a lane.
_MULTIPLES = (1, 2, 4)


def micro_choices(rows: int, ranks: int, asked: Asked) -> list[int]:
    """Numbers of micro-batches that a batch of `rows` may have, for `ranks` in a lane.

    Raises:
        BatchError: the batch cannot be divided as asked.
    """
    wanted = asked.micro_batches
    if asked.schedule == OWN:
        table = from_csv(asked.table)
        count = 1 + max((a.index for row in table for a in row if a.kind == "F"), default=-1)
        if wanted is not None and wanted != count:
            raise ScheduleError(f"micro_batches={wanted}, and the table of schedule= has {count}; leave out one")
        wanted = count
    if wanted is not None:
        if rows % wanted:
            raise BatchError(
                f"a batch of {rows} rows cannot be divided into {wanted} micro-batches; pass batches of a multiple of "
                f"{wanted} rows, or micro_batches={_near(rows, wanted)}"
            )
        return [wanted]
    if rows < 1:
        raise BatchError("a pipeline divides the batch, and no argument is one; pass tensors with the batch in dim 0")
    found = [ranks * k for k in _MULTIPLES if rows % (ranks * k) == 0]
    return found or [max(m for m in range(1, 4 * ranks + 1) if rows % m == 0)]


def fitting(rows: int, micro: int) -> int:
    """The number of micro-batches for another batch than was planned for: the planned one, or the next that divides."""
    return _near(rows, micro)


def _near(rows: int, micro: int) -> int:
    return max(m for m in range(1, min(micro, max(rows, 1)) + 1) if rows % m == 0)


def plan_pipeline(
    program_of: Callable[[int], Program],
    rows: int,
    asked: Asked,
    options: Callable[[Program], Mapping[str, Any]],
    storage: Mapping[str, Storage] | None = None,
    pipeline: Pipeline | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Plan:
    """The plan of a batch of `rows` on `asked.mesh`.

    Args:
        program_of: number of micro-batches -> the program of one of them.
        options: of the planner, for a program.
        storage: where parameters lie already. pipeline: stages and schedule that are decided already.

    Raises:
        BatchError, ScheduleError: the batch, or the schedule, does not go with the mesh. Others: as the planner.
    """
    mesh, ranks = asked.mesh, asked.mesh.sizes[asked.mesh.axis(AXIS)]
    counts = [pipeline.micro] if pipeline is not None else micro_choices(rows, ranks, asked)
    began = time.perf_counter()
    alone = inner_mesh(mesh, AXIS)
    given: dict[str, Any] = {"storage": storage, "progress": progress}
    if pipeline is not None:
        program = program_of(pipeline.micro)
        return outer(planner.plan(program, alone, **_free(options(program)), **given), mesh, pipeline)
    where = machine(asked.device, mesh)
    device, own = where.device, where.links[mesh.axis(AXIS)]
    limit = asked.memory_limit if asked.memory_limit is not None else device.memory and device.memory * planner.USABLE
    best: tuple[float, Plan] | None = None
    starts: dict[int, tuple[str, ...]] = {}
    refused: Exception | None = None
    # What the ranks of a stage do is planned for all stages alike: as if there were no limit, and for less and less
    # memory, for what is most in the first stage may be least in the last.
    for share in (None,) if limit is None else (None, 1.0, 0.5):
        chains: dict[int, stages.Additive] = {}
        plans: dict[int, Plan] = {}
        try:
            for micro in counts:
                program = program_of(micro)
                wanted = {**_free(options(program)), **given}
                if share is not None:
                    assert limit is not None
                    wanted["memory_limit"] = limit * ranks * share
                plans[micro] = planner.plan(program, alone, **wanted)
                pieces = pieces_of(
                    program, plans[micro], asked.device, stages=2 * ranks, micro=micro, starts=starts.get(micro, ())
                )
                chains[micro], starts[micro] = pieces.chain, pieces.starts
            link = stages.Link(latency=own.latency, bandwidth=own.bandwidth)
            if asked.schedule == OWN:
                return _own(asked, plans[counts[0]], chains[counts[0]], starts[counts[0]], link)
            choice = stages.choose(chains, ranks=ranks, link=link, limit=limit, schedules=_schedules(asked))
        except InfeasibleError as error:
            refused = refused or error
            continue
        found = choice.best
        if best is None or found.seconds < best[0]:
            cuts = tuple(starts[found.micro][c - 1] for c in found.cuts[1:-1])
            made = Pipeline(AXIS, cuts, found.micro, found.schedule)
            costs = _costs(found.options, [chains[found.micro].gap_bytes(c) for c in found.cuts[1:-1]], link)
            best = found.seconds, _told(outer(plans[found.micro], mesh, made), choice, device.name, limit, costs)
    if best is None:
        assert refused is not None
        raise refused
    plan = best[1]
    return replace(plan, solver={**plan.solver, "stages_s": round(time.perf_counter() - began, 3)})


def _free(options: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's options without a limit: that is a stage's, and the planner sees all stages in one."""
    return {**options, "memory_limit": 1 << 60}


def _costs(options: Sequence[stages.Option], gaps: Sequence[tuple[float, float]], link: stages.Link) -> Costs:
    """What the clock is given for stages in these options, with these bytes between them."""
    return Costs(
        forward=[o.forward for o in options],
        input_grad=[o.input_grad for o in options],
        weight_grad=[o.weight_grad for o in options],
        update=[o.update for o in options],
        send_forward=[link.seconds(a) for a, _ in gaps],
        send_backward=[link.seconds(b) for _, b in gaps],
        saved_bytes=[o.saved_bytes for o in options],
        pending_bytes=[o.pending_bytes for o in options],
        transient_bytes=[o.transient_bytes for o in options],
        static_bytes=[o.static_bytes for o in options],
    )


def _told(
    plan: Plan, choice: stages.Choice, device: str, limit: float | None, costs: Costs
) -> Plan:
    """The plan with what is predicted of the pipeline, and what it was chosen from."""
    best = choice.best
    predicted: dict[str, Any] = {
        "step_s": best.seconds,
        "peak_bytes": max(best.peak_bytes),
        "device": device,
        "collectives": {},
        "memory": {},
    }
    if limit is not None:
        predicted["memory_limit"] = round(limit)
    solver = {
        **plan.solver,
        "status": choice.status,
        "gap": choice.gap,
        "stages": str(choice).splitlines(),
        "stage_costs": asdict(costs),
    }
    return replace(plan, predicted=predicted, solver=solver)


def _own(asked: Asked, plan: Plan, chain: stages.Additive, starts: Sequence[str], link: stages.Link) -> Plan:
    """The plan with the user's own table: it says how many stages there are, and how they are cut is settled here."""
    table = from_csv(asked.table)
    home = homes(table)
    check(table)
    ranks = asked.mesh.sizes[asked.mesh.axis(AXIS)]
    if len(table) != ranks:
        raise ScheduleError(
            f"the table of schedule= has rows for {len(table)} ranks, axis {AXIS} of mesh {asked.mesh} has {ranks}; "
            "give each rank one row"
        )
    if len(home) > chain.pieces:
        raise ScheduleError(
            f"the table of schedule= has {len(home)} stages, the model can be cut into {chain.pieces} at most"
        )
    cuts = balanced([chain.options(i, i + 1)[0].work for i in range(chain.pieces)], len(home))
    options = [chain.options(a, b)[0] for a, b in pairwise([0, *cuts, chain.pieces])]
    gaps = [chain.gap_bytes(c) for c in cuts]
    costs = _costs(options, gaps, link)
    timeline = run(table if has_comms(table) else with_comms(table), costs)
    micro = 1 + max(a.index for row in table for a in row if a.kind == "F")
    made = Pipeline(AXIS, tuple(starts[c - 1] for c in cuts), micro, OWN, asked.table)
    predicted: dict[str, Any] = {
        "step_s": timeline.makespan, "peak_bytes": max(timeline.peak_bytes), "collectives": {}, "memory": {},
    }  # fmt: skip
    solver = {**plan.solver, "stage_costs": asdict(costs)}
    return replace(outer(plan, asked.mesh, made), predicted=predicted, solver=solver)


def balanced(work: Sequence[float], stages: int) -> list[int]:
    """Where to cut pieces of so much work so that the most of a stage is least: the first pieces of stages 1, 2, ..."""
    total = [0.0, *accumulate(work)]
    best = {(0, 0): (0.0, 0)}
    for count in range(1, stages + 1):
        for end in range(count, len(work) - (stages - count) + 1):
            best[count, end] = min(
                (max(best[count - 1, start][0], total[end] - total[start]), start)
                for start in range(count - 1, end)
                if (count - 1, start) in best
            )
    cuts, end = [], len(work)
    for count in range(stages, 0, -1):
        end = best[count, end][1]
        cuts.append(end)
    return cuts[::-1][1:]


def _schedules(asked: Asked) -> tuple[str, ...]:
    if asked.schedule is None:
        return stages.SYNCHRONOUS
    return (asked.schedule,)


def check_pipeline(plan: Plan, program_of: Callable[[int], Program], rows: int, asked: Asked) -> Plan:
    """A given plan for a batch of `rows`, with as many micro-batches as go.

    Raises:
        PlanError: it is for another model or mesh, has no pipeline, or is not legal.
    """
    if plan.pipeline is None:
        raise PlanError(f"mesh {asked.mesh} has an axis of pipeline stages, {AXIS}, and the plan has none; plan again")
    if plan.mesh != asked.mesh:
        raise PlanError(f"the plan is for mesh {plan.mesh}, the module is compiled for {asked.mesh}; plan for that")
    plan = replace(plan, pipeline=replace(plan.pipeline, micro=fitting(rows, plan.pipeline.micro)))
    assert plan.pipeline is not None
    program = program_of(plan.pipeline.micro)
    if plan.fingerprint != program.fingerprint:
        raise PlanError(
            f"the plan is for another model or micro-batch (fingerprint {plan.fingerprint[:12]}, this one has "
            f"{program.fingerprint[:12]}); plan again"
        )
    planner.check_plan(program, inner(plan))
    return plan


__all__ = ["check_pipeline", "fitting", "micro_choices", "plan_pipeline"]
