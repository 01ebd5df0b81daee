"""Plan and train an unmodified Hugging Face Llama on local processes, and show that one process gives the same losses.

    python examples/train_llama.py                         4 processes on this machine, mesh dp=2,tp=2
    python examples/train_llama.py --procs 2 --mesh tp=2
    python examples/train_llama.py --precision bf16        in mixed precision
    torchrun --nproc-per-node 4 examples/train_llama.py    the same, started by hand

The text is the source of Python's standard library, a byte a token: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import autopar
from autopar.costmodel.devices import Device, Link
from autopar.report import show

WIDTH, HIDDEN, LAYERS = 256, 704, 4
WARM_STEPS = 3  # not timed: first touches of memory


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--procs", type=int, default=4, help="local processes to start (default 4)")
    parser.add_argument("--mesh", help="default dp=2,tp=PROCS/2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16, help="sequences in the global batch (default 16)")
    parser.add_argument("--seq", type=int, default=128, help="tokens in a sequence (default 128)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "auto"), default="fp32")
    args = parser.parse_args()
    if "RANK" not in os.environ and args.procs > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.procs)]
        settings = {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "6"}  # the profiler's chatter is not for the reader
        raise SystemExit(subprocess.call([*command, *sys.argv], env={**os.environ, **settings}))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    mesh = args.mesh or (f"dp=2,tp={world // 2}" if world % 2 == 0 else f"dp={world}")
    train(mesh, args.steps, args.batch, args.seq, args.precision)


def train(mesh: str, steps: int, batch: int, seq: int, precision: str = "fp32") -> None:
    """One rank's part of the demonstration; rank 0 prints."""
    transformers_logging.set_verbosity_error()
    # torch warns that a norm is reduced over two mesh axes (gradient clipping): right, and fast enough here
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    console = Console(quiet=rank != 0, width=None if sys.stdout.isatty() else 110)
    batches = [next_batch for _, next_batch in zip(range(steps), windows(batch, seq))]

    console.print(f"measuring this machine with {mesh} busy at once ...")
    device = measure(autopar.Mesh.parse(mesh))
    console.print(
        f"  matmul {device.rate(torch.float32) / 1e9:.0f} GFLOP/s, memory {device.traffic() / 1e9:.1f} GB/s, "
        f"all-reduce {device.fast.bandwidth / 1e9:.2f} GB/s and {device.fast.latency * 1e6:.0f} us, per process"
    )
    model = llama(seq)
    console.print(f"planning a Llama of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters ...")
    began = time.perf_counter()
    pm = autopar.compile(model, mesh, example=batches[0], device=device, precision=precision)
    console.print(f"  captured, planned and lowered in {time.perf_counter() - began:.1f} s\n")
    for part in show(pm.plan):
        console.print(part)

    ours = run(pm, batches, console, f"\ntraining on {mesh}")
    console.print()
    console.print(compare(pm, ours, largest(ours.working_bytes)))
    if rank == 0:
        torch.set_num_threads(os.cpu_count() or 1)
        reference = run(llama(seq), batches, console, "\nthe same steps in one process, in fp32")
        console.print()
        console.print(losses(mesh, ours, reference))
        worst = max(abs(a - b) for a, b in zip(ours.losses, reference.losses))
        console.print(f"largest difference of the loss over {steps} steps: {worst:.1e}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def llama(seq: int) -> LlamaForCausalLM:
    """A small Llama over bytes, always with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=seq, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def windows(batch: int, seq: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random windows of the standard library's source; the same on every rank."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, len(text) - seq, (batch,), generator=generator)
        ids = torch.stack([text[s : s + seq] for s in starts.tolist()]).long()
        yield {"input_ids": ids, "labels": ids}


@dataclass
class Run:
    """What a training run leaves on this rank: losses and seconds of each step, bytes of optimizer state, and the most
    bytes that were allocated at once during a step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_bytes: int = 0
    working_bytes: int = 0

    @property
    def step_s(self) -> float:
        """Median seconds of a step, after the first ones."""
        timed = sorted(self.seconds[WARM_STEPS:] or self.seconds)
        return timed[len(timed) // 2]


def run(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], console: Console, title: str) -> Run:
    """An ordinary training loop: nothing in it knows whether the model is parallel."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=len(batches))

    def train_step(batch: dict[str, torch.Tensor]) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss.item()

    done = Run()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console.print(title)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("loss", total=len(batches))
        for step, batch in enumerate(batches):
            began = time.perf_counter()
            if step == WARM_STEPS - 1:
                done.working_bytes = peak_bytes(lambda batch=batch: done.losses.append(train_step(batch)))
            else:
                done.losses.append(train_step(batch))
            done.seconds.append(time.perf_counter() - began)
            progress.update(task, advance=1, description=f"loss {done.losses[-1]:.3f}")
            if step % 10 == 0 or step == len(batches) - 1:
                progress.console.print(f"  step {step:3d}  loss {done.losses[-1]:.4f}  {done.seconds[-1]:.2f} s")
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    done.optimizer_bytes = sum((s.to_local() if isinstance(s, DTensor) else s).nbytes for s in states)
    return done


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors that `work` holds at once, beyond what is there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max((e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"), default=0)


# ---- what this machine can do --------------------------------------------------------------------------------------


def measure(mesh: autopar.Mesh) -> Device:
    """The cost model's picture of one process here, measured with all of them busy; the same on every rank."""
    a, b = torch.randn(1024, WIDTH), torch.randn(WIDTH, HIDDEN)
    x, y = torch.randn(1024, HIDDEN), torch.randn(1024, HIDDEN)
    small = torch.randn(16)
    matmul = 2 * 1024 * WIDTH * HIDDEN / clock(lambda: a @ b)
    traffic = 3 * x.nbytes / clock(lambda: x * y)
    launch = clock(lambda: small * small)
    size, link = max(mesh.sizes), Link(1e9, 1e-4)
    if size > 1:
        axis = mesh.sizes.index(size)
        groups = [dist.new_group(ranks) for ranks in mesh.groups(axis)]
        mine = groups[[dist.get_rank() in ranks for ranks in mesh.groups(axis)].index(True)]
        long, short = torch.ones(2**20), torch.ones(16)
        rounds = 2 * (size - 1).bit_length()
        latency = clock(lambda: dist.all_reduce(short, group=mine)) / rounds
        moved = 2 * (size - 1) / size * long.nbytes
        whole = clock(lambda: dist.all_reduce(long.fill_(1), group=mine))
        link = Link(
            moved / max(whole - rounds * latency, whole / 2), latency
        )  # a busy machine can spoil the difference
    numbers = torch.tensor([matmul, traffic, launch, link.bandwidth, link.latency], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    matmul, traffic, launch, bandwidth, latency = numbers.tolist()
    link = Link(bandwidth, latency)
    return Device(
        "this machine", {"float32": matmul}, traffic, None, link, link, launch=launch, matmul_efficiency=1.0,
        memory_efficiency=1.0,
    )  # fmt: skip


def clock(work: Callable[[], object], least: float = 0.4) -> float:
    """Mean seconds of `work`, repeated as often on every rank."""
    work()
    began = time.perf_counter()
    for _ in range(5):
        work()
    times = torch.tensor((time.perf_counter() - began) / 5)
    if dist.is_initialized():
        dist.all_reduce(times, dist.ReduceOp.MAX)
    repeats = max(5, min(20000, int(least / times.item())))
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


# ---- predicted beside measured -------------------------------------------------------------------------------------


def largest(value: float) -> float:
    """The largest over the ranks."""
    own = torch.tensor(float(value))
    if dist.is_initialized():
        dist.all_reduce(own, dist.ReduceOp.MAX)
    return own.item()


def compare(pm: autopar.ParallelModule, done: Run, rest: float) -> Table:
    """Step time and memory per rank, predicted and measured. `rest`: bytes that a step allocates."""
    table = Table(title="per rank", title_justify="left", show_edge=False)
    for name in ("", "predicted", "measured"):
        table.add_column(name, justify="right" if name else "left")
    predicted, held = pm.predicted, pm.memory_per_rank()
    expected = dict(predicted["memory"])
    parameters, optimizer = expected["parameters"], expected["optimizer"]
    table.add_row("step, with optimizer", f"{predicted['step_s'] * 1e3:.0f} ms", f"{done.step_s * 1e3:.0f} ms")
    rows = (
        ("parameters", parameters, max(row["parameters"] for row in held)),
        ("optimizer state", optimizer, largest(done.optimizer_bytes)),
        ("gradients, activations, temporaries", predicted["peak_bytes"] - parameters - optimizer, rest),
    )
    for name, guess, got in rows:
        table.add_row(name, f"{guess / 1e6:.1f} MB", f"{got / 1e6:.1f} MB")
    return table


def losses(mesh: str, ours: Run, reference: Run) -> Table:
    """The loss of some steps on the mesh and in one process."""
    table = Table(title="loss", title_justify="left", show_edge=False)
    for name in ("step", mesh, "one process", "difference"):
        table.add_column(name, justify="right")
    last = len(ours.losses) - 1
    for step in sorted({*range(0, last + 1, 10), last}):
        a, b = ours.losses[step], reference.losses[step]
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    table.add_row("s/step", f"{ours.step_s:.2f}", f"{reference.step_s:.2f}", "")
    return table


if __name__ == "__main__":
    main()
