"""Messages of a table: what a stage waits for and sends on, and sends and receives put in so that none waits for ever.

A stage's forward needs the activations of the stage before it, its backward the gradients of the stage behind. Between
stages on one rank there is no message. A message is named by its send: `1SF3` are the activations of micro-batch 3 that
stage 1 makes, whether or not they are sent anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.errors import ScheduleError
from autopar.pipeline.table import COMMS, Action, Table, excerpt, homes

SENDS, RECEIVES = ("SF", "SB"), ("RF", "RB")


def made(action: Action, last: int) -> Action | None:
    """The message that `action` makes for another stage, None if there is none; `last` is the last stage.

    >>> str(made(Action(1, "F", 3), 3)), str(made(Action(1, "I", 3), 3)), made(Action(0, "B", 3), 3)
    ('1SF3', '1SB3', None)
    """
    stage, kind, index = action
    if kind == "F":
        return Action(stage, "SF", index) if stage < last else None
    return Action(stage, "SB", index) if kind in ("B", "I") and stage > 0 else None


def needed(action: Action, last: int) -> Action | None:
    """The message of another stage without which `action` cannot begin.

    >>> str(needed(Action(1, "F", 3), 3)), str(needed(Action(1, "B", 3), 3)), needed(Action(3, "B", 3), 3)
    ('0SF3', '2SB3', None)
    """
    stage, kind, index = action
    if kind == "F":
        return Action(stage - 1, "SF", index) if stage > 0 else None
    return Action(stage + 1, "SB", index) if kind in ("B", "I") and stage < last else None


def receipt(send: Action) -> Action:
    """The receive of a send, at the stage that gets it.

    >>> str(receipt(Action(1, "SF", 3))), str(receipt(Action(1, "SB", 3)))
    ('2RF3', '0RB3')
    """
    return Action(send.stage + 1, "RF", send.index) if send.kind == "SF" else Action(send.stage - 1, "RB", send.index)


def sending(receive: Action) -> Action:
    """Inverse of `receipt`."""
    stage, kind, index = receive
    return Action(stage - 1, "SF", index) if kind == "RF" else Action(stage + 1, "SB", index)


def has_comms(table: Table) -> bool:
    """Whether there are sends or receives in the table."""
    return any(action.kind in COMMS for row in table for action in row)


def with_comms(table: Table) -> Table:
    """The table with sends and receives. One that has some already is left as it is.

    All ranks go through their rows in rounds, one action in each. What an action makes is sent in the same round, and
    at that moment the *sender* puts the receive at the end of the receiver's row. So there is one linear order of which
    every row is a part, and in which a send and its receive are one event: not even sends that wait for their
    receivers, with one action in flight on every rank, wait for ever. And the messages from one rank to another are
    received in the order in which they are sent, so that they need no tags. Takes time linear in the number of actions.

    >>> from autopar.pipeline.table import grid
    >>> print(grid(with_comms(((Action(0, "F", 0), Action(0, "B", 0)), (Action(1, "F", 0), Action(1, "B", 0))))))
    step  rank 0  rank 1
    0     0F0     1RF0
    1     0SF0    1F0
    2     0RB0    1B0
    3     0B0     1SB0

    Raises:
        ScheduleError: no rank can go on, and what each waits for; or a stage is on two ranks, or on none.
    """
    if has_comms(table):
        return table
    home = homes(table)
    last = max(home, default=0)
    rows: list[list[Action]] = [[] for _ in table]
    steps = [0] * len(table)
    arrived: set[Action] = set()
    waiting: dict[Action, int] = {}
    ready = list(range(len(table)))
    while ready:
        sent: list[Action] = []
        going: list[int] = []
        for rank in ready:
            if steps[rank] == len(table[rank]):
                continue
            action = table[rank][steps[rank]]
            need = needed(action, last)
            if need is not None and need not in arrived:
                waiting[need] = rank
                continue
            rows[rank].append(action)
            steps[rank] += 1
            going.append(rank)
            message = made(action, last)
            if message is not None:
                sent.append(message)
        # Only now, so that a round is the same moment for all ranks; and of one round a stage sends before it receives.
        for message in sorted(sent, key=lambda m: (m.kind == "SB", m.stage if m.kind == "SB" else -m.stage)):
            receive = receipt(message)
            if home[message.stage] != home[receive.stage]:
                rows[home[message.stage]].append(message)
                rows[home[receive.stage]].append(receive)
            arrived.add(message)
            if message in waiting:
                going.append(waiting.pop(message))
        ready = going
    if any(step < len(row) for step, row in zip(steps, table)):
        raise stuck(table, steps)
    return tuple(map(tuple, rows))


def stuck(table: Table, steps: Sequence[int]) -> ScheduleError:
    """The error of a table whose ranks have come to `steps` and cannot go on; says what each waits for."""
    where = {action: (rank, step) for rank, row in enumerate(table) for step, action in enumerate(row)}
    last = max((action.stage for action in where), default=0)
    mark = {rank: step for rank, step in enumerate(steps) if step < len(table[rank])}
    lines = []
    for rank, step in mark.items():
        action = table[rank][step]
        what, makers = _wanted(action, last)
        place = next((where[maker] for maker in makers if maker in where), None)
        found = " or ".join(str(maker) for maker in makers if place is None or maker in where)
        at = f"at step {place[1]} of rank {place[0]}" if place else "which is in no row"
        lines.append(f"rank {rank} step {step}: {action} waits for {what} {found}, {at}")
    if len(lines) > _MOST:
        lines[_MOST:] = [f"and {len(lines) - _MOST} more ranks wait"]
    return ScheduleError("no rank can go on\n  " + "\n  ".join(lines) + "\n" + excerpt(table, mark))


#: Ranks of which `stuck` says what they wait for.
_MOST = 8


def _wanted(action: Action, last: int) -> tuple[str, tuple[Action, ...]]:
    """In words what an action waits for that cannot begin, and what would make it, one of these."""
    if action.kind in SENDS:
        return "its receive", (receipt(action),)
    if action.kind in RECEIVES:
        return "its send", (sending(action),)
    message = needed(action, last)
    assert message is not None, f"{action} waits for nobody"
    kinds, what = ("F", "the activations of") if message.kind == "SF" else ("BI", "the gradients of")
    return what, tuple(Action(message.stage, kind, message.index) for kind in kinds)


def forwards(ranks: int, micro: int, stages: Sequence[int]) -> Table:
    """The table of an evaluation: only forwards. `stages`: the rank of every stage, as `stage_homes` gives it.

    Every rank goes on with its latest stage that can, so that micro-batches leave as soon as possible.

    >>> from autopar.pipeline.table import grid
    >>> print(grid(forwards(2, 3, (0, 1, 1, 0))))
    step  rank 0  rank 1
    0     0F0     1F0
    1     0F1     2F0
    2     0F2     1F1
    3     3F0     2F1
    4     3F1     1F2
    5     3F2     2F2
    """
    mine = [[s for s in reversed(range(len(stages))) if stages[s] == rank] for rank in range(ranks)]
    idle = [rank for rank, held in enumerate(mine) if not held]
    if idle or micro < 1:
        raise ScheduleError(
            f"an evaluation of {micro} micro-batches on {ranks} ranks with stages on ranks {tuple(stages)}; "
            "it takes at least one micro-batch, and a stage on every rank"
        )
    done = [0] * len(stages)
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    while done[-1] < micro:
        chosen = []
        for rank, held in enumerate(mine):
            able = (s for s in held if done[s] < micro and (s == 0 or done[s - 1] > done[s]))
            stage = next(able, None)
            if stage is not None:
                rows[rank].append(Action(stage, "F", done[stage]))
                chosen.append(stage)
        for stage in chosen:
            done[stage] += 1
    return tuple(map(tuple, rows))


__all__ = [
    "RECEIVES",
    "SENDS",
    "forwards",
    "has_comms",
    "made",
    "needed",
    "receipt",
    "sending",
    "stuck",
    "with_comms",
]
