"""From a model to a plan, and from a plan to a module that runs: the only file that knows all folders.

capture -> plan -> insert collectives and the other passes -> cut forward from backward -> bind to this rank -> run
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.checks import refuse_old_norms
from autopar.costmodel import rules, search
from autopar.costmodel.devices import Device
from autopar.costmodel.measure_optimizer import optimizer_text, recipe_text
from autopar.decide import Call, devices, plan_model, plan_one, planned, planner_options
from autopar.errors import InfeasibleError, MeshError, PlanError
from autopar.fixes import explained, question_of
from autopar.given import check_given, decisions, precision_of
from autopar.graph import Program
from autopar.lowering import lower, quicker, target_of
from autopar.mesh import Mesh
from autopar.options import Asked, Example, Stepped, arguments, ask, batch_rows, check_asked
from autopar.pipeline.plans import inner
from autopar.plan import Plan
from autopar.precision import AUTO, SCALED, Precision
from autopar.precision_search import quickest
from autopar.programs import KNOWN, TRACED, TRACED_BATCHES, Captured, Kept, Programs
from autopar.runtime.groups import MeshLike, as_mesh, connect, default_device
from autopar.runtime.handshake import Control
from autopar.runtime.module import Options, ParallelModule
from autopar.runtime.pipeline import Pipelined
from autopar.runtime.step import Lowered, check_backend
from autopar.runtime.storage import Init, first_difference, same_fields, skeleton
from autopar.runtime.training import Recipe
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
    optimizer_class: Stepped | None = None,
    recompute: bool = True,
    offload: bool = True,
    compression: str | None = None,
    precision: str | None = None,
    reduce_dtype: str | None = None,
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
        micro_batches: with an axis called "pp", into how many pieces a batch is divided; default: the quickest.
        schedule: of the pipeline: a name ("1f1b", "zb-h1", ...; `autopar.pipeline.schedules.SCHEDULES`) or the path of
            a CSV file with a table of your own; default: the quickest. "paci", which never empties the pipeline, needs
            `optimizer`, and `pm.train_step(batch)` in place of the loop.
        optimizer: `lambda params: AdamW(params, ...)`: the module makes and steps it itself, in `pm.train_step`. It may
            make several, in a list. It is called once more for copies of the parameters that are stepped on the host.
        lr_scheduler: `lambda optimizer: CosineAnnealingLR(optimizer, ...)`: stepped behind every update.
        clip: largest norm of gradients in `train_step`; with "paci" each stage clips by its own.
        weights: with "paci", "current": forward and backward read the weights of now, as published; "stashed": a
            backward reads its forward's, which are kept; "predicted": a forward reads those that its backward is to
            find, as the last update lets expect (one more copy of parameters; brings the loss nearest to 1f1b's).
        nonfinite: with "paci", what a stage does with gradients that are not finite: "skip" its update, or "raise".
        recompute, offload: let the backward compute again, or fetch from the host's memory, what the forward then need
            not keep, if memory is short and that is the quickest that fits. With `optimizer`, `offload` also lets
            gradients and optimizer state lie on the host.
        optimizer_class: what steps the parameters, in `train_step` or in your own loop, for the memory that it takes
            and moves: a name ("sgd", "lion", ...), the class or a function of parameters that makes it, which is called
            and stepped on small tensors and measured, or bytes ("mine: 12*n"); see `autopar.costmodel.optimizers`.
            Default: the given plan's, else `optimizer`, measured, else "adamw".
        compression: of gradients that are reduced: "bf16", or "powersgd:RANK"; see `autopar.compression`.
        precision: "bf16" or "fp16": parameters stay as they are, and what is quicker for it computes in that precision
            (`autopar.casting` has the rules; fp16 scales the loss: `pm.scaler`). "auto": bf16 where its simulated step
            is the shorter one. Default: the given plan's, else "fp32", all as the model is.
        reduce_dtype: in which partial sums of parameters' gradients are added up between ranks: "fp32", the default, or
            that of `precision`, for half the bytes.
        init: `init(name, shape, dtype)` gives the value of a parameter or buffer that is on the meta device.

    Raises:
        MeshError: the mesh does not match the processes.
        RankMismatchError: the ranks passed different models or options, or another rank failed; on every rank.
        CaptureError, ConstraintError, InfeasibleError, PlanError: as they say.

    Warns (UserWarning): a tensor taken for a piece of a local batch is the same on every rank; `forward` draws from
    Python's or numpy's global generator; a new shape is captured and planned again.
    """
    count = devices(mesh)
    if count is not None:
        given = plan
        if isinstance(plan, (str, Path)):
            with _flat(count, timeout, model).together("reading the options"):
                given = Plan.load(plan)
        if not isinstance(given, Plan):
            given = _searched(
                count, timeout, model, example=example, loss=loss, device=device, memory_limit=memory_limit,
                constraints=constraints, outputs=outputs, batch=batch, shared=shared, micro_batches=micro_batches,
                schedule=schedule, weights=weights, optimizer_class=optimizer_class or recipe_text(optimizer),
                recompute=recompute, offload=offload, host_state=None if optimizer is not None else False,
                compression=compression, precision=precision, reduce_dtype=reduce_dtype,
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
        optimizer_class = optimizer_text(optimizer_class)
        if optimizer_class is None and given is None:
            optimizer_class = recipe_text(optimizer)
        if given is not None:
            check_asked(given, optimizer_class, compression)
        asked = ask(
            shape, device, memory_limit, constraints, outputs, batch, loss, shared, micro_batches, schedule,
            trains=optimizer is not None, weights=weights, optimizer_class=optimizer_class, recompute=recompute,
            offload=offload, host_state=offload and optimizer is not None,
            compression=given.compression if given is not None else compression, precision=precision,
            reduce_dtype=reduce_dtype,
        )  # fmt: skip
        if given is not None:
            computes = precision_of(given, precision, reduce_dtype)
            asked = replace(asked, optimizer_class=given.optimizer, precision=computes)
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
        "the plan", given and decisions(given), "give every rank the same plan file", lambda a, b: "other contents"
    )
    if asked.precision.compute == AUTO:
        given = _in_precision(control, asked, model, call, recipe is not None)
        asked = replace(asked, precision=given.computes)
    # passes/fuse.py and inplace.py stay off: gradients that are views of one bucket cannot be deep-copied.
    build = _Builder(control, asked, given, eager=backend == "eager", steps=recipe is not None)
    options = Options(check, backend, asked.data_axes, init, asked.shared, recipe, asked.precision.compute in SCALED)
    module = ParallelModule(model, empty, grid, control, build, options)
    if call is not None:
        module.prepare(*call[0], **call[1])
    return module


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

    def __init__(self, control: Control, asked: Asked, given: Plan | None, eager: bool, steps: bool) -> None:
        self.control, self.asked, self.given, self.eager, self.steps = control, asked, given, eager, steps
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
            storage, saved = (inner(first).storage, first.saved) if first is not None else (None, None)

            def made() -> str:
                with explaining(first):
                    return plan_pipeline(
                        program_of, rows, asked, lambda p: planner_options(p, asked), storage, pipeline, saved
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
                question = question_of(error, self.asked, model, args, kwargs, whole, plan_model, steps=self.steps)
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
                return plan_one(program, self.asked, pieces, first, similar).to_json()

        text = self.control.share("planning", made)
        return Plan.from_json(text, "the plan of rank 0")


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


def _in_precision(control: Control, asked: Asked, model: nn.Module, call: Call | None, steps: bool) -> Plan:
    """The plan in the quicker precision, found by rank 0. A collective call. steps: as of `question_of`."""
    with control.together("reading the options"):
        if call is None:
            raise PlanError("precision='auto' compares plans, which needs example=: the arguments of one call")
    training = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    programs = Kept()

    def plan_in(precision: Precision) -> Plan:
        return planned(replace(asked, precision=precision), model, call, training, None, None, programs)

    def made() -> str:
        try:
            return quickest(asked.precision, plan_in).to_json()
        except InfeasibleError as error:
            question = question_of(error, asked, model, *call, programs.first, plan_model, steps=steps)
            if question is None:
                raise
            raise explained(question) from None

    return Plan.from_json(control.share("choosing the precision", made), "the plan of rank 0")
