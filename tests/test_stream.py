"""An endless table in portions: together they are the table for as many windows."""

from __future__ import annotations

import pytest

from autopar.pipeline.comms import with_comms
from autopar.pipeline.schedules import paci
from autopar.pipeline.stream import Stream, shifted


def stream(ranks: int, window: int, rank: int) -> Stream:
    return Stream(lambda n: with_comms(paci(ranks, window, n)), ranks, window, rank)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_portions_are_the_table(ranks, window):
    for rank in range(ranks):
        endless, done = stream(ranks, window, rank), ()
        for windows in range(1, 13):
            done += endless.more()
            whole = with_comms(paci(ranks, window, windows))[rank]
            assert whole[: len(done)] == done, "a portion is the beginning of every longer table"
        assert done + endless.rest() == whole
        assert endless.empty and endless.given == 12


def test_behind_a_drain_numbers_go_on():
    endless = stream(4, 2, 1)
    first = [*endless.more(), *endless.more(), *endless.rest()]
    again = [*endless.more(), *endless.more(), *endless.rest()]
    assert again == list(shifted(tuple(first), 4, 2))
    assert endless.rest() == (), "an empty pipeline has nothing to do"


def test_a_first_rank_does_not_wait_for_the_last():
    """The first of four ranks is through its window while three micro-batches are still in flight behind it."""
    row = stream(4, 8, 0).more()
    assert [a.index for a in row if a.kind == "F"] == list(range(8))
    assert [a.index for a in row if a.kind == "B"] == list(range(5))
    assert not any(a.kind == "U" for a in row)
