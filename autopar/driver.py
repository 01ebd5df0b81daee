"""From a model to a plan, and from a plan to a module that runs: the only file that knows all folders.

capture -> plan -> insert collectives and the other passes -> cut forward from backward -> bind to this rank -> run
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.checks import refuse_old_norms
from autopar.costmodel import planner, rules, search
from autopar.costmodel.devices import Device
from autopar.errors import BatchError, InfeasibleError, MeshError, PlanError
from autopar.fixes import SECONDS, Question, explained, question_of
from autopar.given import check_given
from autopar.given import check_plan as check_plan
from autopar.graph import Program
from autopar.lowering import lower, quicker, target_of
from autopar.mesh import Mesh
from autopar.mesh_search import search_meshes
from autopar.options import Asked, Example, arguments, ask, batch_rows, has_loss
from autopar.pipeline.plans import inner
from autopar.plan import Plan
from autopar.programs import KNOWN, TRACED, TRACED_BATCHES, Captured, Kept, Programs
from autopar.runtime.groups import MeshLike, as_mesh, connect, default_device, running
from autopar.runtime.handshake import Control
from autopar.runtime.module import Options, ParallelModule
from autopar.runtime.pipeline import Pipelined
from autopar.runtime.step import Lowered, check_backend
from autopar.runtime.storage import Init, first_difference, same_fields, skeleton
from autopar.runtime.training import Recipe
from autopar.spec import Spec
from autopar.stage_search import check_pipeline, fitting, plan_pipeline
from autopar.stages import inner_place, lower_pipeline, stage_of_state, starts_again, unjoined


def compile(
    model: nn.Module,
    mesh: MeshLike,
    *,
    example: Example | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    device: str | Device | None = None,
    memory_limit: float | str | None = None,
    constraints: Mapping[str, str] | None = None,
    plan: Plan | str | Path | None = None,
    batch: str = "global",
    shared: Sequence[str] = (),
    outputs: str = "auto",
    backend: str = "eager",
    check: bool = True,
    timeout: float = 300.0,
    init: Init | None = None,
    micro_batches: int | None = None,
    schedule: str | Path | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]] | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    weights: str = "current",
    nonfinite: str = "skip",
    optimizer_class: str | None = None,
    recompute: bool = True,
) -> ParallelModule:
    """Plan `model` on `mesh` and give it back as a module that runs on this process's part.

    A collective call: every process of the mesh makes it, with equal arguments. The values of rank 0's parameters and
    buffers are used by all; the model is not changed and may be deleted afterwards.

    Args:
        model: any module that `torch.export` can trace, in the mode (train or eval) it is to start in. Where it is,
            on the CPU or on CUDA, the compiled module runs; from the meta device, on CUDA under torchrun if there is.
        mesh: "dp=2,tp=4", an `autopar.Mesh`, or a torch DeviceMesh; or a number of devices, or "auto" for all that
            run: then axes and sizes are searched too, which needs `example`. A mesh of one runs in a plain process;
            otherwise processes come from torchrun, and torch.distributed is initialised if it is not yet.
        example: arguments of one call, (positional, ...) or {name: value}; only shapes and dtypes matter. Without it
            the model is captured at its first call, and has no parameters until then.
        loss: `loss(output, target)`; calls then take one more keyword, `target`, and return the loss.
        device: preset of the cost model ("cpu", "h100", ...), or a description; default: what this machine has.
        memory_limit: bytes per device, or text such as "24GB".
        constraints: {pattern of parameter names or op addresses: placement} and {mesh axis: strategy}. Patterns win
            over strategies, and where two patterns match the same name, on each mesh axis the later wins over the
            earlier; see `autopar.costmodel.constraints`.
        plan: a plan to run as it is, or the path of its file, instead of planning.
        batch: "global": every rank passes the whole batch. "local": every rank passes its own piece along dim 0 (see
            `ParallelModule.sampler_args`) of every tensor whose dim 0 is as long as that of most arguments and that
            `shared` does not name; what is passed besides must be equal on all ranks. The batch is split over the
            axes called dp, data or fsdp, or constrained to a data-parallel strategy; "local:AXIS[,AXIS]" names them.
        shared: names of tensor arguments that are no batch though they may be as long: every rank passes them whole
            and equal. Names as in messages ("mask", "batch.mask", "args[1]"), globs, or the name of a container. With
            global batches strategies do not follow their dim 0, and with a pipeline they are not divided into
            micro-batches: every micro-batch gets them whole.
        outputs: "full": plain whole tensors; "sharded": DTensors as the plan leaves them; "auto": sharded beside a
            scalar loss (which is always whole), else full.
        backend: "eager" or "inductor".
        check: compare arguments and seeds between ranks before each step; with "paci", when its pipeline is emptied.
        timeout: seconds a rank waits for the others, planning included.
        micro_batches: on a mesh with an axis called "pp", into how many pieces a batch is divided for the pipeline;
            default: what the planner finds quickest.
        schedule: of the pipeline: a name ("1f1b", "zb-h1", ...; `autopar.pipeline.schedules.SCHEDULES`) or the path of
            a CSV file with a table of your own; default: the quickest. "paci", which never empties the pipeline, needs
            `optimizer`, and `pm.train_step(batch)` in place of the loop.
        optimizer: `lambda params: AdamW(params, ...)`: the module makes and steps it itself, in `pm.train_step`.
            It may make several, in a list, each of some of the parameters.
        lr_scheduler: `lambda optimizer: CosineAnnealingLR(optimizer, ...)`: stepped behind every update.
        clip: largest norm of gradients in `train_step`; with "paci" each stage clips by its own.
        weights: with "paci", "current": forward and backward read the weights of now, as published; "stashed": a
            backward reads its forward's, which are kept; "predicted": a forward reads those that its backward is to
            find, as the last update lets expect (one more copy of parameters; brings the loss nearest to 1f1b's).
        nonfinite: with "paci", what a stage does with gradients that are not finite: "skip" its update, or "raise".
        optimizer_class: the name of what steps the parameters, in `train_step` or in your own loop, for the memory that
            it takes and moves: "sgd", "sgd_momentum", "lion", "muon", ... (`autopar.costmodel.memory.OPTIMIZERS`);
            default: the given plan's, else "adamw". A function in `optimizer` is not asked.
        recompute: let the backward compute again what the forward then need not keep, if memory is short and that is
            the quickest that fits.
        init: `init(name, shape, dtype)` gives the value of a parameter or buffer that is on the meta device.

    Raises:
        MeshError: the mesh does not match the processes.
        RankMismatchError: the ranks passed different models or options, or another rank failed; on every rank.
        CaptureError, ConstraintError, InfeasibleError, PlanError: as they say.

    Warns (UserWarning): a tensor taken for a piece of a local batch is the same on every rank; `forward` draws from
    Python's or numpy's global generator; a new shape is captured and planned again.
    """
    count = _devices(mesh)
    if count is not None:
        given = plan
        if isinstance(plan, (str, Path)):
            with _flat(count, timeout, model).together("reading the options"):
                given = Plan.load(plan)
        if not isinstance(given, Plan):
            given = _searched(
                count, timeout, model, example=example, loss=loss, device=device, memory_limit=memory_limit,
                constraints=constraints, outputs=outputs, batch=batch, shared=shared, micro_batches=micro_batches,
                schedule=schedule, weights=weights, optimizer_class=optimizer_class, recompute=recompute,
            )  # fmt: skip
        mesh, plan = given.mesh, given
    shape = as_mesh(mesh)
    grid = connect(mesh, default_device(mesh, model), timeout)
    control = Control(grid)
    with control.together("reading the options"):
        check_backend(backend)
        given = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        if given is not None and not isinstance(given, Plan):
            raise PlanError(f"plan is a {type(given).__name__}; pass an autopar.Plan or the path of its file")
        if given is not None and optimizer_class not in (None, given.optimizer):
            raise PlanError(
                f"optimizer_class={optimizer_class} is asked for, and the plan was made for {given.optimizer}; leave "
                "it out, or plan again"
            )
        asked = ask(
            shape, device, memory_limit, constraints, outputs, batch, loss, shared, micro_batches, schedule,
            trains=optimizer is not None, weights=weights, optimizer_class=optimizer_class, recompute=recompute,
        )  # fmt: skip
        if given is not None:
            asked = replace(asked, optimizer_class=given.optimizer)
        recipe = None
        if optimizer is not None:
            recipe = Recipe(optimizer, lr_scheduler, clip, weights, nonfinite)
        call = arguments(example)
        refuse_old_norms(model)
        empty = skeleton(model)
    control.same(
        "the model",
        same_fields(model),
        "build the same model on every rank (same configuration, same freezing)",
        first_difference,
    )
    control.same("the options of compile", asked.text(), "pass the same options on every rank")
    control.same(
        "the plan", given and _decisions(given), "give every rank the same plan file", lambda a, b: "other contents"
    )
    # passes/fuse.py and inplace.py stay off: gradients that are views of one bucket cannot be deep-copied.
    build = _Builder(control, asked, given, eager=backend == "eager")
    options = Options(check, backend, asked.data_axes, init, asked.shared, recipe)
    module = ParallelModule(model, empty, grid, control, build, options)
    if call is not None:
        module.prepare(*call[0], **call[1])
    return module


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
    optimizer_class: str | None = None,
    recompute: bool = True,
    fixes: float = SECONDS,
    quick: bool = False,
    programs: Programs | None = None,
) -> Plan:
    """Only decide. Needs no processes, no device, and no weights (a model on the meta device will do).

    Args: as `compile` (of `constraints`, too, later patterns win over earlier ones that match the same name). With a
        number as `mesh` the plan is the best of all shapes of so many devices, the others are in `solver["meshes"]`;
        with `micro_batches` or `schedule` it is the best pipeline of so many.
        training: with the backward. target: how `autopar verify` rebuilds the model; kept in the plan.
        progress: called with what is being done and the part done, 0 to 1.
        fixes: seconds to look for what would fit, if nothing does (`InfeasibleError.fixes`). quick: as of
            `costmodel.planner.plan`. programs: where captured programs are kept, to ask about a model again.

    Raises:
        CaptureError, ConstraintError, InfeasibleError: as they say.
    """
    given = dict(locals())
    count = _devices(mesh)
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
    )  # fmt: skip
    asked = replace(asked, quick=quick)
    call = arguments(example)
    if call is None:
        raise BatchError("plan needs example=: the arguments of one call, for their shapes")
    began = time.perf_counter()
    programs = given["programs"] = programs or Kept()
    captured, pieces = asked.capture(model, *call, training, programs)
    seconds = time.perf_counter() - began
    whole, micros = captured.program, asked.micro_programs(programs)

    @functools.cache
    def program_of(micro: int) -> Program:
        return asked.micro(model, *call, whole, micro, micros)

    try:
        if asked.pipelined:
            found = plan_pipeline(
                program_of, batch_rows(whole), asked, lambda p: _planner_options(p, asked), progress=progress
            )
        elif count is None:
            found = _plan(whole, asked, pieces, progress=progress)
        else:
            tried = search_meshes(whole, count, asked, _planner_options, program_of, batch_rows(whole), progress)
            found = search.best_plan(tried)
    except InfeasibleError as error:
        if fixes <= 0:
            raise
        raise explained(Question(error, given, plan_model, whole, time.perf_counter() + fixes)) from None
    return replace(found, target=dict(target or {}), solver={"capture_s": seconds, **found.solver})


def micro_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any, Any], torch.Tensor] | None,
    micro: int,
) -> Program:
    """The program of one of `micro` micro-batches of a call, as a pipeline's plan is for.

    Raises:
        CaptureError: as `autopar.capture`.
    """
    asked = ask(Mesh(("rank",), (1,)), "cpu", None, None, "auto", "global", loss, ())
    captured, _ = asked.capture(model, args, kwargs, True, Programs())
    return asked.micro(model, args, kwargs, captured.program, micro, Programs())


def register_rule(op: Any, rule: Any) -> None:
    """Give an op a sharding rule; see `autopar.costmodel.rules.register`."""
    rules.register(op, rule)


#: What a user who waited is told, by how a program came about.
_NEWS = {
    TRACED: "autopar has captured and planned again: {changes}. Keep shapes fixed (pad, or drop the last batch) to "
    "avoid the wait",
    TRACED_BATCHES: "autopar has captured the model again, now for every batch size: {changes}. Further batch sizes "
    "are not captured again",
    KNOWN: "",
}


#: Round the planning of a first call (the plan that places parameters already, or None): says what would fit.
Explaining = Callable[[Plan | None], contextlib.AbstractContextManager[None]]


class _Builder:
    """Makes the lowered program of one call, in step with the other ranks."""

    def __init__(self, control: Control, asked: Asked, given: Plan | None, eager: bool) -> None:
        self.control, self.asked, self.given, self.eager = control, asked, given, eager
        self.programs = Programs()
        self.micros = asked.micro_programs(self.programs)
        self.plans: dict[Hashable, Plan] = {}  # the last one of every form of call
        self.homes: dict[str, int] = {}  # what one stage of a pipeline has alone -> that stage
        # The same on every rank: what ranks compute alike must stay alike to the last bit.
        self.onednn = control.share("reading the profile", lambda: quicker(asked.device))

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, first: Plan | None
    ) -> Lowered | Pipelined:
        control, grid = self.control, self.control.grid
        with control.together("capture"):
            captured, pieces = self.asked.capture(model, args, kwargs, training, self.programs)
        if self.asked.pipelined:
            return self._pipelined(model, args, kwargs, captured, first)
        program = captured.program
        control.same(
            "the captured program",
            program.digest(),
            "the model's code must take the same path on every rank (no branches on the rank)",
        )
        explaining = self._explaining(model, args, kwargs, program)
        with torch.autocast("cpu", enabled=False):  # it is in the program, and not for what follows
            plan = self._plan(program, pieces, first, self.plans.get(captured.form), explaining)
            self.plans[captured.form] = plan
            with control.together("lowering"):
                at = grid.mesh.coordinates(grid.rank)
                lowered = lower(program, plan, at, grid.group_names, self.eager, target_of(grid, self.onednn))
        return replace(lowered, news=_NEWS[captured.how])

    def _pipelined(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured, first: Plan | None
    ) -> Pipelined:
        """What this rank runs of a pipeline; `captured`: the call with the whole batch."""
        control, grid, asked, whole = self.control, self.control.grid, self.asked, captured.program
        rows, explaining = batch_rows(whole), self._explaining(model, args, kwargs, whole)

        @functools.cache
        def program_of(micro: int) -> Program:
            return asked.micro(model, args, kwargs, whole, micro, self.micros)

        given = self.given if self.given is not None else first
        pipeline = given.pipeline if given is not None else None
        if pipeline is not None:
            with control.together("dividing the batch"):
                pipeline = replace(pipeline, micro=fitting(rows, pipeline.micro))
                if not whole.training and unjoined(program_of(pipeline.micro), whole, pipeline.micro):
                    pipeline = replace(pipeline, micro=1)  # evaluated whole, what micro-batches cannot give is exact
                if self.homes:  # another kind of call may have other ops where stages begin
                    starts = starts_again(program_of(pipeline.micro), pipeline.starts, self.homes)
                    pipeline = replace(pipeline, starts=tuple(starts))
        if self.given is not None and first is None:
            with control.together("checking the plan"):
                plan = check_pipeline(self.given, program_of, rows, asked)
        else:
            storage = inner(first).storage if first is not None else None

            def made() -> str:
                with explaining(first):
                    return plan_pipeline(
                        program_of, rows, asked, lambda p: _planner_options(p, asked), storage, pipeline
                    ).to_json()

            plan = Plan.from_json(control.share("planning", made), "the plan of rank 0")
        assert plan.pipeline is not None
        with control.together("lowering"):
            program = program_of(plan.pipeline.micro)
            place = inner_place(grid.mesh, grid.rank, plan.pipeline.axis, grid.group_names)
            lowered = lower_pipeline(
                program, whole, plan, place, full=asked.outputs == "full", eager=self.eager,
                target=target_of(grid, self.onednn), news=_NEWS[captured.how],
            )  # fmt: skip
            self.homes = {**stage_of_state(program, plan.pipeline.starts), **self.homes}
        control.same(
            "the captured program",
            program.digest(),
            "the model's code must take the same path on every rank (no branches on the rank)",
        )
        return lowered

    def _explaining(self, model: nn.Module, args: Any, kwargs: Any, whole: Program) -> Explaining:
        """Has what no plan fits explained, unless parameters lie somewhere already: then nothing can be changed."""
        cast = torch.autocast("cpu", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"))

        @contextlib.contextmanager
        def explaining(first: Plan | None) -> Iterator[None]:
            try:
                yield
            except InfeasibleError as error:
                question = question_of(error, self.asked, model, args, kwargs, whole, plan_model)
                if first is not None or question is None:
                    raise
                with cast:  # as the call itself was captured
                    raise explained(question) from None

        return explaining

    def _plan(self, program: Program, pieces: Any, first: Plan | None, similar: Any, explaining: Explaining) -> Plan:
        if self.given is not None and (first is None or self.given.fingerprint == program.fingerprint):
            with self.control.together("checking the plan"):
                check_given(self.given, program, self.asked, pieces)
            return self.given
        # One rank plans: the others would only compete for its processors, and the answer is the same by construction.
        def made() -> str:
            with explaining(first):
                return _plan(program, self.asked, pieces, first, similar).to_json()

        text = self.control.share("planning", made)
        return Plan.from_json(text, "the plan of rank 0")


def _plan(
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
        **_planner_options(program, asked),
        input_specs=pieces,
        storage=first.storage if first is not None else None,
        progress=progress,
    )


def _planner_options(program: Program, asked: Asked) -> dict[str, Any]:
    """What does not depend on the mesh."""
    free = asked.outputs == "sharded" or (asked.outputs == "auto" and has_loss(program) and not asked.pipelined)
    return {
        "device": asked.device,
        "memory_limit": asked.memory_limit,
        "constraints": dict(asked.constraints),
        "optimizer": asked.optimizer_class,
        "recompute": asked.recompute,
        "quick": asked.quick,
        "output_specs": "free" if free else "replicated",
    }


def _devices(mesh: MeshLike) -> int | None:
    """The number of devices whose shape is to be searched; None where the mesh is given, or is one device."""
    count = running() if mesh == "auto" else mesh
    if isinstance(count, bool) or not isinstance(count, int):
        return None
    return count if mesh == "auto" or count > 1 else None


def _flat(count: int, timeout: float, model: nn.Module) -> Control:
    """Joins the processes before it is known how they are arranged. A collective call."""
    flat = Mesh(search.NAMES[0], (count,))
    return Control(connect(flat, default_device(flat, model), timeout))


def _searched(count: int, timeout: float, model: nn.Module, example: Example | None, **options: Any) -> Plan:
    """The best plan on any shape of the running processes, found by rank 0. A collective call."""
    control = _flat(count, timeout, model)
    with control.together("reading the options"):
        if example is None:
            raise MeshError(
                f"mesh={count}: the best shape of {count} devices is searched, which needs example=; or name the axes, "
                f'such as "dp={count}"'
            )
        if options["batch"] != "global":
            raise MeshError(f'mesh={count} with batch="local": name the axes, such as "dp={count}"')
        training = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    text = control.share(
        "choosing the mesh", lambda: plan_model(model, count, example=example, training=training, **options).to_json()
    )
    return Plan.from_json(text, "the plan of rank 0")


def _decisions(plan: Plan) -> str:
    """What of a plan changes graphs, and plans to come; seconds and notes differ where every rank plans by itself."""
    return replace(plan, predicted={}, solver={}, target={}, notes=()).to_json()
