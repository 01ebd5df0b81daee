"""Measure this machine: kernels by class and size, the launch of one, collectives, and ranks that share the cores.

Runs on every rank of a small group of local processes (`autopar.runtime.probe`), one thread each, as compiled modules
do. Rank 0 measures kernels while the others sleep; then 1, 2, 4 ranks run a sample of them at once, which shows what
sharing the cores costs; then collectives run in groups of 2 and of all, all groups at once. Seconds are medians of
repeats.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import fx, nn

from autopar.costmodel.curve import Curve, curve
from autopar.costmodel.devices import Crowd, Device, Link, Measured
from autopar.linear import available, linear

aten = torch.ops.aten
#: Reads the time in seconds.
Clock = Callable[[], float]
Work = Callable[[], object]

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
#: Seconds of a collective, at least: what is less is noise.
SHORTEST = 1e-6
#: Bytes of the larger side of a collective.
SIZES = (1 << 8, 1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 23)
QUICK_SIZES = (1 << 10, 1 << 15, 1 << 18, 1 << 22)
#: Sides of the square products on a processor, and of those that many ranks compute at once.
SIDES, SIDE = (32, 96, 256, 384, 512), 256
COLD = 1 << 27  # bytes that an update moves, so that none of them is in a cache
MOST_UPDATED = 200  # parameters of it
#: Steps of which the median is taken: they are long, and what else the machine's memory does falls on single ones.
OFTEN = 15
#: Bytes of the collectives beside which ranks compute: about a bucket of a small model.
BESIDE = 1 << 22
CHAIN = 40  # ops in the graph that shows what one launch costs


class World(Protocol):
    """What calibration needs of the processes; see `autopar.runtime.probe.Local`."""

    rank: int
    num: int

    def barrier(self) -> None:
        """Wait, asleep, for every rank."""

    def largest(self, value: float) -> float:
        """The largest of the ranks' values."""

    def collective(self, kind: str, group: int, world: int, size: int, beside: Work | None = None) -> Work:
        """One collective of `size` bytes (larger side) in my group of `group` among the first `world` ranks.

        beside: what is done between its start and waiting for it.
        """

    def tell(self, text: str, done: float) -> None:
        """Report progress, from rank 0."""


class _Ruler:
    """Times work with a budget per measurement."""

    def __init__(self, clock: Clock, budget: float, device: torch.device) -> None:
        self.clock, self.budget, self.device = clock, budget, device

    def __call__(self, work: Work) -> float:
        """Median seconds of one call of `work`."""
        work()
        once = max(self._batch(work, 1), 1e-7)
        count = max(1, min(2000, int(self.budget / 5 / once)))
        return statistics.median(self._batch(work, count) for _ in range(5))

    def over(self, work: Work, count: int) -> float:
        """Mean seconds of one of `count` calls: long enough to see others take the core."""
        return self._batch(work, count)

    def _batch(self, work: Work, count: int) -> float:
        began = self.clock()
        for _ in range(count):
            work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (self.clock() - began) / count


def calibrate(world: World, quick: bool, device: torch.device, clock: Clock, busy: Clock) -> Device | None:
    """The Device of this machine, on rank 0; None on the others. Collective: every rank of `world` calls it.

    clock: the time. busy: the time that this thread was running, which says what a kernel costs even when others take
    the core; what they cost is in the crowds, which compare the two.
    """
    ruler = _Ruler(clock, 0.03 if quick else 0.1, device)
    kernels_ruler = _Ruler(clock if device.type == "cuda" else busy, ruler.budget, device)
    found: Device | None = None
    if world.rank == 0:
        found = _kernels(kernels_ruler, quick, world.tell)
    world.barrier()
    rounds = 3 if quick else 7
    # Sharing processor cores says nothing of GPUs.
    crowds: tuple[Crowd, ...] = ()
    if device.type != "cuda":
        own = found.measured.linear_from if found is not None and found.measured is not None else None
        product = _product(world.largest(own or 0.0))
        crowds = _beside(world, ruler, _crowds(world, ruler, kernels_ruler, rounds, product), rounds, product)
    collectives = _collectives(world, ruler, QUICK_SIZES if quick else SIZES, rounds)
    if found is None or found.measured is None:
        return None
    kernels = found.measured
    measured = replace(kernels, collectives=collectives, crowds=crowds)
    link = _link(collectives, world.num)
    return Device(
        found.name, found.flops, found.bandwidth, found.memory, link, link, max(world.num, 1), found.launch, 1.0, 1.0,
        found.slack, device.type == "cpu", measured,
    )  # fmt: skip


