"""What the backward computes again: the same numbers in less memory, which ops by brute force, and what is refused."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar import report
from autopar.capture import capture
from autopar.costmodel import planner, remat_search
from autopar.costmodel.items import items_of
from autopar.costmodel.legal import plan_specs
from autopar.costmodel.liveness import Steps
from autopar.costmodel.memory import Policy
from autopar.costmodel.planner import random_plan
from autopar.costmodel.remat import Chosen
from autopar.costmodel.remat_search import Rematerialiser
from autopar.costmodel.rules import rule_for
from autopar.costmodel.tape import record
from autopar.errors import InfeasibleError, PlanError
from autopar.graph import BACKWARD, FORWARD, Program, is_op, pattern
from autopar.mesh import Mesh
from autopar.passes.insert import insert_collectives
from autopar.plan import Plan
from autopar.recompute import copy_of, original, present, recomputed
from tests.harness import Ranks
from tests.live_bytes import peak_of_training
from tests.parity import feeds, max_error, run_global, run_local
from tests.pipeline_runs import example
from tests.test_liveness import measured
from tests.trained import captured_once, train, worst
from tests.widen import widen_to_float64
from tests.zoo import ZOO


def ops(program: Program) -> list[str]:
    """Addresses of the ops of the forward."""
    return [n.meta["address"] for n in program.gm.graph.nodes if is_op(n) and n.meta["phase"] == FORWARD]


def some(program: Program, seed: int, part: float = 0.5, hows: Sequence[str] = ("recompute",)) -> dict[str, str]:
    """About a part of the forward's ops, by address, and what becomes of each."""
    draw = random.Random(seed)
    picked = [a for a in ops(program) if draw.random() < part]
    return {a: draw.choice(hows) for a in picked}


def traced(name: str, **options: Any) -> tuple[Program, nn.Module, dict[str, torch.Tensor]]:
    model, batch = example(name, **options)
    return capture(model, (), batch), model, batch


# ---- the program ---------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)).sin()).sum()


def test_copies_stand_before_their_first_reader():
    program = capture(Tiny().double(), (torch.randn(2, 4, dtype=torch.float64),), {})
    again = recomputed(program, {"fwd:/tanh#0": "recompute", "fwd:/sin#0": "recompute"})
    lines = [n for n in again.gm.graph.nodes if is_op(n) and n.meta["phase"] == BACKWARD]
    names = [n.meta["address"] for n in lines]
    assert names.index("bwd:/tanh#0~") < names.index("bwd:/sin#0~")
    for name in ("bwd:/tanh#0~", "bwd:/sin#0~"):
        (copied,) = (n for n in lines if n.meta["address"] == name)
        first = min(lines.index(u) for u in copied.users if u in lines)
        between = lines[lines.index(copied) + 1 : first]
        assert all(original(n.meta["address"]) for n in between), "nothing but copies until it is read"
    forward = {n.meta["address"]: n for n in again.gm.graph.nodes if is_op(n) and n.meta["phase"] == FORWARD}
    assert not any(u.meta.get("phase") == BACKWARD for u in forward["fwd:/sin#0"].users), "the backward has its own"
    assert recomputed(program, {}) is program
    assert len(recomputed(program, {"fwd:/tanh#0": "keep"}).gm.graph.nodes) == len(program.gm.graph.nodes)
    assert original(copy_of("fwd:/sin#0")) == "fwd:/sin#0" and original("fwd:/sin#0") is None


