"""From a model to a plan, and from a plan to a module that runs: the only file that knows all folders.

capture -> plan -> insert collectives and the other passes -> cut forward from backward -> bind to this rank -> run
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar import passes, tree
from autopar.call import TARGET, Call
from autopar.capture import capture
from autopar.costmodel import planner, rules
from autopar.costmodel.devices import DEVICES, Device
from autopar.errors import BatchError, ConstraintError, PlanError, RuntimeUseError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.runtime.groups import MeshLike, as_mesh, connect, default_device
from autopar.runtime.handshake import Control
from autopar.runtime.module import Options, ParallelModule
from autopar.runtime.step import Lowered, check_backend
from autopar.runtime.storage import Init, first_difference, same_fields, skeleton
from autopar.spec import R, S, Spec, format_spec

OUTPUTS = ("auto", "full", "sharded")
#: Axes of these names, or constrained to one of these strategies, split the batch when ranks bring their own.
DATA_NAMES = ("dp", "ddp", "data", "fsdp", "zero")
DATA_STRATEGIES = ("ddp", "zero1", "zero2", "zero3")

Example = tuple[Any, ...] | Mapping[str, Any] | torch.Tensor


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
    outputs: str = "auto",
    backend: str = "eager",
    check: bool = True,
    timeout: float = 300.0,
    init: Init | None = None,
) -> ParallelModule:
    """Plan `model` on `mesh` and give it back as a module that runs on this process's part.

    A collective call: every process of the mesh makes it, with equal arguments. The values of rank 0's parameters and
    buffers are used by all; the model is not changed and may be deleted afterwards.

    Args:
        model: any module that `torch.export` can trace, in the mode (train or eval) it is to start in.
        mesh: "dp=2,tp=4", an int, an `autopar.Mesh`, or a torch DeviceMesh. A mesh of one runs in a plain process;
            otherwise processes come from torchrun, and torch.distributed is initialised if it is not yet.
        example: arguments of one call, (positional, ...) or {name: value}; only shapes and dtypes matter. Without it
            the model is captured at its first call, and has no parameters until then.
        loss: `loss(output, target)`; calls then take one more keyword, `target`, and return the loss.
        device: preset of the cost model ("cpu", "h100", ...), or a description; default: what this machine has.
        memory_limit: bytes per device, or text such as "24GB".
        constraints: {pattern of parameter or module names: placement} and {mesh axis: strategy}; see `plan`.
        plan: a plan to run as it is, or the path of its file, instead of planning.
        batch: "global": every rank passes the whole batch. "local": every rank passes its own piece along dim 0 (see
            `ParallelModule.sampler_args`) of every tensor whose dim 0 is as long as that of most arguments; what is
            passed besides must be equal on all ranks. The batch is split over the axes called dp, data or fsdp, or
            constrained to a data-parallel strategy; "local:AXIS[,AXIS]" names them.
        outputs: "full": plain whole tensors; "sharded": DTensors as the plan leaves them; "auto": sharded beside a
            scalar loss (which is always whole), else full.
        backend: "eager" or "inductor".
        check: compare arguments and seeds between ranks before each step.
        timeout: seconds a rank waits for the others, planning included.
        init: `init(name, shape, dtype)` gives the value of a parameter or buffer that is on the meta device.

    Raises:
        MeshError: the mesh does not match the processes.
        RankMismatchError: the ranks passed different models or options, or another rank failed; on every rank.
        CaptureError, ConstraintError, InfeasibleError, PlanError: as they say.
    """
    shape = as_mesh(mesh)
    grid = connect(mesh, default_device(mesh, model), timeout)
    control = Control(grid)
    with control.together("reading the options"):
        if grid.device.type != "cpu":
            raise RuntimeUseError(
                f"this version runs on CPU processes (gloo) only, not on {grid.device}: captured graphs hold the CPU's "
                'attention op and constants. Planning for GPUs works (autopar.plan, device="h100"); to run, keep the '
                "model on the CPU"
            )
        check_backend(backend)
        given = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        if given is not None and not isinstance(given, Plan):
            raise PlanError(f"plan is a {type(given).__name__}; pass an autopar.Plan or the path of its file")
        asked = _ask(shape, device, memory_limit, constraints, outputs, batch, loss)
        call = _arguments(example)
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
    build = _Builder(control, asked, given)
    options = Options(check, backend, asked.data_axes, init)
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
    training: bool = True,
    target: Mapping[str, Any] | None = None,
) -> Plan:
    """Only decide. Needs no processes, no device, and no weights (a model on the meta device will do).

    Args: as `compile`. training: with the backward. target: how `autopar verify` rebuilds the model; kept in the plan.

    Raises:
        CaptureError, ConstraintError, InfeasibleError: as they say.
    """
    shape = as_mesh(mesh)
    asked = _ask(shape, device, memory_limit, constraints, outputs, batch, loss)
    call = _arguments(example)
    if call is None:
        raise BatchError("plan needs example=: the arguments of one call, for their shapes")
    began = time.perf_counter()
    program, pieces = asked.capture(model, *call, training)
    captured = time.perf_counter() - began
    found = _plan(program, asked, pieces)
    return replace(found, target=dict(target or {}), solver={"capture_s": captured, **found.solver})


def register_rule(op: Any, rule: Any) -> None:
    """Give an op a sharding rule; see `autopar.costmodel.rules.register`."""
    rules.register(op, rule)


def lower(program: Program, plan: Plan, coordinates: tuple[int, ...], group_names: Mapping[str, str]) -> Lowered:
    """This rank's forward and backward graphs of `program` under `plan`.

    Raises:
        PlanError: the plan is not legal for the program; names the op.
    """
    local, _ = passes.lower(program, plan, rules.rule_for)
    parts = passes.cut(local)
    title = "-".join(map(str, coordinates))
    forward, _ = passes.finish(parts.forward, plan.mesh, coordinates, group_names, f"forward-{title}")
    if not program.training:
        return Lowered(program, plan, forward, None)
    backward, _ = passes.finish(parts.backward, plan.mesh, coordinates, group_names, f"backward-{title}")
    return Lowered(program, plan, forward, backward, parts.saved_inputs)


@dataclass(frozen=True)
class _Asked:
    """The options of a compilation, read and checked."""

    mesh: Mesh
    device: str | Device
    memory_limit: int | None
    constraints: Mapping[str, str]
    outputs: str
    data_axes: tuple[str, ...]
    loss: Callable[[Any, Any], torch.Tensor] | None

    def text(self) -> str:
        """For comparison between ranks."""
        name = self.device if isinstance(self.device, str) else self.device.name
        return (
            f"mesh {self.mesh}, device {name}, memory limit {self.memory_limit}, constraints {dict(self.constraints)}, "
            f"outputs {self.outputs}, local batches over {self.data_axes or 'no axis'}, "
            f"{'with' if self.loss else 'without'} loss="
        )

    @property
    def pieces(self) -> int:
        """Number of pieces in which ranks bring the batch."""
        count = 1
        for name, size in zip(self.mesh.names, self.mesh.sizes):
            count *= size if name in self.data_axes else 1
        return count

    def capture(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
    ) -> tuple[Program, dict[str, Spec] | None]:
        """The program of the global call, given the arguments of one rank, and where local batches lie in it."""
        if not self.data_axes:
            return capture(model, args, kwargs, loss=self.loss, training=training), None
        call = Call(model, args, kwargs, self.loss)
        local = tree.batched({name: tuple(t.shape) for name, t in zip(call.names, call.tensors)})
        if not local:
            raise BatchError('batch="local" needs a tensor argument whose dim 0 is the batch; there is none')
        pairs = list(zip(call.names, call.tensors))
        grown = [t.repeat(self.pieces, *[1] * (t.dim() - 1)) if name in local else t for name, t in pairs]
        args, kwargs, target = call.arguments(grown)
        if self.loss is not None:
            kwargs = {**kwargs, TARGET: target}
        program = capture(model, args, kwargs, loss=self.loss, training=training)
        whole: Spec = (R,) * len(self.mesh.sizes)
        split = tuple(S(0) if name in self.data_axes else R for name in self.mesh.names)
        return program, {name: split if name in local else whole for name in call.names}


class _Builder:
    """Makes the lowered program of one call, in step with the other ranks."""

    def __init__(self, control: Control, asked: _Asked, given: Plan | None) -> None:
        self.control, self.asked, self.given = control, asked, given

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, first: Plan | None
    ) -> Lowered:
        control, grid = self.control, self.control.grid
        with control.together("capture"):
            program, pieces = self.asked.capture(model, args, kwargs, training)
        control.same(
            "the captured program",
            program.digest(),
            "the model's code must take the same path on every rank (no branches on the rank)",
        )
        with torch.autocast(grid.device.type, enabled=False):  # it is in the program, and not for what follows
            plan = self._plan(program, pieces, first)
            with control.together("lowering"):
                return lower(program, plan, grid.mesh.coordinates(grid.rank), grid.group_names)

    def _plan(self, program: Program, pieces: dict[str, Spec] | None, first: Plan | None) -> Plan:
        if self.given is not None and (first is None or self.given.fingerprint == program.fingerprint):
            with self.control.together("checking the plan"):
                _check_given(self.given, program, self.asked, pieces)
            return self.given
        # One rank plans: the others would only compete for its processors, and the answer is the same by construction.
        text = self.control.share("planning", lambda: _plan(program, self.asked, pieces, first).to_json())
        return Plan.from_json(text, "the plan of rank 0")


def _plan(program: Program, asked: _Asked, pieces: dict[str, Spec] | None, first: Plan | None = None) -> Plan:
    """Plan `program`, of which local batches come in `pieces`; with `first`, parameters stay where that stores them."""
    free = asked.outputs == "sharded" or (asked.outputs == "auto" and _has_loss(program))
    found = planner.plan(
        program,
        asked.mesh,
        device=asked.device,
        memory_limit=asked.memory_limit,
        constraints=dict(asked.constraints),
        input_specs=pieces,
        output_specs="free" if free else "replicated",
    )
    return found if first is None else replace(found, storage=first.storage)


def check_plan(program: Program, plan: Plan) -> None:
    """Raise unless `plan`, perhaps edited, was made for `program` and is legal for it.

    Raises:
        PlanError: says what does not fit.
    """
    if plan.fingerprint != program.fingerprint:
        raise PlanError(
            f"the plan is for another model (fingerprint {plan.fingerprint[:12]}, this one has "
            f"{program.fingerprint[:12]}): other layers, sizes or dtypes, or another mode; plan again for this model"
        )
    planner.check_plan(program, plan)


def _check_given(plan: Plan, program: Program, asked: _Asked, pieces: dict[str, Spec] | None) -> None:
    if plan.mesh != asked.mesh:
        raise PlanError(
            f"the plan is for mesh {plan.mesh}, the module is compiled for {asked.mesh}; plan again for this mesh"
        )
    check_plan(program, plan)
    whole: Spec = (R,) * len(plan.mesh.sizes)
    for name, spec in (pieces or {}).items():
        given = plan.inputs.get(name, whole)
        if any(g != p for g, p, axis in zip(given, spec, plan.mesh.names) if axis in asked.data_axes):
            raise PlanError(
                f"local batches bring input {name} as {format_spec(spec, 1, plan.mesh.names)}, the plan takes it as "
                f'{format_spec(given, 1, plan.mesh.names)}; make the plan with batch="local", or pass global batches'
            )


def _decisions(plan: Plan) -> str:
    """What of a plan changes the graphs; seconds and notes differ where every rank makes the same plan itself."""
    return replace(plan, predicted={}, solver={}, target={}, notes=()).to_json()


def _has_loss(program: Program) -> bool:
    """Whether a scalar floating-point output, a loss, is among the outputs."""
    for sink in program.sinks:
        if sink.kind == "output" and sink.node is not None:
            value = program.node(sink.node).meta["val"]
            if isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point():
                return True
    return False


def _ask(
    mesh: Mesh,
    device: str | Device | None,
    memory_limit: float | str | None,
    constraints: Mapping[str, str] | None,
    outputs: str,
    batch: str,
    loss: Callable[[Any, Any], torch.Tensor] | None,
) -> _Asked:
    if outputs not in OUTPUTS:
        raise RuntimeUseError(f"outputs={outputs!r} does not exist; choose one of {', '.join(OUTPUTS)}")
    if isinstance(device, str) and device not in DEVICES:
        raise ConstraintError(f"no device preset {device!r}; choose one of {', '.join(DEVICES)}")
    constraints = {} if constraints is None else constraints
    texts = [*constraints.keys(), *constraints.values()] if isinstance(constraints, Mapping) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ConstraintError(
            f'cannot read constraints {constraints!r}; pass a dict of texts, such as {{"dp": "zero3"}}'
        )
    axes = _data_axes(mesh, batch, constraints)
    return _Asked(mesh, device or detect_device(), parse_bytes(memory_limit), constraints, outputs, axes, loss)


def _data_axes(mesh: Mesh, batch: str, constraints: Mapping[str, str]) -> tuple[str, ...]:
    if batch == "global":
        return ()
    if batch.startswith("local:"):
        names = tuple(n.strip() for n in batch.removeprefix("local:").split(","))
        for name in names:
            mesh.axis(name)
        return tuple(n for n in mesh.names if n in names)
    if batch != "local":
        raise RuntimeUseError(f'batch={batch!r} does not exist; write "global", "local" or "local:AXIS"')
    found = tuple(
        n
        for n in mesh.names
        if constraints.get(n) in DATA_STRATEGIES or (n not in constraints and n.rstrip("0123456789") in DATA_NAMES)
    )
    if not found:
        raise ConstraintError(
            f'batch="local" on mesh {mesh}: no axis is called {", ".join(DATA_NAMES)} or constrained to a '
            f'data-parallel strategy; name the axes that split the batch: batch="local:{mesh.names[0]}"'
        )
    return found


def _arguments(example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if example is None:
        return None
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise BatchError(f"example is a {type(example).__name__}; pass a tuple of positional or a dict of named arguments")


def parse_bytes(text: float | str | None) -> int | None:
    """Bytes of 24e9, "24GB" (10**9) or "24GiB" (2**30).

    Raises:
        ConstraintError: it cannot be read.
    """
    if text is None:
        return None
    if isinstance(text, (int, float)) and not isinstance(text, bool) and math.isfinite(text):
        return int(text)
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kKMGT]?)(i?)B?\s*", text) if isinstance(text, str) else None
    if not match:
        raise ConstraintError(f'cannot read memory limit {text!r}; write bytes, or e.g. "24GB" or "24GiB"')
    power = "kMGT".index(match[2].replace("K", "k")) + 1 if match[2] else 0
    return round(float(match[1]) * (1024 if match[3] else 1000) ** power)


def detect_device() -> str:
    """Preset of this machine's accelerator, or "cpu". Warns where there is no preset for it."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    for preset in DEVICES:
        if preset in name:
            return preset
    warnings.warn(f"no cost preset for {name!r}: planned as for h100; pass device= with a description of yours")
    return "h100"
