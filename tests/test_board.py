"""The board in shared memory: what is written is read, once and whole; and who does not come is named."""

from __future__ import annotations

import multiprocessing
import os
import tempfile

import pytest
import torch.distributed as dist

from autopar.runtime import board, groups
from autopar.runtime.board import CAPACITY, Board, bytes_of
from tests.harness import Ranks


def opened(path: str, rank: int, size: int = 2, timeout: float = 5.0) -> Board:
    return Board(os.open(path, os.O_RDWR), rank, size, timeout)


@pytest.fixture
def path():
    file, path = tempfile.mkstemp()
    os.ftruncate(file, bytes_of(2))
    yield path
    os.close(file)
    os.unlink(path)


def test_everybody_reads_everything(path):
    a, b = opened(path, 0), opened(path, 1)
    for i in range(7):
        row = [i, -i, 1 << 62][: 1 + i % 3]
        first, second = a.post(row), b.post([-(1 << 63)] * len(row))
        assert first() == second() == first() == [row, [-(1 << 63)] * len(row)]


def test_an_answer_that_nobody_read_is_read_before_its_slot_is_used_again(path):
    a, b = opened(path, 0), opened(path, 1)
    answers = []
    for i in range(6):
        answers.append((a.post([i]), b.post([10 + i])))
    assert [[f() for f in pair] for pair in answers] == [[[[i], [10 + i]]] * 2 for i in range(6)]


def test_rows_have_a_length(path):
    with pytest.raises(ValueError, match=f"a row of {CAPACITY + 1} integers"):
        opened(path, 0).post([0] * (CAPACITY + 1))


def test_a_line_that_is_half_written_is_not_taken(path):
    a, b = opened(path, 0, timeout=0.5), opened(path, 1)
    b.post([7, 8])
    b._words[b._at(1, 1) + 2] = 9
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 s waiting for rank 1"):
        a.post([7, 8])()


def test_rows_of_other_lengths_are_an_error_at_once(path):
    a, b = opened(path, 0, timeout=600), opened(path, 1, timeout=600)
    answer, other = a.post([1, 2]), b.post([1])
    with pytest.raises(RuntimeError, match="connection closed: rank 1 does something else"):
        answer()
    with pytest.raises(RuntimeError, match="connection closed"):
        other()


def test_who_gives_up_is_heard_and_nothing_works_any_more(path, monkeypatch):
    monkeypatch.setattr(Board, "_gone", lambda self, rank: False)  # one process here holds the locks of both
    a, b = opened(path, 0, timeout=0.4), opened(path, 1, timeout=60)
    answer = a.post([1])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="timed out"):
            answer()
    with pytest.raises(RuntimeError, match="timed out"):
        a.post([2])
    with pytest.raises(RuntimeError, match="connection closed by rank 0"):
        b.post([1])()


def _one_exchange(path: str, ready) -> None:
    other = opened(path, 1)
    ready.set()
    other.post([5])()
    os._exit(1)


def test_a_rank_that_dies_is_noticed_though_what_it_wrote_counts(path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_one_exchange, args=(path, ready))
    process.start()  # not joined before the end: a process that is dead but not buried still has its number
    assert ready.wait(30)
    mine = opened(path, 0, timeout=600)
    assert mine.post([4])() == [[4], [5]]
    with pytest.raises(RuntimeError, match="connection lost: rank 1 has stopped"):
        mine.post([6])()
    process.join()


def one_board():
    grid = groups.connect("dp=2", groups.torch.device("cpu"))
    assert grid.board is not None and groups.connect("dp=2", groups.torch.device("cpu")).board is grid.board
    return grid.board.post([dist.get_rank() + 5])()


def other_machine():
    """Rank 1 does not see the file."""
    opens = os.open
    if dist.get_rank() == 1:
        os.open = lambda *args: opens("/nowhere", *args[1:])
    try:
        return board.share(dist.group.WORLD, 5.0)
    finally:
        os.open = opens


def no_room():
    """Rank 0 cannot write."""
    write = os.write
    if dist.get_rank() == 0:
        os.write = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        return board.share(dist.group.WORLD, 5.0)
    finally:
        os.write = write


def test_shared_by_ranks_of_one_machine_only():
    before = {f for f in os.listdir("/dev/shm") if f.startswith("autopar-")} if os.path.isdir("/dev/shm") else set()
    with Ranks(2) as ranks:
        assert ranks.run(one_board) == [[[5], [6]]] * 2
        assert ranks.run(other_machine) == [None, None]
        assert ranks.run(no_room) == [None, None]
    if before or os.path.isdir("/dev/shm"):
        assert {f for f in os.listdir("/dev/shm") if f.startswith("autopar-")} <= before
