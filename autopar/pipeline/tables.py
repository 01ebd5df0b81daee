"""The table of a plan's pipeline."""

from __future__ import annotations

from autopar.errors import ScheduleError
from autopar.pipeline.checks import check
from autopar.pipeline.comms import forwards, has_comms, with_comms
from autopar.pipeline.plans import OWN
from autopar.pipeline.schedules import schedule, stage_homes
from autopar.pipeline.table import Action, Table, from_csv, homes
from autopar.plan import Pipeline

#: Updates in one segment of an asynchronous schedule, by whose time it is judged: it is filled and drained once in so
#: many steps.
SEGMENT = 8


def read(text: str) -> Table:
    """A user's own table for training, checked, with or without sends and receives.

    Raises:
        ScheduleError: it cannot run, has no backwards, or steps the optimizer, which the user's loop does behind it.
    """
    table = from_csv(text)
    check(table)
    kinds = {action.kind for row in table for action in row}
    if not kinds & {"B", "I"}:
        raise ScheduleError("the table has no backwards (B, or I and W): it evaluates, and a schedule is to train")
    if "U" in kinds:
        raise ScheduleError(
            "the table steps the optimizer (U), which tables of your own cannot: leave the U out, so that "
            'optimizer.step() is behind the table, or take schedule="paci"'
        )
    return table


def micro_of(table: Table) -> int:
    """Number of micro-batches of a table."""
    return 1 + max((a.index for row in table for a in row if a.kind == "F"), default=-1)


def with_updates(table: Table) -> Table:
    """With the optimizer's step behind every row, as the user's loop has it; an asynchronous table has its own."""
    if any(action.kind == "U" for row in table for action in row):
        return table
    return tuple((*row, *(Action(stage, "U", 0) for stage in sorted({a.stage for a in row}))) for row in table)


def table_of(pipeline: Pipeline, ranks: int, training: bool = True) -> Table:
    """The table of a pipeline, with sends and receives; of a batch that is too short for its schedule, GPipe's.

    Raises:
        ScheduleError: the schedule does not exist, or does not go with so many ranks.
    """
    if pipeline.schedule == OWN:
        table = read(pipeline.table)
        if len(table) != ranks:
            raise ScheduleError(
                f"the table has rows for {len(table)} ranks; axis {pipeline.axis} has {ranks}: give each rank one row"
            )
        found = homes(table)
        home = tuple(found[s] for s in sorted(found))
        if training and pipeline.micro == micro_of(table):
            return table if has_comms(table) else with_comms(table)
        return _plain(ranks, pipeline.micro, home, training)
    known, home = schedule(pipeline.schedule), stage_homes(pipeline.schedule, ranks)
    if not training or known.allows(ranks, pipeline.micro):
        return _plain(ranks, pipeline.micro, home, training)
    if known.asynchronous:  # as an example: its row has no end (`autopar.pipeline.stream`)
        return with_comms(known.make(ranks, pipeline.micro, 2))
    return with_comms(known.make(ranks, pipeline.micro))


def timed(pipeline: Pipeline, ranks: int, training: bool = True) -> tuple[Table, int]:
    """The table that says how long a step takes, optimizer included, and the number of steps in it.

    Of an asynchronous schedule, which pays its one fill off over time, a segment of `SEGMENT` updates.

    Raises:
        ScheduleError: as `table_of`.
    """
    known = None if pipeline.schedule == OWN else schedule(pipeline.schedule)
    if training and known is not None and known.asynchronous and not known.allows(ranks, pipeline.micro):
        return with_comms(known.make(ranks, pipeline.micro, SEGMENT)), SEGMENT
    table = table_of(pipeline, ranks, training)
    return (with_updates(table) if training else table), 1


def _plain(ranks: int, micro: int, home: tuple[int, ...], training: bool) -> Table:
    """All forwards, then all backwards: for evaluation, and for a shorter batch than a schedule takes."""
    rows = forwards(ranks, micro, home)
    if training:
        rows = tuple((*row, *(a._replace(kind="B") for a in reversed(row))) for row in rows)
    return with_comms(rows)


__all__ = ["SEGMENT", "micro_of", "read", "table_of", "timed", "with_updates"]
