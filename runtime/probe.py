"""A small group of local processes that measure something together, and nothing else: for `autopar calibrate`."""

from __future__ import annotations

import os
import queue
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from autopar.errors import ProfileError
from autopar.reshard import SMALL_EXCHANGE
from autopar.runtime.heap import keep_freed

functional = torch.ops._c10d_functional
PRELOAD = ["autopar.runtime.probe", "torch.distributed"]


@dataclass
class Local:
    """One rank's view: `rank` of `num`, and the queue to the process that started it."""

    rank: int
    num: int
    answers: Any
    _groups: dict[tuple[int, int], dist.ProcessGroup] = field(default_factory=dict)

    def barrier(self) -> None:
        """Wait for every rank; asleep, so that the one who works has the core."""
        dist.barrier()

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""
        box = torch.tensor(value, dtype=torch.float64, device="cpu")
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return float(box)

    def tell(self, text: str, done: float) -> None:
        """Report progress to the starting process; rank 0 only."""
        self.answers.put(("progress", text, done))

    def connect(self) -> None:
        """Make the groups that collectives are measured in; every rank makes all of them, in one order."""
        world = 2
        while world <= self.num:
            group = 2
            while group <= world:
                for first in range(0, world, group):
                    made = dist.new_group(list(range(first, first + group)))
                    if first <= self.rank < first + group:
                        self._groups[group, world] = made
                group *= 2
            world *= 2

    def collective(
        self, kind: str, group: int, world: int, size: int, beside: Callable[[], object] | None = None
    ) -> Callable[[], object]:
        """One functional collective, waited for, of `size` bytes of float32 on the larger side.

        As graphs on gloo do it: a reduce_scatter is an exchange and a sum, and so is a small all_reduce
        (`autopar/passes/exchange.py`). beside: what is done between its start and waiting for it.
        """
        name = self._groups[group, world].group_name
        whole = torch.ones(max(group, size // 4 // group * group))
        piece = torch.ones(len(whole) // group)
        rows, own = [len(piece)] * group, [len(whole)] * group
        starts: dict[str, Callable[[], torch.Tensor]] = {
            "all_reduce": lambda: functional.all_reduce(whole, "sum", name),
            "all_gather": lambda: functional.all_gather_into_tensor(piece, group, name),
            "all_to_all": lambda: functional.all_to_all_single(whole, rows, rows, name),
        }
        summed = kind == "reduce_scatter"
        start = starts["all_to_all" if summed else kind]
        if kind == "all_reduce" and whole.nbytes * group <= SMALL_EXCHANGE:
            summed = True

            def start() -> torch.Tensor:
                return functional.all_to_all_single(whole.repeat(group), own, own, name)

        def run() -> torch.Tensor:
            started = start()
            if beside is not None:
                beside()
            arrived = functional.wait_tensor(started)
            return arrived.view(group, -1).sum(0) if summed else arrived

        return run


def run(
    num: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    progress: Callable[[str, float], None],
    timeout: float,
) -> Any:
    """What `function(local, *args)` returns on rank 0 of `num` fresh processes, one thread each, joined by gloo.

    Raises:
        ProfileError: a process failed, or they took longer than `timeout` seconds.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    answers = context.Queue()
    with tempfile.TemporaryDirectory(prefix="autopar-probe-") as folder:
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            args = (num, folder, answers, function, args, timeout)
            started = mp.start_processes(_main, args, nprocs=num, join=False, start_method="forkserver")
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        assert started is not None
        result, got, waited = None, False, 0.0
        try:
            while not got:
                try:
                    what, *rest = answers.get(timeout=1.0)
                except queue.Empty:
                    waited += 1.0
                    if started.join(timeout=0) or waited > timeout:
                        raise ProfileError(f"no result after {waited:.0f} s; is the machine overloaded?") from None
                    continue
                if what == "progress":
                    progress(*rest)
                else:
                    result, got = rest[0], True
            while not started.join(timeout=5):
                continue
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise ProfileError(f"a measuring process failed: {str(error).strip().splitlines()[-1]}") from None
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
    return result


def _main(
    rank: int, num: int, folder: str, answers: Any, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
) -> None:
    torch.set_num_threads(1)
    keep_freed()  # as compiled modules do
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num, timeout=timedelta(seconds=timeout)
    )
    local = Local(rank, num, answers)
    local.connect()
    result = function(local, *args)
    if rank == 0:
        answers.put(("result", result))
    dist.barrier()
    dist.destroy_process_group()


__all__ = ["Local", "run"]
