"""Which memory tensors lie in, and whose it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def memory_of(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in."""
    return tensor.untyped_storage().data_ptr()


class Taken:
    """Memory that belongs to others: a gradient is added to in place later, so that it must not share any."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.foreign = {memory_of(t) for t in tensors}
        self.spans: dict[int, list[tuple[int, int]]] = {}

    def also(self, tensors: Sequence[torch.Tensor]) -> Taken:
        """This, with the memory of more tensors."""
        self.foreign.update(memory_of(t) for t in tensors)
        return self

    def apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, copied if it lies in the memory of others."""
        return tensor.clone() if memory_of(tensor) in self.foreign else tensor

    def own(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient, copied if it overlaps memory handed out before; disjoint pieces of a bucket are not."""
        grad = grad.contiguous()
        store, start = memory_of(grad), grad.data_ptr()
        end = start + grad.nbytes
        spans = self.spans.setdefault(store, [])
        if store in self.foreign or (spans and any(start < b and a < end for a, b in spans)):
            return grad.clone()
        spans.append((start, end))
        return grad


__all__ = ["Taken", "memory_of"]