# ---- kernels -------------------------------------------------------------------------------------------------------


def _kernels(ruler: _Ruler, quick: bool, tell: Callable[[str, float], None]) -> Device:
    device = ruler.device
    tell("launch", 0.0)
    launch, view = _launch(ruler)
    big = device.type == "cuda"

    def net(work: Work) -> float:
        """Seconds without the launch; a tenth of it at least, for what is all launch."""
        whole = ruler(work)
        return max(whole - launch, whole / 10)

    matmul: dict[str, Curve] = {}
    linear_from: float | None = None
    weights_from: float | None = None
    dtypes = (torch.float32, torch.bfloat16) if quick else (torch.float32, torch.float64, torch.bfloat16)
    for dtype in dtypes:
        tell(f"matmul {str(dtype).removeprefix('torch.')}", 0.05)
        points = []
        for n in SIDES if not big else (128, 512, 2048, 8192):
            a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
            points.append((2.0 * n**3, 2.0 * n**3 / net(lambda a=a, b=b: a @ b)))  # type: ignore[misc]
        if dtype is torch.float32 and not big and available():
            points, linear_from, weights_from = _with_onednn(net, points)
        matmul[str(dtype).removeprefix("torch.")] = curve(points)
    tell("convolution", 0.2)
    points = []
    for channels, side in ((8, 16), (32, 16), (64, 28)):
        x = torch.ones(4, channels, side, side, device=device)
        w = torch.ones(channels, channels, 3, 3, device=device)
        flops = 2.0 * x.numel() * channels * 9
        points.append((flops, flops / net(lambda x=x, w=w: nn.functional.conv2d(x, w, padding=1))))  # type: ignore[misc]
    matmul["convolution"] = curve(points)
    tell("attention", 0.25)
    attention = curve(_attention_of_gpu(net, device) if big else _attention_of_cpu(net, device))
    memory = {}
    for at, name in enumerate(TRAFFIC):
        tell(f"memory: {name}", 0.3 + 0.03 * at)
        points = []
        for rows in (8, 128, 1024, 8192) if not big else (128, 4096, 65536, 1 << 19):
            moved, work = TRAFFIC[name](torch.ones(rows, 256, device=device))
            points.append((moved, moved / net(work)))
        memory[name] = curve(points)
    tell("memory: update", 0.55)
    updated = (8, 128, 1024, 8192) if not big else (128, 4096, 65536, 1 << 19)
    memory["update"] = _updates(ruler, updated, launch, OFTEN // 5 if quick else OFTEN)
    rates = {k: c.points[-1][1] for k, c in matmul.items() if k != "convolution"}
    memory_bytes = float(torch.cuda.get_device_properties(device).total_memory) if big else None
    nothing = Link(1e9, 1e-4)
    return Device(
        "this machine", rates, memory["elementwise"].points[-1][1], memory_bytes, nothing, nothing, launch=launch,
        slack=0.02 if big else 0.0,
        measured=Measured(matmul, attention, memory, view=view, linear_from=linear_from, weights_from=weights_from),
    )  # fmt: skip


def _with_onednn(
    net: Callable[[Work], float], blas: Sequence[tuple[float, float]]
) -> tuple[list[tuple[float, float]], float | None, float | None]:
    """(FLOPs, FLOP/s) of float32 products when oneDNN has those that it is quicker at, and FLOPs from which it is.

    First of products whose left operand lies row by row, two of the three of a layer, then of those where both lie
    column by column, the third (`passes/products.py`). The rate is that of all three.
    """
    cuts, seconds = [], [0.0] * len(SIDES)
    for turned, count in ((False, 2), (True, 1)):
        own, gains = [], []
        for side in SIDES:
            a, b = (torch.ones(side, side) for _ in range(2))
            left, right = (a.t(), b) if turned else (a, b.t())
            works: Sequence[Work] = (
                functools.partial(linear, left, right.t()),
                functools.partial(torch.mm, left, right),
            )
            turns = [[net(work) for work in works] for _ in range(5)]
            own.append(statistics.median(mine for mine, _ in turns))
            gains.append(math.log(statistics.median(other / mine for mine, other in turns)))
        # The cut with most gain above it: one size that noise has got wrong does not decide.
        cut = max(range(len(SIDES) + 1), key=lambda at: sum(gains[at:]))
        for at, (flops, rate) in enumerate(blas):
            seconds[at] += count * (flops / rate if at < cut else own[at])
        cuts.append(blas[cut][0] if cut < len(blas) else None)
    points = [(flops, 3 * flops / total) for (flops, _), total in zip(blas, seconds)]
    return points, cuts[0], cuts[1]


def _launch(ruler: _Ruler) -> tuple[float, float]:
    """Seconds of an op that does next to nothing, and of a view, in a graph module as compiled modules run them."""
    seconds = []
    for target, args in ((aten.mul.Tensor, (1.5,)), (aten.permute.default, ([1, 0],))):
        graph = fx.Graph()
        node = graph.placeholder("x")
        for _ in range(CHAIN):
            node = graph.call_function(target, (node, *args))
        graph.output((node,))
        module = fx.GraphModule({}, graph)
        x = torch.ones(4, 4, device=ruler.device)
        with torch.no_grad():
            seconds.append(ruler(lambda module=module, x=x: module(x)) / CHAIN)  # type: ignore[misc]
    return seconds[0], seconds[1]


def _attention_of_cpu(net: Callable[[Work], float], device: torch.device) -> list[tuple[float, float]]:
    """(FLOPs, FLOP/s) of causal attention, forward."""
    points = []
    for heads, seq in ((4, 16), (8, 64), (8, 256)):
        q = torch.ones(2, heads, seq, 32, device=device)
        flops = 4.0 * q.numel() * seq
        points.append((flops, flops / net(lambda q=q: _attend(q, q, q))))  # type: ignore[misc]
    return points


def _attention_of_gpu(net: Callable[[Work], float], device: torch.device) -> list[tuple[float, float]]:
    """The same in half precision, forward and backward together, whose rates differ.

    FLOPs are those of the forward, 4 of the 14 parts of both (as `costmodel.ops.global_flops` counts), and as there
    what a causal mask rules out is counted too.
    """
    points = []
    for heads, seq in ((8, 256), (16, 1024), (16, 4096), (32, 8192)):
        x = torch.ones(3, 2, heads, seq, 64, device=device, dtype=torch.bfloat16)
        qkv = [part.clone().requires_grad_() for part in x]
        flops = 4.0 * x[0].numel() * seq
        seconds = net(lambda x=x, qkv=qkv: torch.autograd.grad(_attend(*qkv), qkv, x[0]))  # type: ignore[misc]
        points.append((flops, 3.5 * flops / seconds))
    return points


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _lookup(x: torch.Tensor) -> tuple[float, Work]:
    rows = torch.arange(x.shape[0], device=x.device)
    return 2.0 * x.nbytes, lambda: nn.functional.embedding(rows, x)


def _pool(x: torch.Tensor) -> tuple[float, Work]:
    out, at = nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)
    return float(x.nbytes + out.nbytes + at.nbytes), lambda: nn.functional.max_pool2d(x, 3, 2, 1, return_indices=True)