def test_what_is_no_op_is_refused():
    program = capture(Tiny(), (torch.randn(2, 4),), {})
    with pytest.raises(PlanError, match="saved names 'fwd:/cos#0', which is no op of the forward"):
        recomputed(program, {"fwd:/cos#0": "recompute"})
    with pytest.raises(PlanError, match="saved of fwd:/tanh#0 is 'forget'; it may be recompute, offload, keep"):
        recomputed(program, {"fwd:/tanh#0": "forget"})
    plan = replace(planner.plan(program, Mesh.parse("dp=1")), saved={"fwd:/tanh#0": "recompute"})
    assert Plan.from_json(plan.to_json()).saved == plan.saved
    with pytest.raises(PlanError, match="damaged at saved of fwd:/tanh#0: 'forget' is not one of"):
        Plan.from_json(plan.to_json().replace('"recompute"', '"forget"'))
    with pytest.raises(PlanError, match="no op of the forward"):
        planner.check_plan(program, replace(plan, saved={"bwd:/mm#0": "recompute"}))


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "resnet", "vit", "unet", "bert"])
def test_the_program_computes_the_same(name):
    """Bit for bit, dropout included: a copy draws what the op has drawn."""
    options = {} if name in ("resnet", "unet", "llama") else {"dropout": 0.3}
    program, model, batch = traced(name, **options)
    values = feeds(program, model, (), batch, seed=7)
    want = run_global(program, values)
    for seed, part in ((0, 0.5), (1, 0.9), (2, 1.0)):
        got = run_global(recomputed(program, some(program, seed, part)), values)
        assert got.keys() == want.keys()
        for key, value in want.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(got[key], value), (key, seed)


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet", "t5"])
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "a=4"])
def test_random_plans_with_random_copies(name, mesh):
    with widen_to_float64():
        program, model, batch = traced(name)
        values = feeds(program, model, (), batch)
        want = run_global(program, values)
        for seed in range(3):
            plan = replace(random_plan(program, Mesh.parse(mesh), seed), saved=some(program, seed, 0.6))
            planner.check_plan(program, plan)
            got = run_local(insert_collectives(program, plan, rule_for), values)
            error, where = max_error(got, want)
            assert error < 1e-9, (where, seed)


class Kept(nn.Module):
    """A result that is also an output, one that nobody but an output reads, and one that is read in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.a(x))
        side = torch.sin(hidden).view(-1)
        low = torch.sigmoid(self.b(hidden)).to(torch.bfloat16)
        return {"loss": (low.cos() * low).float().sum() + side.detach().sum(), "hidden": hidden, "side": side}


def test_outputs_are_there_anyway():
    """What leaves is held in any case: there is nothing to be had by making it again, and it is not made twice."""
    program = capture(Kept(), (torch.randn(64, 32),), {})
    every = dict.fromkeys(ops(program), "recompute")
    again = [n for n in recomputed(program, every).gm.graph.nodes if is_op(n) and original(n.meta["address"])]
    assert all(n.users for n in again), "a copy that nobody reads"
    plan = planner.plan(program, Mesh.parse("dp=1"))
    search = Rematerialiser(program, plan, "cpu", None, Policy(True))
    assert not any("tanh" in a for a in search.smallest().plan.saved)


def test_stars_with_exceptions_outlive_a_smaller_model():
    program = traced("gpt2")[0]
    star = next(a for a in map(pattern, ops(program)) if "*" in a)
    layers = [a for a in ops(program) if pattern(a) == star]
    saved = {star: "recompute", **dict.fromkeys(layers, "keep"), "fwd:transformer.h.7.ln_1/mm#0": "keep"}
    assert present(program, saved) == {star: "recompute", **dict.fromkeys(layers, "keep")}
    assert len(recomputed(program, present(program, saved)).gm.graph.nodes) == len(program.gm.graph.nodes)


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as started:
        yield started


PLACES = {
    "ddp": ("dp=4", {"dp": "ddp"}),
    "zero3": ("dp=4", {"dp": "zero3"}),
    "tp": ("tp=4", {"tp": "tp"}),
    "zero3 x tp_sp": ("dp=2,tp=2", {"dp": "zero3", "tp": "tp_sp"}),
}


def with_copies(
    name: str, mesh: str, constraints: dict[str, str], seed: int, options: dict[str, Any], hows: Sequence[str]
) -> list[str]:
    """On every rank: a plan that keeps less, against one that keeps all, from the same seed, and the plain module."""
    model, batch = example(name, **options)
    runs = []
    with widen_to_float64(), captured_once():
        program = capture(model, (), batch)
        plan = planner.plan(program, Mesh.parse(mesh), constraints=constraints)
        for saved in (some(program, seed, 0.7, hows), {}):
            torch.manual_seed(5)
            given = replace(plan, saved=saved)
            pm = autopar.compile(copy.deepcopy(model), mesh, example=batch, plan=given, device="cpu")
            runs.append(train(pm, batch))
        if not options:  # else the plain module draws other masks
            runs.append(train(copy.deepcopy(model), batch))
    found = [worst(runs[0], other, 1e-9) for other in runs[1:]]
    return [f"{where} {error:.2g}" for error, where in found if error > 1e-9]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("gpt2", place) for place in PLACES),
        ("resnet", "ddp"),
        *(pytest.param("resnet", place, marks=pytest.mark.slow) for place in PLACES if place != "ddp"),
        *(pytest.param("llama", place, marks=pytest.mark.slow) for place in PLACES),
    ],
)
def test_four_processes(four, name, place):
    mesh, constraints = PLACES[place]
    options = {"dropout": 0.2} if name == "gpt2" else {}
    for failures in four.run(with_copies, name, mesh, constraints, 3, options, ("recompute",)):
        assert not failures


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_limit_is_held(name):
    """Of a model on one device: the peak is what was predicted, within the limit, and less memory takes more time."""
    model, batch = ZOO[name](seed=0)
    with captured_once():
        program = capture(model, (), batch)
        free = planner.plan(program, Mesh.parse("dp=1"), memory_limit=None).predicted
        seconds = []
        for part in (1.0, 0.95, 0.9, 0.85):
            limit = round(part * free["peak_bytes"])
            pm = autopar.compile(copy.deepcopy(model), "dp=1", example=batch, memory_limit=limit, device="cpu")
            assert pm.plan.predicted["peak_bytes"] <= limit
            assert bool(pm.plan.saved) == (part < 1)
            peak = peak_of_training(pm, batch)
            assert peak <= limit
            assert pm.plan.predicted["peak_bytes"] == pytest.approx(peak, rel=1e-3)
            seconds.append(pm.plan.predicted["step_s"])
    assert seconds == sorted(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_least_that_is_told_is_enough(name):
    """Asked for a byte: what the error says is needed is less than without copies, and a plan for that is found."""
    program = traced(name)[0]
    mesh = Mesh.parse("dp=1")
    with pytest.raises(InfeasibleError) as caught:
        planner.plan(program, mesh, memory_limit=1)
    error = caught.value
    free = planner.plan(program, mesh).predicted["peak_bytes"]
    assert f"Give at least {error.least} bytes" in str(error) and error.least < 0.8 * free
    assert sum(error.memory.values()) == pytest.approx(error.least, abs=1)
    found = planner.plan(program, mesh, memory_limit=error.least)
    assert found.predicted["peak_bytes"] <= error.least
    with pytest.raises(InfeasibleError):
        planner.plan(program, mesh, memory_limit=round(0.9 * error.least))


class Chain(nn.Module):
    """A few ops whose results differ in size and in what they cost."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((8, 64), (64, 16), (16, 8))
        self.a, self.b, self.c = (nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x)).sin()
        x = torch.sigmoid(self.b(x)).exp()
        return self.c(x.cos()).square().sum()


