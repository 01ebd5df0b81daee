"""Tables in time: closed forms, unequal stages, latency, memory. All times are exact."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise, product

import pytest

from autopar.errors import ScheduleError
from autopar.pipeline.clock import Costs, Span, Timeline, run
from autopar.pipeline.comms import forwards, with_comms
from autopar.pipeline.schedules import (
    SCHEDULES,
    bubble,
    expected_gain,
    makespan,
    one_f_one_b,
    paci,
    schedule,
    stage_homes,
    zb_h1,
    zb_h2,
    zb_v,
)
from autopar.pipeline.table import Action, Table, from_csv, homes

RANKS, MICRO = (2, 4, 8), (4, 8, 16)


def timeline(name: str, ranks: int, micro: int, forward=1, input_grad=1, weight_grad=1) -> Timeline:
    """Of equal stages; the times are those of a rank, all its stages together. Asynchronous: one update."""
    known = schedule(name)
    table = known.make(ranks, micro, 1) if known.asynchronous else known.make(ranks, micro)
    times = {"forward": forward, "input_grad": input_grad, "weight_grad": weight_grad}
    parts = {kind: Fraction(seconds) / known.chunks for kind, seconds in times.items()}
    return run(table, Costs.even(ranks * known.chunks, **parts))


# ---- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", RANKS)
def test_makespans_are_the_closed_forms(name, ranks):
    """F = I = W = 1. The order of zb-v is found, and may be a unit or two longer than any could be."""
    for micro in MICRO:
        if not SCHEDULES[name].allows(ranks, micro):
            ran, formula = timeline(name, ranks, micro), makespan(name, ranks, micro)
            if name == "zb-v":
                assert micro < ranks or formula <= ran.makespan <= formula + 1
            else:
                assert ran.makespan == formula


def test_the_closed_forms_in_numbers():
    """3 units a micro-batch; the bubble of 1F1B is 3 (N - 1), halved by two chunks, a third of it for zb-h1."""
    for ranks, micro in product(RANKS, MICRO):
        assert makespan("1f1b", ranks, micro) == makespan("gpipe", ranks, micro) == 3 * (micro + ranks - 1)
        assert makespan("interleaved", ranks, micro) == 3 * micro + 3 * (ranks - 1) / 2
        late = max(0, ranks - micro)
        assert makespan("zb-h1", ranks, micro) == 3 * micro + ranks - 1 + late
        assert timeline("zb-h1", ranks, micro).makespan == 3 * micro + ranks - 1 + late
        for updates in (1, 3):
            table = paci(ranks, micro, updates)
            assert run(table, Costs.even(ranks)).makespan == 3 * (updates * micro + ranks - 1)


@pytest.mark.parametrize("times", [(1, 2, 1), (2, 2, 1), (2, 3, 1), (1, 1, 2), (3, 2, 2), (4, 5, 3)])
def test_closed_forms_of_unequal_times(times):
    """F, I, W. dualpipe-v: where I is no longer than F."""
    costs = dict(zip(("forward", "input_grad", "weight_grad"), times))
    for name, ranks in product(("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "dualpipe-v", "paci"), RANKS):
        micro = 16
        if name != "dualpipe-v" or costs["input_grad"] <= costs["forward"]:
            assert timeline(name, ranks, micro, *times).makespan == makespan(name, ranks, micro, **costs)


def test_utilisation_is_what_the_bubble_leaves():
    for name, ranks in product(("gpipe", "1f1b", "interleaved", "zb-h1", "dualpipe-v"), (2, 4)):
        ran = timeline(name, ranks, 8)
        assert all(float(share) == pytest.approx(1 - bubble(name, ranks, 8)) for share in ran.utilisation)
        assert ran.busy == (24,) * ranks


def test_no_rank_of_zb_h2_waits():
    """The bubble of the paper is counted from a rank's own beginning: (N - 1) (F + I - 2 W) on the first rank."""
    for ranks, micro in product(RANKS, (16, 20)):
        for forward, grad, weight in ((1, 1, 1), (2, 2, 1), (2, 3, 1)):
            costs = Costs.even(ranks, forward=forward, input_grad=grad, weight_grad=weight)
            ran = run(zb_h2(ranks, micro), costs)
            waits = [row[-1].end - row[0].start - busy for row, busy in zip(ran.spans, ran.busy)]
            assert waits == [(ranks - 1 - r) * (forward + grad - 2 * weight) for r in range(ranks)]


