"""Models that once broke capture, rules or lowering, and their neighbours: equal to eager, or refused clearly.

Every model is captured, run whole against eager in float64, and run in lock step under a few random plans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopar import passes
from autopar.capture import capture
from autopar.costmodel.planner import plan, random_plan
from autopar.costmodel.rules import rule_for, rule_source
from autopar.errors import CaptureError
from autopar.graph import is_op, op_name
from autopar.mesh import Mesh
from tests import parity

MESHES = ("dp=2,tp=2", "dp=4", "a=2,b=2,c=2")


class Calls(nn.Module):
    """Calls a function of itself and its input."""

    def __init__(self, function: Callable[..., torch.Tensor], **parts: Any):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs):
        """Whatever the function does."""
        return self.function(self, *inputs)


def linear(function: Callable[[torch.Tensor], torch.Tensor], rows: int = 4, **parts: Any) -> tuple[Calls, tuple]:
    """A function behind a linear layer; its squares, weighted, are the loss."""

    def loss(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = function(self.linear(x))
        return (y * y * torch.linspace(0.3, 1.0, y.numel()).view(y.shape)).sum()

    return Calls(loss, linear=nn.Linear(8, 4), **parts), (torch.randn(rows, 8),)


def check(model: nn.Module, inputs: tuple, seeds: int = 8) -> Any:
    """Capture equals eager, and random plans equal the capture; returns the program."""
    program = capture(model, inputs)
    values = parity.feeds(program, model, inputs, {})
    got = parity.run_global(program, values)
    loss = model(*inputs)
    loss.backward()
    want = {("grad", n): p.grad for n, p in model.named_parameters()}
    want[next(k for k in got if k[0] == "output")] = loss.detach()
    error, where = parity.max_error(got, want)
    assert error < 1e-9, f"capture: {where} is off by {error:.1e}"
    for seed in range(seeds):
        mesh = Mesh.parse(MESHES[seed % len(MESHES)])
        local = parity.lower(program, random_plan(program, mesh, seed))
        error, where = parity.max_error(parity.run_local(local, values), got)
        assert error < 1e-9, f"seed {seed} mesh {mesh}: {where} is off by {error:.1e}"
    return program


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- attention -----------------------------------------------------------------------------------------------------


def attention(causal: bool) -> tuple[Calls, tuple]:
    """Grouped-query attention: 4 query heads on 2 key heads."""

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(4, 4, -1, 4).transpose(1, 2)

    def loss(self: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).pow(2).mean()

    parts = {"q": nn.Linear(8, 16), "k": nn.Linear(8, 8), "v": nn.Linear(8, 8)}
    return Calls(loss, **parts), (torch.randn(4, 4, 8),)


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_query_attention(causal):
    """The gradient of a key head is the sum over the query heads of its group, wherever those lie."""
    check(*attention(causal))


def test_grouped_query_attention_under_a_forced_strategy():
    model, inputs = attention(True)
    program = capture(model, inputs)
    values = parity.feeds(program, model, inputs, {})
    found = plan(program, Mesh.parse("dp=2,tp=2"), device="cpu", constraints={"dp": "zero3", "tp": "tp_sp"})
    local, _ = passes.lower(program, found, rule_for)
    error, where = parity.max_error(parity.run_local(local, values), parity.run_global(program, values))
    assert error < 1e-9, f"{where} is off by {error:.1e}"


# ---- rules found by running ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3.0, 0.0])
@pytest.mark.parametrize("rows", [[0, 2], [0, 1, 1, 3, 0, 0, 1, 1]])
def test_index_fill_is_no_maximum(rows, value):
    """Of positive numbers and a bigger value, the filled tensor is the maximum of what shards of the index give."""
    program = check(*linear(lambda y: y.index_fill(0, torch.tensor(rows), value)))
    filled = [n for n in program.gm.graph.nodes if is_op(n) and op_name(n).startswith("aten.index_fill")]
    assert filled and all(rule_source(n) != "table" for n in filled), "no longer a test of discovery"


@torch.library.custom_op("adversarial::bounded_sum", mutates_args=())
def bounded_sum(x: torch.Tensor) -> torch.Tensor:
    """A sum for small or positive numbers only."""
    return x.clamp(-20, 20).sum(0).clamp_min(0)


@bounded_sum.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[1:])


def test_what_holds_of_small_positive_numbers_is_no_rule():
    model = Calls(lambda self, x: (bounded_sum(x) * self.w).sum(), w=nn.Parameter(torch.randn(8)))
    inputs = (torch.randn(4, 8) * 30,)
    program = check(model, inputs)
    node = next(n for n in program.gm.graph.nodes if op_name(n).startswith("adversarial"))
    rule = rule_for(node).rule
    assert not rule.plus and not rule.linear, str(rule)


# ---- capture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.linalg.inv(y + 9 * torch.eye(4)),
        lambda y: torch.linalg.solve(y + 9 * torch.eye(4), y),
        lambda y: torch.linalg.cholesky(y @ y.T + torch.eye(4)),
    ],
    ids=["inv", "solve", "cholesky"],
)
def test_linear_algebra_that_checks_for_errors(function):
    check(*linear(function))


def test_conjugates_travel():
    """Transforms of Hermitian input leave lazy conjugates, which cannot be seen as pairs of real numbers."""
    check(*linear(lambda y: torch.fft.hfft(torch.complex(y, y.flip(0)))))


def test_imaginary_part_of_a_conjugate():
    check(*linear(lambda y: (torch.complex(y, y.flip(0)).conj() * torch.polar(y.exp(), y)).conj().imag))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Calls(lambda s, i: s.e(i).sum(), e=nn.Embedding(8, 4, max_norm=1.0)), "changes parameter 'e.weight'"),
        (
            lambda: Calls(lambda s, i: F.multilabel_margin_loss(s.e(i[:4]), i.view(2, 4)[:1].expand(4, 4)),
                          e=nn.Embedding(8, 4)),
            "multilabel_soft_margin_loss",
        ),
    ],
    ids=["max_norm", "multilabel_margin"],
)  # fmt: skip
def test_refused_with_the_remedy(make, message):
    with pytest.raises(CaptureError, match=message):
        capture(make(), (torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]),))


def test_parameters_in_the_same_memory_are_refused():
    model = Calls(lambda s, x: (s.a(x) + s.b(x)).sum(), a=nn.Linear(8, 4), b=nn.Linear(8, 4))
    model.b.weight.data = model.a.weight.data
    with pytest.raises(CaptureError, match=r"'a.weight' and 'b.weight' .* same memory.*ties them"):
        capture(model, (torch.randn(4, 8),))
    model.b.weight = model.a.weight
    capture(model, (torch.randn(4, 8),))


def test_a_buffer_in_the_memory_of_another_is_refused_where_it_is_written():
    def loss(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.whole.add_(1)
        return (self.a(x) * self.part).sum()

    whole = torch.ones(8)
    model = Calls(loss, a=nn.Linear(8, 4), whole=whole, part=whole[:4])
    with pytest.raises(CaptureError, match=r"'whole'.*same memory"):
        capture(model, (torch.randn(4, 8),))
    capture(model.eval(), (torch.randn(4, 8),))


def test_neighbours_in_one_allocation_are_fine():
    flat = torch.randn(36)
    model = Calls(lambda s, x: s.a(x).sum(), a=nn.Linear(8, 4))
    model.a.weight.data, model.a.bias.data = flat[:32].view(4, 8), flat[32:]
    check(model, (torch.randn(4, 8),), seeds=2)


# ---- neighbours that held ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.fft.irfft(torch.fft.rfft(y, dim=0) * torch.complex(y[:3], y[:3]), n=4, dim=0),
        lambda y: y.clone().view(-1).index_put((torch.tensor([0, 5, 5, -1]),), y[0], accumulate=True),
        lambda y: torch.zeros(4, 4).scatter_reduce(0, y.detach().argsort(0), y, "amax", include_self=False),
        lambda y: y.unfold(1, 2, 1).cumsum(0).flip(0, 2).roll((1, 2), (0, 1)),
        lambda y: F.cross_entropy(y, torch.tensor([0, 2, 1, 3]), weight=y[0].detach().abs(), label_smoothing=0.2,
                                  ignore_index=1).view(1),
        lambda y: F.group_norm(F.conv_transpose2d(y.view(2, 4, 1, 2), y.view(4, 2, 2, 1), groups=2, stride=2), 2),
    ],
    ids=["fft", "index_put", "scatter_amax", "shifts", "smoothed_weighted_loss", "grouped_transposed_conv"],
)  # fmt: skip
def test_ops_off_the_beaten_track(function):
    check(*linear(function), seeds=6)