@pytest.fixture(scope="module")
def chain() -> Any:
    """Makes searches that have seen nothing."""
    program = capture(Chain(), (torch.randn(256, 8),), {})
    plan = planner.plan(program, Mesh.parse("dp=1"))
    return lambda: Rematerialiser(program, plan, "cpu", None, Policy(True))


@pytest.fixture(scope="module")
def every(chain) -> tuple[Rematerialiser, list[Any]]:
    """Every subset of the ops of a chain."""
    search = chain()
    classes = search.remat.classes
    assert 8 <= len(classes) <= 10
    counts = range(len(classes) + 1)
    return search, [search.measured(Chosen(frozenset(c))) for n in counts for c in itertools.combinations(classes, n)]


@pytest.mark.parametrize("part", [0.97, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5])
def test_the_choice_is_the_best_of_all(chain, every, part):
    """None of all subsets is quicker within the limit; where there is one, one is found."""
    search, subsets = every
    limit = part * search.base.peak
    fits = [k.timeline.step_s for k in subsets if k.peak <= limit]
    found = chain().within(limit)
    if not fits:
        assert found is None
        return
    assert found is not None and found.peak <= limit
    assert found.timeline.step_s <= min(fits) * 1.001


def test_the_least_is_the_least_of_all(chain, every):
    assert chain().smallest().peak <= 1.01 * min(k.peak for k in every[1])


def test_exchanges_make_it_quicker_within_the_limit(every):
    """From a choice that fits, one copy for another at a time: never slower, never over, and now and then quicker."""
    search, subsets = every
    gained = 0
    for limit, start in [(p * search.base.peak, k) for p in (0.97, 0.9, 0.8) for k in subsets]:
        if start.peak > limit:
            continue
        found = search._exchanged(start, limit)
        assert found.peak <= limit and len(found.chosen.again) == len(start.chosen.again)
        assert found is start or found.timeline.step_s < start.timeline.step_s
        gained += found is not start
    assert gained


def test_no_more_exchanges_are_tried_than_may_be(chain, monkeypatch):
    monkeypatch.setattr(remat_search, "EXCHANGES", 1)
    search = chain()
    slowest = sorted(search.remat.classes, key=search.remat.total)[-2:]
    start = search.measured(Chosen(frozenset(slowest)))
    known = len(search.seen)
    search._exchanged(start, 2 * search.base.peak)
    assert len(search.seen) == known + 1


