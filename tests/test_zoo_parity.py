"""Every model of the zoo under every classic strategy and the planner's own plan, on 4 gloo processes, in float64.

Loss, every gradient, buffers, and the parameters after 3 AdamW steps against the plain module on one process, at rtol
1e-9 with float32 casts inside the models widened to float64, and at 1e-5 as the models are.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import autopar
from autopar import programs
from tests import zoo
from tests.harness import Ranks
from tests.widen import widen_to_float64

STRATEGIES: dict[str, tuple[str, dict[str, str]]] = {
    "ddp": ("dp=4", {"dp": "ddp"}),
    "zero1": ("dp=4", {"dp": "zero1"}),
    "zero2": ("dp=4", {"dp": "zero2"}),
    "zero3": ("dp=4", {"dp": "zero3"}),
    "tp": ("tp=4", {"tp": "tp"}),
    "tp_sp": ("tp=4", {"tp": "tp_sp"}),
    "dp x tp": ("dp=2,tp=2", {"dp": "ddp", "tp": "tp"}),
    "zero3 x tp_sp": ("dp=2,tp=2", {"dp": "zero3", "tp": "tp_sp"}),
    "planner": ("dp=2,tp=2", {}),
    "planner, 3 axes": ("a=2,b=1,c=2", {}),
}
STEPS = 3
_programs: dict[Any, Any] = {}


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _train(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss of every step, gradients of the first, parameters and buffers after the last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        out = model(**batch)
        loss = out if isinstance(out, torch.Tensor) else out[0]
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        if step == 0:
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found[f"gradient of {name}"] = _full(p.grad).detach().clone()
        optimizer.step()
    for name, p in model.named_parameters():
        found[f"parameter {name}"] = _full(p).detach().clone()
    for name, b in model.named_buffers():
        found[f"buffer {name}"] = _full(b).detach().clone()
    return found


def _worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rtol: float) -> tuple[float, str]:
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    floor = 1e-6 * max(float(v.abs().max()) for k, v in want.items() if k.startswith("gradient"))
    worst, where = 0.0, ""
    for name, b in want.items():
        a = got[name]
        if not b.is_floating_point():
            assert torch.equal(a, b), name
            continue
        if b.numel() == 0:
            continue
        # AdamW's first steps divide a gradient by itself: where a gradient is zero up to rounding its sign is noise,
        # and so is the step. Such elements (a key bias: softmax does not see it) are judged by their gradient alone.
        twin = want.get(name.replace("parameter", "gradient of"))
        if name.startswith("parameter") and twin is not None:
            keep = twin.abs() > 10 * rtol * floor / 1e-6
            a, b = a[keep], b[keep]
            if b.numel() == 0:
                continue
        error = float((a.double() - b.double()).abs().max()) / max(float(b.abs().max()), floor)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def _example(name: str, double: bool, options: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model, batch = zoo.ZOO[name](0, **options)
    if double:
        model = model.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    return model.train(), batch


def _case(name: str, strategies: list[str], widen: bool, options: dict[str, Any], want: Any = None) -> list[str]:
    """Runs on every rank: one model under some strategies. Returns a line per failure.

    `want` is what one process gives, by `_train`; None: the plain module, trained here.
    """
    real = programs.capture

    def once(model: Any, *args: Any, **kwargs: Any) -> Any:
        # The program does not depend on the plan: one capture serves all strategies of this model.
        key = (name, widen, tuple(options.items()), kwargs.get("training"))
        if key not in _programs:
            _programs[key] = real(model, *args, **kwargs)
        return _programs[key]

    model, batch = _example(name, widen or "experts" not in options, options)
    mode = widen_to_float64 if widen else contextlib.nullcontext
    rtol = 1e-9 if widen else 1e-5
    failures = []
    with mode():
        want = want or _train(copy.deepcopy(model), batch)
        programs.capture = once  # type: ignore[assignment]
        try:
            for strategy in strategies:
                mesh, constraints = STRATEGIES[strategy]
                try:
                    pm = autopar.compile(
                        model, mesh, example=batch, constraints=constraints, outputs="full", device="cpu"
                    )
                    torch.manual_seed(7)
                    error, where = _worst(_train(pm, batch), want, rtol)
                except Exception as problem:
                    failures.append(f"{name} under {strategy}: {type(problem).__name__}: {problem}"[:1000])
                    continue
                if not error < rtol:
                    failures.append(f"{name} under {strategy}: {where} is off by {error:.1e}")
        finally:
            programs.capture = real  # type: ignore[assignment]
    return failures


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, timeout=400) as group:
        yield group


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_strategy_equals_one_process(ranks, name):
    found = ranks.run(_case, name, list(STRATEGIES), True, {})
    assert not any(found), "\n".join(found[0])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_casts_to_float32_as_they_are(ranks, name):
    found = ranks.run(_case, name, ["ddp", "zero3 x tp_sp"], False, {})
    assert not any(found), "\n".join(found[0])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_grouped_matmul_of_experts_in_float32(ranks, name):
    """The grouped kernel has no float64."""
    found = ranks.run(_case, name, ["ddp", "tp"], False, {"experts": "grouped_mm"})
    assert not any(found), "\n".join(found[0])


@pytest.mark.parametrize("name", ["mlp_dropout", "encoder", "gpt2"])
def test_with_dropout_every_strategy_equals_our_mesh_of_one(ranks, name):
    """And the mesh of one, with dropout off, equals the plain module."""
    model, batch = _example(name, True, {})
    random, _ = _example(name, True, {"dropout": 0.3})
    with widen_to_float64():
        alone = _train(autopar.compile(model, 1, example=batch, outputs="full", device="cpu"), batch)
        error, where = _worst(alone, _train(copy.deepcopy(model), batch), 1e-9)
        assert error < 1e-9, where
        pm = autopar.compile(random, 1, example=batch, outputs="full", device="cpu")
        torch.manual_seed(7)
        want = _train(pm, batch)
    assert any(not torch.equal(want[k], alone[k]) for k in want), "dropout did nothing"
    found = ranks.run(_case, name, list(STRATEGIES), True, {"dropout": 0.3}, want)
    assert not any(found), "\n".join(found[0])
