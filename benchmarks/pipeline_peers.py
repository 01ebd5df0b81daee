"""A GPT in pipeline stages beside `torch.distributed.pipelining`: the part `gpt` of `pipeline.py`.

Both sides have the same model, batch, number of micro-batches, schedule and optimizer, and run in the same processes,
by turns; what counts is the median over the turns of (seconds here / seconds of the peer in the same turn). The peer's
stages are cut by hand, as many blocks in each; ours at the same places ("same cut"), and where the planner wants them
for this schedule ("own cut"). What is free, schedule too, stands beside the peer's quickest and takes no part in the
verdict, nor do times of PACI, which is another algorithm. Losses must be equal up to rounding.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.table import Table
from torch import nn
from torch.distributed import pipelining

import autopar
from autopar.capture import capture
from autopar.costmodel.devices import Device

BAR = 1.0
LAYERS, WIDTH, HEADS, SEQ, VOCAB = 8, 128, 4, 64, 256
MICRO, ROWS = 8, 32  # micro-batches and rows of a batch
#: Losses after the same steps may differ by rounding only (float32, sums in another order).
LOSS_RTOL = 1e-4
StepFn = Callable[[], float | None]


class Block(nn.Module):
    """Attention and a feed-forward, both before a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, width], as is the result."""
        batch, seq, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, seq, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).reshape(batch, seq, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Embedding(nn.Module):
    """Tokens and places."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Parameter(0.02 * torch.randn(SEQ, WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, seq] -> [batch, seq, width]."""
        return self.tokens(ids) + self.places


class Gpt(nn.Module):
    """`forward` returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """ids, labels: [batch, seq] -> scalar."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return mean_loss(self.head(self.norm(x)), labels)

    def stages(self, count: int) -> list[nn.Module]:
        """The model but for the loss, by hand in so many stages of equally many blocks."""
        each = LAYERS // count
        parts: list[list[nn.Module]] = [list(self.blocks[i * each : (i + 1) * each]) for i in range(count)]
        parts[0].insert(0, self.embedding)
        parts[-1] += [self.norm, self.head]
        return [nn.Sequential(*part) for part in parts]


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy over all tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Peer:
    """A schedule of torch. `chunks`: stages of a rank; `v`: whether the second ones lie in reverse."""

    kind: str
    chunks: int = 1
    v: bool = False

    def homes(self, ranks: int) -> list[int]:
        """Ranks of the stages, in order."""
        once = list(range(ranks))
        return once * self.chunks if not self.v else once + once[::-1]


#: Schedule here -> the peer's.
PEERS = {
    "gpipe": Peer("ScheduleGPipe"),
    "1f1b": Peer("Schedule1F1B"),
    "interleaved": Peer("ScheduleInterleaved1F1B", 2),
    "zb-v": Peer("ScheduleZBVZeroBubble", 2, v=True),
}


