"""Walks along one rank's row of a table. It knows kinds of actions, and no schedule.

    Executor(table, rank, {stage: work, ...}, transport).run()

Every action is a call: of the stage's `Work` for what computes, of the transport for what communicates. A receive is
begun where it stands in the row and waited for where its data is needed; a send is begun where it stands, and waited
for when many are on their way, or at the end of the row. Stages that are neighbours on one rank hand over in memory.

What is waited for is waited for `timeout` seconds at most. If that was in vain, or if anything else goes wrong here or
on another rank, every rank raises a PipelineError that says what happened first (`autopar.runtime.alarm`). A pipeline
that has failed stays so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext

from torch import Tensor

from autopar.errors import AutoparError, PipelineError, RuntimeUseError, ScheduleError
from autopar.pipeline.clock import Span
from autopar.pipeline.comms import sending
from autopar.pipeline.table import Action, Row, Table, excerpt, homes
from autopar.runtime.alarm import MOMENT, Failure
from autopar.runtime.lineup import compare, introduce
from autopar.runtime.loopback import Loopback
from autopar.runtime.passage import Far, FarOut, Inlet, Near, NearOut, Outlet, Sends
from autopar.runtime.transport import BACKWARD, FORWARD, Lost, Transport
from autopar.runtime.work import Message, Work

Act = Callable[[int], None]


class Stage:
    """One stage of this rank: its work, and where its tensors come from and go to."""

    def __init__(self, work: Work | _Timed, ahead: tuple[Inlet, Outlet], back: tuple[Inlet, Outlet]) -> None:
        self.work = work
        self.inlet, self.outlet = ahead
        self.inlet_back, self.outlet_back = back


def _through(inlet: Inlet, compute: Callable[[int, list[Tensor]], list[Tensor]], outlet: Outlet) -> Act:
    take, put = inlet.take, outlet.put

    def act(micro: int) -> None:
        put(micro, compute(micro, take(micro)))

    return act


#: Kind of action -> what is called with its index.
HANDLERS: dict[str, Callable[[Stage], Act]] = {
    "F": lambda s: _through(s.inlet, s.work.forward, s.outlet),
    "B": lambda s: _through(s.inlet_back, s.work.backward, s.outlet_back),
    "I": lambda s: _through(s.inlet_back, s.work.input_grads, s.outlet_back),
    "W": lambda s: s.work.weight_grads,
    "U": lambda s: s.work.update,
    "SF": lambda s: s.outlet.send,
    "SB": lambda s: s.outlet_back.send,
    "RF": lambda s: s.inlet.post,
    "RB": lambda s: s.inlet_back.post,
}
#: What may have to wait for a message, and for which.
WAITS: dict[str, Callable[[Stage], Inlet]] = {
    "F": lambda s: s.inlet,
    "B": lambda s: s.inlet_back,
    "I": lambda s: s.inlet_back,
}


class Executor:
    """Runs one rank's row, as often as wanted.

    Args:
        table: all rows, with sends and receives (`autopar.pipeline.comms.with_comms`), checked.
        rank: whose row.
        stages: the work of every stage of this rank.
        transport: what carries the messages; of a table of one rank there are none.
        timeout: seconds of any single wait.
        in_flight: sends that are kept before the oldest is waited for; each holds its tensors.
        record: keep `spans`.

    Attributes:
        spans: what the last run computed and when, in seconds since a moment that is the same on every rank (by the
            clocks of their machines, if they are on several). What a GPU computes is done later than it says.

    Raises:
        RuntimeUseError: a stage of the row has no work, or the first or last stage communicates with nobody.
    """

    def __init__(
        self,
        table: Table,
        rank: int,
        stages: Mapping[int, Work],
        transport: Transport | None = None,
        *,
        timeout: float = 300.0,
        in_flight: int = 16,
        record: bool = False,
    ) -> None:
        self.table, self.rank, self.timeout = table, rank, timeout
        self.row = table[rank]
        self.spans: list[Span] = []
        self.step = 0
        if transport is None:
            if len(table) > 1:
                raise RuntimeUseError(
                    f"a table of {len(table)} ranks is to run without a transport; pass one, such as "
                    "autopar.runtime.transport.connect gives it, or use autopar.runtime.replay in one process"
                )
            transport = Loopback().of(rank)
        self._stages, self._transport, self._record = dict(stages), transport, record
        self._sends = Sends(in_flight, timeout)
        self._zero = 0.0
        self._agreed = False
        self._links: list[tuple[int, int]] = []
        self._stopped = ""
        self._endless = False
        self._home = homes(table)
        try:
            self._built = self._build()
        except AutoparError as error:  # the others wait for this rank already
            if alarm := transport.alarm:
                alarm.tell(Failure(rank, 0, f"rank {rank}, before its first action: {error}"))
                alarm.stay()
            raise
        self._acts = [(HANDLERS[kind](self._built[stage]), index) for stage, kind, index in self.row]

    # ---- building ----------------------------------------------------------------------------------------------------

    def _build(self) -> dict[int, Stage]:
        own = sorted({action.stage for action in self.row})
        missing = [stage for stage in own if stage not in self._stages]
        if missing:
            raise RuntimeUseError(
                f"the row of rank {self.rank} has actions of stages {own}, but there is no work for {missing}; give "
                "the work of every stage of the rank"
            )
        forward = {stage: self._inlet(stage, FORWARD) for stage in own}
        back = {stage: self._inlet(stage, BACKWARD) for stage in own}
        built = {}
        for stage in own:
            work = self._stages[stage]
            ahead = forward[stage], self._outlet(stage, FORWARD, forward)
            behind = back[stage], self._outlet(stage, BACKWARD, back)
            built[stage] = Stage(_Timed(work, stage, self._note) if self._record else work, ahead, behind)
        return built

    def _inlet(self, stage: int, way: int) -> Inlet:
        work = self._stages[stage]
        message = Message(work.receives_forward if way == FORWARD else work.receives_backward)
        receive = Action(stage, "RF" if way == FORWARD else "RB", 0)
        peer = self._peer(sending(receive).stage, message, f"stage {stage} is to receive", way)
        if peer is None:
            return Inlet(receive)
        if peer == self.rank:
            return Near(receive)
        return Far(receive, message, peer, way, self._transport, self.timeout)

    def _outlet(self, stage: int, way: int, inlets: Mapping[int, Inlet]) -> Outlet:
        work = self._stages[stage]
        message = Message(work.sends_forward if way == FORWARD else work.sends_backward)
        target = stage + (1 if way == FORWARD else -1)
        peer = self._peer(target, message, f"stage {stage} is to send", way)
        send = Action(stage, "SF" if way == FORWARD else "SB", 0)
        if peer is None:
            return Outlet(send, message)
        if peer == self.rank:
            inlet = inlets[target]
            assert isinstance(inlet, Near)
            return NearOut(send, message, inlet)
        return FarOut(send, message, peer, way, self._transport, self._sends)

    def _peer(self, other: int, message: Message, who: str, way: int) -> int | None:
        """The rank of the stage on the other side; None if there is none."""
        if other in self._home:
            return self._home[other]
        if message.forms:
            raise RuntimeUseError(
                f"{who} {', '.join(map(str, message.forms))} {'forward' if way == FORWARD else 'backward'}, but the "
                f"table has no stage {other}; the first and the last stage have nothing there"
            )
        return None

    # ---- running -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the row once. All ranks of the pipeline run theirs at the same time.

        Raises:
            RankMismatchError: before the first action of the first run: tables or forms of messages differ.
            PipelineError: this rank or another has failed, or a message did not come in time.
        """
        self.begin()
        self._walk(last=True)

    def resume(self, row: Row, last: bool) -> None:
        """Go on with `row`: more of a row that is not known as a whole. `last`: nothing is to be in flight behind it.

        The table is that of the first actions, and says what ranks compare. Raises as `run`.
        """
        if not self._agreed:
            self.begin()
        self.row = row
        self._acts = [(HANDLERS[kind](self._built[stage]), index) for stage, kind, index in row]
        self._endless = True
        self._walk(last)

    def _walk(self, last: bool) -> None:
        alarm = self._transport.alarm
        try:
            with alarm.listening(self._transport.close) if alarm else nullcontext():
                self._transport.meet(self._links)
                self._links = []
                for step, (act, index) in enumerate(self._acts):
                    self.step = step
                    act(index)
                if last:
                    self.end()
        except BaseException as error:
            told = self._failed(error)
            if told is error:
                raise
            raise told from error

    def begin(self) -> None:
        """What comes before the first action: the ranks compare what they are about to do, once, and their clocks."""
        alarm = self._transport.alarm
        stopped = self._stopped or (alarm.heard.text if alarm and alarm.heard else "")
        if stopped:
            raise PipelineError(
                f"rank {self.rank}: the pipeline has failed before and cannot go on; start its processes again "
                f"(the first to fail: {stopped})"
            )
        self._links = []
        if not self._agreed and alarm is not None:
            compare(self.table, alarm.exchange(introduce(self.table, self._stages), self.timeout))
            home = self._home
            pairs = {(home[s], home[s + 1]) for s in home if s + 1 in home and home[s] != home[s + 1]}
            self._links = sorted(pairs | {(b, a) for a, b in pairs})
        self._agreed = True
        self.step = 0
        if self._record:
            self.spans = []
            now = repr(time.time())
            latest = max(map(float, alarm.exchange(now, self.timeout) if alarm else [now]))
            self._zero = time.perf_counter() - (time.time() - latest)

    def end(self) -> None:
        """What comes behind the last action: nothing may be left on its way."""
        self.step = len(self.row)
        self._sends.wait()
        self._transport.settle(self.timeout)
        alarm = self._transport.alarm
        if alarm is not None and alarm.heard is not None:
            raise Lost("another rank has failed", "has done its row")
        left = [
            name
            for stage in self._built.values()
            for place in (stage.inlet, stage.outlet, stage.inlet_back, stage.outlet_back)
            for name in place.left()
        ]
        if left:
            raise ScheduleError(f"there is left over: {'; '.join(left)}")

    def _note(self, action: Action, began: float) -> None:
        self.spans.append(Span(action, began - self._zero, time.perf_counter() - self._zero))

    def ready(self) -> bool:
        """Whether the next action would not wait, as far as that is known."""
        stage, kind, index = self.row[self.step]
        return kind not in WAITS or WAITS[kind](self._built[stage]).ready(index)

    def advance(self) -> None:
        """Run the next action only; `replay` walks so. What it raises is a PipelineError as of `run`."""
        act, index = self._acts[self.step]
        try:
            act(index)
        except Exception as error:
            raise self._failed(error) from error
        self.step += 1

    # ---- failing -----------------------------------------------------------------------------------------------------

    def _where(self) -> str:
        if self.step == len(self.row):
            return f"rank {self.rank}, at the end of its row of {self.step}"
        action = self.row[self.step]
        return f"rank {self.rank}, stage {action.stage}, {action}, step {self.step} of {len(self.row)}"

    def _failed(self, error: BaseException) -> BaseException:
        """Tell the others, and make the error that is raised here."""
        lost, where = isinstance(error, Lost), self._where()
        text = str(error) if lost else _one_line(error)
        alarm = self._transport.alarm
        own = first = Failure(self.rank, self.step, f"{where}: {text}")
        if alarm is not None:
            known = alarm.first(MOMENT if lost else 0.0)
            first = known or alarm.tell(own)
        self._transport.close()
        mark = {self.rank: self.step}
        if first != own:
            waited = f"{error.what}, in vain" if isinstance(error, Lost) else text
            own = own._replace(text=f"{where}: {waited}\n  the first to fail: {first.text}")
            mark.setdefault(first.rank, first.step)
        elif lost:
            own = own._replace(text=f"{own.text}; see the output of that rank, which hangs, is slow or has died")
        self._stopped = first.text
        if not isinstance(error, Exception):  # somebody wants this process to end
            return error
        if alarm is not None:
            alarm.stay()
        if self._endless:  # steps are those of a portion
            done = [f">>{a}<<" if i == self.step else str(a) for i, a in enumerate(self.row)]
            return PipelineError(f"{own.text}\n  row: {' '.join(done[max(0, self.step - 6) : self.step + 6])}")
        return PipelineError(f"{own.text}\n{excerpt(self.table, mark)}")


class _Timed:
    """A work that writes down when it computes; what it receives has come by then."""

    def __init__(self, work: Work, stage: int, note: Callable[[Action, float], None]) -> None:
        self._work, self._stage, self._note = work, stage, note

    def forward(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        began = time.perf_counter()
        sent = self._work.forward(micro, received)
        self._note(Action(self._stage, "F", micro), began)
        return sent

    def backward(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        began = time.perf_counter()
        sent = self._work.backward(micro, received)
        self._note(Action(self._stage, "B", micro), began)
        return sent

    def input_grads(self, micro: int, received: list[Tensor]) -> list[Tensor]:
        began = time.perf_counter()
        sent = self._work.input_grads(micro, received)
        self._note(Action(self._stage, "I", micro), began)
        return sent

    def weight_grads(self, micro: int) -> None:
        began = time.perf_counter()
        self._work.weight_grads(micro)
        self._note(Action(self._stage, "W", micro), began)

    def update(self, number: int) -> None:
        began = time.perf_counter()
        self._work.update(number)
        self._note(Action(self._stage, "U", number), began)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:600]
    return text if isinstance(error, AutoparError) else f"{type(error).__name__}: {text}"


__all__ = ["HANDLERS", "Executor"]
