"""Random legal plans over whole models: the best test of rules, localisers and lowering.

Every op takes a random legal choice on every axis, every parameter a random storage; 4 ranks (8 on the mesh of three
axes) run in lock step and must give the loss, every gradient and every buffer of the unsharded graph. 200 seeds in
all, of which the suite takes 80.
"""

import functools

import pytest
import torch

from autopar.capture import capture
from autopar.costmodel.planner import random_plan
from autopar.mesh import Mesh
from tests import parity, zoo
from tests.widen import widen_to_float64

MESHES = ("dp=2,tp=2", "dp=4", "a=2,b=2,c=2", "a=1,b=4")
SEEDS = [80, pytest.param(200, marks=pytest.mark.slow)]
MODELS = list(zoo.ZOO)


@functools.lru_cache(maxsize=1)
def reference(name):
    torch.manual_seed(0)
    model, batch = zoo.ZOO[name](0)
    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with widen_to_float64():
        program = capture(model, (), batch)
    values = parity.feeds(program, model, (), batch)
    return program, values, parity.run_global(program, values)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", MODELS)
def test_random_plans_keep_parity(name, seeds):
    program, values, want = reference(name)
    assert any(k == "grad" for k, _ in want), "the backward is missing"
    # Seeds are dealt out over the models.
    for seed in range(MODELS.index(name), seeds, len(MODELS)):
        mesh = Mesh.parse(MESHES[seed // len(MODELS) % len(MESHES)])
        plan = random_plan(program, mesh, seed)
        got = parity.run_local(parity.lower(program, plan), values)
        error, where = parity.max_error(got, want)
        assert error < 1e-9, f"{name} seed {seed} mesh {mesh}: {where} is off by {error:.1e}"
