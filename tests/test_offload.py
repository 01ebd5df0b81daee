"""What waits on the host: the same numbers, within the memory that was predicted, and chosen where it is quicker."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import autopar
from autopar import offload, passes
from autopar.capture import capture
from autopar.costmodel import planner
from autopar.costmodel.devices import DEVICES
from autopar.costmodel.explain import Bench
from autopar.costmodel.rules import rule_for
from autopar.costmodel.simulate import simulate
from autopar.errors import InfeasibleError, PlanError
from autopar.graph import BACKWARD, FORWARD, MOVES, Program, is_op
from autopar.mesh import Mesh
from autopar.passes.insert import insert_collectives
from autopar.plan import Plan
from autopar.recompute import recomputed, traveller, way_of
from tests.harness import Ranks
from tests.live_bytes import peak_of_training
from tests.parity import feeds, max_error, run_global, run_local
from tests.test_recompute import PLACES, in_stages, ops, some, traced, with_copies
from tests.trained import captured_once
from tests.widen import widen_to_float64
from tests.zoo import ZOO

BOTH = ("recompute", "offload")


def test_a_tensor_goes_and_comes_back():
    strided = torch.randn(3, 4, 5).permute(2, 0, 1)
    for x in (strided, torch.arange(6), torch.randn(0, 3), torch.tensor(2.5), strided.to(torch.bfloat16)):
        held = offload.OFFLOAD(x)
        assert offload.on_host(held) and not offload.on_host(x)
        back = offload.FETCH(held)
        assert torch.equal(back, x) and back.stride() == x.stride() and not offload.on_host(back)
        assert back.data_ptr() != x.data_ptr() or not x.numel()
        start = offload.OFFLOAD_START(x)
        assert offload.ARRIVED(start).data_ptr() == start.data_ptr()


def test_the_program():
    """One way down for each result that the backward reads, one way up; numbers are those of the plain program."""
    program, model, batch = traced("llama")
    values = feeds(program, model, (), batch, seed=7)
    want = run_global(program, values)
    away = recomputed(program, dict.fromkeys(ops(program), "offload"))
    nodes = [n for n in away.gm.graph.nodes if is_op(n)]
    down = {traveller(n.meta["address"]): n for n in nodes if n.target is offload.OFFLOAD}
    up = {traveller(n.meta["address"]): n for n in nodes if n.target is offload.FETCH}
    assert down.keys() == up.keys() and len(down) > 20
    for result, node in down.items():
        assert node.meta["phase"] == FORWARD and list(node.users) == [up[result]]
        assert up[result].meta["phase"] == BACKWARD and up[result].users
    assert all(traveller(a) == ("fwd:x/mm#0", 1) for a in way_of("fwd:x/mm#0", 1))
    for node in nodes:
        if node.meta["phase"] == BACKWARD and node.target not in (*offload.HOSTED, *MOVES):
            reads = [n for n in node.all_input_nodes if is_op(n) and n.meta["phase"] == FORWARD]
            assert not [n for n in reads if n.target not in MOVES and n.all_input_nodes], node
    got = run_global(away, values)
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[key], value), key


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit", "resnet"])
def test_the_program_computes_the_same(name):
    """Bit for bit, dropout included, whatever is copied and whatever waits."""
    options = {} if name == "resnet" else {"dropout": 0.3}
    program, model, batch = traced(name, **options)
    values = feeds(program, model, (), batch, seed=7)
    want = run_global(program, values)
    for seed, part in ((0, 0.5), (1, 0.9)):
        got = run_global(recomputed(program, some(program, seed, part, BOTH)), values)
        for key, value in want.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(got[key], value), (key, seed)


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet"])
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "a=4"])
def test_random_plans(name, mesh):
    """What waits lies on the host as it was made: it is not brought elsewhere for that."""
    with widen_to_float64():
        program, model, batch = traced(name)
        values = feeds(program, model, (), batch)
        want = run_global(program, values)
        for seed in range(3):
            plan = replace(planner.random_plan(program, Mesh.parse(mesh), seed), saved=some(program, seed, 0.6, BOTH))
            planner.check_plan(program, plan)
            got = run_local(insert_collectives(program, plan, rule_for), values)
            error, where = max_error(got, want)
            assert error < 1e-9, (where, seed)


def test_a_plan_says_so():
    program = traced("llama")[0]
    address = next(a for a in ops(program) if "silu" in a)
    plan = replace(planner.plan(program, Mesh.parse("dp=1")), saved={address: "offload"}, copies=4)
    again = Plan.from_json(plan.to_json())
    assert again.saved == plan.saved and again.copies == 4
    with pytest.raises(PlanError, match="copies: it is 0; it must be a number of tensors, at least 1"):
        Plan.from_json(plan.to_json().replace('"copies": 4', '"copies": 0'))
    assert "waits on the host: model.layers.0.mlp.act_fn: silu" in autopar.report.kept_text(plan)


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four():
    with Ranks(4) as started:
        yield started


#: What waits on the host alone, and with copies besides; the first in the slow sweep.
HOWS = pytest.mark.parametrize(
    "hows", [pytest.param(("offload",), marks=pytest.mark.slow), BOTH], ids=["offload", "both"]
)


@HOWS
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
@pytest.mark.parametrize("place", list(PLACES))
def test_four_processes(four, name, place, hows):
    mesh, constraints = PLACES[place]
    options = {"dropout": 0.2} if name == "gpt2" else {}
    for failures in four.run(with_copies, name, mesh, constraints, 3, options, hows):
        assert not failures


@HOWS
@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_stages(four, name, hows):
    for failures in four.run(in_stages, name, 4, hows):
        assert not failures


# ---- memory and time -----------------------------------------------------------------------------------------------


def computing(program: Program) -> list[str]:
    """Addresses of what computes in the forward: what a planner would send away."""
    nodes = [n for n in program.gm.graph.nodes if is_op(n) and n.meta["phase"] == FORWARD]
    return [n.meta["address"] for n in nodes if n.target not in MOVES]


@pytest.mark.parametrize("copies", [1, 2, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_peak_is_what_was_predicted(name, copies):
    model, batch = ZOO[name](seed=0)
    with captured_once():
        program = capture(model, (), batch)
        plain = planner.plan(program, Mesh.parse("dp=1"))
        for part in (0.4, 1.0):
            saved = {a: h for a, h in some(program, 1, part, ("offload",)).items() if a in computing(program)}
            plan = replace(plain, saved=saved, copies=copies)
            pm = autopar.compile(copy.deepcopy(model), "dp=1", example=batch, plan=plan, device="cpu")
            peak = peak_of_training(pm, batch)
            assert planner.price(program, plan).peak_bytes == pytest.approx(peak, rel=0.01)
            assert peak < plain.predicted["peak_bytes"]


def test_so_many_are_under_way():
    """In the graphs that run, and in the simulation of them."""
    model, batch = ZOO["llama"](seed=0)
    program = capture(model, (), batch)
    plain = planner.plan(program, Mesh.parse("dp=1"))
    saved = dict.fromkeys(computing(program), "offload")
    for copies in (1, 3):
        plan = replace(plain, saved=saved, copies=copies)
        local, _ = passes.lower(program, plan, rule_for)
        parts = passes.cut(local)
        for half, start in ((parts.forward, offload.OFFLOAD_START), (parts.backward, offload.FETCH_START)):
            gm, _ = passes.finish(half, plan.mesh, (0,), {}, "test", eager=True, copies=copies)
            flying, most = 0, 0
            for node in gm.graph.nodes:
                flying += (node.target is start) - (node.target is offload.ARRIVED)
                most = max(most, flying)
            assert not flying and copies <= most <= copies + 1
    few, many = (simulate(program, replace(plain, saved=saved, copies=n), "h100") for n in (1, 8))
    assert many.step_s <= few.step_s
    assert many.streams["to host"] == few.streams["to host"] > 0


def wide(program_of: Any, **limits: Any) -> Plan:
    return planner.plan(program_of, Mesh.parse("dp=1"), device="h100", **limits)


@pytest.fixture(scope="module")
def large() -> Program:
    """Layers of a size at which copies can hide behind products of matrices."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11264, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=2048,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    ids = torch.zeros(4, 4096, dtype=torch.int64)
    return capture(model, (), {"input_ids": ids, "labels": ids})


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.8, 0.6])
def test_it_is_chosen_where_it_is_quicker(large, part):
    free = wide(large)
    limit = round(part * free.predicted["peak_bytes"])
    both, again = wide(large, memory_limit=limit), wide(large, memory_limit=limit, offload=False)
    assert Counter(again.saved.values()).keys() <= {"recompute", "keep"} and again.solver["offload"] is False
    assert "offload" in both.saved.values()
    for plan in (both, again):
        assert plan.predicted["peak_bytes"] <= limit
    assert both.predicted["step_s"] < 0.99 * again.predicted["step_s"]
    alone = wide(large, memory_limit=limit, recompute=False)
    assert set(alone.saved.values()) <= {"offload", "keep"} and alone.predicted["peak_bytes"] <= limit


