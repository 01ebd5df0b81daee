"""Is the planner right about this machine? Plans run on 4 local processes: predicted against measured time and memory.

    python benchmarks/prediction.py            # calibrates, then at least 12 plans each of two models
    python benchmarks/prediction.py --quick    # quick calibration, fewer repeats

Plans: classic strategies on dp=4, tp=4 and dp=2,tp=2, the planner's own choice on each, and random legal ones. The
machine is calibrated anew before each model. Steps of all plans take turns, in an order that changes, so that what else
the machine does falls on all alike; seconds are medians, and the choice is compared with each other plan in the same
round. Bars: rank correlation of predicted and measured seconds at least 0.85, the planner's choice within 5 % of the
fastest measured, peak of live bytes within 5 %. What turns out to be one plan under several names is measured once.
Random plans, which move nearly every tensor, count for the correlation only: with so many packed pieces in flight at
once their peak is not told so well.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopar
from autopar.capture import capture
from autopar.cli_calibrate import measure
from autopar.costmodel import planner, profile
from autopar.costmodel.devices import Device
from autopar.costmodel.shuffle import random_plan
from autopar.costmodel.simulate import simulate
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.harness import Ranks
from tests.live_bytes import LiveBytes

PROCS, BATCH, SEQ = 4, 16, 64
CLASSIC: tuple[tuple[str, dict[str, str]], ...] = (
    ("dp=4", {"dp": "ddp"}),
    ("dp=4", {"dp": "zero1"}),
    ("dp=4", {"dp": "zero2"}),
    ("dp=4", {"dp": "zero3"}),
    ("tp=4", {"tp": "tp"}),
    ("tp=4", {"tp": "tp_sp"}),
    ("dp=2,tp=2", {"dp": "ddp", "tp": "tp"}),
    ("dp=2,tp=2", {"dp": "zero1", "tp": "tp"}),
    ("dp=2,tp=2", {"dp": "zero2", "tp": "tp_sp"}),
    ("dp=2,tp=2", {"dp": "zero3", "tp": "tp_sp"}),
    ("dp=2,tp=2", {"dp": "ddp", "tp": "tp_sp"}),
    ("dp=2,tp=2", {"dp": "zero3", "tp": "tp"}),
    ("dp=4", {}),
    ("tp=4", {}),
    ("dp=2,tp=2", {}),
)
RANDOM = (("dp=4", 1), ("dp=2,tp=2", 2))
#: The bars.
CORRELATION, NEAR, MEMORY = 0.85, 0.05, 0.05
#: Distinct plans of each model, at least, random ones not counted.
LEAST = 12


def llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small Llama and a batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=SEQ, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokens(512)


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small GPT-2, wider and shallower, and a batch."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1024, n_embd=384, n_layer=2, n_head=8, n_positions=SEQ, use_cache=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokens(1024)


def tokens(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random token ids, which are their own labels."""
    ids = torch.randint(2, vocabulary, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


MODELS = {"llama": llama, "gpt2": gpt2}


@dataclass
class Row:
    """One plan of one model: seconds and bytes, predicted and measured."""

    model: str
    name: str
    predicted_s: float
    predicted_bytes: float
    chosen: bool
    random: bool = False
    rounds: list[float] = field(default_factory=list)  # measured seconds
    bytes: float = 0.0

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)


# ---- on the ranks --------------------------------------------------------------------------------------------------

_READY: dict[str, Any] = {}


