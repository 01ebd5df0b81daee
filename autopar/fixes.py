"""What would fit: changes of what was asked, each planned again by itself.

A function of `KINDS` proposes changes of one kind, and is told of each whether it fits, so that it can go on from that.
They take turns until the time is up, so that every kind is heard. A change is arguments of `autopar.plan`: who calls
that with them gets a plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autopar.call import Call
from autopar.costmodel.measure_optimizer import optimizer_text
from autopar.costmodel.optimizers import OPTIMIZERS, optimizer_of
from autopar.errors import AutoparError, Fix, InfeasibleError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.options import ADAMW, Asked, arguments, batch_rows
from autopar.pipeline.plans import AXIS
from autopar.plan import Plan
from autopar.precision import FULL
from autopar.programs import Kept
from autopar.units import bytes_

#: Seconds that are spent on what would fit, unless said otherwise; what is under way then is finished.
SECONDS = 15.0
#: Kinds of memory that grow with the batch; the last two of pipelines.
WITH_BATCH = ("activations", "inputs", "transient", "collectives", "saved", "pending")
#: Optimizers that may be proposed in place of another one, as far as they are known and keep less.
OTHERS = ("lion", "sgd_momentum", "adafactor")
#: What may fit by arithmetic is solved for up to this part of the limit.
NEAR = 1.1
#: How often a number of devices is doubled, a batch or a sequence halved.
TIMES = 3


@dataclass(frozen=True)
class Candidate:
    """A change to try.

    Attributes:
        what: in words. changes: arguments of `plan_model`. command: of `autopar plan`. share: as of `Fix`.
        more: bytes that the change needs beside the plan's. raises: it raises the limit.
        better: than those of its kind before it of which that is said, too: if it fits, they are not told.
    """

    what: str
    changes: Mapping[str, Any]
    command: str = ""
    share: float = 1.0
    more: Callable[[Plan], float] = field(default=lambda plan: 0.0)
    raises: bool = False
    better: bool = False


#: Yields candidates; is sent what came of each: a fix, or None.
Kind = Generator[Candidate, Fix | None, None]


@dataclass
class Question:
    """What no plan fits.

    Attributes:
        error: as the search has raised it. given: arguments of `plan_model` as they came.
        again: `plan_model`. whole: the program of the whole batch. deadline: of `time.perf_counter`.
    """

    error: InfeasibleError
    given: Mapping[str, Any]
    again: Callable[..., Plan]
    whole: Program
    deadline: float

    def __post_init__(self) -> None:
        self.plans: dict[str, Plan | None] = {}

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.perf_counter()

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the least plan; None where not even that is known."""
        if self.error.mesh:
            return Mesh.parse(self.error.mesh)
        mesh = self.given["mesh"]
        return None if isinstance(mesh, int) else Mesh.parse(mesh)

    @property
    def rows(self) -> int:
        """Length of the batch; 0 where there is none."""
        return batch_rows(self.whole)

    def try_out(self, candidate: Candidate) -> Fix | None:
        """The candidate as a fix, if a plan fits with it."""
        key = repr(sorted((name, _key(value)) for name, value in candidate.changes.items()))
        if key not in self.plans:
            self.plans[key] = self._plan(candidate.changes)
        plan = self.plans[key]
        if plan is None:
            return None
        peak = float(plan.predicted["peak_bytes"]) + candidate.more(plan)
        if self.error.limit and peak > self.error.limit and not candidate.raises:
            return None
        seconds = float(plan.predicted["step_s"])
        return Fix(candidate.what, candidate.changes, seconds, peak, candidate.command, candidate.share)

    def _plan(self, changes: Mapping[str, Any]) -> Plan | None:
        try:
            return self.again(**{**self.given, **changes, "fixes": 0.0, "quick": True})
        except AutoparError:  # it does not go with the rest of what is asked: no answer to this question
            return None


