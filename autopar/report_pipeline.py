"""A plan's pipeline in words: stages, schedule, what else was looked at; and the table in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from rich.console import RenderableType
from rich.table import Table as Columns
from rich.text import Text

from autopar.errors import PlanError
from autopar.pipeline.clock import Costs, Timeline, run
from autopar.pipeline.plans import OWN
from autopar.pipeline.table import Action, Table, homes
from autopar.pipeline.tables import table_of
from autopar.plan import Pipeline, Plan
from autopar.report import bytes_, plain_table, seconds


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
    return Costs(**{name: tuple(values) for name, values in found.items()})


def ranks_of(plan: Plan) -> int:
    """Ranks along the pipeline's axis."""
    assert plan.pipeline is not None
    return plan.mesh.sizes[plan.mesh.axis(plan.pipeline.axis)]


def timeline_of(plan: Plan, pipeline: Pipeline | None = None) -> tuple[Table, Timeline]:
    """The table of the plan, or of its stages under another pipeline's schedule, and how it runs."""
    costs = costs_of(plan)
    chosen = pipeline or plan.pipeline
    assert chosen is not None
    table = table_of(chosen, ranks_of(plan))
    have = len(costs.forward)
    if len(homes(table)) != have:
        raise PlanError(
            f"schedule {chosen.schedule} has {len(homes(table))} stages on {ranks_of(plan)} ranks, the plan is cut "
            f"into {have}; plan again with --schedule {chosen.schedule}"
        )
    return table, run(_with_updates(table), costs)


def _with_updates(table: Table) -> Table:
    """With the optimizer's step behind every row, as the user's loop has it; an asynchronous table has its own."""
    if any(action.kind == "U" for row in table for action in row):
        return table
    return tuple((*row, *(Action(stage, "U", 0) for stage in sorted({a.stage for a in row}))) for row in table)


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
    told = plan.solver.get("stages", [])
    if isinstance(told, Sequence) and len(told) > 1:
        parts += [Text(f"chosen: {told[0]}"), Text("what else was found:"), *(Text(str(line)) for line in told[1:])]
    return parts


def utilisation(timelines: Mapping[str, Timeline]) -> Columns:
    """Timelines beside each other: seconds, share of the time that ranks compute, memory."""
    columns = plain_table()
    for title in ("schedule", "step", "ranks compute", "least busy rank", "memory of the fullest rank"):
        columns.add_column(title, justify="left" if title == "schedule" else "right")
    for name, timeline in timelines.items():
        busy = timeline.utilisation
        columns.add_row(
            name, seconds(timeline.makespan), f"{100 * sum(busy) / len(busy):.1f} %",
            f"{100 * min(busy):.1f} % (rank {busy.index(min(busy))})", bytes_(max(timeline.peak_bytes, default=0.0)),
        )  # fmt: skip
    return columns


__all__ = ["costs_of", "ranks_of", "stages", "timeline_of", "utilisation"]