def test_no_more_waits_than_the_host_has_room_for():
    program = traced("llama")[0]
    h100, one = DEVICES["h100"], Mesh.parse("dp=1")
    free = planner.plan(program, one, device=h100)
    options: dict[str, Any] = {"memory_limit": round(0.88 * free.predicted["peak_bytes"])}
    wide_ = planner.plan(program, one, device=h100, recompute=False, **options)
    size = sum(wide_.predicted["host"].values())
    assert h100.host is not None
    device = replace(h100, host=replace(h100.host, memory=size / 3))
    plan = planner.plan(program, one, device=device, **options)
    assert sum(plan.predicted.get("host", {}).values()) <= size / 3
    assert plan.predicted["peak_bytes"] <= options["memory_limit"] and "recompute" in plan.saved.values()
    with pytest.raises(InfeasibleError):
        planner.plan(program, one, device=device, recompute=False, **options)


def test_a_cpu_has_no_host():
    """There is no other memory than its own, so that nothing is gained there."""
    assert DEVICES["cpu"].host is None and all(d.host for n, d in DEVICES.items() if n != "cpu")
    program = traced("llama")[0]
    free = planner.plan(program, Mesh.parse("dp=1"))
    plan = planner.plan(program, Mesh.parse("dp=1"), memory_limit=round(0.9 * free.predicted["peak_bytes"]))
    assert set(plan.saved.values()) == {"recompute"}


