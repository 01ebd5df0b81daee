"""A table without an end, in portions: what each rank does when another window of micro-batches is given.

An asynchronous schedule never empties the pipeline between windows. The table for n + 1 windows begins, in every row,
as the one for n: up to where a rank would need the next window. That is what a rank can do when window n is given; the
rest of the row for n windows empties the pipeline. Behind the first few windows portions repeat, with higher numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, takewhile

from autopar.pipeline.table import Action, Row, Table


class Stream:
    """One rank's row of an endless table.

    `make`: number of windows -> table with sends and receives; `window`: micro-batches in one; `rank`: whose row.
    After `rest`, numbers go on, as for a pipeline that has been empty.
    """

    def __init__(self, make: Callable[[int], Table], ranks: int, window: int, rank: int) -> None:
        self.window = window
        few = -(-ranks // window) + 2
        rows = [(), *(make(n)[rank] for n in range(1, few + 2))]
        self._portions: list[Row] = [()]  # of windows 1, 2, ... since the pipeline was empty
        self._rests: list[Row] = [()]
        start = 0
        for row, longer in pairwise(rows[1:]):
            end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(row, longer)))
            self._portions.append(row[start:end])
            self._rests.append(row[end:])
            start = end
        last, before = self._portions[-1], self._portions[-2]
        assert last == shifted(before, window, 1), "portions of an endless table do not repeat"
        self.given = 0  # windows, all in all
        self._since = 0  # windows since the pipeline was empty

    def more(self) -> Row:
        """What the rank does when one more window is given."""
        self.given += 1
        self._since += 1
        return self._at(self._portions)

    def rest(self) -> Row:
        """What empties the pipeline; nothing if it is empty."""
        row = self._at(self._rests)
        self._since = 0
        return row

    @property
    def empty(self) -> bool:
        """Whether nothing is in flight."""
        return self._since == 0

    def _at(self, known: list[Row]) -> Row:
        number = min(self._since, len(known) - 1)
        windows = (self.given - self._since) + (self._since - number)
        return shifted(known[number], windows * self.window, windows)


def shifted(row: Row, micro: int, updates: int) -> Row:
    """The row with higher numbers of micro-batches and updates."""
    return tuple(Action(a.stage, a.kind, a.index + (updates if a.kind == "U" else micro)) for a in row)


__all__ = ["Stream", "shifted"]
