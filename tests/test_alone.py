"""Results that are known to lie in memory of their own: never one that does not."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import fx, nn

import autopar
from autopar.passes.alone import alone
from autopar.passes.bind import WAIT, functional
from autopar.runtime.step import Step
from autopar.runtime.taken import memory_of
from tests.zoo import ZOO

aten = torch.ops.aten


def positions(build) -> list[int]:
    """Of the results of a graph of one input."""
    graph = fx.Graph()
    graph.output(tuple(build(graph.call_function, graph.placeholder("x"))))
    return sorted(alone(fx.GraphModule(torch.nn.Module(), graph)))


def test_what_a_kernel_makes_is_alone_and_what_is_given_is_not():
    assert positions(lambda call, x: [x, call(aten.relu.default, (x,)), None]) == [1]


def test_views_of_what_is_given_are_not():
    assert positions(lambda call, x: [call(aten.view.default, (x, [2])), call(aten.reshape.default, (x, [2]))]) == []


def test_a_view_of_what_is_made_is_unless_both_are_results():
    def build(call, x):
        a, b = call(aten.relu.default, (x,)), call(aten.relu.default, (x,))
        return [call(aten.view.default, (a, [2])), call(aten.view.default, (b, [2])), b]

    assert positions(build) == [0]


def test_what_is_written_over_is_that_memory():
    def build(call, x):
        made = call(aten.relu.default, (x,))
        return [call(aten.add_.Tensor, (made, x)), call(aten.mul_.Tensor, (x, 2.0)), call(aten.neg.default, (made,))]

    assert positions(build) == [0, 2]


def test_of_several_results_each_is_by_itself():
    def build(call, x):
        both = call(aten.native_layer_norm.default, (x, [2], None, None, 1e-5))
        return [call(operator.getitem, (both, i)) for i in (0, 1, 2, 1)]

    assert positions(build) == [0, 2]


def test_pieces_of_one_tensor_are_not():
    def build(call, x):
        pieces = call(aten.split.Tensor, (call(aten.relu.default, (x,)), 1))
        return [call(operator.getitem, (pieces, i)) for i in (0, 1)]

    assert positions(build) == []


def test_of_collectives_and_ops_of_ours_nothing_is_known():
    def build(call, x):
        summed = call(WAIT, (call(functional.all_reduce.default, (x, "sum", "none")),))
        return [summed, call(lambda x: x, (x,)), call(torch.ops.autopar.arrived.default, (x,))]

    assert positions(build) == []


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet", "t5"])
def test_no_result_of_a_model_that_is_alone_shares_its_memory(name, monkeypatch):
    """Whatever is there while a graph runs: what it was given, and what it returns."""
    model, batch = ZOO[name](seed=0)
    real, make, claims, seen = Step._run, Step.__init__, [], []

    def init(self, lowered, *args, **kwargs):
        claims.extend(lowered.alone)
        make(self, lowered, *args, **kwargs)

    def run(self, graph, box):
        held = [t for t in box if isinstance(t, torch.Tensor)]  # so that nothing new comes to lie there
        results = list(real(self, graph, box))
        memory = [memory_of(t) if isinstance(t, torch.Tensor) else None for t in results]
        given = {memory_of(t) for t in held}
        for at in claims[len(seen)]:
            assert memory[at] not in given and memory.count(memory[at]) == 1
        seen.append(len(claims[len(seen)]) / len(results))
        return results

    monkeypatch.setattr(Step, "__init__", init)
    monkeypatch.setattr(Step, "_run", run)
    pm = autopar.compile(model, "dp=1", example=batch, device="cpu", check=False)
    out = pm(**batch)
    (out if isinstance(out, torch.Tensor) else out.loss).backward()
    assert len(seen) == 2 and min(seen) > 0.5


class Pieces(nn.Module):
    """Reads pieces of a tensor behind its last reader; pieces of the gradient are the gradients."""

    class Cat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return torch.cat([a, b])

        @staticmethod
        def backward(ctx, grad):
            return tuple(torch.unsafe_split(grad, 4))

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        z = x @ self.w
        a, b = torch.unsafe_chunk(z, 2, 1)
        return z + self.b + torch.cat([a * b, a], 1), Pieces.Cat.apply(self.b, self.w[:4])


def test_pieces_that_torch_calls_unsafe_are_views():
    """Their schemas do not say so: nothing is written over while they are read, and nobody's memory is added to."""
    model, x = Pieces().double(), torch.randn(4, 8, dtype=torch.float64)
    pm = autopar.compile(copy.deepcopy(model), "dp=1", example={"x": x}, device="cpu", check=False)
    given = [torch.ones(4, 8, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64)]
    for _ in range(3):
        torch.autograd.backward(list(pm(x=x)), given)
    grads = torch.autograd.grad(model(x), list(model.parameters()), given)
    for mine, plain in zip(pm.parameters(), grads):
        torch.testing.assert_close(mine.grad, 3 * plain, rtol=1e-12, atol=1e-12)
    assert all(bool((g == 1).all()) for g in given)
    for mine, plain in zip(pm(x=x), model(x)):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
