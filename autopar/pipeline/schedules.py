"""The known schedules, as functions of integers that return a table without communication.

>>> from autopar.pipeline.table import grid
>>> print(grid(one_f_one_b(2, 3)))
step  rank 0  rank 1
0     0F0     1F0
1     0F1     1B0
2     0B0     1F1
3     0F2     1B1
4     0B1     1F2
5     0B2     1B2

Where the stages are (`placement`): on a *line*, rank r has stage r. In a *loop* of `chunks` rounds, rank r has stages
r, r + ranks, ... In a *vee*, it has stages r and 2 ranks - 1 - r, so that the first rank has both ends of the model.

Synchronous schedules are one step of the user's optimizer, and have no U in them. Asynchronous ones have a U wherever a
stage steps on its own, with no barrier; a table of n updates is one segment, which begins and ends empty. Micro-batches
are counted through the whole table: update u is made of micro-batches u a to u a + a - 1, a being the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from autopar.errors import ScheduleError
from autopar.pipeline.laws import (
    backward_version,
    bubble,
    delayed_version,
    drift_bound,
    expected_drift,
    expected_gain,
    forward_version,
    in_flight,
    makespan,
    mean_drift,
)
from autopar.pipeline.table import Action, Row, Table

# ---- synchronous ---------------------------------------------------------------------------------------------------


def gpipe(ranks: int, micro: int) -> Table:
    """All forwards, then all backwards; every micro-batch is in flight at once. Source: Huang et al. 2019."""
    _demand("gpipe", ranks, micro)
    return tuple(tuple(Action(r, kind, k) for kind in "FB" for k in range(micro)) for r in range(ranks))


def one_f_one_b(ranks: int, micro: int) -> Table:
    """One forward, one backward; at most ranks - r micro-batches in flight on rank r.

    Source: PipeDream-Flush (Narayanan et al. 2021), DAPPLE (Fan et al. 2021).
    """
    _demand("1f1b", ranks, micro)
    return tuple(tuple(_alternating(r, ranks - r, micro)) for r in range(ranks))


def _alternating(stage: int, warm: int, micro: int) -> Iterator[Action]:
    """`warm` forwards, then backward and forward by turns."""
    for k in range(min(warm, micro)):
        yield Action(stage, "F", k)
    for k in range(micro):
        yield Action(stage, "B", k)
        if warm + k < micro:
            yield Action(stage, "F", warm + k)


def interleaved(ranks: int, micro: int, chunks: int = 2) -> Table:
    """1F1B with `chunks` stages on every rank, in a loop: the bubble is divided by `chunks`.

    Micro-batches pass in groups of `ranks`, each through all chunks of a rank before the next group comes; hence their
    number is a multiple of `ranks`. Source: Narayanan et al. 2021 (Megatron-LM), section 2.2.

    Raises:
        ScheduleError: it is no multiple.
    """
    _demand("interleaved", ranks, micro, chunks=chunks)
    total = micro * chunks
    rows = []
    for rank in range(ranks):

        def forward(k: int, rank: int = rank) -> Action:
            group, place = divmod(k, ranks * chunks)
            return Action(place // ranks * ranks + rank, "F", group * ranks + place % ranks)

        def backward(k: int, rank: int = rank) -> Action:
            group, place = divmod(k, ranks * chunks)
            return Action((chunks - 1 - place // ranks) * ranks + rank, "B", group * ranks + place % ranks)

        warm = min(total, 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1) if chunks > 1 else ranks - rank
        row = [forward(k) for k in range(min(warm, total))]
        for k in range(total):
            row.append(backward(k))
            if warm + k < total:
                row.append(forward(warm + k))
        rows.append(tuple(row))
    return tuple(rows)


def zb_h1(ranks: int, micro: int) -> Table:
    """Zero bubble with the memory of 1F1B: weight gradients wait, and fill the gaps of the fill and the drain.

    Rank r keeps r of them waiting, so that what is in flight or waiting is `ranks` on every rank.
    Source: Qi et al. 2024 (2401.10241), ZB-H1.
    """
    _demand("zb-h1", ranks, micro)
    return tuple(tuple(_postponing(r, ranks - r, r, micro)) for r in range(ranks))


def zb_h2(ranks: int, micro: int) -> Table:
    """Zero bubble with twice the memory: no rank waits between its first action and its last.

    2 ranks - 1 micro-batches are in flight or waiting on every rank. The ranks end one after the other, as they began:
    where F = I = W, what is gained over `zb_h1` is gained only if each steps its optimizer and goes on when it is done,
    without a barrier. Of less than 2 ranks - 1 micro-batches no rank is kept busy, and fewer wait for the end.
    Source: Qi et al. 2024 (2401.10241), ZB-H2, without its roll-back of optimizer steps.
    """
    _demand("zb-h2", ranks, micro)
    spare = max(0, micro - ranks)
    return tuple(tuple(_postponing(r, 2 * (ranks - r) - 1, min(2 * r, r + spare), micro)) for r in range(ranks))


def _postponing(stage: int, warm: int, waiting: int, micro: int) -> Iterator[Action]:
    """`warm` forwards, then I, W, F by turns with W `waiting` micro-batches behind."""
    for k in range(min(warm, micro)):
        yield Action(stage, "F", k)
    for k in range(micro):
        yield Action(stage, "I", k)
        if k >= waiting:
            yield Action(stage, "W", k - waiting)
        if warm + k < micro:
            yield Action(stage, "F", warm + k)
    for k in range(max(0, micro - waiting), micro):
        yield Action(stage, "W", k)


_Urgency = tuple[tuple[str, int], ...]
#: What a rank of `zb_v` does first of what it can do, with its early stage (0) or its late one (1). Neither order is
#: always the better one, and which it is follows no rule that we know of.
_URGENCY: tuple[_Urgency, _Urgency] = (
    (("F", 1), ("I", 1), ("F", 0), ("I", 0), ("W", 0), ("W", 1)),
    (("I", 0), ("F", 1), ("F", 0), ("I", 1), ("W", 0), ("W", 1)),
)


def zb_v(ranks: int, micro: int, units: tuple[int, int, int] = (1, 1, 1)) -> Table:
    """Zero bubble in a vee: at most 2 ranks stages' worth in flight or waiting on a rank, as much memory as 1F1B.

    The order is found, not written down: a rank that is free does the most urgent of what it can do, in two orders of
    urgency, and the shorter table is taken. With F = I = W it comes within two units of the shortest possible,
    6 micro + ranks - 1, for micro >= 2 ranks. Made for equal times, it loses with every micro-batch if they are not.

    Args:
        units: times of F, I and W of a stage, in whole numbers of some unit, for which the order is sought.

    Source: the placement and the limit are those of ZB-V, Qi et al. 2024 (2401.10241); its heuristic is another one.
    """
    _demand("zb-v", ranks, micro, **{f"units of {kind}": number for kind, number in zip("FIW", units)})
    least = 2 * micro * sum(units) + (ranks - 1) * units[0]
    best, table = _greedy(ranks, micro, units, _URGENCY[0])
    if best > least:
        length, other = _greedy(ranks, micro, units, _URGENCY[1])
        table = other if length < best else table
    return table


def _greedy(ranks: int, micro: int, units: tuple[int, int, int], urgency: _Urgency) -> tuple[int, Table]:
    """(units of time, table) of a vee.

    A micro-batch is held from F to W. The last place is kept free for the late stage: a rank that fills every place
    with forwards of the early one waits for itself.
    """
    last, limit = 2 * ranks - 1, 2 * ranks
    takes = dict(zip("FIW", units))
    begun = {kind: [0] * (last + 1) for kind in "FIW"}  # how many; micro-batches go in order
    ended = {kind: [0] * (last + 1) for kind in "FIW"}
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    held, until = [0] * ranks, [0] * ranks

    def ready(rank: int, kind: str, stage: int) -> bool:
        k = begun[kind][stage]
        if k == micro:
            return False
        if kind == "F":
            early = stage < ranks and begun["F"][last - stage] < micro
            return held[rank] < limit - early and (stage == 0 or ended["F"][stage - 1] > k)
        if kind == "I":
            return ended["F"][stage] > k and (stage == last or ended["I"][stage + 1] > k)
        return ended["I"][stage] > k

    def begin(rank: int) -> bool:
        for kind, late in urgency:
            stage = last - rank if late else rank
            if ready(rank, kind, stage):
                rows[rank].append(Action(stage, kind, begun[kind][stage]))
                begun[kind][stage] += 1
                held[rank] += kind == "F"
                until[rank] = time + takes[kind]
                return True
        return False

    time, running = 0, set[int]()
    while True:
        for rank in sorted(running):
            if until[rank] == time:
                action = rows[rank][-1]
                ended[action.kind][action.stage] += 1
                held[rank] -= action.kind == "W"
                running.remove(rank)
        running.update([rank for rank in range(ranks) if rank not in running and begin(rank)])
        if not running:
            break
        time = min(until[rank] for rank in running)
    assert all(len(row) == 6 * micro for row in rows), f"zb-v: {ranks} ranks, {micro} micro-batches stop at {time}"
    return time, tuple(map(tuple, rows))


def dualpipe_v(ranks: int, micro: int) -> Table:
    """Both directions at once, in a vee: forwards of one chunk stand beside backwards of the other.

    In the middle a rank alternates F of its early stage, B of the late, F of the late, B of the early; neighbours in
    that order can share the device's time. Backwards are split at both ends only. At most 2 ranks + 1 stages' worth are
    in flight. Source: DeepSeek-AI 2025, DualPipe, its "cut-in-half" form DualPipeV.

    Raises:
        ScheduleError: fewer than 2 ranks micro-batches.
    """
    _demand("dualpipe-v", ranks, micro)
    return tuple(_dualpipe_row(r, ranks, micro) for r in range(ranks))


def _dualpipe_row(rank: int, ranks: int, micro: int) -> Row:
    early, late, rest = rank, 2 * ranks - 1 - rank, ranks - rank - 1
    row: list[Action] = []
    next_index: dict[tuple[int, str], int] = {}
    waiting: list[Action] = []

    def do(stage: int, kind: str) -> None:
        """The next F of a stage, or its next backward: whole (B), or without the weights' part (I)."""
        count = "F" if kind == "F" else "B"
        k = next_index.get((stage, count), 0)
        next_index[stage, count] = k + 1
        row.append(Action(stage, kind, k))
        if kind == "I":
            waiting.append(Action(stage, "W", k))

    def weights() -> None:
        row.append(waiting.pop(0))

    for _ in range(2 * rest):
        do(early, "F")
    for _ in range(rank + 1):
        do(early, "F")
        do(late, "F")
    for _ in range(rest):
        do(late, "I")
        weights()
        do(late, "F")
    for _ in range(micro - 2 * ranks + rank + 1):
        do(early, "F")
        do(late, "B")
        do(late, "F")
        do(early, "B")
    for _ in range(rest):
        do(late, "B")
        do(late, "F")
        do(early, "B")
    half = (rank + 1) // 2
    for step in range(rank + 1):  # the second half of these is split; odd ranks begin one action sooner
        do(late, "I" if step >= half + 1 - rank % 2 else "B")
        do(early, "I" if step >= half else "B")
    for _ in range(rest):
        weights()
        do(early, "I")
    while waiting:
        weights()
    return tuple(row)


