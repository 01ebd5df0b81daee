"""autopar on one GPU: equal to the plain model, beside eager torch and torch.compile, and as predicted.

    python benchmarks/gpu.py                 # all three parts, on the GPU; about 8 minutes on an H200
    python benchmarks/gpu.py --parity        # one of them; also --speed, --prediction
    python benchmarks/gpu.py --quick         # fewer repeats, and a quick calibration
    python benchmarks/gpu.py --tiny          # tiny models, to try it; what is done where there is no GPU

parity      a small Llama and a GPT-2 in float64, in one process and on 2 and 4 that share the GPU (their collectives go
            through host memory): losses and parameters of three AdamW steps, gradients of the first.
speed       a step (forward, backward, fused AdamW) of a Llama of 1.1 G parameters in bfloat16, batch 4 of 4096 tokens,
            both sides in one process, in turns; the median over the turns of (time here / time of the peer in it).
prediction  after calibrating: seconds of a step and peak of the allocator, as the planner said before it ran.

The last line is the verdict: parity within `PARITY`, the compiled step within `SPEED` of torch.compile, predictions
within `NEAR`. Of tiny models only parity is judged.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("AUTOPAR_PROFILE", "")  # plans go by what is measured here
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.multiprocessing as mp
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import autopar
from autopar.cli_calibrate import measure
from autopar.costmodel.devices import Device
from tests.live_bytes import LiveBytes
from tests.widen import widen_to_float64

#: The bars: largest relative error in float64; ratio to torch.compile; relative error of a prediction.
PARITY, SPEED, NEAR = 1e-9, 1.0, 0.1
#: Losses of two sides after the same steps in bfloat16 may differ by its rounding.
LOSS = 2e-2
Batch = dict[str, torch.Tensor]
StepFn = Callable[[], torch.Tensor]
#: Strategies by number of processes.
MESHES: dict[int, tuple[tuple[str, dict[str, str]], ...]] = {
    1: (("dp=1", {}),),
    2: (("dp=2", {"dp": "ddp"}), ("dp=2", {"dp": "zero3"}), ("tp=2", {"tp": "tp"})),
    4: (("dp=2,tp=2", {"dp": "zero3", "tp": "tp_sp"}), ("dp=2,tp=2", {})),
}


@dataclass
class Verdict:
    """What was judged, in words, and whether all of it is good."""

    words: list[str]
    good: bool = True

    def add(self, text: str, good: bool, counts: bool = True) -> None:
        """One more judgement; `counts`: for the verdict."""
        self.words.append(text + ("" if good or not counts else " (missed)"))
        self.good = self.good and (good or not counts)


def quieten() -> None:
    """The tables are what is to be read."""
    warnings.filterwarnings("ignore")
    for name in ("transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def device() -> torch.device:
    """The GPU, or else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def settle() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear() -> None:
    """Give back what earlier parts held."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tokens(vocabulary: int, batch: int, length: int) -> Batch:
    """Random token ids on the device, which are their own labels."""
    ids = torch.randint(2, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1)).to(device())
    return {"input_ids": ids, "labels": ids}


# ---- parity ----------------------------------------------------------------------------------------------------------


def small_llama() -> tuple[nn.Module, Batch]:
    """Two layers, grouped heads, in float64."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).double(), tokens(256, 8, 40)


def small_gpt2() -> tuple[nn.Module, Batch]:
    """Two layers without dropout, in float64."""
    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, use_cache=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double(), tokens(256, 8, 40)


SMALL = {"llama": small_llama, "gpt2": small_gpt2}


