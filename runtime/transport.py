"""Point to point messages of a pipeline over process groups, none of which waits without end.

Messages have no tags, since NCCL has none: those of one pair of ranks in one direction match in the order in which they
are sent and in which their receives are posted, which a checked table has made the same.

gloo: a send is done when the receiver has taken it, so nobody waits for a send before it has posted its own receives; a
wait that times out closes every connection of the group, which is also how `close` does it. A receive that is smaller
than its message ends the process: hence `autopar.runtime.lineup`. Tensors on a GPU pass through host memory.

NCCL: what is posted on one communicator runs in order, so forward and backward have one each; `wait` makes the stream
wait and not the host, so only `settle` at the end of a row, and sends that are too many, look at the clock.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.runtime.alarm import Alarm
from autopar.runtime.work import Message

FORWARD, BACKWARD = 0, 1
_CLOSING = 1  # a tag that no message has
_NAPS = (2e-5, 1e-3)  # seconds between two looks at what is on its way: at first, and at most


class Lost(Exception):
    """A message that did not come, or was not taken. `why`: what the transport says; `what`: what the rank does."""

    def __init__(self, why: str, what: str = "communicates") -> None:
        super().__init__(f"{what}: {why}")
        self.why, self.what = why, what


class Sent(Protocol):
    """A message on its way to another rank."""

    def done(self) -> bool:
        """Whether it has surely arrived; may stay False until it is waited for."""

    def wait(self, seconds: float) -> None:
        """Return when its memory is free again.

        Raises:
            Lost: not within `seconds`, or never.
        """


class Arrival(Protocol):
    """A message that is to come."""

    def ready(self) -> bool:
        """Whether `wait` would find it; False if that is not known."""

    def wait(self, seconds: float) -> Tensor:
        """The buffer, as `Message.pack` made it, for use on the current stream.

        Raises:
            Lost: it did not come within `seconds`, or will not come.
        """


class Transport(Protocol):
    """What carries the messages of one rank. `way`: FORWARD or BACKWARD."""

    @property
    def alarm(self) -> Alarm | None:
        """Where failures are told; None if no other process takes part."""

    @property
    def device(self) -> torch.device:
        """Where received tensors are."""

    def meet(self, links: Sequence[tuple[int, int]]) -> None:
        """Let every (from, to) of all ranks meet once, in this order, if the transport needs it. A collective call."""

    def send(self, buffer: Tensor, peer: int, way: int) -> Sent:
        """Begin to send; nobody writes to `buffer` before it is done."""

    def receive(self, message: Message, peer: int, way: int) -> Arrival:
        """Begin to receive."""

    def settle(self, seconds: float) -> None:
        """Return when everything received has truly come. Raises as `Arrival.wait`."""

    def close(self) -> None:
        """End every wait of this rank, and what others wait for from it, from whatever thread. For ever."""


class GroupTransport:
    """Messages over torch.distributed; ranks are those of the group, which are those of the table.

    Args:
        forward: process group of the ranks of one pipeline, in order.
        backward: another one of the same ranks, for gradients; needed on NCCL, None: the same.
        device: where the stages of this rank are.
        staged: messages go through host memory. None: if the device is a GPU and the group is no NCCL group.

    Attributes:
        device: where what is received lies.
        alarm: see `autopar.runtime.alarm`.
        lazy: pairs of ranks have to meet before they communicate.
    """

    def __init__(
        self,
        forward: dist.ProcessGroup,
        backward: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        staged: bool | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.alarm: Alarm | None = Alarm(forward)
        self._groups = (forward, backward or forward)
        self._size, self._rank = forward.size(), forward.rank()
        self._streams = self.device.type == "cuda" and "nccl" in str(dist.get_backend(forward))
        self.lazy = self._streams
        self._staged = self.device.type == "cuda" and not self._streams if staged is None else staged
        self._unsettled: deque[dist.Work] = deque()
        self._closed = False

    def send(self, buffer: Tensor, peer: int, way: int) -> Sent:
        """See `Transport`."""
        if self._staged:
            buffer = buffer.to("cpu", copy=True)
        return _GroupSent(_begun(dist.isend, buffer, group=self._groups[way], group_dst=peer), buffer, self._streams)

    def receive(self, message: Message, peer: int, way: int) -> Arrival:
        """See `Transport`."""
        buffer = message.empty(torch.device("cpu") if self._staged else self.device)
        work = _begun(dist.irecv, buffer, group=self._groups[way], group_src=peer)
        if self._streams:
            while self._unsettled and self._unsettled[0].is_completed():
                self._unsettled.popleft()
            self._unsettled.append(work)
        return _GroupArrival(work, buffer, self._streams, self.device if self._staged else None)

    def meet(self, links: Sequence[tuple[int, int]]) -> None:
        """See `Transport`: NCCL makes a pair's communicator when both first send, and all wait in between."""
        if not self.lazy:
            return
        byte = torch.zeros(1, dtype=torch.uint8, device="cpu" if self._staged else self.device)
        for group in dict.fromkeys(self._groups):
            for source, target in links:
                if self._rank == source:
                    _begun(dist.isend, byte, group=group, group_dst=target).wait()
                elif self._rank == target:
                    _begun(dist.irecv, byte.clone(), group=group, group_src=source).wait()

    def settle(self, seconds: float) -> None:
        """See `Transport`."""
        while self._unsettled:
            try:
                _look(self._unsettled[0], seconds)
            except Lost as lost:
                raise Lost(lost.why, "waits for what it has begun to receive") from lost
            self._unsettled.popleft()

    def close(self) -> None:
        """See `Transport`."""
        if self._closed or self._size == 1:
            return
        self._closed = True
        for group in dict.fromkeys(self._groups):
            if self._streams:
                group.abort()
                continue
            for peer in range(self._size):  # a time-out closes all, but of a peer that is gone there is none
                if peer != self._rank:
                    _time_out(group, peer)


