"""The known schedules: golden tables, what is in flight, which weights they see, what they refuse."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest

from autopar.errors import ScheduleError
from autopar.pipeline.schedules import (
    SCHEDULES,
    async_1f1b,
    backward_version,
    bubble,
    delayed_version,
    drift_bound,
    expected_drift,
    expected_gain,
    forward_version,
    gpipe,
    interleaved,
    makespan,
    mean_drift,
    one_f_one_b,
    paci,
    schedule,
    stage_homes,
    two_bw,
    zb_h1,
    zb_h2,
    zb_v,
)
from autopar.pipeline.table import Action, Row, Table, from_csv, grid, homes, to_csv

pytestmark = pytest.mark.tiny


def table_of(name: str, ranks: int, micro: int, updates: int = 2) -> Table:
    """The table of a schedule by name; `micro` is the window of an asynchronous one."""
    known = schedule(name)
    return known.make(ranks, micro, updates) if known.asynchronous else known.make(ranks, micro)


def allowed(name: str) -> list[tuple[int, int]]:
    """(ranks, micro-batches) that are possible, of some sizes."""
    sizes = product((1, 2, 3, 4, 8), (1, 2, 3, 4, 8, 9, 16))
    return [(ranks, micro) for ranks, micro in sizes if not SCHEDULES[name].allows(ranks, micro)]


# ---- golden tables -------------------------------------------------------------------------------------------------


def shows(table: Table, text: str) -> None:
    assert grid(table).splitlines() == [line.strip() for line in text.strip().splitlines()]


def test_gpipe():
    shows(
        gpipe(3, 3),
        """
        step  rank 0  rank 1  rank 2
        0     0F0     1F0     2F0
        1     0F1     1F1     2F1
        2     0F2     1F2     2F2
        3     0B0     1B0     2B0
        4     0B1     1B1     2B1
        5     0B2     1B2     2B2
        """,
    )


def test_1f1b():
    """Rank r begins with 3 - r forwards; from then on every backward makes room for one forward."""
    shows(
        one_f_one_b(3, 4),
        """
        step  rank 0  rank 1  rank 2
        0     0F0     1F0     2F0
        1     0F1     1F1     2B0
        2     0F2     1B0     2F1
        3     0B0     1F2     2B1
        4     0F3     1B1     2F2
        5     0B1     1F3     2B2
        6     0B2     1B2     2F3
        7     0B3     1B3     2B3
        """,
    )


def test_interleaved():
    """Stages 0 and 2 on rank 0, 1 and 3 on rank 1; two micro-batches go through both before the next two come."""
    shows(
        interleaved(2, 4),
        """
        step  rank 0  rank 1
        0     0F0     1F0
        1     0F1     1F1
        2     2F0     3F0
        3     2F1     3B0
        4     0F2     3F1
        5     2B0     3B1
        6     0F3     1F2
        7     2B1     1B0
        8     2F2     1F3
        9     0B0     1B1
        10    2F3     3F2
        11    0B1     3B2
        12    2B2     3F3
        13    2B3     3B3
        14    0B2     1B2
        15    0B3     1B3
        """,
    )


def test_zb_h1():
    """As 1F1B, but rank 1 lets one W wait and rank 2 two, so that gradients travel sooner."""
    shows(
        zb_h1(3, 4),
        """
        step  rank 0  rank 1  rank 2
        0     0F0     1F0     2F0
        1     0F1     1F1     2I0
        2     0F2     1I0     2F1
        3     0I0     1F2     2I1
        4     0W0     1I1     2F2
        5     0F3     1W0     2I2
        6     0I1     1F3     2W0
        7     0W1     1I2     2F3
        8     0I2     1W1     2I3
        9     0W2     1I3     2W1
        10    0I3     1W2     2W2
        11    0W3     1W3     2W3
        """,
    )


def test_zb_v():
    """Stage 3 is on rank 0 too, so micro-batch 0 has come back before the pipeline is full."""
    shows(
        zb_v(2, 3),
        """
        step  rank 0  rank 1
        0     0F0     1F0
        1     0F1     2F0
        2     0F2     1F1
        3     3F0     2F1
        4     3I0     2I0
        5     3W0     1I0
        6     3F1     1W0
        7     3I1     2I1
        8     0I0     1I1
        9     0W0     1W1
        10    0I1     1F2
        11    0W1     2F2
        12    3W1     2W0
        13    3F2     2W1
        14    3I2     2I2
        15    3W2     1I2
        16    0I2     1W2
        17    0W2     2W2
        """,
    )


def test_paci():
    """1F1B of 6 micro-batches, with an optimizer step after every second backward, wherever that is."""
    shows(
        paci(3, window=2, updates=3),
        """
        step  rank 0  rank 1  rank 2
        0     0F0     1F0     2F0
        1     0F1     1F1     2B0
        2     0F2     1B0     2F1
        3     0B0     1F2     2B1
        4     0F3     1B1     2U0
        5     0B1     1U0     2F2
        6     0U0     1F3     2B2
        7     0F4     1B2     2F3
        8     0B2     1F4     2B3
        9     0F5     1B3     2U1
        10    0B3     1U1     2F4
        11    0U1     1F5     2B4
        12    0B4     1B4     2F5
        13    0B5     1B5     2B5
        14    0U2     1U2     2U2
        """,
    )


# ---- what every table has ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_once(name):
    known = SCHEDULES[name]
    for ranks, micro in allowed(name):
        actions = Counter(action for row in table_of(name, ranks, micro) for action in row)
        assert set(actions.values()) == {1}
        indices: dict[tuple[int, str], list[int]] = {}
        for stage, kind, index in sorted(actions):
            indices.setdefault((stage, kind), []).append(index)
        total = list(range(2 * micro if known.asynchronous else micro))
        for stage in range(ranks * known.chunks):
            of = {kind: indices.get((stage, kind), []) for kind in "FBIWU"}
            assert of["F"] == sorted(of["B"] + of["I"]) == total
            assert of["I"] == of["W"]
            assert of["U"] == ([0, 1] if known.asynchronous else [])
        assert known.splits == any(kind == "I" for _, kind in indices)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_where_it_is_said_to_be(name):
    for ranks, micro in allowed(name):
        table = table_of(name, ranks, micro)
        assert homes(table) == dict(enumerate(stage_homes(name, ranks)))
        assert len(stage_homes(name, ranks)) == ranks * SCHEDULES[name].chunks
    assert from_csv(to_csv(table)) == table


def test_placements():
    assert stage_homes("1f1b", 4) == (0, 1, 2, 3)
    assert stage_homes("interleaved", 3) == (0, 1, 2, 0, 1, 2)
    assert stage_homes("interleaved", 2, chunks=3) == (0, 1, 0, 1, 0, 1)
    assert stage_homes("dualpipe-v", 3) == (0, 1, 2, 2, 1, 0)
    assert homes(interleaved(2, 4, chunks=3)) == dict(enumerate(stage_homes("interleaved", 2, chunks=3)))


def most(row: Row, begins: str, ends: str) -> int:
    """Most micro-batches, of all stages of a rank, that are between a kind of `begins` and a kind of `ends`."""
    now = peak = 0
    for action in row:
        now += (action.kind in begins) - (action.kind in ends)
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [2, 4, 8, 16])
def test_in_flight(ranks, micro):
    """From F to B or I; the second column of the table of methods."""
    n, m = ranks, micro
    flight = {
        name: [most(row, "F", "BI") for row in table_of(name, n, m)]
        for name, known in SCHEDULES.items()
        if not known.allows(n, m)
    }
    falling = [min(m, n - r) for r in range(n)]
    assert flight["gpipe"] == [m] * n
    assert flight["1f1b"] == flight["zb-h1"] == falling
    assert flight["async-1f1b"] == flight["paci"] == [min(2 * m, n - r) for r in range(n)]
    assert flight.get("2bw", flight["paci"]) == flight["paci"]
    assert max(flight["zb-h2"]) == min(m, 2 * n - 1)
    if "interleaved" in flight and n > 1:
        assert flight["interleaved"][0] == min(2 * m, 3 * n - 1)
    assert all(most(row, "F", "W") <= n for row in zb_h1(n, m))
    assert all(most(row, "F", "W") <= 2 * n - 1 for row in zb_h2(n, m))
    # In a vee a rank has two stages of half the size: 2 n of them are the memory of n, which is that of 1F1B.
    assert all(most(row, "F", "W") <= 2 * n for row in zb_v(n, m))
    assert all(peak <= 2 * n + 1 for peak in flight.get("dualpipe-v", []))


def test_ahead_is_so_many_more_in_flight():
    """On the first rank; fewer on the later ones, none on the last."""
    assert [most(row, "F", "B") for row in paci(4, window=4, updates=3)] == [4, 3, 2, 1]
    assert [most(row, "F", "B") for row in paci(4, window=4, updates=3, ahead=2)] == [6, 4, 2, 1]
    assert [most(row, "F", "B") for row in paci(4, window=4, updates=3, ahead=3)] == [7, 5, 3, 1]
    assert [most(row, "F", "B") for row in paci(1, window=4, updates=3, ahead=3)] == [1]


def test_asynchronous_tables_are_one_shape():
    assert two_bw(4, 4, 3) == paci(4, 4, 3)
    assert async_1f1b(4, updates=6) == paci(4, window=1, updates=6)
    assert async_1f1b(4, updates_of=2, updates=3) == paci(4, window=2, updates=3)


def test_one_update_is_one_flush():
    """Drained after every update, an asynchronous table is 1F1B."""
    for ranks, micro in product((1, 2, 4), (1, 4, 6)):
        without = tuple(tuple(a for a in row if a.kind != "U") for row in paci(ranks, micro, 1))
        assert without == one_f_one_b(ranks, micro)


def test_interleaved_of_one_chunk_is_1f1b():
    assert interleaved(4, 8, chunks=1) == one_f_one_b(4, 8)


# ---- versions of the weights ---------------------------------------------------------------------------------------

AHEAD = (0, 1, 3)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 8, 11])
def test_version_laws(stages, window):
    """The table read action by action says what the formulas say."""
    updates = 4
    for ahead in AHEAD:
        for stage, row in enumerate(paci(stages, window, updates, ahead)):
            version, forward, drift = 0, {}, []
            for _, kind, index in row:
                if kind == "U":
                    assert index == version
                    version += 1
                elif kind == "F":
                    forward[index] = version
                    assert version == forward_version(index, stage, stages, window, ahead)
                else:
                    assert version == backward_version(index, window)
                    drift.append(version - forward[index])
            assert version == updates
            bound = drift_bound(stage, stages, window, ahead)
            assert min(drift) >= 0 and max(drift) <= bound
            assert bound > 0 or set(drift) == {0}
            if updates > bound + 1:  # the run is long enough to reach it
                assert max(drift) == bound


def test_the_last_stage_never_drifts():
    for stages, window, ahead in product((1, 2, 8), (1, 4), AHEAD):
        assert drift_bound(stages - 1, stages, window, ahead) == 0 == mean_drift(stages - 1, stages, window, ahead)


def test_drift_of_the_paper():
    """ceil((N - i) / a) and (N - i) / a for i from 1 to N; over all stages (N - 1) / 2a."""
    for stages, window in product((1, 4, 8), (1, 3, 8)):
        for i in range(1, stages + 1):
            assert drift_bound(i - 1, stages, window) == math.ceil((stages - i) / window)
            assert mean_drift(i - 1, stages, window) == (stages - i) / window
            assert [forward_version(m, i - 1, stages, window) for m in range(50)] == [
                max(0, m - (stages - i)) // window for m in range(50)
            ]
        assert expected_drift(stages, window) == pytest.approx((stages - 1) / (2 * window))


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 8, 11])
def test_mean_drift_in_the_long_run(stages, window):
    """Exact over every window once the pipeline is full."""
    full = range(40 * window, 41 * window)
    for ahead in AHEAD:
        means = []
        for stage in range(stages):
            drift = [backward_version(k, window) - forward_version(k, stage, stages, window, ahead) for k in full]
            means.append(sum(drift) / window)
            assert means[-1] == pytest.approx(mean_drift(stage, stages, window, ahead))
        assert sum(means) / stages == pytest.approx(expected_drift(stages, window, ahead))


@pytest.mark.parametrize(("ranks", "window"), [(1, 1), (2, 1), (4, 3), (4, 4), (8, 7), (8, 12)])
def test_2bw_needs_two_versions_at_a_time(ranks, window):
    """Whatever is in flight uses the newest version but one, or the newest; both are there when they are wanted."""
    for row in two_bw(ranks, window, 5):
        version = 0
        for _, kind, index in row:
            version += kind == "U"
            if kind != "U":
                assert delayed_version(index, window) in (version - 1, version)


def test_2bw_is_one_update_late():
    assert [delayed_version(k, 3) for k in range(12)] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


# ---- closed forms --------------------------------------------------------------------------------------------------


def test_bubbles_of_the_literature():
    n, m = 4, 8
    assert bubble("gpipe", n, m) == bubble("1f1b", n, m) == pytest.approx((n - 1) / (m + n - 1))
    assert bubble("interleaved", n, m, chunks=3) == pytest.approx((n - 1) / (3 * m + n - 1))
    assert makespan("zb-h1", n, m) - 3 * m == pytest.approx((makespan("1f1b", n, m) - 3 * m) / 3)
    assert bubble("paci", n, m) == bubble("2bw", n, m) == bubble("async-1f1b", n, m) == 0


def test_expected_gain():
    """The table of methods: N = 4 and 8."""
    assert [expected_gain(4, m) for m in (4, 8)] == [1.75, 1.375]
    assert [round(expected_gain(8, m), 3) for m in (4, 8, 16, 64)] == [2.75, 1.875, 1.438, 1.109]
    assert expected_gain(8, 8, slowest=1.5) == pytest.approx((8 / 1.5 + 7) / 8)
    assert expected_gain(1, 5) == 1


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: interleaved(4, 6),
            "interleaved cannot run 6 micro-batches on 4 ranks: micro-batches pass in groups of 4, and 6 leave 2 over; "
            "use 4 or 8",
        ),
        (
            lambda: SCHEDULES["dualpipe-v"].make(4, 7),
            "dualpipe-v cannot run 7 micro-batches on 4 ranks: it fills from both ends and needs at least 8; "
            "zb-v takes fewer",
        ),
        (
            lambda: two_bw(4, 2, 3),
            "2bw cannot run 2 micro-batches on 4 ranks: two versions of the weights do only for a window of 3 or more; "
            "paci takes a shorter one",
        ),
        (
            lambda: gpipe(2, 0),
            "gpipe cannot run 0 micro-batches on 2 ranks: it takes at least one rank and one micro-batch",
        ),
        (lambda: paci(2, 4, 0), "paci with updates=0; it takes at least 1"),
        (lambda: paci(2, 4, 1, ahead=-1), "paci with ahead=-1; 0 is the window of 1F1B, and none is narrower"),
        (lambda: zb_v(2, 4, units=(1, 0, 1)), "zb-v with units of I=0; it takes at least 1"),
        (
            lambda: schedule("1F1B"),
            "no schedule is called '1F1B'; there are gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, dualpipe-v, "
            "async-1f1b, 2bw, paci",
        ),
        (lambda: makespan("mine", 2, 4), "no closed form for a schedule called 'mine'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ScheduleError) as error:
        make()
    assert str(error.value) == message


def test_what_is_not_allowed_is_refused_and_the_rest_made():
    for name, ranks, micro in product(SCHEDULES, (0, 1, 2, 4), (0, 1, 2, 3, 4, 8)):
        if SCHEDULES[name].allows(ranks, micro):
            with pytest.raises(ScheduleError, match=f"^{name} cannot run {micro} micro-batches on {ranks} ranks: "):
                table_of(name, ranks, micro)
        else:
            assert Action(0, "F", 0) in table_of(name, ranks, micro)[0]
