"""Choosing stages, micro-batches and schedule of a pipeline: the planner for meshes with an axis of stages.

The ranks of a stage run a plan that the planner finds for the program of a micro-batch on the mesh of a stage: the
quickest, or, where memory decides, one that holds less; stages need not run the same. What the plans cost per piece of
the program is what stages are then chosen by (`costmodel.stages`), for every number of micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from autopar.costmodel import planner, stages
from autopar.costmodel.devices import Device, machine
from autopar.costmodel.pieces import Pieces, pieces_of
from autopar.errors import BatchError, InfeasibleError, PlanError, ScheduleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.options import Asked
from autopar.pipeline.checks import check
from autopar.pipeline.clock import Costs, run
from autopar.pipeline.comms import has_comms, with_comms
from autopar.pipeline.cut import cut
from autopar.pipeline.plans import AXIS, OWN, inner, inner_mesh, outer
from autopar.pipeline.table import from_csv, homes
from autopar.plan import Pipeline, Plan, Storage
from autopar.rule import Choice

#: Numbers of micro-batches that are tried, in multiples of the number of ranks in a lane.
_MULTIPLES = (1, 2, 4)
#: Bytes that no plan needs.
UNLIMITED = 1 << 60
#: Plans that hold less are made for so much of a rank's memory, if every stage held as much.
SHARES = (1.0, 0.5)


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
    link = stages.Link(latency=own.latency, bandwidth=own.bandwidth)
    proposals = proposals_of(
        counts, ranks, alone, asked.device, program_of, lambda program: {**options(program), **given}
    )
    if asked.schedule == OWN:
        return _own(asked, proposals[counts[0]], link)
    choice = best_choice(proposals, limit, {"ranks": ranks, "link": link, "schedules": _schedules(asked)})
    best = choice.best
    chosen = proposals[best.micro]
    costs = _costs(best.options, [chosen.chain.gap_bytes(c) for c in best.cuts[1:-1]], link)
    plan = _told(chosen.plan(best, mesh), choice, device.name, limit, costs)
    return replace(plan, solver={**plan.solver, "stages_s": round(time.perf_counter() - began, 3)})


@dataclass(frozen=True)
class Proposal:
    """What stages may be made of, for one size of micro-batch.

    Attributes:
        program: of a micro-batch. plans: of it, on the mesh of a stage; a stage runs what one of them says.
        pieces: of each plan, all with the same beginnings.
        again: makes another plan, for a limit of bytes, and its pieces.
        taken: the first plan is that of another size of micro-batch.
    """

    program: Program
    plans: tuple[Plan, ...]
    pieces: tuple[Pieces, ...]
    again: Callable[[float, Sequence[str]], tuple[Plan, Pieces]]
    taken: bool = False

    @classmethod
    def first(
        cls,
        program: Program,
        micro: int,
        ranks: int,
        device: str | Device,
        options: Mapping[str, Any],
        mesh: Mesh,
        like: Plan | None = None,
    ) -> Proposal:
        """With the plan that is quickest if memory is no matter; or with `like`, of another size, if it is legal."""

        def pieces(plan: Plan, starts: Sequence[str]) -> Pieces:
            return pieces_of(program, plan, device, stages=2 * ranks, micro=micro, starts=starts)

        def again(limit: float, starts: Sequence[str]) -> tuple[Plan, Pieces]:
            plan = planner.plan(program, mesh, **{**options, "memory_limit": limit})
            return plan, pieces(plan, starts)

        known = None if like is None else planner.transfer(program, like, device=device, memory_limit=UNLIMITED)
        if known is not None:
            return cls(program, (known,), (pieces(known, ()),), again, True)
        plan, found = again(UNLIMITED, ())
        return cls(program, (plan,), (found,), again)

    def own(self) -> Proposal:
        """With a plan of its own in place of one that is taken from another size."""
        plan, pieces = self.again(UNLIMITED, self.starts)
        return Proposal(self.program, (plan,), (pieces,), self.again)

    def with_smaller(self, limits: Sequence[float]) -> Proposal:
        """With plans for less memory, as far as there are any and it has none yet."""
        if len(self.plans) > 1:
            return self
        plans, pieces = list(self.plans), list(self.pieces)
        for limit in limits:
            try:
                plan, found = self.again(limit, self.starts)
            except InfeasibleError:
                break
            if (plan.choices, plan.storage) != (plans[-1].choices, plans[-1].storage):
                plans.append(plan)
                pieces.append(found)
        return replace(self, plans=tuple(plans), pieces=tuple(pieces))

    @property
    def starts(self) -> tuple[str, ...]:
        """Addresses at which pieces begin, but for the first."""
        return self.pieces[0].starts

    @property
    def chain(self) -> stages.Chain:
        """The pieces as what stages are cut from."""
        return self.pieces[0].chain if len(self.pieces) == 1 else stages.Alternatives([p.chain for p in self.pieces])

    def plan(self, found: stages.Candidate, mesh: Mesh) -> Plan:
        """The plan of a candidate: every stage as the plan says that it chose."""
        cuts = tuple(self.starts[c - 1] for c in found.cuts[1:-1])
        chosen = [self.plans[k] for k in found.choices]
        made = Pipeline(AXIS, cuts, found.micro, found.schedule)
        return outer(merged(self.program, chosen, cuts), mesh, made)


def proposals_of(
    counts: Sequence[int],
    ranks: int,
    mesh: Mesh,
    device: str | Device,
    program_of: Callable[[int], Program],
    options: Callable[[Program], Mapping[str, Any]],
) -> dict[int, Proposal]:
    """Proposals for all numbers of micro-batches. One is solved, the others take its plan over.

    Args:
        ranks: of the pipeline. mesh: of a stage. program_of: number of micro-batches -> the program of one of them.
        options: of the planner, for a program.
    """
    found: dict[int, Proposal] = {}
    like: Plan | None = None
    for micro in sorted(counts, key=lambda m: (abs(counts.index(m) - len(counts) // 2), m)):
        program = program_of(micro)
        found[micro] = Proposal.first(program, micro, ranks, device, options(program), mesh, like)
        like = like or found[micro].plans[0]
    return {micro: found[micro] for micro in counts}


def best_choice(proposals: dict[int, Proposal], limit: float | None, judged: Mapping[str, Any]) -> stages.Choice:
    """Stages, micro-batches and schedule. What is chosen gets a plan of its own, if it has that of another size.

    judged: of `stages.choose`: ranks, link, schedules.

    Raises:
        As `stages.choose`.
    """
    while True:
        choice = _choice(proposals, limit, judged)
        chosen = proposals[choice.best.micro]
        if not chosen.taken:
            return choice
        proposals[choice.best.micro] = chosen.own()


def _choice(proposals: dict[int, Proposal], limit: float | None, judged: Mapping[str, Any]) -> stages.Choice:
    """The best of what is proposed; where memory decides, `proposals` get plans that hold less."""
    refused: InfeasibleError | None = None
    try:
        choice = stages.choose(chains_of(proposals), limit=limit, **judged)
        if limit is None or not _binds(choice, chains_of(proposals), judged):
            return choice
    except InfeasibleError as error:
        refused = error
    assert limit is not None
    for micro, proposal in proposals.items():
        proposals[micro] = proposal.with_smaller([limit * judged["ranks"] * share for share in SHARES])
    try:
        return stages.choose(chains_of(proposals), limit=limit, **judged)
    except InfeasibleError as error:
        raise error if any(len(p.plans) > 1 for p in proposals.values()) or refused is None else refused from None


def merged(program: Program, plans: Sequence[Plan], starts: Sequence[str]) -> Plan:
    """One plan of the whole program that is in every stage what the stage's plan is."""
    if all(plan is plans[0] for plan in plans):
        return plans[0]
    choices: dict[str, tuple[Choice, ...]] = {}
    storage: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    for stage, plan in zip(cut(program, starts), plans):
        names = {s.name for s in stage.program.sources} | {s.name for s in stage.program.sinks}
        addresses = (n.meta["address"] for n in stage.program.gm.graph.nodes if "address" in n.meta)
        # What several stages have, masks and shared parameters, is as in the first of them.
        choices.update({a: plan.choice(a) for a in addresses if a not in choices})
        for found, given in ((storage, plan.storage), (inputs, plan.inputs), (outputs, plan.outputs)):
            found.update({k: v for k, v in given.items() if k in names and k not in found})
    first = plans[0]
    merged = replace(
        first,
        choices={**first.choices, **choices},
        storage={**first.storage, **storage},
        inputs={**first.inputs, **inputs},
        outputs={**first.outputs, **outputs},
    )
    planner.check_plan(program, merged)
    return merged


def chains_of(proposals: Mapping[int, Proposal]) -> dict[int, stages.Chain]:
    """Number of micro-batches -> what stages are cut from."""
    return {micro: proposal.chain for micro, proposal in proposals.items()}


def _binds(choice: stages.Choice, chains: Mapping[int, stages.Chain], judged: Mapping[str, Any]) -> bool:
    """Whether more memory would make the step quicker."""
    free = stages.choose(chains, limit=None, top=0, **judged)
    return free.bound < choice.best.seconds * (1 - 1e-9)


def _free(options: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's options without a limit: that is a stage's, and the planner sees all stages in one."""
    return {**options, "memory_limit": UNLIMITED}


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


def _own(asked: Asked, proposal: Proposal, link: stages.Link) -> Plan:
    """The plan with the user's own table: it says how many stages there are, and how they are cut is settled here."""
    (plan, *_), chain, starts = proposal.plans, proposal.chain, proposal.starts
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


__all__ = [
    "Proposal", "best_choice", "chains_of", "check_pipeline", "fitting", "merged", "micro_choices",
    "plan_pipeline", "proposals_of",
]  # fmt: skip
