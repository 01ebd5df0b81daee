"""Models that cast to float32 inside, run wholly in float64.

Hugging Face norms, softmax and losses cast to float32, which limits any comparison to 1e-7. Under `widen_to_float64`
every such cast and every creation of a float32 tensor asked for by Python code becomes float64, in eager runs and while
capturing alike. Ops of a captured graph (`torch.ops.*`) are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Widen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].to(torch.float64)
        if func is torch.set_default_dtype:
            return func(*args)
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def widen_to_float64() -> Iterator[None]:
    """Within, float32 means float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(default)


def double(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and batch in float64 (the model is changed)."""
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
