"""Stages that sleep, and how busy schedules keep them: the part `schedules` of `pipeline.py`."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table as Printed
from torch import Tensor

from autopar.pipeline import clock, laws
from autopar.pipeline.clock import Costs, Timeline
from autopar.pipeline.comms import with_comms
from autopar.pipeline.schedules import SCHEDULES
from autopar.pipeline.table import Row, Table, homes
from autopar.runtime.executor import Executor
from autopar.runtime.transport import GroupTransport
from autopar.runtime.work import Form, Forms

NEAR = 0.05
OVERSHOOT = 0.01
UNITS = (0.05, 0.06, 0.08, 0.1)  # seconds
TIMEOUT = 60.0
SMALL = Form(torch.float32, (1024,))  # 4 kB
#: Seconds of an action, in units.
UNITS_OF = {"F": 1, "B": 2, "I": 1, "W": 1, "U": 0}
NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v", "paci")


class Sleeper:
    """A stage that sleeps and sends a message of one form both ways. A unit of 0 seconds: it does nothing."""

    def __init__(self, stage: int, last: int, unit: float, form: Form = SMALL) -> None:
        self.receives_forward: Forms = (form,) if stage else ()
        self.sends_forward: Forms = (form,) if stage < last else ()
        self.receives_backward, self.sends_backward = self.sends_forward, self.receives_forward
        self._unit = unit
        self._forward = [torch.zeros(f.shape, dtype=f.dtype) for f in self.sends_forward]
        self._back = [torch.zeros(f.shape, dtype=f.dtype) for f in self.sends_backward]

    def _sleep(self, units: int) -> None:
        if self._unit:
            time.sleep(self._unit * units)

    def forward(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        self._sleep(UNITS_OF["F"])
        return self._forward

    def backward(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        self._sleep(UNITS_OF["B"])
        return self._back

    def input_grads(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        self._sleep(UNITS_OF["I"])
        return self._back

    def weight_grads(self, micro: int) -> None:
        self._sleep(UNITS_OF["W"])

    def update(self, number: int) -> None:
        """Takes no time."""


def stages_of(table: Table, rank: int, unit: float, form: Form = SMALL) -> dict[int, Sleeper]:
    """The stages of one rank."""
    home = homes(table)
    return {stage: Sleeper(stage, max(home), unit, form) for stage in home if home[stage] == rank}


def cases(ranks: int, micros: list[int]) -> list[tuple[str, int, Table]]:
    """(schedule, m, table with messages) of all that can be run; of PACI several windows of m."""
    found = []
    for name in NAMES:
        known = SCHEDULES[name]
        for m in micros:
            if known.allows(ranks, m):
                continue
            table = known.make(ranks, m, -(-6 * ranks // m)) if known.asynchronous else known.make(ranks, m)
            found.append((name, m, with_comms(table)))
    return found


def work_of(row: Row) -> int:
    """Units of work in a row."""
    return sum(UNITS_OF.get(action.kind, 0) for action in row)


def predicted(table: Table) -> Timeline:
    """The timeline in units, as fractions."""
    one = Fraction(1)
    costs = Costs.even(len(homes(table)), forward=one, input_grad=one, weight_grad=one)
    return clock.run(table, costs)


def utilisation(timeline: Timeline, table: Table, unit: float = 1.0) -> float:
    """Units of work in the table over ranks x makespan; what sleeps are too long counts as waiting."""
    return float(sum(map(work_of, table)) * unit / (len(table) * timeline.makespan))


def steady(timeline: Timeline, unit: float = 1.0) -> float:
    """The same between stage 0's first backward and its last forward. Actions cut by an end count in part."""
    first = timeline.spans[0]
    begin = next(s.start for s in first if s.action.kind == "B")
    end = [s.start for s in first if s.action.kind == "F"][-1]
    work = 0.0
    for row in timeline.spans:
        for action, start, stop in row:
            units = UNITS_OF.get(action.kind, 0)
            inside = min(stop, end) - max(start, begin)
            if units and inside > 0:
                work += unit * units * float(inside / (stop - start))
    return work / (len(timeline.spans) * float(end - begin))


@dataclass(frozen=True)
class Measured:
    """One schedule on some ranks. Utilisations; `formula` is None for PACI from the end of its fill."""

    ranks: int
    name: str
    micro: int
    expected: float
    formula: float | None
    measured: float
    seconds: float

    @property
    def ratio(self) -> float:
        return self.measured / self.expected


def measure(name: str, micro: int, table: Table, unit: float) -> Measured:
    """Run one table of sleeping stages; the same result on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    executor = Executor(table, rank, stages_of(table, rank, unit), GroupTransport(group), timeout=TIMEOUT, record=True)
    executor.run()
    rows = [None] * ranks
    dist.all_gather_object(rows, executor.spans)
    timeline = Timeline(tuple(tuple(row) for row in rows if row is not None))
    model = predicted(table)
    if SCHEDULES[name].asynchronous:
        return Measured(ranks, name, micro, steady(model), None, steady(timeline, unit), float(timeline.makespan))
    formula = 1 - laws.bubble(name, ranks, micro)
    got = utilisation(timeline, table, unit)
    return Measured(ranks, name, micro, utilisation(model, table), formula, got, float(timeline.makespan))


def overshoot(seconds: float = 0.02, repeats: int = 25) -> float:
    """Mean seconds that a sleep is too long while every rank sleeps; the largest of the ranks'."""
    dist.barrier()
    late = []
    for _ in range(repeats):
        began = time.perf_counter()
        time.sleep(seconds)
        late.append(time.perf_counter() - began - seconds)
    box_ = torch.tensor(statistics.mean(late), dtype=torch.float64)
    dist.all_reduce(box_, dist.ReduceOp.MAX)
    return float(box_)


def schedules_table(rows: list[Measured]) -> Printed:
    """One line for every schedule, number of ranks and of micro-batches."""
    out = Printed(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("N", "schedule", "m", "formula", "expected", "measured", "ratio", ""):
        out.add_column(name, justify="left" if name in ("schedule", "") else "right")
    for r in rows:
        formula = "steady" if r.formula is None else f"{r.formula:.3f}"
        numbers = (formula, f"{r.expected:.3f}", f"{r.measured:.3f}", f"{r.ratio:.3f}")
        good = abs(r.ratio - 1) <= NEAR
        out.add_row(str(r.ranks), r.name, str(r.micro), *numbers, "good" if good else "BAD")
    return out
