"""The planner against the whole expert grid, by simulated step time, on model and cluster pairs.

    python benchmarks/expert_grid.py            # eight pairs
    python benchmarks/expert_grid.py --quick    # two pairs

The grid: DP x TP x ZeRO (0, 1, 2, 3) x SP, on every factorisation of the device count over one or two axes. Ours: the
best plan over the same meshes. What does not fit in memory does not count, on either side. The last line is the
verdict: whether no expert's plan is quicker than ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from autopar.capture import capture
from autopar.costmodel.devices import DEVICES, Device
from autopar.costmodel.planner import plan
from autopar.errors import ConstraintError, InfeasibleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.targets import Target, build

DATA, TENSOR = ("ddp", "zero1", "zero2", "zero3"), ("tp", "tp_sp")


@dataclass(frozen=True)
class Pair:
    """A Llama and a cluster. `memory`: bytes per device, None for the device's own."""

    name: str
    model: Mapping[str, Any]
    batch: int
    seq: int
    devices: int
    device: Device
    memory: int | None = None


def _llama(hidden: int, layers: int, heads: int = 16) -> dict[str, Any]:
    inner = int(hidden * 3.5)
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "vocab_size": 32000, "max_position_embeddings": 32768,
    }  # fmt: skip


_H100 = DEVICES["h100"]
_SLOW = dataclasses.replace(_H100, name="h100 on a slow network", slow=dataclasses.replace(_H100.slow, bandwidth=3e9))
_FOUR = dataclasses.replace(_H100, name="h100, 4 a node", node=4)
PAIRS = (
    Pair("fast links, loose memory", _llama(2048, 2), 32, 2048, 8, _H100),
    Pair("slow links, loose memory", _llama(2048, 2), 32, 2048, 8, dataclasses.replace(_SLOW, node=4)),
    Pair("fast links, tight memory", _llama(4096, 2), 16, 1024, 8, _H100, 4_800_000_000),
    Pair("slow links, tight memory", _llama(4096, 2), 16, 1024, 8, dataclasses.replace(_SLOW, node=4), 4_800_000_000),
    Pair("wide", _llama(8192, 1, 32), 8, 1024, 8, _FOUR),
    Pair("deep", _llama(1024, 12), 16, 1024, 8, _FOUR),
    Pair("long sequence", _llama(2048, 2), 2, 16384, 8, _FOUR),
    Pair("PCIe cards", _llama(2048, 2), 16, 1024, 8, DEVICES["rtx4090"]),
)


def meshes(count: int) -> Iterator[Mesh]:
    """Every factorisation over one or two axes, ordered: the second axis is the near one."""
    yield Mesh(("a",), (count,))
    for outer in range(2, count):
        if count % outer == 0:
            yield Mesh(("a", "b"), (outer, count // outer))


def experts(mesh: Mesh) -> Iterator[dict[str, str]]:
    """Strategies of the grid on one mesh: data parallel, tensor parallel, or one on each axis."""
    if len(mesh.names) == 1:
        yield from ({"a": s} for s in (*DATA, *TENSOR))
        return
    for data, tensor in itertools.product(DATA, TENSOR):
        yield {"a": data, "b": tensor}
        yield {"a": tensor, "b": data}


def step(program: Program, mesh: Mesh, pair: Pair, constraints: dict[str, str]) -> Plan | None:
    """The plan under constraints; None if it does not fit or cannot be."""
    try:
        return plan(program, mesh, device=pair.device, memory_limit=pair.memory, constraints=constraints)
    except (InfeasibleError, ConstraintError):
        return None


@dataclass(frozen=True)
class Result:
    """Best of ours and of the grid, with what they are."""

    pair: Pair
    ours: tuple[float, str]
    expert: tuple[float, str]
    tried: int
    seconds: float


def compare(pair: Pair) -> Result:
    """Plan one pair, and price the grid."""
    built = build(Target("hf:llama", pair.batch, pair.seq, "bf16", dict(pair.model)))
    program = capture(built.model, built.args, built.kwargs)
    ours: list[tuple[float, str]] = []
    grid: list[tuple[float, str]] = []
    tried, seconds = 0, 0.0
    for mesh in meshes(pair.devices):
        began = time.perf_counter()
        found = step(program, mesh, pair, {})
        seconds += time.perf_counter() - began
        if found is not None:
            ours.append((found.predicted["step_s"], str(mesh)))
        for strategies in experts(mesh):
            tried += 1
            expert = step(program, mesh, pair, strategies)
            if expert is not None:
                words = " ".join(f"{a}={s}" for a, s in strategies.items())
                grid.append((expert.predicted["step_s"], f"{mesh} {words}"))
    none = (float("inf"), "nothing fits")
    return Result(pair, min(ours, default=none), min(grid, default=none), tried, seconds)


def main() -> int:
    """Run the benchmark; 0 if no expert is quicker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs")
    parser.add_argument("--pairs", type=int, nargs="+", help="numbers of pairs, from 0")
    args = parser.parse_args()
    console = Console(width=160, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("pair", "ours ms", "on", "best expert ms", "which", "of", "gain", "planning s"):
        table.add_column(column, justify="right" if column.endswith(("ms", "s", "gain", "of")) else "left")
    results = []
    for number in args.pairs or ((0, 3) if args.quick else range(len(PAIRS))):
        with console.status(f"{PAIRS[number].name} ..."):
            results.append(compare(PAIRS[number]))
        r = results[-1]
        console.print(f"{r.pair.name}: ours {1e3 * r.ours[0]:.3f} ms, best expert {1e3 * r.expert[0]:.3f} ms")
        gain = r.expert[0] / r.ours[0] if r.ours[0] < float("inf") else 0.0
        table.add_row(
            r.pair.name, f"{1e3 * r.ours[0]:.3f}", r.ours[1], f"{1e3 * r.expert[0]:.3f}", r.expert[1], str(r.tried),
            f"{100 * (gain - 1):+.1f} %", f"{r.seconds:.1f}",
        )  # fmt: skip
    console.print(table)
    worse = [r.pair.name for r in results if r.ours[0] > r.expert[0] * (1 + 1e-6) or r.ours[0] == float("inf")]
    verdict = f"BAD: an expert is quicker on {', '.join(worse)}" if worse else "good: no expert is quicker"
    console.print(f"{verdict}; {len(results)} pairs, {sum(r.tried for r in results)} expert plans")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
