"""The plans of the stages of a pipeline, out of one plan of the whole program.

An op, a parameter and an input are in a stage what they are in the whole. What crosses a boundary lies there as it is
made; what is still to be summed is brought first to where its first reader wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from autopar.costmodel.items import Tensor, items_of
from autopar.costmodel.legal import Specs, plan_specs
from autopar.graph import Program, results
from autopar.pipeline.cut import Stage
from autopar.plan import Plan
from autopar.recompute import copy_of, way_of
from autopar.spec import R, Spec


def stage_plans(program: Program, plan: Plan, stages: Sequence[Stage]) -> list[Plan]:
    """One plan for each stage. `plan`: of the whole program, on the mesh of a stage.

    Raises:
        PlanError: the plan is not legal for the program.
    """
    items = items_of(program, plan.saved)
    specs = plan_specs(items, plan)
    number = {item.node.name: item.index for item in items.items if item.node is not None}

    def crossing(name: str) -> Spec:
        node, _, index = name.removeprefix("%").partition(".")
        tensor = Tensor(number[node], int(index or 0))
        return _at_rest(tensor, specs, items.users.get(tensor, []))

    out = []
    for stage in stages:
        nodes = [n for n in stage.program.gm.graph.nodes if "address" in n.meta]
        addresses = [n.meta["address"] for n in nodes]
        inputs = {s.name: plan.inputs[s.name] for s in stage.program.of_kind("input") if s.name in plan.inputs}
        inputs.update({name: crossing(name) for name in (*stage.receives, *stage.receives_back)})
        outputs = {s.name: plan.outputs[s.name] for s in stage.program.sinks if s.name in plan.outputs}
        outputs.update({name: crossing(name) for name in (*stage.sends, *stage.sends_back)})
        names = {s.name for s in stage.program.sources}
        out.append(
            replace(
                plan,
                fingerprint=stage.program.fingerprint,
                choices={a: plan.choice(a) for a in (*addresses, *_made(plan, nodes))},
                storage={k: s for k, s in plan.storage.items() if k in names},
                inputs=inputs,
                outputs=outputs,
                saved={a: how for a in addresses if (how := plan.how_saved(a)) is not None},
            )
        )
    return out


def _made(plan: Plan, nodes: Sequence[fx.Node]) -> list[str]:
    """Of the backward's copies of ops, and of ways to and from the host, those whose choices the plan names."""
    found: list[str] = []
    for node in nodes:
        address = node.meta["address"]
        found += [copy_of(address), *(way for i in range(len(results(node))) for way in way_of(address, i))]
    return [address for address in found if plan.named(address) is not None]


def _at_rest(tensor: Tensor, specs: Specs, users: Sequence[tuple[int, int]]) -> Spec:
    """Where a value lies when it is sent."""
    made = specs.outs[tensor.item][tensor.index]
    wanted: Sequence[Spec] = [specs.ins[item][position] for item, position in users] or [made]
    return tuple(
        p if p.kind != "P" else next((w[axis] for w in wanted if w[axis].kind == "S" and w[axis].outer == 1), R)
        for axis, p in enumerate(made)
    )


__all__ = ["stage_plans"]
