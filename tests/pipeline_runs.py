"""What the pipeline tests run on every rank: a model under some schedules, compared with the plain one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import autopar
from tests import zoo
from tests.trained import Found, captured_once, train, worst
from tests.widen import widen_to_float64


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


#: A mesh, and further options of autopar.compile.
Case = tuple[str, dict[str, Any]]


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
        references: dict[int, Found] = {}
        for mesh, asked in cases:
            label = f"{name} on {mesh} {asked}"
            asked = {"micro_batches": micro, **asked}
            parts = asked["micro_batches"] if name == "resnet" else 1
            if parts not in references:
                references[parts] = want or train(copy.deepcopy(model), batch, parts)
            try:
                pm = autopar.compile(model, mesh, example=batch, device="cpu", timeout=60, **asked)
                torch.manual_seed(7)
                got = train(pm, batch)
                seen |= got.keys()
                error, where = worst(got, references[parts], 1e-9)
            except Exception as problem:
                failures.append(f"{label}: {type(problem).__name__}: {problem}"[:3000])
                break  # the ranks may be out of step
            if not error < 1e-9:
                failures.append(f"{label}: {where} is off by {error:.1e}")
    return failures, seen
