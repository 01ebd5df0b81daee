"""The first failure of a pipeline, told to every rank, so that none of them waits for what will not come.

A rank that fails alone would leave the others waiting, and what they see in the end, a closed connection, is the wrong
reason. So it writes what happened in the store of the process group, and stays until the others have read it. On every
rank a thread looks there a few times a second while a row runs. When it finds something it closes the connections of
the rank, which ends whatever the rank waits for; and closed connections end what its neighbours wait for in their turn,
even if the store is lost.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist

from autopar.errors import PipelineError
from autopar.runtime.handshake import ranks_text

LOOK = 0.2  # seconds between two looks at the store
MOMENT = 0.5  # seconds that a rank with a broken connection waits for the reason
GRACE = 3.0  # seconds that the first to fail stays for the others to read, at most
_NAPS = (1e-3, 2e-2)  # seconds between two looks of a rank that does nothing else: at first, and at most


class Failure(NamedTuple):
    """What a rank writes when it fails. `step`: of its row; the length of the row when that was done."""

    rank: int
    step: int
    text: str


class Alarm:
    """One rank's ear. All ranks of a process group share what is heard, and it stays heard: a group fails once.

    Attributes:
        heard: the first failure, once it is known here.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.heard: Failure | None = None
        self._store = dist.PrefixStore("autopar.pipeline", group.get_group_store())
        self._answered = False
        self._lock = threading.Lock()
        self._ear: _Ear | None = None

    def exchange(self, text: str, timeout: float) -> list[str]:
        """Everybody's text, by rank. A collective call.

        Raises:
            PipelineError: a rank did not come within `timeout` seconds, or has failed.
        """
        try:
            number = self._store.add(f"calls/{self.rank}", 1)
            keys = [f"text/{number}/{rank}" for rank in range(self.size)]
            self._store.set(keys[self.rank], text)
            self._await(keys, timeout)
            return [self._store.get(key).decode() for key in keys]
        except RuntimeError as error:
            if isinstance(error, PipelineError):
                raise
            raise PipelineError(
                f"rank {self.rank}: the store of the process group does not answer; the process that keeps it has "
                f"ended or cannot be reached ({str(error).splitlines()[0]})"
            ) from error

    def _await(self, keys: list[str], timeout: float) -> None:
        began, nap = time.monotonic(), _NAPS[0]
        while not self._store.check(keys):
            self.look()
            if self.heard is not None:
                raise PipelineError(f"rank {self.rank}: stopped before its first action; {self.heard.text}")
            if time.monotonic() - began > timeout:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise PipelineError(
                    f"rank {self.rank}: {ranks_text(missing)} of {self.size} did not come to the start of the pipeline "
                    f"within {timeout:g} s; every rank of it has to run its row: see their own output, or pass a "
                    "larger timeout"
                )
            time.sleep(nap)
            nap = min(2 * nap, _NAPS[1])

    def tell(self, failure: Failure) -> Failure:
        """Write down that this rank has failed; the first failure, which may be another's."""
        try:
            self._store.compare_set("first", "", json.dumps(failure))
            self.look()
        except RuntimeError:  # the store is gone, with the process that kept it: the others see closed connections
            self.heard = self.heard or failure
        assert self.heard is not None
        return self.heard

    def look(self) -> Failure | None:
        """See whether a rank has failed; if so, let it know that it was heard here. Raises what the store does."""
        with self._lock:
            if self.heard is None and self._store.check(["first"]):
                self.heard = Failure(*json.loads(self._store.get("first")))
            if self.heard is not None and not self._answered:
                self._answered = True
                self._store.add("answers", 1)
        return self.heard

    def first(self, seconds: float) -> Failure | None:
        """The first failure, waited for this long."""
        deadline = time.monotonic() + seconds
        while self.heard is None:
            try:
                self.look()
            except RuntimeError:
                return self.heard
            if self.heard is None:
                if time.monotonic() > deadline:
                    return None
                time.sleep(_NAPS[1])
        return self.heard

    def stay(self, seconds: float = GRACE) -> None:
        """Wait until every rank has heard of the failure, or until it is clear that one does not listen.

        Of use to the rank that failed, and to the one whose process may keep the store; others need not stay.
        """
        if self.heard is None or (self.heard.rank != self.rank and dist.get_rank() != 0):
            return
        deadline = time.monotonic() + seconds
        try:
            while self._store.add("answers", 0) < self.size and time.monotonic() < deadline:
                time.sleep(_NAPS[1])
        except RuntimeError:
            return  # nobody can read any more

    @contextmanager
    def listening(self, stop: Callable[[], None]) -> Iterator[None]:
        """Look now and then while the body runs, and call `stop` (in another thread) if a rank has failed."""
        if self._ear is None:
            self._ear = _Ear(self.look)
            weakref.finalize(self, self._ear.end)
        self._ear.stop = stop
        self._ear.busy.set()
        try:
            yield
        finally:
            self._ear.busy.clear()
            self._ear.stop = None


class _Ear:
    """The thread that listens. It lives as long as its alarm: to start one for every run costs two switches of tasks.

    Between runs it sleeps, and holds on to nothing else. `look`: tells whether something was heard.
    """

    def __init__(self, look: Callable[[], Failure | None]) -> None:
        self.stop: Callable[[], None] | None = None
        self.busy, self._over = threading.Event(), threading.Event()
        self._look = weakref.WeakMethod(look)
        self._thread = threading.Thread(target=self._listen, name="autopar-alarm", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        over = False
        while not over:
            self.busy.wait()
            over = self._over.wait(LOOK) or self._heard()

    def _heard(self) -> bool:
        """Whether there is nothing more to listen for."""
        look, stop = self._look(), self.stop
        if look is None or stop is None:  # nobody runs
            return False
        try:
            heard = look()
        except RuntimeError:
            return True  # no store, no news; a rank that has ended well may have kept it, so nothing has failed yet
        if heard is not None:
            stop()
        return heard is not None

    def end(self) -> None:
        """Let the thread end, and wait for that as long as a store takes to answer."""
        self._over.set()
        self.busy.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(MOMENT)


__all__ = ["Alarm", "Failure"]
