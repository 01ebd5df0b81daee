"""What the pipeline tests run on every rank: a model under some schedules, compared with the plain one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import autopar
from autopar import programs
from tests import zoo
from tests.widen import widen_to_float64

STEPS = 3
Found = dict[str, torch.Tensor]


def example(name: str, double: bool = True, **options: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of the zoo in training mode, and a batch."""
    torch.manual_seed(0)
    model, batch = unet() if name == "unet" else zoo.ZOO[name](0, **options)
    if double:
        model = model.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return model.train(), batch


class UNet(nn.Module):
    """Two levels down, two up, with what was computed on the way down joined to what comes up: skips cross stages."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up2 = nn.Conv2d(4 * width, width, 3, padding=1)
        self.up1 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits; x [batch, 3, h, w], y [batch, h, w]."""
        grow = nn.functional.interpolate
        one = torch.tanh(self.down1(x))
        two = torch.tanh(self.down2(nn.functional.avg_pool2d(one, 2)))
        low = torch.tanh(self.middle(nn.functional.avg_pool2d(two, 2)))
        up = torch.tanh(self.up2(torch.cat([grow(low, scale_factor=2), two], 1)))
        up = torch.tanh(self.up1(torch.cat([grow(up, scale_factor=2), one], 1)))
        logits = self.head(up)
        return nn.functional.cross_entropy(logits, y), logits


def unet() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The U-Net and a batch of 8, some pixels without a label."""
    torch.manual_seed(0)
    y = torch.randint(0, 4, (8, 8, 8))
    y[torch.rand(y.shape) < 0.3] = -100
    return UNet(), {"x": torch.randn(8, 3, 8, 8), "y": y}


def train(model: torch.nn.Module, batch: dict[str, torch.Tensor], micro: int = 1) -> Found:
    """Loss of every step, gradients of the first, parameters and buffers after the last.

    micro: the plain model accumulates over so many micro-batches, which is another model where statistics of the batch
    matter (BatchNorm).
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found: Found = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in zip(*(t.chunk(micro) for t in batch.values())):
            out = model(**dict(zip(batch, part)))
            loss = (out if isinstance(out, torch.Tensor) else out[0]) / micro
            loss.backward()
            total = total + loss.detach()
        found[f"loss {step}"] = total
        if step == 0:
            for name, p in model.named_parameters(remove_duplicate=False):
                if p.grad is not None:
                    found[f"gradient of {name}"] = full(p.grad).detach().clone()
        optimizer.step()
    for name, p in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = full(p).detach().clone()
    for name, b in model.named_buffers():
        found[f"buffer {name}"] = full(b).detach().clone()
    return found


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def worst(got: Found, want: Found, rtol: float) -> tuple[float, str]:
    """The largest relative error of what this rank has, and where."""
    floor = 1e-6 * max(float(v.abs().max()) for k, v in want.items() if k.startswith("gradient"))
    most, where = 0.0, ""
    for name, a in got.items():
        b = want[name]
        if not b.is_floating_point():
            assert torch.equal(a, b), name
            continue
        if b.numel() == 0:
            continue
        # Elements whose gradient is zero up to rounding are judged by it alone: AdamW divides noise by itself.
        twin = want.get(name.replace("parameter", "gradient of"))
        if name.startswith("parameter") and twin is not None:
            keep = twin.abs() > 10 * rtol * floor / 1e-6
            a, b = a[keep], b[keep]
            if b.numel() == 0:
                continue
        error = float((a.double() - b.double()).abs().max()) / max(float(b.abs().max()), floor)
        if not error <= most:
            most, where = error, name
    return most, where


#: A mesh, and further options of autopar.compile.
Case = tuple[str, dict[str, Any]]


@contextlib.contextmanager
def captured_once() -> Iterator[None]:
    """Programs do not depend on mesh and schedule: each form of call is traced once for all cases."""
    real, known = programs.capture, {}

    def once(model: Any, *args: Any, **kwargs: Any) -> Any:
        shapes = [tuple(t.shape) for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        key = (str(shapes), kwargs.get("training"), tuple(m.training for m in model.modules()))
        if key not in known:
            known[key] = real(model, *args, **kwargs)
        return known[key]

    programs.capture = once  # type: ignore[assignment]
    try:
        yield
    finally:
        programs.capture = real  # type: ignore[assignment]


def compare(
    name: str, cases: list[Case], micro: int, options: dict[str, Any] | None = None, want: Found | None = None
) -> tuple[list[str], set[str]]:
    """Runs on every rank: failures, and the names that this rank has compared.

    want: what one process finds; None: the plain module, trained here, accumulating where that makes a difference.
    """
    model, batch = example(name, **(options or {}))
    failures: list[str] = []
    seen: set[str] = set()
    with widen_to_float64(), captured_once():
        plain: dict[int, Found] = {}
        for mesh, asked in cases:
            label = f"{name} on {mesh} {asked}"
            asked = {"micro_batches": micro, **asked}
            parts = asked["micro_batches"] if name == "resnet" else 1
            if want is None and parts not in plain:
                plain[parts] = train(copy.deepcopy(model), batch, parts)
            try:
                pm = autopar.compile(model, mesh, example=batch, device="cpu", timeout=60, **asked)
                torch.manual_seed(7)
                got = train(pm, batch)
                seen |= got.keys()
                error, where = worst(got, plain[parts] if want is None else want, 1e-9)
            except Exception as problem:
                failures.append(f"{label}: {type(problem).__name__}: {problem}"[:3000])
                break  # the ranks may be out of step
            if not error < 1e-9:
                failures.append(f"{label}: {where} is off by {error:.1e}")
    return failures, seen
