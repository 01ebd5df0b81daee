"""Tensors that wait on the host: ops that take one there and bring it back, with the copies beside computation.

In a program (`autopar/recompute.py` puts them there) two ops that know neither streams nor devices:

    autopar::offload(x)         a copy of x on the host
    autopar::fetch(x, device)   and back

On a rank (`passes/hosted.py`) each is a start and an end, between which the copy is under way:

    autopar::offload_start(x), autopar::fetch_start(x, device), autopar::arrived(x)

`arrived` gives what the start gave, when the stream of computation may read it, and lets go of what the start has read.
On a GPU the host's memory is pinned, and there is one stream for each way; the host waits for nothing, but for pinned
memory when that is allocated first, and for tensors with gaps between their elements. Without a GPU a
copy is made at once, and what it has read is held as long.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

_library = torch.library.Library("autopar", "FRAGMENT")
_library.define("offload(Tensor x) -> Tensor")
_library.define("fetch(Tensor x, Device? device=None) -> Tensor")
_library.define("offload_start(Tensor x) -> Tensor")
_library.define("fetch_start(Tensor x, Device? device=None) -> Tensor")
_library.define("arrived(Tensor(a) x) -> Tensor(a)")

_ops = torch.ops.autopar
OFFLOAD, FETCH = _ops.offload.default, _ops.fetch.default
OFFLOAD_START, FETCH_START, ARRIVED = _ops.offload_start.default, _ops.fetch_start.default, _ops.arrived.default
#: Both ops of a program, and both starts of a rank.
HOSTED = (OFFLOAD, FETCH)
STARTS = (OFFLOAD_START, FETCH_START)
#: How many copies each way may be under way, where a plan does not say.
COPIES = 2
_HOST = torch.device("cpu")

#: Storages that hold what waits on the host: where the device is a CPU, nothing else tells them apart.
_stored: weakref.WeakSet[Any] = weakref.WeakSet()


def host_empty(like: torch.Tensor) -> torch.Tensor:
    """Memory of the host for a tensor such as `like`, with its strides if it is dense; pinned if that is on a GPU."""
    found = torch.empty_like(like, device=_HOST, pin_memory=like.device.type == "cuda")
    _stored.add(found.untyped_storage())
    return found


def on_host(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory came from `host_empty`: it is none of the device's."""
    return tensor.untyped_storage() in _stored


#: Copies under way, by the address of what they make: what tells that they are done (None: they are), what they read.
_flying: dict[int, tuple[torch.cuda.Event | None, torch.Tensor]] = {}
#: Of a GPU: the streams to the host and from there.
_streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}


def _start(made: torch.Tensor, x: torch.Tensor, gpu: torch.device | None, up: bool) -> torch.Tensor:
    if not x.numel():
        return made
    if gpu is None:
        made.copy_(x)
        _flying[made.data_ptr()] = None, x
        return made
    if gpu not in _streams:
        _streams[gpu] = torch.cuda.Stream(gpu), torch.cuda.Stream(gpu)
    stream = _streams[gpu][up]
    # Behind what computation has done: it has made the operand, and has let go of the memory of the result.
    stream.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(stream):
        made.copy_(x, non_blocking=True)
    _flying[made.data_ptr()] = stream.record_event(), x
    return made


def _gpu(tensor: torch.Tensor) -> torch.device | None:
    return tensor.device if tensor.device.type == "cuda" else None


def _offload_start(x: torch.Tensor) -> torch.Tensor:
    return _start(host_empty(x), x, _gpu(x), up=False)


def _fetch_start(x: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    made = torch.empty_like(x, device=device or _HOST, pin_memory=False)
    return _start(made, x, _gpu(made), up=True)


def _arrived(x: torch.Tensor) -> torch.Tensor:
    event, source = _flying.pop(x.data_ptr(), (None, x))
    if event is not None:
        gpu = _gpu(source) or _gpu(x)
        torch.cuda.current_stream(gpu).wait_event(event)
    return x


def abandon() -> None:
    """Let go of copies whose end will not come, because what runs has failed: behind them, on every stream."""
    for event, source in _flying.values():
        if event is not None:
            for gpu in {t.device for t in (source,) if t.is_cuda} or set(_streams):
                torch.cuda.current_stream(gpu).wait_event(event)
    _flying.clear()


def _offload(x: torch.Tensor) -> torch.Tensor:
    return _arrived(_offload_start(x))


def _fetch(x: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    return _arrived(_fetch_start(x, device))


for _name, _function in (
    ("offload", _offload), ("fetch", _fetch), ("offload_start", _offload_start), ("fetch_start", _fetch_start),
    ("arrived", _arrived),
):  # fmt: skip
    _library.impl(_name, _function, "CompositeExplicitAutograd")


def _down(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, device=_HOST if x.device.type == "cuda" else x.device)


def _up(x: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    return torch.empty_like(x, device=device or x.device)


for _name in ("offload", "offload_start"):
    torch.library.register_fake(f"autopar::{_name}", _down)
for _name in ("fetch", "fetch_start"):
    torch.library.register_fake(f"autopar::{_name}", _up)
torch.library.register_fake("autopar::arrived", lambda x: torch.ops.aten.alias.default(x))

__all__ = [
    "ARRIVED", "COPIES", "FETCH", "FETCH_START", "HOSTED", "OFFLOAD", "OFFLOAD_START", "STARTS", "abandon",
    "host_empty", "on_host",
]  # fmt: skip