def test_an_order_sought_for_other_times():
    """With I = 2 W the order for equal times loses at every micro-batch; the one sought for them does not."""
    times = {"forward": 1, "input_grad": 2, "weight_grad": 1}
    for ranks, micro in ((2, 8), (2, 16), (4, 16)):
        work = 2 * micro * sum(times.values())
        equal = run(zb_v(ranks, micro), Costs.even(2 * ranks, **times)).makespan - work
        fitted = run(zb_v(ranks, micro, units=(1, 2, 1)), Costs.even(2 * ranks, **times)).makespan - work
        assert fitted < 2 * makespan("zb-h1", ranks, micro, **times) - work < equal


def test_gain_of_not_flushing():
    """PACI in the long run: what one more update takes. A slow stage that is not the last delays the flush less."""
    for ranks, micro, slow in product((4, 8), (4, 8, 16), (1, Fraction(3, 2))):
        for which in (0, ranks // 2, ranks - 1):
            forward = [Fraction(1)] * ranks
            forward[which] *= slow
            costs = Costs(forward, input_grad=forward, weight_grad=forward)
            flush = run(one_f_one_b(ranks, micro), costs).makespan
            update = run(paci(ranks, micro, 5), costs).makespan - run(paci(ranks, micro, 4), costs).makespan
            gain = expected_gain(ranks, micro, float(slow * ranks / sum(forward)))
            if slow == 1 or which == ranks - 1:
                assert float(flush / update) == pytest.approx(gain)
            else:
                assert 1 < float(flush / update) < gain


def test_unequal_stages_keep_the_slowest_busy():
    """Flush: every stage once, then the slowest for every other micro-batch, at most; without it the slowest alone."""
    for forward in ((1, 2, 1, 3), (3, 1, 2, 1), (1, 3, 3, 1)):
        costs = Costs(forward, backward=[f + 1 for f in forward])
        once, slowest = sum(2 * f + 1 for f in forward), 7
        flush = run(one_f_one_b(4, 10), costs).makespan
        assert flush <= once + 9 * slowest and (flush == once + 9 * slowest) == (forward[-1] == 3)
        assert run(paci(4, 4, 21), costs).makespan - run(paci(4, 4, 20), costs).makespan == 4 * slowest


# ---- messages ------------------------------------------------------------------------------------------------------


def test_latency_that_is_not_hidden():
    """N (F + B) / (N (F + B) + 2 (N - 1) c): of an asynchronous schedule, in the long run."""
    for ranks, latency in product((2, 4, 8), (Fraction(3, 10), Fraction(1, 2), Fraction(1))):
        costs = Costs.even(ranks, send=latency)
        update = run(paci(ranks, ranks, 12), costs).makespan - run(paci(ranks, ranks, 11), costs).makespan
        assert 3 * ranks / update == Fraction(3 * ranks) / (3 * ranks + 2 * (ranks - 1) * latency)


@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_more_in_flight_hides_latency(ranks):
    """ranks - 1 ahead hide all of it, up to (F + B) / 2 a message; less of them a part."""
    for latency in (Fraction(1, 2), Fraction(3, 2)):
        costs = Costs.even(ranks, send=latency)

        def update(ahead: int, costs: Costs = costs) -> float:
            long, short = (run(paci(ranks, ranks, n, ahead), costs).makespan for n in (24, 12))
            return (long - short) / 12

        taken = [update(ahead) for ahead in range(ranks)]
        assert taken[0] == 3 * ranks + 2 * (ranks - 1) * latency
        assert taken == sorted(taken, reverse=True) and taken[1] < taken[0]
        assert taken[-1] == 3 * ranks


def test_a_link_carries_one_message_at_a_time():
    """Sends longer than the actions between them: what they take is what counts."""
    costs = Costs(forward=(1, 1), backward=(2, 2), send_forward=(5,), send_backward=(0,))
    ran = run(forwards(2, 4, (0, 1)), costs)
    assert [span.start for span in ran.spans[1]] == [6, 11, 16, 21]


def test_sends_stand_where_the_table_has_them():
    """Late in the row is late on the way."""
    costs = Costs(forward=(1, 1), send_forward=(1,))
    late = from_csv("0F0,0F1,0SF0,0SF1\n1RF0,1F0,1RF1,1F1\n")
    assert [span.start for span in run(late, costs).spans[1]] == [3, 4]
    assert [span.start for span in run(forwards(2, 2, (0, 1)), costs).spans[1]] == [2, 3]


def test_nothing_is_sent_between_stages_of_one_rank():
    costs = Costs.even(2, send=100)
    assert run(from_csv("0F0,1F0,1B0,0B0\n"), costs).makespan == 6


def test_without_overlap_both_ranks_are_kept():
    costs = Costs(forward=(1, 1), backward=(2, 2), send_forward=(3,), send_backward=(4,))
    ran = run(one_f_one_b(2, 1), costs, overlap=False)
    assert [[(str(s.action), s.start, s.end) for s in row] for row in ran.spans] == [
        [("0F0", 0, 1), ("0SF0", 1, 4), ("0RB0", 7, 11), ("0B0", 11, 13)],
        [("1RF0", 1, 4), ("1F0", 4, 5), ("1B0", 5, 7), ("1SB0", 7, 11)],
    ]
    assert ran.busy == (3, 3)


def ranked(name: str, ranks: int, micro: int) -> Table:
    known = schedule(name)
    return known.make(ranks, micro, 2) if known.asynchronous else known.make(ranks, micro)


@pytest.mark.parametrize("name", SCHEDULES)
def test_laws_of_messages(name):
    """Bare or with messages is the same; overlap never costs, and without any price nothing is left of it."""
    ranks, micro = 3, 6
    table = ranked(name, ranks, micro)
    stages = len(homes(table))
    for send in (0, Fraction(1, 3), 2):
        costs = Costs.even(stages, send=send)
        spans = run(table, costs).spans
        assert run(with_comms(table), costs).makespan >= run(table, costs).makespan
        assert run(table, costs, overlap=False).makespan >= run(table, costs).makespan
        order = [[span.action for span in row] for row in spans]
        assert order == [list(row) for row in table]
        for row in spans:
            assert all(before.end <= after.start for before, after in pairwise(row))
    free = Costs.even(stages)
    assert run(with_comms(table), free) == run(table, free)


# ---- bytes ---------------------------------------------------------------------------------------------------------


def test_peak_bytes_of_1f1b():
    """What is always there, and a saved micro-batch for each in flight."""
    costs = Costs.even(4, saved_bytes=10, static_bytes=100)
    assert run(one_f_one_b(4, 8), costs).peak_bytes == (140, 130, 120, 110)
    assert run(one_f_one_b(4, 2), costs).peak_bytes == (120, 120, 120, 110)
    assert run(with_comms(one_f_one_b(4, 8)), costs).stage_peak_bytes == (140, 130, 120, 110)


def test_peak_bytes_of_postponed_gradients():
    """Rank r of zb-h1 has 3 - r in flight and r waiting for W, and during I both of one micro-batch."""
    costs = Costs.even(3, saved_bytes=10, pending_bytes=6)
    assert run(zb_h1(3, 8), costs).peak_bytes == (36, 32, 28)
    bare = Costs.even(3, saved_bytes=10)
    assert run(zb_h1(3, 8), bare).peak_bytes == run(one_f_one_b(3, 8), bare).peak_bytes


def test_stages_of_a_rank_add_up():
    costs = Costs(forward=(1,) * 4, saved_bytes=(1, 10, 100, 1000), static_bytes=(5, 5, 5, 5))
    ran = run(from_csv("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n"), costs)
    assert ran.peak_bytes == (1011, 120)
    assert ran.stage_peak_bytes == (6, 15, 105, 1005)


def test_transient_bytes_are_there_while_an_action_runs():
    costs = Costs(forward=(1, 1), saved_bytes=(10, 10), transient_bytes=(7, 3))
    assert run(one_f_one_b(2, 4), costs).peak_bytes == (27, 13)


def test_an_evaluation_keeps_nothing():
    costs = Costs.even(4, saved_bytes=10, static_bytes=100)
    assert run(forwards(4, 8, stage_homes("1f1b", 4)), costs).peak_bytes == (100,) * 4


def test_a_vee_holds_no_more_than_1f1b():
    """Two stages of a rank are half as large each."""
    for ranks, micro in product((2, 4, 8), (4, 16)):
        whole, half = Costs.even(ranks, saved_bytes=2), Costs.even(2 * ranks, saved_bytes=1)
        assert max(run(zb_v(ranks, micro), half).peak_bytes) <= 2 * ranks
        if micro >= ranks:
            assert max(run(one_f_one_b(ranks, micro), whole).peak_bytes) == 2 * ranks


# ---- costs and timelines -------------------------------------------------------------------------------------------


def test_a_whole_backward_is_its_two_parts_unless_given():
    assert Costs(forward=(1, 1), input_grad=(2, 3), weight_grad=(4, 5)).backward == (6, 8)
    assert Costs(forward=(1, 1), input_grad=(2, 3), weight_grad=(4, 5), backward=(0, 7)).backward == (0, 7)
    assert Costs(forward=(1, 1), backward=(0, 0)).backward == (0, 0)


def test_updates_take_time_too():
    assert run(paci(1, 2, 3), Costs.even(1, update=Fraction(1, 2))).makespan == 3 * (2 * 3 + Fraction(1, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Costs((1, 1), update=(1,)), "costs of 2 stages: update has 1 numbers for 2 stages"),
        (lambda: Costs((1, 1), send_forward=(1, 1)), "costs of 2 stages: send_forward has 2 numbers for 1 boundaries"),
        (lambda: Costs((1, -1)), "costs of 2 stages: forward has -1; none may be negative"),
        (
            lambda: run(one_f_one_b(3, 4), Costs.even(2)),
            "a table of 3 stages with costs of 2; give one for each stage",
        ),
    ],
)
def test_costs_that_do_not_fit(make, message):
    with pytest.raises(ScheduleError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_table_that_stops(overlap):
    table = from_csv("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    with pytest.raises(ScheduleError, match="rank 0 step 1: 0B0 waits for the gradients of 1B0, at step 2 of rank 1"):
        run(table, Costs.even(2), overlap)


def test_messages_that_do_not_meet():
    table = from_csv("0F0,0SF0,0RB0,0B0\n1F0,1B0,1SB0,1RF0\n")
    with pytest.raises(ScheduleError, match="rank 0 step 1: 0SF0 waits for its receive 1RF0, at step 3 of rank 1"):
        run(table, Costs.even(2), overlap=False)


def test_a_measured_timeline():
    """Clocks do not start at 0, and ranks not at once; messages are no work."""
    rows = (
        (Span(Action(0, "F", 0), 100.0, 101.0), Span(Action(0, "SF", 0), 101.0, 101.5)),
        (Span(Action(1, "RF", 0), 100.5, 101.5), Span(Action(1, "F", 0), 101.5, 104.0)),
    )
    measured = Timeline(rows)
    assert (measured.start, measured.makespan) == (100.0, 4.0)
    assert measured.busy == (1.0, 2.5)
    assert measured.utilisation == (0.25, 0.625)


def test_nothing_ran():
    assert Timeline(((), ())).makespan == 0 and Timeline(((), ())).utilisation == (0.0, 0.0)


def test_a_long_table():
    """Every action runs once, and the closed form holds for thousands of them."""
    ran = run(one_f_one_b(32, 256), Costs.even(32))
    assert sum(map(len, ran.spans)) == 2 * 32 * 256
    assert ran.makespan == 3 * (256 + 31)
