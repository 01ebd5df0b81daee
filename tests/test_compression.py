"""Gradients that travel compressed: equal at full rank, good enough at a low one, and quicker over slow links."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from harness import Ranks
from live_bytes import peak_of_step
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import autopar
from autopar import passes
from autopar.capture import capture
from autopar.costmodel import formula, planner
from autopar.costmodel.devices import DEVICES, Link
from autopar.costmodel.price import price
from autopar.costmodel.rules import rule_for
from autopar.costmodel.simulate import simulate
from autopar.errors import ConstraintError, PlanError
from autopar.graph import BACKWARD
from autopar.mesh import Mesh
from autopar.passes import collectives
from autopar.plan import Plan
from autopar.report import heading

DDP, TP = {"dp": "ddp"}, {"dp": "ddp", "tp": "tp"}
FULL, LOW = "powersgd:64:0", "powersgd:2"


def net(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 32)).to(dtype)


def batch(number=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 24, generator=generator).to(dtype)
    return {"input": x, "target": torch.sin(x @ torch.linspace(-1, 1, 24 * 32).reshape(24, 32).to(dtype))}


def loss(output, target):
    return (output - target).pow(2).mean()


def compiled(mesh, constraints, compression, dtype=torch.float64):
    return autopar.compile(
        net(dtype), mesh, example=batch(dtype=dtype), loss=loss, constraints=constraints, compression=compression,
        optimizer_class="sgd",
    )  # fmt: skip


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(module, given):
    module.zero_grad()
    value = (
        module(**given) if isinstance(module, autopar.ParallelModule) else loss(module(given["input"]), given["target"])
    )
    value.backward()
    return {n: full(p.grad) for n, p in module.named_parameters()}


def kept(pm):
    return pm._state.powersgd.kept


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4) as group:
        yield group


# ---- numbers -------------------------------------------------------------------------------------------------------


def off(mesh, constraints, compression, dtype, steps=2):
    """Largest relative difference to the plain model's gradients, and the compressed parameters."""
    pm, plain, most = compiled(mesh, constraints, compression, dtype), net(dtype), 0.0
    for step in range(steps):
        ours, want = (gradients(m, batch(step, dtype)) for m in (pm, plain))
        most = max(most, *(((ours[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want))
        assert all(ours[n].dtype == dtype for n in want)
    return most, sorted(kept(pm)), max((k.error.abs().max().item() for k in kept(pm).values()), default=0.0)


@pytest.mark.parametrize(
    ("mesh", "constraints"), [("dp=4", DDP), ("dp=2,tp=2", TP), ("a=2,b=2", {"a": "ddp", "b": "ddp"})]
)
def test_full_rank_is_the_plain_reduction(ranks, mesh, constraints):
    for difference, names, _ in ranks.run(off, mesh, constraints, FULL, torch.float64):
        assert names == ["0.weight", "2.weight"] and difference < 1e-10


def test_low_rank_is_not(ranks):
    for difference, names, left_out in ranks.run(off, "dp=4", DDP, LOW, torch.float64):
        assert names == ["0.weight", "2.weight"] and difference > 0.01 and left_out > 0


def test_what_is_scattered_travels_as_it_is(ranks):
    for difference, names, _ in ranks.run(off, "dp=4", {"dp": "zero3"}, LOW, torch.float64):
        assert names == [] and difference < 1e-11
    # Over one axis scattered, over the other summed: the piece is compressed over the second.
    for difference, names, _ in ranks.run(off, "a=2,b=2", {"a": "ddp", "b": "zero2"}, FULL, torch.float64):
        assert names == ["0.weight", "2.weight"] and difference < 1e-10


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_bfloat16(ranks, strategy):
    for difference, _, _ in ranks.run(off, "dp=4", {"dp": strategy}, "bf16", torch.float32):
        assert 1e-4 < difference < 2e-2


def trained(compression, feedback, steps=60):
    pm = compiled("dp=4", DDP, compression)
    optimizer = torch.optim.SGD(pm.parameters(), lr=1.0)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = pm(**batch(0))
        value.backward()
        values.append(value.item())
        optimizer.step()
        for entry in kept(pm).values() if not feedback else ():
            entry.error.zero_()
    return values


def test_low_rank_trains_and_feedback_helps(ranks):
    runs = [(None, True), ("powersgd:1", True), ("powersgd:1", False)]
    plain, with_it, without = (ranks.run(trained, *how)[0] for how in runs)
    assert plain[-1] < with_it[-1] < 0.01 * with_it[0]
    assert with_it[-1] < 0.3 * without[-1]


def beside_ddp():
    """Gradients of two steps behind one another; errors and Q of the first enter the second."""
    torch.manual_seed(0)
    model = nn.Linear(24, 40, dtype=torch.float64)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    given = [(torch.randn(16, 24, dtype=torch.float64), torch.randn(16, 40, dtype=torch.float64)) for _ in range(4)]
    pm = autopar.compile(
        copy.deepcopy(model), "dp=4", example={"input": given[0][0], "target": given[0][1]}, loss=loss, constraints=DDP,
        compression=LOW,
    )  # fmt: skip
    ddp = DistributedDataParallel(model)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, random_seed=5)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    seed = copy.deepcopy(state.rng).randint(1_000_000_000)
    out = []
    for number, (x, y) in enumerate(given):
        ddp.zero_grad()
        mine = slice(16 // world * rank, 16 // world * (rank + 1))
        loss(ddp(x[mine]), y[mine]).backward()
        if number < 2:  # the hook's first two steps are plain
            continue
        if number == 2:
            pm(input=x, target=y)  # parameters and a program
            pm.zero_grad()
            gradients(pm, {"input": x, "target": y})
            entry = kept(pm)["weight"]
            entry.error.zero_()
            entry.q.copy_(torch.randn(24, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        ours = gradients(pm, {"input": x, "target": y})
        out.append(max((ours[n] - p.grad).abs().max().item() for n, p in model.named_parameters()))
    exact = nn.Linear(24, 40, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    loss(exact(given[3][0]), given[3][1]).backward()
    return out, (exact.weight.grad - model.weight.grad).abs().max().item()


def test_as_torch_does_it_for_ddp(ranks):
    for differences, compressed in ranks.run(beside_ddp):
        assert len(differences) == 2 and max(differences) < 1e-12 < 1e-4 < compressed


# ---- state ---------------------------------------------------------------------------------------------------------


def held():
    pm = compiled("dp=4", DDP, LOW)
    gradients(pm, batch(0))
    told = [pm.plan.predicted["memory"]["optimizer"], pm._state.powersgd.nbytes]
    twin = copy.deepcopy(pm)
    before = {n: k.error.clone() for n, k in kept(pm).items()}
    gradients(twin, batch(1))
    assert all(torch.equal(before[n], k.error) for n, k in kept(pm).items()), "a copy has errors of its own"
    assert not any(torch.equal(before[n], k.error) for n, k in kept(twin).items())
    shorter = {k: v[:8] for k, v in batch(0).items()}
    with pytest.warns(UserWarning, match="captured"):
        gradients(pm, shorter)  # another program goes on with the same errors
    assert not any(torch.equal(before[n], k.error) for n, k in kept(pm).items())
    q = {n: k.q.clone() for n, k in kept(pm).items()}
    broken = {**batch(2), "input": batch(2)["input"] * float("inf")}
    bad = gradients(pm, broken)
    assert not any(torch.isfinite(bad[n]).all() for n in q)
    assert all(torch.equal(k.error, torch.zeros_like(k.error)) and torch.equal(k.q, q[n]) for n, k in kept(pm).items())
    assert all(torch.isfinite(g).all() for g in gradients(pm, batch(3)).values())
    return told


def test_state_is_counted_and_kept(ranks):
    for told, bytes_ in ranks.run(held):
        assert told == bytes_ > 0


def peaks(strategy, compression):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 1024), nn.Tanh(), nn.Linear(1024, 96), nn.Tanh(), nn.Linear(96, 640))
    given = {"input": torch.ones(4, 64), "target": torch.zeros(4, 640)}
    pm = autopar.compile(
        model, "dp=4", example=given, loss=loss, constraints={"dp": strategy}, compression=compression,
        optimizer_class="sgd", device="cpu",
    )  # fmt: skip
    optimizer = torch.optim.SGD(pm.parameters())

    def step() -> None:
        pm(**given).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    there = {f"{n}.{k}": t for n, entry in kept(pm).items() for k, t in vars(entry).items()}
    return pm.plan.predicted["peak_bytes"], min(peak_of_step(pm, optimizer, {**given, **there}, step) for _ in range(3))


CASES = [("ddp", None), ("ddp", "bf16"), ("zero2", "bf16"), ("zero3", "bf16"), ("ddp", "powersgd:4")]


@pytest.mark.parametrize(("strategy", "compression"), CASES)
def test_peak_of_a_step(ranks, strategy, compression):
    for told, measured in ranks.run(peaks, strategy, compression):
        assert told == pytest.approx(measured, rel=0.05)


# ---- prices --------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))

    def forward(self, x):
        return self.layers(x).pow(2).mean()


PROGRAM = capture(Wide(), (torch.ones(64, 2048),))
SLOW, FAST = Link(1e9, 50e-6), Link(900e9, 1e-6)


def planned(compression, link, strategy="ddp"):
    device = replace(DEVICES["h100"], fast=link)
    plan = planner.plan(
        PROGRAM, Mesh.parse("dp=4"), device=device, constraints={"dp": strategy}, compression=compression
    )
    assert round(price(PROGRAM, plan, device).peak_bytes) == plan.predicted["peak_bytes"]
    assert simulate(PROGRAM, plan, device).step_s == plan.predicted["step_s"]
    return plan


def test_slow_links_gain_and_fast_ones_do_not():
    slow = [planned(how, SLOW).predicted["step_s"] for how in (None, "bf16", "powersgd:4")]
    assert slow[0] > 1.8 * slow[1] > 5 * slow[2]
    fast = [planned(how, FAST).predicted["step_s"] for how in (None, "powersgd:4")]
    assert fast[0] < fast[1]


def test_bytes_of_bfloat16():
    """Half of them are sent, the rest of the time on the link are launches."""
    none, half = (simulate(PROGRAM, planned(how, SLOW), replace(DEVICES["h100"], fast=SLOW)) for how in (None, "bf16"))
    assert half.comm_s == pytest.approx(none.comm_s / 2, rel=0.02)
    assert half.compute_s > none.compute_s  # the casts


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_memory_of_bfloat16(strategy):
    """Gradients travel in memory besides; nothing else changes."""
    none, half = (planned(how, SLOW, strategy).predicted["memory"] for how in (None, "bf16"))
    assert half["optimizer"] == none["optimizer"] and half["parameters"] == none["parameters"]


def test_plans_say_it(tmp_path):
    plan = planned("powersgd:4", SLOW)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and plan.compression == "powersgd:4"
    assert "compression" not in planned(None, SLOW).to_json()
    assert "gradients travel compressed: powersgd:4" in heading(plan)
    assert not any("compress" in note for note in plan.notes)
    note = "compression powersgd:4: 0 of 4 gradients are compressed; others are vectors, too small"
    assert any(n.startswith(note) for n in planned("powersgd:4", SLOW, "zero3").notes)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("fp8", "compression='fp8' does not exist; choose 'bf16', or 'powersgd:RANK' with a rank of 1 or more"),
        ("powersgd:0", "does not exist"),
        ("powersgd", "does not exist"),
        (4, "compression=4 does not exist"),
    ],
)
def test_what_does_not_exist(how, message):
    with pytest.raises(ConstraintError, match=message):
        autopar.plan(net(), "dp=2", example=batch(), loss=loss, compression=how)
    if isinstance(how, str):
        text = planned("bf16", SLOW).to_json().replace('"bf16"', f'"{how}"')
        with pytest.raises(PlanError, match="plan is damaged at compression: compression="):
            Plan.from_json(text)


def test_what_is_refused():
    with pytest.raises(ConstraintError, match=r"gradients of pipelines \(axis pp\) are not compressed yet; leave"):
        autopar.plan(net(), "pp=2,dp=2", example=batch(), loss=loss, compression="bf16")
    with pytest.raises(PlanError, match="there is no formula of a plan with compressed gradients yet"):
        formula.formula(lambda batch, seq: PROGRAM, planned("bf16", SLOW), 64, 1, "h100", varies=False)
    plan = autopar.plan(net(), "dp=1", example=batch(), loss=loss, compression="bf16")
    with pytest.raises(PlanError, match="compression=powersgd:2 is asked for, and the plan was made for bf16"):
        autopar.compile(net(), "dp=1", example=batch(), loss=loss, plan=plan, compression="powersgd:2")
    assert autopar.compile(net(), "dp=1", example=batch(), loss=loss, plan=plan).plan.compression == "bf16"


def test_only_gradients_are_cast():
    local, _ = passes.lower(PROGRAM, planned("bf16", SLOW), rule_for)
    sums = [n for n in local.gm.graph.nodes if n.target is collectives.all_reduce]
    found = {n.meta["phase"] == BACKWARD: n.meta["val"].dtype for n in sums}
    assert found == {True: torch.bfloat16, False: torch.float32}  # the loss is a sum over the batch, too
