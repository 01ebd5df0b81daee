"""A plan's pipeline in words: stages, schedule, what else was looked at; and the table in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from rich.console import RenderableType
from rich.table import Table as Columns
from rich.text import Text

from autopar.errors import PlanError, ScheduleError
from autopar.pipeline.clock import Costs, Timeline, run
from autopar.pipeline.plans import OWN
from autopar.pipeline.schedules import schedule
from autopar.pipeline.table import Table, homes
from autopar.pipeline.tables import table_of, timed, with_updates
from autopar.plan import Pipeline, Plan
from autopar.report import kept_text, plain_table, seconds
from autopar.units import bytes_


def costs_of(plan: Plan) -> Costs:
    """Seconds and bytes of the stages, as the planner has priced them.

    Raises:
        PlanError: the plan does not say, or has no pipeline.
    """
    found = plan.solver.get("stage_costs")
    names = {f.name for f in fields(Costs)}
    if plan.pipeline is None or not isinstance(found, Mapping) or not set(found) <= names:
        raise PlanError(
            "the plan has no priced pipeline; make one on a mesh with an axis pp, such as --mesh pp=4,dp=2, with "
            "`autopar plan`"
        )
    if _edited(plan):
        raise PlanError("the stages were edited after the plan was priced, so that its figures are of others")
    return Costs(**{name: tuple(values) for name, values in found.items()})


def _edited(plan: Plan) -> bool:
    """Whether stages, or what they compute again, are others than those that were priced."""
    assert plan.pipeline is not None
    priced = plan.solver.get("priced_starts"), plan.solver.get("priced_saved", {})
    return (list(plan.pipeline.starts), dict(plan.saved)) != priced


def ranks_of(plan: Plan) -> int:
    """Ranks along the axis of a plan that has a pipeline."""
    assert plan.pipeline is not None
    return plan.mesh.sizes[plan.mesh.axis(plan.pipeline.axis)]


def timeline_of(plan: Plan, pipeline: Pipeline | None = None) -> tuple[Table, Timeline]:
    """The table of the plan, or of its stages under another pipeline's schedule, and how it runs.

    Raises:
        ScheduleError: the schedule does not go with so many ranks and micro-batches, or with the plan's stages.
    """
    table = table_of(_chosen(plan, pipeline), ranks_of(plan))
    return table, run(with_updates(table), costs_of(plan))


def step_of(plan: Plan, pipeline: Pipeline | None = None) -> tuple[float, Timeline]:
    """Seconds of a step, and the timeline that they are from: of several steps, if the pipeline is never emptied.

    Raises:
        ScheduleError: as `timeline_of`.
    """
    table, steps = timed(_chosen(plan, pipeline), ranks_of(plan))
    timeline = run(table, costs_of(plan))
    return timeline.makespan / steps, timeline


def _chosen(plan: Plan, pipeline: Pipeline | None) -> Pipeline:
    """The pipeline asked about, if the plan's stages can run it."""
    have, ranks = len(costs_of(plan).forward), ranks_of(plan)
    chosen = pipeline or plan.pipeline
    assert chosen is not None
    if chosen.schedule == OWN:
        return chosen
    refused = schedule(chosen.schedule).allows(ranks, chosen.micro)
    if refused:
        raise ScheduleError(f"schedule {chosen.schedule}: {refused}")
    if ranks * schedule(chosen.schedule).chunks != have:
        raise ScheduleError(
            f"schedule {chosen.schedule} has {ranks * schedule(chosen.schedule).chunks} stages on {ranks} ranks, the "
            f"plan is cut into {have}; plan again with --schedule {chosen.schedule}"
        )
    return chosen


def stages(plan: Plan) -> list[RenderableType]:
    """The pipeline of a plan: a line, a table of stages, and the runners-up."""
    pipeline = plan.pipeline
    if pipeline is None:
        return []
    name = "a table of your own" if pipeline.schedule == OWN else pipeline.schedule
    parts: list[RenderableType] = [
        Text(
            f"pipeline along {pipeline.axis}: {name}, {pipeline.micro} micro-batches, {len(pipeline.starts) + 1} stages"
        )
    ]
    if "stage_costs" not in plan.solver:
        return parts
    if _edited(plan):
        return [*parts, Text("the stages were edited after the plan was priced: figures are of the stages before")]
    costs = costs_of(plan)
    table, timeline = timeline_of(plan)
    home = homes(table)
    columns = plain_table()
    columns.add_column("stage", justify="right")
    columns.add_column("rank", justify="right")
    columns.add_column("begins with", overflow="fold", ratio=1)
    for title in ("forward", "backward", "sends on", "kept per micro-batch", "parameters and state", "peak"):
        columns.add_column(title, justify="right")
    starts = ["the first op", *pipeline.starts]
    for stage, start in enumerate(starts):
        sends = costs.send_forward[stage] if stage < len(starts) - 1 else None
        columns.add_row(
            str(stage), str(home[stage]), start.removeprefix("fwd:"), seconds(costs.forward[stage]),
            seconds(costs.backward[stage]), "-" if sends is None else seconds(sends), bytes_(costs.saved_bytes[stage]),
            bytes_(costs.static_bytes[stage]), bytes_(timeline.stage_peak_bytes[stage]),
        )  # fmt: skip
    parts.append(columns)
    for stage, again in enumerate(plan.solver.get("again", ())):
        text = kept_text(replace(plan, saved=again["saved"]))
        more = f", {seconds(again['seconds'])} of every micro-batch" if again["seconds"] else ""
        parts.append(Text(f"stage {stage}{more}: {text}"))
    told = plan.solver.get("stages", [])
    if isinstance(told, Sequence) and len(told) > 1:
        parts += [Text(f"chosen: {told[0]}"), Text("what else was found:"), *(Text(str(line)) for line in told[1:])]
    return parts


def utilisation(steps: Mapping[str, tuple[float, Timeline]]) -> Columns:
    """Schedules beside each other, as `step_of` has them: seconds, share of the time that ranks compute, memory."""
    columns = plain_table()
    for title in ("schedule", "step", "ranks compute", "least busy rank", "memory of the fullest rank"):
        columns.add_column(title, justify="left" if title == "schedule" else "right")
    for name, (step, timeline) in steps.items():
        busy = timeline.utilisation
        columns.add_row(
            name, seconds(step), f"{100 * sum(busy) / len(busy):.1f} %",
            f"{100 * min(busy):.1f} % (rank {busy.index(min(busy))})", bytes_(max(timeline.peak_bytes, default=0.0)),
        )  # fmt: skip
    return columns


__all__ = ["costs_of", "ranks_of", "stages", "step_of", "timeline_of", "utilisation"]
