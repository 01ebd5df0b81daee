"""A budget of memory: is it held, is the peak what was predicted, and what does it cost beside PyTorch's own ways?

    python benchmarks/memory.py                    # all parts
    python benchmarks/memory.py --models llama --parts sweep
    python benchmarks/memory.py --quick            # smaller models, fewer repeats

One process, one device (the CPU), float32, AdamW. Peaks are of live bytes, counted at the dispatcher, op by op.

* sweep: `autopar.frontier`, 12 budgets from the least that is feasible to none, each plan run: the true peak is within
  the budget, peak and predicted time are monotone in it, and the predicted peak is within 3 % of the measured one.
* peers: `activation_memory_budget` of PyTorch's partitioner (torch.compile, its graphs run op by op as ours are) at
  several budgets, and full checkpointing of every layer. Each is measured, then a plan of ours is made for its true
  peak. Seconds of both take turns; what is printed is ours over theirs, at most 1.0 each.
* deep: a Llama at 40 % of the peak that it has on one device, planned by H100 figures with what waits on the host: at
  most 15 % more simulated time. That plan then trains here, beside the plain model: within the limit, the same losses.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers as hf
from functorch.compile import min_cut_rematerialization_partition
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.cli_calibrate import measure
from autopar.costmodel.devices import Device
from autopar.errors import InfeasibleError
from tests.live_bytes import LiveBytes
from tests.trained import captured_once

PARTS = ("sweep", "peers", "deep")
POINTS = 12
#: Budgets of PyTorch's partitioner: 1 keeps what is quickest, 0 recomputes all that it can.
BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
#: The bars: predicted beside measured peak, and our seconds beside theirs.
MEMORY, TIME = 0.03, 1.0
#: Of the deep budget: part of the peak, simulated seconds over those without it, steps that are compared.
DEEP, SLOWER, STEPS = 0.4, 1.15, 3
Batch = dict[str, torch.Tensor]


# ---- models --------------------------------------------------------------------------------------------------------


def llama(size: int) -> tuple[nn.Module, Batch, str]:
    config = hf.LlamaConfig(
        vocab_size=512, hidden_size=64 * size, intermediate_size=176 * size, num_hidden_layers=2 * size,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config), tokens(512, 64 * size), "model.layers"


def gpt2(size: int) -> tuple[nn.Module, Batch, str]:
    config = hf.GPT2Config(
        vocab_size=512, n_embd=64 * size, n_layer=2 * size, n_head=4, n_positions=256, use_cache=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it falls back to, with a warning that torch.compile does not take
    return model, tokens(512, 64 * size), "transformer.h"


def vit(size: int) -> tuple[nn.Module, Batch, str]:
    config = hf.ViTConfig(
        num_hidden_layers=2 * size, hidden_size=64 * size, intermediate_size=256 * size, num_attention_heads=4,
        image_size=32, patch_size=4, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.ViTForImageClassification(config), images(32, 8 * size), "vit.layers"


def resnet(size: int) -> tuple[nn.Module, Batch, str]:
    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[size, size], num_labels=10, layer_type="basic"
    )
    return hf.ResNetForImageClassification(config), images(32, 8 * size), "resnet.encoder.stages.*.layers"


def t5(size: int) -> tuple[nn.Module, Batch, str]:
    config = hf.T5Config(
        num_layers=size, num_decoder_layers=size, d_model=64 * size, d_ff=192 * size, num_heads=4, d_kv=16 * size,
        vocab_size=512, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), tokens(512, 32 * size), "*.block"


def tokens(vocabulary: int, length: int) -> Batch:
    """Random token ids, which are their own labels."""
    ids = torch.randint(2, vocabulary, (8, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def images(side: int, batch: int) -> Batch:
    """Random pixels and a class each."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 10, (batch,), generator=generator)}


MODELS = {"llama": llama, "gpt2": gpt2, "vit": vit, "resnet": resnet, "t5": t5}


def layers(model: nn.Module, pattern: str) -> list[nn.Module]:
    """The layers of the stacks that a path with stars names."""
    found = [model]
    for part in pattern.split("."):
        found = [c for m in found for n, c in m.named_children() if part in ("*", n)]
    return [c for m in found if isinstance(m, (nn.ModuleList, nn.Sequential)) for c in m]


