"""What it takes to compress gradients: seconds, bytes, and state; see `autopar.compression`.

bfloat16: sums travel at two bytes an element, and are cast before and behind. PowerSGD (Vogels, Karimireddy and Jaggi,
2019, algorithms 1 and 2): of a gradient M, n by m on every rank, and rank r, the sums of M Q (n r) and of M^T P (m r)
travel in place of n m; the error of the last step, as large as M, and Q stay on every rank. All of it runs behind the
backward (`runtime/powersgd.py`), its collectives merged into two on each axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autopar.compression import BF16, POWERSGD, Compression
from autopar.costmodel.comm import Comm, collective_seconds, copy_seconds
from autopar.costmodel.devices import Machine
from autopar.costmodel.items import Items, Meta
from autopar.costmodel.legal import Specs, plan_specs
from autopar.costmodel.tasks import Task, Tasks, leaving
from autopar.graph import BACKWARD
from autopar.plan import Plan
from autopar.spec import R, Shape, Spec, local_shape

HALF = torch.bfloat16


@dataclass(frozen=True)
class Work:
    """PowerSGD of one gradient on one rank.

    Attributes:
        rows, columns: of the piece as a matrix. rank: of the products.
        dtype: of products and errors: that of the gradient, or float32 where that has fewer bytes.
        axes: numbers of the mesh axes over which it is reduced.
    """

    rows: int
    columns: int
    rank: int
    dtype: torch.dtype
    axes: tuple[int, ...]

    @property
    def p_bytes(self) -> int:
        """Bytes of P."""
        return self.rows * self.rank * self.dtype.itemsize

    @property
    def q_bytes(self) -> int:
        """Bytes of Q."""
        return self.columns * self.rank * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes kept from step to step: the error, and Q."""
        return self.rows * self.columns * self.dtype.itemsize + self.q_bytes

    def compute(self, where: Machine) -> tuple[float, float, float]:
        """Seconds until P can travel, from there until Q can, and from there to the end."""
        device, count = where.device, self.rows * self.columns
        size, flops = count * self.dtype.itemsize, 2.0 * count * self.rank

        def kernel(flops: float, moved: float) -> float:
            return max(flops / device.rate(self.dtype, flops), moved / device.traffic(size=moved)) + device.launch

        add, product = kernel(0.0, 3.0 * size), kernel(flops, float(size))
        # QR by Householder's reflections, one for every column: 4 n r^2 (Golub and Van Loan, section 5.2).
        orthogonal = kernel(4.0 * self.rows * self.rank**2, 2.0 * self.p_bytes) + 2 * self.rank * device.launch
        return add + product, orthogonal + product, product + add

    def sent(self, where: Machine) -> float:
        """Seconds of its collectives, were they on their own."""
        both = (float(self.p_bytes), float(self.q_bytes))
        return sum(collective_seconds("all_reduce", axis, n, n, where) for axis in self.axes for n in both)


def work_of(compression: Compression | None, meta: Meta, home: Spec, stored: Spec, sizes: Sequence[int]) -> Work | None:
    """PowerSGD of a gradient that is made as `home`, of a parameter stored as `stored`; None: it is not compressed.

    `home`: or as the graph leaves it (`Compression.left`).
    """
    if compression is None or compression.kind != POWERSGD or not meta.dtype.is_floating_point:
        return None
    left = compression.left(meta.shape, home, stored, sizes)
    if left == stored:
        return None
    piece: Shape = local_shape(meta.shape, stored, sizes)
    wide = meta.dtype if meta.itemsize >= 4 else torch.float32
    axes = tuple(a for a, p in enumerate(left) if p.kind == "P" and sizes[a] > 1)
    return Work(piece[0], math.prod(piece[1:]), compression.rank_of(piece), wide, axes)


def works(items: Items, plan: Plan, specs: Specs) -> list[Work]:
    """PowerSGD of every gradient that a plan compresses, in order."""
    compression = Compression.parse(plan.compression)
    out = []
    for item in items.items:
        if compression is not None and item.kind == "grad":
            home = specs.outs[item.ins[0].item][item.ins[0].index]
            stored = specs.outs[items.param[item.name]][0]
            found = work_of(compression, items.meta(item.ins[0]), home, stored, plan.mesh.sizes)
            out += [found] if found is not None else []
    return out


def tail_bytes(found: Sequence[Work]) -> float:
    """Bytes that come and go behind the backward: all P and Q, and as many packed."""
    return 2.0 * sum(w.p_bytes + w.q_bytes for w in found)


def compressed_note(items: Items, plan: Plan) -> tuple[str, ...]:
    """What compression does to the gradients of a plan, in words; nothing where that is what was asked for."""
    compression = Compression.parse(plan.compression)
    if compression is None or not items.program.training:
        return ()
    specs = plan_specs(items, plan)
    grads = [(items.meta(i.ins[0]), specs, i) for i in items.items if i.kind == "grad"]
    if compression.kind == BF16:
        narrow = [m for m, _, _ in grads if m.itemsize <= HALF.itemsize]
        return (f"compression bf16: {len(narrow)} of {len(grads)} gradients are no wider anyway",) if narrow else ()
    found = works(items, plan, specs)
    if len(found) == len(grads):
        return ()
    return (
        f"compression {compression}: {len(found)} of {len(grads)} gradients are compressed; others are vectors, too "
        "small for it to pay, scattered over the axis (ZeRO), or not reduced, and travel as they are",
    )


