"""Schedules on real processes: utilisation beside what is predicted, what the executor itself costs, a real model.

    python benchmarks/pipeline.py            # 2, 4 and 8 gloo processes on this machine
    python benchmarks/pipeline.py --quick    # fewer processes, micro-batches and repeats
    python benchmarks/pipeline.py --parts gpt

Part `schedules`: stages that sleep (F = I = W = one unit, B = two), so that more processes than cores are no matter.
The utilisation, seconds of work in the table over ranks x makespan, is compared with `autopar.pipeline.clock` where
messages cost nothing; the column "formula" is the closed form of `autopar.pipeline.laws`, which is the same number but
for zb-v with fewer micro-batches than ranks, where it is a bound. The unit is the shortest one at which a sleep is at
most 1 % too long, which is measured first. PACI is measured from the end of its fill (the first backward of stage 0)
until stage 0 begins its last forward: in between no rank waits, so 1 is expected. 2bw and async-1f1b have its tables.
What comes out too low is measured again, up to `TRIES` times, and the best counts: other programs can only lower it.

Part `cost`: the executor on stages that do nothing. Without messages in microseconds an action; with messages as the
ratio to a bare loop of isend, irecv and wait with the same messages in the same order on the same ranks, both in the
same processes, by turns; what counts is the median over the turns of the ratios.

Part `gpt`: a GPT in 2 and 4 stages beside torch.distributed.pipelining (`pipeline_peers.py`).

The last line is the verdict: utilisation within `NEAR` of what is expected, PACI's at least `STEADY` and `GAIN` times
that of 1F1B at N = m = 8, an action at most `ACTION_US`, the ratio at most `BARE`, and no step of the GPT slower than
the peer's.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import pipeline_peers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pipeline_peers import Beside
from rich import box
from rich.console import Console
from rich.table import Table as Printed
from torch import Tensor

from autopar.cli_calibrate import measure as calibrated
from autopar.costmodel import profile
from autopar.pipeline import clock, laws
from autopar.pipeline.clock import Costs, Timeline
from autopar.pipeline.comms import with_comms
from autopar.pipeline.schedules import SCHEDULES, one_f_one_b, zb_h1
from autopar.pipeline.table import Action, Row, Table, homes
from autopar.runtime.executor import Executor
from autopar.runtime.transport import GroupTransport
from autopar.runtime.work import Form, Forms

NEAR = 0.05
STEADY = 0.95
GAIN = 1.7
ACTION_US = 5.0
BARE = 1.10
OVERSHOOT = 0.01
UNITS = (0.05, 0.06, 0.08, 0.1)  # seconds
TIMEOUT = 60.0
TRIES = 3
DEVICE = "device.json"  # what calibration has found
STEPS = 3  # of the real model in a turn
MANY = 32  # micro-batches of a run whose cost is measured
SMALL = Form(torch.float32, (1024,))  # 4 kB
LARGE = Form(torch.float32, (1 << 18,))  # 1 MB
#: Seconds of an action, in units.
UNITS_OF = {"F": 1, "B": 2, "I": 1, "W": 1, "U": 0}
PARTS = ("schedules", "cost", "gpt")
NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v", "paci")


@dataclass(frozen=True)
class Check:
    """One line of the verdict. `least` and `most`: between which `value` is good."""

    part: str
    what: str
    value: float
    least: float
    most: float

    @property
    def good(self) -> bool:
        return self.least <= self.value <= self.most


# ---- stages that sleep -----------------------------------------------------------------------------------------------


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


# ---- the executor's own cost -----------------------------------------------------------------------------------------


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


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What the processes are to do. `turns`: of the cost with messages, `gpt`: of the real model; 0: not asked for."""

    micros: list[int]
    turns: int
    gpt: int


