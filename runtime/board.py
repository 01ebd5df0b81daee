"""A notice board in shared memory, on which the ranks of one machine read each other's rows.

A message between processes costs two system calls and a switch of tasks, and every step exchanges a row with every
rank. Here a rank writes its row, and reads the others' when it needs them; by then they are there as a rule.

Layout, in 64-bit words: two slots, in each of them one line for every rank: number of the exchange, length of the row,
the row, a hash of all that. The hash makes half-written lines visible without memory barriers. Two slots are enough:
who writes exchange n + 2 has read exchange n + 1 of everybody, and who wrote that had read exchange n.

A rank that dies is noticed by a lock on the file that every rank holds on its own byte, which the system takes from the
dead; one that fails leaves a mark.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

#: Integers in a row.
CAPACITY = 6
_LINE = 16  # words: two cache lines
_LEFT = -1  # in place of the number of an exchange: the rank has given up
_NAPS = (2e-5, 5e-4)  # seconds between two looks: at first, and at most
_CHECK = 0.2  # seconds between two looks at the locks

Rows = list[list[int]]


class Board:
    """One rank's view of the board. Every rank makes the same exchanges in the same order."""

    def __init__(self, file: int, rank: int, size: int, timeout: float) -> None:
        """`file`: descriptor of the shared file, of `bytes_of(size)`, that this process opens only here.

        It stays open, and this rank's byte of it locked.
        """
        self.rank, self.size, self.timeout = rank, size, timeout
        self._file = file
        self._words = memoryview(mmap.mmap(file, bytes_of(size))).cast("q")
        self._number = 0
        self._unread: Callable[[], Rows] | None = None
        self._lost = ""
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def post(self, row: Sequence[int]) -> Callable[[], Rows]:
        """Write this rank's row, of at most `CAPACITY` integers; the function waits for everybody's, by rank.

        Raises:
            RuntimeError: (there or here) a rank has stopped, or did not come within the timeout. Nothing can be
                exchanged any more then, on any rank.
        """
        if len(row) > CAPACITY:
            raise ValueError(f"a row of {len(row)} integers; the board has room for {CAPACITY}")
        if self._unread is not None:  # its slot may only be written again when it was read
            self._unread()
        self._alive()
        self._number += 1
        number, read = self._number, Rows()
        self._write(number, row)

        def answer() -> Rows:
            if not read:
                read.extend(self._read(number, len(row)))
                self._unread = None
            return read

        self._unread = answer
        return answer

    def _write(self, number: int, row: Sequence[int]) -> None:
        line = (number, len(row), *row)
        at = self._at(number, self.rank)
        self._words[at : at + len(line) + 1] = array("q", (*line, hash(line)))  # type: ignore[assignment]

    def _at(self, number: int, rank: int) -> int:
        return (number % 2 * self.size + rank) * _LINE

    def _read(self, number: int, count: int) -> Rows:
        self._alive()
        nap, began = _NAPS[0], time.monotonic()
        look = began + _CHECK
        rows: Rows = []
        while len(rows) < self.size:
            at = self._at(number, len(rows))
            head, length, *line = self._words[at : at + _LINE].tolist()
            row = line[: min(length, CAPACITY)]
            if head == number and line[len(row)] == hash((number, length, *row)):
                if length != count:
                    self._give_up(f"connection closed: rank {len(rows)} does something else meanwhile")
                rows.append(row)
                continue
            now = time.monotonic()
            if now > look:
                look = now + _CHECK
                self._look(number, len(rows), now - began)
            time.sleep(nap)
            nap = min(2 * nap, _NAPS[1])
        return rows

    def _look(self, number: int, rank: int, waited: float) -> None:
        """Give up if `rank` will not come."""
        why = ""
        if any(self._words[self._at(n, rank)] == _LEFT for n in (0, 1)):
            why = f"connection closed by rank {rank}"
        elif self._gone(rank) and self._words[self._at(number, rank)] != number:  # not if it wrote before it went
            why = f"connection lost: rank {rank} has stopped"
        elif waited > self.timeout:
            why = f"timed out after {self.timeout:g} s waiting for rank {rank}"
        if why:
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        self._lost = why
        for slot in (0, 1):
            self._words[self._at(slot, self.rank)] = _LEFT
        self._alive()

    def _gone(self, rank: int) -> bool:
        """Whether the process holds its lock no longer."""
        if rank == self.rank:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def _alive(self) -> None:
        if self._lost:
            raise RuntimeError(self._lost)


def bytes_of(size: int) -> int:
    """Bytes of the board of `size` ranks."""
    return 2 * size * _LINE * 8


def share(control: dist.ProcessGroup, timeout: float) -> Board | None:
    """The board of the ranks of a gloo group; None if they do not all see one file. A collective call.

    They do not if they are on several machines, or if there is nowhere to write; then messages do as well.
    """
    rank, size = dist.get_rank(control), control.size()
    box: list[Any] = [None]
    board: Board | None = None
    path = ""
    try:
        if rank == 0:
            folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
            with contextlib.suppress(OSError):  # no room, or no right to write
                file, path = tempfile.mkstemp(prefix="autopar-", dir=folder)
                token = secrets.token_bytes(16)
                os.write(file, token + bytes(bytes_of(size) - len(token)))  # all of it, so that it has its room
                board = Board(file, rank, size, timeout)
                box[0] = (path, token)
        dist.broadcast_object_list(box, group=control, group_src=0)
        if rank != 0 and box[0] is not None:
            with contextlib.suppress(OSError):  # on another machine
                board = _joined(box[0][0], box[0][1], rank, size, timeout)
        found: list[Any] = [None] * size
        dist.all_gather_object(found, board is not None, group=control)
    finally:
        if path:
            os.unlink(path)
    return board if all(found) else None


def _joined(path: str, token: bytes, rank: int, size: int, timeout: float) -> Board | None:
    """The board in this file, if it is the same file and not one of the same name.

    Its first words are a random token until somebody writes there, which nobody does before all have looked.
    """
    file = os.open(path, os.O_RDWR)
    return Board(file, rank, size, timeout) if os.pread(file, len(token), 0) == token else None


__all__ = ["CAPACITY", "Board", "bytes_of", "share"]
