"""Whether a table can run, and does what a schedule has to do; if not, at which rank, step and action it does not.

A table is checked in the order in which its faults are understood best: where its stages are, that every action is
there once, that every row does things in an order in which they can be done, that the messages of two ranks are
received as they are sent, that nobody waits for ever, and which version of the weights every action sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from autopar.errors import ScheduleError
from autopar.pipeline.comms import RECEIVES, SENDS, has_comms, needed, receipt, sending, stuck, with_comms
from autopar.pipeline.laws import admitted_version, backward_version
from autopar.pipeline.table import COMMS, COMPUTE, Action, Table, excerpt, homes

#: Action -> (rank, step).
Places = dict[Action, tuple[int, int]]


def check(table: Table, *, micro: int | None = None, per_direction: bool = False) -> None:
    """Refuse a table that could not run. It may have sends and receives, then all of them, or none.

    A table without backwards is one of an evaluation. One with U must keep the laws of `paci`, which are those of all
    asynchronous schedules here: the same number of updates at every stage, update u of exactly its own micro-batches,
    and forwards that see what they see if the order is strict. How many micro-batches a stage has in flight is its own
    affair: as many as forwards stand before its first backward.

    Args:
        micro: how many micro-batches it has to have, if that is known.
        per_direction: messages forwards and backwards have communicators of their own, so that a rank can have one of
            each on the way. Without, it has one action in flight, and a send waits for its receive; what passes so
            also passes with any number of communicators, since each of them keeps a part of the order only.

    Raises:
        ScheduleError: with rank, step, action, what is wrong, and the rows round it.
    """
    home = homes(table)
    idle = [rank for rank, row in enumerate(table) if not row]
    if idle or not table:
        raise ScheduleError(f"rank {idle[0] if idle else 0} has nothing to do; every rank has a stage at least")
    places = _places(table)
    _complete(table, home, places, micro)
    lowered = has_comms(table)
    for rank in range(len(table)):
        _in_order(table, rank, home, places, lowered)
    if lowered:
        _as_sent(table, home)
        _meets(table, home, per_direction)
    else:
        with_comms(table)
    if any(action.kind == "U" for action in places):
        _versions(table, home)


def _wrong(table: Table, rank: int, step: int, reason: str) -> ScheduleError:
    return ScheduleError(f"rank {rank} step {step}: {reason}\n{excerpt(table, {rank: step})}")


# ---- everything once -----------------------------------------------------------------------------------------------


def _places(table: Table) -> Places:
    places: Places = {}
    for rank, row in enumerate(table):
        for step, action in enumerate(row):
            first = places.setdefault(action, (rank, step))
            if first != (rank, step):
                raise _wrong(table, rank, step, f"{action} is there a second time, after step {first[1]}")
    return places


def _complete(table: Table, home: dict[int, int], places: Places, micro: int | None) -> None:
    """Every stage has F and B, or I and W, of every micro-batch; and every message between ranks both its ends."""
    count = max((a.index + 1 for a in places if a.kind != "U"), default=0)
    if micro is not None and count != micro:
        raise ScheduleError(f"the table is of {count} micro-batches and the batch of {micro}; make it of as many")
    trains = any(a.kind in ("B", "I", "W") for a in places)
    for stage in home:
        for k in range(count):
            kinds = _needed_kinds(table, places, stage, k) if trains else ("F",)
            for kind in kinds:
                if Action(stage, kind, k) not in places:
                    raise _absent(table, home, places, Action(stage, kind, k), count)
    if has_comms(table):
        sends = set(_sends(home, count, trains))
        for send in sends:
            for end in (send, receipt(send)):
                if end not in places:
                    raise _absent(table, home, places, end, count)
        for action, place in places.items():
            if action.kind in COMMS and (action if action.kind in SENDS else sending(action)) not in sends:
                raise _wrong(table, *place, f"{action} belongs to no message between two ranks of this table")


def _needed_kinds(table: Table, places: Places, stage: int, k: int) -> tuple[str, ...]:
    whole, split = Action(stage, "B", k), Action(stage, "I", k)
    if whole in places and split in places:
        raise _wrong(table, *places[split], f"{split} repeats a part of {whole}; a backward is B, or I and W")
    return ("F", "B") if whole in places else ("F", "I", "W")


def _sends(home: dict[int, int], micro: int, trains: bool) -> Iterator[Action]:
    for stage in home:
        for kind, to in (("SF", stage + 1), ("SB", stage - 1)):
            if to in home and home[to] != home[stage] and (trains or kind == "SF"):
                yield from (Action(stage, kind, k) for k in range(micro))


#: What is most telling to point at if an action of that kind is missing, of the same stage and micro-batch.
_BESIDE = {
    "F": ("B", "I", "SF", "RF"), "B": ("SB", "F"), "I": ("W", "SB", "F"), "W": ("I", "F"),
    "SF": ("F",), "RF": ("F",), "SB": ("B", "I"), "RB": ("B", "I"),
}  # fmt: skip


def _absent(table: Table, home: dict[int, int], places: Places, action: Action, total: int) -> ScheduleError:
    stage, kind, k = action
    beside = (Action(stage, other, k) for other in _BESIDE[kind])
    near = next((b for b in beside if b in places), None)
    no_backward = kind == "I" and Action(stage, "W", k) not in places
    name = f"{stage}B{k}, or {stage}I{k} and {stage}W{k}" if no_backward else str(action)
    rule = f"every stage has each of {total} micro-batches once"
    if near is None:
        return ScheduleError(f"rank {home[stage]} has no {name}; {rule}")
    return _wrong(table, *places[near], f"{near} without {name}; {rule}")


# ---- the order of every row ----------------------------------------------------------------------------------------


def _in_order(table: Table, rank: int, home: dict[int, int], places: Places, lowered: bool) -> None:
    """What an action needs of its own rank is done before it."""
    done: set[Action] = set()
    for step, action in enumerate(table[rank]):
        for either in _before(action, home, lowered):
            if done.isdisjoint(either):
                late = next(a for a in either if a in places)
                raise _wrong(table, rank, step, f"{action} runs before {late}")
        done.add(action)


def _before(action: Action, home: dict[int, int], lowered: bool) -> Iterator[tuple[Action, ...]]:
    """What must be done on the same rank before: of each tuple, one."""
    stage, kind, k = action
    backward = (Action(stage, "B", k), Action(stage, "I", k))
    if kind in ("B", "I", "SF"):
        yield (Action(stage, "F", k),)
    elif kind == "SB":
        yield backward
    elif kind == "W":
        yield (Action(stage, "I", k),)
    if kind in ("F", "B", "I"):
        source = stage - 1 if kind == "F" else stage + 1
        if source in home and home[source] == home[stage]:
            yield tuple(Action(source, by, k) for by in (("F",) if kind == "F" else ("B", "I")))
        elif source in home and lowered:
            yield (Action(stage, "RF" if kind == "F" else "RB", k),)


# ---- messages ------------------------------------------------------------------------------------------------------


def _as_sent(table: Table, home: dict[int, int]) -> None:
    """From one rank to another, receives stand in the order of the sends: messages have no tags."""
    sent: dict[tuple[int, int], deque[Action]] = {}
    for rank, row in enumerate(table):
        for action in row:
            if action.kind in SENDS:
                sent.setdefault((rank, home[receipt(action).stage]), deque()).append(action)
    for rank, row in enumerate(table):
        for step, action in enumerate(row):
            if action.kind in RECEIVES:
                send = sending(action)
                first = sent[home[send.stage], rank].popleft()
                if first != send:
                    reason = f"{action} would receive {first}: rank {home[send.stage]} sends that before {send}"
                    raise _wrong(table, rank, step, reason)


def _meets(table: Table, home: dict[int, int], per_direction: bool) -> None:
    """Every send meets its receive; see `check` for what a rank can have on the way at once."""
    last = len(home) - 1
    steps = [0] * len(table)
    # What a rank has on the way, in order, with their steps: activations and gradients.
    queues: list[dict[str, deque[tuple[Action, int]]]] = [{"F": deque(), "B": deque()} for _ in table]
    heads: dict[Action, tuple[int, str]] = {}  # message -> rank and queue in which one end of it is the first
    met: set[Action] = set()
    ready = deque(range(len(table)))

    def meet(rank: int, queue: str) -> None:
        """The first of this queue, if its other end is a first too; then those behind the two."""
        firsts = [(rank, queue)]
        while firsts:
            rank, queue = firsts.pop()
            if not queues[rank][queue]:
                continue
            end = queues[rank][queue][0][0]
            message = end if end.kind in SENDS else sending(end)
            other = heads.setdefault(message, (rank, queue))
            if other != (rank, queue):
                del heads[message]
                met.add(message)
                for at in ((rank, queue), other):
                    queues[at[0]][at[1]].popleft()
                    ready.append(at[0])
                    firsts.append(at)

    while ready:
        rank = ready.popleft()
        row = table[rank]
        while steps[rank] < len(row):
            action = row[steps[rank]]
            if not per_direction and any(queues[rank].values()):
                break
            if action.kind in COMPUTE:
                need = needed(action, last)
                if need is not None and home[need.stage] != rank and need not in met:
                    break
                steps[rank] += 1
            else:
                queue = queues[rank][action.kind[1]]
                queue.append((action, steps[rank]))
                steps[rank] += 1
                if len(queue) == 1:
                    meet(rank, action.kind[1])
    at = [min([step, *(queue[0][1] for queue in q.values() if queue)]) for step, q in zip(steps, queues)]
    if any(step < len(row) for step, row in zip(at, table)):
        raise stuck(table, at)


# ---- versions ------------------------------------------------------------------------------------------------------


def _versions(table: Table, home: dict[int, int]) -> None:
    """U as often at every stage, at equal distances, and where the laws of `autopar.pipeline.laws` say."""
    updates = {stage: 0 for stage in home}
    forwards = dict(updates)
    warm: dict[int, int] = {}
    last: dict[int, tuple[int, int]] = {stage: (rank, len(table[rank]) - 1) for stage, rank in home.items()}
    for rank, row in enumerate(table):
        for step, (stage, kind, index) in enumerate(row):
            if kind == "U":
                if index != updates[stage]:
                    reason = f"{row[step]} is the update of stage {stage} that has number {updates[stage]}"
                    raise _wrong(table, rank, step, reason)
                updates[stage] += 1
                last[stage] = rank, step
            elif kind == "F":
                forwards[stage] += 1
            elif kind in ("B", "I"):
                warm.setdefault(stage, forwards[stage])
    most = max(updates, key=lambda stage: updates[stage])
    micro = forwards[most]
    for stage, number in updates.items():
        if number != updates[most]:
            reason = f"stage {stage} has {number} updates, stage {most} has {updates[most]}; all have as many"
            raise _wrong(table, *last[stage], reason)
    if micro % updates[most]:
        reason = f"{micro} micro-batches cannot make {updates[most]} updates of equal size"
        raise _wrong(table, *last[most], reason)
    window = micro // updates[most]
    for rank, row in enumerate(table):
        seen = {action.stage: 0 for action in row}
        for step, (stage, kind, index) in enumerate(row):
            if kind == "U":
                seen[stage] += 1
            elif kind in COMPUTE:
                if kind == "F":
                    due = admitted_version(index, warm[stage], window)
                    why = f"with {warm[stage]} in flight and {window} micro-batches an update"
                else:
                    due, why = backward_version(index, window), f"with {window} micro-batches an update"
                if seen[stage] != due:
                    reason = f"{row[step]} sees its weights after {seen[stage]} updates; {why} it has to see {due}"
                    raise _wrong(table, rank, step, reason)


__all__ = ["check"]
