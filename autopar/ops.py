"""Random numbers that do not depend on how a tensor is cut.

Element i of a random tensor is a pure function of (seed value, stream, global row-major index i), so a rank that holds
only some of the elements computes exactly those. Two forms of each distribution:

* `autopar::uniform(seed, stream, shape)`: the whole tensor, float32 in [0, 1), 24 random bits per element;
* `autopar::uniform_at(seed, stream, index, shape)`: the elements at the outer product of `index`, where `index[d]`
  is the 1-D int64 tensor of global indices held along dim d and `shape` the global shape;

and likewise `normal`, `normal_at` (mean 0, standard deviation 1, float32). `seed` is an int64 tensor of no dims,
`stream` numbers the random op in its graph.

The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; the
finaliser is Stafford's variant 13): the i-th output of the sequence that starts at `key` is
mix(key + (i + 1) * GOLDEN). It needs no state, and only 64-bit integer arithmetic modulo 2^64, which int64 tensors give
on every device. The key of a stream is itself a hash of seed and stream, so streams start at unrelated places of the
period of 2^64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned `x`."""
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
#: Sets the two sequences behind a normal deviate apart.
_SECOND = _signed(0xD1B54A32D192ED03)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: int64 has only the arithmetic one."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """Stafford's variant 13: a bijection of 64-bit integers that scatters every bit."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _bits(seed: torch.Tensor, stream: int, linear: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """64 random bits, as int64, for every global index in `linear`."""
    offset = _signed(((stream + 1) * _GOLDEN + salt) % (1 << 64))
    key = _mix(_mix(seed + _GOLDEN) + offset)
    return _mix(key + (linear + 1) * _GOLDEN)


def _to_uniform(bits: torch.Tensor) -> torch.Tensor:
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def _to_normal(seed: torch.Tensor, stream: int, linear: torch.Tensor) -> torch.Tensor:
    """Box-Muller, in float64 so that the tails reach eight deviations and devices agree after rounding to float32."""
    radius = (_shift(_bits(seed, stream, linear), 11) + 1).to(torch.float64) * 2.0**-53  # in (0, 1]
    angle = _shift(_bits(seed, stream, linear, _SECOND), 11).to(torch.float64) * (2.0 * math.pi * 2.0**-53)
    return (torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(angle)).to(torch.float32)


def _whole(seed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Global indices of all elements."""
    return torch.arange(math.prod(shape), dtype=torch.int64, device=seed.device).reshape(tuple(shape))


def _part(seed: torch.Tensor, index: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Global indices of the elements at the outer product of `index`."""
    linear = torch.zeros((1,) * len(shape), dtype=torch.int64, device=seed.device)
    for dim, (held, size) in enumerate(zip(index, shape)):
        linear = linear * size + held.reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return linear


@torch.library.custom_op("autopar::uniform", mutates_args=())
def uniform(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """Uniform in [0, 1): float32 tensor of `shape`."""
    return _to_uniform(_bits(seed, stream, _whole(seed, shape)))


@torch.library.custom_op("autopar::normal", mutates_args=())
def normal(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal: float32 tensor of `shape`."""
    return _to_normal(seed, stream, _whole(seed, shape))


@torch.library.custom_op("autopar::uniform_at", mutates_args=())
def uniform_at(seed: torch.Tensor, stream: int, index: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The piece of `uniform(seed, stream, shape)` at the outer product of `index`."""
    return _to_uniform(_bits(seed, stream, _part(seed, index, shape)))


@torch.library.custom_op("autopar::normal_at", mutates_args=())
def normal_at(seed: torch.Tensor, stream: int, index: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """The piece of `normal(seed, stream, shape)` at the outer product of `index`."""
    return _to_normal(seed, stream, _part(seed, index, shape))


def _empty(seed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.float32, device=seed.device)


@uniform.register_fake
@normal.register_fake
def _(seed: torch.Tensor, stream: int, shape: Sequence[int]) -> torch.Tensor:
    return _empty(seed, shape)


@uniform_at.register_fake
@normal_at.register_fake
def _(seed: torch.Tensor, stream: int, index: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    return _empty(seed, [i.numel() for i in index])
