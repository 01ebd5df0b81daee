"""Prove a plan on this machine: the same plan, a small model of the same kind, local processes, against one device.

The model of the plan is built again scaled down (`autopar.shrink`), the mesh is scaled to a few local processes, and
the plan's choices are carried over where the small sizes allow (`autopar.costmodel.adapt`). Both sides run in float64,
with casts to float32 inside the model widened, from the same random parameters, with labels that are partly ignored.
Compared are the loss of three steps, the gradients of the first, and parameters and buffers after three AdamW steps.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn
from torch.overrides import TorchFunctionMode

from autopar import decide, driver, shrink, targets
from autopar.capture import capture
from autopar.certificate import Certificate, Row, table
from autopar.costmodel.adapt import Adapted, adapt
from autopar.errors import AutoparError, PlanError
from autopar.given import check_plan
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.pipeline.plans import inner
from autopar.plan import Plan
from autopar.verify_stages import adapt_stages, micro_on, stages_on

STEPS = 3
PRELOAD = ["autopar.verify", "transformers"]
SMALL_BATCH, SMALL_SEQ, LAYERS = 8, 32, 2


class VerifyError(AutoparError, RuntimeError):
    """The comparison could not be run."""


@dataclass
class _Result:
    """What one side of the comparison gives, as plain tensors by name."""

    loss: list[torch.Tensor]
    grads: dict[str, torch.Tensor | None]
    state: dict[str, torch.Tensor]


def verify(plan: Plan, *, procs: int | None = None, progress: Callable[[str], None] = lambda text: None) -> Certificate:
    """Run `plan` scaled down on local processes and compare with one device.

    Args:
        procs: local processes at most; default 4, or 8 for a mesh of three axes.
        progress: told what happens, in a few words.

    Raises:
        PlanError: the plan was not made by `autopar plan`, so its model cannot be built again, or it has been edited
            to something that is not legal, or its model has changed since.
        VerifyError: a process failed.
        AutoparError: the small model cannot be built, captured or run.
    """
    if not plan.target:
        raise PlanError(
            "the plan does not say how to build its model: it was made in Python; "
            "make it with `autopar plan TARGET -o FILE`"
        )
    began = time.perf_counter()
    target = targets.Target.from_dict(plan.target)
    mesh = shrink.shrink_mesh(plan.mesh, procs)
    small = _Small(target, mesh, LAYERS)
    if plan.pipeline is not None:
        small = _Small(target, mesh, max(LAYERS, stages_on(plan.pipeline, plan, mesh)), 2 * SMALL_BATCH)
    progress(f"checking the plan against {target.text} ...")
    _check(plan, target)
    progress(f"building a small model of {target.text} ...")
    model, kwargs, args, loss = small.build()
    _randomise(model)
    kwargs = _ignore_some_labels(kwargs)
    progress("carrying the plan over ...")
    with Widen():
        adapted, program = _adapted(plan, small, model, args, kwargs, loss)
    micro = adapted.plan.pipeline.micro if adapted.plan.pipeline is not None else None
    why = "the model is random" if program.of_kind("seed") else ""
    moved = {s.name.rpartition(".")[2] for s in program.sinks if s.kind == "buffer" and s.node is not None}
    if micro is not None and "running_mean" in moved:
        why = why or "batch norms see micro-batches"
    # Compressed gradients are no equality: what is proven is the plan without.
    uncompressed = f", without compression {plan.compression}" if plan.compression is not None else ""
    with tempfile.TemporaryDirectory(prefix="autopar-verify-") as folder:
        torch.save({"state": model.state_dict(), "args": args, "kwargs": kwargs}, Path(folder) / "start.pt")
        adapted.plan.save(Path(folder) / "plan.json")
        progress("running on one device ...")
        # Masks of plain dropout come from another generator than ours: then the reference is our mesh of one.
        if why:
            reference = _run_compiled(model, args, kwargs, loss, _one(mesh), micro_batches=micro)
        else:
            reference = _run_plain(model, args, kwargs, loss)
        progress(f"running on {mesh.num_devices} processes ({mesh}) ...")
        _spawn(small, folder)
        result = _gathered(Path(folder), mesh.num_devices)
    return Certificate(
        target=target.text,
        plan_mesh=str(plan.mesh),
        mesh=str(mesh),
        parameters=sum(p.numel() for p in model.parameters()),
        kept=adapted.kept,
        total=adapted.total,
        changed=adapted.changed,
        reference=(f"a mesh of one ({why})" if why else "the plain model") + uncompressed + _precision(plan),
        rows=compare(result, reference),
        seconds=time.perf_counter() - began,
    )


def _precision(plan: Plan) -> str:
    """What is not as planned, in words: float64 has no use for what computes in low precision."""
    return f", both with the plan's precision ({plan.precision['compute']}) off" if plan.precision else ""


# ---- the small model -----------------------------------------------------------------------------------------------

_Built = tuple[nn.Module, dict[str, Any], tuple[Any, ...], Callable[..., Any] | None]


@dataclass(frozen=True)
class _Small:
    """The small model: of what, for which mesh, with how many layers, and how many rows in a batch at most."""

    full: targets.Target
    mesh: Mesh
    layers: int
    rows: int = SMALL_BATCH

    @property
    def target(self) -> targets.Target:
        """What is built."""
        full = self.full
        return replace(full, batch=min(full.batch, self.rows), seq=min(full.seq, SMALL_SEQ), dtype="fp64")

    def build(self) -> _Built:
        """The model in float64, and its arguments."""
        torch.manual_seed(0)
        target = self.target
        built = targets.build(
            target, real=True, shrink=lambda data: shrink.shrink_config(data, self.mesh, target.seq, self.layers)
        )
        model = built.model.double()
        if any(p.is_meta for p in model.parameters()):
            raise VerifyError(f"{target.text} gives a model on the meta device; to be verified it needs values")
        config = getattr(model, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "batched_mm"  # type: ignore[union-attr]  # grouped_mm has no float64 kernel
        widen = lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
        kwargs = {k: widen(v) for k, v in built.kwargs.items()}
        return model, kwargs, tuple(widen(a) for a in built.args), built.loss


def _check(plan: Plan, target: targets.Target) -> None:
    """Raise unless the plan is for this model, and legal."""
    whole = targets.build(target)
    if plan.pipeline is None:
        program = capture(whole.model, whole.args, whole.kwargs, loss=whole.loss, precision=plan.computes)
        check_plan(program, plan)
        return
    micro = decide.micro_program(
        whole.model, whole.args, whole.kwargs, whole.loss, plan.pipeline.micro, plan.computes
    )  # fmt: skip
    check_plan(micro, inner(plan))


def _adapted(
    plan: Plan, small: _Small, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
    loss: Callable[..., Any] | None,
) -> tuple[Adapted, Program]:  # fmt: skip
    """The plan for the small model, and the program that it is for."""
    mesh, pipeline = small.mesh, plan.pipeline
    if pipeline is None:
        program = capture(model, args, kwargs, loss=loss)
        return adapt(program, plan, mesh), program
    micro = micro_on(pipeline, mesh.sizes[mesh.axis(pipeline.axis)], small.target.batch)
    program = decide.micro_program(model, args, kwargs, loss, micro)
    return adapt_stages(program, plan, mesh, stages_on(pipeline, plan, mesh), micro), program


def _gathered(folder: Path, ranks: int) -> _Result:
    """What the ranks have left: of a pipeline, each has the gradients of its stages."""
    found = [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(ranks)]
    grads = {name: grad for result in reversed(found) for name, grad in result.grads.items()}
    return _Result(found[0].loss, grads, found[0].state)


def _randomise(model: nn.Module) -> None:
    """Move every parameter off its initial value: zero biases and unit scales would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=0.02)


