"""Capture and plan LLaMA-3-8B and 70B, never allocated, on an 8x8 mesh: seconds by phase, memory, size of the problem.

    python benchmarks/planning.py            # both models, full depth
    python benchmarks/planning.py --quick    # 4 layers each

The last line is the verdict: whether every plan was found with a known gap, and without memory for the weights.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from autopar import driver, report
from autopar.errors import AutoparError
from autopar.plan import Plan
from autopar.targets import Target, build

SEQ = 8192
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": SEQ}
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-3-8B": dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32),
    "LLaMA-3-70B": dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
}


@dataclass(frozen=True)
class Run:
    """One model planned."""

    name: str
    layers: int
    parameters: int
    plan: Plan
    seconds: dict[str, float]
    total_s: float
    peak_rss: float


def peak_rss() -> float:
    """Bytes this process ever held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(name: str, layers: int | None, mesh: str, batch: int, device: str) -> Run:
    """Plan one of `MODELS` with `layers` layers (None: its own depth)."""
    settings = dict(MODELS[name])
    if layers is not None:
        settings["num_hidden_layers"] = layers
    began = time.perf_counter()
    built = build(Target("hf:llama", batch, SEQ, "bf16", settings))
    parameters = sum(p.numel() for p in built.model.parameters())
    init_s = time.perf_counter() - began
    plan = driver.plan_model(built.model, mesh, example=built.example, device=device)
    total = time.perf_counter() - began
    seconds = {"init": init_s, "capture": plan.solver["capture_s"], **plan.solver["seconds"]}
    return Run(name, settings["num_hidden_layers"], parameters, plan, seconds, total, peak_rss())


def main() -> int:
    """Run the benchmark; 0 if every plan is good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers instead of all")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--mesh", default="dp=8,tp=8")
    parser.add_argument("--batch", type=int, default=8, help="global batch (default: 8)")
    parser.add_argument("--device", default="h100")
    args = parser.parse_args()
    console = Console(width=160, highlight=False)
    runs = []
    for name in args.models:
        try:
            with console.status(f"planning {name} on {args.mesh} ..."):
                runs.append(run(name, 4 if args.quick else None, args.mesh, args.batch, args.device))
        except AutoparError as error:
            console.print(f"BAD: {name}: {type(error).__name__}: {error}", markup=False)
            return 1
        console.print(table([runs[-1]]))
        console.print(f"{name}: {report.strategy(runs[-1].plan)}\n{report.predicted_text(runs[-1].plan.predicted)}\n")
    weights = {r.name: 2 * r.parameters for r in runs}
    solved = all(r.plan.solver["status"] in ("optimal", "feasible") for r in runs)
    # Small models are smaller than the interpreter with its libraries: then peak memory says nothing.
    light = args.quick or all(r.peak_rss < weights[r.name] for r in runs)
    good = solved and light
    models = ", ".join(f"{r.name} ({r.layers} layers)" for r in runs)
    gap = 100 * max(r.plan.solver["gap"] for r in runs)
    console.print(
        f"{'good' if good else 'BAD'}: {len(runs)} plans of {models} on {args.mesh} in "
        f"{sum(r.total_s for r in runs):.1f} s, largest gap {gap:.2g} %, "
        f"peak memory {report.bytes_(runs[-1].peak_rss)} (weights would be {report.bytes_(max(weights.values()))})"
    )
    return 0 if good else 1


def table(runs: list[Run]) -> Table:
    """Seconds by phase and size of the problem, one row per model."""
    phases = list(runs[0].seconds)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "layers", *(f"{p} s" for p in phases), "total s", "peak RSS", "variables", "rows", "gap"):
        out.add_column(column, justify="left" if column == "model" else "right")
    for r in runs:
        solver = r.plan.solver
        times = [f"{r.seconds[p]:.2f}" for p in phases]
        size = [f"{solver['variables']:,}", f"{solver['rows']:,}", f"{100 * solver['gap']:.2g} %"]
        out.add_row(r.name, str(r.layers), *times, f"{r.total_s:.1f}", report.bytes_(r.peak_rss), *size)
    return out


if __name__ == "__main__":
    sys.exit(main())
