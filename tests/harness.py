"""N gloo ranks, started once, that run many test cases.

    ranks = Ranks(4)
    results = ranks.run(function, *args)      # [result of rank 0, ...]; raises RanksError if any rank raised
    results = ranks.outcomes(function, *args) # the same, but a rank that raised gives a Failure in its place
    ranks.close()

`function` and its arguments are pickled: a module-level function of a test module, with plain data or tensors. It runs
in a process where torch.distributed (gloo) is initialised, with one thread and the rank's number from
`torch.distributed.get_rank()`. A case never hangs: past its time, or some seconds after a rank has failed or died while
others are still busy, every rank is stopped, the stacks they stood in are reported, and the next case starts new ones.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

#: Seconds that the other ranks get to end a case after one of them has failed.
GRACE = 20.0
#: Imported once by the process from which every rank is forked.
PRELOAD = ["torch", "torch.distributed", "torch.distributed.tensor", "torch.export", "transformers"]


@dataclass(frozen=True)
class Failure:
    """What a rank raised: name of the exception's class, its message, and a short traceback."""

    kind: str
    message: str
    trace: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.trace}".rstrip()


class RanksError(AssertionError):
    """At least one rank failed; the message shows each of them."""


class Ranks:
    """A group of `num` processes that stay up between cases; also a context manager."""

    def __init__(self, num: int, timeout: float = 120.0):
        self.num, self.timeout = num, timeout
        self._workers: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Results of `function(*args)` by rank.

        Raises:
            RanksError: a rank raised, died, or ran out of time.
        """
        results = self.outcomes(function, *args, timeout=timeout)
        failed = [(rank, r) for rank, r in enumerate(results) if isinstance(r, Failure)]
        if failed:
            raise RanksError("\n".join(f"--- rank {rank} of {self.num}: {failure}" for rank, failure in failed))
        return results

    def failures(self, function: Callable[..., Any], *args: Any, timeout: float = 90) -> list[str]:
        """`Type: message` by rank, of a function that fails on every one."""
        out = self.outcomes(function, *args, timeout=timeout)
        assert all(isinstance(o, Failure) for o in out), out
        return [f"{o.kind}: {o.message}" for o in out]

    def outcomes(self, function: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        """Results by rank, with a `Failure` in place of what a rank could not return."""
        if not self._workers:
            self._start()
        message = pickle.dumps((function, args))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        results: dict[int, Any] = {}
        limit = timeout or self.timeout
        deadline, failed = time.monotonic() + limit, False
        while len(results) < self.num:
            waiting = {self._pipes[r]: r for r in range(self.num) if r not in results}
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._abandon(
                    results,
                    f"no answer after {GRACE:.0f} s since another rank failed"
                    if failed
                    else f"no answer in {limit:.0f} s",
                )
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                results[rank] = self._receive(rank)
                if isinstance(results[rank], Failure) and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        if any(isinstance(r, Failure) and r.kind == "ProcessDied" for r in results.values()):
            self._stop()
        return [results[r] for r in range(self.num)]

    def close(self) -> None:
        """End every rank."""
        for pipe in self._pipes:
            try:
                pipe.send_bytes(pickle.dumps(None))
            except OSError:
                continue  # already gone
        for worker in self._workers:
            worker.join(timeout=5)
        self._stop()

    def _start(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # before the fork server imports torch
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory(prefix="autopar-ranks-")
        for rank in range(self.num):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_serve, args=(theirs, rank, self.num, self._folder.name, list(sys.path)), daemon=True
            )
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)
        for rank in range(self.num):
            answer = self._receive(rank) if self._pipes[rank].poll(120) else Failure("TimeoutError", "did not start")
            if isinstance(answer, Failure):
                self._stop()
                raise RanksError(f"rank {rank} of {self.num} did not start: {answer}")

    def _receive(self, rank: int) -> Any:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._workers[rank].join(timeout=5)
            return Failure("ProcessDied", f"exit code {self._workers[rank].exitcode}", self._log(rank))

    def _log(self, rank: int) -> str:
        path = Path(self._folder.name, f"rank{rank}.log") if self._folder else None
        return path.read_text(errors="replace")[-3000:] if path and path.exists() else ""

    def _abandon(self, results: dict[int, Any], why: str) -> None:
        late = [r for r in range(self.num) if r not in results]
        for rank in late:
            os.kill(self._workers[rank].pid, signal.SIGUSR1)  # writes the stack to the log
        time.sleep(0.5)
        for rank in late:
            results[rank] = Failure("TimeoutError", why, self._log(rank))
        self._stop()

    def _stop(self) -> None:
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
            worker.join(timeout=5)
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._workers, self._pipes, self._folder = [], [], None


def _serve(pipe: connection.Connection, rank: int, num: int, folder: str, path: list[str]) -> None:
    sys.path[:] = path
    log = open(Path(folder, f"rank{rank}.log"), "w", buffering=1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num)
    pipe.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)  # the parent is gone
        except BaseException as error:  # a case that cannot be unpickled here is that case's failure
            pipe.send_bytes(pickle.dumps(_failure(error)))
            continue
        if message is None:
            dist.destroy_process_group()
            os._exit(0)
        function, args = message
        torch.manual_seed(0)
        try:
            answer = pickle.dumps(function(*args))
        except BaseException as error:  # reported to the parent, whatever it is
            answer = pickle.dumps(_failure(error))
        pipe.send_bytes(answer)


def _failure(error: BaseException) -> Failure:
    lines = traceback.format_exception(error, limit=-8)
    return Failure(type(error).__name__, str(error), "".join(lines)[-4000:])
