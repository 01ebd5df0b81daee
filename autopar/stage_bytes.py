"""What the stages of a pipeline that does not fit would hold, by kind."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.costmodel.items import items_of
from autopar.costmodel.memory import Policy
from autopar.costmodel.stages_answer import size
from autopar.errors import InfeasibleError
from autopar.mesh import Mesh
from autopar.pipeline.cut import cut
from autopar.proposals import Proposal


def by_stage(error: InfeasibleError, proposals: Mapping[int, Proposal], slack: float, mesh: Mesh) -> InfeasibleError:
    """The error with what stages always hold told apart: parameters, gradients, optimizer state, and what is left.

    Sums of gradients stand beside those of a micro-batch; "static" keeps those, copies of weights, buffers and slack.
    """
    if error.way is None:
        return error
    micro, cuts, options = error.way
    chosen = proposals[micro]
    parts = cut(chosen.program, tuple(chosen.starts[at - 1] for at in cuts[1:-1]))
    stages = []
    for stage, option, held in zip(parts, options, error.stages):
        plan, kinds = chosen.plans[option], dict.fromkeys(("parameters", "gradients", "optimizer"), 0.0)
        policy = Policy(chosen.program.training, optimizer=plan.optimizer)
        for item in items_of(stage.program).items:
            if item.kind == "param":
                for kind, count in policy.stored(item, plan.stored(item.name).spec, plan.mesh.sizes).items():
                    kinds[kind] += count * (1 + slack)
        rest = max(0.0, held["static"] - sum(kinds.values()))
        stages.append({**kinds, **held, "static": rest})
    told = [
        f"  stage {number}: {', '.join(f'{kind} {size(count)}' for kind, count in held.items() if count >= 0.5)}"
        for number, held in enumerate(stages)
    ]
    return InfeasibleError(
        "\n".join([str(error), *told]), error.least, error.memory, limit=error.limit, step_s=error.step_s,
        stages=stages, mesh=str(mesh), way=error.way,
    )  # fmt: skip


__all__ = ["by_stage"]
