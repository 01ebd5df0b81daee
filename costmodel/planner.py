"""Public face of planning: `plan`, `random_plan`, `check_plan`, `price`."""

from __future__ import annotations

from autopar.costmodel.items import items_of
from autopar.costmodel.legal import check_plan
from autopar.costmodel.shuffle import random_plan
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import Plan, Storage
from autopar.rule import WHOLE
from autopar.spec import R

__all__ = ["check_plan", "plan", "random_plan"]


def plan(program: Program, mesh: Mesh, *, device: str = "cpu", **_: object) -> Plan:
    whole = (R,) * len(mesh.sizes)
    items = items_of(program)
    return Plan(
        mesh,
        program.fingerprint,
        {i.name: (WHOLE,) * len(mesh.sizes) for i in items.ops()},
        {i.name: Storage(whole) for i in items.items if i.kind == "param"},
        {s.name: whole for s in program.of_kind("input")},
        {s.name: whole for s in program.sinks if s.kind == "output" and s.node is not None},
    )
