"""What the executor itself costs, alone and beside the same messages by hand: the part `cost` of `pipeline.py`."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from pipeline_schedules import SMALL, TIMEOUT, stages_of
from rich import box
from rich.table import Table as Printed

from autopar.pipeline.comms import with_comms
from autopar.pipeline.schedules import one_f_one_b, zb_h1
from autopar.pipeline.table import Action, Table, homes
from autopar.runtime.executor import Executor
from autopar.runtime.transport import GroupTransport
from autopar.runtime.work import Form

BARE = 1.10
MANY = 32  # micro-batches of a run whose cost is measured
LARGE = Form(torch.float32, (1 << 18,))  # 1 MB


def per_action(table: Table, repeats: int) -> float:
    """Microseconds an action of a table of one rank; the least of the repeats, since other programs only add."""
    executor = Executor(table, 0, stages_of(table, 0, 0.0))
    executor.run()
    gc.collect()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        executor.run()
        times.append((time.perf_counter() - began) / len(table[0]) * 1e6)
    return min(times)


def alone() -> dict[str, Table]:
    """Tables of one rank, with words."""
    both = ((0, "F"), (1, "F"), (1, "B"), (0, "B"))
    handing = tuple(Action(stage, kind, micro) for micro in range(500) for stage, kind in both)
    return {
        "1f1b, one stage": one_f_one_b(1, 1000),
        "zb-h1, one stage": zb_h1(1, 700),
        "two stages that hand over": (handing,),
    }


def bare(table: Table, rank: int, form: Form) -> Callable[[], None]:
    """The messages of a row in its order by hand; every receive has memory of its own, for it is used later."""
    home, group = homes(table), dist.group.WORLD
    out = torch.zeros(form.shape, dtype=form.dtype)
    limit = timedelta(seconds=TIMEOUT)
    plan: list[tuple[str, object, int]] = []
    for stage, kind, index in table[rank]:
        ahead = kind in ("SF", "RB")
        if kind in ("SF", "SB", "RF", "RB"):
            peer = home[stage + 1 if ahead else stage - 1]
            plan.append((kind[0], (stage, kind[1], index), peer))
        elif kind in ("F", "B", "I"):
            far = home.get(stage - 1 if kind == "F" else stage + 1, rank)
            if far != rank:
                plan.append(("wait", (stage, "F" if kind == "F" else "B", index), far))

    def run() -> None:
        sends, posted = [], {}
        for what, key, peer in plan:
            if what == "S":
                sends.append(dist.isend(out, group=group, group_dst=peer))
            elif what == "R":
                arrives = torch.empty(form.shape, dtype=form.dtype)
                posted[key] = arrives, dist.irecv(arrives, group=group, group_src=peer)
            else:
                posted.pop(key)[1].wait(limit)
        for send in sends:
            send.wait(limit)

    return run


def beside(table: Table, form: Form, turns: int) -> tuple[float, float, float]:
    """(ratio, milliseconds of the executor, of the bare loop) of one run of the table on all ranks."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    executor = Executor(table, rank, stages_of(table, rank, 0.0, form), GroupTransport(group), timeout=TIMEOUT)
    sides = {"ours": executor.run, "bare": bare(table, rank, form)}
    for side in sides.values():
        side()
    times = {name: torch.zeros(turns, dtype=torch.float64) for name in sides}
    gc.collect()
    gc.disable()
    for turn in range(turns):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            dist.barrier()
            began = time.perf_counter()
            sides[name]()
            times[name][turn] = time.perf_counter() - began
    gc.enable()
    for values in times.values():
        dist.all_reduce(values, dist.ReduceOp.MAX)  # a run is over when the last rank is
    ratio = statistics.median((times["ours"] / times["bare"]).tolist())
    ours, by_hand = (statistics.median(times[name].tolist()) * 1e3 for name in ("ours", "bare"))
    return ratio, ours, by_hand


@dataclass(frozen=True)
class Cost:
    """The executor beside a bare loop. Milliseconds a run."""

    ranks: int
    table: str
    message: str
    ratio: float
    ours_ms: float
    bare_ms: float


def compare(turns: int, say: Callable[[str], object]) -> list[Cost]:
    """The executor beside the bare loop, with small messages and large ones, on all ranks."""
    count = dist.get_world_size()
    table = with_comms(one_f_one_b(count, MANY))
    found = []
    for words, form in (("4 kB", SMALL), ("1 MB", LARGE)):
        found.append(Cost(count, "1f1b", words, *beside(table, form, turns)))
        say(f"  beside a bare loop, {words}: {found[-1].ratio:.3f}")
    return found


def costs_table(costs: list[Cost]) -> Printed:
    """One line for every comparison with a bare loop."""
    out = Printed(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("N", "table", "message", "executor ms", "bare ms", "ratio", ""):
        out.add_column(name, justify="left" if name in ("table", "message", "") else "right")
    for c in costs:
        numbers = (f"{c.ours_ms:.1f}", f"{c.bare_ms:.1f}", f"{c.ratio:.3f}")
        out.add_row(str(c.ranks), c.table, c.message, *numbers, "good" if c.ratio <= BARE else "BAD")
    return out
