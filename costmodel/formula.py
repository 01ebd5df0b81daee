"""The cost of a plan as a formula in the batch B, the sequence S and the sizes of the mesh axes.

What a plan costs follows from sizes of tensors, which are polynomials in B (degree 1) and S (degree 2), divided by the
axes that split them. The polynomials are found by interpolation over programs at six (B, S), and checked at a seventh.
How seconds follow from FLOPs, bytes and ranks is asked of the cost model itself, with machines of which all but one
number is perfect, so that there is no second copy of its formulas here: a machine without FLOPs to wait for tells the
traffic of an op, one with links of a byte per second tells what a collective sends. Ranks p enter collectives as 1,
1/p, p and ceil(log2 p); that is fitted and checked too.

The formula is the serial price of the plan as it is: other sizes keep the same decisions. What of the price is no such
function is said in `Formula.notes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import sympy

from autopar.costmodel.comm import step_seconds
from autopar.costmodel.devices import DEVICES, Device, Link, Machine, machine
from autopar.costmodel.explain import Bench
from autopar.costmodel.items import Item, Items, Meta, Tensor, items_of
from autopar.costmodel.legal import op_specs
from autopar.costmodel.ops import Compute
from autopar.costmodel.price import Price, price
from autopar.costmodel.tally import Movement, movements
from autopar.errors import PlanError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.reshard import Step, steps
from autopar.rule import Choice
from autopar.spec import R, Spec

B, S = sympy.symbols("B S", positive=True)
Expr = Any  # a sympy expression; sympy has no types
#: Powers of (B, S) that sizes of tensors have.
POWERS = tuple((i, j) for i in (0, 1) for j in (0, 1, 2))
#: Largest relative error of a polynomial, or of a price, at a point that it was not made from.
EXACT = 1e-6
FAST = 1e300  # a rate so high that nothing waits for it


@dataclass(frozen=True)
class Formula:
    """Seconds by part and bytes by kind, as sympy expressions.

    Symbols: B, S, the axes by name, and for every axis its link: `bandwidth_dp` (bytes/s), `latency_dp` (s).

    Attributes:
        seconds: "compute", "optimizer", and "KIND over AXIS" of every collective; their sum is the serial price.
        memory: bytes by kind. In `meshless` are the kinds that hold for the plan's own mesh only.
        sizes: batch, sequence and axis sizes of the plan. checked: at another batch and sequence, the error relative to
            the price computed from scratch; None where the plan is not legal there.
        notes: what is no function of these, in words.
    """

    seconds: Mapping[str, Expr]
    memory: Mapping[str, Expr]
    meshless: frozenset[str]
    device: Device
    mesh: Mesh
    batch: int
    seq: int
    checked: float | None
    notes: tuple[str, ...]

    @property
    def step(self) -> Expr:
        """Seconds of a step, one thing after the other."""
        return sympy.Add(*self.seconds.values())

    def at(self, batch: int | None = None, seq: int | None = None, **sizes: int) -> dict[str, Any]:
        """Seconds by part and bytes by kind at other sizes, the same decisions kept; links as the device has them.

        Raises:
            MeshError: the mesh has no such axis, or a size is none.
        """
        for name in sizes:
            self.mesh.axis(name)
        mesh = Mesh(self.mesh.names, tuple(sizes.get(n, m) for n, m in zip(self.mesh.names, self.mesh.sizes)))
        values = self.values(batch or self.batch, seq or self.seq, mesh)
        seconds = {k: float(e.subs(values)) for k, e in self.seconds.items()}
        kinds = {k: e for k, e in self.memory.items() if mesh == self.mesh or k not in self.meshless}
        return {
            "batch": batch or self.batch,
            "seq": seq or self.seq,
            "mesh": str(mesh),
            "serial_s": sum(seconds.values()),
            "seconds": seconds,
            "memory": {k: float(e.subs(values)) for k, e in kinds.items()},
        }

    def values(self, batch: int, seq: int, mesh: Mesh) -> dict[Any, float]:
        """Numbers for all symbols."""
        where = machine(self.device, mesh)
        out: dict[Any, float] = {B: batch, S: seq}
        for axis, (name, size) in enumerate(zip(mesh.names, mesh.sizes)):
            out[axis_symbol(name)] = size
            bandwidth, latency = link_symbols(name)
            out[bandwidth], out[latency] = where.links[axis].bandwidth, where.links[axis].latency
        return out

    def plain(self, expression: Expr) -> Expr:
        """The expression near the plan's own sizes: of every maximum the larger branch, links as numbers, expanded."""
        values = self.values(self.batch, self.seq, self.mesh)
        found = expression.replace(
            lambda e: isinstance(e, sympy.Max), lambda e: max(e.args, key=lambda a: float(a.subs(values)))
        )
        links = {s: values[s] for name in self.mesh.names for s in link_symbols(name)}
        return sympy.expand(found.subs(links))


