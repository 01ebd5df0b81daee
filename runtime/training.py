"""Training steps that the module makes itself: `pm.train_step(batch)`, for schedules that never empty the pipeline.

With a synchronous schedule it is forward, backward and `optimizer.step()`. With an asynchronous one (PACI) a step
gives the pipeline one more window of micro-batches and does what that makes possible here; every stage adds up the
gradients of the window and steps its own optimizer, with no barrier. Micro-batches stay in flight between calls, until
`drain`.

What differs from a plain loop, and cannot be had without a barrier: the loss is known on the last stage only, gradients
are clipped by the norm of one stage, and a stage that meets a gradient which is not finite leaves its update out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autopar.errors import RuntimeUseError
from autopar.pipeline.comms import with_comms
from autopar.pipeline.laws import expected_drift, expected_gain
from autopar.pipeline.schedules import schedule
from autopar.pipeline.stream import Stream
from autopar.runtime.pipeline import PipelineStep
from autopar.runtime.storage import rewrap

#: Weights of forward and backward. "current": those of now, as published for PACI. "stashed": a backward reads its
#: forward's, of which copies are kept. "predicted": a forward reads what its backward will find, by the last update.
WEIGHTS = ("current", "stashed", "predicted")
#: What a stage does with gradients that are not finite.
NONFINITE = ("skip", "raise")


@dataclass(frozen=True)
class Recipe:
    """How the module trains itself.

    Attributes:
        optimizer: makes it, or several, of the parameters of this rank's stages.
        lr_scheduler: makes it of an optimizer; stepped behind every update.
        clip: largest norm of the gradients: of all with a synchronous schedule, of each stage with an asynchronous one.
        weights: one of WEIGHTS. nonfinite: one of NONFINITE.
        flush: so many updates at the beginning, when weights change most, empty an asynchronous pipeline.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer | Sequence[Optimizer]]
    lr_scheduler: Callable[[Optimizer], Any] | None = None
    clip: float | None = None
    weights: str = "current"
    nonfinite: str = "skip"
    flush: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("weights", self.weights, WEIGHTS), ("nonfinite", self.nonfinite, NONFINITE)):
            if value not in known:
                raise RuntimeUseError(f"{name}={value!r} does not exist; choose one of {', '.join(known)}")
        if self.flush < 0:
            raise RuntimeUseError(f"flush_updates={self.flush} is negative; it is a number of updates")


@dataclass
class Drained:
    """What `drain` tells, on every rank.

    Attributes:
        loss: of the last window; None if there was none.
        updates: that every stage has made since compilation, those left out (`skipped`, by stage) counted.
        drift: mean number of updates between a micro-batch's forward and its backward, by stage. most: the largest.
    """

    loss: float | None
    updates: int
    skipped: tuple[int, ...]
    drift: tuple[float, ...]
    most: tuple[int, ...]


