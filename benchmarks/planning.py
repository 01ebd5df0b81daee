"""Capture and plan LLaMA-3-8B and 70B, never allocated, on meshes of 64 and 128 H100: seconds by phase, memory, size.

    python benchmarks/planning.py            # the bars below, then time against depth, about 5 minutes
    python benchmarks/planning.py --quick    # 4 layers each, no depths

Bars, capture included, on 2 processor cores: 8B on 8x8 under 20 s and 2 GiB; 8B on 4x4x4 under 40 s; 70B on 8x2x8 under
60 s; 70B on 8x8 under 60 s where a limit of memory binds, so that it is decided what is computed again, what waits on
the host and where the optimizer's state lies: in bf16, and with fp32 parameters that compute in bf16. The rival on the
same kind of machine (AutoParallel a54c252): 8B on 8x8 in 140 s and 4.2 GiB, no answer on a mesh of three axes in 540 s.
And flat: the solver takes no more time for 80 layers than twice that for 8.

Every plan is made in a process of its own, so that peak memory is its own. The clock starts when Python, torch and
transformers are loaded. The last line is the verdict.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from autopar import driver, report
from autopar.errors import AutoparError
from autopar.targets import Target, build

SEQ = 8192
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": SEQ}
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-3-8B": dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32),
    "LLaMA-3-70B": dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80),
}
DEPTHS = (2, 8, 20, 40, 80)
#: The solver at 80 layers against 8: what still counts as flat (both are seconds, and one core is shared by many).
FLAT = 2.0


@dataclass(frozen=True)
class Bar:
    """A plan to make, and what it may take. seconds and peak of the bar; None where none is set."""

    model: str
    mesh: str
    seconds: float | None = None
    peak: float | None = None
    memory: str | None = None  # limit per device
    precision: str | None = None  # in which fp32 parameters compute; None: parameters are bf16
    batch: int | None = None  # None: as the command line says


BARS = (
    Bar("LLaMA-3-8B", "dp=8,tp=8", 20.0, 2 * 2**30),
    Bar("LLaMA-3-8B", "dp=4,sp=4,tp=4", 40.0),
    Bar("LLaMA-3-70B", "dp=8,tp=8"),
    Bar("LLaMA-3-70B", "dp=8,sp=2,tp=8", 60.0),
    Bar("LLaMA-3-70B", "dp=8,tp=8", 60.0, memory="40GB", batch=16),
    Bar("LLaMA-3-70B", "dp=8,tp=8", 60.0, memory="40GB", precision="bf16", batch=16),
)


@dataclass(frozen=True)
class Run:
    """One model planned."""

    model: str
    mesh: str
    layers: int
    parameters: int
    seconds: dict[str, float]
    total_s: float
    peak_rss: float
    variables: int
    rows: int
    gap: float | None
    status: str
    strategy: str
    predicted: dict[str, Any]


def peak_rss() -> float:
    """Bytes this process ever held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plan_here(
    model: str, mesh: str, layers: int | None, batch: int, device: str, memory: str | None, precision: str | None
) -> Run:
    """Plan one of `MODELS` with `layers` layers (None: its own depth) in this process."""
    settings = dict(MODELS[model])
    if layers is not None:
        settings["num_hidden_layers"] = layers
    importlib.import_module("transformers.models.llama.modeling_llama")  # loaded late otherwise
    began = time.perf_counter()
    built = build(Target("hf:llama", batch, SEQ, "fp32" if precision else "bf16", settings))
    parameters = sum(p.numel() for p in built.model.parameters())
    init_s = time.perf_counter() - began
    plan = driver.plan_model(
        built.model, mesh, example=built.example, device=device, memory_limit=memory, precision=precision
    )  # fmt: skip
    total = time.perf_counter() - began
    solver = plan.solver
    return Run(
        model=model,
        mesh=mesh,
        layers=settings["num_hidden_layers"],
        parameters=parameters,
        seconds={"init": init_s, "capture": solver["capture_s"], **solver["seconds"]},
        total_s=total,
        peak_rss=peak_rss(),
        variables=solver["variables"],
        rows=solver["rows"],
        gap=solver["gap"],
        status=solver["status"],
        strategy=report.strategy(plan),
        predicted=dict(plan.predicted),
    )


