"""Optimizers that step local pieces train as torch does over DTensors, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from harness import Ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.errors import RuntimeUseError
from autopar.runtime.local_step import ELEMENTWISE
from tests.test_optimizers import WHOLE, ZERO3, X, compiled, loss, net

CASES = [
    ("Adadelta", {}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("Adagrad", {"fused": True}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"fused": True}),
    ("Adamax", {}),
    ("AdamW", {}),
    ("AdamW", {"foreach": True, "maximize": True}),
    ("ASGD", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Rprop", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "fused": True}),
]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as started:
        yield started


class Ops(TorchDispatchMode):
    """Counts ops on DTensors."""

    def __init__(self):
        super().__init__()
        self.on_dtensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            self.on_dtensors += 1
            return NotImplemented
        return func(*args, **(kwargs or {}))


def backward(module, optimizer):
    optimizer.zero_grad()
    value = module(X, target=X) if isinstance(module, autopar.ParallelModule) else loss(module(X), X)
    value.backward()
    return value


def trained(name, options, constraints):
    """Largest difference to the plain model after three steps, and the ops on DTensors within the third."""
    states, counted = [], 0
    for module in (compiled(constraints), net()):
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=1e-2, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            backward(module, optimizer)
            with Ops() as ops:
                optimizer.step()
            scheduler.step()
            counted = max(counted, ops.on_dtensors)
        ours = isinstance(module, autopar.ParallelModule)
        states.append(module.full_state_dict() if ours else module.state_dict())
    return max((states[0][k] - states[1][k]).abs().max().item() for k in states[0]), counted


@pytest.mark.parametrize("constraints", [ZERO3, WHOLE], ids=["sharded", "whole"])
def test_every_class_trains_like_the_plain_model(ranks, constraints):
    assert {getattr(torch.optim, name) for name, _ in CASES} == ELEMENTWISE
    for name, options in CASES:
        for difference, ops in ranks.run(trained, name, options, constraints):
            assert difference < 1e-11, (name, options, difference)
            assert ops == 0, f"{name}: {ops} ops went through DTensor"


def checkpointed():
    """State is DTensors from outside, and what is loaded is what goes on."""
    module = compiled(ZERO3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    backward(module, optimizer)
    optimizer.step()
    for p in module.parameters():
        entry = optimizer.state[p]
        assert isinstance(entry["exp_avg"], DTensor) and entry["exp_avg"].placements == p.placements
        assert entry["exp_avg"].shape == p.shape and not isinstance(entry["step"], DTensor)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(module.state_dict())
    results = []
    for _ in range(2):  # from the same state twice, the second time through load_state_dict
        backward(module, optimizer)
        optimizer.step()
        results.append(module.full_state_dict())
        module.load_state_dict(weights)
        optimizer.load_state_dict(saved)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_checkpoints(ranks):
    ranks.run(checkpointed)


def stepped(module, fused):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, fused=fused)
    backward(module, optimizer)
    optimizer.step()
    return optimizer


def from_another_plan(fused):
    """State laid out by another plan, or by none, is brought over by torch, not taken for a piece."""
    plain = net()
    optimizer = stepped(plain, fused)
    backward(plain, optimizer)
    optimizer.step()
    equal = 0
    for source in (net(), compiled(WHOLE), compiled(ZERO3)):
        state = stepped(source, fused).state_dict()
        for constraints in (WHOLE, ZERO3):
            module = compiled(constraints)
            optimizer = stepped(module, fused)
            optimizer.load_state_dict(copy.deepcopy(state))
            backward(module, optimizer)
            try:
                optimizer.step()
            except RuntimeError as error:  # torch says that it cannot
                assert "mixed torch.Tensor and DTensor" in str(error), error
                continue
            got = module.full_state_dict()
            for key, want in plain.state_dict().items():
                torch.testing.assert_close(got[key], want, rtol=1e-10, atol=1e-12)
            equal += 1
    return equal


@pytest.mark.parametrize("fused", [False, True])
def test_state_of_another_plan(ranks, fused):
    # Between plans always; from a plain model into one plan at least, where torch takes that.
    assert min(ranks.run(from_another_plan, fused)) >= 4


def subclassed():
    """Classes of one's own that DTensor cannot step are refused before anything changes; differentiable ones too."""

    class Own(torch.optim.Rprop):
        pass

    module = compiled(ZERO3)
    for made in (Own, functools.partial(torch.optim.Rprop, differentiable=True)):
        optimizer = made(module.parameters(), lr=1e-2)
        backward(module, optimizer)
        before = module.full_state_dict()
        with pytest.raises(RuntimeUseError, match=r"Rprop|Own can step DTensor parameters only where"):
            optimizer.step()
        assert all(torch.equal(before[k], v) for k, v in module.full_state_dict().items())


