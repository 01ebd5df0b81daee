"""Order the bound graph so that communication runs beside computation. The last pass.

In each phase, the nodes that compute keep their order. Around them

* a piece cut for the backward from what a gather has brought is cut at once, so that the rest can go;
* a collective starts as soon as its operand exists, with the moves that pack it;
* it is waited for, with the moves that unpack it, right before the first node that needs the result; what only the
  output reads (reduced gradients) is waited for at the end;
* gathers and all-to-alls run ahead of their first use by at most `ahead_bytes` of results, nearest use first, so that
  ZeRO-3 does not hold all parameters at once; two are always allowed, one to be used and one to come;
* one that reads another collective (a parameter that is split over two axes) starts half way from that to its own first
  use: sooner, computation would wait for the other; later, for this one. If only the output reads it (a gradient that
  is reduced over two axes), when the next of the other's kind starts, if that is sooner;
* what is to wait on the host leaves when it is made, and comes back ahead of its first use, nearest use first: each way
  so many tensors at a time as the plan says;
* reductions of outputs may be pending up to `pending_bytes` of operands, then the oldest is waited for; the newest is
  always allowed.

The order follows from the graph alone, which is the same on every rank, so every rank starts the same collectives in
the same order.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.graph import BACKWARD
from autopar.offload import ARRIVED, COPIES, FETCH_START
from autopar.offload import STARTS as HOST_STARTS
from autopar.passes import edit
from autopar.passes.bind import STARTS as COLLECTIVES
from autopar.passes.bind import WAIT, functional
from autopar.passes.bucket import BUCKET_BYTES

aten = torch.ops.aten
#: Gathers that may always fly.
TWO = 2
STARTS = (*COLLECTIVES, *HOST_STARTS)
WAITS = (WAIT, ARRIVED)
_AHEAD = (functional.all_gather_into_tensor.default, functional.all_to_all_single.default)


def overlap(
    gm: fx.GraphModule,
    ahead_bytes: int = 2 * BUCKET_BYTES,
    pending_bytes: int = 4 * BUCKET_BYTES,
    copies: int = COPIES,
) -> fx.GraphModule:
    """A new module with the same nodes in the order described above. `gm` is a bound local graph."""
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    order: dict[fx.Node, None] = dict.fromkeys(edit.placeholders(gm))
    early = [n for n in nodes if n.meta.get("phase") != BACKWARD]
    late = [n for n in nodes if n.meta.get("phase") == BACKWARD]
    for phase in (early, late):
        _Scheduler(phase, order, ahead_bytes, pending_bytes, copies).run()
    out = edit.rebuild(gm, [*order, edit.output_node(gm)])
    out.recompile()
    return out


@dataclass(eq=False)
class _Unit:
    """A start and the moves that serve nothing else."""

    start: fx.Node
    prepare: tuple[fx.Node, ...]  # operands first
    needs: tuple[fx.Node, ...]  # what the unit reads from outside
    first_use: float = math.inf
    first_step: int = 0  # computing nodes before that
    missing: int = 0  # computed nodes it reads that are not placed yet

    @property
    def bytes(self) -> int:
        return edit.nbytes(self.start)


def _lane(start: fx.Node) -> tuple[Any, ...]:
    """What runs one after the other has in common: the kind, and the group; of copies from and to the host the way."""
    return start.target, None if start.target in HOST_STARTS else start.args[-1]


class _Scheduler:
    """One phase. `order` is what has been placed so far, and grows."""

    def __init__(
        self, nodes: list[fx.Node], order: dict[fx.Node, None], ahead: int, pending: int, copies: int
    ) -> None:
        self.nodes, self.order, self.ahead, self.pending_limit = nodes, order, ahead, pending
        self.copies = copies
        self.inside = set(nodes)
        self.position = {n: i for i, n in enumerate(nodes)}
        self.lazy = self._find_lazy()
        self.tail = self._find_tail()
        self.lazy |= self.tail
        self.cuts = self._find_cuts()
        self.units = self._find_units()
        self.of_start = {u.start: u for u in self.units}
        self.in_unit = {n: u for u in self.units for n in (*u.prepare, u.start)}
        self._find_first_uses()
        self.readers: dict[fx.Node, list[_Unit]] = {}
        self.open_gathers: list[_Unit] = []
        self.open_fetches: list[_Unit] = []
        self.open_reductions: list[_Unit] = []
        for unit in self.units:
            missing = [n for n in unit.needs if n not in order and n not in self.lazy]
            unit.missing = len(missing)
            for n in missing:
                self.readers.setdefault(n, []).append(unit)
            if not missing:
                self._open(unit)
        self.steps = 0  # computing nodes placed
        self.started: dict[fx.Node, int] = {}  # start -> steps when it was placed
        self.lanes: dict[tuple[Any, ...], int] = {}  # how many of a kind, on one group, have started
        self.lane_at: dict[fx.Node, int] = {}  # start -> that number with it
        self.flying: dict[fx.Node, int] = {}  # gathers started and not waited for -> bytes
        self.pending: dict[fx.Node, int] = {}  # starts of reductions of outputs, not waited for -> bytes
        self.leaving: dict[fx.Node, None] = {}  # to the host, not waited for
        self.coming: dict[fx.Node, None] = {}  # from there

    def run(self) -> None:
        self._start_ready()
        for node in self.nodes:
            if node in self.lazy or node in self.in_unit or node in self.order:
                continue
            self._place(node)
            if node.target not in edit.MOVES:
                self.steps += 1
            self._start_ready()
            self._drain()
        for unit in self.units:
            self._place(unit.start)
        for node in self.nodes:
            self._place(node)

    # ---- placing -----------------------------------------------------------------------------------------------

    def _place(self, node: fx.Node) -> None:
        """Place a node and, before it, whatever it needs."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self.order:
                stack.pop()
                continue
            needs = [n for n in top.all_input_nodes if n not in self.order]
            if needs:
                stack.extend(reversed(needs))
                continue
            stack.pop()
            self._append(top)

    def _append(self, node: fx.Node) -> None:
        """Place a node whose operands are placed, and at once what must not wait: a pick keeps all the other results
        alive, a cut the whole."""
        stack = [node]
        while stack:
            top = stack.pop()
            if top in self.order:
                continue
            self._put(top)
            stack += [u for u in reversed(top.users) if u in self.inside and (edit.is_pick(u) or u in self.cuts)]

    def _put(self, node: fx.Node) -> None:
        self.order[node] = None
        for unit in self.readers.get(node, ()):
            unit.missing -= 1
            if not unit.missing:
                self._open(unit)
        if node in self.of_start:
            unit = self.of_start[node]
            self._opened(node).remove(unit)
            self.started[node] = self.steps
            self.lanes[_lane(node)] = self.lane_at[node] = self.lanes.get(_lane(node), 0) + 1
            if node.target in _AHEAD:
                self.flying[node] = unit.bytes
            elif node.target in HOST_STARTS:
                (self.coming if node.target is FETCH_START else self.leaving)[node] = None
            elif unit.first_use == math.inf:
                self.pending[node] = edit.nbytes(node.args[0])  # type: ignore[arg-type]
        elif node.target in WAITS:
            start: fx.Node = node.args[0]  # type: ignore[assignment]
            for under_way in (self.flying, self.pending, self.leaving, self.coming):
                under_way.pop(start, None)

    def _opened(self, start: fx.Node) -> list[_Unit]:
        """The starts that may be placed, of the kind of `start`."""
        if start.target is FETCH_START:
            return self.open_fetches
        return self.open_gathers if start.target in _AHEAD else self.open_reductions

    def _start_ready(self) -> None:
        """Start what can be started: reductions at once, in graph order; gathers nearest use first, while they fit."""
        progress = True
        while progress:
            progress = False
            for unit in list(self.open_reductions):
                if unit.start not in self.order and self._ready(unit):
                    self._place(unit.start)
                    self._land()
                    progress = True
            for unit in list(self.open_gathers):
                if unit.start in self.order or not self._ready(unit):
                    continue
                if len(self.flying) >= TWO and sum(self.flying.values()) + unit.bytes > self.ahead:
                    break
                self._place(unit.start)
                progress = True
            for unit in list(self.open_fetches):
                if len(self.coming) >= self.copies:
                    break
                if unit.start not in self.order and self._ready(unit):
                    self._place(unit.start)
                    progress = True

    def _open(self, unit: _Unit) -> None:
        """All a unit still misses comes out of other collectives: it may start when they have had time."""
        opened = self._opened(unit.start)
        if opened is self.open_reductions:
            bisect.insort(opened, unit, key=lambda u: self.position[u.start])
        else:
            bisect.insort(opened, unit, key=lambda u: (u.first_use, self.position[u.start]))

    def _ready(self, unit: _Unit) -> bool:
        """All it reads is there, or comes out of collectives that have had time to finish."""
        return all(n in self.order or self._settled(n, unit) for n in unit.needs)

    def _settled(self, node: fx.Node, unit: _Unit) -> bool:
        stack, seen = [node], {node}
        while stack:
            top = stack.pop()
            if top in self.order:
                continue
            if top.target in STARTS:
                return False
            if top.target in WAITS:
                start: fx.Node = top.args[0]  # type: ignore[assignment]
                if start in self.inside and not self._had_time(start, unit):
                    return False
                continue
            if top not in self.lazy:
                return False
            for n in top.all_input_nodes:
                if n not in seen:
                    seen.add(n)
                    stack.append(n)
        return True

    def _had_time(self, before: fx.Node, unit: _Unit) -> bool:
        """Whether a collective that `unit` reads has been under way for long enough."""
        started = self.started.get(before, self.steps)
        if self.steps <= started:
            return False
        if unit.first_use == math.inf and self.lanes.get(_lane(before), 0) > self.lane_at.get(before, 0):
            return True
        return self.steps >= started + max(1, (unit.first_step - started) // 2)

    def _land(self) -> None:
        """Wait for the oldest copies to the host while too many are under way."""
        while len(self.leaving) > self.copies:
            self._place(next(iter(next(iter(self.leaving)).users)))

    def _drain(self) -> None:
        """Wait for the oldest reductions of outputs while too many are pending, and free what they held."""
        while len(self.pending) > 1 and sum(self.pending.values()) > self.pending_limit:
            start = next(iter(self.pending))
            stack = list(start.users)
            while stack:
                node = stack.pop()
                if node in self.inside and (node.target in WAITS or node in self.tail):
                    self._place(node)
                    stack.extend(node.users)

    # ---- reading the graph -------------------------------------------------------------------------------------

    def _find_lazy(self) -> set[fx.Node]:
        """Waits, and moves of what they bring."""
        lazy: set[fx.Node] = set()
        for node in self.nodes:
            moves = node.target in edit.MOVES and any(n in lazy for n in node.all_input_nodes)
            if node.target in WAITS or moves:
                lazy.add(node)
        return lazy

    def _find_tail(self) -> set[fx.Node]:
        """Between a wait and the output: moves, and element-wise ops of one operand."""
        from_wait = set(self.lazy)
        for node in self.nodes:
            inputs = node.all_input_nodes
            same = len(inputs) == 1 and edit.is_tensor(node) and edit.is_tensor(inputs[0])
            if same and inputs[0] in from_wait and edit.shape(node) == edit.shape(inputs[0]):
                if node.target not in STARTS:
                    from_wait.add(node)
        tail: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node in from_wait and all(u.op == "output" or u in tail for u in node.users):
                tail.add(node)
        return tail

    def _find_cuts(self) -> set[fx.Node]:
        """Slices of what something else reads, too, and the moves behind them, if only the output reads those."""
        ends: set[fx.Node] = set()  # moves of one operand that only the output reads
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            alone = node.target in edit.MOVES and len(node.all_input_nodes) == 1
            if alone and all(u.op == "output" or u in ends for u in node.users):
                ends.add(node)
        for node in self.nodes:
            if node in ends:
                (operand,) = node.all_input_nodes
                slices = node.target is aten.slice.Tensor and any(u not in ends for u in operand.users)
                if slices or operand in found:
                    found.add(node)
        return found

    def _find_units(self) -> list[_Unit]:
        units = []
        for start in self.nodes:
            if start.target not in STARTS:
                continue
            members = {start: None}
            stack = [n for n in start.all_input_nodes]
            while stack:
                node = stack.pop()
                moves = node in self.inside and node.target in edit.MOVES and node not in members
                if moves and all(u in members for u in node.users):
                    members[node] = None
                    stack.extend(node.all_input_nodes)
            ordered = sorted(members, key=self.position.__getitem__)
            needs: dict[fx.Node, None] = {}
            for node in ordered:
                needs.update(dict.fromkeys(n for n in node.all_input_nodes if n not in members))
            units.append(_Unit(start, tuple(ordered[:-1]), tuple(needs)))
        return units

    def _find_first_uses(self) -> None:
        """Position of the first computing node that needs a unit's result; infinite if only the output does."""
        first: dict[fx.Node, float] = {}
        for node in reversed(self.nodes):
            uses = [math.inf]
            for user in node.users:
                passing = user in self.lazy or user in self.in_unit
                if user in self.inside:
                    uses.append(first[user] if passing else self.position[user])
                elif user.op != "output":
                    uses.append(len(self.nodes))  # the next phase reads it
            first[node] = min(uses)
        computing = [
            n for n in self.nodes if n not in self.lazy and n not in self.in_unit and n.target not in edit.MOVES
        ]
        steps = [self.position[n] for n in computing]
        for unit in self.units:
            unit.first_use = first[unit.start]
            unit.first_step = bisect.bisect_left(steps, unit.first_use)


__all__ = ["overlap"]
