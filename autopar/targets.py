"""What the command line plans: a model and example inputs from a `TARGET` text.

* `hf:PATH`: a Hugging Face `config.json`, or a folder that holds one;
* `hf:TYPE`: a Hugging Face model type ("llama"), its default configuration changed by `--set key=value`;
* `file.py:function`: a function of yours that returns `(model, example)` or `(model, example, loss)`; if it has
  parameters `batch` and `seq`, it is given ours. `example` is a tuple of positional or a dict of keyword arguments;
  with `loss(output, target)` it is a dict that holds the `target` as well.

Hugging Face models are built on the meta device, so that no weights are allocated, unless `real` is asked for.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from autopar.errors import AutoparError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

#: Which head a Hugging Face configuration gets, first match wins: (mapping in transformers, kind of inputs).
HEADS = (
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "text"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING", "spectrum"),
    ("MODEL_FOR_MASKED_LM_MAPPING", "text"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING", "text"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "image"),
    ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING", "wave"),
    ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING", "video"),
)
#: First input of a model -> kind of inputs, for configurations that name their own class.
MAIN_INPUTS = {"input_ids": "text", "pixel_values": "image", "input_features": "spectrum", "input_values": "wave"}


class TargetError(AutoparError, ValueError):
    """A target that names no model, or one whose inputs we cannot make up."""


@dataclass(frozen=True)
class Target:
    """How to build a model again: plain data, kept in the plan file.

    Attributes:
        text: the TARGET of the command line.
        batch: global batch size.
        seq: sequence length in tokens (for images and audio the configuration decides).
        dtype: key of `DTYPES`.
        settings: configuration entries to change, `{"num_hidden_layers": 2, "vision_config.hidden_size": 64}`.
    """

    text: str
    batch: int = 8
    seq: int = 512
    dtype: str = "fp32"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; inverse of `from_dict`."""
        return {**asdict(self), "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Target:
        """Inverse of `to_dict`.

        Raises:
            TargetError: an entry is missing or unknown, as in a plan that was made in Python.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise TargetError(
                f"the plan does not say how to build its model ({error}); it was not made by `autopar plan`"
            ) from None


@dataclass(frozen=True)
class Built:
    """A model ready to be captured: `model(*args, **kwargs)`; `loss(output)` where the model does not return one."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[..., Any] | None = None

    @property
    def example(self) -> tuple[Any, ...] | dict[str, Any]:
        """The inputs as one thing: a dict if all go by keyword, else a tuple."""
        return self.kwargs if not self.args else self.args


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`["a=1", "b=gelu"]` -> `{"a": 1, "b": "gelu"}`: values are JSON where they parse, else text.

    Raises:
        TargetError: an entry has no `=`.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise TargetError(f"cannot read {pair!r}: write KEY=VALUE, e.g. num_hidden_layers=2")
        try:
            out[key] = json.loads(value)
        except json.JSONDecodeError:
            out[key] = value
    return out


def build(target: Target, *, real: bool = False, shrink: Callable[[dict[str, Any]], None] | None = None) -> Built:
    """Build the model and example inputs of a target.

    Args:
        real: allocate and initialise weights (Hugging Face targets are on the meta device otherwise).
        shrink: changes the entries of a Hugging Face configuration in place before the model is built.

    Raises:
        TargetError: the target names nothing that exists, or its function returns something else.
    """
    if target.dtype not in DTYPES:
        raise TargetError(f"unknown dtype {target.dtype!r}; use one of {', '.join(DTYPES)}")
    if target.batch < 1 or target.seq < 1:
        raise TargetError(f"batch {target.batch} and sequence {target.seq} must be at least 1")
    if target.text.startswith("hf:"):
        config = hf_config(target, shrink)
        return _build_hf(config, target, real)
    path, colon, function = target.text.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise TargetError(
            f"cannot read target {target.text!r}; "
            "write hf:CONFIG.json, hf:MODEL_TYPE (e.g. hf:llama) or file.py:function"
        )
    if target.settings:
        raise TargetError(
            f"--set changes Hugging Face configurations; {target.text} has none: change the function, or let it take "
            f"batch= and seq="
        )
    return _build_function(Path(path), function, target)


# ---- Hugging Face --------------------------------------------------------------------------------------------------


def transformers() -> ModuleType:
    """The optional dependency.

    Raises:
        TargetError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise TargetError("hf: targets need transformers, which is not installed; pip install 'autopar[hf]'") from None


def hf_config(target: Target, shrink: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """The configuration of an `hf:` target, with its settings applied, then changed by `shrink`.

    Raises:
        TargetError: no such file or model type, or a setting that the configuration does not have.
    """
    hf, name = transformers(), target.text.removeprefix("hf:")
    path = Path(name)
    if not name:
        raise TargetError("hf: names no model; write hf:CONFIG.json or hf:MODEL_TYPE (e.g. hf:llama)")
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            config = hf.AutoConfig.for_model(data.pop("model_type"), **data)
        except KeyError:
            raise TargetError(f"{path} has no 'model_type'; it is not a Hugging Face configuration") from None
        except Exception as error:  # of any kind: from JSON, or from the checks of a configuration class
            raise TargetError(f"cannot read {path}: {error}") from None
    elif name.endswith(".json") or "/" in name:
        raise TargetError(f"{path} does not exist; give a config.json, a folder that holds one, or a model type")
    else:
        known = list(hf.CONFIG_MAPPING.keys())
        if name not in known:
            raise TargetError(f"transformers {hf.__version__} has no model type {name!r}{_did_you_mean(name, known)}")
        config = hf.AutoConfig.for_model(name)
    return _with_settings(hf, config, target.settings, shrink)


def _with_settings(
    hf: ModuleType, config: Any, settings: Mapping[str, Any], shrink: Callable[[dict[str, Any]], None] | None
) -> Any:
    data = copy.deepcopy(config.to_dict())
    for key, value in settings.items():
        at, *parents = data, *key.split(".")
        *parents, last = parents
        for parent in parents:
            at = at.get(parent) if isinstance(at, dict) else None
        if not isinstance(at, dict) or (last not in at and not hasattr(config, last)):
            known = list(data)
            raise TargetError(f"{type(config).__name__} has no entry {key!r}{_did_you_mean(key, known)}")
        at[last] = value
    if "hidden_size" in settings and "head_dim" in data and "head_dim" not in settings:
        data.pop("head_dim")  # derived by the configuration; the default's would be stale
    data.pop("model_type", None)
    if data.get("loss_type") is None:
        data.pop("loss_type", None)  # None would be taken for a name
    if shrink is not None:
        shrink(data)
    try:
        changed = hf.AutoConfig.for_model(config.model_type, **data)
    except Exception as error:  # of any kind: configuration classes check themselves
        text = " ".join(str(error).split())
        raise TargetError(f"{type(config).__name__} refuses {dict(settings)}: {text}") from None
    if getattr(changed, "use_cache", False):
        changed.use_cache = False  # a cache is for generation; training returns none
    return changed


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _model_class(hf: ModuleType, config: Any) -> tuple[Any, str]:
    for name in config.architectures or ():
        cls = getattr(hf, name, None)
        if cls is not None:
            kind = MAIN_INPUTS.get(cls.main_input_name)
            if kind is None:
                raise TargetError(
                    f"{name} takes {cls.main_input_name!r}, which we cannot make up; use file.py:function"
                )
            return cls, kind
    for mapping, kind in HEADS:
        classes = getattr(hf, mapping)
        if type(config) in classes:
            cls = classes[type(config)]
            return (cls[0] if isinstance(cls, (tuple, list)) else cls), kind
    raise TargetError(
        f"{type(config).__name__} has no language, image, audio or video head in transformers {hf.__version__}; "
        "write a function that returns (model, example) and use file.py:function"
    )


def _build_hf(config: Any, target: Target, real: bool) -> Built:
    hf = transformers()
    cls, kind = _model_class(hf, config)
    dtype = DTYPES[target.dtype]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not model.to(dtype): rotary tables and the like keep the type they ask for
    try:
        with nullcontext() if real else torch.device("meta"):
            model = cls(config)
    except Exception as error:  # of any kind: sizes that do not go together
        raise TargetError(f"{cls.__name__} cannot be built: {type(error).__name__}: {error}") from error
    finally:
        torch.set_default_dtype(before)
    model.train()
    return Built(model, (), _inputs(config, kind, target, dtype))


def _inputs(config: Any, kind: str, target: Target, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch, seq = target.batch, target.seq

    def tokens(config: Any, length: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (batch, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    text = config.get_text_config()
    if kind == "text":
        limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        if limit and seq > limit:
            raise TargetError(
                f"sequence {seq} is longer than the {limit} positions of {type(config).__name__}; "
                f"use --seq {limit} or --set max_position_embeddings={seq}"
            )
        ids = tokens(text, seq)
        if config.is_encoder_decoder:  # not left to the model: some configurations do not say how a decoder starts
            return {"input_ids": ids, "decoder_input_ids": ids.roll(1, 1), "labels": ids.clone()}
        return {"input_ids": ids, "labels": ids.clone()}
    labels = torch.randint(max(2, getattr(config, "num_labels", 2)), (batch,), generator=generator)
    if kind == "spectrum":
        frames = 2 * config.max_source_positions
        length = min(seq, getattr(config, "max_target_positions", seq))
        return {"input_features": noise(batch, config.num_mel_bins, frames), "labels": tokens(config, length)}
    if kind == "wave":
        return {"input_values": noise(batch, 16000), "labels": labels}
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    frames = (getattr(vision, "num_frames", 8),) if kind == "video" else ()
    pixels = noise(batch, *frames, getattr(vision, "num_channels", 3), height, width)
    return {"pixel_values": pixels, "labels": labels}


# ---- a user's file -------------------------------------------------------------------------------------------------


def _build_function(path: Path, name: str, target: Target) -> Built:
    if not path.is_file():
        raise TargetError(f"{path} does not exist; the target is file.py:function")
    spec = importlib.util.spec_from_file_location(f"autopar_target_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look for the module of a class there
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a script: it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{path} raised {type(error).__name__} while it was loaded: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise TargetError(f"{path} has no function {name!r}{_did_you_mean(name, dir(module))}")
    given = {"batch": target.batch, "seq": target.seq}
    kwargs = {k: given[k] for k in inspect.signature(function).parameters if k in given}
    try:
        result = function(**kwargs)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{path}:{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not isinstance(result[0], torch.nn.Module):
        raise TargetError(
            f"{path}:{name} must return (model, example) or (model, example, loss), got {_describe(result)}"
        )
    model, example, *rest = result
    if isinstance(example, Mapping):
        return Built(model, (), dict(example), *rest)
    return Built(model, example if isinstance(example, tuple) else (example,), {}, *rest)


def _describe(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(r).__name__ for r in result)})"
    return type(result).__name__