def test_what_cannot_step_pieces_is_refused(ranks):
    ranks.run(subclassed)


def mixed():
    """A closure now and then, parameters of one's own, a hook that replaces gradients, a frozen parameter."""
    states = []
    for module in (compiled(ZERO3), net()):
        own = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.AdamW([*module.parameters(), own], lr=1e-2)
        names = []

        def shrink(opt, args, kwargs, names=names):
            names.append(type(opt).__name__)
            for p in opt.param_groups[0]["params"]:
                opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"] * 0.5

        optimizer.register_step_post_hook(shrink)

        def halve(opt, args, kwargs):
            for p in opt.param_groups[0]["params"]:
                if p.grad is not None:
                    p.grad = p.grad * 0.5

        def closure(module=module, optimizer=optimizer):
            return backward(module, optimizer)

        for step in range(4):
            if step == 2:
                optimizer.register_step_pre_hook(halve)
            backward(module, optimizer)
            own.grad = own.detach() * 2
            if step == 1:
                optimizer.step(closure)
            else:
                optimizer.step()
        assert names == ["AdamW"] * 4
        ours = isinstance(module, autopar.ParallelModule)
        states.append({**(module.full_state_dict() if ours else module.state_dict()), "own": own.detach()})
    for key, want in states[1].items():
        torch.testing.assert_close(states[0][key], want, rtol=1e-11, atol=1e-12)


def test_mixtures_and_hooks(ranks):
    ranks.run(mixed)


def guarded():
    """Autograd hears of the step; an error inside it leaves the optimizer as it was."""
    module = compiled(ZERO3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    value = module(X, target=X)
    value.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    optimizer.param_groups[0]["lr"] = "fast"
    before = [p.full_tensor().clone() for p in module.parameters()]
    with pytest.raises((TypeError, RuntimeError)):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, module.parameters()))
    optimizer.step()
    assert all(torch.equal(a, p.full_tensor()) for a, p in zip(before, module.parameters()))


def test_errors_and_versions(ranks):
    ranks.run(guarded)


def told():
    """A loss on parameters, made before the step, is stale after it, with and without state."""
    for momentum in (0.0, 0.9):
        module = compiled(ZERO3)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2, momentum=momentum)
        backward(module, optimizer)
        penalty = sum(p.pow(2).sum() for p in module.parameters())
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            penalty.backward()


def test_autograd_is_told(ranks):
    ranks.run(told)


def unusual(name):
    """A parameter listed twice; gradients of another dtype, where the optimizer takes them."""
    states = []
    for module in (compiled(ZERO3), net()):
        several = list(module.parameters())
        if name == "SGD":
            several[0].grad_dtype = torch.float32
        optimizer = getattr(torch.optim, name)(several + several[:1], lr=1e-2)
        for _ in range(2):
            backward(module, optimizer)
            optimizer.step()
        ours = isinstance(module, autopar.ParallelModule)
        states.append(module.full_state_dict() if ours else module.state_dict())
    for key, want in states[1].items():
        torch.testing.assert_close(states[0][key], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_unusual_parameters(ranks, name):
    ranks.run(unusual, name)