def question_of(
    error: InfeasibleError, asked: Asked, model: nn.Module, args: Any, kwargs: Any, whole: Program,
    again: Callable[..., Plan], seconds: float = SECONDS, steps: bool = False,
) -> Question | None:  # fmt: skip
    """The question about a call of a compiled module; None for a call that `plan_model` has no words for.

    steps: the module steps its optimizer itself. Only then may optimizer state lie on the host, if `offload` allows it.
    """
    if (args and kwargs) or asked.table:
        return None
    given = {
        "model": model, "mesh": asked.mesh, "example": args or kwargs, "loss": asked.loss, "device": asked.device,
        "memory_limit": asked.memory_limit, "constraints": asked.constraints, "outputs": asked.outputs,
        "batch": f"local:{','.join(asked.data_axes)}" if asked.data_axes else "global", "shared": asked.shared,
        "training": whole.training, "micro_batches": asked.micro_batches, "schedule": asked.schedule,
        "weights": asked.weights, "optimizer_class": asked.optimizer_class, "recompute": asked.recompute,
        "offload": asked.offload, "host_state": None if steps else False, "compression": asked.compression,
        "precision": asked.precision.compute, "reduce_dtype": asked.precision.reduce, "programs": Kept(),
    }  # fmt: skip
    return Question(error, given, again, whole, time.perf_counter() + seconds)


def _key(value: Any) -> str:
    """Of equal changes the same; of a batch its shapes."""
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return str({k: _key(v) for k, v in value.items()})
    if isinstance(value, (tuple, list)):
        return str([_key(v) for v in value])
    return str(value)


def explained(question: Question) -> InfeasibleError:
    """The error with what would fit, the quickest first, for as many samples."""
    fixes, untried = _tried(question)
    limit = limited(question)
    if limit is not None:
        fixes.append(limit)
    fixes.sort(key=lambda fix: fix.whole_s)
    error = question.error
    text = str(error)
    if fixes:
        text += "\n  Nearest that fit: " + ";\n    ".join(words(fix) for fix in fixes) + "."
    if untried:
        text += f"\n  There was no time to try all of: {', '.join(untried)} (fixes=, in seconds, gives more)."
    return InfeasibleError(
        text, error.least, error.memory, limit=error.limit, step_s=error.step_s, stages=error.stages, mesh=error.mesh,
        fixes=fixes, untried=untried, way=error.way,
    )  # fmt: skip


def _tried(question: Question) -> tuple[list[Fix], list[str]]:
    """What fits, and names of the kinds that were not through when the time was up."""
    found: list[tuple[str, Fix]] = []
    turns = [(name, kind(question)) for name, kind in KINDS.items()]
    answers: dict[str, Fix | None] = {}
    while turns and question.left > 0:
        for turn in list(turns):
            name, kind = turn
            if question.left <= 0:
                break
            try:
                candidate = kind.send(answers.pop(name)) if name in answers else next(kind)
            except StopIteration:
                turns.remove(turn)
                continue
            answers[name] = fix = question.try_out(candidate)
            if fix is not None:
                group = name if candidate.better else ""
                found = [pair for pair in found if not group or pair[0] != group]
                found.append((group, fix))
    return [fix for _, fix in found], [name for name, _ in turns]


def words(fix: Fix) -> str:
    """A fix in a line."""
    part = "" if fix.share == 1 else f" for {fix.share:.3g} of the samples"
    typed = f"; {fix.command}" if fix.command else ""
    return f"{fix.what} ({1e3 * fix.step_s:.4g} ms a step{part}, {bytes_(fix.peak_bytes)}{typed})"


# ---- kinds of changes ----------------------------------------------------------------------------------------------


def keeping_less(question: Question) -> Kind:
    """Let the backward compute again, and what it reads wait on the host, where the user has forbidden it."""
    for name in ("recompute", "offload"):
        if not question.given[name]:
            yield Candidate(f"{name}=True", {name: True}, f"without --no-{name}")


def fewer_constraints(question: Question) -> Kind:
    """Without one constraint, and where none alone is to blame, without any."""
    constraints = dict(question.given["constraints"] or {})
    helped = False
    for name, value in constraints.items():
        rest = {k: v for k, v in constraints.items() if k != name}
        fix = yield Candidate(f"without the constraint {name}={value}", {"constraints": rest}, "")
        helped |= fix is not None
    if len(constraints) > 1 and not helped:
        yield Candidate("without constraints", {"constraints": {}}, "")


def other_optimizers(question: Question) -> Kind:
    """Classes that keep less state. What they do to the training is another matter."""
    now = optimizer_of(optimizer_text(question.given["optimizer_class"]) or ADAMW)
    shape, itemsize = (1024, 1024), 4
    most = now.state(shape, itemsize)
    held = question.error.memory.get("optimizer")  # of stages, it is among what is static
    for name in OTHERS if question.whole.training else ():
        own = OPTIMIZERS[name].state(shape, itemsize)
        if own >= most:
            continue
        saved = math.inf if held is None else held * (1 - own / most)
        if question.error.least - saved <= NEAR * question.error.limit:
            yield Candidate(f'optimizer_class="{name}"', {"optimizer_class": name}, f"--optimizer {name}")


