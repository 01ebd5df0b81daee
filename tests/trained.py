"""Training runs that are compared: what some steps find, and how far two of them are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from autopar import programs
from autopar.call import input_key

STEPS = 3
Found = dict[str, torch.Tensor]


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
    """The largest relative error of what `got` has, which may be a part of `want`, and where."""
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


@contextlib.contextmanager
def captured_once() -> Iterator[None]:
    """Programs do not depend on mesh, plan and schedule: each form of call of a model is traced once for all cases."""
    real, known = programs.capture, {}

    def once(model: Any, *args: Any, **kwargs: Any) -> Any:
        call = input_key(model, *args, loss=kwargs.get("loss"))
        key = (call, kwargs.get("training"), kwargs.get("precision"), tuple(m.training for m in model.modules()))
        if key not in known:
            known[key] = real(model, *args, **kwargs)
        return known[key]

    programs.capture = once  # type: ignore[assignment]
    try:
        yield
    finally:
        programs.capture = real  # type: ignore[assignment]
