"""How many bytes of tensors are alive, op by op: exact, and independent of allocator and of other processes.

    with LiveBytes(held) as live:
        step()
    live.peak, live.at_peak

It sees every storage that an op at the dispatcher returns, until Python and autograd have let go of it. What a kernel
allocates inside itself and frees before it returns is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autopar.capture import TorchDispatchMode
from autopar.moments import Alive, Moment, Track
from autopar.offload import on_host
from autopar.runtime.storage import DTensor


@dataclass
class Life:
    """A storage: what made it, its bytes, and events between which it was alive.

    kind: of memory, of what was held before; else "". died: None while it is alive.
    """

    name: str
    size: int
    kind: str
    born: int
    died: int | None = None


class LiveBytes(TorchDispatchMode):
    """Counts live storages.

    Attributes:
        peak: most bytes that were alive at once. now: that are. at_peak: with `detail`, by what made them.
        phase: of the step, to be set by whoever runs it; what was alive is told by it (`track`).

    Args:
        held: tensors that are alive already and count from the start; or those by kind of memory.
        detail: keep what was alive at the peak. trace: keep every event, and the life of every storage.
    """

    def __init__(
        self,
        held: Iterable[torch.Tensor] | Mapping[str, Iterable[torch.Tensor]] = (),
        detail: bool = False,
        trace: bool = False,
    ) -> None:
        super().__init__()
        self.detail, self.trace = detail, trace
        self.now = self.peak = 0
        self.names: dict[int, tuple[str, int]] = {}  # number of a storage -> op that made it, bytes
        self.at_peak: Counter[str] = Counter()
        self.phase = ""
        self.events: list[tuple[str, str]] = []  # phase, op
        self.lives: dict[int, Life] = {}
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._spans: dict[int, tuple[int, int]] = {}  # number of a storage -> its addresses
        self._number = 0
        groups = held if isinstance(held, Mapping) else {"held": held}
        for kind, tensors in groups.items():
            for tensor in tensors:
                self._count(tensor, kind, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and count what it returns."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local ops come by
        out = func(*args, **(kwargs or {}))
        if self.trace:
            self.events.append((self.phase, str(func)))
        for value in _tensors(out):
            if not isinstance(value, DTensor):
                self._count(value, str(func))
        return out

    def _count(self, tensor: torch.Tensor, name: str, kind: str = "") -> None:
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
        if self.trace:
            self.lives[number] = Life(self.names[number][0], size, kind, max(0, len(self.events) - 1))
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
        if number in self.lives:
            self.lives[number].died = len(self.events)

    def track(self, name: str, gradients: Iterable[int] = (), most: int = 12) -> Track:
        """Every event with what was alive behind it, by kind; of a traced step.

        What a forward has made and a backward lets go of is activations (outputs outlive both). gradients: addresses of
        storages that are known to be.

        Raises:
            ValueError: nothing was traced.
        """
        if not self.events:
            raise ValueError("no op has run with trace=True")
        phases = [phase for phase, _ in self.events]
        behind = phases.index("backward") if "backward" in phases else len(phases)
        addresses = set(gradients)
        change: list[Counter[str]] = [Counter() for _ in range(len(self.events) + 1)]
        kinds: dict[int, str] = {}
        for number, life in self.lives.items():
            kind = life.kind
            if not kind and self._spans.get(number, (0, 0))[0] in addresses:
                kind = "gradients"
            elif not kind:
                read = life.died is not None and life.born < behind < life.died < len(phases)
                kind = "activations" if read else "transient"
            kinds[number] = kind
            change[life.born][kind] += life.size
            if life.died is not None:
                change[min(life.died, len(self.events))][kind] -= life.size
        now: Counter[str] = Counter()
        moments = []
        for at, (phase, op) in enumerate(self.events):
            now.update(change[at])
            moments.append(Moment(at, phase, op, {k: float(v) for k, v in now.items() if v}))
        top = max(range(len(moments)), key=lambda at: moments[at].total)
        found: dict[tuple[str, str], Alive] = {}
        for number, life in self.lives.items():
            if life.born <= top and (life.died is None or life.died > top):
                key = (life.name, kinds[number])
                was = found.get(key, Alive(life.name, "", kinds[number], 0.0, 0))
                found[key] = Alive(life.name, "", kinds[number], was.bytes + life.size, was.count + 1)
        largest = sorted(found.values(), key=lambda a: -a.bytes)[:most]
        return Track(name, tuple(moments), "ops", tuple(largest))


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    """The tensors among the results of an op."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _tensors(value)


__all__ = ["Life", "LiveBytes"]
