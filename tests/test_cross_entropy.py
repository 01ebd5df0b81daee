"""Cross entropy for compilers: the same values and gradients, and no logarithm of a probability is kept."""

from __future__ import annotations

import pytest
import torch
from parity import feeds, max_error, run_global, run_local
from torch import nn

import autopar
from autopar import passes
from autopar.capture import capture
from autopar.costmodel import planner
from autopar.costmodel.rules import rule_for
from autopar.mesh import Mesh
from autopar.passes import edit

ROWS, CLASSES = 6, 12
LABELS = torch.tensor([3, 0, -100, 11, 5, 3])


class Two(nn.Module):
    """Two losses of the same logits; `shown`: their logarithms are an output too."""

    def __init__(self, shown):
        super().__init__()
        self.layer, self.shown = nn.Linear(8, CLASSES), shown

    def forward(self, x, labels):
        """x: [rows, 8] -> loss, and what is shown."""
        logits = self.layer(x)
        both = nn.functional.cross_entropy(logits, labels), nn.functional.cross_entropy(logits, labels.roll(1))
        return both[0] + 0.3 * both[1], nn.functional.log_softmax(logits, 1) if self.shown else logits


class Head(nn.Module):
    """A layer and the cross entropy of what it gives; the logits are an output, as those of language models are."""

    def __init__(self, log=False, shape=(CLASSES,), **options):
        super().__init__()
        self.layer, self.log, self.shape, self.options = nn.Linear(8, CLASSES), log, shape, options

    def forward(self, x, labels):
        """x: [rows, 8] -> loss (if `log`, with the squares of the logarithms), logits."""
        logits = self.layer(x)
        out = logits.view(len(x), *self.shape)
        options = dict(self.options)
        if options.pop("widen", False):
            out = out.float()
        if self.log:
            log_p = nn.functional.log_softmax(out, 1)
            return nn.functional.nll_loss(log_p, labels) + log_p.square().sum(), logits
        return nn.functional.cross_entropy(out, labels, **options), logits


