"""What all commands share: how they print, and the numbers on their lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from autopar import report


def emit(parts: Sequence[Any]) -> None:
    """Print tables and text: as wide as the terminal, or 120 columns into a pipe."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if not console.is_terminal:
        sys.stdout.write(report.text(parts, width=120))
        return
    for part in parts:
        console.print(part)


def emit_json(data: Any) -> None:
    """Print JSON and nothing else."""
    print(json.dumps(data, indent=2))


def positive(text: str) -> int:
    """A whole number above zero, as an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)
