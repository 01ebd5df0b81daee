"""The table of a plan's pipeline."""

from __future__ import annotations

from autopar.errors import ScheduleError
from autopar.pipeline.checks import check
from autopar.pipeline.comms import forwards, has_comms, with_comms
from autopar.pipeline.plans import OWN
from autopar.pipeline.schedules import schedule, stage_homes
from autopar.pipeline.table import Table, from_csv, homes
from autopar.plan import Pipeline


def table_of(pipeline: Pipeline, ranks: int, training: bool = True) -> Table:
    """The table of a pipeline, with sends and receives.

    Raises:
        ScheduleError: the schedule does not exist, or does not go with so many ranks or micro-batches.
    """
    if pipeline.schedule == OWN:
        table = from_csv(pipeline.table)
        check(table, micro=pipeline.micro)
        if len(table) != ranks:
            raise ScheduleError(
                f"the table has rows for {len(table)} ranks; axis {pipeline.axis} has {ranks}: give each rank one row"
            )
        if training:
            return table if has_comms(table) else with_comms(table)
        home = homes(table)
        return with_comms(forwards(ranks, pipeline.micro, [home[s] for s in sorted(home)]))
    if not training:
        return with_comms(forwards(ranks, pipeline.micro, stage_homes(pipeline.schedule, ranks)))
    known = schedule(pipeline.schedule)
    if known.asynchronous:  # as an example: its row has no end (`autopar.pipeline.stream`)
        return with_comms(known.make(ranks, pipeline.micro, 2))
    return with_comms(known.make(ranks, pipeline.micro))


__all__ = ["table_of"]
