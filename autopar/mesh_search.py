"""Which axes, stages of a pipeline among them: the search for `mesh=N`.

Shapes without stages come from `costmodel.search`. Beside them stand pipelines of every number of ranks that divides
the devices, first with one number of micro-batches each; what then is the best pipeline is planned with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from autopar.costmodel import search
from autopar.costmodel.devices import Device, machine
from autopar.costmodel.search import Progress, Tried
from autopar.errors import BatchError, CaptureError, ConstraintError, InfeasibleError, ScheduleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.options import Asked
from autopar.pipeline.plans import AXIS, OWN
from autopar.pipeline.tables import read
from autopar.stage_search import micro_choices, plan_pipeline
from autopar.stages import loss_of

#: Ranks in a lane, at most.
LONGEST = 16
_Options = Callable[[Program, Asked], Mapping[str, Any]]


def search_meshes(
    program: Program,
    count: int,
    asked: Asked,
    options: _Options,
    program_of: Callable[[int], Program],
    rows: int,
    progress: Progress | None = None,
) -> list[Tried]:
    """Plans on the shapes of `count` devices, the best first; as `costmodel.search.search`. Where micro-batches or a
    schedule are asked for, of those with stages.

    Args:
        program: of the whole batch of `rows`. program_of: number of micro-batches -> the program of one of them.
        options: of the planner, for a program and what is asked.

    Raises:
        ScheduleError: a pipeline is asked for, and none goes. Others: as `costmodel.search.search`, if there is no
            pipeline either.
    """
    found: list[Tried] = []
    failure: Exception | None = None
    staged = asked.schedule is not None or asked.micro_batches is not None
    try:
        if not staged:
            found = search.search(program, count, **options(program, asked), progress=progress)
    except (InfeasibleError, ConstraintError) as error:
        failure = error
    found += _pipelines(program, count, asked, options, program_of, rows, progress or (lambda what, done: None))
    found = search.ranked(found)
    if found and found[0].plan is not None:
        return found
    if failure is not None:
        raise failure
    reasons = "".join(f"\n  {tried.mesh}: {tried.reason}" for tried in found)
    raise ScheduleError(
        f"no pipeline of {count} devices goes with schedule={asked.schedule or 'any'}, "
        f"micro_batches={asked.micro_batches or 'any'}; leave them out, or name the axes of the mesh{reasons}"
    )


def _pipelines(
    program: Program, count: int, asked: Asked, options: _Options, program_of: Callable[[int], Program], rows: int,
    tell: Progress,
) -> list[Tried]:  # fmt: skip
    if not program.training or asked.outputs != "auto" or rows < 2 or asked.compression is not None:
        return []
    try:
        loss_of(program)
    except BatchError:  # without one, nothing says what a pipeline's backward starts from
        return []

    def attempt(mesh: Mesh, quick: bool) -> Tried:
        tell(f"planning stages on {mesh}", 1.0)
        wanted = replace(asked, mesh=mesh)
        try:
            if quick:
                ranks = mesh.sizes[mesh.axis(AXIS)]
                counts = micro_choices(rows, ranks, wanted)
                wanted = wanted if len(counts) == 1 else replace(wanted, micro_batches=counts[len(counts) // 2])
            return Tried(mesh, plan_pipeline(program_of, rows, wanted, lambda program: options(program, wanted)))
        except (InfeasibleError, ConstraintError, ScheduleError, BatchError, CaptureError) as error:
            return Tried(mesh, None, str(error))

    shapes = list(meshes(count, min(rows, LONGEST), asked.device))
    if asked.schedule == OWN:
        own = len(read(asked.table))
        shapes = [mesh for mesh in shapes if mesh.sizes[mesh.axis(AXIS)] == own]
    tried = search.ranked([attempt(mesh, quick=True) for mesh in shapes])
    # Where none fits with that one number, others may; the longest lanes leave a rank the least to hold.
    first = [0] if tried and tried[0].plan is not None else [n for n in (0, len(tried) - 1) if 0 <= n < len(tried)]
    for at in dict.fromkeys(first):
        tried[at] = min((tried[at], attempt(tried[at].mesh, quick=False)), key=_seconds)
    return tried


def _seconds(tried: Tried) -> float:
    return float("inf") if tried.plan is None else float(tried.plan.predicted["step_s"])


def meshes(count: int, longest: int, device: str | Device) -> Iterator[Mesh]:
    """One shape for every number of ranks in a lane: stages farthest apart, as messages between them are few, and the
    ranks of a stage in one axis, or in two where they are more than a node holds."""
    for ranks in range(2, min(count, longest) + 1):
        if count % ranks:
            continue
        each = count // ranks
        if each == 1:
            yield Mesh((AXIS,), (ranks,))
            continue
        mesh = Mesh((AXIS, "dp"), (ranks, each))
        node = machine(device, mesh).device.node
        wide = node > 1 and each % node == 0 and each > node
        yield Mesh((AXIS, "dp", "tp"), (ranks, each // node, node)) if wide else mesh


__all__ = ["LONGEST", "meshes", "search_meshes"]
