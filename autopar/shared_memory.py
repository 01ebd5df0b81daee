"""Parameters and buffers that are different tensors in the same memory.

A change of one is a change of the other, which a graph of values cannot say. It does no harm where both are only read.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from autopar.errors import CaptureError
from autopar.graph import Program


def overlaps(named: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, str]]:
    """Pairs of names of different tensors of which some bytes are the same (a tensor of two names is one tensor)."""
    pieces: dict[int, dict[int, tuple[int, int, str]]] = {}
    for name, t in named:
        if type(t) in (torch.Tensor, nn.Parameter, nn.Buffer) and not t.is_meta and t.layout is torch.strided:
            begin = int(t.storage_offset()) * t.itemsize
            end = begin + t.itemsize * (1 + sum((int(n) - 1) * int(s) for n, s in zip(t.shape, t.stride())))
            memory = t.untyped_storage().data_ptr()
            if memory and t.numel():
                pieces.setdefault(memory, {}).setdefault(id(t), (begin, end, name))
    found = []
    for group in pieces.values():
        row = sorted(group.values())
        # Sorted by where they begin, so the first that begins behind is the last to look at: a flat buffer may hold
        # every parameter of a model.
        for i, (_, end, name) in enumerate(row):
            j = i + 1
            while j < len(row) and row[j][0] < end:
                found.append((name, row[j][2]))
                j += 1
    return found


def check_memory(overlapping: Iterable[tuple[str, str]], program: Program) -> None:
    """Refuse a program that writes, in a step or in its forward, memory that it reads under another name.

    Raises:
        CaptureError: names both tensors.
    """
    written = {s.name for s in program.sources if s.trainable} | {s.name for s in program.sinks if s.kind == "buffer"}
    for a, b in overlapping:
        if a in written or b in written:
            raise CaptureError(
                f"{a!r} and {b!r} are different tensors in the same memory, and one of them is changed; make them one "
                f"tensor (other.weight = this.weight ties them), or clone one of them"
            )
