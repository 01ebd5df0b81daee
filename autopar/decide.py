"""Only deciding: from a model and what is asked for to a plan, without processes or a device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.costmodel import planner, search
from autopar.costmodel.devices import Device
from autopar.errors import BatchError, InfeasibleError, MeshError
from autopar.fixes import SECONDS, Question, explained
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.mesh_search import search_meshes
from autopar.options import Asked, Example, Stepped, arguments, ask, batch_rows
from autopar.plan import Plan
from autopar.precision import AS_IS, AUTO, Precision
from autopar.precision_search import quickest
from autopar.programs import Kept, Programs
from autopar.runtime.groups import MeshLike, as_mesh, running
from autopar.spec import Spec
from autopar.stage_search import plan_pipeline

#: Arguments of a call: positional, and by name.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def plan_model(
    model: nn.Module,
    mesh: Mesh | str | int,
    *,
    example: Example,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    device: str | Device | None = None,
    memory_limit: float | str | None = None,
    constraints: Mapping[str, str] | None = None,
    outputs: str = "auto",
    batch: str = "global",
    shared: Sequence[str] = (),
    training: bool = True,
    target: Mapping[str, Any] | None = None,
    progress: search.Progress | None = None,
    micro_batches: int | None = None,
    schedule: str | Path | None = None,
    weights: str = "current",
    optimizer_class: Stepped | None = None,
    recompute: bool = True,
    offload: bool = True,
    host_state: bool | None = None,
    compression: str | None = None,
    precision: str | None = None,
    reduce_dtype: str | None = None,
    fixes: float = SECONDS,
    quick: bool = False,
    programs: Programs | None = None,
) -> Plan:
    """Only decide. Needs no processes, no device, and no weights (a model on the meta device will do).

    Args: as `compile`. With a number as `mesh` the plan is the best of all shapes of so many devices, the others are in
        `solver["meshes"]`; with `micro_batches` or `schedule` it is the best pipeline of so many.
        host_state: whether gradients and optimizer state may lie on the host of a device that has one; default: as
            `offload`.
        training: with the backward. target: how `autopar verify` rebuilds the model; kept in the plan.
        progress: called with what is being done and the part done, 0 to 1.
        fixes: seconds to look for what would fit, if nothing does (`InfeasibleError.fixes`). quick: as of
            `costmodel.planner.plan`. programs: where captured programs are kept, to ask about a model again.

    Raises:
        CaptureError, ConstraintError, InfeasibleError: as they say.
    """
    given = dict(locals())
    count = devices(mesh)
    if mesh == "auto":
        raise MeshError('mesh="auto" means the processes that run; to plan, say how many devices there are: mesh=64')
    if count is not None and batch != "global":
        raise MeshError(
            f"mesh={count}: local batches are pieces along axes that the search has yet to choose; name the axes "
            f'("dp={count}"), or pass global batches'
        )
    shape = as_mesh(mesh)
    asked = ask(
        shape, device, memory_limit, constraints, outputs, batch, loss, shared, micro_batches, schedule, trains=True,
        weights=weights, searched=count is not None, optimizer_class=optimizer_class, recompute=recompute,
        offload=offload, host_state=offload if host_state is None else host_state, compression=compression,
        precision=precision, reduce_dtype=reduce_dtype,
    )  # fmt: skip
    asked = replace(asked, quick=quick)
    call = arguments(example)
    if call is None:
        raise BatchError("plan needs example=: the arguments of one call, for their shapes")
    programs = given["programs"] = programs or Kept()

    def found(precision: Precision) -> Plan:
        return planned(replace(asked, precision=precision), model, call, training, count, progress, programs)

    open_ = asked.precision.compute == AUTO
    try:
        plan = quickest(asked.precision, found) if open_ else found(asked.precision)
    except InfeasibleError as error:
        if fixes <= 0:
            raise
        # Rows and phases are the same in every precision.
        own = replace(asked, precision=AS_IS) if open_ else asked
        whole = own.capture(model, *call, training, programs)[0].program
        raise explained(Question(error, given, plan_model, whole, time.perf_counter() + fixes)) from None
    return replace(plan, target=dict(target or {}))


def planned(
    asked: Asked, model: nn.Module, call: Call, training: bool, count: int | None, progress: search.Progress | None,
    programs: Programs | None = None,
) -> Plan:  # fmt: skip
    """The plan of one call, on the mesh that is asked for, or the best of `count` devices. Raises as `plan_model`."""
    began = time.perf_counter()
    programs = programs or Programs()
    captured, pieces = asked.capture(model, *call, training, programs)
    seconds = time.perf_counter() - began
    whole, micros = captured.program, asked.micro_programs(programs)

    @functools.cache
    def program_of(micro: int) -> Program:
        return asked.micro(model, *call, whole, micro, micros)

    if asked.pipelined:
        found = plan_pipeline(
            program_of, batch_rows(whole), asked, lambda program: planner_options(program, asked), progress=progress
        )
    elif count is None:
        found = plan_one(whole, asked, pieces, progress=progress)
    else:
        tried = search_meshes(whole, count, asked, planner_options, program_of, batch_rows(whole), progress)
        found = search.best_plan(tried)
    return replace(found, solver={"capture_s": seconds, **found.solver})


def micro_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    micro: int,
    precision: Precision = AS_IS,
) -> Program:
    """The program of one of `micro` micro-batches of a call, as a pipeline's plan is for.

    Raises:
        CaptureError: as `autopar.capture`.
    """
    asked = replace(ask(Mesh(("rank",), (1,)), "cpu", None, None, "auto", "global", loss, ()), precision=precision)
    captured, _ = asked.capture(model, args, kwargs, True, Programs())
    return asked.micro(model, args, kwargs, captured.program, micro, Programs())


def plan_one(
    program: Program,
    asked: Asked,
    pieces: dict[str, Spec] | None,
    first: Plan | None = None,
    similar: Plan | None = None,
    progress: search.Progress | None = None,
) -> Plan:
    """Plan `program`, of which local batches come in `pieces`; with `first`, parameters stay where that stores them.

    The decisions of `similar`, a plan for another batch size, are kept where they are legal and fit: a last batch that
    is shorter than the others should not wait for a solver.
    """
    if similar is not None:
        kept = planner.transfer(program, similar, device=asked.device, memory_limit=asked.memory_limit)
        if kept is not None:
            return kept
    return planner.plan(
        program,
        asked.mesh,
        **planner_options(program, asked),
        input_specs=pieces,
        storage=first.storage if first is not None else None,
        progress=progress,
    )


def planner_options(program: Program, asked: Asked) -> dict[str, Any]:
    """What does not depend on the mesh."""
    free = asked.outputs == "sharded" or (asked.outputs == "auto" and program.has_loss and not asked.pipelined)
    return {
        "device": asked.device,
        "memory_limit": asked.memory_limit,
        "constraints": dict(asked.constraints),
        "optimizer": asked.optimizer_class,
        "recompute": asked.recompute,
        "offload": asked.offload,
        "host_state": asked.host_state,
        "compression": asked.compression,
        "output_specs": "free" if free else "replicated",
    }


def devices(mesh: MeshLike) -> int | None:
    """The number of devices whose shape is to be searched; None where the mesh is given, or is one device."""
    count = running() if mesh == "auto" else mesh
    if isinstance(count, bool) or not isinstance(count, int):
        return None
    return count if mesh == "auto" or count > 1 else None


__all__ = ["Call", "devices", "micro_program", "plan_model", "plan_one", "planned", "planner_options"]
