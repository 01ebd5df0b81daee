"""Train a character GPT under 1F1B and under PACI, and compare the loss by updates and by time.

    python examples/paci.py                          4 stages, windows of 4 and 8 micro-batches, 2 seeds
    python examples/paci.py --stages 8 --windows 8
    python examples/paci.py --quick                  one seed, one window, few updates

Both see the same batches in the same order, with the same initial values, optimizer (Muon for the matrices, AdamW for
the rest; or AdamW for all) and schedule of learning rates. What 1F1B finds does not depend on how many micro-batches it
has, but the time that it takes does. Two clocks are printed: that of this machine, whose cores may be fewer than the
stages, and that of stages with a device each, in units of an update of a full pipeline: 1F1B with m micro-batches takes
(m + N - 1) / m, PACI takes 1. Under PACI as many updates are made as 1F1B needs time for its own, with the m that is
best for it.

The text is the source of Python's standard library, a byte a token: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

import autopar

LAYERS, WIDTH, HEADS, SEQ, VOCAB = 8, 64, 4, 64, 128
ROWS = 32  # of a batch
WARM = 0.1  # part of the updates in which the learning rate rises
EVERY = 50  # updates between evaluations
ADAMW = 4e-3  # its learning rate


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4, help="pipeline stages, a process each (default 4)")
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 4], help="micro-batches of PACI's updates")
    parser.add_argument("--updates", type=int, default=400, help="of 1F1B (default 400)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--weights", default="predicted", help='as of autopar.compile; "current": as published')
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="of the blocks' matrices (muon)")
    parser.add_argument("--lr", type=float, help="of the blocks' matrices (0.02), or, with AdamW, of all (0.004)")
    parser.add_argument("--flush-lr", type=float, help="that of 1f1b, if it is to be another one")
    parser.add_argument("--plot", type=Path, default=Path("paci.svg"), help="where to draw the losses (paci.svg)")
    parser.add_argument("--quick", action="store_true", help="one seed, one window, 60 updates")
    args = parser.parse_args()
    if args.lr is None:
        args.lr = 0.02 if args.optimizer == "muon" else ADAMW
    if args.quick:
        args.seeds, args.windows, args.updates = args.seeds[:1], args.windows[:1], 60
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.stages)]
        raise SystemExit(subprocess.call([*command, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"}))
    dist.init_process_group("gloo")
    console = Console(quiet=dist.get_rank() != 0, width=None if sys.stdout.isatty() else 110)
    curves = []
    for seed in args.seeds:
        flush = train(args, "1f1b", max(args.windows), seed, args.updates, console)
        curves.append(flush)
        for window in args.windows:
            budget = args.updates * units("1f1b", args.stages, ROWS)
            curves.append(train(args, "paci", window, seed, int(budget), console))
    console.print(table(curves, args.stages))
    if dist.get_rank() == 0:
        args.plot.write_text(svg(curves), encoding="utf-8")
    console.print(f"losses over time are drawn in {args.plot}")
    dist.barrier()
    dist.destroy_process_group()


# ---- model and data --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward, both behind a norm."""

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


class Gpt(nn.Module):
    """A GPT over bytes below 128; `forward` returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.places = nn.Parameter(torch.empty(1, SEQ, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                small = name.endswith(("out.weight", "down.weight"))  # what is added to the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if small else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """ids, labels: [batch, seq] -> scalar."""
        x = self.tokens(ids) + self.places
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train with, and to evaluate with."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    whole = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
    whole = whole.clamp(max=VOCAB - 1)
    return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]


def batch_of(data: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch of random windows."""
    starts = torch.randint(0, len(data) - SEQ - 1, (ROWS,), generator=generator)
    rows = data[starts[:, None] + torch.arange(SEQ + 1)]
    return {"ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()}


def optimizers(params: Iterable[nn.Parameter], kind: str, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, head, norms and biases, as far as the rank has any."""
    every = list(params)
    matrices = [p for p in every if kind == "muon" and p.dim() == 2 and VOCAB not in p.shape]
    kept = {id(p) for p in matrices}
    rest = [p for p in every if id(p) not in kept]
    out: list[torch.optim.Optimizer] = []
    if matrices:
        out.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.1))
    if rest:
        out.append(torch.optim.AdamW(rest, lr=ADAMW if kind == "muon" else lr, betas=(0.9, 0.95), weight_decay=0.1))
    return out


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """A run: validation losses after so many updates, seconds, and time in units of a full pipeline's update."""

    name: str
    seed: int
    window: int
    updates: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)

    def add(self, update: int, loss: float, seconds: float, units: float) -> None:
        """One evaluation."""
        self.updates.append(update)
        self.losses.append(loss)
        self.seconds.append(seconds)
        self.units.append(units)


def units(schedule: str, stages: int, micro: int) -> float:
    """Time of an update, if every stage had a device, in units of one that never waits (GPipe, 2019; PACI, 2026)."""
    return 1.0 if schedule == "paci" else (micro + stages - 1) / micro


def train(args: argparse.Namespace, schedule: str, micro: int, seed: int, updates: int, console: Console) -> Curve:
    """One run on all processes."""
    data, held_out = text()
    generator, other = torch.Generator().manual_seed(1000 + seed), torch.Generator().manual_seed(7)
    judged = [batch_of(held_out, other) for _ in range(16)]
    torch.manual_seed(seed)
    asynchronous = schedule == "paci"
    extra = {"weights": args.weights} if asynchronous else {}
    lr = args.lr if asynchronous or args.flush_lr is None else args.flush_lr

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(update, updates))

    pm = autopar.compile(
        Gpt(), f"pp={args.stages}", example=judged[0], device="cpu", schedule=schedule, micro_batches=micro,
        optimizer=lambda params: optimizers(params, args.optimizer, lr), lr_scheduler=scheduler, **extra,
    )  # fmt: skip
    curve = Curve(schedule, seed, micro)
    seconds, spent = 0.0, 0.0
    began = time.perf_counter()
    for update in range(1, updates + 1):
        pm.train_step(**batch_of(data, generator))
        spent += units(schedule, args.stages, ROWS)
        if update % EVERY and update != updates:
            continue
        told = pm.drain()
        seconds += time.perf_counter() - began
        pm.eval()
        with torch.no_grad():
            loss = sum(float(pm(**batch)) for batch in judged) / len(judged)
        pm.train()
        curve.add(update, loss, seconds, spent)
        drift = "" if told is None else f", drift by stage {' '.join(f'{d:.2f}' for d in told.drift)}"
        console.print(f"seed {seed} {schedule} m={micro}: update {update}, {seconds:.0f} s, loss {loss:.4f}{drift}")
        began = time.perf_counter()
    return curve


