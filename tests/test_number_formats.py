"""Decompositions in formats where rounding or range shows: 16-bit floats, the ends of uniform numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar import decompose_random
from autopar.capture import capture
from autopar.errors import CaptureError

ids = torch.arange(8192) % 4
#: Each sums 8192 numbers to more than float16 holds; the result itself is in range.
OUT_OF_RANGE = {
    "mean": lambda x: x.mean(),
    "mean of a dim": lambda x: x.mean(0, keepdim=True),
    "mean in float16": lambda x: x.float().mean(dtype=torch.float16),
    "var": lambda x: (x * torch.linspace(-1, 1, 8192).half()[:, None]).var(0),
    "std and mean": lambda x: torch.std_mean(x * torch.linspace(0, 1, 8192).half()[:, None], 0),
    "mse_loss": lambda x: nn.functional.mse_loss(x, x * 0),
    "smooth_l1_loss": lambda x: nn.functional.smooth_l1_loss(x, x * 0),
    "nll_loss": lambda x: nn.functional.nll_loss(x, ids, ignore_index=2),
    "nll_loss2d": lambda x: nn.functional.nll_loss(x.T.reshape(1, 4, 64, 128), ids.view(1, 64, 128)),
}


class Scaled(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float16))
        self.function = function

    def forward(self, x):
        return self.function(x * self.weight)


@pytest.mark.parametrize("name", list(OUT_OF_RANGE))
def test_sums_of_float16_are_not_out_of_range(name):
    model, x = Scaled(OUT_OF_RANGE[name]), torch.full((8192, 4), 20.0, dtype=torch.float16)
    got = capture(model, (x,), training=False).gm(model.weight, x)
    want = OUT_OF_RANGE[name](x.float())  # on some devices torch itself is out of range in float16
    for a, b in zip(got, want if isinstance(want, tuple) else (want,)):
        torch.testing.assert_close(a, b.half(), rtol=2e-3, atol=0)


def test_variance_of_complex_numbers():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex128))

        def forward(self, x):
            return (x * self.weight).var(0)

    model, x = Model(), torch.randn(8, 4, dtype=torch.complex128)
    got = capture(model, (x,), training=False).gm(model.weight, x)[0]
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24], ids=["least", "largest"])
def test_ends_of_the_uniform_numbers(monkeypatch, uniform):
    """Zero gave an infinite logarithm, and so NaN out of a Gumbel softmax, once in 2^24 numbers."""
    monkeypatch.setattr(decompose_random, "_uniform", lambda shape, device: torch.full(tuple(shape), uniform))
    gumbel = -decompose_random._exponential(torch.zeros(4)).log()
    assert gumbel.isfinite().all()
    picked = decompose_random._multinomial(torch.tensor([0.0, 1.0, 0.0]), 1)
    assert picked.tolist() == [1]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert 0 <= decompose_random._rand_like(torch.zeros(4, dtype=dtype)).max() < 1


@pytest.mark.parametrize("draw", [torch.rand_like, torch.randn_like], ids=["rand", "randn"])
def test_complex_random_numbers_are_refused(draw):
    """They came out with an imaginary part of zero."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x):
            return (x * self.weight + draw(self.weight)).abs().sum()

    with pytest.raises(CaptureError, match=r"random numbers of torch\.complex64 are not supported; draw both parts"):
        capture(Model(), (torch.ones(2, 4),))
