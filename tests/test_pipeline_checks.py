"""The checker of tables: good ones pass, broken ones are refused with the place; mutants of every kind of table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from autopar.errors import ScheduleError
from autopar.pipeline.checks import check
from autopar.pipeline.clock import Costs, run
from autopar.pipeline.comms import forwards, made, needed, receipt, with_comms
from autopar.pipeline.schedules import SCHEDULES, one_f_one_b, paci, schedule, stage_homes
from autopar.pipeline.table import COMPUTE, Action, Table, from_csv, homes


def table_of(name: str, ranks: int = 3, micro: int = 6) -> Table:
    known = schedule(name)
    return known.make(ranks, micro // 2, 2) if known.asynchronous else known.make(ranks, micro)


def refused(text: str, **options) -> str:
    with pytest.raises(ScheduleError) as error:
        check(from_csv(text), **options)
    return str(error.value)


# ---- what is said of each fault ------------------------------------------------------------------------------------


def test_order_in_a_row():
    assert refused("0F0,0F1,0B0,0B1\n1F0,1B1,1F1,1B0\n") == (
        "rank 1 step 1: 1B1 runs before 1F1\n"
        "  step  rank 0  rank 1\n"
        "  0     0F0     1F0\n"
        "  1     0F1     >>1B1<<  <-- here\n"
        "  2     0B0     1F1\n"
        "  3     0B1     1B0"
    )


def test_versions():
    assert refused("0F0,0F1,0B0,0F2,0B1,0U0,0F3,0B2,0B3,0U1\n1F0,1B0,1F1,1B1,1F2,1U0,1B2,1F3,1B3,1U1\n") == (
        "rank 1 step 4: 1F2 sees its weights after 0 updates; "
        "with 1 in flight and 2 micro-batches an update it has to see 1\n"
        "  step  rank 0  rank 1\n"
        "  ...\n"
        "  2     0B0     1F1\n"
        "  3     0F2     1B1\n"
        "  4     0B1     >>1F2<<  <-- here\n"
        "  5     0U0     1U0\n"
        "  6     0F3     1B2\n"
        "  ..."
    )


@pytest.mark.parametrize(
    ("text", "first_line"),
    [
        # where the stages are
        ("0F0,0B0\n1F0,1B0,0F1\n", "rank 1 step 2: 0F1 is of stage 0, which lives on rank 0"),
        ("0F0,0B0\n2F0,2B0\n", "stage 1 is in no row, but stage 2 is"),
        ("0F0,0B0\n\n", "rank 1 has nothing to do; every rank has a stage at least"),
        ("", "rank 0 has nothing to do; every rank has a stage at least"),
        # every action once
        ("0F0,0F0,0B0\n1F0,1B0\n", "rank 0 step 1: 0F0 is there a second time, after step 0"),
        ("0B0\n1F0,1B0\n", "rank 0 step 0: 0B0 without 0F0; every stage has each of 1 micro-batches once"),
        ("0F0\n1F0,1B0\n", "rank 0 step 0: 0F0 without 0B0, or 0I0 and 0W0; every stage"),
        ("0F0,0I0\n1F0,1B0\n", "rank 0 step 1: 0I0 without 0W0; every stage"),
        ("0F0,0W0\n1F0,1B0\n", "rank 0 step 1: 0W0 without 0I0; every stage"),
        ("0F0,0I0,0B0,0W0\n1F0,1B0\n", "rank 0 step 1: 0I0 repeats a part of 0B0; a backward is B, or I and W"),
        ("0F0,0B0\n1F0,1B0,1F1,1B1\n", "rank 0 has no 0F1; every stage has each of 2 micro-batches once"),
        ("0F0,0F2,0B0,0B2\n", "rank 0 has no 0F1; every stage has each of 3 micro-batches once"),
        # the order of a row
        ("0F0,0W0,0I0\n", "rank 0 step 1: 0W0 runs before 0I0"),
        ("1F0,0F0,1B0,0B0\n", "rank 0 step 0: 1F0 runs before 0F0"),
        ("0F0,1F0,0B0,1B0\n", "rank 0 step 2: 0B0 runs before 1B0"),
        ("0F0,1F0,0I0,1I0,0W0,1W0\n", "rank 0 step 2: 0I0 runs before 1I0"),
        ("0SF0,0F0,0RB0,0B0\n1RF0,1F0,1B0,1SB0\n", "rank 0 step 0: 0SF0 runs before 0F0"),
        ("0F0,0SF0,0B0,0RB0\n1RF0,1F0,1B0,1SB0\n", "rank 0 step 2: 0B0 runs before 0RB0"),
        ("0F0,0SF0,0RB0,0B0\n1F0,1RF0,1B0,1SB0\n", "rank 1 step 0: 1F0 runs before 1RF0"),
        ("0F0,0SF0,0RB0,0B0\n1RF0,1F0,1SB0,1B0\n", "rank 1 step 2: 1SB0 runs before 1B0"),
        # messages
        ("0F0,0RB0,0B0\n1RF0,1F0,1B0,1SB0\n", "rank 0 step 0: 0F0 without 0SF0; every stage"),
        ("0F0,0SF0,0RB0,0B0\n1F0,1B0,1SB0\n", "rank 1 step 0: 1F0 without 1RF0; every stage"),
        ("0F0,0SF0,0RB0,0B0\n1RF0,1F0,1B0\n", "rank 1 step 2: 1B0 without 1SB0; every stage"),
        ("0F0,0SF0,1F0,1B0,0B0\n", "rank 0 step 1: 0SF0 belongs to no message between two ranks of this table"),
        (
            "0F0,0SF0,0RB0,0B0\n1RF0,1F0,1SF0,1B0,1SB0\n",
            "rank 1 step 2: 1SF0 belongs to no message between two ranks of this table",
        ),
        (
            "0F0,0SF0,0F1,0SF1,0RB0,0B0,0RB1,0B1\n1RF1,1F1,1RF0,1F0,1B0,1SB0,1B1,1SB1\n",
            "rank 1 step 0: 1RF1 would receive 0SF0: rank 0 sends that before 0SF1",
        ),
        # updates
        ("0F0,0B0,0U0\n1F0,1B0\n", "rank 1 step 1: stage 1 has 0 updates, stage 0 has 1; all have as many"),
        ("0F0,0B0,0U1\n", "rank 0 step 2: 0U1 is the update of stage 0 that has number 0"),
        (
            "0F0,0B0,0U0,0F1,0B1,0F2,0B2,0U1\n",
            "rank 0 step 7: 3 micro-batches cannot make 2 updates of equal size",
        ),
        ("0F0,0U0,0B0\n", "rank 0 step 2: 0B0 sees its weights after 1 updates; with 1 micro-batches an update it has"),
        ("0F0,0I0,0U0,0W0\n", "rank 0 step 3: 0W0 sees its weights after 1 updates; with 1 micro-batches an update it"),
    ],
)
def test_faults(text, first_line):
    assert refused(text).splitlines()[0].startswith(first_line)


def test_number_of_micro_batches():
    check(one_f_one_b(2, 4), micro=4)
    with pytest.raises(ScheduleError, match="the table is of 4 micro-batches and the batch of 6; make it of as many"):
        check(one_f_one_b(2, 4), micro=6)


def test_receives_before_what_needs_them_stop():
    """The obvious lowering. Everybody sends, nobody receives; with two communicators it would run."""
    table = _obvious(one_f_one_b(3, 4))
    with pytest.raises(ScheduleError) as error:
        check(table)
    assert str(error.value).splitlines()[:4] == [
        "no rank can go on",
        "  rank 0 step 5: 0SF2 waits for its receive 1RF2, at step 9 of rank 1",
        "  rank 1 step 5: 1SF1 waits for its receive 2RF1, at step 4 of rank 2",
        "  rank 2 step 3: 2SB0 waits for its receive 1RB0, at step 6 of rank 1",
    ]
    check(table, per_direction=True)


def test_two_communicators_can_stop_too():
    """Rank 1 keeps its gradients back until it has the activations that rank 0 makes of them."""
    late = "1RF0,1RF1,1F0,1B0,1F1,1B1,1SB0,1SB1\n"
    check(from_csv("0F0,0SF0,0F1,0SF1,0RB0,0RB1,0B0,0B1\n" + late))
    for per_direction in (False, True):
        text = "0F0,0SF0,0RB0,0B0,0F1,0SF1,0RB1,0B1\n" + late
        assert "no rank can go on" in refused(text, per_direction=per_direction)


def _obvious(table: Table) -> Table:
    """Receives right before what needs them, sends right behind what makes them."""
    home = homes(table)
    last = max(home)
    rows = []
    for rank, row in enumerate(table):
        out: list[Action] = []
        for action in row:
            need, message = needed(action, last), made(action, last)
            out += [receipt(need)] if need and home[need.stage] != rank else []
            out.append(action)
            out += [message] if message and home[receipt(message).stage] != rank else []
        rows.append(tuple(out))
    return tuple(rows)


# ---- what passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_passes(name):
    for table in (table_of(name), with_comms(table_of(name))):
        check(table, micro=6)
        check(table, per_direction=True)


def test_a_window_with_more_in_flight_passes():
    check(paci(4, window=3, updates=4, ahead=2))
    check(with_comms(paci(4, window=3, updates=4, ahead=2)))


def test_an_evaluation_passes():
    check(forwards(3, 4, stage_homes("zb-v", 3)), micro=4)


def test_any_placement_passes():
    """Nobody says that neighbours live on neighbouring ranks."""
    check(from_csv("1F0,1B0\n0F0,2F0,2B0,0B0\n"))


# ---- mutants -------------------------------------------------------------------------------------------------------


def swaps(table: Table) -> Iterator[tuple[Action, Action, Table]]:
    for rank, row in enumerate(table):
        for i in range(len(row) - 1):
            changed = (*row[:i], row[i + 1], row[i], *row[i + 2 :])
            yield row[i], row[i + 1], (*table[:rank], changed, *table[rank + 1 :])


def deletions(table: Table) -> Iterator[Table]:
    for rank, row in enumerate(table):
        for i in range(len(row)):
            yield (*table[:rank], (*row[:i], *row[i + 1 :]), *table[rank + 1 :])


def passes(table: Table) -> bool:
    try:
        check(table)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_deletion_is_noticed(name):
    for table in (table_of(name), with_comms(table_of(name))):
        assert not any(passes(mutant) for mutant in deletions(table))


@pytest.mark.parametrize("name", SCHEDULES)
def test_swaps_are_noticed_or_do_no_harm(name):
    """Of two neighbours in a row one may need the other. If not, the swapped table runs to its end as well."""
    table = table_of(name) if schedule(name).chunks == 1 else table_of(name, 2, 4)
    costs = Costs.even(len(homes(table)), send=1)
    for plain in (table, with_comms(table)):
        last = len(homes(plain)) - 1
        for first, second, mutant in swaps(plain):
            own = first.stage == second.stage and first.index == second.index
            if own and (first.kind, second.kind) in NEEDS:
                assert not passes(mutant), (first, second)
            elif first.stage == second.stage and "U" in (first.kind, second.kind):
                assert passes(mutant) == (not {first.kind, second.kind} <= set(COMPUTE)), (first, second)
            elif passes(mutant):
                for overlap in (True, False):
                    spans = run(mutant, costs, overlap).spans
                    ends = {span.action: span.end for row in spans for span in row}
                    starts = {span.action: span.start for row in spans for span in row}
                    for action in starts:
                        need = needed(action, last)
                        makers = [Action(need.stage, kind, need.index) for kind in ("FBI")] if need else []
                        wanted = makers[:1] if action.kind == "F" else makers[1:]
                        assert all(ends[maker] <= starts[action] for maker in wanted if maker in ends)


#: Kinds of the same stage and micro-batch of which the second needs the first.
NEEDS = {
    ("F", "B"), ("F", "I"), ("I", "W"), ("F", "SF"), ("B", "SB"), ("I", "SB"), ("RF", "F"), ("RB", "B"), ("RB", "I"),
}  # fmt: skip


def test_what_the_mutants_were():
    """So that the two tests above are known to try something: all kinds of neighbours are among them."""
    seen: Counter[tuple[str, str]] = Counter()
    for name in ("1f1b", "zb-h1", "paci"):
        for first, second, _ in swaps(with_comms(table_of(name))):
            if (first.stage, first.index) == (second.stage, second.index):
                seen[first.kind, second.kind] += 1
            elif "U" in (first.kind, second.kind):
                seen["U", "other"] += 1
    assert seen.keys() >= NEEDS and seen["U", "other"] > 0
