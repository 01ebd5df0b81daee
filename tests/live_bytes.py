"""The peak of live bytes of a step of training; see `autopar/live_bytes.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autopar.live_bytes import LiveBytes


def peak_of_step(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, torch.Tensor],
    step: Callable[[], None],
) -> int:
    """The peak of live bytes in one step of training; what is there before it counts."""
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    with LiveBytes([*module.parameters(), *module.buffers(), *batch.values(), *state]) as live:
        step()
    return live.peak


def peak_of_training(pm: Any, batch: Mapping[str, torch.Tensor]) -> int:
    """The peak of live bytes in a step of AdamW, the lowest of three: a thread may let go late."""
    optimizer = torch.optim.AdamW(pm.parameters())

    def step() -> None:
        out = pm(**batch)
        (out if isinstance(out, torch.Tensor) else out[0]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    return min(peak_of_step(pm, optimizer, batch, step) for _ in range(3))


__all__ = ["LiveBytes", "peak_of_step", "peak_of_training"]