def work(rank: int, count: int, folder: str, wanted: Wanted) -> None:
    """One process of a run; rank 0 reports progress and writes the results."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=2 * TIMEOUT)
    meet = f"file://{folder}/meet{count}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count, timeout=limit)
    say = print if rank == 0 else (lambda *_, **__: None)
    rows, late, unit = [], 0.0, UNITS[-1]
    if wanted.micros:
        late = min(overshoot() for _ in range(TRIES))
        unit = next((u for u in UNITS if late / u <= OVERSHOOT), UNITS[-1])
        say(f"  a sleep is {1e3 * late:.2f} ms too long: unit {1e3 * unit:.0f} ms, {late / unit:.1%} of it", flush=True)
    for name, micro, table in cases(count, wanted.micros):
        found, tries = measure(name, micro, table, unit), 1
        while found.ratio < 1 - NEAR and tries < TRIES:
            found, tries = max(found, measure(name, micro, table, unit), key=lambda m: m.ratio), tries + 1
        rows.append(found)
        words = "" if tries == 1 else f", best of {tries}"
        say(f"  {name} m={micro}: {found.measured:.3f} ({found.seconds:.1f} s{words})", flush=True)
    costs = []
    if wanted.turns:
        table = with_comms(one_f_one_b(count, MANY))
        for words, form in (("4 kB", SMALL), ("1 MB", LARGE)):
            costs.append(Cost(count, "1f1b", words, *beside(table, form, wanted.turns)))
            say(f"  beside a bare loop, {words}: {costs[-1].ratio:.3f}", flush=True)
    peers = []
    if wanted.gpt:
        device, _ = profile.from_json(Path(folder, DEVICE).read_text(encoding="utf-8"))
        peers = pipeline_peers.compare(wanted.gpt, STEPS, device, lambda text: say(text, flush=True))
    if rank == 0:
        result = {"late": late / unit, **{k: [asdict(x) for x in v] for k, v in
                  (("rows", rows), ("costs", costs), ("peers", peers))}}  # fmt: skip
        Path(folder, f"found{count}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


# ---- printing --------------------------------------------------------------------------------------------------------


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


def costs_table(costs: list[Cost]) -> Printed:
    """One line for every comparison with a bare loop."""
    out = Printed(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("N", "table", "message", "executor ms", "bare ms", "ratio", ""):
        out.add_column(name, justify="left" if name in ("table", "message", "") else "right")
    for c in costs:
        numbers = (f"{c.ours_ms:.1f}", f"{c.bare_ms:.1f}", f"{c.ratio:.3f}")
        out.add_row(str(c.ranks), c.table, c.message, *numbers, "good" if c.ratio <= BARE else "BAD")
    return out


def judge(
    rows: list[Measured], costs: list[Cost], actions: dict[str, float], late: list[float], peers: list[Beside]
) -> list[Check]:
    """Everything that the verdict is made of."""
    inf = float("inf")
    checks = [Check("schedules", f"a sleep of one unit is too long by {x:.1%}", x, -inf, OVERSHOOT) for x in late]
    by_case = {}
    for r in rows:
        by_case[r.ranks, r.name, r.micro] = r
        where = f"{r.name}, N={r.ranks}, m={r.micro}"
        checks.append(Check("schedules", f"utilisation of {where} / expected", r.ratio, 1 - NEAR, 1 + NEAR))
        if r.formula is None:
            checks.append(Check("schedules", f"utilisation of {where} without the fill", r.measured, STEADY, inf))
    paci, flush = by_case.get((8, "paci", 8)), by_case.get((8, "1f1b", 8))
    if paci and flush:
        gain = paci.measured / flush.measured
        checks.append(Check("schedules", "utilisation of paci / 1f1b, N=8, m=8", gain, GAIN, inf))
    checks += [Check("cost", f"us an action, {words}", us, -inf, ACTION_US) for words, us in actions.items()]
    checks += [Check("cost", f"executor / bare loop, N={c.ranks}, {c.message}", c.ratio, -inf, BARE) for c in costs]
    for r in peers:
        where = f"{r.ours} ({r.cut} cut), N={r.ranks}"
        checks.append(Check("gpt", f"loss of {where} differs by", r.loss_error, 0.0, pipeline_peers.LOSS_RTOL))
        if r.counts:
            checks.append(Check("gpt", f"{where} / {r.peer}", r.ratio, -inf, pipeline_peers.BAR))
    return checks


def main() -> int:
    """Run the benchmark; 0 if everything is within the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 processes (GPT: 2), m = 4 and 8, a third of the turns")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--processes", nargs="+", type=int, help="default: 4 and 8, for the GPT 2 and 4")
    parser.add_argument("--micro", nargs="+", type=int)
    parser.add_argument("--turns", type=int, help="of the executor and the GPT beside their peers (default: 61, 15)")
    args = parser.parse_args()
    console = Console(width=120, highlight=False)
    began = time.perf_counter()
    micros = (args.micro or ([4, 8] if args.quick else [4, 8, 16])) if "schedules" in args.parts else []
    turns = (args.turns or (11 if args.quick else 61)) if "cost" in args.parts else 0
    actions: dict[str, float] = {}
    if turns:
        for words, table in alone().items():
            actions[words] = per_action(table, turns)
            console.print(f"{words}, no messages: {actions[words]:.2f} us an action")
    rows: list[Measured] = []
    costs: list[Cost] = []
    late: list[float] = []
    peers: list[Beside] = []
    with_gpt = (args.processes or ([2] if args.quick else [2, 4])) if "gpt" in args.parts else []
    without = (args.processes or ([4] if args.quick else [4, 8])) if micros or turns else []
    with tempfile.TemporaryDirectory() as folder:
        if with_gpt:
            device = calibrated(max(with_gpt), args.quick, console)
            Path(folder, DEVICE).write_text(profile.to_json(device), encoding="utf-8")
        for count in sorted({*with_gpt, *without}):
            console.print(f"{count} processes ...")
            gpt = (args.turns or (5 if args.quick else 15)) if count in with_gpt else 0
            wanted = Wanted(micros, turns, gpt) if count in without else Wanted([], 0, gpt)
            mp.spawn(work, (count, folder, wanted), nprocs=count)
            found = json.loads(Path(folder, f"found{count}.json").read_text(encoding="utf-8"))
            rows += [Measured(**r) for r in found["rows"]]
            costs += [Cost(**c) for c in found["costs"]]
            peers += [Beside(**p) for p in found["peers"]]
            late += [found["late"]] * bool(found["rows"])
    if rows:
        console.print(schedules_table(rows))
    if costs:
        console.print(costs_table(costs))
    if peers:
        console.print(pipeline_peers.table(peers))
    checks = judge(rows, costs, actions, late, peers)
    bad = [c for c in checks if not c.good]
    for c in bad:
        console.print(f"BAD {c.part}: {c.what}: {c.value:.3f}, wanted {c.least:g} to {c.most:g}")
    numbers = []
    if rows:
        worst = max(rows, key=lambda r: abs(r.ratio - 1))
        numbers.append(
            f"utilisation / expected at worst {worst.ratio:.3f} ({worst.name}, N={worst.ranks}, m={worst.micro})"
        )
    numbers += [f"{c.what} {c.value:.2f}" for c in checks if "paci / 1f1b" in c.what]
    if actions:
        numbers.append(f"{max(actions.values()):.2f} us an action")
    if costs:
        numbers.append(f"executor / bare loop {max(c.ratio for c in costs):.3f}")
    if counted := [p for p in peers if p.counts]:
        slowest = max(counted, key=lambda p: p.ratio)
        where = f"{slowest.ours}, {slowest.cut} cut, N={slowest.ranks}"
        numbers.append(f"GPT / torch at most {slowest.ratio:.3f} ({where})")
    console.print(f"{time.perf_counter() - began:.0f} s")
    console.print(f"{'BAD' if bad else 'good'}: {len(checks) - len(bad)} of {len(checks)} checks; {'; '.join(numbers)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
