"""Bytes of tensors that ops have made and that are still alive: what an optimizer's update needs besides."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dicts within one another, and those that wrapping tensors are made of."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from leaves(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)


class Live(TorchFunctionMode):
    """Counts, within its block, storages that come and go. What one call makes and frees inside itself is not seen.

    Attributes:
        now, peak: bytes of storages made since the block began.
    """

    def __init__(self, held: Any = ()) -> None:
        """`held`: tensors that are there already, and do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in leaves(held):
            self._sizes[tensor.untyped_storage()] = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for value in leaves(out):
            self._count(value)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[storage] = size
        weakref.finalize(storage, self._gone, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size


__all__ = ["Live", "leaves"]