def whole(pm: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathered as the compiled module gathers its state: by way of the parameters themselves."""
    state = dict(pm.named_parameters())
    kept = {n: p.detach().clone() for n, p in state.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
        full = pm.full_state_dict() if isinstance(pm, autopar.ParallelModule) else pm.state_dict()
        found = {name: full[name].cpu().clone() for name in tensors}
        for name, value in kept.items():
            state[name].copy_(value)
    return found


def train(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses of three steps, gradients of the first, parameters after the last; on the host."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3), {}
    for step in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found[f"loss {step}"] = loss.detach().cpu()
        if step == 0:
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found |= {f"gradient of {n}": g for n, g in whole(model, grads).items()}
        optimizer.step()
    return found | whole(model, dict(model.named_parameters()))


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest error over the largest magnitude of its tensor, or over 1e-6 of the largest of all, and where."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    floor = 1e-6 * max(float(v.abs().max()) for v in want.values())
    errors = {n: float((got[n] - v).abs().max()) / max(float(v.abs().max()), floor) for n, v in want.items()}
    at = max(errors, key=lambda n: errors[n])
    return errors[at], at


def compare(mesh: str, strategies: dict[str, str], name: str) -> tuple[float, str]:
    """A small model under a strategy beside the plain one, both on the device."""
    torch.manual_seed(0)
    with widen_to_float64():
        model, batch = SMALL[name]()
        plain = copy.deepcopy(model).to(device()).train()
        example = model.to(device()).train()
        pm = autopar.compile(example, mesh, example=batch, constraints=strategies or None)
        return worst(train(pm, batch), train(plain, batch))


def rank_main(rank: int, count: int, port: int, folder: str) -> None:
    """One process of several: every strategy of every model; rank 0 writes what it found."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    quieten()
    torch.set_num_threads(1)
    found = [(mesh, s, name, *compare(mesh, s, name)) for mesh, s in MESHES[count] for name in SMALL]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")


def on_ranks(count: int) -> list[Any]:
    """What `rank_main` finds on so many processes."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(rank_main, (count, port, folder), nprocs=count)
        return json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))


def parity(args: argparse.Namespace, console: Console, verdict: Verdict) -> None:
    """The first part."""
    table = _table("parity in float64 with the plain model", "model", "mesh", "strategy", "largest error", "at")
    largest = 0.0
    for count in (1, 2) if args.quick else (1, 2, 4):
        if count == 1:
            rows = [(m, s, name, *compare(m, s, name)) for m, s in MESHES[1] for name in SMALL]
        else:
            rows = on_ranks(count)
        for mesh, strategies, name, error, at in rows:
            words = ", ".join(f"{a}: {s}" for a, s in strategies.items()) or "planner"
            table.add_row(name, mesh, words, f"{error:.1e}", at)
            largest = max(largest, error)
    console.print(table)
    verdict.add(f"largest error in float64 {largest:.1e}", largest <= PARITY)


# ---- speed -----------------------------------------------------------------------------------------------------------


def big_llama(tiny: bool, batch: int = 4, length: int = 4096) -> tuple[nn.Module, Batch]:
    """1.1 G parameters in bfloat16, and token ids; tiny: one layer, float32 where there is no GPU."""
    shape = (512, 64, 128, 1, 4, 2) if tiny else (32000, 2048, 8192, 16, 32, 8)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    batch, length = (batch, 64) if tiny else (batch, length)
    config = LlamaConfig(**dict(zip(names, shape)), max_position_embeddings=length, use_cache=False)
    torch.manual_seed(0)
    with device():
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if device().type == "cuda" else torch.float32), tokens(shape[0], batch, length)


def stepper(model: nn.Module, batch: Batch, fused: bool | None = True) -> tuple[StepFn, torch.optim.Optimizer]:
    """One training step as a function of nothing, which gives the loss, on the device; and the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, optimizer


def seconds(step: StepFn, steps: int) -> float:
    """Mean seconds of some steps, the device's work included."""
    settle()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    settle()
    return (time.perf_counter() - began) / steps


def pair(backend: str, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Median seconds here and of the peer, the median ratio, and by how much the losses of five steps differ."""
    model, batch = big_llama(args.tiny)
    pm = autopar.compile(model, 1, example=batch, backend=backend)
    peer = model if backend == "eager" else torch.compile(model, dynamic=False)
    sides = {"here": stepper(pm, batch)[0], "peer": stepper(peer, batch)[0]}  # type: ignore[arg-type]
    losses = {name: [float(step()) for _ in range(5)] for name, step in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    for turn in range(5 if args.quick else 11):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            times[name].append(seconds(sides[name], 3))
    gc.enable()
    ratio = statistics.median(a / b for a, b in zip(times["here"], times["peer"]))
    error = max(abs(a / b - 1) for a, b in zip(losses["here"], losses["peer"]))
    return statistics.median(times["here"]), statistics.median(times["peer"]), ratio, error


def speed(args: argparse.Namespace, console: Console, verdict: Verdict) -> None:
    """The second part."""
    table = _table("seconds of a step", "autopar", "peer", "autopar ms", "peer ms", "ratio", "losses differ by")
    for backend, name in (("eager", "eager"), ("inductor", "torch.compile")):
        here, there, ratio, error = pair(backend, args)
        table.add_row(backend, name, f"{1e3 * here:.1f}", f"{1e3 * there:.1f}", f"{ratio:.3f}", f"{error:.0e}")
        fast = ratio <= SPEED or backend == "eager"
        verdict.add(f"{backend} takes {ratio:.3f} of {name}", fast and error <= LOSS, not args.tiny)
        clear()
    console.print(table)


# ---- prediction ------------------------------------------------------------------------------------------------------


def peak_bytes(step: StepFn, held: list[torch.Tensor]) -> float:
    """The most that is allocated during a step: of the GPU's allocator, or of live tensors on the CPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        step()
        settle()
        return torch.cuda.max_memory_allocated()
    with LiveBytes(held) as live:
        step()
    return live.peak


def predicted(
    machine: Device, args: argparse.Namespace, batch_size: int, length: int
) -> tuple[str, list[tuple[float, float]]]:
    """The batch in words; (predicted, measured) seconds and bytes of a step of the big Llama, op by op."""
    model, batch = big_llama(args.tiny, batch_size, length)
    pm = autopar.compile(model, 1, example=batch, device=machine)
    del model
    clear()
    step, optimizer = stepper(pm, batch, fused=None)  # as a user writes it, and as it is calibrated
    for _ in range(3):
        step()
    measured = statistics.median(seconds(step, 2) for _ in range(5 if args.quick else 11))
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    peak = peak_bytes(step, [*pm.parameters(), *pm.buffers(), *batch.values(), *state])
    found = [(pm.predicted["step_s"], measured), (pm.predicted["peak_bytes"], peak)]
    return " x ".join(map(str, batch["input_ids"].shape)), found


def prediction(args: argparse.Namespace, console: Console, verdict: Verdict) -> None:
    """The third part."""
    began = time.perf_counter()
    machine = measure(1, args.quick or args.tiny, console)
    console.print(f"calibrated in {time.perf_counter() - began:.0f} s")
    table = _table("predicted and measured", "batch", "what", "predicted", "measured", "ratio")
    for batch_size, length in ((4, 4096), (8, 2048)):
        name, rows = predicted(machine, args, batch_size, length)
        for (said, found), what, unit, scale in zip(rows, ("step", "peak"), ("ms", "GB"), (1e3, 1e-9)):
            texts = [f"{scale * n:.4g} {unit}" for n in (said, found)]
            table.add_row(name, what, *texts, f"{said / found:.3f}")
            off = abs(said / found - 1)
            verdict.add(f"{what} of {name} told to {100 * off:.0f} %", off <= NEAR, not args.tiny)
        clear()
    console.print(table)


# ---- here ------------------------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        out.add_column(column)
    return out


def machine_text() -> str:
    """What this ran on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}"


PARTS = {"parity": parity, "speed": speed, "prediction": prediction}


def main() -> int:
    """Run the benchmark; 0 if every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, part in PARTS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"{part.__doc__} Default: all")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, a quick calibration, at most 2 processes")
    parser.add_argument("--tiny", action="store_true", help="tiny models; the default without a GPU")
    parser.add_argument("--no-cudnn", action="store_true", help="both sides without cudnn's attention")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the same text here")
    args = parser.parse_args()
    args.tiny = args.tiny or not torch.cuda.is_available()
    quieten()
    if args.no_cudnn:
        torch.backends.cuda.enable_cudnn_sdp(False)
    console = Console(width=120, highlight=False, record=True)
    console.print(machine_text() + (", tiny models" if args.tiny else ""))
    verdict = Verdict([])
    chosen = [name for name in PARTS if getattr(args, name)] or list(PARTS)
    for name in chosen:
        began = time.perf_counter()
        PARTS[name](args, console, verdict)
        console.print(f"{name}: {time.perf_counter() - began:.0f} s\n")
    console.print(f"{'good' if verdict.good else 'BAD'}: {'; '.join(verdict.words)}", soft_wrap=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(console.export_text(), encoding="utf-8")
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
