"""All rows of a table in one process, one action after the other: what processes do must come to exactly this.

There is an executor for every rank, and messages are copied from one to the other. The order is one of those that the
table allows; since a stage does its own actions in the order of its row in all of them, they give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autopar.errors import ScheduleError
from autopar.pipeline.comms import stuck
from autopar.pipeline.table import Table, homes
from autopar.runtime.executor import Executor
from autopar.runtime.loopback import Loopback
from autopar.runtime.work import Work


def replay(
    table: Table,
    works: Mapping[int, Work],
    turns: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Run all rows of `table` in this process.

    Args:
        table: with sends and receives.
        works: of every stage.
        turns: the order in which ranks have their turns, in each of which a rank goes as far as it can; None: from
            the first to the last. Other orders must give the same bits.
        device: of the stages.

    Raises:
        ScheduleError: no rank can go on.
        PipelineError: an action has failed; names rank, stage, action and step.
    """
    loop = Loopback(device)
    home = homes(table)
    executors = [
        Executor(table, rank, {s: works[s] for s in home if home[s] == rank}, loop.of(rank))
        for rank in range(len(table))
    ]
    going = list(range(len(table)) if turns is None else turns)
    assert sorted(going) == list(range(len(table))), f"turns {turns} of {len(table)} ranks"
    while going:
        moved = False
        for rank in going:
            executor = executors[rank]
            while executor.step < len(executor.row) and executor.ready():
                executor.advance()
                moved = True
        if not moved:
            raise stuck(table, [e.step for e in executors])
        going = [rank for rank in going if executors[rank].step < len(table[rank])]
    for executor in executors:
        executor.end()
    if left := loop.left():
        raise ScheduleError(f"{', '.join(left)} were never received")


__all__ = ["replay"]
