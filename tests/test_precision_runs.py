"""Runs in mixed precision: on processes, with scaled losses, and whole trainings."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from examples.train_llama import windows
from tests.pipeline_runs import example
from tests.test_liveness import measured
from tests.test_precision import ROUNDING, gradients, loss_of, off
from tests.trained import captured_once, full
from tests.zoo_common import llama_like

# ---- on processes --------------------------------------------------------------------------------------------------

CASES = {
    "ddp": ("dp=2", {"dp": "ddp"}, {}),
    "zero3": ("dp=2", {"dp": "zero3"}, {}),
    "zero3, added up in bf16": ("dp=2", {"dp": "zero3"}, {"reduce_dtype": "bf16"}),
    "tp": ("tp=2", {"tp": "tp"}, {}),
    "stages": ("pp=2", {}, {"micro_batches": 2, "schedule": "1f1b"}),
    "stages, added up in bf16": ("pp=2", {}, {"micro_batches": 2, "schedule": "zb-h1", "reduce_dtype": "bf16"}),
}


def _step(model: nn.Module, batch: dict[str, Any], mesh: Any, precision: str, options: dict[str, Any]) -> Any:
    pm = autopar.compile(copy.deepcopy(model), mesh, example=batch, precision=precision, device="cpu", **options)
    loss = loss_of(pm(**batch))
    loss.backward()
    return pm, float(loss), {n: full(p.grad).detach() for n, p in pm.named_parameters() if p.grad is not None}


def _sharded(name: str, precision: str) -> list[str]:
    """Every case against fp32 in one process, which one process of low precision is as near to. A line per failure."""
    with captured_once():
        return _all_cases(name, precision)


def _all_cases(name: str, precision: str) -> list[str]:
    model, batch = example(name, double=False)
    plain = copy.deepcopy(model)
    exact = loss_of(plain(**batch))
    exact.backward()
    want = gradients(plain)
    failures = []
    for case, (mesh, constraints, options) in CASES.items():
        if options.get("reduce_dtype"):
            options = {**options, "reduce_dtype": precision}
        pm, loss, got = _step(model, batch, mesh, precision, {"constraints": constraints, **options})
        assert pm.plan.precision["compute"] == precision
        if abs(loss - float(exact)) > 2 * ROUNDING[precision] * float(exact):
            failures.append(f"{case}: loss {loss}, not {float(exact)}")
        far = {n: e for n, e in off(got, {n: g for n, g in want.items() if n in got}).items()
               if e > 12 * ROUNDING[precision]}  # fmt: skip
        if far or not got:
            failures.append(f"{case}: {far}")
        if pm.scaler is not None and pm.scaler.good != 1:
            failures.append(f"{case}: {pm.scaler}")
    return failures


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("gpt2", "bf16"),
        pytest.param("gpt2", "fp16", marks=pytest.mark.slow),
        pytest.param("llama", "bf16", marks=pytest.mark.slow),
    ],
)
def test_sharded_equals_one_process(two, name, precision):
    found = two.run(_sharded, name, precision)
    assert not any(found), found


@pytest.mark.parametrize(
    ("strategy", "reduce", "most"), [("dp=ddp", "bf16", 1.05), ("tp=tp", "fp32", 1.05), ("dp=zero3", "fp32", 1.15)]
)
def test_predicted_memory_is_what_is_alive(two, strategy, reduce, most):
    """Where gradients wait for their bucket, a little more is told than they take: they are cast as late as can be."""
    model, batch = example("gpt2", double=False)
    axis, _, wish = strategy.partition("=")
    plan = autopar.plan(model, f"{axis}=2", example=batch, constraints={axis: wish}, precision="bf16",
                        reduce_dtype=reduce)  # fmt: skip
    peak = max(two.run(measured, "gpt2", plan.to_json()))
    assert 0.97 < plan.predicted["peak_bytes"] / peak < most


def _four(name: str) -> list[str]:
    model, batch = example(name, double=False)
    plain = copy.deepcopy(model)
    loss_of(plain(**batch)).backward()
    _, _, got = _step(model, batch, "dp=2,tp=2", "bf16", {"constraints": {"dp": "zero3", "tp": "tp_sp"}})
    return [f"{n}: {e}" for n, e in off(got, gradients(plain)).items() if e > 12 * ROUNDING["bf16"]]


@pytest.mark.slow
def test_zero3_with_tensor_parallel(four):
    found = four.run(_four, "llama")
    assert not any(found), found


# ---- scaled losses -------------------------------------------------------------------------------------------------


def test_without_scaling_small_gradients_are_lost():
    """So the scale does something: the gradients of a loss times 1e-6 are below fp16's smallest numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
    x = torch.randn(32, 16)
    (model(x).mean() * 1e-6).backward()
    want = gradients(model)
    for enabled in (True, False):
        pm = autopar.compile(copy.deepcopy(model), 1, example=(x,), precision="fp16", device="cpu")
        pm.scaler.enabled = enabled
        (pm(x).mean() * 1e-6).backward()
        error = off({n: full(p.grad) for n, p in pm.named_parameters()}, want)["0.weight"]
        assert error < 8 * ROUNDING["fp16"] if enabled else error > 0.1, (enabled, error)