def axis_symbol(name: str) -> Expr:
    """The size of a mesh axis."""
    return sympy.Symbol(name, positive=True)


def link_symbols(name: str) -> tuple[Expr, Expr]:
    """Bandwidth and latency of an axis's link."""
    return sympy.Symbol(f"bandwidth_{name}", positive=True), sympy.Symbol(f"latency_{name}", positive=True)


def formula(
    at: Callable[[int, int], Program],
    plan: Plan,
    batch: int,
    seq: int,
    device: str | Device = "cpu",
    *,
    varies: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Formula:
    """The formula of a plan.

    Args:
        at: (batch, sequence) -> the program; at (batch, seq) the one that the plan is for.
        varies: False where the program does not depend on the sequence.
        progress: told what happens, in a few words.

    Raises:
        PlanError: the program is another one at other sizes, or the device has measured curves, which are no formula.
    """
    where = DEVICES[device] if isinstance(device, str) and device in DEVICES else device
    if isinstance(where, str) or where.measured is not None:
        raise PlanError("a formula needs a device preset (--device h100): measured curves over sizes are no formula")
    if plan.compression is not None:
        raise PlanError(
            "there is no formula of a plan with compressed gradients yet; take one of the plan without compression"
        )
    lengths = [seq, seq // 2, seq // 4] if varies else [seq]
    if varies and (seq % 4 or seq < 16):
        raise PlanError(
            f"a formula is made at the whole, half and quarter of the sequence; {seq} is too short for that"
        )
    points = [(b, s) for s in lengths for b in (batch, 2 * batch)]
    test = (3 * batch, 3 * seq // 4 if varies else seq)
    grid: dict[tuple[int, int], Items] = {}
    for number, point in enumerate([*points, test]):
        progress(f"program {number + 1} of {len(points) + 1}: batch {point[0]}, sequence {point[1]} ...")
        grid[point] = items_of(at(*point), plan.saved)
    first = grid[points[0]]
    for point, items in grid.items():
        if [i.name for i in items.items] != [i.name for i in first.items]:
            raise PlanError(
                f"the model is another program at batch {point[0]}, sequence {point[1]} than at {batch}, {seq}; "
                "there is no one formula"
            )
    progress("adding up ...")
    return _Maker(grid, points, test, plan, where).run()


@dataclass
class _Maker:
    grid: dict[tuple[int, int], Items]
    points: list[tuple[int, int]]
    test: tuple[int, int]
    plan: Plan
    device: Device
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.items = self.grid[self.points[0]]
        self.mesh = self.plan.mesh
        self.sizes = self.mesh.sizes
        self.axes = [axis_symbol(n) for n in self.mesh.names]
        self.bench = Bench.open(self.items, self.plan, self.device)
        self._numel: dict[Tensor, Expr] = {}
        powers = [p for p in POWERS if p[1] == 0 or len({s for _, s in self.points}) > 1]
        rows = [[float(b) ** i * float(s) ** j for i, j in powers] for b, s in self.points]
        # Columns of very different size: scaled, or the inverse loses digits.
        scale = np.array([max(abs(r[k]) for r in rows) for k in range(len(powers))])
        self.inverse = np.linalg.inv(np.array(rows) / scale) / scale[:, None]
        self.powers = powers

    def run(self) -> Formula:
        seconds: dict[str, Expr] = {"compute": self.compute(), "optimizer": self.update()}
        seconds |= self.communication()
        memory, meshless = self.memory()
        strided = [i.name for i in self.items.items if any(c.outer > 1 for c in self.plan.choice(i.name))]
        if strided:
            self.notes.append(
                f"{len(strided)} ops are split in strides ({strided[0]}): strides are taken to follow the sizes; at "
                "another batch this plan as it is written may move more"
            )
        batch, seq = self.points[0]
        made = Formula(
            seconds, memory, meshless, self.device, self.mesh, batch, seq, None, tuple(dict.fromkeys(self.notes))
        )
        try:
            right = self._price(self.test).step_s
        except PlanError:  # the plan does not divide these sizes
            return made
        return replace(made, checked=abs(made.at(*self.test)["serial_s"] / right - 1))

    # ---- polynomials -------------------------------------------------------------------------------------------

    def poly(self, values: Mapping[tuple[int, int], float], what: str) -> Expr:
        """The polynomial through values at the points, checked at the other; a constant, and a note, if it is none."""
        here = values[self.points[0]]
        if all(values[p] == here for p in (*self.points, self.test)):
            return sympy.Float(here) if here else sympy.Integer(0)
        coefficients = self.inverse @ np.array([values[p] for p in self.points])
        terms = [
            (c, i, j)
            for c, (i, j) in zip(coefficients, self.powers)
            if abs(c) * self.points[0][0] ** i * self.points[0][1] ** j > 1e-9 * abs(here)
        ]
        b, s = self.test
        guess = sum(c * b**i * s**j for c, i, j in terms)
        if abs(guess - values[self.test]) > EXACT * abs(values[self.test]):
            self.notes.append(f"{what}: no polynomial in batch and sequence; taken as it is at {self.points[0]}")
            return sympy.Float(here)
        return sympy.Add(*(sympy.Float(c) * B**i * S**j for c, i, j in terms))

    def numel(self, tensor: Tensor) -> Expr:
        """Elements of a tensor."""
        if tensor not in self._numel:
            values = {p: float(math.prod(items.meta(tensor).shape)) for p, items in self.grid.items()}
            self._numel[tensor] = self.poly(values, self.items.items[tensor.item].name)
        return self._numel[tensor]

    def over(self, axes: Sequence[int]) -> Expr:
        """One over the sizes of some axes."""
        return sympy.Mul(*(1 / self.axes[a] for a in axes))

    # ---- compute -----------------------------------------------------------------------------------------------

    def compute(self) -> Expr:
        state, fold = self.bench.state, self.bench.prices.space.fold
        same: dict[Any, list[Any]] = {}
        for cls, row in state.rows.items():
            item = fold.first(cls)
            entry = same.setdefault((item.signature, row), [item, 0])
            entry[1] += len(fold.members[cls])
        return sympy.Add(*(count * self.op(item, row) for (_, row), (item, count) in same.items()))  # type: ignore[misc]

    def op(self, item: Item, row: tuple[Choice, ...]) -> Expr:
        """Seconds of one op: launches, talk between shards inside it, and the larger of FLOPs and traffic."""
        device, quiet = self.device, (Link(FAST, 0.0),) * len(self.sizes)
        rates = dict.fromkeys(device.flops, FAST)
        machines = {
            "traffic": Machine(replace(device, flops=rates, launch=0.0), self.mesh, quiet),
            "flops": Machine(replace(device, bandwidth=FAST, launch=0.0), self.mesh, quiet),
            "launch": Machine(replace(device, flops=rates, bandwidth=FAST, launch=1.0), self.mesh, quiet),
        }
        found = {k: {p: self._seconds(p, item, row, m) for p in self.grid} for k, m in machines.items()}
        launches = round(found["launch"][self.points[0]])
        total = sympy.Float(launches * device.launch) if launches else sympy.Integer(0)
        traffic = self._traffic(item, row, found["traffic"])
        split = [a for a, (c, n) in enumerate(zip(row, self.sizes)) if c.factor and n > 1]
        flops: Expr = sympy.Integer(0)
        if found["flops"][self.points[0]] > 1e-200:
            whole = math.prod(self.sizes[a] for a in split)
            flops = self.poly(found["flops"], f"FLOPs of {item.name}") * whole * self.over(split)
        total += sympy.Max(flops, traffic) if flops != 0 and traffic != 0 else flops + traffic
        return total + self._inner(item, row, split, rates)

    def _seconds(self, point: tuple[int, int], item: Item, row: tuple[Choice, ...], where: Machine) -> float:
        items = self.grid[point]
        return Compute(items, where).seconds(items.items[item.index], row)

    def _traffic(self, item: Item, row: tuple[Choice, ...], values: Mapping[tuple[int, int], float]) -> Expr:
        """Traffic by operand and result where these make up the whole of it; else as the result is split."""
        here = values[self.points[0]]
        if here < 1e-200:
            return sympy.Integer(0)
        ins, outs = op_specs(self.items.rule(item), row)
        parts = [(t, m, s) for t, m, s in zip(item.ins, item.in_meta, ins)]
        parts += [(Tensor(item.index, k), m, s) for k, (m, s) in enumerate(zip(item.outs, outs)) if m is not None]
        rate = self.device.traffic()
        total = sympy.Add(*(self.numel(t) * m.itemsize * self.over(_split(s, self.sizes)) for t, m, s in parts)) / rate
        whole = {a: n for a, n in zip(self.axes, self.sizes)}
        known = [float(total.subs({**whole, B: b, S: s})) for b, s in self.grid]
        if all(math.isclose(x, values[p], rel_tol=EXACT) for x, p in zip(known, self.grid)):
            return total
        split = _split(outs[0], self.sizes) if outs else []
        product = math.prod(self.sizes[a] for a in split)
        return self.poly(values, f"traffic of {item.name}") * product * self.over(split)

    def _inner(self, item: Item, row: tuple[Choice, ...], split: list[int], rates: dict[str, float]) -> Expr:
        """Collectives inside an op: what they send and their rounds, per axis, over ranks as an all-reduce."""
        total: Expr = sympy.Integer(0)
        perfect = replace(self.device, flops=rates, bandwidth=FAST, launch=0.0)
        for axis in split:
            ways = {}
            for key, link in (("sent", Link(1.0, 0.0)), ("rounds", Link(FAST, 1.0))):
                links = tuple(link if a == axis else Link(FAST, 0.0) for a in range(len(self.sizes)))
                ways[key] = {p: self._seconds(p, item, row, Machine(perfect, self.mesh, links)) for p in self.grid}
            if ways["sent"][self.points[0]] < 1e-200:
                continue
            bandwidth, latency = link_symbols(self.mesh.names[axis])
            kind, p = collective(self.device, "all_reduce"), self.axes[axis]
            size = self.sizes[axis]
            others = [a for a in split if a != axis]
            share = kind.sent(p) / float(kind.sent(sympy.Integer(size))) * self.over(others)
            product = math.prod(self.sizes[a] for a in others)
            total += self.poly(ways["sent"], f"talk inside {item.name}") * share * product / bandwidth
            rounds = ways["rounds"][self.points[0]] / float(kind.rounds(sympy.Integer(size)))
            total += rounds * kind.rounds(p) * latency
        return total

    # ---- optimizer and communication ---------------------------------------------------------------------------

    def update(self) -> Expr:
        """Seconds of the optimizer."""
        prices, found = self.bench.prices, []
        for cls, held in self.bench.state.storage.items():
            split = _split(held.spec, self.sizes)
            whole = math.prod(self.sizes[a] for a in split)
            count = len(prices.space.fold.members[cls])
            found.append(prices.update_seconds(cls, held.spec, held.state) * count * whole * self.over(split))
        return sympy.Add(*found)

    def communication(self) -> dict[str, Expr]:
        """Seconds of every kind of collective on every axis."""
        out: dict[str, Expr] = {}
        for m in movements(self.bench.prices, self.bench.state):
            members = self.bench.prices.space.fold.members[m.edge.cls]
            numel = self.numel(Tensor(members[0], m.edge.index))
            for step, before, after in self._stages(m):
                kind = collective(self.device, step.kind)
                # All but an all-gather and a slice are as large as what goes in.
                axes = after if step.kind in ("all_gather", "local_chunk") else before
                size = numel * m.edge.meta.itemsize * self.over(sorted(axes))
                name, p = self.mesh.names[step.axis], self.axes[step.axis]
                bandwidth, latency = link_symbols(name)
                cost = kind.sent(p) * size / bandwidth + kind.rounds(p) * latency
                cost += kind.traffic * size / self.device.traffic() + kind.launches(p) * self.device.launch
                copies = int(step.stacks) + int(step.unpacks)
                cost += copies * (2 * size / self.device.traffic() + self.device.launch)
                key = f"{'slicing' if step.kind == 'local_chunk' else step.kind} over {name}"
                out[key] = out.get(key, sympy.Integer(0)) + m.edge.count * cost
        return out

    def _stages(self, m: Movement) -> list[tuple[Step, set[int], set[int]]]:
        """Steps of a movement, with the axes that split the tensor before and after each."""
        legs = [(m.src, m.dst)]
        if m.reduce == "all_reduce":
            mid = tuple(R if p.kind == "P" else p for p in m.src)
            legs = [(m.src, mid), (mid, m.dst)]
        out = []
        for src, dst in legs:
            held = set(_split(src, self.sizes))
            for step in steps(m.edge.meta.shape, src, dst, self.sizes):
                after = held | {step.axis} if step.split >= 0 else held - {step.axis}
                out.append((step, held, after))
                held = after
        return out

    # ---- memory ------------------------------------------------------------------------------------------------

    def _price(self, point: tuple[int, int]) -> Price:
        plan = replace(self.plan, fingerprint=self.grid[point].program.fingerprint)
        return price(self.grid[point], plan, self.device)

    def memory(self) -> tuple[dict[str, Expr], frozenset[str]]:
        """Bytes by kind; what stays is a formula in the axes too, what comes and goes holds for the plan's mesh."""
        prices = self.bench.prices
        out: dict[str, Expr] = {}
        for kind in ("parameters", "optimizer"):
            found = []
            for cls, held in self.bench.state.storage.items():
                item, split = prices.space.fold.first(cls), _split(held.spec, self.sizes)
                size = prices.policy.stored(item, held.spec, self.sizes, held.state)[kind]
                whole = math.prod(self.sizes[a] for a in split)
                found.append(size * len(prices.space.fold.members[cls]) * whole * self.over(split))
            out[kind] = sympy.Add(*found)
        try:
            known = {p: self._price(p).memory for p in self.grid}
        except PlanError as error:
            self.notes.append(f"memory that depends on the batch: the plan is not legal at other sizes ({error})")
            return out, frozenset()
        rest = [k for k in known[self.points[0]] if k not in out]
        for kind in rest:
            out[kind] = self.poly({p: m[kind] for p, m in known.items()}, f"memory of {kind}")
        return out, frozenset(rest)


def _split(spec: Spec, sizes: Sequence[int]) -> list[int]:
    return [a for a, (p, n) in enumerate(zip(spec, sizes)) if p.kind == "S" and n > 1]


# ---- what collectives send -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A collective over p ranks: bytes on the wire per byte of its size, message rounds, launches, local traffic."""

    sent: Callable[[Expr], Expr]
    rounds: Callable[[Expr], Expr]
    launches: Callable[[Expr], Expr]
    traffic: float


RANKS = (2, 3, 4, 6, 8, 16, 64)


def collective(device: Device, kind: str) -> Kind:
    """How the cost model prices a collective, asked of it number by number.

    Raises:
        PlanError: its price is no combination of 1, 1/p, p and ceil(log2 p).
    """
    return _collective(kind)


@cache
def _collective(kind: str) -> Kind:
    size = 1 << 20
    base = replace(DEVICES["h100"], bandwidth=FAST, launch=0.0)

    def ask(p: int, device: Device, link: Link) -> float:
        mesh = Mesh(("a",), (p,))
        small = (size // 1,)
        step = Step(kind, 0, 0, 1, 0, 1, "sum", small, small)
        return step_seconds(step, 1, Machine(device, mesh, (link,)))

    none = Link(FAST, 0.0)
    sent = _over_ranks(kind, [ask(p, base, Link(1.0, 0.0)) / size for p in RANKS])
    rounds = _over_ranks(kind, [ask(p, base, Link(FAST, 1.0)) for p in RANKS])
    launches = _over_ranks(kind, [ask(p, replace(base, launch=1.0), none) for p in RANKS])
    flat = replace(base, bandwidth=1.0, memory_efficiency=1.0)
    return Kind(sent, rounds, launches, ask(2, flat, none) / size)


def _over_ranks(kind: str, values: list[float]) -> Callable[[Expr], Expr]:
    """The combination of 1, 1/p, ceil(log2 p) and p that gives these values."""
    rows = np.array([[1.0, 1 / p, math.ceil(math.log2(p)), p] for p in RANKS])
    found, *_ = np.linalg.lstsq(rows, np.array(values), rcond=None)
    if not np.allclose(rows @ found, values, rtol=1e-9, atol=1e-9):
        raise PlanError(f"the price of {kind} is no combination of 1, 1/p, p and ceil(log2 p); there is no formula")
    one, inverse, log, linear = (sympy.nsimplify(round(float(c), 9), rational=True) for c in found)

    def value(p: Expr) -> Expr:
        return one + inverse / p + log * sympy.ceiling(sympy.log(p, 2)) + linear * p

    return value


__all__ = ["B", "Formula", "Meta", "S", "axis_symbol", "collective", "formula", "link_symbols"]
