"""Parts of a plan that do not go together are refused, whoever has written it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.errors import PlanError
from autopar.mesh import Mesh
from autopar.plan import HOST, Pipeline, Plan, Storage
from autopar.precision import Precision
from autopar.spec import R
from autopar.together import check_together

pytestmark = pytest.mark.tiny
FP16 = Precision("fp16").record()
ON_HOST = {"weight": Storage((R,), state=HOST)}
STAGES = Pipeline("pp", ("fwd:b/mm#0",), 2, "1f1b")


def plan(**parts: object) -> Plan:
    return replace(Plan(Mesh.parse("dp=2"), "", {}, {}), **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"precision": FP16, "compression": "powersgd:2"}, "of another scale"),
        ({"precision": FP16, "storage": ON_HOST}, "until all are known to be finite"),
        ({"compression": "powersgd:2", "storage": ON_HOST}, "behind the backward"),
        ({"precision": FP16, "pipeline": replace(STAGES, schedule="paci")}, "the loss cannot be scaled"),
        ({"storage": ON_HOST, "pipeline": STAGES}, "which pipelines cannot do yet"),
        ({"compression": "bf16", "pipeline": STAGES}, "which pipelines cannot do yet"),
    ],
)
def test_what_does_not_go_together(parts, said):
    with pytest.raises(PlanError, match=said):
        check_together(plan(**parts))


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"precision": FP16, "compression": "bf16"},
        {"precision": FP16, "pipeline": STAGES},
        {"precision": Precision("bf16").record(), "storage": ON_HOST, "compression": "bf16"},
        {"pipeline": replace(STAGES, schedule="paci")},
    ],
)
def test_what_does(parts):
    check_together(plan(**parts))