def prepare(key: str, model: str, plan: str, device: str) -> None:
    """Compile a plan on this rank, for the calibrated device, and take its first steps."""
    warnings.simplefilter("ignore")
    built, batch = MODELS[model]()
    made = Plan.from_json(plan)
    where, _ = profile.from_json(device)
    pm = autopar.compile(built, made.mesh, example=batch, plan=made, device=where, check=False)
    optimizer = torch.optim.AdamW(pm.parameters())

    def step() -> None:
        out = pm(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del out

    _READY[key] = (step, pm, optimizer, batch)
    step()


def live_bytes(key: str) -> int:
    """The peak of live bytes on this rank during one step."""
    step, pm, optimizer, batch = _READY[key]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    with LiveBytes(
        [*pm.parameters(), *pm.buffers(), *batch.values(), *(s for s in state if isinstance(s, DTensor))]
    ) as live:
        step()
    return live.peak


def timed(key: str, steps: int) -> float:
    """Mean seconds of some steps."""
    step = _READY[key][0]
    torch.distributed.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.distributed.barrier()
    return (time.perf_counter() - began) / steps


# ---- here ----------------------------------------------------------------------------------------------------------


def plans_of(model: str, device: Device) -> list[tuple[Row, Plan]]:
    """Every plan of a model, priced on the calibrated device."""
    built, batch = MODELS[model]()
    program = capture(built, (), batch)
    program = getattr(program, "program", program)
    found: list[tuple[Row, Plan]] = []
    for mesh, wishes in CLASSIC:
        plan = planner.plan(program, Mesh.parse(mesh), device=device, constraints=wishes, output_specs="free")
        name = " ".join(f"{a}:{s}" for a, s in wishes.items()) or "planner's choice"
        found.append((_row(model, f"{mesh}  {name}", plan.predicted, not wishes), plan))
    for mesh, seed in RANDOM:
        plan = random_plan(program, Mesh.parse(mesh), seed)
        priced = {**planner.price(program, plan, device).as_dict(), "step_s": simulate(program, plan, device).step_s}
        row = _row(model, f"{mesh}  random {seed}", priced, False)
        row.random = True
        found.append((row, plan))
    return _distinct(found)


def _distinct(found: list[tuple[Row, Plan]]) -> list[tuple[Row, Plan]]:
    """Every plan once: names of meshes apart, a strategy and the planner may decide alike."""
    rows: dict[object, tuple[Row, Plan]] = {}
    for row, plan in found:
        # How a parameter that is whole is gathered says nothing.
        stored = {n: s if any(p.kind == "S" for p in s.spec) else s.spec for n, s in plan.storage.items()}
        parts = (plan.choices, stored, plan.inputs, plan.outputs)
        key = (plan.mesh.sizes, *(frozenset(part.items()) for part in parts))
        if key in rows:
            first = rows[key][0]
            first.name, first.chosen = f"{first.name} = {row.name}", first.chosen or row.chosen
        else:
            rows[key] = (row, plan)
    count = sum(not row.random for row, _ in rows.values())
    assert count >= LEAST, f"{count} distinct plans; the bar asks for {LEAST}"
    return list(rows.values())


def _row(model: str, name: str, predicted: Mapping[str, Any], chosen: bool) -> Row:
    return Row(model, name, predicted["step_s"], predicted["peak_bytes"], chosen)


def ranks_of(values: list[float]) -> list[float]:
    """Rank of every value, from 0; equal values share the mean of theirs."""
    order = sorted(values)
    return [(order.index(v) + len(order) - 1 - order[::-1].index(v)) / 2 for v in values]


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of the ranks of two lists (Spearman, 1904)."""
    return statistics.correlation(ranks_of(a), ranks_of(b))


def main() -> int:
    """Run the benchmark; 0 if every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="quick calibration, fewer repeats")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    console = Console(width=130, highlight=False)
    failures: list[str] = []
    words: list[str] = []
    ranks = Ranks(PROCS, timeout=600.0)
    try:
        for model in args.models:
            began = time.perf_counter()
            device = measure(PROCS, args.quick, console)
            console.print(f"calibrated in {time.perf_counter() - began:.0f} s")
            rows = run(model, device, ranks, 5 if args.quick else 20, console)
            console.print(table(rows))
            words.append(judge(model, rows, failures))
    finally:
        ranks.close()
    console.print(f"{'BAD' if failures else 'good'}: {'; '.join(words)}", soft_wrap=True)
    return 1 if failures else 0


def run(model: str, device: Device, ranks: Ranks, rounds: int, console: Console) -> list[Row]:
    """Measure every plan of a model; steps take turns, every round in another order."""
    with console.status(f"planning {model} ..."):
        found = plans_of(model, device)
    keys = []
    for number, (row, plan) in enumerate(found):
        with console.status(f"{model}: compiling {row.name} ({number + 1} of {len(found)}) ..."):
            keys.append(f"{model}/{number}")
            ranks.run(prepare, keys[-1], model, plan.to_json(), profile.to_json(device))
            row.bytes = max(ranks.run(live_bytes, keys[-1]))
    order = random.Random(0)
    for turn in range(rounds):
        with console.status(f"{model}: round {turn + 1} of {rounds} ..."):
            for at in order.sample(range(len(keys)), len(keys)):
                found[at][0].rounds.append(max(ranks.run(timed, keys[at], 2)))
    return [row for row, _ in found]


def judge(model: str, rows: list[Row], failures: list[str]) -> str:
    """The figures of a model in words; what misses a bar goes to `failures`."""
    found = spearman([r.predicted_s for r in rows], [r.seconds for r in rows])
    choice = min((r for r in rows if r.chosen), key=lambda r: r.predicted_s)
    behind = max(statistics.median(a / b for a, b in zip(choice.rounds, r.rounds)) for r in rows) - 1
    off = max(abs(r.predicted_bytes / r.bytes - 1) for r in rows if not r.random)
    bad = [found < CORRELATION, behind > NEAR, off > MEMORY]
    failures += [model] * any(bad)
    marks = [" (missed)" if b else "" for b in bad]
    return (
        f"{model}: rank correlation {found:.2f}{marks[0]}, planner's choice {100 * behind:.0f} % behind the "
        f"fastest{marks[1]}, memory off by at most {100 * off:.1f} %{marks[2]}"
    )


def table(rows: list[Row]) -> Table:
    """Predicted beside measured, fastest first."""
    out = Table(title=rows[0].model, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("plan", "predicted ms", "measured ms", "ratio", "predicted MB", "measured MB", "ratio"):
        out.add_column(column, justify="left" if column == "plan" else "right")
    for r in sorted(rows, key=lambda r: r.seconds):
        times = (f"{1e3 * r.predicted_s:.1f}", f"{1e3 * r.seconds:.1f}", f"{r.predicted_s / r.seconds:.2f}")
        sizes = (f"{r.predicted_bytes / 1e6:.2f}", f"{r.bytes / 1e6:.2f}", f"{r.predicted_bytes / r.bytes:.3f}")
        out.add_row(r.name, *times, *sizes)
    return out


if __name__ == "__main__":
    sys.exit(main())
