"""Bytes per rank of what stays: parameters, gradients, optimizer state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.costmodel.items import Item
from autopar.spec import Spec, local_shape

#: Kinds of memory, in the order in which reports print them.
KINDS = ("parameters", "gradients", "optimizer", "gathered", "activations", "buffers", "inputs", "transient")


@dataclass(frozen=True)
class Policy:
    """What training keeps per element. optimizer_bytes None: two values of the parameter's dtype (Adam)."""

    training: bool
    optimizer_bytes: float | None = None

    def optimizer(self, item: Item) -> float:
        """Bytes of optimizer state per element of a parameter."""
        meta = item.outs[0]
        assert meta is not None
        if not self.training or item.source is None or not item.source.trainable:
            return 0.0
        return 2.0 * meta.itemsize if self.optimizer_bytes is None else self.optimizer_bytes

    def stored(self, item: Item, spec: Spec, sizes: Sequence[int]) -> dict[str, float]:
        """Bytes of one parameter by kind, on one rank."""
        meta = item.outs[0]
        assert meta is not None
        count = math.prod(local_shape(meta.shape, spec, sizes))
        trained = self.training and item.source is not None and item.source.trainable
        return {
            "parameters": float(count * meta.itemsize),
            "gradients": float(count * meta.itemsize) if trained else 0.0,
            "optimizer": count * self.optimizer(item),
        }

    def update_bytes(self, item: Item, spec: Spec, sizes: Sequence[int]) -> float:
        """Memory traffic of the optimizer's update: parameter and state read and written, gradient read."""
        held = self.stored(item, spec, sizes)
        return 2 * held["parameters"] + held["gradients"] + 2 * held["optimizer"] if held["gradients"] else 0.0
