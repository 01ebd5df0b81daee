"""Every model of the zoo under classic strategies and the planner's own plan, on 4 gloo processes, in float64.

Loss, every gradient, buffers, and the parameters after 3 AdamW steps against the plain module on one process, at rtol
1e-9 with float32 casts inside the models widened to float64, and at 1e-5 as the models are.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch

import autopar
from tests import zoo
from tests.pipeline_runs import example
from tests.trained import captured_once, train, worst
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
#: What every model is run under in the suite; of the others one, by turns. All of them are the slow sweep.
ALWAYS = ("planner", "zero3 x tp_sp")


def some(name: str) -> list[str]:
    """The strategies of a model in the suite."""
    others = [s for s in STRATEGIES if s not in ALWAYS]
    return [*ALWAYS, others[list(zoo.ZOO).index(name) % len(others)]]


#: A model with its strategies: some in the suite, all in the slow sweep.
BOTH = pytest.mark.parametrize("of", [some, pytest.param(lambda name: list(STRATEGIES), marks=pytest.mark.slow)],
                               ids=["some", "all"])  # fmt: skip


def _case(name: str, strategies: list[str], widen: bool, options: dict[str, Any], want: Any = None) -> list[str]:
    """Runs on every rank: one model under some strategies. Returns a line per failure.

    `want` is what one process gives, by `train`; None: the plain module, trained here.
    """
    model, batch = example(name, widen or "experts" not in options, **options)
    mode = widen_to_float64 if widen else contextlib.nullcontext
    rtol = 1e-9 if widen else 1e-5
    failures = []
    with mode(), captured_once():
        want = want or train(copy.deepcopy(model), batch)
        for strategy in strategies:
            mesh, constraints = STRATEGIES[strategy]
            try:
                pm = autopar.compile(model, mesh, example=batch, constraints=constraints, outputs="full", device="cpu")
                torch.manual_seed(7)
                got = train(pm, batch)
                assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
                error, where = worst(got, want, rtol)
            except Exception as problem:
                failures.append(f"{name} under {strategy}: {type(problem).__name__}: {problem}"[:1000])
                continue
            if not error < rtol:
                failures.append(f"{name} under {strategy}: {where} is off by {error:.1e}")
    return failures


@BOTH
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "mixtral" else n for n in zoo.ZOO])
def test_strategies_equal_one_process(four, name, of):
    found = four.run(_case, name, of(name), True, {})
    assert not any(found), found


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_casts_to_float32_as_they_are(four, name):
    found = four.run(_case, name, ["ddp", "zero3 x tp_sp"], False, {})
    assert not any(found), found


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_grouped_matmul_of_experts_in_float32(four, name):
    """The grouped kernel has no float64."""
    found = four.run(_case, name, ["ddp", "tp"], False, {"experts": "grouped_mm"})
    assert not any(found), found


@BOTH
@pytest.mark.parametrize("name", ["mlp_dropout", "encoder", "gpt2"])
def test_with_dropout_strategies_equal_our_mesh_of_one(four, name, of):
    """And the mesh of one, with dropout off, equals the plain module."""
    model, batch = example(name)
    random, _ = example(name, dropout=0.3)
    with widen_to_float64():
        alone = train(autopar.compile(model, 1, example=batch, outputs="full", device="cpu"), batch)
        plain = train(copy.deepcopy(model), batch)
        error, where = worst(alone, plain, 1e-9)
        assert error < 1e-9 and alone.keys() == plain.keys(), where
        pm = autopar.compile(random, 1, example=batch, outputs="full", device="cpu")
        torch.manual_seed(7)
        want = train(pm, batch)
    assert any(not torch.equal(want[k], alone[k]) for k in want), "dropout did nothing"
    found = four.run(_case, name, of(name), True, {"dropout": 0.3}, want)
    assert not any(found), found
