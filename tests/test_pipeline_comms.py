"""Messages put into tables: golden, without deadlock, in one order at both ends; and tables that stop."""

from __future__ import annotations

from itertools import product

import pytest

from autopar.errors import ScheduleError
from autopar.pipeline.checks import check
from autopar.pipeline.comms import forwards, has_comms, made, needed, receipt, sending, with_comms
from autopar.pipeline.schedules import SCHEDULES, one_f_one_b, schedule, stage_homes, zb_v
from autopar.pipeline.table import COMMS, Action, Table, from_csv, grid, homes, to_csv


def shows(table: Table, text: str) -> None:
    assert grid(table).splitlines() == [line.strip() for line in text.strip().splitlines()]


def tables() -> list[tuple[str, Table]]:
    """Some of every schedule."""
    found = []
    for (name, known), ranks, micro in product(SCHEDULES.items(), (1, 2, 3, 4, 6), (1, 4, 7, 12)):
        if not known.allows(ranks, micro):
            found.append((name, known.make(ranks, micro, 2) if known.asynchronous else known.make(ranks, micro)))
    return found


def test_1f1b():
    """Receives stand where the sender has put them, which may be well before they are needed: 1RF2."""
    shows(
        with_comms(one_f_one_b(3, 3)),
        """
        step  rank 0  rank 1  rank 2
        0     0F0     1RF0    2RF0
        1     0SF0    1F0     2F0
        2     0F1     1SF0    2RF1
        3     0SF1    1RF1    2B0
        4     0F2     1F1     2SB0
        5     0SF2    1SF1    2F1
        6     0RB0    1RF2    2B1
        7     0B0     1RB0    2RF2
        8     0RB1    1B0     2SB1
        9     0B1     1SB0    2F2
        10    0RB2    1F2     2B2
        11    0B2     1SF2    2SB2
        12            1RB1
        13            1B1
        14            1SB1
        15            1RB2
        16            1B2
        17            1SB2
        """,
    )


def test_zb_v():
    """Nothing is sent from stage 1 to stage 2, which are both on rank 1."""
    shows(
        with_comms(zb_v(2, 1)),
        """
        step  rank 0  rank 1
        0     0F0     1RF0
        1     0SF0    1F0
        2     3RF0    2F0
        3     3F0     2SF0
        4     3I0     2RB0
        5     3SB0    2I0
        6     3W0     1I0
        7     0RB0    1SB0
        8     0I0     1W0
        9     0W0     2W0
        """,
    )


def test_messages_are_what_stages_exchange():
    """One for every boundary between ranks, micro-batch and direction; none where neighbours live together."""
    for name, table in tables():
        home, lowered = homes(table), with_comms(table)
        micro = 1 + max(a.index for row in table for a in row if a.kind != "U")
        borders = sum(home[s] != home[s + 1] for s in range(len(home) - 1))
        counts = {kind: sum(a.kind == kind for row in lowered for a in row) for kind in COMMS}
        assert set(counts.values()) == {borders * micro}, name
        assert tuple(tuple(a for a in row if a.kind not in COMMS) for row in lowered) == table


def test_tables_with_messages_pass_every_check():
    """With one action in flight on every rank, and with a communicator for each direction."""
    for _, table in tables():
        lowered = with_comms(table)
        check(lowered)
        check(lowered, per_direction=True)
        assert from_csv(to_csv(lowered)) == lowered


def test_a_table_that_has_messages_is_left_as_it_is():
    lowered = with_comms(one_f_one_b(3, 4))
    assert has_comms(lowered) and not has_comms(one_f_one_b(3, 4))
    assert with_comms(lowered) is lowered


def test_receipts_and_their_inverse():
    for send in (Action(1, "SF", 3), Action(1, "SB", 3)):
        assert sending(receipt(send)) == send


def test_what_is_made_is_what_is_needed():
    last = 3
    for stage, index in product(range(last + 1), range(3)):
        assert made(Action(stage, "B", index), last) == made(Action(stage, "I", index), last)
        assert needed(Action(stage, "B", index), last) == needed(Action(stage, "I", index), last)
        assert made(Action(stage, "W", index), last) is needed(Action(stage, "U", index), last) is None
        if stage < last:
            assert made(Action(stage, "F", index), last) == needed(Action(stage + 1, "F", index), last)
            assert made(Action(stage + 1, "B", index), last) == needed(Action(stage, "B", index), last)


def test_one_rank_sends_nothing():
    assert with_comms(one_f_one_b(1, 3)) == one_f_one_b(1, 3)


def test_linear_in_a_long_table():
    lowered = with_comms(one_f_one_b(8, 400))
    assert sum(map(len, lowered)) == 8 * 400 * 2 + 7 * 400 * 4


def test_a_table_that_stops():
    """Rank 0 wants its gradients before it sends on what they are made of."""
    with pytest.raises(ScheduleError) as error:
        with_comms(from_csv("0F0,0B0,0B1,0F1\n1F0,1F1,1B1,1B0\n"))
    assert str(error.value) == (
        "no rank can go on\n"
        "  rank 0 step 1: 0B0 waits for the gradients of 1B0, at step 3 of rank 1\n"
        "  rank 1 step 1: 1F1 waits for the activations of 0F1, at step 3 of rank 0\n"
        "  step  rank 0   rank 1\n"
        "  0     0F0      1F0\n"
        "  1     >>0B0<<  >>1F1<<  <-- here\n"
        "  2     0B1      1B1\n"
        "  3     0F1      1B0"
    )


def test_a_table_that_waits_for_what_is_not_there():
    with pytest.raises(ScheduleError, match="0B0 waits for the gradients of 1B0 or 1I0, which is in no row"):
        with_comms(from_csv("0F0,0B0\n1F0\n"))


def test_many_ranks_that_wait():
    """The text stays short: eight ranks, and how many more."""
    rows = [(Action(r, "B", 0), Action(r, "F", 0)) for r in range(19)]
    with pytest.raises(ScheduleError, match="and 12 more ranks wait") as error:
        with_comms((*rows, (Action(19, "F", 0), Action(19, "B", 0))))
    assert str(error.value).count("waits for") == 8


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_forwards_in_a_line():
    assert forwards(2, 3, stage_homes("1f1b", 2)) == from_csv("0F0,0F1,0F2\n1F0,1F1,1F2\n")


def test_forwards_in_a_loop():
    """Late stages first: rank 0 turns to stage 2 as soon as micro-batch 0 has been through stage 1."""
    assert to_csv(forwards(2, 3, stage_homes("interleaved", 2))).splitlines() == [
        "0F0,0F1,2F0,2F1,0F2,2F2",
        "1F0,1F1,3F0,3F1,1F2,3F2",
    ]


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-v"])
def test_forwards_can_run(name):
    for ranks, micro in product((1, 2, 4, 5), (1, 3, 8)):
        table = forwards(ranks, micro, stage_homes(name, ranks))
        assert sum(map(len, table)) == micro * ranks * schedule(name).chunks
        check(table, micro=micro)
        check(with_comms(table), micro=micro)
        assert not any(a.kind in ("SB", "RB") for row in with_comms(table) for a in row)


@pytest.mark.parametrize(("ranks", "micro", "stages"), [(2, 0, (0, 1)), (3, 2, (0, 1))])
def test_forwards_refuses(ranks, micro, stages):
    with pytest.raises(ScheduleError, match="at least one micro-batch, and a stage on every rank"):
        forwards(ranks, micro, stages)
