"""Where the tensors of a stage come from and go to: another stage on the rank, a message, or nowhere.

An inlet brings what a stage receives from one side, an outlet takes what it makes to the other, by micro-batch.
Messages are called by their sends: 1SF3 are the activations of micro-batch 3 of stage 1, wherever they go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from autopar.errors import ScheduleError
from autopar.pipeline.comms import sending
from autopar.pipeline.table import Action
from autopar.runtime.transport import Arrival, Lost, Sent, Transport
from autopar.runtime.work import Message


class Inlet:
    """What comes from one side. This one: nothing does, for there is no stage."""

    def __init__(self, receive: Action) -> None:
        """`receive`: RF or RB of the stage, of any micro-batch."""
        self._receive = receive

    def name(self, micro: int) -> str:
        """Of the message, whether or not it travels."""
        return str(sending(self._receive._replace(index=micro)))

    def post(self, micro: int) -> None:
        """Begin to receive."""
        raise ScheduleError("receives from nobody: the stage on that side is on the same rank, or there is none")

    def take(self, micro: int) -> list[Tensor]:
        """What came; once."""
        return []

    def ready(self, micro: int) -> bool:
        """Whether `take` would not wait, as far as that is known."""
        return True

    def left(self) -> list[str]:
        """What nobody took."""
        return []


class Near(Inlet):
    """From a stage on this rank."""

    def __init__(self, receive: Action) -> None:
        super().__init__(receive)
        self._given: dict[int, list[Tensor]] = {}

    def give(self, micro: int, tensors: list[Tensor]) -> None:
        """Hand over."""
        if micro in self._given:
            raise ScheduleError(f"makes {self.name(micro)} again, and the one before is not yet used")
        self._given[micro] = [t.detach() if t.requires_grad else t for t in tensors]

    def take(self, micro: int) -> list[Tensor]:
        """See `Inlet`."""
        given = self._given.pop(micro, None)
        if given is None:
            raise ScheduleError(f"needs {self.name(micro)}, which is not made before it")
        return given

    def left(self) -> list[str]:
        """See `Inlet`."""
        return [f"{self.name(micro)}, which nobody used" for micro in self._given]


class Far(Inlet):
    """From a stage on rank `peer`."""

    def __init__(
        self, receive: Action, message: Message, peer: int, way: int, transport: Transport, timeout: float
    ) -> None:
        super().__init__(receive)
        self._message, self._peer, self._way = message, peer, way
        self._transport, self._timeout = transport, timeout
        self._posted: dict[int, Arrival | None] = {}

    def post(self, micro: int) -> None:
        """See `Inlet`."""
        if micro in self._posted:
            raise ScheduleError(f"receives {self.name(micro)} again, and the one before is not yet used")
        arrival = None
        if self._message.size:
            try:
                arrival = self._transport.receive(self._message, self._peer, self._way)
            except Lost as lost:
                raise self._lost(micro, lost) from lost
        self._posted[micro] = arrival

    def take(self, micro: int) -> list[Tensor]:
        """See `Inlet`."""
        try:
            arrival = self._posted.pop(micro)
        except KeyError:
            raise ScheduleError(f"needs {self.name(micro)}, which is not received before it") from None
        if arrival is None:
            return self._message.unpack(self._message.empty(self._transport.device))
        try:
            return self._message.unpack(arrival.wait(self._timeout))
        except Lost as lost:
            raise self._lost(micro, lost) from lost

    def _lost(self, micro: int, lost: Lost) -> Lost:
        return Lost(lost.why, f"waits for {self.name(micro)} from rank {self._peer}")

    def ready(self, micro: int) -> bool:
        """See `Inlet`."""
        arrival = self._posted.get(micro)
        return arrival is None or arrival.ready()

    def left(self) -> list[str]:
        """See `Inlet`."""
        return [f"{self.name(micro)}, which was received and not used" for micro in self._posted]


class Outlet:
    """Where to one side something goes. This one: nowhere, for there is no stage."""

    def __init__(self, send: Action, message: Message) -> None:
        """`send`: SF or SB of the stage, of any micro-batch."""
        self._send, self._message = send, message
        self._who = f"stage {send.stage} {'forward' if send.kind == 'SF' else 'backward'}"

    def put(self, micro: int, tensors: list[Tensor]) -> None:
        """What the stage made.

        Raises:
            RuntimeUseError: it has other forms than were announced.
        """
        self._message.check(tensors, self._who)

    def send(self, micro: int) -> None:
        """Begin to send what was put."""
        raise ScheduleError("sends to nobody: the stage on that side is on the same rank, or there is none")

    def left(self) -> list[str]:
        """What was not sent."""
        return []


class NearOut(Outlet):
    """To a stage on this rank."""

    def __init__(self, send: Action, message: Message, inlet: Near) -> None:
        super().__init__(send, message)
        self._inlet = inlet

    def put(self, micro: int, tensors: list[Tensor]) -> None:
        """See `Outlet`."""
        self._message.check(tensors, self._who)
        self._inlet.give(micro, tensors)


class Sends:
    """The sends of a rank that may still be on their way; each keeps its tensors.

    `limit`: how many before the oldest is waited for. A table that has passed its checks has no deadlock with one.
    """

    def __init__(self, limit: int, timeout: float) -> None:
        self._limit, self._timeout = limit, timeout
        self._going: deque[tuple[Sent, Callable[[int], str], int]] = deque()

    def add(self, sent: Sent, what: Callable[[int], str], micro: int) -> None:
        """One more. `what(micro)`: the send and the rank, for the text of an error."""
        going = self._going
        going.append((sent, what, micro))
        while going[0][0].done():
            going.popleft()
            if not going:
                return
        if len(going) > self._limit:
            self._wait()

    def wait(self) -> None:
        """Wait for all."""
        while self._going:
            self._wait()

    def _wait(self) -> None:
        sent, what, micro = self._going[0]
        try:
            sent.wait(self._timeout)
        except Lost as lost:
            raise Lost(lost.why, what(micro)) from lost
        self._going.popleft()


class FarOut(Outlet):
    """To a stage on rank `peer`."""

    def __init__(self, send: Action, message: Message, peer: int, way: int, transport: Transport, sends: Sends) -> None:
        super().__init__(send, message)
        self._peer, self._way, self._transport, self._sends = peer, way, transport, sends
        self._made: dict[int, list[Tensor]] = {}

    def put(self, micro: int, tensors: list[Tensor]) -> None:
        """See `Outlet`."""
        self._message.check(tensors, self._who)
        if micro in self._made:
            raise ScheduleError(f"makes {self._name(micro)} again, and the one before is not yet sent")
        self._made[micro] = tensors

    def send(self, micro: int) -> None:
        """See `Outlet`."""
        tensors = self._made.pop(micro, None)
        if tensors is None:
            raise ScheduleError(f"has nothing to send: {self._name(micro)} is not made before it")
        if not self._message.size:
            return
        try:
            sent = self._transport.send(self._message.pack(tensors), self._peer, self._way)
        except Lost as lost:
            raise Lost(lost.why, self._what(micro)) from lost
        self._sends.add(sent, self._what, micro)

    def _what(self, micro: int) -> str:
        return f"waits for rank {self._peer} to take {self._name(micro)}"

    def _name(self, micro: int) -> str:
        return str(self._send._replace(index=micro))

    def left(self) -> list[str]:
        """See `Outlet`."""
        return [f"{self._name(micro)}, which was not sent" for micro in self._made]


__all__ = ["Far", "FarOut", "Inlet", "Near", "NearOut", "Outlet", "Sends"]
