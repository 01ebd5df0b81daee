"""Which axes: the shapes that are tried, what is kept of them, and how a number of devices reaches the planner."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import autopar
from autopar.capture import capture
from autopar.costmodel import search
from autopar.costmodel.devices import DEVICES, Link
from autopar.costmodel.planner import plan
from autopar.costmodel.sweep import GAP
from autopar.errors import InfeasibleError, MeshError
from autopar.mesh import Mesh
from autopar.mesh_search import meshes
from tests import zoo
from tests.harness import Ranks

#: Two devices a node, slow compute, and links so different that it matters what lies inside a node.
PAIRS = dataclasses.replace(
    DEVICES["cpu"], name="pairs", flops={"float32": 1e8}, bandwidth=1e8, launch=0.0, node=2,
    fast=Link(1e9, 1e-7), slow=Link(2e7, 1e-6),
)  # fmt: skip


@pytest.fixture(scope="module")
def program():
    model, batch = zoo.ZOO["llama"](0, 0.0)
    return capture(model, (), batch)


@pytest.fixture(scope="module")
def found(program):
    return search.search(program, 4, device=PAIRS)


def test_shapes_multiply_to_the_count_and_each_problem_is_solved_once(found):
    assert {math.prod(t.mesh.sizes) for t in found} == {4}
    assert sorted(str(t.mesh) for t in found) == ["dp=2,tp=2", "dp=4"]
    eight = search._shapes(8, 3)
    assert len(eight) == search.choices(8) == 4
    nodes = dataclasses.replace(PAIRS, node=1)
    # on one link 2x4 and 4x2 are one problem
    assert len({search._kind(m, nodes, frozenset()) for m in search._shapes(8, 2)}) == 2
    assert len({search._kind(m, PAIRS, frozenset()) for m in search._shapes(8, 2)}) == 3


def test_the_best_comes_first_and_is_the_planners_own(program, found):
    steps = [t.plan.predicted["step_s"] for t in found]
    assert steps == sorted(steps)
    assert min(steps) == steps[0] < steps[1]  # so that the order means something
    again = plan(program, found[0].mesh, device=PAIRS)
    # Solves end within a gap, and where in it depends on how long they were given.
    assert again.predicted["step_s"] == pytest.approx(steps[0], rel=2 * GAP)
    listed = search.best_plan(found).solver["meshes"]
    assert [m["mesh"] for m in listed] == [str(t.mesh) for t in found]
    assert autopar.Plan.from_json(search.best_plan(found).to_json()).solver["meshes"] == listed


def test_shapes_that_do_not_fit_come_last_with_the_reason(program):
    # the batch of 8 cannot be cut in 16 pieces, and a strategy asks for it on every shape with that axis
    tried = search.search(program, 16, device=PAIRS, axes=2, constraints={"dp": "ddp"})
    assert tried[0].plan is not None
    assert tried[-1].plan is None and "16" in tried[-1].reason and "batch" in tried[-1].reason
    assert tried[-1].as_dict() == {"mesh": str(tried[-1].mesh), "reason": tried[-1].reason}


def test_shapes_without_a_constrained_axis_are_left_out(program):
    tried = search.search(program, 4, device=PAIRS, constraints={"tp": "tp"})
    assert [str(t.mesh) for t in tried] == ["dp=2,tp=2"]


@pytest.mark.slow
def test_nothing_fits(program):
    with pytest.raises(InfeasibleError):
        search.search(program, 4, device=PAIRS, memory_limit=1000, offload=False)


@pytest.mark.slow
def test_finer_shapes_of_the_best_are_tried(program):
    tried = {str(t.mesh) for t in search.search(program, 8, device=PAIRS)}
    assert "dp=2,sp=2,tp=2" in tried and "dp=8" in tried


def test_a_number_of_devices_is_searched_by_plan_and_compile():
    model, batch = zoo.ZOO["mlp_dropout"](0, 0.0)
    found = autopar.plan(model, 4, example=batch, device="cpu")
    assert {m["mesh"] for m in found.solver["meshes"]} == {"dp=4", "dp=2,tp=2", "pp=4", "pp=2,dp=2"}
    assert autopar.plan(model, 2, example=batch, device="cpu").mesh == Mesh.parse("dp=2")
    with pytest.raises(MeshError, match="how many devices"):
        autopar.plan(model, "auto", example=batch)
    with pytest.raises(MeshError, match="name the axes"):
        autopar.plan(model, 4, example=batch, batch="local")


def test_shapes_with_stages():
    assert [str(m) for m in meshes(4, 16, "h100")] == ["pp=2,dp=2", "pp=4"]
    found = [str(m) for m in meshes(64, 16, "h100")]
    assert found == ["pp=2,dp=4,tp=8", "pp=4,dp=2,tp=8", "pp=8,dp=8", "pp=16,dp=4"]
    assert [str(m) for m in meshes(12, 3, "h100")] == ["pp=2,dp=6", "pp=3,dp=4"]


def _train(mesh):
    model, batch = zoo.ZOO["mlp_dropout"](0, 0.0)
    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    try:
        pm = autopar.compile(model, mesh, example=batch, device="cpu")
    except autopar.AutoparError as error:
        return str(error)
    losses = []
    for module in (pm, model):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            out = module(**batch)
            loss = out if isinstance(out, torch.Tensor) else out["loss"] if isinstance(out, dict) else out[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    return str(pm.plan.mesh), losses


def _without_example():
    model, _ = zoo.ZOO["mlp_dropout"](0, 0.0)
    try:
        autopar.compile(model, 4)
    except autopar.AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_four_processes_agree_on_the_found_mesh():
    with Ranks(4, timeout=300) as ranks:
        for mesh in (4, "auto"):
            answers = ranks.run(_train, mesh)
            assert len({a[0] for a in answers}) == 1
            for _, (ours, plain) in answers:
                assert ours == pytest.approx(plain, rel=1e-9)
        for message in ranks.run(_without_example):
            assert "MeshError" in message and "example=" in message, message
