"""Bytes per rank of what stays: parameters, gradients, optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.costmodel.items import Item
from autopar.errors import ConstraintError
from autopar.plan import DEVICE
from autopar.spec import Shape, Spec, local_shape

#: Kinds of memory, in the order in which reports print them.
KINDS = (
    "parameters", "gradients", "optimizer", "gathered", "activations", "buffers", "inputs", "collectives", "transient",
    "slack",
)  # fmt: skip


@dataclass(frozen=True)
class Optimizer:
    """What a class of optimizer keeps and needs.

    Attributes:
        state: elements of state of a parameter's piece, given the shape of the piece; in the parameter's dtype.
        scratch: temporaries of an update, in pieces of the largest parameter (one parameter is updated at a time).
        numbers: of four bytes, of each parameter, whatever its size: how many steps it has made.
        pieces: whether an element's update depends on that element alone, so that pieces can be stepped apart.
    """

    state: Callable[[Shape], float]
    scratch: float
    numbers: int = 1
    pieces: bool = True


def _pieces(count: float) -> Callable[[Shape], float]:
    return lambda shape: count * math.prod(shape)


def _factored(shape: Shape) -> float:
    """A row and a column of second moments (Shazeer and Stern, Adafactor, 2018, section 3); all of them of a vector."""
    if len(shape) < 2:
        return float(math.prod(shape))
    return float(math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1])


#: As torch.optim keeps it. Lion: Chen et al., 2023, algorithm 2 (one moment).
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_pieces(2), 2),
    "adam": Optimizer(_pieces(2), 2),
    "nadam": Optimizer(_pieces(2), 2, 2),
    "radam": Optimizer(_pieces(2), 2),
    "adamax": Optimizer(_pieces(2), 2),
    "amsgrad": Optimizer(_pieces(3), 2),
    "sgd": Optimizer(_pieces(0), 0, 0),
    "sgd_momentum": Optimizer(_pieces(1), 0, 0),
    "rmsprop": Optimizer(_pieces(1), 1),
    "adagrad": Optimizer(_pieces(1), 1),
    "lion": Optimizer(_pieces(1), 1, 0),
    "muon": Optimizer(_pieces(1), 4, 0, pieces=False),
    "adafactor": Optimizer(_factored, 2, pieces=False),
}


@dataclass(frozen=True)
class Policy:
    """What training keeps: bytes of optimizer state per element if given, else what the class `optimizer` keeps.

    Raises:
        ConstraintError: no optimizer of that name is known.
    """

    training: bool
    optimizer_bytes: float | None = None
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConstraintError(
                f"no optimizer {self.optimizer!r} is known; choose one of {', '.join(OPTIMIZERS)}, or give "
                "optimizer_bytes, the bytes of state per parameter element"
            )

    @property
    def scratch(self) -> float:
        """Temporaries of an update, in pieces of the largest parameter."""
        return OPTIMIZERS[self.optimizer].scratch

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
            kept = OPTIMIZERS[self.optimizer]
            moments = kept.state(shape) * meta.itemsize + 4 * kept.numbers
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
