"""Tables as text: there and back, and what is said of text that is no table."""

from __future__ import annotations

import doctest
import random

import pytest

from autopar.errors import ScheduleError
from autopar.pipeline import comms, laws, schedules, table
from autopar.pipeline.schedules import one_f_one_b
from autopar.pipeline.table import KINDS, Action, excerpt, from_csv, grid, homes, to_csv

pytestmark = pytest.mark.tiny


def test_parse_is_the_inverse_of_str():
    rng = random.Random(0)
    for _ in range(300):
        action = Action(rng.randrange(200), rng.choice(KINDS), rng.randrange(5000))
        assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "0F", "0X1", "0F-1", "-1F0", "0 F 1", "0FB1", "0f1"])
def test_what_is_no_action(text):
    with pytest.raises(ScheduleError, match="write stage, kind and micro-batch, such as 2F0"):
        Action.parse(text)


def test_csv_there_and_back():
    made = one_f_one_b(3, 4)
    assert from_csv(to_csv(made)) == made
    assert to_csv(made).splitlines()[2] == "2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3"


def test_csv_with_empty_cells_and_blanks():
    """As a spreadsheet writes it: rows of one length, and a column for every unit of time."""
    assert from_csv("0F0,,,0B0\n, 1F0 ,1B0,\n") == from_csv("0F0,0B0\n1F0,1B0\n")


def test_csv_says_which_cell():
    with pytest.raises(ScheduleError, match=r"^rank 1, cell 2: cannot read action '1Q0'"):
        from_csv("0F0,0B0\n1F0,1B0,1Q0\n")


def test_homes():
    assert homes(from_csv("0F0,3F0\n1F0,2F0\n")) == {0: 0, 1: 1, 2: 1, 3: 0}
    assert list(homes(from_csv("1F0\n0F0\n"))) == [0, 1]


def test_a_stage_has_one_home():
    with pytest.raises(ScheduleError) as error:
        homes(from_csv("0F0,0B0\n1F0,0B1,1B0\n"))
    assert str(error.value) == (
        "rank 1 step 1: 0B1 is of stage 0, which lives on rank 0; a stage has its weights on one rank\n"
        "  step  rank 0  rank 1\n"
        "  0     0F0     1F0\n"
        "  1     0B0     >>0B1<<  <-- here\n"
        "  2             1B0"
    )


def test_stages_without_a_gap():
    with pytest.raises(ScheduleError, match="stage 1 is in no row, but stage 2 is; stages are counted from 0"):
        homes(from_csv("0F0\n2F0\n"))


def test_grid_of_some_steps():
    assert grid(one_f_one_b(2, 3), {1: 2}, first=1, last=3).splitlines() == [
        "step  rank 0  rank 1",
        "1     0F1     1B0",
        "2     0B0     >>1F1<<",
    ]


def test_an_excerpt_leaves_out_what_is_far():
    shown = excerpt(one_f_one_b(2, 8), {0: 1, 1: 9}, around=1)
    assert shown.splitlines() == [
        "  step  rank 0   rank 1",
        "  0     0F0      1F0",
        "  1     >>0F1<<  1B0      <-- here",
        "  2     0B0      1F1",
        "  ...",
        "  8     0B3      1F4",
        "  9     0F5      >>1B4<<  <-- here",
        "  10    0B4      1F5",
        "  ...",
    ]


def test_an_excerpt_of_a_wide_table_shows_the_neighbours():
    head = excerpt(one_f_one_b(40, 2), {20: 0}).splitlines()[0]
    assert head.split() == ["step", *(word for r in range(16, 24) for word in ("rank", str(r)))]


@pytest.mark.parametrize("module", [comms, laws, schedules, table])
def test_the_examples_in_docstrings(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed
