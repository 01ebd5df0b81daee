"""A program of another shape or mode is planned with the parameters where they lie already."""

from __future__ import annotations

import pytest
import torch

from autopar.capture import capture
from autopar.costmodel.planner import check_plan, plan
from autopar.costmodel.price import price
from autopar.mesh import Mesh
from tests import zoo

MESH = Mesh.parse("dp=2,tp=2")


@pytest.fixture(scope="module")
def trained():
    model, batch = zoo.ZOO["llama"](0, 0.0)
    program = capture(model, (), batch)
    return model, batch, plan(program, MESH, constraints={"dp": "zero3", "tp": "tp"})


def test_an_evaluation_is_planned_and_priced_with_the_training_storage(trained):
    model, batch, first = trained
    program = capture(model.eval(), (), {k: v[:4] for k, v in batch.items()}, training=False)
    kept = plan(program, MESH, storage=first.storage)
    assert kept.storage == first.storage
    assert kept.predicted["peak_bytes"] == round(price(program, kept).peak_bytes)
    free = plan(program, MESH)
    assert free.storage != first.storage  # so that the test means something
    assert free.predicted["step_s"] <= kept.predicted["step_s"] * (1 + 1e-9)
    check_plan(program, kept)


def test_repeated_layers_stored_apart_stay_apart(trained):
    model, batch, first = trained
    program = capture(model.train(), (), batch)
    name = "model.layers.0.mlp.down_proj.weight"
    storage = {**first.storage, name: plan(program, MESH, constraints={name: "replicate"}).storage[name]}
    assert storage[name] != first.storage[name]
    assert plan(program, MESH, storage=storage).storage == storage


def test_what_capture_noted_is_in_the_plan():
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.linear(x).square().mean()

    found = plan(capture(Counts(), (torch.randn(4, 4),)), MESH)
    assert any("'calls'" in note for note in found.notes)