def test_layers_are_folded():
    """What holds for all layers is said once."""
    model, batch = ZOO["llama"](seed=0)
    program = capture(model, (), batch)
    plan = planner.plan(program, Mesh.parse("dp=1"))
    free = plan.predicted["peak_bytes"]
    found = Rematerialiser(program, plan, "cpu", None, Policy(True)).within(0.85 * free)
    assert found is not None
    assert all(how == "recompute" for how in found.plan.saved.values())
    assert any("*" in a for a in found.plan.saved)
    assert "computed again in the backward: " in report.kept_text(found.plan)


def in_stages(name: str, seed: int, hows: Sequence[str]) -> list[str]:
    """On every rank: stages that keep less, against the plain module."""
    model, batch = example(name)
    with widen_to_float64(), captured_once():
        plain = autopar.compile(copy.deepcopy(model), "pp=2,dp=2", example=batch, device="cpu", micro_batches=2).plan
        program = capture(model, (), {k: v[:4] for k, v in batch.items()})
        runs = []
        for saved in (some(program, seed, 0.7, hows), {}):
            pm = autopar.compile(
                copy.deepcopy(model), "pp=2,dp=2", example=batch, device="cpu", plan=replace(plain, saved=saved)
            )
            runs.append(train(pm, batch))
        runs.append(train(copy.deepcopy(model), batch))
    found = [worst(runs[0], other, 1e-9) for other in runs[1:]]
    return [f"{where} {error:.2g}" for error, where in found if error > 1e-9]


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_stages(four, name):
    for failures in four.run(in_stages, name, 4, ("recompute",)):
        assert not failures


def with_paci() -> str:
    model, batch = example("llama")
    optimizer = {"optimizer": lambda params: torch.optim.AdamW(params), "schedule": "paci", "micro_batches": 4}
    with captured_once():
        pm = autopar.compile(copy.deepcopy(model), "pp=2,dp=2", example=batch, device="cpu", **optimizer)
        program = capture(model, (), {k: v[:2] for k, v in batch.items()})
        plan = replace(pm.plan, saved=dict(list(some(program, 0).items())[:2]))
        try:
            autopar.compile(copy.deepcopy(model), "pp=2,dp=2", example=batch, device="cpu", plan=plan, **optimizer)
        except PlanError as error:
            return str(error)
    return ""


def test_newer_weights_are_refused(four):
    for said in four.run(with_paci):
        assert "again in the backward, and with paci the weights may have changed since the forward" in said


@pytest.mark.parametrize("part", [pytest.param(0.9, marks=pytest.mark.slow), 0.8])
def test_a_limit_on_a_mesh(part):
    """Cutting and computing again, together: never slower than cutting alone, and within the limit."""
    program = traced("gpt2")[0]
    mesh = Mesh.parse("dp=2,tp=2")
    free = planner.plan(program, mesh, device="h100", memory_limit=1 << 40)
    assert not free.saved
    limit = round(part * free.predicted["peak_bytes"])
    both = planner.plan(program, mesh, device="h100", memory_limit=limit, offload=False)
    alone = planner.plan(program, mesh, device="h100", memory_limit=limit, recompute=False, offload=False)
    assert not alone.saved and alone.predicted["peak_bytes"] <= limit
    assert both.predicted["peak_bytes"] <= limit
    assert both.predicted["step_s"] <= alone.predicted["step_s"]
    planner.check_plan(program, both)


def test_what_zero_3_gathers_is_let_go(four):
    """A parameter that is gathered for each half is gathered for the copies in the backward, and not kept for them."""
    model, batch = ZOO["llama"](seed=0)
    program = capture(model, (), batch)
    plan = planner.plan(program, Mesh.parse("dp=4"), constraints={"dp": "zero3"}, output_specs="free")
    hands_on = ("/add.Tensor#0", "/add.Tensor#1", "embed_tokens/embedding#0")
    layers = [a for a in ops(program) if "layers." in a and not a.endswith(hands_on) and "permute" not in a]
    again = replace(plan, saved=dict.fromkeys(layers, "recompute"))
    items = items_of(program, again.saved)
    saved = Steps(record(items, again, plan_specs(items, again))).saved
    assert saved and not any(b.kind == "gathered" for b in saved)
    peak = max(four.run(measured, "llama", again.to_json()))
    assert planner.price(program, again).peak_bytes == pytest.approx(peak, rel=0.05)
