"""The transport within one process: what one executor sends, another receives, or there is only one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.errors import RankMismatchError
from autopar.runtime.alarm import Alarm
from autopar.runtime.transport import Arrival, Lost, Sent
from autopar.runtime.work import Form, Message


class Loopback:
    """The transport of every rank of one process.

    Messages of a pair of ranks match in order, both directions of the pipeline together, as on gloo.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sent: dict[tuple[int, int], list[Tensor | None]] = defaultdict(list)
        self._asked: dict[tuple[int, int], int] = defaultdict(int)

    def of(self, rank: int) -> LoopbackRank:
        """The view of one rank."""
        return LoopbackRank(self, rank)

    def left(self) -> list[str]:
        """What was sent and not received."""
        return [
            f"{len(sent) - self._asked[pair]} messages from rank {pair[0]} to rank {pair[1]}"
            for pair, sent in self._sent.items()
            if len(sent) > self._asked[pair]
        ]


class LoopbackRank:
    """See `autopar.runtime.transport.Transport`. Waits for nothing: what has not come is lost."""

    def __init__(self, home: Loopback, rank: int) -> None:
        self.device = home.device
        self.alarm: Alarm | None = None
        self._home, self._rank = home, rank

    def meet(self, links: Sequence[tuple[int, int]]) -> None:
        """Nothing to do."""

    def send(self, buffer: Tensor, peer: int, way: int) -> Sent:
        """A copy, as it is now, so that a sender who writes there later would be found out."""
        self._home._sent[self._rank, peer].append(buffer.clone())
        return _Copied()

    def receive(self, message: Message, peer: int, way: int) -> Arrival:
        """The next of this pair."""
        pair = peer, self._rank
        number = self._home._asked[pair]
        self._home._asked[pair] += 1
        return _Awaited(self._home._sent[pair], number, message)

    def settle(self, seconds: float) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class _Copied:
    def done(self) -> bool:
        return True

    def wait(self, seconds: float) -> None:
        pass


class _Awaited:
    def __init__(self, sent: list[Tensor | None], number: int, message: Message) -> None:
        self._sent, self._number, self._message = sent, number, message

    def ready(self) -> bool:
        return len(self._sent) > self._number

    def wait(self, seconds: float) -> Tensor:
        if not self.ready():
            raise Lost("it was never sent")
        buffer = self._sent[self._number]
        assert buffer is not None, "a message is waited for once"
        self._sent[self._number] = None
        if Form.of(buffer) != self._message.form:
            raise RankMismatchError(f"receives {Form.of(buffer)} in place of {self._message.form}")
        return buffer


__all__ = ["Loopback", "LoopbackRank"]