def _ignore_some_labels(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Ignore the labels of half of the first row, so that ranks count different numbers of tokens."""
    labels = kwargs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return kwargs
    labels = labels.clone()
    labels[0, : labels.shape[1] // 2] = -100
    return {**kwargs, "labels": labels}


class Widen(TorchFunctionMode):
    """Within, what asks for float32 gets float64: models that cast inside can then be compared exactly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the dtype arguments of one call."""
        if func is torch.Tensor.float:
            func, args, kwargs = torch.Tensor.double, args[:1], {}
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


# ---- running -------------------------------------------------------------------------------------------------------


def _one(mesh: Mesh) -> Mesh:
    return Mesh(mesh.names, (1,) * len(mesh.sizes))


def _run_plain(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[..., Any] | None
) -> _Result:
    kwargs = dict(kwargs)
    target = kwargs.pop("target") if loss is not None else None

    def step() -> torch.Tensor:
        with Widen():
            out = model(*args, **kwargs)
            return loss(out, target) if loss is not None else _loss(out)

    return _train(model, step, lambda t: t.detach().clone(), model.state_dict)


def _run_compiled(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[..., Any] | None,
    mesh: Mesh,
    plan: Plan | None = None,
    micro_batches: int | None = None,
) -> _Result:
    """Train the compiled model; positional arguments and keywords may be mixed, which `example` cannot say."""
    torch.manual_seed(0)
    example = kwargs if not args else args
    if args and kwargs:
        raise VerifyError("the example mixes positional and named arguments; give all by name")
    with Widen():
        itself = plan is not None and bool(plan.on_host)
        module = driver.compile(
            model, mesh, example=example, loss=loss, plan=plan, device="cpu", micro_batches=micro_batches,
            optimizer=_adamw if itself else None,
        )  # fmt: skip

    if itself:
        return _train_itself(module, lambda: module.train_step(*args, **kwargs))
    return _train(module, lambda: _loss(module(*args, **kwargs)), _whole, module.full_state_dict)


def _train(
    model: nn.Module,
    step: Callable[[], torch.Tensor],
    whole: Callable[[torch.Tensor], torch.Tensor],
    state: Callable[[], Mapping[str, torch.Tensor]],
) -> _Result:
    optimizer = _adamw(model.parameters())
    losses: list[torch.Tensor] = []
    grads: dict[str, torch.Tensor | None] = {}
    for number in range(STEPS):
        loss = step()
        losses.append(whole(loss))
        loss.backward()
        if number == 0:
            grads = {n: None if p.grad is None else whole(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return _Result(losses, grads, {n: t.detach().clone() for n, t in state().items() if isinstance(t, torch.Tensor)})


def _train_itself(module: Any, step: Callable[[], Any]) -> _Result:
    """The same of a module that steps its optimizers itself, for the plan has some of their state on the host."""
    grads: dict[str, torch.Tensor | None] = {}

    def look(*_: Any) -> None:
        found = {} if grads else module.gradients()
        grads.update({n: None if g is None else _whole(g) for n, g in found.items()})

    for optimizer in module.optimizers:
        optimizer.register_step_pre_hook(look)
    losses = [_whole(step()) for _ in range(STEPS)]
    return _Result(losses, grads, {n: t for n, t in module.full_state_dict().items() if isinstance(t, torch.Tensor)})


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01)


def _whole(tensor: Any) -> torch.Tensor:
    """A plain whole tensor from a plain or distributed one; on every rank in the same order."""
    value = tensor.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def _loss(out: Any) -> torch.Tensor:
    """The loss among the outputs: the output itself, `.loss`, or the first element.

    Raises:
        VerifyError: there is none; there is nothing to train.
    """
    found = getattr(out, "loss", None)
    if found is None and isinstance(out, Mapping):
        found = out.get("loss")
    if found is None and isinstance(out, (tuple, list)) and out:
        found = out[0]
    if found is None:
        found = out
    if not isinstance(found, torch.Tensor) or found.dim() != 0:
        raise VerifyError(
            "the model returns no scalar loss; give labels, or return (model, example, loss) from your function"
        )
    return found


def _spawn(small: _Small, folder: str) -> None:
    """Run every rank in a process of its own, which leaves its result in the folder.

    Raises:
        VerifyError: a rank failed; with its message.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ranks are forked from one process that has imported the heavy modules once.
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)
    count = small.mesh.num_devices
    context = mp.start_processes(_rank, (small, folder, port), nprocs=count, join=False, start_method="forkserver")
    assert context is not None
    try:
        while not context.join(timeout=5):
            continue
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        told = sorted(Path(folder).glob("error-*.txt"))
        text = told[0].read_text(encoding="utf-8") if told else str(error).strip().splitlines()[-1]
        raise VerifyError(f"a process failed while the plan ran: {text}") from None


