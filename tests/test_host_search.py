"""When the planner keeps optimizer state on the host: only if memory is short, only what is needed, only if it pays."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.capture import capture
from autopar.costmodel import planner
from autopar.costmodel.devices import DEVICES, Host, Link
from autopar.costmodel.host_state import Aside, HostSeconds
from autopar.costmodel.simulate import simulate
from autopar.errors import InfeasibleError, PlanError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import HOST, Plan

ONE = Mesh.parse("dp=1")
#: Nothing is given up but optimizer state.
ALONE: Any = {"recompute": False, "offload": False}
WIDE, ROWS = 2048, 4096
#: This machine as a device with a host beside it: what is planned for it runs here.
HOSTED = replace(DEVICES["cpu"], host=Host(Link(1e10, 1e-6), 1e10))


class Mlp(nn.Module):
    """Layers wide enough that an H100 computes for longer than it launches."""

    def __init__(self, width: int = WIDE) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return x.square().mean()


@functools.cache
def program(rows: int = ROWS) -> Program:
    with torch.device("meta"):
        model, x = Mlp().bfloat16(), torch.empty(rows, WIDE, dtype=torch.bfloat16)
    return capture(model, (x,), {})


@functools.cache
def parts(rows: int = ROWS) -> dict[str, float]:
    """Peak of the plan without a limit, and what of it the parameters and their like are."""
    plan = planner.plan(program(rows), ONE, device="h100")
    size = 4 * WIDE * WIDE * 2
    return {"peak": plan.predicted["peak_bytes"], "parameters": size, "optimizer": 2 * size, "gradients": size}


def on_host(plan: Plan, names: Any) -> Plan:
    storage = {n: replace(s, state=HOST if n in names else s.state) for n, s in plan.storage.items()}
    return replace(plan, storage=storage)


def test_what_cannot_be_had_otherwise_is_had_on_the_host():
    """Of few rows: parameters, gradients and optimizer state are nearly all there is."""
    size = parts(64)
    limit = round(size["parameters"] + size["gradients"] + 0.3 * size["optimizer"])
    with pytest.raises(InfeasibleError) as caught:
        planner.plan(program(64), ONE, device="h100", memory_limit=limit)
    assert caught.value.least > limit
    plan = planner.plan(program(64), ONE, device="h100", memory_limit=limit, host_state=True, offload=False)
    assert plan.on_host and plan.predicted["peak_bytes"] <= limit
    fewer = on_host(
        replace(plan, storage={n: replace(s, state="device") for n, s in plan.storage.items()}), plan.on_host[1:]
    )
    assert planner.price(program(64), fewer, "h100").peak_bytes > limit, "no more than it takes"
    # The last layers, whose gradients are there first.
    assert plan.on_host == tuple(list(plan.storage)[-len(plan.on_host) :])


def test_no_more_lies_on_the_host_than_it_has_room_for():
    size, h100 = parts(64), DEVICES["h100"]
    limit = round(size["parameters"] + size["gradients"] + 0.3 * size["optimizer"])
    options: dict[str, Any] = {"memory_limit": limit, "host_state": True, **ALONE}
    wide = planner.plan(program(64), ONE, device=h100, **options)
    held = sum(wide.predicted["host"].values())
    assert h100.host is not None
    enough, scarce = (replace(h100, host=replace(h100.host, memory=part * held)) for part in (1.0, 0.9))
    assert planner.plan(program(64), ONE, device=enough, **options).on_host == wide.on_host
    with pytest.raises(InfeasibleError) as caught:
        planner.plan(program(64), ONE, device=scarce, **options)
    least = caught.value.least
    plan = planner.plan(program(64), ONE, device=scarce, **{**options, "memory_limit": least})
    assert plan.predicted["peak_bytes"] <= least and sum(plan.predicted["host"].values()) <= 0.9 * held


def test_the_least_that_is_told_is_enough():
    with pytest.raises(InfeasibleError) as caught:
        planner.plan(program(64), ONE, device="h100", memory_limit=1, host_state=True, offload=False)
    least = caught.value.least
    assert least < parts(64)["parameters"] + parts(64)["optimizer"]
    plan = planner.plan(program(64), ONE, device="h100", memory_limit=least, host_state=True, offload=False)
    assert plan.predicted["peak_bytes"] <= least


def test_a_device_that_is_the_host_gains_nothing_there():
    """It is the same memory: the least is what it is without."""
    least = []
    for there in (True, False):
        with pytest.raises(InfeasibleError) as caught:
            planner.plan(program(64), ONE, device="cpu", memory_limit=1, host_state=there)
        least.append(caught.value.least)
    assert least[0] == least[1]
    assert not planner.plan(program(64), ONE, device="cpu", memory_limit=least[0], host_state=True).on_host


def test_nothing_goes_to_the_host_where_the_limit_is_no_matter():
    for limit in (None, parts()["peak"]):
        plan = planner.plan(program(), ONE, device="h100", memory_limit=limit, host_state=True, offload=False)
        assert not plan.on_host and "host" not in plan.predicted


def test_the_quicker_of_host_and_recomputation_is_chosen():
    """At the figures of an H100 a copy of activations costs less than the link; behind a quick link it is the other
    way round. Each choice is the quicker one of those that are there without the other."""
    limit = round(parts()["peak"] - 0.4 * parts()["optimizer"])
    h100 = DEVICES["h100"]
    near = replace(h100, host=Host(Link(1e15, 1e-9), 1e15))
    found = {}
    for name, device in (("h100", h100), ("near", near)):
        chosen = planner.plan(program(), ONE, device=device, memory_limit=limit, host_state=True, offload=False)
        again = planner.plan(program(), ONE, device=device, memory_limit=limit)
        aside = planner.plan(program(), ONE, device=device, memory_limit=limit, host_state=True, **ALONE)
        assert again.saved and not again.on_host and aside.on_host and not aside.saved
        assert chosen.predicted["step_s"] <= min(p.predicted["step_s"] for p in (again, aside)) * (1 + 1e-3)
        found[name] = chosen
    assert found["h100"].saved and not found["h100"].on_host
    assert found["near"].on_host and not found["near"].saved


def test_both_together_where_neither_is_enough():
    with pytest.raises(InfeasibleError):
        planner.plan(program(), ONE, device="h100", memory_limit=limit_of_both(), host_state=True, **ALONE)
    with pytest.raises(InfeasibleError):
        planner.plan(program(), ONE, device="h100", memory_limit=limit_of_both())
    plan = planner.plan(program(), ONE, device="h100", memory_limit=limit_of_both(), host_state=True, offload=False)
    assert plan.on_host and plan.saved and plan.predicted["peak_bytes"] <= limit_of_both()


@functools.cache
def limit_of_both() -> int:
    """Below what copies alone need, and what the host alone needs."""
    least = []
    for options in ({"host_state": True, "recompute": False, "offload": False}, {}):
        with pytest.raises(InfeasibleError) as caught:
            planner.plan(program(), ONE, device="h100", memory_limit=1, **options)
        least.append(caught.value.least)
    return round(0.97 * min(least))


def test_pieces_go_to_the_host_on_several_devices():
    """Below what ZeRO needs; the folded and the unfolded price agree (the search asserts it) with state on the host."""
    mesh, least = Mesh.parse("dp=2"), []
    for offload in (False, True):
        with pytest.raises(InfeasibleError) as caught:
            planner.plan(program(64), mesh, device="h100", memory_limit=1, host_state=offload, **ALONE)
        least.append(caught.value.least)
    limit = round((least[0] + least[1]) / 2)
    plan = planner.plan(program(64), mesh, device="h100", memory_limit=limit, host_state=True, **ALONE)
    assert plan.on_host and plan.predicted["peak_bytes"] <= limit


def test_optimizers_of_whole_parameters_leave_pieces_where_they_are():
    mesh = Mesh.parse("dp=2")
    for optimizer, less in (("muon", False), ("adamw", True)):
        least = []
        for offload in (False, True):
            with pytest.raises(InfeasibleError) as caught:
                planner.plan(
                    program(64), mesh, device="h100", memory_limit=1, optimizer=optimizer, host_state=offload,
                    offload=False,
                    recompute=False, constraints={"dp": "zero3"},
                )  # fmt: skip
            least.append(caught.value.least)
        assert (least[1] < least[0]) == less, optimizer


@pytest.mark.parametrize("state", ["device", HOST])
def test_the_state_of_what_is_given_stays_where_it_is(state):
    """As `autopar resolve --keep` gives it; of the others the fewest go that make it fit."""
    size = parts(64)
    limit = round(size["parameters"] + size["gradients"] + 0.3 * size["optimizer"])
    free = planner.plan(program(64), ONE, device="h100")
    last = list(free.storage)[-1]
    given = {last: replace(free.storage[last], state=state)}
    options: Any = {"device": "h100", "memory_limit": limit, "host_state": True, **ALONE}
    plan = planner.plan(program(64), ONE, storage=given, **options)
    assert plan.storage[last].state == state and set(plan.on_host) - {last}
    assert plan.predicted["peak_bytes"] <= limit
    fewer = on_host(
        replace(plan, storage={n: replace(s, state="device") for n, s in plan.storage.items()} | given),
        [n for n in plan.on_host if n != last][1:],
    )
    assert planner.price(program(64), fewer, "h100").peak_bytes > limit, "no more than it takes"
    if state == "device":  # of all, nothing is left to be said
        with pytest.raises(InfeasibleError):
            planner.plan(program(64), ONE, storage=free.storage, **options)


# ---- time ----------------------------------------------------------------------------------------------------------


def test_the_order_of_what_the_host_does():
    """Two gradients of 4 and 2 s to copy, one behind the other; then the host steps, then parameters go up."""
    device = replace(DEVICES["h100"], host=Host(Link(1.0, 0.0), 1.0))
    aside = Aside(device, [(3.0, HostSeconds(2.0, 1.0, 0.5)), (1.0, HostSeconds(4.0, 3.0, 0.25))])
    assert aside.arrived() == 7.0  # 1 to 5, 5 to 7
    assert aside.update(6.0, 0.5) == pytest.approx(1.0 + 4.0 + 0.75)
    assert aside.update(10.0, 0.5) == pytest.approx(4.75)
    assert aside.update(10.0, 9.0) == 9.0  # the device is busy for longer
    assert aside.update(6.0, 0.5, overlap=False) == pytest.approx(0.5 + 3.5 + 7.25)
    same = Aside(replace(device, host=None), aside.work)
    assert same.update(6.0, 0.5) == pytest.approx(0.5 + 3.5 + 7.25)
    assert Aside(device).update(6.0, 0.5) == 0.5


@pytest.mark.parametrize("device", ["h100", "cpu"])
@pytest.mark.parametrize("mesh", ["dp=1", "dp=2"])
def test_simulated_one_after_the_other_is_the_price(device, mesh):
    plan = planner.plan(program(64), Mesh.parse(mesh), device=device)
    plan = on_host(plan, list(plan.storage)[1:])
    serial = simulate(program(64), plan, device, overlap=False).step_s
    assert planner.price(program(64), plan, device).step_s == pytest.approx(serial, rel=1e-9)
    beside = simulate(program(64), plan, device).step_s
    assert beside <= serial


def test_a_slower_link_takes_longer_and_changes_nothing_else():
    plan = planner.plan(program(), ONE, device="h100")
    there, steps = on_host(plan, list(plan.storage)), []
    for bandwidth in (100e9, 50e9, 25e9):
        device = replace(DEVICES["h100"], host=Host(Link(bandwidth, 1e-5), 60e9))
        found = simulate(program(), there, device)
        steps.append(found.step_s)
        assert found.step_s == pytest.approx(found.compute_s + found.exposed_s + found.update_s)
        assert simulate(program(), plan, device) == simulate(program(), plan, "h100")
    assert steps == sorted(steps) and steps[0] < steps[-1]


# ---- from outside --------------------------------------------------------------------------------------------------


def test_a_limit_is_held_by_the_module_that_is_asked_for_it():
    """Planned and run, on this machine; without optimizer= nothing may go to the host."""
    torch.manual_seed(0)
    model, x = Mlp(width=32).double(), torch.randn(8, 32, dtype=torch.float64)
    options: dict[str, Any] = {"example": (x,), "device": HOSTED}
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
    size = sum(p.nbytes for p in model.parameters())
    options["memory_limit"] = round(2.8 * size)  # parameters and optimizer state are 3
    for more in ({}, {"optimizer": adamw, "offload": False}):
        with pytest.raises(InfeasibleError) as caught:
            autopar.compile(model, "dp=1", **options, **more)
    # Proposed is what is then planned: with optimizer=, what waits on the host may be its state.
    assert [fix.what for fix in caught.value.fixes if "offload" in fix.changes] == ["offload=True"]
    pm = autopar.compile(model, "dp=1", **options, optimizer=adamw)
    assert pm.plan.on_host and pm.plan.predicted["peak_bytes"] <= options["memory_limit"]
    optimizer = adamw(model.parameters())
    with pytest.warns(UserWarning, match="captured the model again"):  # the last, whose parameters stay where they lie
        for rows in (x, x, x[:4]):
            loss = model(rows)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert pm.train_step(rows).item() == pytest.approx(loss.item(), rel=1e-12)
    assert [step.plan.on_host for step in pm._state.steps.values()] == [pm.plan.on_host] * 2
    assert pm.memory_per_rank()[0]["host"] >= 4 * size / 4


def test_files():
    plan = planner.plan(program(64), ONE, device="h100")
    there = on_host(plan, list(plan.storage)[:1])
    again = Plan.from_json(there.to_json())
    assert again == there and again.on_host == there.on_host == (next(iter(plan.storage)),)
    assert '"host"' not in plan.to_json()
    with pytest.raises(PlanError, match="'moon' is not one of"):
        Plan.from_json(there.to_json().replace('"host"', '"moon"'))
