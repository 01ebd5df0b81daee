"""The planner's stages against as many layers in each, by simulated step time, on model and cluster pairs.

    python benchmarks/stages.py            # ten pairs
    python benchmarks/stages.py --quick    # two pairs

The rival is what is done by hand: equal numbers of layers in all stages (the embedding with the first, the head with
the last), with whatever synchronous schedule and number of micro-batches is best for it. Both have the same prices, the
same numbers of micro-batches (1, 2 and 4 times the ranks) and the same memory. The last line is the verdict: whether
the rival is nowhere quicker.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from autopar import proposals, stage_search
from autopar.capture import capture
from autopar.costmodel import stages
from autopar.costmodel.devices import DEVICES, Device
from autopar.errors import InfeasibleError, ScheduleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.targets import Built, Target, build

#: A layer, in the address of an op: its container and number.
LAYER = re.compile(r"^fwd:(?:(.*?)\.)?(h|layers?|block|blocks|down|up)\.(\d+)[./]")


@dataclass(frozen=True)
class Pair:
    """A model and a cluster.

    Attributes:
        make: rows of a micro-batch -> the model, on the meta device, and arguments. rows: of the batch.
        mesh: with an axis pp. memory: bytes a device, None for the device's own.
    """

    name: str
    make: Callable[[int], Built]
    rows: int
    mesh: str
    device: Device
    memory: int | None = None


def hf(kind: str, seq: int = 512, **settings: Any) -> Callable[[int], Built]:
    """A Hugging Face model."""
    return lambda rows: build(Target(f"hf:{kind}", rows, seq, "bf16", settings))


def llama(hidden: int, layers: int, vocab: int = 32000) -> dict[str, Any]:
    """The configuration of a Llama."""
    return {
        "hidden_size": hidden, "intermediate_size": int(hidden * 3.5), "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": vocab, "max_position_embeddings": 32768,
    }  # fmt: skip


class UNet(nn.Module):
    """Four levels down and up; each level up reads what its own level down has made."""

    def __init__(self, width: int = 64, levels: int = 4) -> None:
        super().__init__()
        sizes = [width << i for i in range(levels)]
        ins = [3, *sizes]
        self.down = nn.ModuleList(_convolutions(a, b) for a, b in zip(ins, sizes))
        self.up = nn.ModuleList(_convolutions(2 * b, max(b // 2, width)) for b in reversed(sizes))
        self.head = nn.Conv2d(width, 8, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x [batch, 3, h, w], y [batch, h, w] -> the loss."""
        kept = []
        for level in self.down:
            kept.append(level(x))
            x = nn.functional.avg_pool2d(kept[-1], 2)
        x = nn.functional.interpolate(x, scale_factor=2.0)
        for at, level in enumerate(self.up):
            x = level(torch.cat([x, kept.pop()], 1))
            if at < len(self.up) - 1:
                x = nn.functional.interpolate(x, scale_factor=2.0)
        return nn.functional.cross_entropy(self.head(x).float(), y)


def _convolutions(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.ReLU())


def unet(rows: int) -> Built:
    """The U-Net on pictures of 256 x 256."""
    with torch.device("meta"):
        model = UNet().to(torch.bfloat16)
        x = torch.empty(rows, 3, 256, 256, dtype=torch.bfloat16)
        return Built(model, (), {"x": x, "y": torch.empty(rows, 256, 256, dtype=torch.int64)})


_H100, _A100, _4090 = DEVICES["h100"], DEVICES["a100"], DEVICES["rtx4090"]
_GPT = {"n_embd": 1024, "n_layer": 12, "n_head": 16}
_T5 = {"d_model": 1024, "d_ff": 4096, "num_layers": 6, "num_decoder_layers": 6, "num_heads": 16, "d_kv": 64}
_VIT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16}
PAIRS = (
    Pair("GPT-2, tied head", hf("gpt2", 1024, **_GPT), 64, "pp=4", _H100),
    Pair("Llama, vocabulary of 128 k", hf("llama", 1024, **llama(2048, 12, 128256)), 64, "pp=4", _H100),
    Pair("the same, 8 stages", hf("llama", 1024, **llama(2048, 12, 128256)), 64, "pp=8", _A100),
    Pair("Llama, PCIe cards", hf("llama", 1024, **llama(2048, 10)), 32, "pp=4", _4090),
    Pair("Llama, tight memory", hf("llama", 1024, **llama(2048, 8)), 32, "pp=4", _H100, 5_500_000_000),
    Pair("Llama, long sequence", hf("llama", 16384, **llama(2048, 8)), 8, "pp=4", _H100),
    Pair("Llama, stages of 2 in tp", hf("llama", 1024, **llama(4096, 6)), 32, "pp=4,tp=2", _H100),
    Pair("T5, encoder and decoder", hf("t5", 512, **_T5), 64, "pp=4", _A100),
    Pair("ViT, few classes", hf("vit", **_VIT), 256, "pp=4", _A100),
    Pair("U-Net, skips", unet, 64, "pp=4", _A100),
)