# ---- one gradient at a time ----------------------------------------------------------------------------------------


def gradient_seconds(comm: Comm, meta: Meta, src: Spec, dst: Spec, reduce: str) -> float:
    """Seconds to bring a gradient from where it is made to where it is stored, compressed as `comm` says."""
    work = work_of(comm.compression, meta, src, dst, comm.machine.mesh.sizes)
    half, legs = _half(comm, meta), _legs(comm, meta, src, dst, reduce)
    total = sum(comm.seconds(meta.shape, meta.itemsize, a, b, half) for a, b in legs)
    return total + (sum(work.compute(comm.machine)) + work.sent(comm.machine) if work else 0.0)


def gradient_links(comm: Comm, meta: Meta, src: Spec, dst: Spec, reduce: str) -> tuple[float, ...]:
    """Of `gradient_seconds`, those that the links of every tier are busy beside the backward."""
    found = [0.0] * comm.tiers
    for a, b in _legs(comm, meta, src, dst, reduce):
        for tier, busy in enumerate(comm.links(meta.shape, meta.itemsize, a, b, _half(comm, meta))):
            found[tier] += busy
    return tuple(found)


def _half(comm: Comm, meta: Meta) -> bool:
    kind = comm.compression.kind if comm.compression is not None else ""
    return kind == BF16 and meta.dtype.is_floating_point and meta.itemsize > HALF.itemsize


def _legs(comm: Comm, meta: Meta, src: Spec, dst: Spec, reduce: str) -> list[tuple[Spec, Spec]]:
    """What the graph does: to where the rest is left to PowerSGD, or to where the gradient is stored."""
    if comm.compression is not None and meta.dtype.is_floating_point:
        left = comm.compression.left(meta.shape, src, dst, comm.machine.mesh.sizes)
        if left != dst:
            return [(src, left)]
    if reduce == "all_reduce" and not any(p.kind == "P" for p in dst):
        mid = tuple(R if p.kind == "P" else p for p in src)
        return [(src, mid), (mid, dst)]
    return [(src, dst)]


# ---- the whole step ------------------------------------------------------------------------------------------------


def narrow(tasks: Tasks) -> None:
    """Sums of gradients as `passes/compress.py` sends them: at two bytes an element, cast before and behind."""
    leaving(tasks)
    for task in tasks.all:
        if task.into is not None or task.phase != BACKWARD or not task.leaves or task.kind not in _SUMS:
            continue
        _, axis, reduce, dtype, *_ = task.key
        if reduce != "sum" or not dtype.is_floating_point or dtype.itemsize <= HALF.itemsize:
            continue
        part = HALF.itemsize / dtype.itemsize
        task.pack += copy_seconds(task.before * (1 + part) / 2, tasks.where)
        task.unpack += copy_seconds(task.after * (1 + part) / 2, tasks.where)
        task.before, task.after = task.before * part, task.after * part
        task.seconds = collective_seconds(task.kind, axis, task.before, task.after, tasks.where)


_SUMS = ("all_reduce", "reduce_scatter")
#: Of what runs behind the backward.
_BEHIND = "behind"


def append_powersgd(tasks: Tasks) -> None:
    """What runs behind the backward, for all gradients that the plan compresses."""
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[Work]] = {}
    for work in works(tasks.items, tasks.plan, tasks.specs):
        groups.setdefault((work.axes, work.dtype), []).append(work)
    srcs = list(tasks.ends)
    for (axes, _), found in groups.items():
        seconds = [sum(column) for column in zip(*(w.compute(tasks.where) for w in found))]
        sums = (float(sum(w.p_bytes for w in found)), float(sum(w.q_bytes for w in found)), 0.0)
        for what, spent, size in zip(("P of PowerSGD", "Q of PowerSGD", "products of PowerSGD"), seconds, sums):
            copies = 2 * copy_seconds(size, tasks.where) if size else 0.0
            srcs = [_added(tasks, Task(what, _BEHIND, spent + copies, -1, False, srcs))]
            for axis in axes if size else ():
                sent = collective_seconds("all_reduce", axis, size, size, tasks.where)
                key = ("all_reduce", axis, "sum")
                name, tier = f"all_reduce {what}", tasks.tier[axis]
                srcs = [_added(tasks, Task(name, _BEHIND, sent, tier, False, srcs, "all_reduce", key, size, size))]


def _added(tasks: Tasks, task: Task) -> Task:
    tasks.all.append(task)
    return task


__all__ = [
    "Work", "append_powersgd", "compressed_note", "gradient_links", "gradient_seconds", "narrow", "tail_bytes",
    "work_of", "works",
]  # fmt: skip
