"""Choosing stages, micro-batches and schedule of a pipeline: the planner for meshes with an axis of stages.

What stages may be made of is proposed (`proposals`) for several numbers of micro-batches, and stages are chosen from
that (`costmodel.stages`). Where stages, or the table, are decided already, what is left is planned and priced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from autopar.costmodel import planner, stages
from autopar.costmodel.devices import Device, machine, part
from autopar.costmodel.pieces import Pieces, pieces_of
from autopar.costmodel.remat_levels import levels
from autopar.costmodel.stage_fit import Means
from autopar.costmodel.stage_memory import Held, held
from autopar.costmodel.stages_answer import size
from autopar.errors import BatchError, CaptureError, InfeasibleError, PlanError, ScheduleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.options import Asked
from autopar.pipeline.clock import Costs, run
from autopar.pipeline.cut import Stage, cut
from autopar.pipeline.plans import AXIS, OWN, inner, inner_mesh, outer
from autopar.pipeline.schedules import SCHEDULES
from autopar.pipeline.table import homes
from autopar.pipeline.tables import micro_of, read, timed
from autopar.plan import Pipeline, Plan, Storage
from autopar.proposals import best_choice, proposals_of
from autopar.recompute import RECOMPUTE, present
from autopar.stage_bytes import by_stage
from autopar.together import check_together
from autopar.units import UNLIMITED

#: Numbers of micro-batches that are tried, in multiples of the number of ranks in a lane; where nothing fits the limit,
#: more.
_MULTIPLES = (1, 2, 4, 8)


def micro_choices(rows: int, ranks: int, asked: Asked) -> list[int]:
    """Numbers of micro-batches that a batch of `rows` may have, for `ranks` in a lane, increasing.

    Raises:
        BatchError: the batch cannot be divided as asked.
    """
    wanted = micro_of(read(asked.table)) if asked.schedule == OWN else asked.micro_batches
    if wanted is not None:
        if rows % wanted:
            raise BatchError(
                f"a batch of {rows} rows cannot be divided into {wanted} micro-batches; pass batches of a multiple of "
                f"{wanted} rows, or micro_batches={fitting(rows, wanted)}"
            )
        return [wanted]
    if rows < 1:
        raise BatchError("a pipeline divides the batch, and no argument is one; pass tensors with the batch in dim 0")
    return sorted({fitting(rows, ranks * k) for k in _MULTIPLES})


def more_choices(rows: int, counts: Sequence[int], asked: Asked) -> list[int]:
    """Numbers beyond `counts`: twice as many micro-batches, as near as goes, and so on to one row each."""
    found: list[int] = []
    wanted = max(counts)
    while asked.micro_batches is None and asked.schedule != OWN and wanted < rows:
        wanted *= 2
        more = fitting(rows, wanted)
        if more > max(counts) and more not in found:
            found.append(more)
    return found


def fitting(rows: int, micro: int) -> int:
    """The number of micro-batches for a batch of `rows`: `micro`, or the next below that divides it."""
    return max(m for m in range(1, min(micro, max(rows, 1)) + 1) if rows % m == 0)


@dataclass(frozen=True)
class Place:
    """Where a pipeline stands.

    Attributes:
        mesh: the whole. alone: of a stage. ranks: in a lane. device: as the ranks of a stage see it.
        link: between neighbouring ranks of a lane. limit: bytes of a rank; None for no limit.
        copies: of its parameters that a rank keeps besides.
    """

    mesh: Mesh
    alone: Mesh
    ranks: int
    device: Device
    link: stages.Link
    limit: float | None
    copies: int

    @classmethod
    def of(cls, mesh: Mesh, device: str | Device, limit: float | None, copies: int = 0) -> Place:
        """On a mesh of these devices; limit: None for what the planner may fill of a device."""
        alone, at = inner_mesh(mesh, AXIS), mesh.axis(AXIS)
        where = machine(device, mesh)
        limit = limit if limit is not None else where.device.memory and where.device.memory * planner.USABLE
        link = stages.Link(latency=where.links[at].latency, bandwidth=where.links[at].bandwidth)
        return cls(mesh, alone, mesh.sizes[at], part(device, mesh, alone), link, limit, copies)

    @property
    def judged(self) -> dict[str, Any]:
        """What `stages.choose` is told of it."""
        return {"ranks": self.ranks, "link": self.link}

    def means(self, again: bool, away: bool = False) -> Means:
        """By what a limit may be met: by computing again, and by what waits on the host."""

        made: dict[tuple[int, tuple[str, ...]], list[Stage]] = {}

        def holds(program: Program, plan: Plan, starts: Sequence[str], micro: int) -> list[Held]:
            key = id(program), tuple(starts)
            if key not in made:
                made[key] = cut(program, starts)
            return held(program, plan, made[key], micro, machine(self.device, self.alone).device, self.copies)

        def less(program: Program, plan: Plan, parts: Sequence[float]) -> list[dict[str, str]]:
            return levels(program, plan, self.device, parts, again, away)

        return Means(holds, less if again or away else None)

    def pieces(self, program: Program, plan: Plan, micro: int, starts: Sequence[str] = ()) -> Pieces:
        """As `costmodel.pieces.pieces_of`."""
        return pieces_of(
            program, plan, self.device, stages=2 * self.ranks, micro=micro, starts=starts, copies=self.copies
        )


def plan_pipeline(
    program_of: Callable[[int], Program],
    rows: int,
    asked: Asked,
    options: Callable[[Program], Mapping[str, Any]],
    storage: Mapping[str, Storage] | None = None,
    pipeline: Pipeline | None = None,
    saved: Mapping[str, str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Plan:
    """The plan of a batch of `rows` on `asked.mesh`.

    Args:
        program_of: number of micro-batches -> the program of one of them.
        options: of the planner, for a program.
        storage: where parameters lie already. pipeline: stages and schedule that are decided already.
        saved: and, with these, what is computed again.

    Raises:
        BatchError, ScheduleError: the batch, or the schedule, does not go with the mesh.
        InfeasibleError: it does not fit the limit; says by how much. Others: as the planner.
    """
    began = time.perf_counter()
    copies = asked.weight_copies(asked.mesh.sizes[asked.mesh.axis(AXIS)])
    place = Place.of(asked.mesh, asked.device, asked.memory_limit, copies)

    def wishes(program: Program) -> dict[str, Any]:
        return {**options(program), "device": place.device, "storage": storage, "progress": progress}

    if pipeline is not None:
        program = program_of(pipeline.micro)
        plan = planner.plan(program, place.alone, **{**wishes(program), "memory_limit": UNLIMITED})
        if program.training and saved:
            plan = replace(plan, saved=present(program, saved))
        return _decided(program, plan, pipeline, place)
    counts = micro_choices(rows, place.ranks, asked)
    proposals = proposals_of(counts, place.alone, place.pieces, program_of, wishes)
    if asked.schedule == OWN:
        (proposal,) = proposals.values()
        cuts = _own_cuts(asked, proposal.chain)
        made = Pipeline(AXIS, tuple(proposal.starts[c - 1] for c in cuts), counts[0], OWN, asked.table)
        return _decided(proposal.program, proposal.plans[0], made, place)
    judged = {**place.judged, "schedules": _schedules(asked)}
    more = more_choices(rows, counts, asked)
    while True:
        try:
            choice = best_choice(proposals, place.limit, judged, place.means(_may_repeat(asked), asked.offload))
            break
        except InfeasibleError as error:
            if not more:
                raise by_stage(error, proposals, place.device.slack, place.mesh) from None
            like = next(iter(proposals.values())).plans[0]
            try:
                proposals.update(proposals_of([more.pop(0)], place.alone, place.pieces, program_of, wishes, like))
            except CaptureError:  # the model takes no micro-batches that small
                more.clear()
    best = choice.best
    chosen = proposals[best.micro]
    costs = _costs(best.options, [chosen.chain.gap_bytes(c) for c in best.cuts[1:-1]], place.link)
    plan = _told(chosen.plan(best, place.mesh), best.seconds, max(best.peak_bytes), costs, place)
    solver = {
        "status": choice.status,
        "gap": choice.gap,
        "stages": str(choice).splitlines(),
        "stages_s": round(time.perf_counter() - began, 3),
        **({"again": repeated} if (repeated := chosen.repeated(best)) else {}),
    }
    return replace(plan, solver={**plan.solver, **solver})


def _decided(program: Program, plan: Plan, pipeline: Pipeline, place: Place) -> Plan:
    """A plan of the ranks of a stage with stages and a table that are settled: priced, if it fits.

    Raises:
        InfeasibleError: a rank would hold more than the limit.
    """
    pieces = place.pieces(program, plan, pipeline.micro, pipeline.starts)
    chain, cuts = pieces.chain, [pieces.starts.index(start) + 1 for start in pipeline.starts]
    found = [chain.options(a, b)[0] for a, b in pairwise([0, *cuts, chain.pieces])]
    gaps = [chain.gap_bytes(c) for c in cuts]
    table, steps = timed(pipeline, place.ranks, program.training)
    costs = _costs(found, gaps, place.link)
    timeline = run(table, costs)
    if place.limit is not None and max(timeline.peak_bytes) > place.limit:  # what adds up may be too much
        bytes_ = place.means(False).held(program, plan, pipeline.starts, pipeline.micro)
        costs = _costs([h.into(o) for h, o in zip(bytes_, found)], gaps, place.link)
        timeline = run(table, costs)
    peak = max(timeline.peak_bytes)
    if place.limit is not None and peak > place.limit:
        rank = timeline.peak_bytes.index(peak)
        raise InfeasibleError(
            f"with {pipeline.micro} micro-batches under {pipeline.schedule}, rank {rank} needs "
            f"{size(peak)}, {size(peak - place.limit)} more than the limit of {size(place.limit)}; "
            f"pass smaller batches, more micro-batches (micro_batches=), or a limit of at least {round(peak)} bytes",
            math.ceil(peak),
            limit=place.limit,
            step_s=timeline.makespan / steps,
            mesh=str(place.mesh),
        )
    return _told(outer(plan, place.mesh, pipeline), timeline.makespan / steps, peak, costs, place)


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


def _told(plan: Plan, seconds: float, peak: float, costs: Costs, place: Place) -> Plan:
    """The plan with what is predicted of the pipeline."""
    assert plan.pipeline is not None
    predicted: dict[str, Any] = {
        "step_s": seconds, "peak_bytes": peak, "device": place.device.name, "collectives": {}, "memory": {},
    }  # fmt: skip
    if place.limit is not None:
        predicted["memory_limit"] = round(place.limit)
    solver = {**plan.solver, "stage_costs": asdict(costs), "priced_starts": list(plan.pipeline.starts)}
    if plan.saved:
        solver["priced_saved"] = dict(plan.saved)
    return replace(plan, predicted=predicted, solver=solver)


def _own_cuts(asked: Asked, chain: stages.Chain) -> list[int]:
    """Where the stages of the user's own table begin: as level as goes."""
    count = len(homes(read(asked.table)))
    if count > chain.pieces:
        raise ScheduleError(
            f"the table of schedule= has {count} stages, the model can be cut into {chain.pieces} at most"
        )
    return balanced([chain.options(i, i + 1)[0].work for i in range(chain.pieces)], count)


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


