"""A plan for a scaled-down program: what waits on the host does so there, too."""

from __future__ import annotations

from dataclasses import replace

from autopar.costmodel import planner
from autopar.costmodel.adapt import adapt
from autopar.costmodel.items import items_of
from autopar.costmodel.legal import plan_specs
from autopar.mesh import Mesh
from autopar.offload import HOSTED
from tests.test_recompute import ops, traced


def test_what_waits_on_the_host_lies_there_as_it_was_made():
    """Also where the plan, written by hand, does not name the ways; and as many copies are under way."""
    program = traced("llama")[0]
    mesh = Mesh.parse("dp=2,tp=2")
    plan = planner.plan(program, mesh, constraints={"dp": "ddp", "tp": "tp"})
    plan = replace(plan, saved=dict.fromkeys(ops(program), "offload"), copies=5)
    found = adapt(program, plan, mesh)
    assert found.plan.copies == 5 and found.plan.saved and not found.changed and found.kept == found.total
    items = items_of(program, found.plan.saved)
    specs = plan_specs(items, found.plan)
    ways = [i for i in items.items if i.node is not None and i.node.target in HOSTED]
    split = 0
    for way in ways:
        (operand,) = way.ins
        assert specs.outs[way.index] == (specs.outs[operand.item][operand.index],), way.name
        split += any(p.kind == "S" for p in specs.outs[way.index][0])
    assert split > 20
    assert planner.price(program, found.plan) == planner.price(program, plan)
