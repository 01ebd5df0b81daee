"""A table in time: when every action runs, how long the ranks wait, and what they hold at once.

Every rank runs its row in order, an action as soon as the one before it is done and what it needs has come. Exact for
the costs it is given, in any type of number: with integers or fractions the results are integers or fractions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from autopar.errors import ScheduleError
from autopar.pipeline.comms import RECEIVES, SENDS, has_comms, stuck, with_comms
from autopar.pipeline.table import COMPUTE, Action, Table, homes


class Span(NamedTuple):
    """An action from `start` to `end`, in seconds."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What ran when, simulated or measured.

    Attributes:
        spans: for every rank what it ran, in order.
        peak_bytes: of every rank, the most that was held at once; empty if not known.
        stage_peak_bytes: the same of every stage. Stages of one rank need not have their peaks at one time.
    """

    spans: tuple[tuple[Span, ...], ...]
    peak_bytes: tuple[float, ...] = ()
    stage_peak_bytes: tuple[float, ...] = ()

    @property
    def start(self) -> float:
        """Seconds at which the first action starts."""
        return min((row[0].start for row in self.spans if row), default=0)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first action to the end of the last."""
        return max((span.end for row in self.spans for span in row), default=0) - self.start

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds that every rank computes; sends and receives are no work."""
        return tuple(sum(s.end - s.start for s in row if s.action.kind in COMPUTE) for row in self.spans)

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Share of the makespan that every rank computes."""
        whole = self.makespan
        return tuple(seconds / whole if whole else 0.0 for seconds in self.busy)


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of the actions of a table, for every stage. What is left empty costs nothing.

    Attributes:
        forward, input_grad, weight_grad: seconds of F, I, W of every stage.
        backward: of B; I + W unless given.
        update: of U.
        send_forward, send_backward: seconds of a message, latency and bytes over bandwidth, for every boundary: the
            one between stages s and s + 1 has number s. Not counted between stages on one rank.
        saved_bytes: held of every micro-batch from the start of its F to the end of its B or I.
        pending_bytes: held from the start of its I to the end of its W: what I hands to W, and what W still reads of
            what was saved.
        transient_bytes: held while any action of the stage runs.
        static_bytes: held always: weights, gradients, optimizer state.
    """

    forward: Sequence[float]
    input_grad: Sequence[float] = ()
    weight_grad: Sequence[float] = ()
    backward: Sequence[float] = ()
    update: Sequence[float] = ()
    send_forward: Sequence[float] = ()
    send_backward: Sequence[float] = ()
    saved_bytes: Sequence[float] = ()
    pending_bytes: Sequence[float] = ()
    transient_bytes: Sequence[float] = ()
    static_bytes: Sequence[float] = ()

    def __post_init__(self) -> None:
        stages, given = len(self.forward), bool(self.backward)
        for field in fields(self):
            numbers = tuple(getattr(self, field.name))
            length = max(0, stages - 1) if field.name.startswith("send_") else stages
            if numbers and len(numbers) != length:
                what = "boundaries" if field.name.startswith("send_") else "stages"
                raise ScheduleError(
                    f"costs of {stages} stages: {field.name} has {len(numbers)} numbers for {length} {what}"
                )
            if any(number < 0 for number in numbers):
                raise ScheduleError(f"costs of {stages} stages: {field.name} has {min(numbers)}; none may be negative")
            object.__setattr__(self, field.name, numbers or (0,) * length)
        if not given:
            both = tuple(i + w for i, w in zip(self.input_grad, self.weight_grad))
            object.__setattr__(self, "backward", both)

    @classmethod
    def even(
        cls,
        stages: int,
        *,
        forward: float = 1,
        input_grad: float = 1,
        weight_grad: float = 1,
        update: float = 0,
        send: float = 0,
        saved_bytes: float = 0,
        pending_bytes: float = 0,
        static_bytes: float = 0,
    ) -> Costs:
        """Stages that all cost the same; `send`: seconds of every message."""
        return cls(
            forward=(forward,) * stages,
            input_grad=(input_grad,) * stages,
            weight_grad=(weight_grad,) * stages,
            update=(update,) * stages,
            send_forward=(send,) * (stages - 1),
            send_backward=(send,) * (stages - 1),
            saved_bytes=(saved_bytes,) * stages,
            pending_bytes=(pending_bytes,) * stages,
            static_bytes=(static_bytes,) * stages,
        )

    def seconds(self, kind: str) -> Sequence[float]:
        """Seconds of a kind of action, by stage; of a send, by the stage that sends."""
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.input_grad,
            "W": self.weight_grad,
            "U": self.update,
            "SF": self.send_forward,
            "SB": (0, *self.send_backward),
        }[kind]


def run(table: Table, costs: Costs, overlap: bool = True) -> Timeline:
    """Simulate a table, with sends and receives or without. Takes time linear in the number of actions.

    With `overlap` a message travels while ranks compute. It leaves behind the action that makes it (or where its send
    stands, if the table has sends), and whoever needs it waits for it; from one rank to another there is one message
    on the way at a time. Without, a send and its receive keep both ranks from the moment when both are there.

    Raises:
        ScheduleError: the costs are of another number of stages; or no rank can go on.
    """
    stages = len(homes(table))
    if len(costs.forward) != stages:
        raise ScheduleError(f"a table of {stages} stages with costs of {len(costs.forward)}; give one for each stage")
    if overlap:
        spans = _overlapping(table, costs)
    else:
        spans = _meeting(with_comms(table), costs)
    return Timeline(tuple(map(tuple, spans)), *_peaks(table, costs))


#: Where the result of an action is wanted: one stage on, or one back.
_WAY = {"F": 1, "SF": 1, "RF": 1, "B": -1, "I": -1, "SB": -1, "RB": -1}


def _overlapping(table: Table, costs: Costs) -> list[list[Span]]:
    home, lowered = homes(table), has_comms(table)
    stages = len(home)
    seconds = {kind: costs.seconds(kind) for kind in (*COMPUTE, *SENDS)}
    spans: list[list[Span]] = [[] for _ in table]
    steps, clock = [0] * len(table), [costs.forward[0] * 0] * len(table)
    # A message is an integer: the stage that gets it and the micro-batch, below zero for gradients.
    arrived: dict[int, float] = {}
    waiting: dict[int, int] = {}
    free: dict[tuple[int, int], float] = {}  # from rank to rank: when the message before has arrived
    ready = deque(range(len(table)))
    while ready:
        rank = ready.popleft()
        row, now = table[rank], clock[rank]
        while steps[rank] < len(row):
            action = row[steps[rank]]
            stage, kind, index = action
            way = _WAY.get(kind, 0)
            if kind in COMPUTE:
                if way and 0 <= stage - way < stages:
                    message = (index * stages + stage) * way
                    if message not in arrived:
                        waiting[message] = rank
                        break
                    now = max(now, arrived[message])
                end = now + seconds[kind][stage]
                spans[rank].append(Span(action, now, end))
                now = end
            steps[rank] += 1
            if way and 0 <= stage + way < stages and kind not in RECEIVES:
                message, to = (index * stages + stage + way) * way, home[stage + way]
                if to == rank:
                    arrived[message] = now
                elif kind in SENDS or not lowered:
                    link = rank, to
                    came = max(now, free.get(link, now)) + seconds["SF" if way > 0 else "SB"][stage]
                    arrived[message] = free[link] = came
                    if message in waiting:
                        ready.append(waiting.pop(message))
        clock[rank] = now
    if any(step < len(row) for step, row in zip(steps, table)):
        raise stuck(table, steps)
    return spans


def _meeting(table: Table, costs: Costs) -> list[list[Span]]:
    """Every send meets its receive: both ranks are kept until it is over."""
    stages = len(costs.forward)
    seconds = {kind: costs.seconds(kind) for kind in (*COMPUTE, *SENDS)}
    spans: list[list[Span]] = [[] for _ in table]
    steps, clock = [0] * len(table), [costs.forward[0] * 0] * len(table)
    present: dict[int, int] = {}  # message, as above -> the rank that is there
    ready = deque(range(len(table)))
    while ready:
        rank = ready.popleft()
        row = table[rank]
        while steps[rank] < len(row):
            action = row[steps[rank]]
            stage, kind, index = action
            if kind in COMPUTE:
                end = clock[rank] + seconds[kind][stage]
                spans[rank].append(Span(action, clock[rank], end))
                clock[rank] = end
                steps[rank] += 1
                continue
            way, gets = _WAY[kind], kind in RECEIVES
            message = (index * stages + (stage if gets else stage + way)) * way
            other = present.pop(message, None)
            if other is None:
                present[message] = rank
                break
            begin = max(clock[rank], clock[other])
            end = begin + seconds["SF" if way > 0 else "SB"][stage - way if gets else stage]
            for one in (rank, other):
                spans[one].append(Span(table[one][steps[one]], begin, end))
                clock[one] = end
                steps[one] += 1
            ready.append(other)
    if any(step < len(row) for step, row in zip(steps, table)):
        raise stuck(table, steps)
    return spans


def _peaks(table: Table, costs: Costs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Peak bytes of every rank and of every stage. They hang on the order of a row alone, not on the times."""
    stages = len(costs.forward)
    trains = any(action.kind in ("B", "I") for row in table for action in row)
    saved = costs.saved_bytes if trains else (0,) * stages  # an evaluation keeps nothing
    stage_peak = list(costs.static_bytes)
    peaks: list[float] = []
    for row in table:
        held = {stage: costs.static_bytes[stage] for stage in sorted({action.stage for action in row})}
        most = total = sum(held.values())
        for stage, kind, _ in row:
            begin = {"F": saved, "I": costs.pending_bytes}.get(kind)
            change = begin[stage] if begin else 0
            extra = costs.transient_bytes[stage] if kind in COMPUTE else 0
            held[stage] += change
            total += change
            most = max(most, total + extra)
            stage_peak[stage] = max(stage_peak[stage], held[stage] + extra)
            end = {"B": saved, "I": saved, "W": costs.pending_bytes}.get(kind)
            change = end[stage] if end else 0
            held[stage] -= change
            total -= change
        peaks.append(most)
    return tuple(peaks), tuple(stage_peak)


__all__ = ["Costs", "Span", "Timeline", "run"]
