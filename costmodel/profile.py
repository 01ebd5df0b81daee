"""A measured Device as a JSON file: what `autopar calibrate` writes, and what plans for this machine go by."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from autopar.costmodel.curve import Curve
from autopar.costmodel.devices import Crowd, Device, Host, Link, Measured
from autopar.errors import ProfileError

SCHEMA = 6
#: Environment variable with the path of the profile; empty: there is none.
PROFILE = "AUTOPAR_PROFILE"


def machine_id() -> dict[str, Any]:
    """What a profile depends on: processor, number of cores, accelerator, version of torch."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {"processor": model, "cores": cores(), "accelerator": gpu, "torch": torch.__version__}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def path() -> Path | None:
    """Where the profile of this machine is kept: `$AUTOPAR_PROFILE`, else in the user's cache; None: switched off."""
    given = os.environ.get(PROFILE)
    if given is not None:
        return Path(given) if given else None
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "autopar", "profile.json")


def save(device: Device, where: Path) -> None:
    """Write the profile of this machine, whole or not at all.

    Raises:
        ProfileError: it cannot be written.
    """
    draft = where.with_name(f"{where.name}.{os.getpid()}")
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(to_json(device, machine_id()), encoding="utf-8")
        draft.replace(where)
    except OSError as error:
        raise ProfileError(f"cannot write the profile {where}: {error}; give another path with -o") from None


def load() -> Device:
    """The measured device of this machine.

    Raises:
        ProfileError: there is none, it cannot be read, or it is of another machine; says what to do.
    """
    where = path()
    if where is None or not where.exists():
        place = f"{PROFILE} is empty" if where is None else f"{where} does not exist"
        raise ProfileError(f"this machine is not calibrated ({place}); run `autopar calibrate`")
    try:
        text = where.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"cannot read the profile {where}: {error}; run `autopar calibrate` again") from None
    device, made = from_json(text, str(where))
    here = machine_id()
    changed = [f"{k} {made.get(k)!r} then, {v!r} now" for k, v in here.items() if made.get(k) != v]
    if changed:
        raise ProfileError(
            f"the profile {where} is of another machine ({'; '.join(changed)}); run `autopar calibrate` again"
        )
    return device


def available() -> bool:
    """Whether `load` would find a profile of this machine; a file that cannot be read is an error all the same."""
    where = path()
    if where is None or not where.exists():
        return False
    try:
        text = where.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"cannot read the profile {where}: {error}; run `autopar calibrate` again") from None
    return from_json(text, str(where))[1] == machine_id()


# ---- JSON ----------------------------------------------------------------------------------------------------------


def to_json(device: Device, made_on: Mapping[str, Any] | None = None) -> str:
    """A Device as text; `made_on` is what `machine_id` said where it was measured."""
    data = {"autopar_device": SCHEMA, "machine": dict(made_on or {}), **asdict(device)}
    del data["inside"], data["beside"]  # what `part` and `shared_by` find for one mesh
    if device.host is None:
        del data["host"]
    elif math.isinf(device.host.memory):
        del data["host"]["memory"]
    return json.dumps(data, indent=1) + "\n"


def from_json(text: str, where: str = "device") -> tuple[Device, dict[str, Any]]:
    """Inverse of `to_json`: the Device, and the machine that it was measured on.

    Raises:
        ProfileError: the text is no device, of another schema, or an entry cannot be read; says which.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ProfileError(f"{where} is not JSON: {error}; run `autopar calibrate` again") from None
    if not isinstance(data, dict) or "autopar_device" not in data:
        raise ProfileError(f"{where} is not a device profile (no 'autopar_device' key); run `autopar calibrate`")
    if data["autopar_device"] != SCHEMA or isinstance(data["autopar_device"], bool):
        raise ProfileError(
            f"{where} has schema {data['autopar_device']}, this autopar reads {SCHEMA}; run `autopar calibrate` again"
        )
    read = _Reader(where)
    memory = data.get("memory")
    device = Device(
        name=read(data, "name", _text),
        flops=read(data, "flops", _table(_above_zero)),
        bandwidth=read(data, "bandwidth", _above_zero),
        memory=None if memory is None else read(data, "memory", _above_zero),
        fast=read(data, "fast", _link),
        slow=read(data, "slow", _link),
        node=read(data, "node", _count),
        launch=read(data, "launch", _above_zero),
        matmul_efficiency=read(data, "matmul_efficiency", _above_zero),
        memory_efficiency=read(data, "memory_efficiency", _above_zero),
        slack=read(data, "slack", _not_negative),
        gloo=read(data, "gloo", _flag),
        measured=read(data, "measured", _measured),
        host=read(data, "host", _host) if "host" in data else None,
    )
    if "float32" not in device.flops:
        raise ProfileError(f"{where} is damaged at flops: no 'float32'; run `autopar calibrate` again")
    return device, read(data, "machine", _table(lambda value: value))


class _Reader:
    """Reads one entry and says which one is bad."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, data: Mapping[str, Any], key: str, convert: Callable[[Any], Any]) -> Any:
        try:
            return convert(data[key])
        except KeyError as error:
            raise ProfileError(f"{self.where} is damaged: it has no {error.args[0]!r} (in {key})") from None
        except (TypeError, ValueError) as error:
            raise ProfileError(f"{self.where} is damaged at {key}: {error}; run `autopar calibrate` again") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return value


def _above_zero(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError(f"{value!r} is not above zero")
    return value


def _not_negative(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError(f"{value!r} is negative")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no whole number above zero")
    return value


def _table(convert: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is no object")
        return {k: convert(v) for k, v in value.items()}

    return read


def _link(value: Any) -> Link:
    return Link(_above_zero(value["bandwidth"]), _not_negative(value["latency"]))


def _host(value: Any) -> Host:
    memory = _above_zero(value["memory"]) if "memory" in value else math.inf
    return Host(_link(value["link"]), _above_zero(value["bandwidth"]), memory)


def _curve(value: Any) -> Curve:
    points = tuple((_number(size), _number(at)) for size, at in value["points"])
    if not isinstance(value["grows"], bool):
        raise ValueError(f"{value['grows']!r} is neither true nor false")
    return Curve(points, value["grows"])


def _measured(value: Any) -> Measured | None:
    if value is None:
        return None
    crowds = (
        Crowd(
            _count(c["ranks"]),
            _above_zero(c["matmul"]),
            _above_zero(c["memory"]),
            _above_zero(c["launch"]),
            _above_zero(c["update"]),
            _not_negative(c["beside"]),
        )
        for c in value["crowds"]
    )
    return Measured(
        matmul=_table(_curve)(value["matmul"]),
        attention=None if value["attention"] is None else _curve(value["attention"]),
        memory=_table(_curve)(value["memory"]),
        collectives=_table(_curve)(value["collectives"]),
        crowds=tuple(crowds),
        view=_not_negative(value["view"]),
        linear_from=None if value["linear_from"] is None else _above_zero(value["linear_from"]),
        weights_from=None if value["weights_from"] is None else _above_zero(value["weights_from"]),
    )