def test_it_can_be_explained():
    """Prices of its parts add up to those of the whole, on a mesh, too, where the plan does not spell out the ways."""
    program = traced("llama")[0]
    mesh = Mesh.parse("dp=2,tp=2")
    plan = planner.plan(program, mesh, device="h100", constraints={"dp": "ddp", "tp": "tp"})
    plan = replace(plan, saved=dict.fromkeys(computing(program), "offload"))
    bench = Bench.open(program, plan, "h100")
    assert bench.price.step_s == pytest.approx(planner.price(program, plan, "h100").step_s)
    away = [a for a, row in bench.plan.choices.items() if traveller(a) and any(c.factor for c in row)]
    assert len(away) > 20, "it lies on the host as it was made: split"
    assert Plan.from_json(bench.plan.to_json()).choices.keys() >= set(away)


def test_what_failed_is_let_go():
    x = torch.randn(4)
    start = offload.OFFLOAD_START(x)
    assert offload._flying
    offload.abandon()
    assert not offload._flying
    assert torch.equal(offload.ARRIVED(start), x)


def test_saved_may_be_taken_out_of_a_plan():
    """What the planner has said of copies and of ways to the host does not stand in the way."""
    program = traced("llama")[0]
    plan = planner.plan(program, Mesh.parse("dp=2,tp=2"), device="h100", constraints={"dp": "ddp", "tp": "tp"})
    plan = replace(plan, saved=dict.fromkeys(computing(program), "offload"))
    spelled = Bench.open(program, plan, "h100").plan
    assert any(map(traveller, spelled.choices))
    planner.check_plan(program, replace(spelled, saved={}))
    with pytest.raises(PlanError, match="which the program does not have"):
        planner.check_plan(program, replace(spelled, saved={}, choices={**spelled.choices, "fwd:x/mm#0>0": ()}))


def test_what_the_host_holds_is_told():
    program = traced("llama")[0]
    plain = planner.plan(program, Mesh.parse("dp=1"), device="h100")
    away = replace(plain, saved=dict.fromkeys(computing(program), "offload"))
    assert planner.price(program, away, "h100").host["activations"] > 0
    assert not planner.price(program, plain, "h100").host
