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

#: What the seconds of an action are made of; of a send, at the stage behind the gap.
PARTS = {
    "F": (FORWARD,), "B": (INPUT, WEIGHT), "I": (INPUT,), "W": (WEIGHT,), "U": (UPDATE,), "SF": (SEND_F,),
    "SB": (SEND_B,),
}  # fmt: skip
#: Updates in one segment of an asynchronous schedule: it is filled and drained once in so many steps.
SEGMENT = 8
#: Candidates simulated at once as arrays, and how many are simulated one by one.
BATCH, FEW = 512, 8


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
        if len(numbers) <= FEW:
            return np.array([max(self._ends(line)) for line in numbers]) / self.steps
        parts = []
        for k in range(0, len(numbers), BATCH):
            seconds = self._seconds(numbers[k : k + BATCH]).T.copy()
            ended = np.zeros((len(self.nodes) + 1, seconds.shape[1]))  # the last line is of -1, the beginning
            for at, (before, waits, code) in enumerate(self._links):
                begin = ended[before] if waits < 0 else np.maximum(ended[before], ended[waits])
                np.add(begin, seconds[code], out=ended[at])
            parts.append(ended.max(0))
        return np.concatenate(parts) / self.steps

    def critical(self, numbers: Floats) -> Floats:
        """A longest path of every candidate: [candidates, stages, COLUMNS], how often it goes through each number."""
        visits = np.zeros((len(numbers), len(PARTS) * self.stages))
        for line, visit in zip(numbers, visits):
            ended = self._ends(line)
            at = max(range(len(self.nodes)), key=ended.__getitem__)
            codes = []
            while at >= 0:
                before, waits, code = self._links[at]
                codes.append(code)
                at = waits if ended[waits] > ended[before] else before
            visit += np.bincount(codes, minlength=len(visit))
        return np.tensordot(visits, self._parts, 1) / self.steps

    @cached_property
    def _links(self) -> list[tuple[int, int, int]]:
        """(before, waits, number of stage and kind) of every node."""
        kinds = {kind: k for k, kind in enumerate(PARTS)}
        return [(before, waits, stage * len(kinds) + kinds[kind]) for before, waits, stage, kind in self.nodes]

    @cached_property
    def _parts(self) -> Floats:
        """[stages and kinds, stages, COLUMNS]: what the seconds of a node are made of."""
        parts = np.zeros((self.stages, len(PARTS), self.stages, len(COLUMNS)))
        for stage in range(self.stages):
            for kind, columns in enumerate(PARTS.values()):
                parts[stage, kind, stage, list(columns)] = 1.0
        return parts.reshape(-1, self.stages, len(COLUMNS))

    def _seconds(self, numbers: Floats) -> Floats:
        """[candidates, stages and kinds]"""
        lines = [numbers[..., list(columns)].sum(-1) for columns in PARTS.values()]
        return np.stack(lines, -1).reshape(len(numbers), -1)

    def _ends(self, numbers: Floats) -> list[float]:
        """When every node ends, and 0 for -1; numbers: [stages, COLUMNS]. Arrays are slower for a few candidates."""
        seconds = self._seconds(numbers[None])[0].tolist()
        ended = [0.0] * (len(self.nodes) + 1)
        for at, (before, waits, code) in enumerate(self._links):
            begin, other = ended[before], ended[waits]
            ended[at] = (begin if begin >= other else other) + seconds[code]
        return ended

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
    stepped = []
    for rank, row in enumerate(known.make(ranks, micro)):
        stepped.append((*row, *(Action(s, "U", 0) for s, h in enumerate(home) if h == rank)))
    return compiled(tuple(stepped), home, 1, overlap)


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
        place = {stage: k for k, stage in enumerate(sorted({a.stage for a in row}))}
        saved, pending = [0] * len(place), [0] * len(place)
        moments: dict[tuple[int, ...], None] = {}  # saved, pending by stage, and the stage that acts
        for stage, kind, _ in row:
            k = place[stage]
            if kind == "F":
                saved[k] += 1
            elif kind == "I":
                pending[k] += 1
            moments[(*saved, *pending, k)] = None
            if kind == "B" or kind == "I":
                saved[k] -= 1
            elif kind == "W":
                pending[k] -= 1
        found = np.zeros((len(moments), stages, len(COLUMNS)))
        for line, moment in zip(found, moments):
            for stage, k in place.items():
                line[stage, STATIC] = 1
                line[stage, SAVED], line[stage, PENDING] = moment[k], moment[len(place) + k]
                line[stage, TRANSIENT] = k == moment[-1]
        flat = found.reshape(len(found), -1)
        exceeded = [((flat >= line).all(1) & (flat > line).any(1)).any() for line in flat]
        rows.append(found[~np.array(exceeded)])
        ranks += [rank] * len(rows[-1])
    return np.concatenate(rows), np.array(ranks)


__all__ = ["PARTS", "SEGMENT", "Node", "Shape", "compiled", "costs", "shape"]
