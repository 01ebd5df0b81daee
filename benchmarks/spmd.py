"""Step time of autopar beside its peers: DDP, FSDP2, hand-written tensor parallelism, eager and torch.compile.

    python benchmarks/spmd.py            # 1, 2 and 4 gloo processes on this machine, a Llama and an MLP
    python benchmarks/spmd.py --quick    # fewer repeats, 1 and 2 processes

A step is forward, backward and `AdamW(fused=True)`, the same on both sides. Both sides run in the same processes, with
the same values and the same batch, in turns; what is compared is the median over the turns of (time here / time of the
peer in the same turn). The machine is calibrated first, as `autopar calibrate` does. autopar is pinned to the peer's
strategy; the row "free" is what the planner chooses if nothing is pinned, beside DDP, and takes no part in the verdict.
A row whose losses differ is BAD whatever its time.

The last line is the verdict: every ratio at most `BAR`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar import report
from autopar.cli_calibrate import measure as calibrated
from autopar.costmodel import profile
from autopar.costmodel.devices import Device

BAR = 1.0
DEVICE = "device.json"  # what calibration has found
#: Losses of the two sides after the same steps may differ by rounding only (float32, sums in another order).
LOSS_RTOL = 1e-4
Batch = dict[str, torch.Tensor]
StepFn = Callable[[], float]
Times = dict[str, list[float]]


class Block(nn.Module):
    """x + down(gelu(up(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, width], as is the result."""
        return x + self.down(nn.functional.gelu(self.up(x)))


class Mlp(nn.Module):
    """Three blocks and a cross entropy; `forward` returns the loss."""

    def __init__(self, width: int = 512, classes: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x: [batch, width] -> scalar."""
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x), labels)


@dataclass(frozen=True)
class Case:
    """A model, its global batch, and how a hand cuts it."""

    model: nn.Module
    batch: Batch
    blocks: Callable[[nn.Module], Any]  # what FSDP2 wraps
    hand: dict[str, Any]  # the plan of parallelize_module


def llama() -> Case:
    """A Llama of 4.2 M parameters, batch 8 of 64 tokens."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    ids = torch.randint(0, 2048, (8, 64))
    hand: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(4):
        at = f"model.layers.{i}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            hand[f"{at}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            hand[f"{at}.{name}"] = RowwiseParallel()
    model = LlamaForCausalLM(config)
    return Case(model, {"input_ids": ids, "labels": ids}, lambda m: m.model.layers, hand)


def mlp() -> Case:
    """An MLP of 6.4 M parameters, batch 256."""
    hand: dict[str, Any] = {}
    for i in range(3):
        hand[f"layers.{i}.up"], hand[f"layers.{i}.down"] = ColwiseParallel(), RowwiseParallel()
    batch = {"x": torch.randn(256, 512), "labels": torch.randint(0, 128, (256,))}
    return Case(Mlp(), batch, lambda m: m.layers, hand)


CASES: dict[str, Callable[[], Case]] = {"llama": llama, "mlp": mlp}


# ---- the two sides ---------------------------------------------------------------------------------------------------


def stepper(model: nn.Module, batch: Batch) -> StepFn:
    """One training step of `model` as a function of nothing; gives the loss."""
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]  # the fused update takes no mixture
    optimizer = torch.optim.AdamW([{"params": group} for group in (plain, cut) if group], lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        out = model(**batch)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def piece(batch: Batch) -> Batch:
    """This rank's part of the batch."""
    return {k: v.chunk(dist.get_world_size())[dist.get_rank()].contiguous() for k, v in batch.items()}


def peer(name: str, case: Case) -> StepFn:
    """The step of a peer, on a copy of the case's model."""
    model = copy.deepcopy(case.model)
    if name == "eager":
        return stepper(model, case.batch)
    if name == "torch.compile":
        return stepper(torch.compile(model, dynamic=False), case.batch)  # type: ignore[arg-type]
    if name == "DDP":
        return stepper(DistributedDataParallel(model), piece(case.batch))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if name == "FSDP2":
        return stepper(_fsdp(model, case, mesh), piece(case.batch))
    assert name == "hand TP", name
    return stepper(parallelize_module(model, mesh, case.hand), case.batch)