# ---- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Runner:
    """A module that trains. inside: what counts its bytes from within, where nothing may be around its call."""

    module: nn.Module
    batch: Batch
    inside: Peer | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.step()

    def step(self, live: LiveBytes | None = None) -> float:
        """One step of training; its seconds."""
        around = contextlib.nullcontext() if live is None else live
        began = time.perf_counter()
        with contextlib.nullcontext() if self.inside is not None else around:
            out = self.module(**self.batch)
            out.loss.backward()
        with around:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def step_loss(self) -> torch.Tensor:
        """The loss of one step of training."""
        loss = self.module(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def peak(self) -> int:
        """Bytes at the peak of a step, the least of three."""
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        found = []
        for _ in range(3):
            live = LiveBytes([*self.module.parameters(), *self.module.buffers(), *self.batch.values(), *state])
            if self.inside is not None:
                self.inside.live = live
            self.step(live)
            if self.inside is not None:
                self.inside.live = None
            found.append(live.peak)
        return min(found)


class Peer:
    """PyTorch's partitioner at a budget; its graphs run op by op, and are counted from within."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.live: LiveBytes | None = None

    def compiled(self, model: nn.Module, batch: Batch) -> Runner:
        """The model, compiled at this budget."""

        def run(gm: torch.fx.GraphModule, example: Sequence[Any]) -> Any:
            gm.graph.set_codegen(torch.fx.graph._BoxedCodeGen())
            gm.recompile()

            def call(args: list[Any]) -> Any:
                if self.live is None:
                    return gm.forward(args)
                with self.live:
                    return gm.forward(args)

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

        backend = aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=min_cut_rematerialization_partition)
        torch._dynamo.reset()
        with functorch_config.patch(activation_memory_budget=self.budget):
            return Runner(torch.compile(model, backend=backend, fullgraph=True), batch, self)


def checkpointed(model: nn.Module, pattern: str) -> nn.Module:
    """The model with every layer checkpointed."""
    found = layers(model, pattern)
    assert found, f"no layers at {pattern}"
    for layer in found:
        inner = layer.forward

        def forward(*args: Any, inner: Callable[..., Any] = inner, **kwargs: Any) -> Any:
            return checkpoint(inner, *args, use_reentrant=False, **kwargs)

        layer.forward = forward  # type: ignore[method-assign]
    return model


def ours(model: nn.Module, batch: Batch, device: Device, **how: Any) -> tuple[Any, Runner]:
    """Our plan, for `memory_limit` bytes or a given one, and the module."""
    pm = autopar.compile(copy.deepcopy(model), "dp=1", example=batch, device=device, check=False, **how)
    return pm.plan, Runner(pm, batch)


# ---- sweep ---------------------------------------------------------------------------------------------------------


def sweep(name: str, model: nn.Module, batch: Batch, device: Device, console: Console) -> bool:
    """The frontier, from the least budget to none, run. Whether all bars are met."""
    found = autopar.frontier(copy.deepcopy(model), "dp=1", points=POINTS, example=batch, device=device)
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}: budgets", title_justify="left")
    for head in ("budget MB", "predicted MB", "measured MB", "off", "predicted ms", "done again", "held"):
        table.add_column(head, justify="right")
    good, before = len(found.points) == POINTS, (0.0, float("inf"))
    for point in found.points:
        _, runner = ours(model, batch, device, plan=point.plan)
        peak, told, seconds, budget = runner.peak(), point.peak_bytes, point.step_s, point.limit
        off = told / peak - 1
        held = (budget is None or peak <= budget) and abs(off) <= MEMORY
        monotone = told >= before[0] and seconds <= before[1]
        good &= held and monotone
        before = told, seconds
        table.add_row(
            "none" if budget is None else f"{budget / 1e6:.2f}", f"{told / 1e6:.2f}", f"{peak / 1e6:.2f}",
            f"{off:+.1%}", f"{1e3 * seconds:.2f}", str(len(point.plan.saved)),
            "yes" if held and monotone else "not monotone" if held else "NO",
        )  # fmt: skip
    console.print(table)
    ends = f"least {found.points[0].peak_bytes / 1e6:.2f} MB, unlimited {peak / 1e6:.2f} MB"
    console.print(f"{name}: {'good' if good else 'MISSED'}; {ends}\n")
    return good


# ---- a deep budget -------------------------------------------------------------------------------------------------


def deep(console: Console) -> bool:
    """A Llama at two fifths of its peak, by H100 figures, and run here. Whether all bars are met."""
    config = hf.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config)
    ids = torch.randint(0, 2048, (32, 256), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    free = autopar.plan(model, "dp=1", example=batch, device="h100")
    limit = round(DEEP * free.predicted["peak_bytes"])
    plan = autopar.plan(model, "dp=1", example=batch, device="h100", memory_limit=limit)
    ratio = plan.predicted["step_s"] / free.predicted["step_s"]
    ways = [plan.saved.get(a) for a in plan.saved]
    plain = Runner(copy.deepcopy(model), batch)
    pm = autopar.compile(model, "dp=1", example=batch, plan=plan, device="cpu", check=False)
    runner = Runner(pm, batch)
    losses = [[float(r.step_loss()) for _ in range(STEPS)] for r in (runner, plain)]
    apart = max(abs(a - b) for a, b in zip(*losses))
    whole, peak = plain.peak(), runner.peak()
    console.print(
        f"deep: {config.num_hidden_layers} layers, {ids.numel()} tokens. Plain PyTorch needs {whole / 1e6:.0f} MB "
        f"here, our plan without a limit {free.predicted['peak_bytes'] / 1e6:.0f} MB.\n"
        f"At {DEEP:.0%} of that, {limit / 1e6:.0f} MB: {ways.count('recompute')} ops computed again, "
        f"{ways.count('offload')} wait on the host; simulated step {1e3 * plan.predicted['step_s']:.2f} ms, "
        f"{ratio:.3f} times that without a limit (bar {SLOWER}).\n"
        f"Run here: peak {peak / 1e6:.0f} MB, losses {', '.join(f'{x:.4f}' for x in losses[0])}, at most {apart:.1g} "
        "from the plain model's."
    )
    good = ratio <= SLOWER and peak <= limit < DEEP * 1.05 * whole and apart < 1e-3 and losses[0][-1] < losses[0][0]
    console.print(f"deep: {'good' if good else 'MISSED'}\n")
    return good


# ---- peers ---------------------------------------------------------------------------------------------------------


def peers(
    name: str, model: nn.Module, batch: Batch, pattern: str, device: Device, repeats: int, console: Console
) -> bool:
    """PyTorch's ways, and ours at the same peak. Whether ours is never slower."""
    rivals: list[tuple[str, Runner]] = []
    for budget in BUDGETS:
        try:
            rivals.append((f"budget {budget}", Peer(budget).compiled(copy.deepcopy(model), batch)))
        except RuntimeError as error:
            console.print(f"{name}: PyTorch's budget {budget} does not run: {str(error).splitlines()[0][:90]}")
    rivals.append(("checkpoint", Runner(checkpointed(copy.deepcopy(model), pattern), batch)))
    table = Table(box=box.SIMPLE_HEAD, title=f"{name}: at the peak of PyTorch's ways", title_justify="left")
    for head in ("way", "their MB", "our MB", "their ms", "our ms", "ours / theirs"):
        table.add_column(head, justify="left" if head == "way" else "right")
    good = True
    for way, rival in rivals:
        peak = rival.peak()
        try:
            _, own = ours(model, batch, device, memory_limit=peak)
        except InfeasibleError as error:
            table.add_row(way, f"{peak / 1e6:.2f}", f"least {error.least / 1e6:.2f}", "", "", "MISSED")
            good = False
            continue
        mine, their = [], []
        gc.collect()
        gc.freeze()  # what planning and tracing have left is not to be walked over in the middle of a step
        for number in range(repeats):
            for runner, into in ((own, mine), (rival, their))[:: 1 if number % 2 else -1]:
                into.append(runner.step())
        ratio = statistics.median(a / b for a, b in zip(mine, their))
        held = own.peak() <= peak
        good &= ratio <= TIME and held
        table.add_row(
            way, f"{peak / 1e6:.2f}", f"{own.peak() / 1e6:.2f}{'' if held else ' (over)'}",
            f"{1e3 * statistics.median(their):.2f}", f"{1e3 * statistics.median(mine):.2f}",
            f"{ratio:.3f}{'' if ratio <= TIME else ' MISSED'}",
        )  # fmt: skip
    console.print(table)
    console.print(f"{name}: {'good' if good else 'MISSED'}\n")
    return good


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="smaller models, 5 repeats")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=None if sys.stdout.isatty() else 110)
    good = deep(console) if "deep" in args.parts else True
    if args.parts == ["deep"]:
        raise SystemExit(0 if good else 1)
    device = measure(1, args.quick, console)
    for name in args.models:
        torch.manual_seed(0)
        model, batch, pattern = MODELS[name](1 if args.quick else 3)
        with captured_once():
            if "sweep" in args.parts:
                good &= sweep(name, model, batch, device, console)
            if "peers" in args.parts:
                good &= peers(name, model, batch, pattern, device, 5 if args.quick else args.repeats, console)
    console.print("good" if good else "MISSED")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