def batch_of() -> dict[str, torch.Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=generator)
    return {"ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def adam(params: Any) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


# ---- the two sides ---------------------------------------------------------------------------------------------------


def theirs(model: Gpt, batch: dict[str, torch.Tensor], peer: Peer) -> StepFn:
    """A step of torch.distributed.pipelining; the loss where the last stage is."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    homes = peer.homes(ranks)
    parts = copy.deepcopy(model).stages(len(homes))
    mine = [i for i, home in enumerate(homes) if home == rank]
    device = torch.device("cpu")
    stages = [pipelining.PipelineStage(parts[i], i, len(homes), device) for i in mine]
    kind = getattr(pipelining, peer.kind)
    schedule = kind(stages[0] if peer.chunks == 1 else stages, MICRO, loss_fn=mean_loss)
    optimizer = adam([p for i in mine for p in parts[i].parameters()])
    first, last = 0 in mine, len(homes) - 1 in mine

    def step() -> float | None:
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        given = (batch["ids"],) if first else ()
        schedule.step(*given, **({"target": batch["labels"], "losses": losses} if last else {}))
        optimizer.step()
        return float(torch.stack(losses).mean()) if last else None

    return step


def ours(
    model: Gpt, batch: dict[str, torch.Tensor], device: Device, schedule: str | None, cut: bool
) -> tuple[StepFn, str]:
    """A step of autopar, and its schedule. `cut`: at the peer's places, else the planner's own."""
    ranks = dist.get_world_size()
    asked: dict[str, Any] = {"example": batch, "micro_batches": MICRO, "schedule": schedule, "timeout": 120.0}
    mesh = f"pp={ranks}"
    pm = autopar.compile(model, mesh, device=device, **asked)
    if cut:
        assert schedule is not None and pm.plan.pipeline is not None
        each = LAYERS // len(PEERS[schedule].homes(ranks))
        nodes = capture(model, (), {k: v[: ROWS // MICRO] for k, v in batch.items()}).gm.graph.nodes
        addresses = [n.meta["address"] for n in nodes if "address" in n.meta]
        starts = tuple(_first(addresses, f"blocks.{i}") for i in range(each, LAYERS, each))
        plan = replace(pm.plan, pipeline=replace(pm.plan.pipeline, starts=starts))
        pm = autopar.compile(model, mesh, device=device, plan=plan, **asked)
    optimizer = adam(pm.parameters())
    made = pm.plan.pipeline
    assert made is not None

    def step() -> float | None:
        optimizer.zero_grad()
        loss = pm(**batch)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step, made.schedule


def asynchronous(model: Gpt, batch: dict[str, torch.Tensor], device: Device) -> StepFn:
    """A step of PACI, which never empties the pipeline."""
    pm = autopar.compile(
        model, f"pp={dist.get_world_size()}", device=device, example=batch, micro_batches=MICRO, schedule="paci",
        optimizer=adam, timeout=120.0,
    )  # fmt: skip

    def step() -> float | None:
        loss = pm.train_step(**batch)
        return None if loss is None else float(loss)

    return step


def _first(addresses: Sequence[str], module: str) -> str:
    """The first op of a module's forward."""
    return next(a for a in addresses if a.startswith((f"fwd:{module}/", f"fwd:{module}.")))


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """One comparison. Times are seconds a step; losses differ relatively by `loss_error`."""

    ranks: int
    ours: str
    cut: str
    peer: str
    ours_s: float
    peer_s: float
    ratio: float
    loss_error: float
    counts: bool  # for the verdict

    @property
    def good(self) -> bool:
        return self.loss_error <= LOSS_RTOL and (not self.counts or self.ratio <= BAR)


def measured(sides: dict[str, StepFn], turns: int, steps: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a step of every side in every turn, and the losses of the first steps; the same on every rank."""
    losses = {name: [_told(step()) for _ in range(3)] for name, step in sides.items()}
    times = {name: [0.0] * turns for name in sides}
    gc.collect()
    gc.disable()
    for turn in range(turns):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                sides[name]()
            dist.barrier()
            times[name][turn] = (time.perf_counter() - began) / steps
    gc.enable()
    box = torch.tensor([times[name] for name in sides], dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return dict(zip(sides, box.tolist())), losses


def _told(loss: float | None) -> float:
    """What some ranks know, on all."""
    box = torch.tensor(float("-inf") if loss is None else loss, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return float(box)


def compare(turns: int, steps: int, device: Device, say: Callable[[str], object]) -> list[Beside]:
    """All comparisons on the ranks there are; a collective call. `device`: this machine, calibrated."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    model, batch = Gpt(), batch_of()
    rows: list[Beside] = []
    quickest: tuple[float, str, StepFn] | None = None
    for schedule, peer in PEERS.items():
        sides = {peer.kind: theirs(model, batch, peer)}
        sides["same"], _ = ours(model, batch, device, schedule, cut=True)
        sides["own"], _ = ours(model, batch, device, schedule, cut=False)
        times, losses = measured(sides, turns, steps)
        for cut in ("same", "own"):
            rows.append(_row(ranks, schedule, cut, peer.kind, cut, times, losses, True))
        say(f"  {schedule}: {rows[-2].ratio:.3f} of {peer.kind}, own cut {rows[-1].ratio:.3f}")
        took = statistics.median(times[peer.kind])
        if quickest is None or took < quickest[0]:
            quickest = took, peer.kind, sides[peer.kind]
        gc.collect()
    assert quickest is not None
    free, chosen = ours(model, batch, device, None, cut=False)
    sides = {quickest[1]: quickest[2], "free": free, "paci": asynchronous(model, batch, device)}
    times, losses = measured(sides, turns, steps)
    losses["paci"] = losses["free"] = losses[quickest[1]] = [1.0]  # other steps have been made
    rows.append(_row(ranks, f"free ({chosen})", "own", quickest[1], "free", times, losses, False))
    rows.append(_row(ranks, "paci", "own", quickest[1], "paci", times, losses, False))
    return rows


def _row(
    ranks: int, name: str, cut: str, peer: str, side: str, times: dict[str, list[float]],
    losses: dict[str, list[float]], counts: bool,
) -> Beside:  # fmt: skip
    ratio = statistics.median(a / b for a, b in zip(times[side], times[peer]))
    error = max(abs(a - b) / abs(b) for a, b in zip(losses[side], losses[peer]))
    mine, other = statistics.median(times[side]), statistics.median(times[peer])
    return Beside(ranks, name, cut, peer, mine, other, ratio, error, counts)


def table(peers: list[Beside]) -> Table:
    """One line for every comparison with torch.distributed.pipelining."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("N", "autopar", "cut", "peer", "autopar ms", "peer ms", "ratio", "loss differs by", ""):
        out.add_column(name, justify="left" if name in ("autopar", "cut", "peer", "") else "right")
    for r in peers:
        numbers = (f"{1e3 * r.ours_s:.1f}", f"{1e3 * r.peer_s:.1f}", f"{r.ratio:.3f}", f"{r.loss_error:.0e}")
        verdict = ("good" if r.good else "BAD") if r.counts else ""
        out.add_row(str(r.ranks), r.ours, r.cut, r.peer, *numbers, verdict)
    return out
