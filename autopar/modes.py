"""What the user's code calls while it is traced, turned into what every device has and what can be split.

A program speaks of the CPU, wherever the model lives: a plan that a laptop has made fits the run on a GPU. So tensors
have fake twins on the CPU (`autopar/capture.py`), and here the user's own words for the GPU are read as "the CPU".
`passes/device.py` puts the real device back.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from autopar.canonical import where
from autopar.collector import resting_collector
from autopar.errors import CaptureError

HOST = torch.device("cpu")
#: Functions that take the name of a device by position; in all others a name is given as `device=`.
_POSITIONAL = frozenset({torch.Tensor.to, torch.as_tensor})

_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


class ExplicitAttention(TorchFunctionMode):
    """Attention with dropout as plain ops: the fused kernels of GPUs draw their masks where nobody can split them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the function itself, but for attention with dropout, and what torch traces wrongly."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            if args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0):
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
        if func is nn.functional.multilabel_margin_loss:
            raise CaptureError(
                "multilabel_margin_loss: torch traces it as another function than it runs; use "
                "multilabel_soft_margin_loss, or write the margins out with clamp"
            )
        return func(*args, **kwargs)


class OnHost(TorchFunctionMode):
    """`device="cuda"`, `.cuda()` and `.to("cuda")` in the user's code mean the CPU.

    Casts that autocast makes on CUDA depend on the device an op runs on: those no program on the CPU can hold.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the function itself, on the CPU.

        Raises:
            RuntimeError: autocast for CUDA is on; capture says where, and what to do.
        """
        if torch.is_autocast_enabled("cuda"):
            raise RuntimeError("autocast for cuda is on")
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": host_of(kwargs["device"])}
        if func in _POSITIONAL:
            args = (*args[:1], *(host_of(a) if isinstance(a, (str, int)) else a for a in args[1:]))
        args = tuple(host_of(a) if isinstance(a, torch.device) else a for a in args)
        return func(*args, **kwargs)


def host_of(device: Any) -> Any:
    """The CPU for any way to name a CUDA device (a number is one too); anything else as it is."""
    if isinstance(device, int) and not isinstance(device, bool):
        return HOST
    if isinstance(device, torch.device):
        return HOST if device.type == "cuda" else device
    return HOST if isinstance(device, str) and device.partition(":")[0] == "cuda" else device


def check_host(graph: fx.Graph) -> None:
    """Raise where a traced op is on a CUDA device after all.

    Raises:
        CaptureError: names the line.
    """
    for node in graph.nodes:
        val = node.meta.get("val")
        for tensor in val if isinstance(val, (tuple, list)) else (val,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                raise CaptureError(
                    f"{where(node)}: {node.name} is on {tensor.device}: the model reaches a tensor on the GPU that is "
                    "neither a parameter nor a buffer, or makes one by other means than torch's functions; register "
                    "it with register_buffer, or pass it to forward"
                )


@contextlib.contextmanager
def setting(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Within, the attribute `name` of `holder` is `value`."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextlib.contextmanager
def sizes_as_text() -> Iterator[None]:
    """Within, text made of a symbolic number is text of its value, and the trace holds for that value only.

    Torch prints the symbol's name and notes nothing, so that a model that looks up "n=6" would go astray in silence.
    """
    kinds: dict[Any, Any] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}

    def text_of(symbolic: Any) -> Callable[[Any], str]:
        plain, before = kinds[symbolic], symbolic.__repr__

        def text(value: Any) -> str:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            return before(value) if asking.partition(".")[0] == "torch" else repr(plain(value))  # torch: messages

        return text

    with contextlib.ExitStack() as stack:
        for symbolic in kinds:
            stack.enter_context(setting(symbolic, "__repr__", text_of(symbolic)))
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings and log lines from inside torch's tracing say nothing that `explain` does not say better."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), resting_collector():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


__all__ = ["ExplicitAttention", "OnHost", "check_host", "host_of", "quiet", "setting", "sizes_as_text"]
