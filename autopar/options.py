"""What a user asks of a compilation: the options, read and checked, and the call that they apply to."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar import tree
from autopar.call import TARGET, Call
from autopar.checks import check_dtypes, refuse_old_norms, watched_generators
from autopar.compression import Compression
from autopar.costmodel import profile
from autopar.costmodel.devices import DEVICES, Device
from autopar.costmodel.measure_optimizer import Recipe, optimizer_text
from autopar.costmodel.optimizers import OPTIMIZERS, optimizer_of
from autopar.errors import BatchError, CaptureError, ConstraintError, PlanError, RuntimeUseError, ScheduleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.pipeline.plans import AXIS, OWN
from autopar.pipeline.schedules import SCHEDULES
from autopar.pipeline.tables import micro_of, read
from autopar.plan import Plan
from autopar.precision import AS_IS, FULL, SCALED, Precision
from autopar.programs import Captured, Programs
from autopar.spec import R, S, Spec

OUTPUTS = ("auto", "full", "sharded")
#: What `optimizer_class=` may be: a name, bytes as text ("mine: 12*n"), a class, or a function that makes it.
Stepped = str | Recipe
#: The names that it may be, and what it is where nobody says.
OPTIMIZER_CLASSES, ADAMW = tuple(OPTIMIZERS), "adamw"
#: The name of the device that `autopar calibrate` measured.
CALIBRATED = "calibrated"
#: Axes of these names, or constrained to one of these strategies, split the batch when ranks bring their own.
DATA_NAMES = ("dp", "ddp", "data", "fsdp", "zero")
DATA_STRATEGIES = ("ddp", "zero1", "zero2", "zero3")

Example = tuple[Any, ...] | Mapping[str, Any] | torch.Tensor


@dataclass(frozen=True)
class Asked:
    """The options of a compilation, read and checked."""

    mesh: Mesh
    device: str | Device
    memory_limit: int | None
    constraints: Mapping[str, str]
    outputs: str
    data_axes: tuple[str, ...]
    loss: Callable[[Any, Any], torch.Tensor] | None
    shared: tuple[str, ...] = ()
    micro_batches: int | None = None
    schedule: str | None = None
    table: str = ""
    weights: str = "current"
    optimizer_class: str = ADAMW
    recompute: bool = True
    offload: bool = True
    host_state: bool = False
    compression: str | None = None
    precision: Precision = AS_IS
    quick: bool = False  # as of `planner.plan`

    def text(self) -> str:
        """For comparison between ranks."""
        name = self.device if isinstance(self.device, str) else self.device.name
        return (
            f"mesh {self.mesh}, device {name}, memory limit {self.memory_limit}, constraints {dict(self.constraints)}, "
            f"outputs {self.outputs}, local batches over {self.data_axes or 'no axis'}, "
            f"shared {', '.join(self.shared) or 'nothing'}, "
            f"{'with' if self.loss else 'without'} loss=, "
            f"micro_batches {self.micro_batches}, schedule {self.schedule} {self.table}, "
            f"optimizer_class {self.optimizer_class}, recompute {self.recompute}, offload {self.offload}, "
            f"host_state {self.host_state}, weights {self.weights}, precision {self.precision}, "
            f"compression {self.compression}"
        )

    @property
    def pipelined(self) -> bool:
        """Whether the mesh has an axis along which stages stand."""
        return AXIS in self.mesh.names

    def weight_copies(self, ranks: int) -> int:
        """Copies of its parameters that a stage keeps besides, at most, for `weights` of an asynchronous schedule."""
        if self.schedule not in SCHEDULES or not SCHEDULES[self.schedule].asynchronous:
            return 0
        versions = -(-(ranks - 1) // (self.micro_batches or 1))  # that change while a micro-batch is in flight
        return {"predicted": 1, "stashed": versions}.get(self.weights, 0)

    @property
    def pieces(self) -> int:
        """Number of pieces in which ranks bring the batch."""
        count = 1
        for name, size in zip(self.mesh.names, self.mesh.sizes):
            count *= size if name in self.data_axes else 1
        return count

    def capture(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, programs: Programs,
    ) -> tuple[Captured, dict[str, Spec] | None]:  # fmt: skip
        """The global call captured, given the arguments of one rank, and where local batches lie in it.

        Names in `shared` must exist in the first call of `programs`; later ones may leave arguments out.
        """
        refuse_old_norms(model)
        call = Call(model, args, kwargs, self.loss)
        if not programs.used:
            self._check_shared(call)
        local = tree.batched({name: tuple(t.shape) for name, t in zip(call.names, call.tensors)}, self.shared)
        if not self.data_axes:
            found = self._captured(model, args, kwargs, training, programs)
            if self.shared:
                found.program.batch_dims = {name: 0 for name in call.names if name in local}
            return found, None
        if not local:
            raise BatchError(
                'batch="local" needs a tensor argument whose dim 0 is the batch, and that is not named in shared=; '
                "there is none"
            )
        pairs = list(zip(call.names, call.tensors))
        grown = [t.repeat(self.pieces, *[1] * (t.dim() - 1)) if name in local else t for name, t in pairs]
        args, kwargs, target = call.arguments(grown)
        if self.loss is not None:
            kwargs = {**kwargs, TARGET: target}
        try:
            found = self._captured(model, args, kwargs, training, programs)
        except CaptureError as error:
            raise CaptureError(
                f'{error}. With batch="local" the whole batch has {self.pieces} times the rows of the pieces: '
                f"{', '.join(n for n in call.names if n in local)}; if one of them is no piece, name it in shared="
            ) from error
        found.program.batch_dims = {name: 0 for name in call.names if name in local}
        whole: Spec = (R,) * len(self.mesh.sizes)
        split = tuple(S(0) if name in self.data_axes else R for name in self.mesh.names)
        return found, {name: split if name in local else whole for name in call.names}

    def micro_programs(self, programs: Programs) -> Programs:
        """Where micro-batches are captured, and those of the whole batch in `programs`.

        For one size a trace of its own is quickest; several come of one with the batch as a symbol, for which that of
        the whole batch is there already.
        """
        return Programs() if self.micro_batches is not None or self.table else programs

    def micro(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: Program,
        count: int,
        programs: Programs,
    ) -> Program:
        """The program of one of `count` micro-batches of a call whose program is `whole`."""
        call = Call(model, args, kwargs, self.loss)
        tensors = [
            t.narrow(whole.batch_dims[n], 0, t.shape[whole.batch_dims[n]] // count) if n in whole.batch_dims else t
            for n, t in zip(call.names, call.tensors)
        ]
        args, kwargs, target = call.arguments(tensors)
        if self.loss is not None:
            kwargs = {**kwargs, TARGET: target}
        program = self._captured(model, args, kwargs, whole.training, programs).program
        program.batch_dims = {n: d for n, d in whole.batch_dims.items()}
        return program

    def _captured(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, programs: Programs
    ) -> Captured:
        notes: list[str] = []
        with watched_generators(notes):
            found = programs.capture(
                model, args, kwargs, loss=self.loss, training=training, precision=self.precision
            )
        found.program.notes.extend(notes)
        check_dtypes(found.program, model)
        return found

    def _check_shared(self, call: Call) -> None:
        optional = [*call.signature.parameters, *([TARGET] if self.loss is not None else [])]
        for pattern in self.shared:
            if not any(tree.named(name, [pattern]) for name in (*call.names, *optional)):
                raise ConstraintError(
                    f"shared={pattern!r} names no tensor argument; the tensor arguments are {', '.join(call.names)}"
                )


def ask(
    mesh: Mesh,
    device: str | Device | None,
    memory_limit: float | str | None,
    constraints: Mapping[str, str] | None,
    outputs: str,
    batch: str,
    loss: Callable[[Any, Any], torch.Tensor] | None,
    shared: Sequence[str],
    micro_batches: int | None = None,
    schedule: str | Path | None = None,
    trains: bool = False,
    weights: str = "current",
    searched: bool = False,
    optimizer_class: Stepped | None = None,
    recompute: bool = True,
    offload: bool = True,
    host_state: bool = False,
    compression: str | None = None,
    precision: str | None = None,
    reduce_dtype: str | None = None,
) -> Asked:
    """The options of `autopar.compile`, checked. `searched`: the mesh is only a number of devices so far.

    Raises:
        RuntimeUseError, ConstraintError: an option that does not exist or cannot be read; says what there is.
    """
    if outputs not in OUTPUTS:
        raise RuntimeUseError(f"outputs={outputs!r} does not exist; choose one of {', '.join(OUTPUTS)}")
    if device == CALIBRATED:
        device = profile.load()
    elif isinstance(device, str) and device not in DEVICES:
        known = ", ".join((*DEVICES, CALIBRATED))
        raise ConstraintError(f"no device preset {device!r}; choose one of {known}")
    constraints = {} if constraints is None else constraints
    texts = [*constraints.keys(), *constraints.values()] if isinstance(constraints, Mapping) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ConstraintError(
            f'cannot read constraints {constraints!r}; pass a dict of texts, such as {{"dp": "zero3"}}'
        )
    names = (shared,) if isinstance(shared, str) else tuple(shared) if isinstance(shared, Sequence) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise ConstraintError(f'cannot read shared={shared!r}; pass names of arguments, such as ("mask",)')
    stepped = optimizer_text(optimizer_class) or ADAMW
    optimizer_of(stepped)
    computes = Precision(precision or FULL, reduce_dtype or FULL)
    axes = _data_axes(mesh, batch, constraints)
    limit = parse_bytes(memory_limit)
    name, table = _schedule(mesh, micro_batches, schedule, searched)
    if name in SCHEDULES and SCHEDULES[name].asynchronous:
        _check_asynchronous(name, micro_batches, trains)
        if computes.compute in SCALED:
            raise ConstraintError(
                f"precision={computes.compute!r} with schedule {name!r}: a stage steps with gradients before others "
                "know whether theirs overflowed, so the loss cannot be scaled; use precision='bf16', which needs no "
                "scaling, or a synchronous schedule"
            )
    if AXIS in mesh.names and (axes or outputs == "sharded"):
        what = 'batch="local"' if axes else 'outputs="sharded"'
        raise ConstraintError(
            f'{what} on mesh {mesh}: with a pipeline (axis {AXIS}) every rank takes the whole batch and gets whole '
            'outputs; use batch="global" and outputs="auto" or "full"'
        )
    found = Compression.parse(compression)
    powersgd = found is not None and found.rank > 0  # which reduces behind the backward
    if found is not None and (AXIS in mesh.names or micro_batches or schedule):
        raise ConstraintError(
            f"compression={compression!r} on mesh {mesh}: gradients of pipelines (axis {AXIS}) are not compressed yet; "
            "leave compression= out, or take a mesh without stages"
        )
    scaled = computes.compute in SCALED
    if powersgd and scaled:
        raise ConstraintError(
            f"compression={compression!r} with precision={computes.compute!r}: what PowerSGD has left out would be of "
            "another scale than the next gradient; use precision='bf16', which needs no scaling"
        )
    return Asked(
        mesh, device or detect_device(), limit, constraints, outputs, axes, loss, names, micro_batches, name, table,
        weights, stepped, recompute, offload, host_state and not powersgd and not scaled, compression, computes,
    )  # type: ignore[arg-type]  # fmt: skip


def _schedule(mesh: Mesh, micro: int | None, schedule: str | Path | None, searched: bool) -> tuple[str | None, str]:
    """Name of the schedule, and its own table if it comes from a file."""
    if AXIS not in mesh.names and not searched:
        if micro is not None or schedule is not None:
            raise ConstraintError(
                f"micro_batches= and schedule= are for pipelines, and mesh {mesh} has no axis {AXIS!r}; add one "
                f'("{AXIS}=2,{mesh}"), or leave them out'
            )
        return None, ""
    if micro is not None and (isinstance(micro, bool) or not isinstance(micro, int) or micro < 1):
        raise ConstraintError(f"micro_batches={micro!r}; pass a number of micro-batches, at least 1")
    if schedule is None or (isinstance(schedule, str) and schedule in SCHEDULES):
        return schedule, ""
    try:
        text = Path(schedule).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(
            f"schedule={str(schedule)!r} is neither a file that can be read ({getattr(error, 'strerror', error)}) nor "
            f"the name of a schedule: {', '.join(SCHEDULES)}"
        ) from None
    table = read(text)
    if not searched and len(table) != mesh.sizes[mesh.axis(AXIS)]:
        raise ScheduleError(
            f"the table of schedule= has rows for {len(table)} ranks, axis {AXIS} of mesh {mesh} has "
            f"{mesh.sizes[mesh.axis(AXIS)]}; give each rank one row"
        )
    if micro is not None and micro != micro_of(table):
        raise ScheduleError(f"micro_batches={micro}, and the table of schedule= has {micro_of(table)}; leave out one")
    return OWN, text


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


def _check_asynchronous(name: str, micro: int | None, trains: bool) -> None:
    others = ", ".join(n for n, s in SCHEDULES.items() if not s.asynchronous)
    if name != "paci":
        raise ScheduleError(
            f"schedule {name!r} can be simulated and drawn, but not trained with: of the asynchronous ones only 'paci' "
            f"can (weights='stashed' gives it the weights of the forward, as in PipeDream); the others are {others}"
        )
    if not trains:
        raise ScheduleError(
            f"schedule {name!r} steps the optimizer on its way, which the plain loop (loss.backward(); "
            f"optimizer.step()) cannot: pass optimizer=lambda params: torch.optim.AdamW(params) and call "
            f"pm.train_step(batch), or choose one of {others}"
        )
    if micro is None:
        raise ScheduleError(
            f"schedule {name!r} needs micro_batches=, the micro-batches of one update: it decides how far weights drift"
        )


def check_asked(given: Plan, optimizer_class: str | None, compression: str | None) -> None:
    """Raise unless what is asked for beside a given plan is what that says.

    Raises:
        PlanError: it is something else.
    """
    for name, asked, has in (
        ("optimizer_class", optimizer_class, given.optimizer),
        ("compression", compression, given.compression),
    ):
        if asked not in (None, has):
            raise PlanError(
                f"{name}={asked} is asked for, and the plan was made for {has}; leave it out, or plan again"
            )


def batch_rows(program: Program) -> int:
    """Length of the batch of a program; 0 if none of its inputs is one."""
    for source in program.of_kind("input"):
        if source.name in program.batch_dims:
            return int(program.node(source.node).meta["val"].shape[program.batch_dims[source.name]])
    return 0


def arguments(example: Example | None) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """An example as (args, kwargs); None stays None.

    Raises:
        BatchError: it is neither a tensor nor a tuple nor a dict.
    """
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


def detect_device() -> str | Device:
    """What `autopar calibrate` measured of this machine, else the preset of its accelerator, or "cpu".

    Warns where there is no preset for it.
    """
    if profile.available():
        return profile.load()
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    for preset in DEVICES:
        if preset in name:
            return preset
    warnings.warn(f"no cost preset for {name!r}: planned as for h100; pass device= with a description of yours")
    return "h100"
