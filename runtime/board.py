"""A notice board in shared memory, on which the ranks of one machine read each other's rows.

A message between processes costs two system calls and a switch of tasks, and every step exchanges a row with every
rank. Here a rank writes its row, and reads the others' when it needs them; by then they are there as a rule.

Layout, in 64-bit words: two slots, in each of them one line for every rank: number of the exchange, the row, a hash of
both. The hash makes half-written lines visible without memory barriers. Two slots are enough: who writes exchange n + 2
has read exchange n + 1 of everybody, and who wrote that had read exchange n.

A rank that dies is noticed by a lock on the file that every rank holds on its own byte, which the system takes from the
dead; one that fails leaves a mark.
"""

from __future__ import annotations

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
        line = (number, *row)
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
            line = self._words[at : at + count + 2].tolist()
            if line[0] == number and line[-1] == hash(tuple(line[:-1])):
                rows.append(line[1:-1])
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
    """The board of the ranks of a gloo group; None if they are not all on one machine. A collective call."""
    rank, size = dist.get_rank(control), control.size()
    box: list[Any] = [None]
    file, path = -1, ""
    if rank == 0:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        file, path = tempfile.mkstemp(prefix="autopar-", dir=folder)
        box[0] = (path, secrets.token_bytes(16))
        os.write(file, box[0][1])
        os.ftruncate(file, bytes_of(size))
    try:
        dist.broadcast_object_list(box, group=control, group_src=0)
        place, token = box[0]
        if rank != 0:
            try:
                file = os.open(place, os.O_RDWR)
            except OSError:
                file = -1  # on another machine
        # The same file, not one of the same name: its first words are a random token until somebody writes there.
        seen = file >= 0 and os.pread(file, len(token), 0) == token
        board = Board(file, rank, size, timeout) if seen else None  # locked before anybody looks
        found: list[Any] = [None] * size
        dist.all_gather_object(found, seen, group=control)
    finally:
        if path:
            os.unlink(path)
    return board if all(found) else None


__all__ = ["CAPACITY", "Board", "bytes_of", "share"]
