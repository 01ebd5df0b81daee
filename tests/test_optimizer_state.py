"""What an optimizer keeps and needs is measured of its class: state to the byte, the peak of a step within 3 %."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from harness import Ranks
from live_bytes import LiveBytes, peak_of_step
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.capture import capture
from autopar.costmodel.measure_optimizer import FOREACH, measure, optimizer_text
from autopar.costmodel.memory import Policy
from autopar.costmodel.optimizers import OPTIMIZERS, Optimizer
from autopar.costmodel.price import price
from autopar.errors import ConstraintError, PlanError
from autopar.plan import Plan

part, optim = functools.partial, torch.optim


class Blockwise(optim.Optimizer):
    """Momentum kept in eight bits with one scale per block of 64 elements (Dettmers et al., 2022, section 2), whole
    where a parameter has fewer than 1,000 elements or no number of whole blocks."""

    block = 64

    def __init__(self, params, lr=1e-2, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if p.numel() < 1000 or p.numel() % self.block:
                    momentum = state.setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(group["momentum"]).add_(p.grad)
                    p.sub_(momentum, alpha=group["lr"])
                    continue
                old = 0.0
                if state:
                    old = (state["code"].float() - 128) / 127 * state["scale"][:, None]
                blocks = p.grad.float().reshape(-1, self.block) + group["momentum"] * old
                scale = blocks.abs().amax(1)
                state["scale"] = scale
                state["code"] = (blocks / scale[:, None].clamp(min=1e-30) * 127 + 128).round().to(torch.uint8)
                p.sub_(blocks.reshape(p.shape).to(p.dtype), alpha=group["lr"])


class Blocks(Blockwise):
    """All parameters in eight bits, the last block padded."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                n = p.numel()
                flat = nn.functional.pad(p.grad.float().flatten(), (0, -n % self.block)).reshape(-1, self.block)
                scale = flat.abs().amax(1)
                self.state[p] = {
                    "code": (flat / scale[:, None].clamp(min=1e-30) * 127 + 128).round().to(torch.uint8).flatten()[:n],
                    "scale": scale,
                }
                p.sub_(p.grad, alpha=group["lr"])