# ---- asynchronous --------------------------------------------------------------------------------------------------


def paci(ranks: int, window: int, updates: int, ahead: int = 0) -> Table:
    """1F1B over window x updates micro-batches that is never flushed; every stage steps after each `window` backwards.

    A stage has ONE version of its weights: forwards use what is there, and backwards what is there then. So a
    micro-batch's forward and backward are `drift_bound` updates apart at most. The order is strict: warm-up, then one
    backward, one forward; an order driven by what is ready loses up to 16 % where an early stage is slow.

    Args:
        window: micro-batches of one update, at every stage.
        updates: how many until the pipeline is drained.
        ahead: further micro-batches in flight on the first rank, fewer on each later one, none on the last. They hide
            latency, for memory and drift: with ranks - 1, up to (F + B) / 2 a message; see `in_flight`.

    Source: PACI (2606.07881).
    """
    _demand("paci", ranks, window, updates=updates)
    if ahead < 0:
        raise ScheduleError(f"paci with ahead={ahead}; 0 is the window of 1F1B, and none is narrower")
    return tuple(tuple(_stepping(r, in_flight(r, ranks, ahead), window, updates)) for r in range(ranks))


def two_bw(ranks: int, window: int, updates: int) -> Table:
    """The table of `paci`, for two versions of the weights: see `delayed_version` for which one is used.

    Source: PipeDream-2BW (2006.09503).

    Raises:
        ScheduleError: a window shorter than ranks - 1, for which two versions are not enough.
    """
    _demand("2bw", ranks, window, updates=updates)
    return tuple(tuple(_stepping(r, ranks - r, window, updates)) for r in range(ranks))


