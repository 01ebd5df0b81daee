"""Dynamic loss scaling: gradients of fp16 computation, of which those below 6e-8 would be zero.

The backward starts with the gradient of the loss times `scale`; what it ends with is divided by it before it reaches
`.grad`. If anything is not finite then, on any rank, none of these gradients is handed over on any: `.grad` stays as it
was, `optimizer.step()` finds nothing to do, and the scale shrinks. After `growth_interval` backwards without that it
grows again. The numbers are those of `torch.amp.GradScaler`, which may be used in its place, with `enabled = False`
here: but not with pipelines, which have run the backward when they return the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from autopar.errors import RuntimeUseError
from autopar.runtime.groups import Grid
from autopar.runtime.handshake import Control


@dataclass
class LossScaler:
    """The scale of a module's loss, the same on every rank. Every number may be set between steps, on all ranks alike.

    Attributes:
        scale: what the gradient of the loss is multiplied with.
        growth_factor, backoff_factor: of the scale, after `growth_interval` good backwards, and after an overflow.
        enabled: if not, gradients are as they come.
        good: backwards since the scale last changed. skipped: those whose gradients have been left out.
        overflowed: whether those of the last one were.
    """

    scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True
    good: int = 0
    skipped: int = 0
    overflowed: bool = False

    @property
    def factor(self) -> float:
        """What gradients come in times."""
        return self.scale if self.enabled else 1.0

    def settle(self, grads: dict[str, Any], factor: float, grid: Grid) -> None:
        """Divide gradients by `factor` in place; drop them all if one is not finite anywhere. A collective call."""
        if not self.enabled:
            self.overflowed = False
            return
        found = [g for g in grads.values() if g is not None]
        bad = not _finite(found)
        self.overflowed = any(row[0] for row in Control(grid).rows([int(bad)]))
        if self.overflowed:
            grads.clear()
            self.scale, self.good, self.skipped = self.scale * self.backoff_factor, 0, self.skipped + 1
            return
        if factor != 1.0:
            for grad in found:
                grad.mul_(1.0 / factor)
        self.good += 1
        if self.good >= self.growth_interval:
            self.scale, self.good = self.scale * self.growth_factor, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            RuntimeUseError: it is something else.
        """
        known = {f.name for f in fields(self)}
        if set(state) != known:
            raise RuntimeUseError(f"this is no state of a LossScaler: it has {sorted(state)}, not {sorted(known)}")
        for name, value in state.items():
            setattr(self, name, value)


def _finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all elements of all tensors are; waits for the device once."""
    sums = [torch.isfinite(t).all() for t in tensors]
    return bool(torch.stack(sums).all()) if sums else True


__all__ = ["LossScaler"]