class Few(nn.Module):
    """Two classes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x, labels):
        """x: [rows, 8] -> loss."""
        return nn.functional.cross_entropy(self.layer(x), labels)


def lowered(model, labels=LABELS, dtype=torch.float64, mesh="dp=1", constraints=None):
    """(program, feeds, local program for a compiler)."""
    batch = {"x": torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0)).to(dtype), "labels": labels}
    model = model.to(dtype)
    program = capture(model, (), batch)
    plan = planner.plan(program, Mesh.parse(mesh), device="cpu", constraints=constraints)
    return program, feeds(program, model, (), batch), passes.lower(program, plan, rule_for, fuses=True)[0]


def ops(local):
    return [str(n.target) for n in local.gm.graph.nodes if n.op == "call_function"]


def saved(local):
    """What is kept for the backward that is as large as the logits."""
    shapes = {n.name: edit.shape(n) for n in local.gm.graph.nodes if edit.is_tensor(n)}
    return [name for name in passes.cut(local, fuses=True).saved if shapes[name] == (ROWS, CLASSES)]


def gone(local):
    return not any("log_softmax" in op or "nll_loss_backward" in op for op in ops(local))


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}, {"ignore_index": -1}]
)
@pytest.mark.parametrize("mesh", ["dp=1", "dp=2"])
def test_values_are_the_same(options, mesh):
    torch.manual_seed(0)
    labels = LABELS if "ignore_index" not in options else LABELS.clamp_min(0)
    constraints = {"dp": "ddp"} if mesh == "dp=2" else None
    program, values, local = lowered(Head(**options), labels, mesh=mesh, constraints=constraints)
    assert gone(local)
    error, where = max_error(run_local(local, values), run_global(program, values))
    assert error < 1e-13, where


def test_large_logits():
    """The largest is taken off before anything is rounded."""
    torch.manual_seed(0)
    program, values, local = lowered(Head(), dtype=torch.float32)
    at = next(i for i, s in enumerate(program.sources) if s.name == "layer.bias")
    values[at] += 1e4
    got, want = run_local(local, values), run_global(program, values)
    assert gone(local) and max(t.abs().max() for t in want.values()) > 9e3
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_a_row_without_a_label_has_no_gradient_and_a_broken_one_keeps_its_own():
    torch.manual_seed(0)
    program, values, local = lowered(Head())
    at = next(i for i, s in enumerate(program.sources) if s.name == "x")
    for broken in (2, 4):  # ignored, counted
        values[at][broken] = torch.inf
        got, want = run_local(local, values), run_global(program, values)
        for key, value in want.items():
            torch.testing.assert_close(got[key], value, equal_nan=True)


def test_two_losses_of_the_same_logits():
    torch.manual_seed(0)
    program, values, local = lowered(Two(shown=False))
    assert gone(local) and sum("amax" in op for op in ops(local)) == 1
    error, where = max_error(run_local(local, values), run_global(program, values))
    assert error < 1e-13, where
    assert saved(local) == [edit.output_node(local.gm).args[0][1].name]


def test_logarithms_that_are_there_anyway_are_read():
    torch.manual_seed(0)
    program, values, local = lowered(Two(shown=True))
    assert not gone(local) and saved(local) == [edit.output_node(local.gm).args[0][1].name]
    error, where = max_error(run_local(local, values), run_global(program, values))
    assert error < 1e-13, where


@pytest.mark.parametrize("split", [{"*nll*": "tp:k"}, {"*nll*": "tp:k", "*log_softmax*": "tp:b"}])
def test_split_classes_stay_as_they_are(split):
    torch.manual_seed(0)
    program, values, local = lowered(Head(), mesh="tp=2", constraints=split)
    assert any("nll_loss_backward" in op for op in ops(local))
    error, where = max_error(run_local(local, values), run_global(program, values))
    assert error < 1e-13, where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widen", [False, True])
def test_half_precision(dtype, widen):
    torch.manual_seed(0)
    program, values, local = lowered(Head(widen=widen), dtype=dtype)
    assert gone(local)
    got, want = run_local(local, values), run_global(program, values)
    for key, value in want.items():
        assert got[key].dtype is value.dtype, key
        torch.testing.assert_close(got[key], value, rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize("widen", [False, True])
def test_nothing_as_large_as_the_logits_is_kept_but_they(widen):
    _, _, local = lowered(Head(widen=widen), dtype=torch.bfloat16 if widen else torch.float32)
    assert saved(local) == [edit.output_node(local.gm).args[0][1].name]


@pytest.mark.parametrize(
    "model, labels",
    [
        (Head(weight=torch.rand(CLASSES).double()), LABELS.clamp_min(0)),  # weights of classes
        (Head(log=True), LABELS),  # the logarithms have another gradient
        (Head(shape=(4, 3)), torch.tensor([[1, 0, 3]] * ROWS)),  # a class for each of three places
        (Few(), LABELS.clamp(-100, 1)),  # what is kept in their place would be as much
        (Head(label_smoothing=0.1), LABELS),
        (Head(), torch.rand(ROWS, CLASSES).double()),  # probabilities
    ],
)
def test_others_stay_as_they_are(model, labels):
    program, values, local = lowered(model, labels)
    assert any("log_softmax_backward" in op for op in ops(local))
    error, where = max_error(run_local(local, values), run_global(program, values))
    assert error < 1e-13, where


def test_compiled():
    torch.manual_seed(0)
    model = Head()
    x = torch.randn(ROWS, 8)
    module = autopar.compile(model, "dp=1", example=(x, LABELS), backend="inductor")
    for forward in (model, module):
        forward(x, LABELS)[0].backward()
    torch.testing.assert_close(module(x, LABELS), model(x, LABELS))
    for name, param in module.named_parameters():
        torch.testing.assert_close(param.grad, model.get_parameter(name).grad)