def _rank(rank: int, small: _Small, folder: str, port: int) -> None:
    mesh = small.mesh
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(mesh.num_devices),
        LOCAL_WORLD_SIZE=str(mesh.num_devices),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    _quiet()
    try:
        model, _, _, loss = small.build()
        start = torch.load(Path(folder) / "start.pt", weights_only=False)
        model.load_state_dict(start["state"])
        plan = Plan.load(Path(folder) / "plan.json")
        result = _run_compiled(model, start["args"], start["kwargs"], loss, mesh, plan)
    except Exception as error:
        (Path(folder) / f"error-{rank}.txt").write_text(
            f"rank {rank}: {type(error).__name__}: {error}", encoding="utf-8"
        )
        raise
    torch.save(result, Path(folder) / f"result-{rank}.pt")


def _quiet() -> None:
    """Keep torch's advice to its own developers out of the certificate."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare(got: _Result, want: _Result) -> tuple[Row, ...]:
    """Worst relative error of losses, gradients, and parameters and buffers at the end."""
    losses = {f"step {i}": t for i, t in enumerate(want.loss)}
    return (
        _worst(f"loss, {STEPS} steps", {f"step {i}": t for i, t in enumerate(got.loss)}, losses),
        _worst("gradients, first step", got.grads, want.grads),
        _worst(f"parameters and buffers after {STEPS} AdamW steps", got.state, want.state),
    )


def _worst(what: str, got: Mapping[str, torch.Tensor | None], want: Mapping[str, torch.Tensor | None]) -> Row:
    if got.keys() != want.keys():
        return Row(what, float("inf"), f"only one side has {', '.join(sorted(got.keys() ^ want.keys()))}")
    floor = 1e-6 * max((float(t.abs().max()) for t in want.values() if t is not None and t.numel()), default=0.0)
    worst, where = 0.0, "-"
    for name, right in want.items():
        left = got[name]
        if left is None or right is None:
            error = float("inf") if _any(left) or _any(right) else 0.0
        elif left.shape != right.shape:
            error = float("inf")
        elif not right.numel():
            error = 0.0
        else:
            scale = max(float(right.abs().max()), floor, 1e-300)
            error = float((left.double() - right.double()).abs().max()) / scale
            error = float("inf") if error != error else error
        if error > worst or where == "-":
            worst, where = error, name
    return Row(what, worst, where)


def _any(tensor: torch.Tensor | None) -> bool:
    """Whether a gradient says anything: none at all and all zeros are the same."""
    return tensor is not None and bool(tensor.any())


__all__ = ["Certificate", "Row", "VerifyError", "Widen", "compare", "table", "verify"]
