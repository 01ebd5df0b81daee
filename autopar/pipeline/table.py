"""A schedule as a table: for every rank of the pipeline its row of actions. Plain data with a text form.

>>> str(Action(2, "F", 0)), Action.parse("1SB3")
('2F0', Action(stage=1, kind='SB', index=3))
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from autopar.errors import ScheduleError

#: What computes. F: forward; B: whole backward; I: gradients of inputs; W: gradients of weights; U: optimizer step.
COMPUTE = ("F", "B", "I", "W", "U")
#: What communicates: send or receive, activations (F) or their gradients (B).
COMMS = ("SF", "RF", "SB", "RB")
KINDS = (*COMPUTE, *COMMS)

_ACTION = re.compile(rf"^(\d+)({'|'.join(sorted(KINDS, key=len, reverse=True))})(\d+)$")


class Action(NamedTuple):
    """One thing that one stage does. `index`: the micro-batch, counted through all batches; of U, the update.

    `2SF3`: stage 2 sends its activations of micro-batch 3 on, to stage 3. `2SB3`: it sends their gradients back, to
    stage 1. `2RF3` and `2RB3`: it receives, from stage 1 and from stage 3.
    """

    stage: int
    kind: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.index}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Inverse of `str`.

        Raises:
            ScheduleError: the text is no action.
        """
        match = _ACTION.match(text.strip())
        if not match:
            raise ScheduleError(
                f"cannot read action {text!r}; write stage, kind and micro-batch, such as 2F0 "
                f"(kinds: {', '.join(KINDS)})"
            )
        return cls(int(match[1]), match[2], int(match[3]))


Row = tuple[Action, ...]
#: One row for every rank, in order.
Table = tuple[Row, ...]


def to_csv(table: Table) -> str:
    """One line for every rank, one action in every cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([[str(a) for a in row] for row in table])
    return out.getvalue()


def from_csv(text: str) -> Table:
    """Inverse of `to_csv`; empty cells are left out.

    Raises:
        ScheduleError: a cell is no action; says which.
    """
    rows: list[Row] = []
    for number, cells in enumerate(csv.reader(io.StringIO(text))):
        row = []
        for column, cell in enumerate(cells):
            if cell.strip():
                try:
                    row.append(Action.parse(cell))
                except ScheduleError as error:
                    raise ScheduleError(f"rank {number}, cell {column}: {error}") from None
        rows.append(tuple(row))
    return tuple(rows)


def homes(table: Table) -> dict[int, int]:
    """Stage -> the rank on which it lives, in order of stages.

    Raises:
        ScheduleError: a stage stands in the rows of two ranks, or in none although a later one stands in some.
    """
    found: dict[int, int] = {}
    for rank, row in enumerate(table):
        for step, action in enumerate(row):
            if found.setdefault(action.stage, rank) != rank:
                raise ScheduleError(
                    f"rank {rank} step {step}: {action} is of stage {action.stage}, which lives on rank "
                    f"{found[action.stage]}; a stage has its weights on one rank\n" + excerpt(table, {rank: step})
                )
    absent = sorted(set(range(max(found, default=-1))) - set(found))
    if absent:
        raise ScheduleError(
            f"stage {absent[0]} is in no row, but stage {max(found)} is; stages are counted from 0 without a gap"
        )
    return dict(sorted(found.items()))


def grid(table: Table, mark: Mapping[int, int] | None = None, first: int = 0, last: int | None = None) -> str:
    """Steps downwards, ranks across; `mark`: rank -> step to point at.

    Only steps `first` to `last` (not included) are printed.
    """
    end = max(map(len, table), default=0)
    steps = range(first, end if last is None else min(end, last))
    return "\n".join(_lines(table, mark or {}, steps, range(len(table))))


#: Most ranks that `excerpt` shows.
_WIDE = 8


def excerpt(table: Table, mark: Mapping[int, int], around: int = 2) -> str:
    """The part of the grid round the marked steps, indented, for the text of an error.

    "..." stands where steps are left out. Of a wide table the marked ranks and their neighbours are shown, 8 at most.

    >>> table = from_csv("0F0,0B0,0F1,0B1\\n1F0,1F1,1B0,1B1\\n")
    >>> print(excerpt(table, {0: 1}, around=1))
      step  rank 0   rank 1
      0     0F0      1F0
      1     >>0B0<<  1F1     <-- here
      2     0F1      1B0
      ...
    """
    end = max(map(len, table), default=0)
    ranks: Sequence[int] = range(len(table))
    if len(table) > _WIDE:
        close = sorted(ranks, key=lambda r: (min((abs(r - m) for m in mark), default=r), r))
        ranks = sorted(close[:_WIDE])
    marked = {at for rank, at in mark.items() if rank in ranks}
    steps = sorted({s for at in marked for s in range(at - around, at + around + 1) if 0 <= s < end})
    head, *body = _lines(table, mark, steps, ranks)
    width = max(map(len, (head, *body)))
    shown, follows = [head], 0
    for step, line in zip(steps, body):
        if step != follows:
            shown.append("...")
        shown.append(f"{line.ljust(width)}  <-- here" if step in marked else line)
        follows = step + 1
    if follows < end:
        shown.append("...")
    return "\n".join(f"  {line}" for line in shown)


def _lines(table: Table, mark: Mapping[int, int], steps: Iterable[int], ranks: Iterable[int]) -> list[str]:
    """A head and one line for every step, columns aligned."""
    cells = [["step", *(f"rank {r}" for r in ranks)]]
    for step in steps:
        line = [str(step)]
        for rank in ranks:
            text = str(table[rank][step]) if step < len(table[rank]) else ""
            line.append(f">>{text}<<" if mark.get(rank) == step else text)
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return ["  ".join(t.ljust(w) for t, w in zip(line, widths)).rstrip() for line in cells]


__all__ = ["COMMS", "COMPUTE", "KINDS", "Action", "Row", "Table", "excerpt", "from_csv", "grid", "homes", "to_csv"]