class Odd(optim.SGD):
    """State that grows with the square root of a parameter."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"root": torch.zeros(math.isqrt(p.numel()) + 3)}


def mixed(params):
    kinds = ([p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2])
    return [optim.Muon(kinds[0]), optim.AdamW(kinds[1])]


RECIPES = {
    "sgd": optim.SGD,
    "momentum": part(optim.SGD, momentum=0.9),
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "amsgrad": part(optim.AdamW, amsgrad=True),
    "nadam": optim.NAdam,
    "radam": optim.RAdam,
    "adamax": optim.Adamax,
    "rmsprop": optim.RMSprop,
    "rmsprop, centered, with momentum": part(optim.RMSprop, centered=True, momentum=0.5),
    "adagrad": optim.Adagrad,
    "adadelta": optim.Adadelta,
    "asgd": optim.ASGD,
    "adafactor": optim.Adafactor,
    "rprop": optim.Rprop,
    "fused": part(optim.AdamW, fused=True),
    "foreach": part(optim.Adam, foreach=True),
    "muon and adamw": mixed,
    "8 bits": Blockwise,
    "8 bits, padded": Blocks,
}
#: Of models, the last two with as many elements as a border, and one fewer.
SHAPES = [(3,), (7, 9), (64, 100), (512, 48), (5, 4, 3, 3), (32, 16, 3, 3), (16, 63), (16, 64)]


def state_bytes(recipe, shapes, dtype):
    """Bytes of state after one step, by parameter."""
    params = [nn.Parameter(torch.full(s, 0.5, dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(dtype)
    made = recipe(params)
    optimizers = made if isinstance(made, list) else [made]
    for optimizer in optimizers:
        optimizer.step()
    return [
        sum(v.nbytes for o in optimizers for v in o.state.get(p, {}).values() if isinstance(v, torch.Tensor))
        for p in params
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_of_state(name):
    found = measure(RECIPES[name])
    assert Optimizer.parse(str(found)) == found
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        told = [found.state(s, dtype.itemsize) for s in SHAPES]
        assert told == state_bytes(RECIPES[name], SHAPES, dtype), (name, str(found))


def test_muon_is_of_matrices():
    found = measure(optim.Muon)
    matrices = [s for s in SHAPES if len(s) == 2]
    assert [found.state(s, 4) for s in matrices] == state_bytes(optim.Muon, matrices, torch.float32)
    with pytest.raises(ConstraintError, match=r"Muon says nothing of a parameter piece of shape \(3,\)"):
        found.state((3,), 4)
    with pytest.raises(ConstraintError, match="give as optimizer_class a function of the parameters that makes all"):
        autopar.plan(net(), "dp=2", example=X, loss=loss, optimizer_class=optim.Muon)


def test_laws_read_well():
    assert str(measure(optim.Adafactor)).startswith("adafactor: dims>=2 -> 1*p*rows + 1*p*cols + 4; 1*p*n + 4; scratch")
    assert str(measure(Blockwise)).startswith("Blockwise: n>=1024 n%64 -> 1*n + 4*n/64; 1*p*n; scratch ")
    assert str(measure(Blocks)).startswith("Blocks: 1*n + 4*n/64; ")
    assert str(measure(part(optim.AdamW, fused=True))) == "AdamW: 2*p*n + 4"


def test_the_table_is_what_is_measured():
    for name, recipe in RECIPES.items():
        if name in OPTIMIZERS:
            assert measure(recipe) == OPTIMIZERS[name]
    assert measure(RECIPES["momentum"]) == OPTIMIZERS["sgd_momentum"]
    assert optimizer_text(optim.AdamW) == "adamw" and optimizer_text(RECIPES["amsgrad"]) == "amsgrad"


def test_gpus_update_all_at_once_where_torch_does():
    """Torch chooses foreach by itself in all classes that have it, but in Adafactor (says its documentation)."""
    for cls in vars(optim).values():
        if isinstance(cls, type) and "foreach" in cls.__init__.__code__.co_varnames:
            assert (cls in FOREACH) == (cls is not optim.Adafactor), cls


def test_nothing_is_left_behind():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    with torch.device("meta"), torch.no_grad():
        measure(optim.AdamW)
    assert torch.equal(torch.rand(2), want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Odd, "what Odd keeps follows no law that is known: elements of its root: .* optimizer_class='NAME: BYTES"),
        (optim.LBFGS, "LBFGS cannot be stepped on small tensors to see what it keeps .*closure"),
        (lambda params: None, "cannot be stepped .*TypeError: it has made None, which is no torch.optim.Optimizer"),
        (7, "optimizer_class=7 is neither a name nor a class nor a function"),
        ("mine: 12 n", "cannot read optimizer 'mine: 12 n': '12 n' is no number of bytes; write bytes of state"),
        ("mine: n/0", "blocks of nothing"),
        ("mine: m>3 -> n", "'m>3' is no condition"),
        ("mine", "no optimizer 'mine' is known; choose one of adamw"),
        (": n", "write a name, a colon and bytes"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ConstraintError, match=message):
        autopar.plan(net(), "dp=2", example={"input": torch.ones(2, 64)}, optimizer_class=given)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 96), nn.Tanh(), nn.Linear(96, 640))


def loss(output, target):
    return (output - target).pow(2).mean()


X = {"input": torch.ones(2, 64), "target": torch.zeros(2, 640)}


def test_a_plan_keeps_the_law(tmp_path):
    plan = autopar.plan(net(), "dp=2", example=X, loss=loss, optimizer_class=Blockwise, constraints={"dp": "ddp"})
    shapes = [tuple(p.shape) for p in net().parameters()]
    assert plan.predicted["memory"]["optimizer"] == sum(state_bytes(Blockwise, shapes, torch.float32))
    path = tmp_path / "plan.json"
    plan.save(path)
    read = Plan.load(path)
    assert read == plan and read.optimizer.startswith("Blockwise: n>=1024 n%64 -> ")
    program = capture(net(), (), X, loss=loss)
    assert price(program, read).memory["optimizer"] == plan.predicted["memory"]["optimizer"]
    by_hand = autopar.plan(net(), "dp=2", example=X, loss=loss, optimizer_class="mine: 12*n", constraints={"dp": "ddp"})
    assert by_hand.predicted["memory"]["optimizer"] == 12 * sum(math.prod(s) for s in shapes)
    with pytest.raises(PlanError, match="the plan is for optimizer 'mine: 12 n'; cannot read"):
        autopar.compile(net(), "dp=1", example=X, loss=loss, plan=_with(plan, "mine: 12 n"))


def _with(plan, optimizer):
    return Plan.from_json(plan.to_json().replace(plan.optimizer, optimizer).replace('"dp=2"', '"dp=1"'))


def test_the_recipe_of_train_step_is_measured():
    pm = autopar.compile(net(), "dp=1", example=X, loss=loss, optimizer=part(optim.SGD, lr=0.1))
    assert pm.plan.optimizer == "sgd"
    pm = autopar.compile(net(), "dp=1", example=X, loss=loss, optimizer=optim.SGD, optimizer_class="adamw")
    assert pm.plan.optimizer == "adamw"


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW], ids=lambda cls: cls.__name__)
def test_peak_of_a_step(cls, options):
    _peak_of_a_step(cls, options)


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
def test_peak_of_a_step_of_a_class_without_a_fused_form(options):
    _peak_of_a_step(optim.NAdam, options)


def _peak_of_a_step(cls, options):
    recipe = part(cls, **options)
    pm = autopar.compile(net(), "dp=1", example=X, loss=loss, device="cpu", optimizer_class=recipe)
    optimizer = recipe(pm.parameters())

    def step() -> None:
        pm(X["input"], target=X["target"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert pm.plan.predicted["peak_bytes"] == pytest.approx(peak_of_step(pm, optimizer, X, step), rel=0.03)


def updated(options):
    """On pieces: bytes of state, and the most that an update makes besides; and both as predicted."""
    recipe = part(optim.AdamW, **options)
    pm = autopar.compile(net(), "dp=2", example=X, loss=loss, constraints={"dp": "zero3"}, optimizer_class=recipe)
    optimizer = recipe(pm.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        pm(X["input"], target=X["target"]).backward()
        state = [v for s in optimizer.state.values() for v in s.values()]
        held = [*pm.parameters(), *(p.grad for p in pm.parameters()), *state]
        with LiveBytes(held) as live:
            before = live.now
            optimizer.step()
    pieces = [(p.to_local().numel(), 4) for p in pm.parameters()]
    kept = sum((v.to_local() if isinstance(v, DTensor) else v).nbytes for v in state)
    told = Policy(True, optimizer=pm.plan.optimizer).temporaries(pieces, gpu=False)
    return kept, live.peak - before, pm.plan.predicted["memory"]["optimizer"], told


def test_updates_of_pieces():
    with Ranks(2) as ranks:
        for options in ({}, {"foreach": True}, {"fused": True}):
            for kept, made, kept_told, made_told in ranks.run(updated, options):
                assert kept == kept_told
                assert made == pytest.approx(made_told, rel=0.03, abs=200)  # numbers of four bytes


def test_temporaries_on_a_gpu():
    pieces = [(100, 4), (300, 4), (200, 4)]
    assert Policy(True).temporaries(pieces, gpu=False) == 4 * (2 * 300 + 100)
    assert Policy(True).temporaries(pieces, gpu=True) == 4 * 600
    assert Policy(True, optimizer="sgd").temporaries(pieces, gpu=True) == 0
