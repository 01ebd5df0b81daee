"""Every Hugging Face architecture of the list captures, with a gradient for each parameter it uses."""

from __future__ import annotations

import pytest
import torch

from autopar.capture import capture
from autopar.errors import CaptureError
from tests.zoo_hf import HF_ARCHITECTURES, UNSUPPORTED

#: The first of each family run always, the others in the long run.
QUICK = {
    "mistral", "qwen3", "gemma2", "phi3", "gpt_neox", "bloom", "qwen2_moe", "mamba", "roberta", "deberta_v2", "bart",
    "whisper", "wav2vec2", "swin", "convnext", "vit_mae", "clip",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HF_ARCHITECTURES]
)
def test_architecture_captures(name):
    model, batch = HF_ARCHITECTURES[name](seed=0)
    program = capture(model, (), batch)
    assert [s.name for s in program.of_kind("tangent")] == ["loss"]
    grads = [s for s in program.sinks if s.kind == "grad"]
    missing = [s.name for s in grads if s.node is None]
    assert len(grads) > len(missing)
    model.zero_grad()
    model(**batch).loss.backward()  # what eager gives a gradient, the graph does too
    eager = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {s.name for s in grads if s.node is not None} == eager
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_enough_architectures():
    assert len(HF_ARCHITECTURES) >= 34


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_unsupported_says_why(name):
    build, reason = UNSUPPORTED[name]
    model, batch = build(seed=0)
    with pytest.raises(CaptureError) as caught:
        capture(model, (), batch)
    assert reason in str(caught.value)