def _may_repeat(asked: Asked) -> bool:
    """Whether a backward finds the weights of its forward, so that it may compute again what that has not kept."""
    known = SCHEDULES.get(asked.schedule or "")
    return asked.recompute and (known is None or not known.asynchronous or asked.weights == "stashed")


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
    own = plan.pipeline
    pairs = ("schedule", asked.schedule, own.schedule), ("micro_batches", asked.micro_batches, own.micro)
    for name, wanted, has in pairs:
        if wanted is not None and wanted != has:
            raise PlanError(
                f"{name}={wanted} is asked for, and the plan was made with {name}={has}; leave it out, or plan again"
            )
    plan = replace(plan, pipeline=replace(plan.pipeline, micro=fitting(rows, plan.pipeline.micro)))
    assert plan.pipeline is not None
    program = program_of(plan.pipeline.micro)
    if plan.fingerprint != program.fingerprint:
        raise PlanError(
            f"the plan is for another model or micro-batch (fingerprint {plan.fingerprint[:12]}, this one has "
            f"{program.fingerprint[:12]}); plan again"
        )
    check_together(plan)
    planner.check_plan(program, inner(plan))
    known = SCHEDULES.get(plan.pipeline.schedule)
    again = next((address for address, how in plan.saved.items() if how == RECOMPUTE), None)
    if again is not None and known is not None and known.asynchronous and asked.weights != "stashed":
        raise PlanError(
            f"the plan computes {again} again in the backward, and with {plan.pipeline.schedule} the "
            "weights may have changed since the forward: its results would be others than those that the gradients "
            'are for; pass weights="stashed", or take "saved" out of the plan'
        )
    return plan


__all__ = ["Place", "balanced", "check_pipeline", "fitting", "micro_choices", "more_choices", "plan_pipeline"]