def plan_apart(
    model: str, mesh: str, layers: int | None, batch: int, device: str, memory: str | None = None,
    precision: str | None = None,
) -> Run:  # fmt: skip
    """`plan_here` in a fresh process.

    Raises:
        RuntimeError: that process failed; with what it said.
    """
    command = [sys.executable, __file__, "--one", model, "--mesh", mesh, "--batch", str(batch), "--device", device]
    command += ["--layers", str(layers)] if layers is not None else []
    command += ["--memory", memory] if memory else []
    command += ["--precision", precision] if precision else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Run the benchmark; 0 if every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers instead of all, no depths")
    parser.add_argument("--batch", type=int, default=8, help="global batch (default: 8)")
    parser.add_argument("--device", default="h100")
    parser.add_argument("--one", choices=list(MODELS), help="plan this model alone and print it as JSON")
    parser.add_argument("--mesh", default="dp=8,tp=8", help="for --one")
    parser.add_argument("--layers", type=int, help="for --one")
    parser.add_argument("--memory", help="limit per device, for --one")
    parser.add_argument("--precision", help="of fp32 parameters, for --one")
    args = parser.parse_args()
    if args.one:
        try:
            found = plan_here(
                args.one, args.mesh, args.layers, args.batch, args.device, args.memory, args.precision
            )  # fmt: skip
            print(json.dumps(asdict(found)))
        except AutoparError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0
    console = Console(width=170, highlight=False)
    missed: list[str] = []
    runs: list[Run] = []
    for bar in BARS:
        try:
            with console.status(f"planning {bar.model} on {bar.mesh} ..."):
                layers, batch = 4 if args.quick else None, bar.batch or args.batch
                runs.append(
                    plan_apart(bar.model, bar.mesh, layers, batch, args.device, bar.memory, bar.precision)
                )  # fmt: skip
        except RuntimeError as error:
            missed.append(f"{bar.model} on {bar.mesh}{f' in {bar.memory}' if bar.memory else ''}: {error}")
            continue
        missed += judge(bar, runs[-1])
    console.print(table(runs))
    for found in runs:
        console.print(
            f"{found.model} on {found.mesh}: {found.strategy}\n  {report.predicted_text(found.predicted)}\n",
            markup=False,
        )
    if not args.quick:
        missed += depths(console, args.batch, args.device)
    named = "; ".join(f"{r.model} {r.mesh} {r.total_s:.1f} s, {report.bytes_(r.peak_rss)}" for r in runs)
    console.print(f"BAD: {'; '.join(missed)}" if missed else f"good: {named}", markup=False, soft_wrap=True)
    return 1 if missed else 0


def judge(bar: Bar, run: Run) -> list[str]:
    """What of a bar is missed."""
    missed = []
    name = f"{run.model} on {run.mesh}" + (f" in {bar.memory}" if bar.memory else "")
    if bar.memory and run.predicted["peak_bytes"] > run.predicted["memory_limit"]:
        missed.append(f"{name} needs {report.bytes_(run.predicted['peak_bytes'])}")
    if bar.seconds is not None and run.total_s > bar.seconds:
        missed.append(f"{name} took {run.total_s:.1f} s, the bar is {bar.seconds:.0f} s")
    if bar.peak is not None and run.peak_rss > bar.peak:
        missed.append(f"{name} took {report.bytes_(run.peak_rss)}, the bar is {report.bytes_(bar.peak)}")
    if run.status not in ("optimal", "feasible") or run.gap is None:
        missed.append(f"{name}: solver status {run.status}, gap {run.gap}")
    return missed


def depths(console: Console, batch: int, device: str) -> list[str]:
    """Time against the number of layers, 8B's layers on 8x8: the table, and whether the solver is flat."""
    runs = []
    for layers in DEPTHS:
        with console.status(f"{layers} layers ..."):
            runs.append(plan_apart("LLaMA-3-8B", "dp=8,tp=8", layers, batch, device))
    console.print("time against depth, layers of LLaMA-3-8B")
    console.print(table(runs))
    spent = {r.layers: r.seconds["build"] + r.seconds["solve"] for r in runs}
    ratio = spent[80] / spent[8]
    console.print(f"building and solving: {ratio:.2f} times as long for 80 layers as for 8\n")
    return [f"the solver takes {ratio:.2f} times as long for 80 layers as for 8"] if ratio > FLAT else []


def table(runs: list[Run]) -> Table:
    """Seconds by phase and size of the problem, one row per plan."""
    phases = list(runs[0].seconds) if runs else []
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "mesh", "layers", *(f"{p} s" for p in phases), "total s", "peak", "columns", "rows", "gap"):
        out.add_column(column, justify="left" if column in ("model", "mesh") else "right")
    for r in runs:
        times = [f"{r.seconds[p]:.2f}" for p in phases]
        gap = "?" if r.gap is None else f"{100 * r.gap:.2g} %"
        size = [f"{r.variables:,}", f"{r.rows:,}", gap]
        out.add_row(r.model, r.mesh, str(r.layers), *times, f"{r.total_s:.1f}", report.bytes_(r.peak_rss), *size)
    return out


if __name__ == "__main__":
    sys.exit(main())
