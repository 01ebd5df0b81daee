"""The order in which a rank runs the events of one phase: gathers ahead of their first use, as `passes/overlap.py`.

A gather or all-to-all starts as soon as its operand exists, with the moves that pack it, nearest use first, while what
flies fits the window; what unpacks it stands right before its first reader. So does a copy from the host, of which so
many are on their way as the plan says. Everything else keeps its order.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from autopar.costmodel.tape import Buffer, Event
from autopar.costmodel.tasks import TWO


@dataclass(eq=False)
class _Start:
    """A start, the moves that serve nothing else, and how many buffers it still misses."""

    event: Event
    at: int
    size: float
    moves: frozenset[Event]
    needs: frozenset[Buffer]
    first_use: float = math.inf
    missing: int = 0


def ahead(events: Sequence[Event], window: float, copies: int, at_once: Collection[Event] = ()) -> list[Event]:
    """The events in the order described above.

    window: bytes of results that may fly, two are always allowed. copies: as of the plan. at_once: run as soon as their
    operands exist.
    """
    if not any(e.ahead or e.up for e in events):
        return list(events)
    return _Order(events, window, copies, at_once).run()


class _Order:
    def __init__(self, events: Sequence[Event], window: float, copies: int, at_once: Collection[Event]) -> None:
        self.events, self.window, self.copies, self.at_once = events, window, copies, frozenset(at_once)
        self.maker: dict[Buffer, Event] = {}
        for event in events:
            for x in event.outs:
                self.maker.setdefault(x, event)  # what is written again in place was made before
        self.readers: dict[Buffer, list[Event]] = {}
        for event in events:
            for x in event.ins:
                self.readers.setdefault(x, []).append(event)
        self.position = {e: i for i, e in enumerate(events)}
        self.placed: dict[Event, None] = {}
        self.flying: dict[Event, float] = {}
        self.coming: set[Event] = set()  # copies from the host
        self.ready: list[_Start] = []
        self.ready_up: list[_Start] = []
        self.waiting: dict[Buffer, list[_Start]] = {}
        self.lazy = self._lazy()
        self.starts = [self._start(e, i) for i, e in enumerate(events) if e.ahead or e.up]
        self.inside = {e for s in self.starts for e in (*s.moves, s.event)}
        self._first_uses()
        for start in self.starts:
            needs = [x for x in start.needs if x in self.maker]
            start.missing = len(needs)
            for x in needs:
                self.waiting.setdefault(x, []).append(start)
            if not needs:
                self._open(start)

    def run(self) -> list[Event]:
        self._go()
        for event in self.events:
            if event not in self.placed and event not in self.lazy and event not in self.inside:
                self._place(event)
                self._go()
        for event in self.events:
            self._place(event)
        return list(self.placed)

    def _lazy(self) -> set[Event]:
        """Moves of what a gather brings."""
        found: set[Event] = set()
        for event in self.events:
            makers = [self.maker.get(x) for x in event.ins]
            moves = bool(event.outs) and all(x.free or x.alias for x in event.outs) and not event.lands
            brought = any(m is not None and (m.ahead or m.up or m in found) for m in makers)
            if moves and brought and not (event.ahead or event.up):
                found.add(event)
        return found

    def _start(self, event: Event, at: int) -> _Start:
        moves: set[Event] = set()
        needs: set[Buffer] = set()
        stack = list(event.ins)
        while stack:
            x = stack.pop()
            maker = self.maker.get(x)
            if maker is None:
                continue
            free = all(y.free or y.alias for y in maker.outs) and not (maker.ahead or maker.up or maker.lands)
            own = all(r is event or r in moves for y in maker.outs for r in self.readers.get(y, ()))
            if free and (own or maker in self.lazy):
                if own:
                    moves.add(maker)
                stack.extend(maker.ins)
            else:
                needs.add(x)
        return _Start(event, at, sum(x.size for x in event.outs), frozenset(moves), frozenset(needs))

    def _first_uses(self) -> None:
        first: dict[Buffer, float] = {}
        for event in reversed(self.events):
            at: float = self.position[event]
            if event in self.lazy or event in self.inside:
                at = min((first.get(x, math.inf) for x in event.outs), default=math.inf)
            for x in event.ins:
                first[x] = min(first.get(x, math.inf), at)
        for start in self.starts:
            start.first_use = min((first.get(x, math.inf) for x in start.event.outs), default=math.inf)

    def _open(self, start: _Start) -> None:
        bisect.insort(self.ready_up if start.event.up else self.ready, start, key=lambda s: (s.first_use, s.at))

    def _go(self) -> None:
        """Start what is ready, nearest use first, while it fits."""
        while self.ready:
            start = self.ready[0]
            if start.event not in self.placed:
                if len(self.flying) >= TWO and sum(self.flying.values()) + start.size > self.window:
                    break
                self._place(start.event)
            if self.ready and self.ready[0] is start:
                self.ready.pop(0)
        while self.ready_up and len(self.coming) < self.copies:
            start = self.ready_up.pop(0)
            self._place(start.event)

    def _place(self, event: Event) -> None:
        stack = [event]
        while stack:
            top = stack[-1]
            if top in self.placed:
                stack.pop()
                continue
            makers = (self.maker.get(x) for x in top.ins)
            here = self.position[top]
            missing = [m for m in makers if m is not None and m not in self.placed and self.position[m] < here]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            self._append(top)

    def _append(self, event: Event) -> None:
        self.placed[event] = None
        for x in event.ins:
            maker = self.maker.get(x)
            if maker is not None:
                self.flying.pop(maker, None)
                self.coming.discard(maker)
        if event.up:
            self.coming.add(event)
        if event.ahead:
            self.flying[event] = sum(x.size for x in event.outs)
        for x in event.outs:
            for start in self.waiting.get(x, ()):
                start.missing -= 1
                if not start.missing:
                    self._open(start)
            for reader in self.readers.get(x, ()):
                if reader in self.at_once and reader not in self.placed:
                    self._append(reader)


__all__ = ["ahead"]
