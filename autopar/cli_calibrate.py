"""`autopar calibrate`: measure this machine and keep the profile that plans for it are priced with."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from autopar.costmodel import profile
from autopar.costmodel.calibrate import World, calibrate
from autopar.costmodel.devices import Device
from autopar.errors import ProfileError
from autopar.runtime import probe


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "calibrate",
        help="measure this machine, so that plans for it are priced with its own figures",
        description="Measures kernels by size, what a launch costs, collectives between local processes and what it\n"
        "costs that they share the cores. The profile is used by every later plan for this machine\n"
        "(device: none given, or 'calibrated'). About a minute; --quick: less than 20 s.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--procs", type=int, default=4, metavar="N", help="local processes: 1, 2, 4 or 8 (default: 4)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the profile here")
    parser.set_defaults(run=_run)


def measure(procs: int, quick: bool, console: Console) -> Device:
    """The Device of this machine, with progress on `console`.

    Raises:
        ProfileError: `procs` is not 1, 2, 4 or 8, or a measuring process failed.
    """
    if procs not in (1, 2, 4, 8):
        raise ProfileError(f"cannot measure with {procs} processes; choose 1, 2, 4 or 8")
    cuda = torch.cuda.is_available()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting processes", total=1.0)
        device = probe.run(
            1 if cuda else procs,
            _rank,
            (quick, "cuda" if cuda else "cpu"),
            lambda text, done: bar.update(task, description=text, completed=done),
            timeout=300.0,
        )
    return device


def _rank(world: World, quick: bool, device: str) -> Device | None:
    return calibrate(world, quick, torch.device(device), time.perf_counter, time.thread_time)


def _run(args: argparse.Namespace) -> int:
    console = Console(stderr=True)
    where = args.output or profile.path()
    if where is None:
        raise ProfileError(f"{profile.PROFILE} is empty, so there is no place for the profile; give one with -o")
    began = time.perf_counter()
    device = measure(args.procs, args.quick, console)
    profile.save(device, where)
    out = Console(highlight=False)
    for table in tables(device):
        out.print(table)
    out.print(f"measured in {time.perf_counter() - began:.0f} s; written to {where}", soft_wrap=True)
    return 0


def tables(device: Device) -> list[Table]:
    """What was measured, for reading: rates by size, sharing, collectives."""
    own = device.measured
    assert own is not None
    rates = Table(title="rates by size", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "smallest", "largest"):
        rates.add_column(name, justify="right" if name else "left")
    named = {f"{k} matmul" if k != "convolution" else k: c for k, c in own.matmul.items()}
    if own.attention is not None:
        named["attention"] = own.attention
    for name, c in named.items():
        rates.add_row(name, *(f"{c.points[i][1] / 1e9:.1f} GFLOP/s" for i in (0, -1)))
    for name, c in own.memory.items():
        rates.add_row(f"memory: {name}", *(f"{c.points[i][1] / 1e9:.1f} GB/s" for i in (0, -1)))
    rates.add_row("launch, view", f"{device.launch * 1e6:.1f} us", f"{own.view * 1e6:.1f} us")
    for what, least in (("", own.linear_from), (", gradients of weights", own.weights_from)):
        if least is not None:
            rates.add_row(f"oneDNN is quicker{what}", f"from {least / 1e6:.1f} MFLOP")
    shared = Table(title="slower by, when ranks share this machine", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("ranks", "matmul", "memory", "launch", "update", "lost beside communication"):
        shared.add_column(name, justify="right")
    for crowd in own.crowds:
        factors = (crowd.matmul, crowd.memory, crowd.launch, crowd.update)
        shared.add_row(str(crowd.ranks), *(f"{n:.2f}" for n in factors), f"{100 * crowd.beside:.0f} %")
    talk = Table(title="collectives", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("kind / group / ranks", "smallest", "largest"):
        talk.add_column(name, justify="right" if name[0] != "k" else "left")
    for name, c in own.collectives.items():
        talk.add_row(name, *(f"{c.points[i][1] * 1e6:.0f} us ({c.points[i][0] / 1024:g} KiB)" for i in (0, -1)))
    return [rates, shared, talk]


__all__ = ["add", "measure", "tables"]
