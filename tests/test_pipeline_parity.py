"""Pipelines on gloo processes against the plain module, in float64: loss, gradients, parameters after 3 AdamW steps.

Every synchronous schedule, models whose stages share parameters (tied embeddings) or are crossed by skips, masks and
encoder outputs, and stages of several ranks. BatchNorm sees micro-batches, so that its reference accumulates over them.
"""

from __future__ import annotations

import pytest
import torch

import autopar
from autopar.pipeline.schedules import SCHEDULES
from tests.harness import Ranks
from tests.pipeline_runs import Case, compare, example
from tests.trained import train, worst
from tests.widen import widen_to_float64

MODELS = ("gpt2", "llama", "t5", "resnet", "unet", "vit")
SYNCHRONOUS = [name for name, s in SCHEDULES.items() if not s.asynchronous]
#: Stages of two ranks: one process group more, and sums of gradients that are reduced once a step.
MIXED: list[Case] = [
    ("pp=2,dp=2", {"schedule": "1f1b", "constraints": {"dp": "ddp"}}),
    ("dp=2,pp=2", {"schedule": "interleaved", "constraints": {"dp": "zero3"}}),
    ("pp=2,tp=2", {"schedule": "zb-h1", "constraints": {"tp": "tp"}}),
    ("pp=2,dp=2", {}),
]
#: Of these the suite runs some; all of them are the slow sweep.
QUICK = {"gpt2": ["zb-v"], "llama": ["zb-h1"], "t5": ["1f1b"], "resnet": ["interleaved"], "unet": ["zb-h2"],
         "vit": ["gpipe"]}  # fmt: skip


def check(ranks: Ranks, name: str, cases: list[Case], micro: int = 4) -> None:
    found = ranks.run(compare, name, cases, micro)
    assert not any(failures for failures, _ in found), "\n".join(line for failures, _ in found for line in failures)
    model, _ = example(name)
    compared = set().union(*(seen for _, seen in found))
    missing = {f"parameter {n}" for n, _ in model.named_parameters()} - compared
    assert not missing, f"no rank has {missing}"


@pytest.mark.parametrize(
    "name", [n if n in ("gpt2", "resnet", "unet") else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_a_schedule_on_two_processes(two, name):
    check(two, name, [("pp=2", {"schedule": s}) for s in QUICK[name]])


@pytest.mark.parametrize("name", ["gpt2"])
def test_stages_of_several_ranks(four, name):
    check(four, name, MIXED)


@pytest.mark.parametrize("name", ["unet"])
def test_four_stages(four, name):
    check(four, name, [("pp=4", {"schedule": "1f1b"})])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_schedule_on_two_processes(two, name):
    check(two, name, [("pp=2", {"schedule": s}) for s in SYNCHRONOUS])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_schedule_on_four_processes(four, name):
    many = [("pp=4", {"schedule": s, **({"micro_batches": 8} if s == "dualpipe-v" else {})}) for s in SYNCHRONOUS]
    check(four, name, many)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5", "resnet", "unet", "vit"])
def test_stages_of_several_ranks_of_the_other_models(four, name):
    check(four, name, MIXED)


@pytest.mark.parametrize("name", ["gpt2"])
def test_dropout_is_that_of_one_stage(two, name):
    """Masks depend on seed, op and place in the micro-batch: not on how the model is cut."""
    options = {"dropout": 0.3}
    model, batch = example(name, **options)
    with widen_to_float64():
        pm = autopar.compile(model, "pp=1", example=batch, device="cpu", micro_batches=4, schedule="gpipe")
        torch.manual_seed(7)
        want = train(pm, batch)
    plain = train(example(name)[0], batch)
    assert worst({"loss 0": want["loss 0"]}, plain, 1e-9)[0] > 1e-3, "dropout did nothing"
    found = two.run(compare, name, [("pp=2", {"schedule": "zb-h1"})], 4, options, want)
    assert not any(failures for failures, _ in found), found
