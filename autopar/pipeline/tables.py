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
    """The table of a pipeline, with sends and receives; of a batch that is too short for its schedule, GPipe's.

    Raises:
        ScheduleError: the schedule does not exist, or does not go with so many ranks or micro-batches.
    """
    if pipeline.schedule == OWN:
        table = from_csv(pipeline.table)
        check(table)
        if len(table) != ranks:
            raise ScheduleError(
                f"the table has rows for {len(table)} ranks; axis {pipeline.axis} has {ranks}: give each rank one row"
            )
        found = homes(table)
        home = tuple(found[s] for s in sorted(found))
        fits = pipeline.micro == len({a.index for row in table for a in row if a.kind == "F"})
        if training and fits:
            return table if has_comms(table) else with_comms(table)
        return _plain(ranks, pipeline.micro, home, training)
    known, home = schedule(pipeline.schedule), stage_homes(pipeline.schedule, ranks)
    if not training or known.allows(ranks, pipeline.micro):
        return _plain(ranks, pipeline.micro, home, training)
    if known.asynchronous:  # as an example: its row has no end (`autopar.pipeline.stream`)
        return with_comms(known.make(ranks, pipeline.micro, 2))
    return with_comms(known.make(ranks, pipeline.micro))


def _plain(ranks: int, micro: int, home: tuple[int, ...], training: bool) -> Table:
    """All forwards, then all backwards: for evaluation, and for a shorter batch than a schedule takes."""
    rows = forwards(ranks, micro, home)
    if training:
        rows = tuple((*row, *(a._replace(kind="B") for a in reversed(row))) for row in rows)
    return with_comms(rows)


__all__ = ["table_of"]