def _fsdp(model: nn.Module, case: Case, mesh: DeviceMesh) -> nn.Module:
    for block in case.blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def ours(strategy: str, backend: str, case: Case, device: Device) -> tuple[StepFn, str]:
    """The step of autopar, and the strategies it took."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    data = strategy in ("ddp", "zero3")
    axis = "dp" if data or strategy == "free" else "tp"
    pins = {axis: strategy} if strategy != "free" and count > 1 else None
    batch = piece(case.batch) if data and count > 1 else case.batch
    pm = autopar.compile(
        case.model, f"{axis}={count}", example=batch, constraints=pins, backend=backend, device=device,
        batch="local" if data and count > 1 else "global",
    )  # fmt: skip
    return stepper(pm, batch), report.strategy(pm.plan)


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One comparison. Times are seconds a step."""

    model: str
    processes: int
    ours: str
    peer: str
    ours_s: float
    peer_s: float
    ratio: float
    cpu_ratio: float  # of processor time, which other programs on the machine disturb less; for information
    loss_error: float
    counts: bool  # for the verdict

    @property
    def good(self) -> bool:
        return self.loss_error <= LOSS_RTOL and (not self.counts or self.ratio <= BAR)


def measure(sides: dict[str, StepFn], repeats: int, steps: int) -> tuple[Times, Times, dict[str, list[float]]]:
    """Seconds and processor seconds a step of every side in every repeat, in turns, and the first steps' losses.

    The order alternates, so that no side always comes first. All ranks begin a turn together.
    """
    losses = {name: [step() for _ in range(3)] for name, step in sides.items()}
    times: Times = {name: [] for name in sides}
    cpu: Times = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            if dist.is_initialized():
                dist.barrier()
            began, spent = time.perf_counter(), time.process_time()
            for _ in range(steps):
                sides[name]()
            if dist.is_initialized():
                dist.barrier()
            times[name].append((time.perf_counter() - began) / steps)
            cpu[name].append((time.process_time() - spent) / steps)
    gc.enable()
    return times, cpu, losses


