"""Targets of the command line: what is built from which text, and what is refused with which words."""

from __future__ import annotations

import json

import pytest
import torch

from autopar.targets import Target, TargetError, build, parse_settings

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
BUILDER = """
import torch
def build(batch, seq):
    return torch.nn.Linear(seq, 2), (torch.randn(batch, seq),)
def named():
    return torch.nn.Linear(3, 2), {"input": torch.randn(4, 3)}
def with_loss():
    example = {"input": torch.randn(4, 3), "target": torch.randn(4, 2)}
    return torch.nn.Linear(3, 2), example, torch.nn.functional.mse_loss
def wrong():
    return torch.nn.Linear(3, 2)
def breaks():
    raise RuntimeError("no such thing")
"""


def test_model_type_is_built_without_weights():
    built = build(Target("hf:llama", batch=4, seq=16, dtype="bf16", settings=SMALL))
    assert type(built.model).__name__ == "LlamaForCausalLM"
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in built.model.parameters())
    assert {k: tuple(v.shape) for k, v in built.kwargs.items()} == {"input_ids": (4, 16), "labels": (4, 16)}
    assert built.model.training and built.model.config.use_cache is False


@pytest.mark.parametrize(
    ("name", "cls", "inputs"),
    [
        ("bert", "BertForMaskedLM", ["input_ids", "labels"]),
        ("t5", "T5ForConditionalGeneration", ["input_ids", "decoder_input_ids", "labels"]),
        ("vit", "ViTForImageClassification", ["pixel_values", "labels"]),
        ("resnet", "ResNetForImageClassification", ["pixel_values", "labels"]),
    ],
)
def test_heads(name, cls, inputs):
    built = build(Target(f"hf:{name}", batch=2, seq=16))
    assert type(built.model).__name__ == cls
    assert list(built.kwargs) == inputs


def test_configuration_file_and_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}))
    for text in (f"hf:{tmp_path}", f"hf:{tmp_path / 'config.json'}"):
        built = build(Target(text, batch=2, seq=16))
        assert built.model.config.n_layer == 1


def test_file_and_function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(BUILDER)
    built = build(Target(f"{path}:build", batch=3, seq=5))
    assert built.args[0].shape == (3, 5) and built.example == built.args
    assert build(Target(f"{path}:named")).example.keys() == {"input"}
    assert build(Target(f"{path}:with_loss")).loss is torch.nn.functional.mse_loss


def test_target_round_trip():
    target = Target("hf:llama", 3, 7, "bf16", {"a": 1})
    assert Target.from_dict(json.loads(json.dumps(target.to_dict()))) == target


def test_settings():
    assert parse_settings(["a=1", "b=gelu", "c=[1, 2]", "d=x=y"]) == {"a": 1, "b": "gelu", "c": [1, 2], "d": "x=y"}


def refused(text: str, **options) -> str:
    with pytest.raises(TargetError) as error:
        build(Target(text, **options))
    return str(error.value)


@pytest.mark.tiny
def test_refused_texts(tmp_path):
    assert refused("llama") == (
        "cannot read target 'llama'; write hf:CONFIG.json, hf:MODEL_TYPE (e.g. hf:llama) or file.py:function"
    )
    assert refused("missing.py:f") == "missing.py does not exist; the target is file.py:function"
    assert refused("hf:missing/config.json") == (
        "missing/config.json does not exist; give a config.json, a folder that holds one, or a model type"
    )
    assert "has no model type 'lama'; did you mean llama" in refused("hf:lama")
    assert refused("hf:llama", settings={"hiden_size": 3}) == (
        "LlamaConfig has no entry 'hiden_size'; did you mean hidden_size, hidden_act?"
    )
    assert refused("hf:gpt2", seq=4096).startswith("sequence 4096 is longer than the 1024 positions of GPT2Config; use")
    assert refused("hf:gpt2", dtype="int8") == "unknown dtype 'int8'; use one of fp32, bf16, fp16, fp64"
    assert refused("hf:clap").startswith("ClapConfig has no language, image, audio or video head")
    (tmp_path / "config.json").write_text("{}")
    assert refused(f"hf:{tmp_path}").endswith("has no 'model_type'; it is not a Hugging Face configuration")
    path = tmp_path / "mine.py"
    path.write_text(BUILDER)
    assert refused(f"{path}:biuld").endswith("mine.py has no function 'biuld'; did you mean build?")
    assert refused(f"{path}:breaks").endswith("mine.py:breaks raised RuntimeError: no such thing")
    assert refused(f"{path}:wrong").endswith("must return (model, example) or (model, example, loss), got Linear")
    with pytest.raises(TargetError, match=r"cannot read 'x': write KEY=VALUE, e\.g\. num_hidden_layers=2"):
        parse_settings(["x"])


def test_file_imports_its_neighbours_and_defines_dataclasses(tmp_path):
    (tmp_path / "autopar_neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses\nimport torch\nfrom autopar_neighbour import WIDTH\n"
        "@dataclasses.dataclass\nclass Config:\n    width: int = WIDTH\n"
        "def build():\n    return torch.nn.Linear(Config().width, 2), (torch.randn(4, WIDTH),)\n"
    )
    assert build(Target(f"{path}:build")).model.in_features == 5
