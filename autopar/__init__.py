"""autopar: plans and runs unmodified PyTorch models on many devices.

    pm = autopar.compile(model, "dp=2,tp=2", example=dict(input_ids=ids, labels=ids))
    optimizer = torch.optim.AdamW(pm.parameters())
    pm(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

`compile` gives a module that runs on this process's part of the mesh; `plan` only decides, and needs neither processes
nor devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopar.errors import (
    AutoparError,
    BatchError,
    CaptureError,
    ConstraintError,
    Fix,
    InfeasibleError,
    MeshError,
    PassError,
    PipelineError,
    PlanError,
    RankMismatchError,
    RuleError,
    RuntimeUseError,
    ScheduleError,
    SolverError,
    SpecError,
)
from autopar.explain import explain as _explain_capture
from autopar.mesh import Mesh
from autopar.plan import Plan, Storage
from autopar.rule import Choice, Rule
from autopar.spec import P, Placement, R, S

if TYPE_CHECKING:
    from autopar.memory_picture import MemoryTimeline
    from autopar.runtime.module import ParallelModule
    from autopar.tradeoff import Frontier

__version__ = "0.1.0"


def compile(model: Any, mesh: Any, **options: Any) -> ParallelModule:
    """Plan `model` on `mesh` and return it as a module that runs on this process's part; see `autopar.driver.compile`.

    Every process of the mesh calls it with the same arguments. Options: example, loss, device, memory_limit,
    constraints, plan, batch, shared, outputs, backend, check, timeout, init.
    """
    from autopar import driver

    return driver.compile(model, mesh, **options)


def plan_model(model: Any, mesh: Any, **options: Any) -> Plan:
    """Only decide: needs no process group, no device and no weights; see `autopar.driver.plan_model`.

    Options: example, loss, device, memory_limit, constraints, outputs, batch, shared; fixes: seconds to look for what
    would fit if nothing does.
    """
    from autopar import driver

    return driver.plan_model(model, mesh, **options)


#: `autopar.plan(model, mesh, ...)`. It hides the submodule of that name; `from autopar.plan import Plan` still works.
plan = plan_model


def explain_plan(plan: Plan, name: str, model: Any = None, **options: Any) -> str:
    """Why `plan` splits a parameter, module or op as it does, and what else would cost; see `autopar.answers.explain`.

    Options: example, loss, quick, everything.
    """
    from autopar import answers

    return answers.explain(plan, name, model, **options)


#: `autopar.explain(plan, NAME, model, example=...)`. It hides a submodule about failed captures, as `plan` does.
explain: Any = explain_plan
del _explain_capture


def frontier(model: Any, mesh: Any, **options: Any) -> Frontier:
    """What a step costs under less and less memory, down to the least that will do; see `autopar.tradeoff.frontier`.

    Options: points, memory_limit (of interest: marked), progress; and those of `plan`.
    """
    from autopar import answers

    return answers.frontier(model, mesh, **options)


def memory_timeline(plan: Plan, model: Any = None, **options: Any) -> MemoryTimeline:
    """What a rank holds over a step, by kind, predicted and measured; see `autopar.memory_picture.memory_timeline`.

    Options: example, loss, measure.
    """
    from autopar import answers

    return answers.memory_timeline(plan, model, **options)


def register_rule(op: Any, rule: Any) -> None:
    """Give the op `op` (a `torch.ops` overload) a sharding rule; see `autopar.costmodel.rules.register`."""
    from autopar import driver

    driver.register_rule(op, rule)


def __getattr__(name: str) -> Any:
    if name == "ParallelModule":
        from autopar.driver import ParallelModule

        return ParallelModule
    raise AttributeError(f"module 'autopar' has no attribute {name!r}")


__all__ = [
    "AutoparError",
    "BatchError",
    "CaptureError",
    "Choice",
    "ConstraintError",
    "Fix",
    "InfeasibleError",
    "Mesh",
    "MeshError",
    "P",
    "PassError",
    "PipelineError",
    "Placement",
    "Plan",
    "PlanError",
    "R",
    "RankMismatchError",
    "Rule",
    "RuleError",
    "RuntimeUseError",
    "S",
    "ScheduleError",
    "SolverError",
    "SpecError",
    "Storage",
    "compile",
    "explain",
    "explain_plan",
    "frontier",
    "memory_timeline",
    "plan",
    "plan_model",
    "register_rule",
]
