"""Every Hugging Face architecture of the list captures, with a gradient for each parameter it uses, and plans."""

from __future__ import annotations

import pytest
import torch

from autopar.capture import capture
from autopar.costmodel.planner import check_plan, plan
from autopar.costmodel.rules import rule_source
from autopar.errors import CaptureError
from autopar.graph import is_op
from autopar.mesh import Mesh
from tests.zoo_hf import HF_ARCHITECTURES, REFUSED, UNSUPPORTED

#: So many run always, the others in the long run.
QUICK = list(HF_ARCHITECTURES)[:36:2]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HF_ARCHITECTURES]
)
def test_architecture_captures_and_plans(name):
    model, batch = HF_ARCHITECTURES[name](seed=0)
    program = capture(model, (), batch)
    assert [s.name for s in program.of_kind("tangent")] == ["loss"]
    grads = [s for s in program.sinks if s.kind == "grad"]
    missing = [s.name for s in grads if s.node is None]
    assert len(grads) > len(missing)
    model.zero_grad()
    model(**batch).loss.backward()  # what eager gives a gradient, the graph does too
    eager = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {s.name for s in grads if s.node is not None} == eager
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    unknown = {str(n.target) for n in program.gm.graph.nodes if is_op(n) and rule_source(n) not in ("table", "user")}
    assert not unknown, f"ops without a rule in the table: {unknown}"
    found = plan(program, Mesh.parse("dp=2,tp=2"), device="h100", output_specs="free", time_limit=5)
    check_plan(program, found)
    assert found.solver["status"] in ("optimal", "feasible") and found.predicted["step_s"] > 0


def test_enough_architectures():
    assert len(HF_ARCHITECTURES) >= 34


@pytest.mark.parametrize("name", list(UNSUPPORTED))
def test_unsupported_says_why(name):
    model, batch = REFUSED[name](seed=0)
    with pytest.raises(CaptureError) as caught:
        capture(model, (), batch)
    assert UNSUPPORTED[name] in str(caught.value)
