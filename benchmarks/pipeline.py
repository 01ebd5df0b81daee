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

Part `gpt`: a GPT in 2 and 4 stages beside torch.distributed.pipelining.

The parts are in `pipeline_schedules.py`, `pipeline_costs.py` and `pipeline_peers.py`.

The last line is the verdict: utilisation within `NEAR` of what is expected, PACI's at least `STEADY` and `GAIN` times
that of 1F1B at N = m = 8, an action at most `ACTION_US`, the ratio at most `BARE`, and no step of the GPT slower than
the peer's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import pipeline_costs
import pipeline_peers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pipeline_costs import BARE, Cost
from pipeline_peers import Beside
from pipeline_schedules import NEAR, OVERSHOOT, TIMEOUT, UNITS, Measured, cases, measure, overshoot, schedules_table
from rich.console import Console

from autopar.cli_calibrate import measure as calibrated
from autopar.costmodel import profile

STEADY = 0.95
GAIN = 1.7
ACTION_US = 5.0
TRIES = 3
DEVICE = "device.json"  # what calibration has found
STEPS = 3  # of the real model in a turn
PARTS = ("schedules", "cost", "gpt")


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
    costs = pipeline_costs.compare(wanted.turns, lambda text: say(text, flush=True)) if wanted.turns else []
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


# ---- here ------------------------------------------------------------------------------------------------------------


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
        for words, table in pipeline_costs.alone().items():
            actions[words] = pipeline_costs.per_action(table, turns)
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
        console.print(pipeline_costs.costs_table(costs))
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
