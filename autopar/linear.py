"""x @ weight.T + bias as oneDNN computes it, in float32 on the CPU: a function, and the op `autopar::linear`.

PyTorch sends float32 products on x86 to the BLAS it is built with, and has oneDNN beside it, which is quicker at some
sizes on some processors. From which size on, `autopar calibrate` measures; `passes/products.py` then puts the op in.
Sums are taken in another order than by the BLAS, otherwise the values are the same.

oneDNN takes rows that are dense, a weight that is dense along one dim, and reads a bias as if it were dense: others are
copied, here and not within, where nobody would see how much memory that takes.
"""

from __future__ import annotations

from typing import Any

import torch

_BUILT = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
#: Torch's op. Its lowering in inductor takes constant weights only; hence ours.
KERNEL: Any = torch.ops.mkldnn._linear_pointwise.default if _BUILT else None
_REST: tuple[Any, ...] = ("none", [], "")  # no function of the result: its name, scalars, algorithm
#: Of gradients of weights with a side shorter than this, the copy of an operand takes longer than is gained.
THIN = 128

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def available() -> bool:
    """Whether this PyTorch has oneDNN, and may use it (`torch.backends.mkldnn`)."""
    return bool(_BUILT and torch.backends.mkldnn.enabled)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x: [m, k], weight: [n, k], bias: [n], all float32 on the CPU, with any strides -> [m, n], contiguous."""
    return KERNEL(x.contiguous(), _dense(weight), None if bias is None else bias.contiguous(), *_REST)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied if it is dense along neither dim, or rows overlap."""
    (rows, columns), (down, right) = x.shape, x.stride()
    return x if (right == 1 and down >= columns) or (down == 1 and right >= rows) else x.contiguous()


def _shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_LIBRARY.impl("linear", linear, "CPU")
_LIBRARY.impl("linear", _shape, "Meta")

__all__ = ["KERNEL", "THIN", "available", "linear"]
