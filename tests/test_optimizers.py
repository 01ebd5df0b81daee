"""Torch's optimizers on sharded parameters: each trains like the plain model, or is refused before its first step."""

from __future__ import annotations

import pytest
import torch
from harness import Failure, Ranks
from torch import nn

import autopar

ZERO3, WHOLE = {"dp": "zero3"}, {"dp": "zero3", "*": "replicate"}
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)).double()


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def compiled(constraints=ZERO3):
    return autopar.compile(net(), "dp=2", example={"input": X, "target": X}, loss=loss, constraints=constraints)


def loss(output, target):
    return (output - target.flip(0)).pow(2).mean()


def trained(cases, constraints):
    """Largest difference to the plain model after some steps, by case."""
    out = []
    for name, options in cases:
        states = []
        for module in (compiled(constraints), net()):
            matrices = [p for p in module.parameters() if p.dim() == 2 or name != "Muon"]
            optimizer = getattr(torch.optim, name)(matrices, lr=1e-2, **options)

            def closure(module=module, optimizer=optimizer):
                optimizer.zero_grad()
                value = loss(module(X), X) if isinstance(module, nn.Sequential) else module(X, target=X)
                value.backward()
                return value

            for _ in range(3):
                optimizer.step(closure)
            plain = isinstance(module, nn.Sequential)
            states.append(module.state_dict() if plain else module.full_state_dict())
            if not plain:
                net().load_state_dict(states[-1])  # what a plain model can load
        out.append(max((states[0][k] - states[1][k]).abs().max().item() for k in states[0]))
    return out


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as group:
        yield group


EXACT = [
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"foreach": False}),
    ("Adam", {"amsgrad": True}),
    ("Adam", {"fused": True}),
    ("AdamW", {"fused": True}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {}),
    ("Adadelta", {}),
    ("ASGD", {}),
    ("LBFGS", {}),
    ("Adafactor", {}),
    ("Rprop", {}),
    ("Adagrad", {"fused": True}),
    ("SGD", {"momentum": 0.9, "fused": True}),
]


def test_optimizers_that_work_on_shards(ranks):
    for differences in ranks.run(trained, EXACT, ZERO3):
        assert {case[0]: d for case, d in zip(EXACT, differences) if d > 1e-11} == {}


def test_optimizers_that_need_whole_parameters(ranks):
    cases = [("Adafactor", {}), ("Muon", {})]  # Muon: bit for bit only so
    for differences in ranks.run(trained, cases, WHOLE):
        assert max(differences) < 1e-12


class Own(torch.optim.Adafactor):
    """A class of the user's, which may do anything."""


def step():
    """One step; parameters after an error are as before it."""
    pm = compiled(ZERO3)
    before = pm.full_state_dict()
    pm(X, target=X).backward()
    optimizer = Own(pm.parameters())
    try:
        optimizer.step()
    finally:
        assert all(torch.equal(before[k], v) for k, v in pm.full_state_dict().items())


def test_refused_before_the_first_step(ranks):
    for outcome in ranks.outcomes(step):
        assert isinstance(outcome, Failure) and outcome.kind == "RuntimeUseError", outcome
        assert outcome.message.startswith("Own cannot update sharded parameters: it takes norms of each rank's piece")


def of_others():
    """Parameters that are not ours are none of our business."""
    compiled()
    model = net()
    model(X).sum().backward()
    for optimizer in (torch.optim.Adafactor(model.parameters()), torch.optim.SGD(model.parameters(), fused=True)):
        optimizer.step()


def test_plain_parameters_are_left_alone(ranks):
    ranks.run(of_others)
