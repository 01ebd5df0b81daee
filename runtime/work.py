"""What a stage can do, and how what it gives travels: the contract between the executor and whoever computes.

A `Work` is a stage that computes: graphs of a cut model, a stage that only sleeps, a toy in a test. The executor asks
no more of it than this, and knows nothing of parameters or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autopar.errors import RuntimeUseError

ALIGNED = 16  # bytes; every dtype may begin there


class Form(NamedTuple):
    """Dtype and shape of one tensor of a message.

    >>> str(Form(torch.bfloat16, (4, 8)))
    'bfloat16[4, 8]'
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """The form of this tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


Forms = tuple[Form, ...]


class Work(Protocol):
    """One stage. `micro`: number of the micro-batch in the table, `received`: tensors as the forms say.

    What is received is shared with others and only read. What is returned is sent as it is, without a copy, while the
    stage goes on: nobody may write to its memory any more. So a parameter, a gradient accumulator or a buffer that is
    used again is returned as a clone.
    """

    @property
    def receives_forward(self) -> Forms:
        """What RF brings, from the stage before; () for the first stage."""

    @property
    def sends_forward(self) -> Forms:
        """What SF takes to the stage behind; () for the last stage."""

    @property
    def receives_backward(self) -> Forms:
        """What RB brings: gradients of `sends_forward`, or of some of it."""

    @property
    def sends_backward(self) -> Forms:
        """What SB takes back; () for the first stage."""

    def forward(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        """F: what is to be sent on."""

    def backward(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        """B: what is to be sent back; gradients of weights are added up here."""

    def input_grads(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        """I: what is to be sent back; gradients of weights follow in `weight_grads`."""

    def weight_grads(self, micro: int) -> None:
        """W: the rest of a backward begun by `input_grads`."""

    def update(self, number: int) -> None:
        """U: step the optimizer with what was added up."""


class Message:
    """How the tensors of one action travel: one alone as it is, several in one buffer of bytes, nothing not at all.

    Attributes:
        forms: of the tensors, in order.
        size: bytes on the way; 0: no message is sent, and the receiver makes the (empty) tensors itself.
    """

    def __init__(self, forms: Sequence[Form]) -> None:
        self.forms: Forms = tuple(Form(dtype, tuple(shape)) for dtype, shape in forms)
        self._offsets: list[int] = []
        size = 0
        for form in self.forms:
            self._offsets.append(size)
            size += -(-form.nbytes // ALIGNED) * ALIGNED
        alone = len(self.forms) == 1
        self.size = self.forms[0].nbytes if alone else size
        self.form = self.forms[0] if alone else Form(torch.uint8, (size,))

    def check(self, tensors: Sequence[Tensor], who: str) -> None:
        """Require that the tensors have the forms: the receiver's buffer is made by them.

        Raises:
            RuntimeUseError: they have others; `who` has made them.
        """
        if len(tensors) == len(self.forms):
            for tensor, (dtype, shape) in zip(tensors, self.forms):
                if tensor.dtype is not dtype or tensor.shape != shape:
                    break
            else:
                return
        raise RuntimeUseError(
            f"{who} gives {_listed([Form.of(t) for t in tensors])}, but was announced to give {_listed(self.forms)}; "
            "what a stage sends has the same dtypes and shapes for every micro-batch"
        )

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """What is sent: contiguous; the tensor itself if it is one, and contiguous."""
        if len(tensors) == 1:
            (tensor,) = tensors
            return (tensor.detach() if tensor.requires_grad else tensor).contiguous()
        buffer = torch.empty(self.size, dtype=torch.uint8, device=tensors[0].device)
        for tensor, place in zip(tensors, self.unpack(buffer)):
            place.copy_(tensor.detach())
        return buffer

    def empty(self, device: torch.device) -> Tensor:
        """New memory for what `pack` gives on the other side."""
        return torch.empty(self.form.shape, dtype=self.form.dtype, device=device)

    def unpack(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in the buffer: views of it."""
        if len(self.forms) == 1:
            return [buffer]
        return [
            buffer[at : at + form.nbytes].view(form.dtype).view(form.shape)
            for at, form in zip(self._offsets, self.forms)
        ]


def _listed(forms: Sequence[Form]) -> str:
    return ", ".join(map(str, forms)) or "nothing"


__all__ = ["Form", "Forms", "Message", "Work"]