def lower_precision(question: Question) -> Kind:
    """Computing in bf16, parameters staying as they are: what is kept for the backward is half as large."""
    plain = question.given.get("precision") in (None, FULL) and question.given.get("reduce_dtype") in (None, FULL)
    wide = any(p.dtype is torch.float32 for p in question.given["model"].parameters())
    if question.whole.training and plain and wide:
        yield Candidate('precision="bf16"', {"precision": "bf16"}, "--precision bf16")


def more_devices(question: Question) -> Kind:
    """Twice as many along one axis; where that does not do on any, four times and eight times."""
    mesh, fix = question.mesh, None
    for power in range(1, TIMES + 1) if mesh is not None else ():
        assert mesh is not None
        if question.error.least / (1 << power) > NEAR * question.error.limit:
            continue  # so many devices hold, each, no less than their part
        for axis in range(len(mesh.sizes)):
            sizes = tuple(n << power if a == axis else n for a, n in enumerate(mesh.sizes))
            fix = (yield _on(Mesh(mesh.names, sizes))) or fix
        if fix is not None:
            return


def other_shapes(question: Question) -> Kind:
    """As many devices in other axes: with more stages of a pipeline, or with none, or with an axis cut in two."""
    mesh = question.mesh
    for other in [] if mesh is None else _reshaped(mesh, pipelines=question.whole.training and question.rows > 1):
        yield _on(other)


def freer_schedules(question: Question) -> Kind:
    """Micro-batches and schedule of a pipeline as the planner would choose them, where the user has."""
    for name in ("micro_batches", "schedule"):
        if question.given[name] is not None:
            yield Candidate(f"{name} left open", {name: None}, f"without --{name.replace('_', '-')}")