@dataclass
class Trainer:
    """A recipe at work on this rank."""

    recipe: Recipe
    params: Mapping[str, nn.Parameter]
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[Any]
    step: PipelineStep | None = None
    stream: Stream | None = None
    seed: int = 0
    skipped: int = 0
    loss: torch.Tensor | None = None
    wraps: dict[str, Callable[[torch.Tensor], DTensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, params: Mapping[str, nn.Parameter], seed: int) -> Trainer:
        """At work on these parameters, of this rank. `seed`: the same on every rank."""
        own = list({id(p): p for p in params.values() if p.requires_grad}.values())
        made = recipe.optimizer(own)
        optimizers = [made] if isinstance(made, Optimizer) else list(made)
        if not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
            raise RuntimeUseError(
                f"optimizer= has made {made!r}; return a torch.optim.Optimizer, or a list of those that this rank needs"
            )
        schedulers = [recipe.lr_scheduler(o) for o in optimizers] if recipe.lr_scheduler is not None else []
        return cls(recipe, params, optimizers, schedulers, seed=seed)

    def apply(self) -> None:
        """Step with the gradients that there are, and forget them."""
        with torch.enable_grad():  # as in a plain loop: some optimizers look
            for optimizer in self.optimizers:
                optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def advance(self) -> None:
        """One update has been made, or left out."""
        for scheduler in self.schedulers:
            scheduler.step()

    # ---- asynchronous ------------------------------------------------------------------------------------------

    def follow(self, step: PipelineStep) -> None:
        """Train by this step from now on; the pipeline is empty."""
        assert self.stream is None or self.stream.empty
        given = self.stream.given if self.stream is not None else 0
        pipeline = step.plan.pipeline
        assert pipeline is not None
        lane, make = step.lane, schedule(pipeline.schedule).make
        if self.step is None and pipeline.micro < lane.size and lane.rank == 0:
            drift, gain = expected_drift(lane.size, pipeline.micro), expected_gain(lane.size, pipeline.micro)
            warnings.warn(
                f"{pipeline.schedule} with a window of {pipeline.micro} micro-batches on {lane.size} stages: backwards "
                f"see weights {drift:.2g} updates newer than their forwards' on average, for a gain of "
                f"{gain:.2f} times over 1f1b with as many; with a window of {lane.size} or more it is less than one "
                f"(micro_batches={lane.size}), and 1f1b with many micro-batches has no such drift",
                stacklevel=4,
            )
        self.step = step
        self.stream = Stream(
            lambda n: with_comms(make(lane.size, pipeline.micro, n)), lane.size, pipeline.micro, lane.rank
        )
        self.stream.given = given
        for number, work in step.works.items():
            work.on_update = self.update
            work.stash = self.recipe.weights == "stashed"
            ahead = self.recipe.weights == "predicted" and number < max(step.home)  # the last stage has no drift
            work.count_from(given, pipeline.micro if ahead else 0)

    def window(self, params: Mapping[str, Any], buffers: Mapping[str, Any], inputs: list[torch.Tensor]) -> Any:
        """Give one window; the loss where this rank knows it."""
        step, stream = self.step, self.stream
        assert step is not None and stream is not None
        first = stream.given * stream.window
        batch = step.batch(params, buffers, inputs, self.seed + stream.given)
        for work in step.works.values():
            work.feed(batch, first)
        with torch.no_grad():
            step.go(stream.more(), last=False)
        if stream.given <= self.recipe.flush:
            self.rest()
        self.loss = step.loss(batch, first)
        return self.loss

    def rest(self) -> None:
        """Empty the pipeline."""
        if self.step is not None and self.stream is not None and not self.stream.empty:
            with torch.no_grad():
                self.step.go(self.stream.rest(), last=True)

    def update(self, grads: dict[str, torch.Tensor]) -> None:
        """Step with these local gradients."""
        finite = all(bool(torch.isfinite(g).all()) for g in grads.values())
        if not finite and self.recipe.nonfinite == "raise":
            bad = next(name for name, g in grads.items() if not bool(torch.isfinite(g).all()))
            raise RuntimeUseError(f"the gradient of {bad} is not finite")
        if not finite:
            self.skipped += 1  # the update counts: learning rates and versions stay in step with the other stages
        else:
            for name, grad in grads.items():
                param = self.params[name]
                if isinstance(param, DTensor):
                    wrap = self.wraps.setdefault(name, rewrap(param))
                    param.grad = wrap(grad)
                else:
                    param.grad = grad
            if self.recipe.clip is not None:
                nn.utils.clip_grad_norm_([self.params[n] for n in grads], self.recipe.clip)
            self.apply()
        self.advance()


class Trainable(nn.Module):
    """What `train_step` adds to a module that has a `_state`."""

    _state: Any

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank's parameters, made by `optimizer=` of autopar.compile.

        Raises:
            RuntimeUseError: there was none, there are several (`optimizers`), or nothing has been planned yet.
        """
        found = self.optimizers
        if len(found) > 1:
            raise RuntimeUseError(f"optimizer= has made {len(found)} optimizers; they are in pm.optimizers")
        return found[0]

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers of this rank's parameters. Raises as `optimizer`."""
        return tuple(self._trainer().optimizers)

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """One step of training on this batch: forward, backward, update.

        Returns the loss: with a synchronous schedule on every rank. With an asynchronous one on the ranks of the last
        stage, None on the others, for telling them would be a barrier; `drain` tells all.

        Raises:
            RuntimeUseError: autopar.compile was called without optimizer=, or the module is in evaluation mode.
        """
        if not self.training:
            raise RuntimeUseError("train_step is called in evaluation mode; call pm.train() first")
        state = self._state
        if not asynchronous(state.plan):
            if state.plan is None:
                self.prepare(*args, **kwargs)  # type: ignore[operator]
                return self.train_step(*args, **kwargs)
            return self._plain_step(args, kwargs)
        with torch.enable_grad():
            step, inputs = self._step_of(args, kwargs)
        trainer = self._trainer()
        if trainer.step is not step:
            trainer.rest()
            trainer.follow(step)
        params, buffers = state.tensors()
        return trainer.window(params, buffers, step.pieces(inputs))

    def drain(self) -> Drained | None:
        """Empty the pipeline: every micro-batch to its end, every stage at the same update. A collective call.

        Done by itself before evaluation, calls of the module, and state dicts. None without an asynchronous schedule.
        """
        state = self._state
        trainer: Trainer | None = state.trainer
        if trainer is None or trainer.step is None:
            return None
        trainer.rest()
        lane, works = trainer.step.lane, trainer.step.works.values()
        seen = [sum(w.drift_sum for w in works), sum(w.drift_count for w in works), max(w.drift_most for w in works)]
        loss = torch.zeros((), dtype=torch.float64)
        if trainer.loss is not None:
            loss.fill_(float(trainer.loss))
        rows = state.control.rows([trainer.skipped, *seen, int(trainer.loss is not None)])
        mesh, at = state.grid.mesh, state.grid.mesh.axis(lane.axis)
        stages = [next(r for r in range(mesh.num_devices) if mesh.coordinates(r)[at] == s) for s in range(lane.size)]
        known = lane.broadcast(loss.to(state.grid.device), lane.size - 1)
        return Drained(
            float(known) if any(row[-1] for row in rows) else None,
            trainer.stream.given if trainer.stream is not None else 0,
            tuple(rows[r][0] for r in stages),
            tuple(rows[r][1] / max(rows[r][2], 1) for r in stages),
            tuple(rows[r][3] for r in stages),
        )

    def settle(self) -> None:
        """`drain` if anything is in flight."""
        trainer: Trainer | None = self._state.trainer
        if trainer is not None and trainer.stream is not None and not trainer.stream.empty:
            trainer.rest()

    def train(self, mode: bool = True) -> Any:
        """As in nn.Module; before evaluation the pipeline is emptied."""
        if not mode and "_autopar" in self.__dict__:
            self.settle()
        return super().train(mode)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale the gradients so that the norm of all of them together is at most `max_norm`; that norm before.

        As torch.nn.utils.clip_grad_norm_, which on the parameters of a pipeline sees those of one stage only. What
        several stages have counts once. A collective call.
        """
        state = self._state
        params = [p for p in {id(p): p for p in self.parameters()}.values() if p.grad is not None]
        if state.lane is None:
            return whole_norm(nn.utils.clip_grad_norm_(params, max_norm, norm_type))
        first = {id(p) for n, p in state.tensors()[0].items() if state.places.get(n, (0,))[0] == state.lane.rank}
        counted = [p.grad for p in params if id(p) in first and p.grad is not None]
        norm = whole_norm(nn.utils.get_total_norm(counted, norm_type)) if counted else torch.zeros(())
        mine = norm.double().to(state.grid.device)
        parts = torch.stack([state.lane.broadcast(mine, place) for place in range(state.lane.size)])
        total = torch.linalg.vector_norm(parts, norm_type)
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in (p.grad for p in params if p.grad is not None):
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(scale.to(local.dtype))
        return total.to(norm.dtype)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _step_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[PipelineStep, list[torch.Tensor]]:
        """What runs this call, and its inputs. Nothing is compared between ranks, unless it is new."""
        state = self._state
        if state.missing:
            raise RuntimeUseError(missing_text(state.missing))
        call, key = self._describe(args, kwargs)  # type: ignore[operator]
        step = state.steps.get(key)
        if step is None:
            self.settle()
            state.control.agree(call, None)
            step = state.steps[key] = self._build(args, kwargs, call)  # type: ignore[operator]
        return step, step.program.flatten(args, kwargs)

    def _trainer(self) -> Trainer:
        state = self._state
        if state.trainer is None:
            if state.options.recipe is None:
                raise RuntimeUseError(
                    "the module has no optimizer: pass optimizer=lambda params: torch.optim.AdamW(params) to "
                    "autopar.compile, or step your own behind loss.backward()"
                )
            self.plan  # noqa: B018  (raises if there is none)
            params = {n: p for n, p in state.tensors()[0].items()}
            names = {id(p): n for n, p in reversed(params.items())}
            chosen = {names[id(p)]: p for p in params.values()}
            seed = state.control.share("choosing a seed", lambda: int(torch.randint(0, 2**60, ())))
            state.trainer = Trainer.of(state.options.recipe, {**params, **chosen}, seed)
        return state.trainer

    def _plain_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        trainer = self._trainer()
        trainer.forget()
        out = self(*args, **kwargs)
        loss = loss_of(out)
        loss.backward()
        if trainer.recipe.clip is not None:
            self.clip_grad_norm_(trainer.recipe.clip)
        trainer.apply()
        trainer.advance()
        return loss.detach()


def whole_norm(norm: torch.Tensor) -> torch.Tensor:
    """A norm as a plain tensor."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what a model returns: the output itself, `.loss`, or the first of several.

    Raises:
        RuntimeUseError: there is none.
    """
    found = output if isinstance(output, torch.Tensor) else getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor) or found.dim():
        raise RuntimeUseError(
            f"train_step needs a loss, and the model returns a {type(output).__name__} without one; return a scalar "
            "loss from forward, or pass loss= to autopar.compile"
        )
    return found


def asynchronous(plan: Any) -> bool:
    """Whether the plan's schedule steps the optimizer on its way."""
    from_table = plan is None or plan.pipeline is None or plan.pipeline.schedule == "table"
    return not from_table and schedule(plan.pipeline.schedule).asynchronous



def missing_text(missing: set[str]) -> str:
    """What to tell whoever calls a module whose parameters `missing` have no values."""
    names = sorted(missing)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(names)} parameters or buffers have no values (the model was on the meta device): {', '.join(names[:3])}"
        f"{more}; call pm.load_state_dict(...) first, or pass init=function(name, shape, dtype) to autopar.compile"
    )


__all__ = [
    "NONFINITE", "WEIGHTS", "Drained", "Recipe", "Trainable", "Trainer", "asynchronous", "loss_of", "missing_text",
    "whole_norm",
]  # fmt: skip
