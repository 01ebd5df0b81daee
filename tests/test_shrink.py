"""Scaling a model down for `autopar verify`: what stays, and that real configurations survive it."""

from __future__ import annotations

import math

import pytest

from autopar.mesh import Mesh
from autopar.shrink import near, shrink_config, shrink_mesh
from autopar.targets import Target, build


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("mesh", "procs", "small"),
    [
        ("dp=8,tp=8", None, "dp=2,tp=2"),
        ("dp=2,tp=4", None, "dp=2,tp=2"),
        ("tp=8", None, "tp=4"),
        ("dp=16384", None, "dp=4"),
        ("dp=6,tp=3", 6, "dp=2,tp=3"),
        ("a=4,b=4,c=4", None, "a=2,b=2,c=2"),
        ("dp=1,tp=2", None, "dp=1,tp=2"),
        ("dp=8,tp=8", 1, "dp=1,tp=1"),
        ("dp=3", 2, "dp=1"),
    ],
)
def test_mesh(mesh, procs, small):
    assert str(shrink_mesh(Mesh.parse(mesh), procs)) == small


@pytest.mark.tiny
def test_sizes_keep_what_they_share_with_the_mesh():
    for value in (11008, 50257, 4096, 30522, 151936, 12):
        for devices in (1, 2, 4, 6, 8):
            small = near(value, 32, devices)
            assert small <= value
            assert math.gcd(small, devices) == math.gcd(value, devices)


@pytest.mark.tiny
def test_configuration():
    data = {
        "num_hidden_layers": 80,
        "layer_types": ["full"] * 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "eos_token_id": [128001, 128009],
        "pad_token_id": None,
        "vision_config": {"hidden_size": 1024, "image_size": 336, "patch_size": 14},
    }
    shrink_config(data, Mesh.parse("dp=2,tp=2"), 32)
    assert data["num_hidden_layers"] == len(data["layer_types"]) == 2
    assert (data["num_attention_heads"], data["num_key_value_heads"], data["head_dim"]) == (8, 4, 8)
    assert data["hidden_size"] == 64
    assert (data["intermediate_size"], data["vocab_size"]) == (32, 96)
    assert all(0 <= t < 96 for t in data["eos_token_id"])
    assert data["pad_token_id"] is None
    assert data["vision_config"] == {"hidden_size": 32, "image_size": 28, "patch_size": 14}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "mixtral", "qwen3_moe", "gpt_neox", "opt"])
def test_small_models_run(name):
    mesh = Mesh.parse("dp=2,tp=2")
    target = Target(f"hf:{name}", batch=2, seq=16)
    built = build(target, real=True, shrink=lambda data: shrink_config(data, mesh, 16))
    assert sum(p.numel() for p in built.model.parameters()) < 300_000
    assert built.model(**built.kwargs).loss.isfinite()
