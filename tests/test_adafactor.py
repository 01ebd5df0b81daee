"""Adafactor steps pieces with the norms of whole parameters: it trains as on one device, however parameters are cut."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import Ranks
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.costmodel.optimizers import OPTIMIZERS

X = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(3)).double()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.linear = nn.Linear(6, 12)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12))
        self.double()

    def forward(self, x):
        return self.linear(torch.tanh(self.conv(x))) * self.scale


def loss(output, target):
    return (output - torch.sin(target.mean())).pow(2).mean()


LAYOUTS = {
    "zero3": {"a": "zero3", "b": "zero3"},
    "columns": {"linear.weight": "shard(1, a)", "conv.weight": "shard(1, b)", "scale": "shard(0, a)"},
    "both": {
        "linear.weight": "shard(0, a)",
        "linear.w*": "shard(1, b)",
        "conv.weight": "shard(0, b)",
        "conv.w*": "shard(1, a)",
    },
    "whole": {"*": "replicate"},
}
OPTIONS = [{}, {"weight_decay": 0.1, "maximize": True, "lr": 1e-3}, {"foreach": True, "d": 2.0, "eps": (1e-6, 1e-2)}]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as group:
        yield group


def compiled(layout):
    return autopar.compile(Net(), "a=2,b=2", example={"x": X, "target": X}, loss=loss, constraints=LAYOUTS[layout])


def backward(module):
    module.zero_grad()
    value = module(X, target=X) if isinstance(module, autopar.ParallelModule) else loss(module(X), X)
    value.backward()
    return value


def trained(layout, options):
    """Largest difference to the plain model after four steps, one with a closure; pieces; bytes of state and told."""
    states = []
    pm = compiled(layout)
    for module in (pm, Net()):
        optimizer = torch.optim.Adafactor(module.parameters(), **options)
        for number in range(4):
            if number == 2:
                optimizer.step(lambda module=module: backward(module))
            else:
                backward(module)
                optimizer.step()
        if module is pm:
            kept = [v.to_local() if isinstance(v, DTensor) else v for s in optimizer.state.values() for v in s.values()]
            laid = {k: v.shape for s in optimizer.state.values() for k, v in s.items() if isinstance(v, DTensor)}
            pieces = [p.to_local() for p in pm.parameters()]
        states.append(module.full_state_dict() if module is pm else module.state_dict())
    told = sum(OPTIMIZERS["adafactor"].state(tuple(p.shape), p.element_size()) for p in pieces)
    off = max((states[0][k] - states[1][k]).abs().max().item() for k in states[0])
    moved = min((states[1][k] - v).abs().max().item() for k, v in Net().state_dict().items())
    return off, moved, sum(p.numel() for p in pieces), sum(v.nbytes for v in kept), told, sorted(laid)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_like_the_plain_model(ranks, layout):
    for options in OPTIONS:
        for off, moved, pieces, kept, told, laid in ranks.run(trained, layout, options):
            assert off < 1e-12 < 1e-4 < moved, (layout, options)
            assert kept == told
            if layout != "whole":
                assert pieces < sum(p.numel() for p in Net().parameters())
                assert laid == ["col_var", "row_var", "variance"]


def checkpointed():
    """What is loaded is what goes on."""
    pm = compiled("both")
    optimizer = torch.optim.Adafactor(pm.parameters())
    backward(pm)
    optimizer.step()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(pm.state_dict())
    results = []
    for _ in range(2):
        backward(pm)
        optimizer.step()
        results.append(pm.full_state_dict())
        pm.load_state_dict(weights)
        optimizer.load_state_dict(saved)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert not torch.equal(results[0]["scale"], weights["scale"].full_tensor())


def test_checkpoints(ranks):
    ranks.run(checkpointed)
