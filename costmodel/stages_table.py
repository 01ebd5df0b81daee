"""What the table of a schedule says whatever its stages cost: paths that add up to a time, and what is held at once.

A table runs every rank's row in order, an action waits for its neighbour's message, and messages from one rank to
another pass one after the other. So its time, as `autopar.pipeline.clock` has it, is a longest path through a graph
that the table alone decides, and along a path it is linear in the stages' numbers. The bytes of a rank are the largest
of a few sums that its row alone decides. Both are rows of coefficients, [stages, COLUMNS].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopar.costmodel.stages_chain import (
    COLUMNS,
    FORWARD,
    INPUT,
    PENDING,
    SAVED,
    SEND_B,
    SEND_F,
    STATIC,
    TRANSIENT,
    UPDATE,
    WEIGHT,
    Floats,
    Ints,
)
from autopar.pipeline.clock import Costs
from autopar.pipeline.comms import RECEIVES, SENDS, made, needed, receipt, sending, with_comms
from autopar.pipeline.schedules import schedule, stage_homes
from autopar.pipeline.table import COMPUTE, Action, Table
from autopar.pipeline.tables import SEGMENT, with_updates

#: What the seconds of an action are made of; of a send, at the stage behind the gap.
PARTS = {
    "F": (FORWARD,), "B": (INPUT, WEIGHT), "I": (INPUT,), "W": (WEIGHT,), "U": (UPDATE,), "SF": (SEND_F,),
    "SB": (SEND_B,),
}  # fmt: skip
#: Candidates simulated at once.
BATCH = 512


class Node(NamedTuple):
    """An action or a message: it begins when both `before` and `waits` have ended (-1: nothing to wait for), and takes
    the seconds of `kind` at `stage` (of a message, the stage behind the gap)."""

    before: int
    waits: int
    stage: int
    kind: str


@dataclass(frozen=True, eq=False)
class Shape:
    """A table, compiled.

    Attributes:
        table: of the schedule, with the optimizer's U. home: stage -> rank. steps: optimizer steps in the table.
        overlap: whether messages travel while ranks compute.
        nodes: in an order in which everything comes behind what it waits for.
        memory: [rows, stages, COLUMNS]: bytes on a rank at one time, all that could be its peak; memory_rank: [rows].
    """

    table: Table
    home: tuple[int, ...]
    steps: int
    overlap: bool
    nodes: tuple[Node, ...]
    memory: Floats
    memory_rank: Ints

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.home)

    @property
    def ranks(self) -> int:
        """How many."""
        return len(self.table)

    @cached_property
    def passes(self) -> Floats:
        """[ranks, stages, COLUMNS]: the seconds that every rank computes in a step."""
        rows = np.zeros((self.ranks, self.stages, len(COLUMNS)))
        for rank, row in enumerate(self.table):
            for stage, kind, _ in row:
                rows[rank, stage, list(PARTS[kind])] += 1 / self.steps
        return rows

    def makespans(self, numbers: Floats) -> Floats:
        """Seconds of a step of every candidate; numbers: [candidates, stages, COLUMNS]."""
        parts = [self._run(numbers[k : k + BATCH])[0].max(0) for k in range(0, len(numbers), BATCH)]
        return np.concatenate(parts) / self.steps if parts else np.zeros(0)

    def critical(self, numbers: Floats) -> Floats:
        """A longest path of every candidate: [candidates, stages, COLUMNS], how often it goes through each number."""
        ended, waited = self._run(numbers)
        candidates = np.arange(len(numbers))
        at = ended[:-1].argmax(0)
        # The last of each is for -1, where the path has come to the beginning.
        before, waits = np.array([n[:2] for n in self.nodes] + [(-1, -1)]).T
        lines = []
        while (at >= 0).any():
            lines.append(at)
            at = np.where(waited[at, candidates], waits[at], before[at])
        visits = np.zeros((len(numbers), len(self.nodes) + 1))
        visits[np.broadcast_to(candidates, (len(lines), len(numbers))), np.array(lines)] = 1 / self.steps
        order, begins, parts = self._kinds
        return np.tensordot(np.add.reduceat(visits[:, order], begins, axis=1), parts, 1)

    @cached_property
    def _kinds(self) -> tuple[Ints, Ints, Floats]:
        """Nodes in order of stage and kind, where each of these begins, and [of these, stages, COLUMNS] its parts."""
        kinds = list(PARTS)
        of = np.array([n.stage * len(kinds) + kinds.index(n.kind) for n in self.nodes])
        order = np.argsort(of, kind="stable")
        found, begins = np.unique(of[order], return_index=True)
        parts = np.zeros((len(found), self.stages, len(COLUMNS)))
        for line, code in zip(parts, found.tolist()):
            line[code // len(kinds), list(PARTS[kinds[code % len(kinds)]])] = 1.0
        return order, begins, parts

    def _run(self, numbers: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """When every node ends, [nodes + 1, candidates], and whether it was `waits` that it began behind. The last line
        is that of -1, the beginning."""
        by_stage = np.ascontiguousarray(numbers.transpose(1, 2, 0))
        seconds = {(s, k): by_stage[s, list(parts)].sum(0) for k, parts in PARTS.items() for s in range(self.stages)}
        count = len(self.nodes)
        ended = np.zeros((count + 1, len(numbers)))
        waited = np.zeros((count + 1, len(numbers)), dtype=bool)
        for at, (before, waits, stage, kind) in enumerate(self.nodes):
            begin = ended[before]
            if waits >= 0:
                other = ended[waits]
                np.greater(other, begin, out=waited[at])
                begin = np.maximum(begin, other)
            np.add(begin, seconds[stage, kind], out=ended[at])
        return ended, waited

    def peaks(self, numbers: Floats) -> Floats:
        """Peak bytes of every rank; numbers: [stages, COLUMNS]."""
        most = np.zeros(self.ranks)
        np.maximum.at(most, self.memory_rank, (self.memory * numbers).sum((1, 2)))
        return most


def costs(numbers: Floats) -> Costs:
    """Numbers [stages, COLUMNS] as the clock takes them."""
    column = [tuple(line) for line in numbers.T.tolist()]
    return Costs(
        forward=column[FORWARD],
        input_grad=column[INPUT],
        weight_grad=column[WEIGHT],
        update=column[UPDATE],
        send_forward=column[SEND_F][1:],
        send_backward=column[SEND_B][1:],
        saved_bytes=column[SAVED],
        pending_bytes=column[PENDING],
        transient_bytes=column[TRANSIENT],
        static_bytes=column[STATIC],
    )


@lru_cache(maxsize=256)
def shape(name: str, ranks: int, micro: int, overlap: bool = True) -> Shape:
    """The table of a schedule, compiled. Of an asynchronous one, a segment of `SEGMENT` updates.

    Raises:
        ScheduleError: the schedule does not allow these numbers.
    """
    known = schedule(name)
    home = stage_homes(name, ranks)
    if known.asynchronous:
        return compiled(known.make(ranks, micro, SEGMENT), home, SEGMENT, overlap)
    return compiled(with_updates(known.make(ranks, micro)), home, 1, overlap)


def compiled(table: Table, home: Sequence[int], steps: int = 1, overlap: bool = True) -> Shape:
    """A table of compute actions as a Shape. It must be one that can run."""
    nodes = _overlapping(table, home) if overlap else _meeting(with_comms(table))
    memory, memory_rank = _memory(table, len(home))
    return Shape(table, tuple(home), steps, overlap, tuple(nodes), memory, memory_rank)


def _overlapping(table: Table, home: Sequence[int]) -> list[Node]:
    nodes: list[Node] = []
    arrived: dict[Action, int] = {}  # message -> the node that brings it
    way: dict[tuple[int, int], int] = {}  # from rank to rank: the message before
    place, last = [0] * len(table), [-1] * len(table)
    end, left = len(home) - 1, sum(map(len, table))
    while left:
        stuck = left
        for rank, row in enumerate(table):
            for action in row[place[rank] :]:
                need = needed(action, end)
                if need is not None and need not in arrived:
                    break
                nodes.append(Node(last[rank], -1 if need is None else arrived[need], action.stage, action.kind))
                last[rank] = len(nodes) - 1
                place[rank] += 1
                left -= 1
                message = made(action, end)
                if message is not None:
                    arrived[message] = last[rank]
                    ends = rank, home[receipt(message).stage]
                    if ends[0] != ends[1]:
                        nodes.append(Node(way.get(ends, -1), last[rank], _behind(message), message.kind))
                        arrived[message] = way[ends] = len(nodes) - 1
        assert left < stuck, "the table waits for itself"
    return nodes


def _meeting(table: Table) -> list[Node]:
    nodes: list[Node] = []
    present: dict[Action, int] = {}  # message -> the rank that waits for its other end
    place, last = [0] * len(table), [-1] * len(table)
    ready = list(range(len(table)))
    while ready:
        rank = ready.pop()
        while place[rank] < len(table[rank]):
            action = table[rank][place[rank]]
            if action.kind in COMPUTE:
                nodes.append(Node(last[rank], -1, action.stage, action.kind))
                last[rank] = len(nodes) - 1
                place[rank] += 1
                continue
            message = sending(action) if action.kind in RECEIVES else action
            assert message.kind in SENDS
            other = present.pop(message, None)
            if other is None:
                present[message] = rank
                break
            nodes.append(Node(last[rank], last[other], _behind(message), message.kind))
            last[rank] = last[other] = len(nodes) - 1
            place[rank] += 1
            place[other] += 1
            ready.append(other)
    assert not present, "the table waits for itself"
    return nodes


def _behind(message: Action) -> int:
    """The stage behind the gap that a message crosses."""
    return max(message.stage, receipt(message).stage)


def _memory(table: Table, stages: int) -> tuple[Floats, Ints]:
    """Rows of bytes held at one time, and their ranks: of all moments only those that no other surely exceeds."""
    rows, ranks = [], []
    for rank, row in enumerate(table):
        held = np.zeros((stages, len(COLUMNS)))
        held[sorted({a.stage for a in row}), STATIC] = 1
        moments: dict[bytes, Floats] = {}
        for stage, kind, _ in row:
            held[stage, SAVED] += kind == "F"
            held[stage, PENDING] += kind == "I"
            held[stage, TRANSIENT] = 1
            moments.setdefault(held.tobytes(), held.copy())
            held[stage, TRANSIENT] = 0
            held[stage, SAVED] -= kind in "BI"
            held[stage, PENDING] -= kind == "W"
        found = np.array(list(moments.values())).reshape(len(moments), -1)
        exceeded = [((found >= line).all(1) & (found > line).any(1)).any() for line in found]
        rows.append(found[~np.array(exceeded)].reshape(-1, stages, len(COLUMNS)))
        ranks += [rank] * len(rows[-1])
    return np.concatenate(rows), np.array(ranks)


__all__ = ["PARTS", "SEGMENT", "Node", "Shape", "compiled", "costs", "shape"]