def _time_out(group: dist.ProcessGroup, peer: int) -> None:
    """Wait for a message that nobody sends; gloo."""
    try:
        never = dist.irecv(torch.empty(1), group=group, group_src=peer, tag=_CLOSING)
        assert never is not None
        never.wait(timedelta(milliseconds=1))
    except RuntimeError:  # as it should; or closed before
        return


class _GroupSent:
    def __init__(self, work: dist.Work, buffer: Tensor, streams: bool) -> None:
        self._work, self._buffer, self._streams = work, buffer, streams  # the buffer lives as long as this

    def done(self) -> bool:
        return self._work.is_completed()

    def wait(self, seconds: float) -> None:
        if self._streams:
            _look(self._work, seconds)
        else:
            _wait(self._work, seconds)


class _GroupArrival:
    def __init__(self, work: dist.Work, buffer: Tensor, streams: bool, device: torch.device | None) -> None:
        self._work, self._buffer, self._streams, self._device = work, buffer, streams, device

    def ready(self) -> bool:
        return self._work.is_completed()

    def wait(self, seconds: float) -> Tensor:
        if self._streams:
            self._work.wait()
        else:
            _wait(self._work, seconds)
        return self._buffer if self._device is None else self._buffer.to(self._device, copy=True)


def _begun(function: Callable[..., dist.Work | None], *args: Any, **kwargs: Any) -> dist.Work:
    try:
        work = function(*args, **kwargs)
    except RuntimeError as error:
        raise Lost(_reason(error)) from error
    assert work is not None, "this process is not in the group"
    return work


@lru_cache
def _limit(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _wait(work: dist.Work, seconds: float) -> None:
    """Let the host wait; gloo."""
    try:
        work.wait(_limit(seconds))
    except RuntimeError as error:
        late = "timed out" in str(error).lower()
        raise Lost(f"not within {seconds:g} s" if late else _reason(error)) from error


def _look(work: dist.Work, seconds: float) -> None:
    """Let the host wait; NCCL, whose own wait does not."""
    deadline, nap = time.monotonic() + seconds, _NAPS[0]
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise Lost(f"not within {seconds:g} s")
        time.sleep(nap)
        nap = min(2 * nap, _NAPS[1])


def _reason(error: RuntimeError) -> str:
    text = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])  # without the place in gloo's source, and its advice
    return f"the connection was closed ({text.split('. This is')[0]})"


def connect(
    lines: Sequence[Sequence[int]], device: torch.device | str = "cpu", timeout: float = 300.0, staged: bool = False
) -> GroupTransport:
    """The transport of this process's pipeline. A collective call of all processes of torch.distributed.

    Args:
        lines: ranks of every pipeline, in order of the table's; this process is in one of them.
        device: where the stages of this process are.
        timeout: seconds of the executors' waits. Groups on NCCL have twice that, since what they do when they give up
            is to end the process.
        staged: the ranks are on GPUs that NCCL cannot join.
    """
    place = torch.device(device)
    nccl = place.type == "cuda" and not staged
    rank, limit = dist.get_rank(), timedelta(seconds=2 * timeout if nccl else timeout)
    own: list[dist.ProcessGroup] = []
    for line in lines:  # every process makes every group, in the same order
        for _ in range(2 if nccl else 1):
            group = dist.new_group(list(line), timeout=limit, backend="nccl" if nccl else "gloo")
            if rank in line:
                own.append(group)
    assert own, f"rank {rank} is in no pipeline of {lines}"
    return GroupTransport(own[0], own[-1], place)


__all__ = ["BACKWARD", "FORWARD", "Arrival", "GroupTransport", "Lost", "Sent", "Transport", "connect"]