def _overflows(mesh: str, options: dict[str, Any]) -> list[Any]:
    """A scale that only the last backwards can bear: what becomes of parameters, scale and gradients, step by step."""
    model, batch = example("llama", double=False)
    optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    pm = autopar.compile(
        model, mesh, example=batch, precision="fp16", device="cpu", optimizer=optimizer, clip=1.0, **options
    )
    pm.scaler.scale, pm.scaler.growth_interval = 2.0**40, 3
    log = []
    for _ in range(40):
        before = {n: full(p).detach().clone() for n, p in pm.named_parameters()}
        scale = pm.scaler.scale
        loss = float(pm.train_step(**batch))
        same = all(torch.equal(before[n], full(p)) for n, p in pm.named_parameters())
        log.append((scale, pm.scaler.overflowed, same, math.isfinite(loss)))
        if pm.scaler.good == 0 and not pm.scaler.overflowed:
            break
    return log


@pytest.mark.parametrize("mesh", ["dp=2", "pp=2"])
def test_an_overflow_is_skipped_everywhere_and_the_scale_recovers(two, mesh):
    options = {"micro_batches": 2, "schedule": "1f1b"} if mesh == "pp=2" else {"constraints": {"dp": "zero3"}}
    logs = two.run(_overflows, mesh, options)
    assert logs[0] == logs[1], "ranks that disagree train different models"
    log = logs[0]
    skipped = [row for row in log if row[1]]
    assert len(skipped) > 5 and len(log) == len(skipped) + 3, log
    for (scale, overflowed, same, finite), (following, *_) in pairwise(log):
        assert finite and overflowed == same, "parameters move if, and only if, nothing has overflowed"
        assert following == (scale / 2 if overflowed else scale)


def _one_rank_overflows() -> list[Any]:
    """Rank 1's piece of the batch alone is not finite; a plain loop."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    rank = torch.distributed.get_rank()
    x = torch.randn(4, 8) + rank
    pm = autopar.compile(model, "dp=2", example=(x,), batch="local", precision="fp16", device="cpu", outputs="full",
                         constraints={"dp": "zero2", "*": "replicate"})  # fmt: skip
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-2)
    pm.scaler.scale = 2.0**8
    found = []
    for bad in (False, True, False):
        before = [full(p).detach().clone() for p in pm.parameters()]
        batch = x.clone()
        if bad and rank == 1:
            batch[0, 0] = 1e30
        pm(batch).mean().backward()
        none = all(p.grad is None for p in pm.parameters())
        optimizer.step()
        optimizer.zero_grad()
        moved = any(not torch.equal(b, full(p)) for b, p in zip(before, pm.parameters()))
        found.append((pm.scaler.overflowed, none, moved, pm.scaler.scale))
    return found


def test_a_plain_loop_needs_nothing(two):
    found = two.run(_one_rank_overflows)
    assert found[0] == found[1]
    assert found[0] == [(False, False, True, 2.0**8), (True, True, False, 2.0**7), (False, False, True, 2.0**7)]


def _torchs_own() -> list[Any]:
    """`torch.amp.GradScaler` in place of ours, on gradients that are DTensors."""
    model, batch = example("mlp_dropout", double=False)
    pm = autopar.compile(model, "dp=2", example=batch, precision="fp16", device="cpu", constraints={"dp": "zero3"})
    pm.scaler.enabled = False
    optimizer = torch.optim.AdamW(pm.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    scales = []
    for _ in range(40):
        before = [full(p).detach().clone() for p in pm.parameters()]
        scaler.scale(loss_of(pm(**batch))).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append((scaler.get_scale(), any(not torch.equal(b, full(p)) for b, p in zip(before, pm.parameters()))))
        if scales[-1][1]:
            break
    return scales


def test_torchs_own_scaler_works_in_its_place(two):
    found = two.run(_torchs_own)
    assert found[0] == found[1] and found[0][-1][1] and not any(moved for _, moved in found[0][:-1])
    assert 1 < found[0][-1][0] < 2.0**40


def test_the_scaler_grows_and_is_kept():
    model, batch = example("mlp_dropout", double=False)
    pm = autopar.compile(model, 1, example=batch, precision="fp16", device="cpu")
    pm.scaler.growth_interval = 2
    for _ in range(2):
        loss_of(pm(**batch)).backward()
    assert pm.scaler.scale == 2.0**17 and pm.scaler.good == 0
    twin = copy.deepcopy(pm)
    loss_of(pm(**batch)).backward()
    assert twin.scaler.good == 0 and pm.scaler.good == 1
    twin.scaler.load_state_dict(pm.scaler.state_dict())
    assert twin.scaler == pm.scaler
    with pytest.raises(autopar.RuntimeUseError, match="no state of a LossScaler"):
        twin.scaler.load_state_dict({"scale": 1.0})
    assert autopar.compile(model, 1, example=batch, device="cpu").scaler is None


# ---- training ------------------------------------------------------------------------------------------------------


def losses(precision: str, seed: int, steps: int = 60) -> list[float]:
    """A small Llama on text, by a seed of its weights; the text is the same."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**llama_like(vocab_size=256)))
    batches = [b for _, b in zip(range(steps), windows(8, 32))]
    pm = autopar.compile(model, 1, example=batches[0], precision=precision, device="cpu",
                         optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3))  # fmt: skip
    return [float(pm.train_step(**batch)) for batch in batches]


def test_training_follows_fp32():
    """The end of training is as near to fp32's as two seeds of fp32 are to each other, and nearer to its own seed."""
    ends = {seed: sum(losses("fp32", seed)[-10:]) / 10 for seed in range(3)}
    noise = max(ends.values()) - min(ends.values())
    begin = losses("fp32", 0, 1)[0]
    assert begin - ends[0] > 1, "it learns nothing"
    for precision in ("bf16", "fp16"):
        end = sum(losses(precision, 0)[-10:]) / 10
        assert abs(end - ends[0]) < max(noise, 0.02), (precision, end, ends)