def rate(update: int, updates: int) -> float:
    """Factor of the learning rate: it rises in a straight line, then falls along a cosine to a tenth."""
    warm = max(1, int(WARM * updates))
    if update < warm:
        return (update + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


# ---- what came of it -------------------------------------------------------------------------------------------------


def reached(curve: Curve, loss: float, clock: list[float]) -> float:
    """When a run came to a loss, between two evaluations in a straight line; infinite if never."""
    before = None
    for at, value in zip(clock, curve.losses):
        if value <= loss:
            if before is None:
                return at
            (t, v) = before
            return t + (at - t) * (v - loss) / (v - value)
        before = at, value
    return math.inf


def table(curves: list[Curve], stages: int) -> Table:
    """Final losses, and times to 1F1B's final loss."""
    out = Table(title=f"{stages} stages, {ROWS} rows a batch", title_justify="left", show_edge=False)
    for name in (
        "seed", "schedule", "m", "updates", "final loss", "s here", "units", "to 1f1b's loss: of 1f1b, same m",
        f"of 1f1b, m={ROWS}", "s here, of 1f1b",
    ):  # fmt: skip
        out.add_column(name, justify="left" if name == "schedule" else "right")
    flushes = {c.seed: c for c in curves if c.name == "1f1b"}
    for c in curves:
        flush = flushes[c.seed]
        goal, needed = flush.losses[-1], flush.updates[-1]
        cells = ["", "", ""]
        if c is not flush:
            took = reached(c, goal, c.units)
            ratios = [
                took / (needed * units("1f1b", stages, c.window)),
                took / (needed * units("1f1b", stages, ROWS)),
                reached(c, goal, c.seconds) / flush.seconds[-1],
            ]
            cells = [f"{r:.2f}" if r < math.inf else f"not reached (+{c.losses[-1] - goal:.3f})" for r in ratios]
        head = (str(c.seed), c.name, str(c.window), str(c.updates[-1]), f"{c.losses[-1]:.4f}")
        out.add_row(*head, f"{c.seconds[-1]:.0f}", f"{c.units[-1]:.0f}", *cells)
    return out


def svg(curves: list[Curve], width: int = 900, height: int = 500) -> str:
    """Validation loss over time in units, a line a run."""
    most = max(c.units[-1] for c in curves)
    low, high = (f(v for c in curves for v in c.losses) for f in (min, max))
    colours = {"1f1b": "#888888"}
    lines = []
    for number, c in enumerate(curves):
        colour = colours.get(c.name, ("#c03028", "#2860c0", "#209050", "#a060c0")[c.window % 4])
        points = " ".join(
            f"{60 + (width - 80) * u / most:.1f},{20 + (height - 60) * (high - v) / (high - low or 1):.1f}"
            for u, v in zip(c.units, c.losses)
        )
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        label = f"{c.name} m={c.window} seed {c.seed}: {c.losses[-1]:.3f}"
        lines.append(f'<text x="{width - 320}" y="{40 + 16 * number}" fill="{colour}">{label}</text>')
    axes = (
        f'<text x="60" y="{height - 10}">time, in updates of a pipeline that never waits (0 to {most:.0f})</text>'
        f'<text x="5" y="30">{high:.2f}</text><text x="5" y="{height - 40}">{low:.2f}</text>'
    )
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{axes}\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
