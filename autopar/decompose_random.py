"""Decompositions of random ops: every distribution from `aten.rand` and `aten.randn` of float32.

Clean-up (`autopar/canonical.py`) then gives these two a seed and a stream number: `autopar::uniform`,
`autopar::normal`.
Dropout keeps an element where its uniform number is at least p, and saves that mask, as a bool, for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autopar.decompose import decomposes
from autopar.errors import CaptureError

Tensor = torch.Tensor
aten = torch.ops.aten

#: Bits of the significand of short floats, the hidden one included.
_SIGNIFICAND = {torch.float16: 11, torch.bfloat16: 8}


def _uniform(shape: Sequence[int], device: torch.device) -> Tensor:
    return aten.rand(list(shape), dtype=torch.float32, device=device)


def _normal(shape: Sequence[int], device: torch.device) -> Tensor:
    return aten.randn(list(shape), dtype=torch.float32, device=device)


def _uniform_of(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Tensor:
    """In [0, 1) in `dtype` too: a 16-bit float would round the largest numbers up to 1."""
    _check_real(dtype)
    uniform, bits = _uniform(shape, device), _SIGNIFICAND.get(dtype)
    return (uniform if bits is None else torch.floor(uniform * 2.0**bits) * 2.0**-bits).to(dtype)


def _normal_of(dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> Tensor:
    _check_real(dtype)
    return _normal(shape, device).to(dtype)


def _check_real(dtype: torch.dtype) -> None:
    if dtype.is_complex:
        raise CaptureError(
            f"random numbers of {dtype} are not supported; draw both parts: torch.complex(torch.randn(...), ...)"
        )


def _positive(shape: Sequence[int], device: torch.device) -> Tensor:
    """In (0, 1), for logarithms: the one number in 2^24 that is zero becomes half of the next."""
    return aten.clamp_min(_uniform(shape, device), 2.0**-25)


def _device(device: Any) -> torch.device:
    return torch.empty(0).device if device is None else torch.device(device)


@decomposes(aten.native_dropout.default)
def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x * 1, torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return x * 0, torch.zeros_like(x, dtype=torch.bool)
    keep = aten.ge.Scalar(_uniform(x.shape, x.device), p)
    return x * keep * (1.0 / (1.0 - p)), keep


@decomposes(aten.native_dropout_backward.default)
def _dropout_backward(grad: Tensor, keep: Tensor, scale: float) -> Tensor:
    return grad * keep * scale


@decomposes(aten.rand.default)
def _rand(
    size: Sequence[int], *, dtype: torch.dtype | None = None, layout: Any = None, device: Any = None,
    pin_memory: bool | None = None,
) -> Tensor:  # fmt: skip
    dtype = dtype or torch.get_default_dtype()
    return NotImplemented if dtype == torch.float32 else _uniform_of(dtype, size, _device(device))


@decomposes(aten.randn.default)
def _randn(
    size: Sequence[int], *, dtype: torch.dtype | None = None, layout: Any = None, device: Any = None,
    pin_memory: bool | None = None,
) -> Tensor:  # fmt: skip
    dtype = dtype or torch.get_default_dtype()
    return NotImplemented if dtype == torch.float32 else _normal_of(dtype, size, _device(device))


@decomposes(aten.rand_like.default)
def _rand_like(x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return _uniform_of(dtype or x.dtype, x.shape, torch.device(device or x.device))


@decomposes(aten.randn_like.default)
def _randn_like(x: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return _normal_of(dtype or x.dtype, x.shape, torch.device(device or x.device))


@decomposes(aten.bernoulli.p)
def _bernoulli_p(x: Tensor, p: float, *, generator: None = None) -> Tensor:
    return aten.lt.Scalar(_uniform(x.shape, x.device), p).to(x.dtype)


@decomposes(aten.bernoulli.default)
def _bernoulli(p: Tensor, *, generator: None = None) -> Tensor:
    return (_uniform(p.shape, p.device) < p).to(p.dtype)


@decomposes(aten.bernoulli.Tensor)
def _bernoulli_tensor(x: Tensor, p: Tensor, *, generator: None = None) -> Tensor:
    return (_uniform(x.shape, x.device) < p).to(x.dtype)


@decomposes(aten.uniform.default)
def _uniform_like(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: None = None) -> Tensor:
    return (_uniform(x.shape, x.device) * (high - low) + low).to(x.dtype)


@decomposes(aten.normal_functional.default)
def _normal_like(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: None = None) -> Tensor:
    return (_normal(x.shape, x.device) * std + mean).to(x.dtype)


@decomposes(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor)
def _normal_tensor(mean: Any, std: Any = 1.0, *, generator: None = None) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    shape = torch.broadcast_shapes(getattr(mean, "shape", ()), getattr(std, "shape", ()))
    return (_normal(shape, like.device) * std + mean).to(like.dtype)


@decomposes(aten.normal.float_float)
def _normal_float(
    mean: float, std: float, size: Sequence[int], *, generator: None = None, dtype: torch.dtype | None = None,
    layout: Any = None, device: Any = None, pin_memory: bool | None = None,
) -> Tensor:  # fmt: skip
    return (_normal(size, _device(device)) * std + mean).to(dtype or torch.get_default_dtype())


@decomposes(aten.exponential.default)
def _exponential(x: Tensor, lambd: float = 1.0, *, generator: None = None) -> Tensor:
    return (torch.log1p(-_positive(x.shape, x.device)) * (-1.0 / lambd)).to(x.dtype)


def _integers(low: int, high: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    if high - low > 1 << 20:
        raise ValueError(
            f"random integers in [{low}, {high}) need more than the 24 random bits of autopar's uniform numbers; "
            f"draw from a range of at most {1 << 20}"
        )
    return (torch.floor(_uniform(shape, device) * (high - low)) + low).to(dtype)


@decomposes(aten.randint.default)
def _randint(
    high: int, size: Sequence[int], *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> Tensor:
    return _integers(0, high, size, _device(device), dtype or torch.int64)


@decomposes(aten.randint.low)
def _randint_low(
    low: int, high: int, size: Sequence[int], *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> Tensor:
    return _integers(low, high, size, _device(device), dtype or torch.int64)


@decomposes(aten.randint_like.default)
def _randint_like(x: Tensor, high: int, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return _integers(0, high, x.shape, torch.device(device or x.device), dtype or x.dtype)


@decomposes(aten.randint_like.low_dtype)
def _randint_like_low(
    x: Tensor, low: int, high: int, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any
) -> Tensor:
    return _integers(low, high, x.shape, torch.device(device or x.device), dtype or x.dtype)


@decomposes(aten.randperm.default)
def _randperm(n: int, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return torch.argsort(_uniform([n], _device(device)), stable=True).to(dtype or torch.int64)


@decomposes(aten.multinomial.default)
def _multinomial(weights: Tensor, num_samples: int, replacement: bool = False, *, generator: None = None) -> Tensor:
    """Without replacement: the largest of log(w) / Gumbel-perturbed keys (Efraimidis and Spirakis, 2006)."""
    if replacement and num_samples > 1:
        uniform = _uniform((*weights.shape[:-1], num_samples), weights.device)
        ladder = torch.cumsum(weights, -1)
        return torch.searchsorted(ladder, uniform.to(ladder.dtype) * ladder[..., -1:]).clamp(max=weights.shape[-1] - 1)
    keys = torch.log(_positive(weights.shape, weights.device)).to(weights.dtype) / weights
    return torch.topk(keys, num_samples, dim=-1).indices