def smaller_batches(question: Question) -> Kind:
    """The largest batch that fits, and batches in parts whose gradients are added up."""
    rows, mesh = question.rows, question.mesh
    moving = sum(question.error.memory.get(kind, 0.0) for kind in WITH_BATCH)
    fixed = question.error.least - moving
    if rows < 2 or mesh is None or question.given["batch"] != "global" or (moving and fixed > question.error.limit):
        return
    grain = math.gcd(rows, mesh.num_devices)
    guess = rows / 2 if not moving else rows * (question.error.limit - fixed) / moving
    low, high = 0, -(-rows // grain)  # in grains: fits, and does not
    at = min(max(int(guess / grain), 1), high - 1)
    while low + 1 < high and at >= 1:
        fix = yield replace(_batch(question, at * grain), better=True)
        low, high = (at, high) if fix is not None else (low, at)
        at = low + 1 if fix is not None and low == at and high - low > 1 else (low + high) // 2
    for parts in (2 << power for power in range(TIMES)):
        if rows % parts == 0 and rows // parts <= max(low * grain, grain):
            fix = yield _accumulated(question, parts)
            if fix is not None:
                return


def shorter_sequences(question: Question) -> Kind:
    """Half the tokens, and so on, where the batch is of tokens: integers, all with the same second dim."""
    call = _call(question)
    tokens = [t for n, t in zip(call.names, call.tensors) if question.whole.batch_dims.get(n) == 0]
    lengths = {t.shape[1] for t in tokens if t.dim() == 2}
    whole = all(t.dim() < 3 and (t.dim() < 2 or not t.is_floating_point()) for t in tokens)
    if len(lengths) != 1 or not whole:
        return
    (length,) = lengths
    for power in range(1, TIMES + 1):
        seq = length >> power
        if seq < 1:
            return
        fix = yield _narrowed(question, f"sequences of {seq} tokens", 1, seq, f"--seq {seq}", seq / length)
        if fix is not None:
            return


#: What is proposed, in this order as long as there is time. Names as in messages.
KINDS: dict[str, Callable[[Question], Kind]] = {
    "keeping less": keeping_less,
    "fewer constraints": fewer_constraints,
    "another schedule": freer_schedules,
    "more devices": more_devices,
    "a smaller batch": smaller_batches,
    "another optimizer": other_optimizers,
    "lower precision": lower_precision,
    "another shape of the mesh": other_shapes,
    "shorter sequences": shorter_sequences,
}


def limited(question: Question) -> Fix | None:
    """The least limit that fits, rounded up. Where there is no time to solve for it: the plan of least memory."""
    error = question.error
    if error.least <= 0:
        return None
    limit = readable(error.least)
    candidate = Candidate(f'memory_limit="{limit}"', {"memory_limit": limit}, f"--memory {limit}", raises=True)
    fix = question.try_out(candidate) if question.left > 0 else None
    if fix is None and error.step_s:
        fix = Fix(candidate.what, candidate.changes, error.step_s, error.least, candidate.command)
    return fix


# ---- helpers -------------------------------------------------------------------------------------------------------


def _on(mesh: Mesh) -> Candidate:
    return Candidate(f"mesh {mesh} ({mesh.num_devices} devices)", {"mesh": str(mesh)}, f"--mesh {mesh}")


def _reshaped(mesh: Mesh, pipelines: bool) -> Iterator[Mesh]:
    axes = dict(zip(mesh.names, mesh.sizes))
    stages = axes.pop(AXIS, 1)
    found: list[dict[str, int]] = []
    for name, count in axes.items():
        for part in (k for k in (2, 4, 8) if count % k == 0):
            rest = {n: s // part if n == name else s for n, s in axes.items() if n != name or s > part}
            if pipelines:
                found.append({AXIS: stages * part, **rest})
            if stages == 1 and part == 2 and len(rest) < 3 and count > part:
                free = next(n for n in ("tp", "sp", "dp") if n not in axes)
                found.append({**rest, free: part})
    if stages > 1:
        name = next(iter(axes), "dp")
        found.append({**axes, name: axes.get(name, 1) * stages})
    for sizes in found:
        if 1 <= len(sizes) <= 3:
            yield Mesh(tuple(sizes), tuple(sizes.values()))


def _call(question: Question) -> Call:
    given = arguments(question.given["example"])
    assert given is not None  # it has been captured
    return Call(question.given["model"], *given, question.given["loss"])


def _batch(question: Question, rows: int) -> Candidate:
    share = rows / question.rows
    return _narrowed(question, f"a batch of {rows} in place of {question.rows}", None, rows, f"--batch {rows}", share)


def _accumulated(question: Question, parts: int) -> Candidate:
    """A part of the batch at a time. Gradients of the parts before are held while one runs: as much as parameters.

    Optimizer state on the host takes one backward for each step: where that is allowed, it is given up.
    """
    rows, held = question.rows // parts, question.error.memory.get("parameters", 0.0)
    part = _batch(question, rows)
    room = readable(max(1.0, question.error.limit - held), down=True)
    what = f"{parts} batches of {rows} whose gradients are added up before the optimizer steps"
    changes, command = {**part.changes, "memory_limit": room}, f"{part.command} --memory {room}"
    host_state = question.given["host_state"]
    if question.given["offload"] if host_state is None else host_state:
        changes, command = {**changes, "host_state": False}, f"{command} --no-host-state"
    return Candidate(what, changes, command, part.share, _parameters)


def _parameters(plan: Plan) -> float:
    memory = plan.predicted.get("memory", {})
    if "parameters" in memory:
        return float(memory["parameters"])
    return 0.0  # stages hold the sum of their micro-batches' gradients as it is


def _narrowed(question: Question, what: str, dim: int | None, length: int, command: str, share: float) -> Candidate:
    """A change of the example to so many rows, or so much of dim 1 of what has a batch."""
    call, dims = _call(question), question.whole.batch_dims
    fresh = {}
    for name, tensor in zip(call.names, call.tensors):
        if name in dims and (dim is None or tensor.dim() > dim):
            fresh[id(tensor)] = tensor.narrow(dims[name] if dim is None else dim, 0, length)
    return Candidate(what, {"example": _with(question.given["example"], fresh)}, command, share)


def _with(example: Any, fresh: Mapping[int, torch.Tensor]) -> Any:
    """The example with other tensors in place of some of its own."""
    if isinstance(example, torch.Tensor):
        return fresh.get(id(example), example)
    if isinstance(example, Mapping):
        return {name: _with(value, fresh) for name, value in example.items()}
    if type(example) in (tuple, list):
        return type(example)(_with(value, fresh) for value in example)
    return example


def readable(amount: float, down: bool = False) -> str:
    """Bytes as text that `memory_limit` takes, rounded up to three digits, or down."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if amount >= factor:
            step = factor * 10 ** (len(str(int(amount // factor))) - 3) if amount < 1000 * factor else factor
            count = math.floor(amount / step) if down else math.ceil(amount / step)
            return f"{count * step / factor:.10g}{unit}"
    return str(math.floor(amount) if down else math.ceil(amount))


__all__ = ["KINDS", "SECONDS", "Candidate", "Question", "explained", "question_of", "readable", "words"]
