"""What a decided plan moves and computes, piece by piece: every redistribution with its collectives, bytes and seconds.

Prices come from `lower`, `comm` and `ops`; nothing here has a formula of its own. Counting goes by classes of repeated
layers, so a piece has a count; the sums equal those of `price` on the unfolded program (tests/test_explain.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from autopar.costmodel.choices import State
from autopar.costmodel.comm import step_seconds
from autopar.costmodel.edges import GRAD, Edge
from autopar.costmodel.fold import Fold
from autopar.costmodel.legal import op_specs
from autopar.costmodel.lower import Prices, bring_seconds
from autopar.graph import BACKWARD, LOOKS
from autopar.reshard import Step, steps
from autopar.spec import R, Spec

PARAMETER, GRADIENT, ACTIVATION, BACKFLOW = "parameters", "parameter gradients", "activations", "activation gradients"


class Sent(NamedTuple):
    """One collective (or local slice): kind, mesh axis, bytes of its larger side on one rank, seconds."""

    kind: str
    axis: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Movement:
    """`count` tensors alike, brought from where they are made to where `readers` (classes) want them.

    what: PARAMETER, GRADIENT, ACTIVATION or BACKFLOW. seconds: of one. number: of the edge in `Prices.edges`.
    """

    number: int
    edge: Edge
    what: str
    src: Spec
    dst: Spec
    reduce: str
    phase: str
    readers: tuple[int, ...]
    sent: tuple[Sent, ...]
    seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """Equal in two states if the same is moved in the same way."""
        return self.number, self.src, self.dst, self.reduce, self.phase

    @property
    def total(self) -> float:
        """Seconds of all that are alike."""
        return self.seconds * self.edge.count


def movements(prices: Prices, state: State, numbers: Iterable[int] | None = None) -> list[Movement]:
    """Everything that moves in `state`, on all edges or on those numbered; each distinct wish is paid once."""
    edges = prices.edges
    names = derived(prices.space.fold)
    out = []
    for number in range(len(edges)) if numbers is None else numbers:
        edge = edges[number]
        src = out_specs(prices, state, edge.cls)[edge.index]
        held = state.storage.get(edge.cls)
        apart = held is not None and held.gather == "twice"
        wishes: dict[tuple[Spec, str, str], list[int]] = {}
        for reader in edge.readers:
            if reader.operand == GRAD:
                dst, reduce = state.storage[reader.cls].spec, state.storage[reader.cls].reduce
            else:
                dst, reduce = in_specs(prices, state, reader.cls)[reader.operand], ""
            wishes.setdefault((dst, reduce, reader.phase if apart else ""), []).append(reader.cls)
        for (dst, reduce, phase), readers in wishes.items():
            if src == dst:
                continue
            seconds = bring_seconds(prices.comm, edge.meta, src, dst, reduce)
            sent = _sent(prices, edge, src, dst, reduce)
            if seconds or sent:
                what = _what(prices.space.fold, edge, readers, names)
                found = tuple(sorted(set(readers)))
                out.append(Movement(number, edge, what, src, dst, reduce, phase, found, sent, seconds))
    return out


def touching(prices: Prices, cls: int) -> list[int]:
    """Numbers of the edges that class `cls` makes or reads."""
    return [n for n, e in enumerate(prices.edges) if e.cls == cls or any(r.cls == cls for r in e.readers)]


def compute_seconds(prices: Prices, state: State) -> dict[int, float]:
    """Seconds of all members of every op class."""
    members = prices.space.fold.members
    return {cls: prices.op_seconds(cls, row) * len(members[cls]) for cls, row in state.rows.items()}


def update_seconds(prices: Prices, state: State) -> dict[int, float]:
    """Seconds of the optimizer's update of all members of every parameter class."""
    members = prices.space.fold.members
    return {cls: prices.update_seconds(cls, s.spec, s.state) * len(members[cls]) for cls, s in state.storage.items()}


def in_specs(prices: Prices, state: State, cls: int) -> tuple[Spec, ...]:
    """Where a class wants its operands."""
    item = prices.space.fold.first(cls)
    whole: Spec = (R,) * len(prices.sizes)
    if item.kind == "op":
        return op_specs(prices.space.fold.items.rule(item), state.rows[cls])[0]
    if item.kind == "output":
        return (state.outputs.get(cls, whole),)
    return (whole,) * len(item.ins)


def out_specs(prices: Prices, state: State, cls: int) -> tuple[Spec, ...]:
    """Where a class leaves its results."""
    item = prices.space.fold.first(cls)
    whole: Spec = (R,) * len(prices.sizes)
    if item.kind == "op":
        return op_specs(prices.space.fold.items.rule(item), state.rows[cls])[1]
    if item.kind == "param":
        return (state.storage[cls].spec,)
    if item.kind == "input":
        return (tuple(prices.space.inputs.get(item.name, whole)),)
    return (whole,) * len(item.outs)


def derived(fold: Fold) -> set[int]:
    """Classes that are parameters, or parameters seen in another shape or precision."""
    found = {c for c in range(len(fold.members)) if fold.first(c).kind == "param"}
    for item in fold.items.items:
        looks = item.kind == "op" and item.node is not None and item.node.target in LOOKS
        if looks and item.ins and fold.of[item.ins[0].item] in found:
            found.add(fold.of[item.index])
    return found


def _what(fold: Fold, edge: Edge, readers: list[int], parameters: set[int]) -> str:
    if any(r.operand == GRAD and r.cls in readers for r in edge.readers):
        return GRADIENT
    if edge.cls in parameters:
        return PARAMETER
    return BACKFLOW if fold.first(edge.cls).phase == BACKWARD else ACTIVATION


def _sent(prices: Prices, edge: Edge, src: Spec, dst: Spec, reduce: str) -> tuple[Sent, ...]:
    """The collectives of one movement, in order; a gradient that is all-reduced first goes in two stages."""
    shape, size = edge.meta.shape, edge.meta.itemsize
    found: tuple[Step, ...] = ()
    if reduce == "all_reduce":
        mid = tuple(R if p.kind == "P" else p for p in src)
        found = steps(shape, src, mid, prices.sizes)
        src = mid
    found += steps(shape, src, dst, prices.sizes)
    machine = prices.comm.machine
    return tuple(
        Sent(s.kind, s.axis, max(math.prod(s.before), math.prod(s.after)) * float(size), step_seconds(s, size, machine))
        for s in found
    )


__all__ = [
    "ACTIVATION", "BACKFLOW", "GRADIENT", "PARAMETER", "Movement", "Sent", "compute_seconds", "derived", "in_specs",
    "movements", "out_specs", "touching", "update_seconds",
]  # fmt: skip
