"""How many bytes of tensors are alive, op by op: exact, and independent of allocator and of other processes.

    with LiveBytes(held) as live:
        step()
    live.peak, live.at_peak

It sees every storage that an op at the dispatcher returns, until Python and autograd have let go of it. What a kernel
allocates inside itself and frees before it returns is not seen; what waits on the host (`autopar.offload`) is no memory
of the device.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopar.offload import on_host


class LiveBytes(TorchDispatchMode):
    """Counts live storages. `held`: tensors that are alive already and count from the start."""

    def __init__(self, held: Iterable[torch.Tensor] = (), detail: bool = False) -> None:
        super().__init__()
        self.detail = detail
        self.now = self.peak = 0
        self.names: dict[int, tuple[str, int]] = {}  # number of a storage -> op that made it, bytes
        self.at_peak: Counter[str] = Counter()
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._spans: dict[int, tuple[int, int]] = {}  # number of a storage -> its addresses
        self._number = 0
        for tensor in held:
            self._count(tensor, "held")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local ops come by
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor):
                self._count(value, str(func))
        return out

    def _count(self, tensor: torch.Tensor, name: str) -> None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device.type == "meta" or on_host(local):
            return
        storage = local.untyped_storage()
        size, start = storage.nbytes(), storage.data_ptr()
        spans = tuple(self._spans.values())  # at once: a thread of a collective may let go of a storage meanwhile
        if storage in self._seen or any(a <= start and start + size <= b for a, b in spans):
            return  # known, or memory of a storage that is, under another head
        self._number += 1
        number = self._number
        self._seen[storage] = number
        self._spans[number] = (start, start + size)
        self.names[number] = (f"{name} {tuple(local.shape)}", size)
        weakref.finalize(storage, self._gone, number)
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            if self.detail:
                self.at_peak = Counter()
                for label, nbytes in self.names.values():
                    self.at_peak[label] += nbytes

    def _gone(self, number: int) -> None:
        self.now -= self.names.pop(number)[1]
        del self._spans[number]


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
