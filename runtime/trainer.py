"""A recipe at work on one rank: optimizers, schedulers and, with an asynchronous schedule, windows and their updates.

With an asynchronous schedule (PACI) every window of micro-batches goes into the pipeline behind the one before; every
stage adds up the gradients of a window and steps its own optimizer, with no barrier.

What differs from a plain loop, and cannot be had without a barrier: the loss is known on the stage that computes it,
gradients are clipped by the norm of one stage, a stage that meets a gradient which is not finite leaves its update out,
and the ranks compare the batches that they were given only when the pipeline is emptied.
"""

from __future__ import annotations

import copy
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
from autopar.runtime.handshake import Control, Journal
from autopar.runtime.host_optimizer import HostOptimizer
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
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer | Sequence[Optimizer]]
    lr_scheduler: Callable[[Optimizer], Any] | None = None
    clip: float | None = None
    weights: str = "current"
    nonfinite: str = "skip"

    def __post_init__(self) -> None:
        for name, value, known in (("weights", self.weights, WEIGHTS), ("nonfinite", self.nonfinite, NONFINITE)):
            if value not in known:
                raise RuntimeUseError(f"{name}={value!r} does not exist; choose one of {', '.join(known)}")


@dataclass
class Trainer:
    """A recipe at work on this rank.

    Attributes:
        params: of this rank's stages, by all their names. optimizers: none if they are all frozen.
        step, stream: with an asynchronous schedule, what runs, and how far it has come. seed: of the first window.
        journal: where calls are written down that the ranks are to compare.
        skipped: updates left out. loss: of the last window, where this rank knows it.
        host: what is stepped on the host; its optimizers are among `optimizers`, behind the others.
    """

    recipe: Recipe
    params: Mapping[str, nn.Parameter]
    optimizers: Sequence[Optimizer]
    schedulers: Sequence[Any]
    seed: int = 0
    journal: Journal | None = None
    step: PipelineStep | None = None
    stream: Stream | None = None
    skipped: int = 0
    loss: torch.Tensor | None = None
    wraps: dict[str, Callable[[torch.Tensor], DTensor]] = field(default_factory=dict)
    host: HostOptimizer | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        params: Mapping[str, nn.Parameter],
        seed: int,
        journal: Journal | None = None,
        host: HostOptimizer | None = None,
    ) -> Trainer:
        """At work on these parameters, of this rank. `seed`: the same on every rank.

        host: what is stepped on the host, of which `recipe` makes optimizers of their own.
        """
        trained = {id(p): p for p in params.values() if p.requires_grad}.values()
        own = [p for p in trained if host is None or not host.holds(p)]
        made = recipe.optimizer(own) if own else []  # torch has no optimizer of nothing
        optimizers = list(made) if isinstance(made, Iterable) else [made]
        if (own and not optimizers) or not all(isinstance(o, Optimizer) for o in optimizers):
            raise RuntimeUseError(
                f"optimizer= has made {made!r}; return a torch.optim.Optimizer, or a list of those that this rank needs"
            )
        if host is not None:
            optimizers += host.make(recipe.optimizer, optimizers)
        schedulers = [recipe.lr_scheduler(o) for o in optimizers] if recipe.lr_scheduler is not None else []
        return cls(recipe, params, optimizers, schedulers, seed, journal, host=host)

    def apply(self) -> None:
        """Step with the gradients that there are, and forget them."""
        with torch.enable_grad():  # as in a plain loop: some optimizers look
            for optimizer in self.optimizers:
                if self.host is None or optimizer not in self.host.optimizers:
                    optimizer.step()
        if self.host is not None:  # behind the others, which a GPU then does meanwhile
            self.host.step()
        self.forget()

    def forget(self) -> None:
        """Drop gradients, also of what no optimizer steps: they would add up, and enter the norm."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for param in self.params.values():
            param.grad = None
        if self.host is not None:
            self.host.forget()

    def advance(self) -> None:
        """One update has been made, or left out."""
        for scheduler in self.schedulers:
            scheduler.step()

    def twin(self, params: Mapping[str, nn.Parameter], step: PipelineStep | None) -> Trainer:
        """A trainer in the same state on these parameters, which are copies of ours. Nothing is in flight.

        step: the twin of our step, if there is one.

        Raises:
            RuntimeUseError: the optimizer or scheduler does not take over the state of another one.
        """
        journal = None if self.journal is None else Journal(self.journal.control)
        try:
            host = None if self.host is None else self.host.twin(params)
            twin = Trainer.of(self.recipe, params, self.seed, journal, host)
            own, its = (*self.optimizers, *self.schedulers), (*twin.optimizers, *twin.schedulers)
            for one, other in zip(own, its, strict=True):
                other.load_state_dict(copy.deepcopy(one.state_dict()))
        except Exception as error:
            raise RuntimeUseError(
                "the module cannot be copied with its optimizer: optimizer= (and lr_scheduler=) make one for the copy, "
                f"which does not take over the state of this one ({type(error).__name__}: {error}); let them make the "
                "same at every call, of classes whose load_state_dict takes what state_dict gives, or copy the module "
                "before its first train_step"
            ) from error
        twin.skipped, twin.loss = self.skipped, self.loss
        if self.step is not None and self.stream is not None and step is not None:
            twin._begin(step, self.step, self.stream.given)
        return twin

    # ---- asynchronous ------------------------------------------------------------------------------------------

    def follow(self, step: PipelineStep) -> None:
        """Train by this step from now on; the pipeline is empty."""
        assert self.stream is None or self.stream.empty
        pipeline, lane = step.plan.pipeline, step.lane
        assert pipeline is not None
        if self.step is None and pipeline.micro < lane.size and lane.rank == 0:
            drift, gain = expected_drift(lane.size, pipeline.micro), expected_gain(lane.size, pipeline.micro)
            warnings.warn(
                f"{pipeline.schedule} with a window of {pipeline.micro} micro-batches on {lane.size} stages: backwards "
                f"see weights {drift:.2g} updates newer than their forwards' on average, for a gain of "
                f"{gain:.2f} times over 1f1b with as many; with a window of {lane.size} or more it is less than one "
                f"(micro_batches={lane.size}), and 1f1b with many micro-batches has no such drift",
                stacklevel=4,
            )
        self._begin(step, self.step, 0 if self.stream is None else self.stream.given)

    def _begin(self, step: PipelineStep, before: PipelineStep | None, given: int) -> None:
        """Train by this step, `given` windows having been made, the last of them by `before`."""
        pipeline, lane = step.plan.pipeline, step.lane
        assert pipeline is not None
        make = schedule(pipeline.schedule).make
        self.step = step
        self.stream = Stream(
            lambda n: with_comms(make(lane.size, pipeline.micro, n)), lane.size, pipeline.micro, lane.rank
        )
        self.stream.given = given
        for number, work in step.works.items():
            work.on_update = self.update
            work.stash = self.recipe.weights == "stashed"
            ahead = self.recipe.weights == "predicted" and number < max(step.home)  # the last stage has no drift
            old = None if before is None else before.works.get(number)
            work.count_from(given, pipeline.micro if ahead else 0, old)

    def window(self, params: Mapping[str, Any], buffers: Mapping[str, Any], inputs: list[torch.Tensor]) -> Any:
        """Give one window; the loss where this rank knows it."""
        step, stream = self.step, self.stream
        assert step is not None and stream is not None
        step.lane.hold(self.rest)
        first = stream.given * stream.window
        batch = step.batch(params, buffers, inputs, self.seed + stream.given)
        batch.keep = frozenset({step.lowered.loss})  # nobody asks for the other outputs
        for work in step.works.values():
            work.feed(batch, first)
        with torch.no_grad():
            step.go(stream.more(), last=False)
        self.loss = step.loss(batch, first)
        return self.loss

    def rest(self) -> None:
        """Empty the pipeline; then compare the calls of the ranks. A collective call if anything is in flight.

        Raises:
            BatchError: the ranks were given different batches; the pipeline is empty all the same.
        """
        if self.step is None or self.stream is None or self.stream.empty:
            return
        with torch.no_grad():
            self.step.go(self.stream.rest(), last=True)
        if self.journal is not None:
            self.journal.compare()

    def update(self, grads: dict[str, torch.Tensor]) -> None:
        """Step with these local gradients. A collective call of the stage's ranks."""
        bad = next((name for name, g in grads.items() if not bool(torch.isfinite(g).all())), None)
        finite = self._everywhere(bad is None)
        if not finite and self.recipe.nonfinite == "raise":
            what = "a gradient that another rank of this stage has" if bad is None else f"the gradient of {bad}"
            raise RuntimeUseError(
                f"{what} is not finite; look at the batch and at the learning rate, or leave such updates out with "
                "nonfinite='skip'"
            )
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

    def _everywhere(self, fine: bool) -> bool:
        """Whether it is so on every rank of this stage: they have pieces of the same parameters."""
        assert self.step is not None
        return all(row[0] for row in Control(self.step.lane.inner).rows([int(fine)]))


__all__ = ["NONFINITE", "WEIGHTS", "Recipe", "Trainer"]
