"""The peak of live bytes of a step of training; see `autopar/live_bytes.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


__all__ = ["LiveBytes", "peak_of_step"]
