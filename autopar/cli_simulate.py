"""`autopar simulate`: the pipeline of a plan in time, as a table, a grid, a picture, or a trace for Perfetto."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from autopar import cli_memory, report_pipeline
from autopar.cli_tools import emit, emit_json
from autopar.errors import PlanError, ScheduleError
from autopar.pipeline import draw
from autopar.pipeline.clock import Timeline
from autopar.pipeline.schedules import SCHEDULES
from autopar.pipeline.table import grid, to_csv
from autopar.plan import Plan


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "simulate",
        help="the pipeline of a plan in time: utilisation, a picture, a trace",
        description="Runs the schedule of a plan with a pipeline (a mesh with an axis pp) against the clock: seconds,\n"
        "how busy every rank is, and what it holds. --schedule adds others, with the same stages.\n"
        "--memory shows instead what ranks hold over a step; for that, the plan needs no pipeline.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", type=Path, metavar="PLAN.json", help="a file written by `autopar plan --mesh pp=...`")
    parser.add_argument(
        "--schedule", action="append", default=[], metavar="NAME", help="also this schedule; may be repeated"
    )
    parser.add_argument("--grid", action="store_true", help="print the actions of the plan's schedule, step by step")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write its table, to edit and run (schedule=FILE)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the timelines, one under the other")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write them for Perfetto (ui.perfetto.dev)")
    cli_memory.add_picture(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    plan = Plan.load(args.plan)
    if args.measure and args.memory is None:
        raise PlanError("--measure is for --memory: autopar simulate PLAN.json --memory --measure")
    if args.memory is not None:
        return cli_memory.picture(args, plan)
    table, timeline = report_pipeline.timeline_of(plan)
    assert plan.pipeline is not None
    timelines: dict[str, Timeline] = {plan.pipeline.schedule: timeline}
    steps = {plan.pipeline.schedule: report_pipeline.step_of(plan)}
    for name in args.schedule:
        if name not in SCHEDULES:
            raise ScheduleError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
        other = replace(plan.pipeline, schedule=name, table="")
        timelines[name] = report_pipeline.timeline_of(plan, other)[1]
        steps[name] = report_pipeline.step_of(plan, other)
    for path, text in (
        (args.csv, lambda: to_csv(table)),
        (args.svg, lambda: draw.svg(timelines, f"{plan.target.get('text', 'plan')} on {plan.mesh}")),
        (args.trace, lambda: draw.perfetto(timelines)),
    ):
        if path is not None:
            cli_memory.write(path, text())
    if args.json:
        emit_json(
            {
                name: {
                    "step_s": step,
                    "utilisation": list(t.utilisation),
                    "peak_bytes": list(t.peak_bytes),
                }
                for name, (step, t) in steps.items()
            }
        )
        return 0
    emit([*report_pipeline.stages(plan), report_pipeline.utilisation(steps)])
    if args.grid:
        print(grid(table))
    return 0


__all__ = ["add"]