def async_1f1b(ranks: int, updates_of: int = 1, updates: int = 1) -> Table:
    """PipeDream without care: every stage steps after every `updates_of` backwards, 1 unless said otherwise.

    The table of `paci` with that window, and with 1 the largest drift there is: ranks - 1 - r on rank r. Source:
    Narayanan et al. 2019 (PipeDream), which keeps the forward's weights for the backward; whether that is done is no
    matter of the table.
    """
    _demand("async-1f1b", ranks, updates_of, updates=updates)
    return tuple(tuple(_stepping(r, ranks - r, updates_of, updates)) for r in range(ranks))


def _stepping(stage: int, warm: int, window: int, updates: int) -> Iterator[Action]:
    for action in _alternating(stage, warm, window * updates):
        yield action
        if action.kind == "B" and action.index % window == window - 1:
            yield Action(stage, "U", action.index // window)


# ---- the registry --------------------------------------------------------------------------------------------------


def _any(ranks: int, micro: int) -> str:
    return ""


def _whole_groups(ranks: int, micro: int) -> str:
    over = micro % ranks
    near = f"{ranks}" if micro < ranks else f"{micro - over} or {micro - over + ranks}"
    return f"micro-batches pass in groups of {ranks}, and {micro} leave {over} over; use {near}" if over else ""


def _two_fills(ranks: int, micro: int) -> str:
    return f"it fills from both ends and needs at least {2 * ranks}; zb-v takes fewer" if micro < 2 * ranks else ""


def _two_versions(ranks: int, micro: int) -> str:
    if micro >= ranks - 1:
        return ""
    return f"two versions of the weights do only for a window of {ranks - 1} or more; paci takes a shorter one"


@dataclass(frozen=True)
class Schedule:
    """What is known of a schedule by name.

    Attributes:
        make: (ranks, micro) -> table; of an asynchronous one (ranks, window, updates) -> table.
        chunks: stages on every rank (`interleaved`: unless another number is given).
        placement: "line", "loop" or "vee"; see above.
        splits: it has I and W in place of some B.
        asynchronous: stages step on their own; it has U.
        limit: what `allows` says of positive numbers.
    """

    name: str
    make: Callable[..., Table]
    chunks: int
    placement: str
    splits: bool
    asynchronous: bool
    limit: Callable[[int, int], str] = _any

    def allows(self, ranks: int, micro: int) -> str:
        """Why so many micro-batches (of an asynchronous one: a window of so many) on so many ranks are not possible.

        Nothing if they are.
        """
        if ranks < 1 or micro < 1:
            return "it takes at least one rank and one micro-batch"
        return self.limit(ranks, micro)


SCHEDULES: dict[str, Schedule] = {
    s.name: s
    for s in (
        Schedule("gpipe", gpipe, 1, "line", False, False),
        Schedule("1f1b", one_f_one_b, 1, "line", False, False),
        Schedule("interleaved", interleaved, 2, "loop", False, False, _whole_groups),
        Schedule("zb-h1", zb_h1, 1, "line", True, False),
        Schedule("zb-h2", zb_h2, 1, "line", True, False),
        Schedule("zb-v", zb_v, 2, "vee", True, False),
        Schedule("dualpipe-v", dualpipe_v, 2, "vee", True, False, _two_fills),
        Schedule("async-1f1b", async_1f1b, 1, "line", False, True),
        Schedule("2bw", two_bw, 1, "line", False, True, _two_versions),
        Schedule("paci", paci, 1, "line", False, True),
    )
}


def schedule(name: str) -> Schedule:
    """The schedule of that name.

    Raises:
        ScheduleError: there is none; says which there are.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def stage_homes(name: str, ranks: int, chunks: int | None = None) -> tuple[int, ...]:
    """The rank of every stage, in order of stages. `chunks`: as given to `interleaved`.

    >>> stage_homes("interleaved", 2), stage_homes("zb-v", 2)
    ((0, 1, 0, 1), (0, 1, 1, 0))
    """
    known = schedule(name)
    line = tuple(range(ranks))
    if known.placement == "vee":
        return line + line[::-1]
    return line * (chunks or known.chunks if known.placement == "loop" else 1)


def _demand(name: str, ranks: int, micro: int, **numbers: int) -> None:
    """Raise unless the schedule allows these; the other numbers must be positive."""
    if why := SCHEDULES[name].allows(ranks, micro):
        raise ScheduleError(f"{name} cannot run {micro} micro-batches on {ranks} ranks: {why}")
    for what, number in numbers.items():
        if number < 1:
            raise ScheduleError(f"{name} with {what}={number}; it takes at least 1")


__all__ = [
    "SCHEDULES",
    "Schedule",
    "async_1f1b",
    "backward_version",
    "bubble",
    "delayed_version",
    "drift_bound",
    "dualpipe_v",
    "expected_drift",
    "expected_gain",
    "forward_version",
    "gpipe",
    "in_flight",
    "interleaved",
    "makespan",
    "mean_drift",
    "one_f_one_b",
    "paci",
    "schedule",
    "stage_homes",
    "two_bw",
    "zb_h1",
    "zb_h2",
    "zb_v",
]
