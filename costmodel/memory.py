"""Bytes per rank of what stays: parameters, gradients, optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autopar.costmodel.items import Item
from autopar.costmodel.optimizers import optimizer_of
from autopar.plan import DEVICE
from autopar.spec import Spec, local_shape

#: Kinds of memory, in the order in which reports print them.
KINDS = (
    "parameters", "gradients", "optimizer", "gathered", "activations", "buffers", "inputs", "collectives", "transient",
    "slack",
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """What training keeps: bytes of optimizer state per element if given, else what `optimizer` keeps, a name or the
    text of a law (`costmodel.optimizers`).

    Raises:
        ConstraintError: no optimizer of that name is known, the text cannot be read, or says nothing of a piece.
    """

    training: bool
    optimizer_bytes: float | None = None
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        optimizer_of(self.optimizer)

    def temporaries(self, pieces: Iterable[tuple[int, int]], gpu: bool) -> float:
        """Bytes at the peak of an update of trained pieces, in order, each (elements, bytes of one)."""
        return optimizer_of(self.optimizer).temporaries(pieces, gpu)

    def stored(self, item: Item, spec: Spec, sizes: Sequence[int], state: str = DEVICE) -> dict[str, float]:
        """Bytes of one parameter by kind, on one rank's device. state: as of `Storage`."""
        if state != DEVICE:
            return {**self.stored(item, spec, sizes), "gradients": 0.0, "optimizer": 0.0}
        meta = item.outs[0]
        assert meta is not None
        shape = local_shape(meta.shape, spec, sizes)
        count = math.prod(shape)
        trained = self.training and item.source is not None and item.source.trainable
        moments = 0.0
        if trained and self.optimizer_bytes is not None:
            moments = count * self.optimizer_bytes
        elif trained:
            moments = optimizer_of(self.optimizer).state(shape, meta.itemsize)
        return {
            "parameters": float(count * meta.itemsize),
            "gradients": float(count * meta.itemsize) if trained else 0.0,
            "optimizer": moments,
        }

    def hosted(self, item: Item, spec: Spec, sizes: Sequence[int]) -> dict[str, float]:
        """Bytes by kind that the host holds of a parameter whose state lies there: nothing of one that is frozen."""
        held = self.stored(item, spec, sizes)
        return held if held["gradients"] else dict.fromkeys(held, 0.0)

    def update_bytes(self, item: Item, spec: Spec, sizes: Sequence[int]) -> float:
        """Memory traffic of the optimizer's update: parameter and state read and written, gradient read."""
        held = self.stored(item, spec, sizes)
        return 2 * held["parameters"] + held["gradients"] + 2 * held["optimizer"] if held["gradients"] else 0.0


__all__ = ["KINDS", "Policy"]