def layers_of(starts: tuple[str, ...]) -> list[int]:
    """The pieces with which layers begin, given the addresses at which pieces do."""
    found: dict[tuple[str, str, str], int] = {}
    for piece, address in enumerate(starts, 1):
        match = LAYER.match(address)
        if match:
            found.setdefault((match[1] or "", match[2], match[3]), piece)
    return sorted(found.values())


@dataclass(frozen=True)
class Result:
    """Best of ours and of uniform layers: seconds of a step, and what they are."""

    pair: Pair
    ours: tuple[float, str]
    uniform: tuple[float, str]
    seconds: float


def compare(pair: Pair) -> Result:
    """Plan one pair both ways."""
    began = time.perf_counter()
    mesh = Mesh.parse(pair.mesh)
    place = stage_search.Place.of(mesh, pair.device, pair.memory)
    ranks, limit = place.ranks, place.limit
    counts = [micro for micro in (ranks, 2 * ranks, 4 * ranks) if pair.rows % micro == 0]
    found = proposals.proposals_of(
        counts, place.alone, place.pieces, lambda micro: program_of(pair.make(pair.rows // micro)),
        lambda program: {"device": place.device, "output_specs": "replicated"},
    )  # fmt: skip
    judged: dict[str, Any] = {**place.judged, "schedules": stages.SYNCHRONOUS}
    best = proposals.best_choice(found, limit, judged).best
    ours = best.seconds, f"{best.schedule}, m={best.micro}"
    rivals = []
    for micro, proposal in found.items():
        try:
            layers = layers_of(proposal.starts)
            rival = stages.uniform({micro: proposal.chain}, starts=layers, limit=limit, **judged).best
            rivals.append((rival.seconds, f"{rival.schedule}, m={rival.micro}"))
        except (InfeasibleError, ScheduleError):
            continue
    return Result(pair, ours, min(rivals, default=(float("inf"), "nothing fits")), time.perf_counter() - began)


def program_of(built: Built) -> Program:
    """The program of a micro-batch."""
    return capture(built.model, built.args, built.kwargs, loss=built.loss)


def main() -> int:
    """Run the benchmark; 0 if uniform layers are nowhere quicker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs")
    parser.add_argument("--pairs", type=int, nargs="+", help="numbers of pairs, from 0")
    args = parser.parse_args()
    console = Console(width=150, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("pair", "mesh", "device", "ours ms", "how", "uniform ms", "how", "gain", "s"):
        table.add_column(column, justify="right" if column.endswith(("ms", "s", "gain")) else "left")
    results = []
    for number in args.pairs or ((0, 4) if args.quick else range(len(PAIRS))):
        with console.status(f"{PAIRS[number].name} ..."):
            results.append(compare(PAIRS[number]))
        r = results[-1]
        gain = f"{100 * (r.uniform[0] / r.ours[0] - 1):+.1f} %" if r.uniform[0] < float("inf") else "fits"
        console.print(f"{r.pair.name}: ours {1e3 * r.ours[0]:.2f} ms, uniform {1e3 * r.uniform[0]:.2f} ms, {gain}")
        table.add_row(
            r.pair.name, r.pair.mesh, r.pair.device.name, f"{1e3 * r.ours[0]:.2f}", r.ours[1],
            f"{1e3 * r.uniform[0]:.2f}", r.uniform[1], gain, f"{r.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    worse = [r.pair.name for r in results if r.ours[0] > r.uniform[0] * (1 + 1e-9)]
    gains = [r.uniform[0] / r.ours[0] - 1 for r in results if r.uniform[0] < float("inf")]
    verdict = f"BAD: uniform layers win on {', '.join(worse)}" if worse else "good: uniform layers win nowhere"
    mean = f", {100 * sum(gains) / len(gains):.1f} % gained on average" if gains else ""
    console.print(f"{verdict}; {len(results)} pairs{mean}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