def _updates(ruler: _Ruler, rows: Sequence[int], launch: float, often: int) -> Curve:
    """Bytes/s of a step of AdamW by bytes of one parameter: it and two moments are read and written, its gradient read.

    As `Policy.update_bytes` counts. A step comes to every parameter once, when what the last one has left of it in
    caches is long gone: so there are as many parameters as caches do not hold.
    """
    points = []
    for count in rows:
        x = torch.ones(count, 256, device=ruler.device)
        size = 7.0 * x.nbytes
        many = int(max(1, min(MOST_UPDATED, COLD // size)))
        step = _update(x, many)
        step()
        each = statistics.median(ruler.over(step, 1) for _ in range(often)) / many
        points.append((size, size / max(each - launch, each / 10)))
    return curve(points)


def _update(x: torch.Tensor, many: int) -> Work:
    weights = [nn.Parameter(x.clone()) for _ in range(many)]
    for weight in weights:
        weight.grad = x.clone()
    return torch.optim.AdamW(weights).step


#: Class of op -> (tensor [rows, 256]) -> (bytes read and written, the work).
TRAFFIC: dict[str, Callable[[torch.Tensor], tuple[float, Work]]] = {
    "elementwise": lambda x: (3.0 * x.nbytes, lambda: x * x.detach()),
    "function": lambda x: (2.0 * x.nbytes, lambda: nn.functional.silu(x)),
    "reduction": lambda x: (float(x.nbytes), lambda: x.sum(-1)),
    "norm": lambda x: (2.0 * x.nbytes, lambda: nn.functional.layer_norm(x, (x.shape[1],))),
    "softmax": lambda x: (2.0 * x.nbytes, lambda: x.log_softmax(-1)),
    "copy": lambda x: (2.0 * x.nbytes, lambda: x.view(-1, 8, 4, 64).transpose(1, 2).contiguous()),
    "lookup": _lookup,
    "pool": lambda x: _pool(x.view(-1, 4, 8, 8)),
}


# ---- ranks that share the machine ----------------------------------------------------------------------------------


def _product(least: float) -> Work:
    """A product of matrices, by the library that graphs take; least: FLOPs from which that is oneDNN, 0: never."""
    a = torch.ones(SIDE, SIDE)
    return functools.partial(linear, a, a) if 0 < least <= 2.0 * SIDE**3 else functools.partial(torch.mm, a, a)


def _crowds(world: World, ruler: _Ruler, alone: _Ruler, rounds: int, product: Work) -> tuple[Crowd, ...]:
    """A matmul, a product of large tensors, a chain of small ops, and an update, on 1, 2, 4 ... ranks at once.

    Factors are the time that passes over the time that one rank alone is busy with it, so that they also hold what
    else runs on the machine.
    """
    x = torch.ones(2048, 256)
    small = torch.ones(16)
    works: Sequence[Work] = (
        product, lambda: x * x.detach(), lambda: [small * 1.5 for _ in range(50)],
        _update(torch.ones(1024, 256), 16),
    )  # fmt: skip
    counts = [n for n in (1, 2, 4, 8) if n <= world.num]
    once = [world.largest(alone(work) if world.rank == 0 else 0.0) for work in works]
    repeats = [max(1, int(ruler.budget / max(seconds, 1e-7))) for seconds in once]
    repeats[-1] = 3  # long enough
    found: dict[int, list[list[float]]] = {n: [[] for _ in works] for n in counts}
    for _ in range(rounds):
        for count in counts:
            if world.rank == 0:
                world.tell(f"{count} ranks at once", 0.5)
            for at, work in enumerate(works):
                world.barrier()
                mine = ruler.over(work, repeats[at]) if world.rank < count else 0.0
                found[count][at].append(world.largest(mine))
    rows = []
    for count in counts:
        slower = [statistics.median(times) / one for times, one in zip(found[count], once)]
        rows.append(Crowd(count, *(max(1.0, n) for n in slower)))
    return tuple(rows)


def _beside(world: World, ruler: _Ruler, crowds: tuple[Crowd, ...], rounds: int, product: Work) -> tuple[Crowd, ...]:
    """The crowds with what computation loses when collectives run beside it.

    Seconds of both at once, beyond the longer of the two alone, by those of the shorter: products of matrices, about as
    long as the collective, between its start and its end.
    """
    found = []
    for crowd in crowds:
        lost, mine = [], world.rank < crowd.ranks

        def take(work: Work, mine: bool = mine) -> float:
            world.barrier()
            return world.largest(ruler.over(work, 4) if mine else 0.0)

        for kind in ("all_gather", "all_reduce") if crowd.ranks > 1 else ():
            plain = world.collective(kind, crowd.ranks, crowd.ranks, BESIDE) if mine else _nothing
            take(plain)  # connects
            count = max(1, round(take(plain) / max(take(product), 1e-7)))
            many = functools.partial(_times, count, product)
            both = world.collective(kind, crowd.ranks, crowd.ranks, BESIDE, many) if mine else _nothing
            times = [(take(plain), take(many), take(both)) for _ in range(rounds)]
            carried, computed, together = (statistics.median(column) for column in zip(*times))
            lost.append((together - max(carried, computed)) / max(min(carried, computed), 1e-7))
        found.append(replace(crowd, beside=min(max(statistics.mean(lost), 0.0), 1.0) if lost else 0.0))
    return tuple(found)


def _times(count: int, work: Work) -> None:
    for _ in range(count):
        work()


# ---- collectives ---------------------------------------------------------------------------------------------------


def _collectives(world: World, ruler: _Ruler, sizes: Sequence[int], rounds: int) -> dict[str, Curve]:
    """Rounds over everything, so that what else the machine does falls on all alike.

    Before every collective each rank multiplies matrices, as it would in a step, and the time of that alone is taken
    off: ranks that share cores come to a collective at different times, and wait for each other.
    """
    a = torch.ones(512, 384)
    b = torch.ones(384, 512)
    product = functools.partial(torch.mm, a, b)
    alone: dict[int, list[float]] = {}
    shapes = [(g, w) for w in (2, 4, 8) if w <= world.num for g in (2, 4, 8) if g <= w]
    every = [(kind, g, w, size) for g, w in shapes for kind in KINDS for size in sizes]
    works = [_after(product, world.collective(*one)) if world.rank < one[2] else _nothing for one in every]
    times: list[list[float]] = [[] for _ in every]
    for turn in range(rounds + 1):  # the first one only connects
        for ranks in sorted({w for _, w in shapes}):
            world.barrier()
            mine = ruler.over(product, 16) if world.rank < ranks else 0.0
            alone.setdefault(ranks, []).append(world.largest(mine))
        for at, (kind, group, ranks, size) in enumerate(every):
            if world.rank == 0:
                world.tell(f"{kind}, {ranks} ranks in groups of {group}", 0.6 + 0.4 * turn / (rounds + 1))
            world.barrier()
            mine = ruler.over(works[at], 8 if size < 1 << 18 else 2)
            if turn:
                times[at].append(world.largest(mine))
    out: dict[str, Curve] = {}
    for group, ranks in shapes:
        for kind in KINDS:
            points, least = [], float("inf")
            for at in reversed(range(len(every))):
                if every[at][:3] == (kind, group, ranks):
                    # A smaller message takes no longer than a larger one: what says so is noise.
                    seconds = statistics.median(times[at]) - statistics.median(alone[ranks])
                    least = min(least, max(seconds, SHORTEST))
                    points.append((float(every[at][3]), least))
            out[f"{kind}/{group}/{ranks}"] = curve(points, grows=True)
    return out


def _after(first: Work, then: Work) -> Work:
    def both() -> None:
        first()
        then()

    return both


def _nothing() -> None:
    return None


def _link(collectives: dict[str, Curve], num: int) -> Link:
    """Bandwidth and latency for what the curves do not have: from the all-reduce of all ranks."""
    found = collectives.get(f"all_reduce/{num}/{num}")
    if found is None:
        return Link(1e9, 1e-4)
    rounds = 2 * max(1, (num - 1).bit_length())
    small, (size, seconds) = found.points[0][1], found.points[-1]
    moved = 2 * (num - 1) / num * size
    return Link(moved / max(seconds - small, seconds / 10), small / rounds)


__all__ = ["CHAIN", "KINDS", "TRAFFIC", "World", "calibrate"]
