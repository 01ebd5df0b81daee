"""What the commands say of memory: `autopar plan --what-if`, and `autopar simulate --memory`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from autopar import memory_picture, tradeoff
from autopar.cli_tools import emit, emit_json, positive
from autopar.errors import PlanError
from autopar.plan import Plan


def add_what_if(parser: argparse.ArgumentParser) -> None:
    """The options of `autopar plan` for the frontier of time and memory."""
    parser.add_argument(
        "--what-if", action="store_true",
        help="instead of one plan: what a step costs under less and less memory, from no limit to the least that will "
        "do; --memory is marked",
    )  # fmt: skip
    parser.add_argument("--points", type=positive, default=tradeoff.POINTS, metavar="N", help="for --what-if: limits")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="for --what-if: draw it")


def what_if(args: argparse.Namespace, model: Any, mesh: Any, tell: Callable[[str], None], **options: Any) -> int:
    """Find the frontier, and print or draw it. options: of `autopar.plan`. Raises as `tradeoff.frontier`."""
    found = tradeoff.frontier(model, mesh, points=args.points, progress=tell, **options)
    if args.svg is not None:
        write(args.svg, found.svg())
    if args.json:
        emit_json([point.as_dict() for point in found.points])
    else:
        emit(found.table())
    return 1 if found.refused is not None else 0


def add_picture(parser: argparse.ArgumentParser) -> None:
    """The options of `autopar simulate` for the picture of memory."""
    parser.add_argument(
        "--memory", nargs="?", type=Path, const=Path(), metavar="FILE.svg",
        help="what a rank holds over a step, by kind: the peak in words, and drawn into the file",
    )  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true",
        help="with --memory: also run a step of a plan for one device here, and show what it held",
    )  # fmt: skip


def picture(args: argparse.Namespace, plan: Plan) -> int:
    """Print, and perhaps draw, the memory of a plan over a step."""
    with Console(stderr=True).status("reading the plan ...") as spinner:
        found = memory_picture.memory_timeline(plan, measure=args.measure, tell=spinner.update)
    if args.memory != Path():
        write(args.memory, found.svg())
    if args.json:
        emit_json(found.as_dict())
    else:
        emit(found.text())
    return 0


def write(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        PlanError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error}") from None


__all__ = ["add_picture", "add_what_if", "picture", "what_if", "write"]