def compare(
    model: str, case: Case, table: list[tuple[str, str, str]], repeats: int, steps: int, device: Device
) -> list[Row]:
    """Rows for (strategy, backend, peer) triples of one peer, measured together."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    (peer_name,) = {p for _, _, p in table}
    sides: dict[str, StepFn] = {peer_name: peer(peer_name, case)}
    words = {}
    for strategy, backend, _ in table:
        name = f"{strategy}/{backend}"
        sides[name], chosen = ours(strategy, backend, case, device)
        words[name] = f"autopar {backend}" if count == 1 else f"autopar {strategy}"
        if strategy == "free" and count > 1:
            words[name] += f" ({chosen})"
    times, cpu, losses = measure(sides, repeats, steps)
    losses = {name: mean_over_ranks(values) for name, values in losses.items()}
    rows = []
    for name, text in words.items():
        ratio, cpu_ratio = (statistics.median(a / b for a, b in zip(t[name], t[peer_name])) for t in (times, cpu))
        error = max(abs(a - b) / abs(b) for a, b in zip(losses[name], losses[peer_name]))
        mine, other = statistics.median(times[name]), statistics.median(times[peer_name])
        counted = count == 1 or not name.startswith("free")
        rows.append(Row(model, count, text, peer_name, mine, other, ratio, cpu_ratio, error, counted))
    return rows


def mean_over_ranks(values: list[float]) -> list[float]:
    """Losses of pieces of the batch, averaged (whole ones stay what they are)."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def work(rank: int, count: int, folder: str, models: list[str], peers: list[str], repeats: int, steps: int) -> None:
    """One process of a run; rank 0 writes the rows."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{count}", rank=rank, world_size=count)
    device, _ = profile.from_json(Path(folder, DEVICE).read_text(encoding="utf-8"))
    rows = []
    for model in models:
        for name in peers:
            torch.manual_seed(0)
            chosen = [t for t in PAIRS[count > 1] if t[2] == name]
            rows += compare(model, CASES[model](), chosen, repeats, steps, device)
            torch.compiler.reset()
            gc.collect()
            if rank == 0:
                print(f"  {model} beside {name}: {rows[-1].ratio:.3f}", flush=True)
    if rank == 0:
        Path(folder, f"rows{count}.json").write_text(json.dumps([asdict(r) for r in rows]), encoding="utf-8")
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


#: (strategy, backend, peer), for one process and for several.
PAIRS = {
    False: [("free", "eager", "eager"), ("free", "inductor", "torch.compile")],
    True: [("ddp", "eager", "DDP"), ("free", "eager", "DDP"), ("zero3", "eager", "FSDP2"), ("tp", "eager", "hand TP")],
}


def table(rows: list[Row]) -> Table:
    """One line per comparison."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    words, numbers = ("model", "processes", "autopar", "peer"), ("autopar ms", "peer ms", "ratio", "cpu ratio")
    for name in (*words, *numbers, "loss differs by", ""):
        out.add_column(name, justify="right" if name in numbers else "left")
    for r in rows:
        verdict = ("good" if r.good else "BAD") if r.counts else ("" if r.good else "BAD loss")
        times = [f"{1000 * r.ours_s:.1f}", f"{1000 * r.peer_s:.1f}", f"{r.ratio:.3f}", f"{r.cpu_ratio:.3f}"]
        out.add_row(r.model, str(r.processes), r.ours, r.peer, *times, f"{r.loss_error:.0e}", verdict)
    return out


def main() -> int:
    """Run the benchmark; 0 if every ratio is within the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="7 repeats on 1 and 2 processes instead of 25 on 1, 2, 4")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--processes", nargs="+", type=int)
    parser.add_argument("--peers", nargs="+", choices=sorted({p for t in PAIRS.values() for *_, p in t}))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn (default: 4)")
    args = parser.parse_args()
    repeats = args.repeats or (7 if args.quick else 25)
    console = Console(width=160, highlight=False)
    rows: list[Row] = []
    counts = args.processes or ([1, 2] if args.quick else [1, 2, 4])
    device = calibrated(max(counts), args.quick, console)
    assert device.measured is not None
    for what, least in (("", device.measured.linear_from), (" for gradients of weights", device.measured.weights_from)):
        found = "not the quicker" if least is None else f"quicker from {least / 1e6:.0f} MFLOP on"
        console.print(f"oneDNN is {found}{what}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, DEVICE).write_text(profile.to_json(device), encoding="utf-8")
        for count in counts:
            known = dict.fromkeys(p for *_, p in PAIRS[count > 1])
            peers = [p for p in known if args.peers is None or p in args.peers]
            console.print(f"{count} process{'es' * (count > 1)} ...")
            mp.spawn(work, (count, folder, args.models, peers, repeats, args.steps), nprocs=count)
            new = [Row(**r) for r in json.loads(Path(folder, f"rows{count}.json").read_text(encoding="utf-8"))]
            console.print(table(new))
            rows += new
    if not rows:
        console.print("BAD: nothing was compared")
        return 1
    bad = [r for r in rows if not r.good]
    worst = max((r for r in rows if r.counts), key=lambda r: r.ratio, default=rows[0])
    console.print(
        f"{'BAD' if bad else 'good'}: {len(rows) - len(bad)} of {len(rows)} comparisons within {BAR:g} of the peer; "
        f"largest ratio {worst.ratio:.3f} ({worst.model}, {worst.processes} processes, {worst.ours} / {worst.peer})"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
