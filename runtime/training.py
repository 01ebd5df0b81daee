"""Training steps that the module makes itself: `pm.train_step(batch)`, for schedules that never empty the pipeline.

With a synchronous schedule it is forward, backward and `optimizer.step()`. With an asynchronous one (PACI) a step
gives the pipeline one more window of micro-batches and does what that makes possible here (`runtime/trainer.py`).
Micro-batches stay in flight between calls, until `drain`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autopar.errors import RuntimeUseError
from autopar.pipeline.plans import OWN
from autopar.pipeline.schedules import schedule
from autopar.plan import Plan
from autopar.runtime.handshake import Call, Journal
from autopar.runtime.host_optimizer import HostOptimizer
from autopar.runtime.pipeline import PipelineStep
from autopar.runtime.scaler import LossScaler
from autopar.runtime.trainer import NONFINITE, WEIGHTS, Recipe, Trainer


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


class Trainable(nn.Module):
    """What `train_step` adds to a module that has a `_state`."""

    _state: Any

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of this rank's parameters, made by `optimizer=` of autopar.compile.

        Raises:
            RuntimeUseError: there was none, there are several (`optimizers`), this rank has nothing to train, or
                nothing has been planned yet.
        """
        found = self.optimizers
        if not found:
            raise RuntimeUseError(
                "this rank has no optimizer, for all parameters of its stages are frozen; pm.optimizers, which is () "
                "here, has those that there are"
            )
        if len(found) > 1:
            raise RuntimeUseError(f"optimizer= has made {len(found)} optimizers; they are in pm.optimizers")
        return found[0]

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The optimizers of this rank's parameters, none if they are frozen. Raises as `optimizer`.

        They are made when they are first asked for, or by the first `train_step`: a collective call.
        """
        return tuple(self._trainer().optimizers)

    @property
    def scaler(self) -> LossScaler | None:
        """What scales the loss with precision="fp16", in `train_step` and in a plain loop; None with any other."""
        return self._state.scaler

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """One step of training on this batch: forward, backward, update.

        Returns the loss: with a synchronous schedule on every rank. With an asynchronous one on the ranks of the stage
        that computes it, None on the others, for telling them would be a barrier; `drain` tells all. Nor does such a
        step compare what the ranks were given (check=True of autopar.compile): the next `drain` does, and so does all
        else that empties the pipeline.

        Raises:
            BatchError: those calls were given different batches; or as the call of the module.
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
            call, step, inputs = self._step_of(args, kwargs)
        trainer = self._trainer()
        if trainer.step is not step:
            trainer.rest()
            trainer.follow(step)
        if trainer.journal is not None:
            trainer.journal.note(call)
        params, buffers = state.tensors()
        return trainer.window(params, buffers, step.pieces(inputs))

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """Gradients as they are now, by name, those that lie on the host too: what a hook of an optimizer sees."""
        found = {name: p.grad for name, p in self.named_parameters()}
        trainer = self._state.trainer
        if trainer is not None and trainer.host is not None:
            found.update(trainer.host.gradients())
        return found

    def drain(self) -> Drained | None:
        """Empty the pipeline: every micro-batch to its end, every stage at the same update. A collective call.

        Done by itself before evaluation, calls of the module, copies, and state dicts. None without an asynchronous
        schedule.

        Raises:
            BatchError: with check=True of autopar.compile, the ranks were given different batches since they were last
                compared; says in which calls. The pipeline is empty all the same.
        """
        state = self._state
        trainer: Trainer | None = state.trainer
        if trainer is None or trainer.step is None:
            return None
        trainer.rest()
        step, lane, works = trainer.step, trainer.step.lane, trainer.step.works.values()
        seen = [sum(w.drift_sum for w in works), sum(w.drift_count for w in works), max(w.drift_most for w in works)]
        loss = torch.zeros((), dtype=torch.float64)
        if trainer.loss is not None:
            loss.fill_(float(trainer.loss))
        rows = state.control.rows([trainer.skipped, *seen, int(trainer.loss is not None)])
        mesh, at = state.grid.mesh, state.grid.mesh.axis(lane.axis)
        stages = [next(r for r in range(mesh.num_devices) if mesh.coordinates(r)[at] == s) for s in range(lane.size)]
        known = lane.broadcast(loss.to(state.grid.device), step.home[step.loss_stage])
        return Drained(
            float(known) if any(row[-1] for row in rows) else None,
            trainer.stream.given if trainer.stream is not None else 0,
            tuple(rows[r][0] for r in stages),
            tuple(rows[r][1] / max(rows[r][2], 1) for r in stages),
            tuple(rows[r][3] for r in stages),
        )

    def settle(self) -> None:
        """Empty the pipeline if anything is in flight, also of a module that this is a copy of. Raises as `drain`."""
        lane = self._state.lane
        if lane is not None:
            lane.settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """With values and the state of the optimizers its own, programs and process groups shared.

        Raises:
            RuntimeUseError: the optimizer cannot be copied; says why.
        """
        self.settle()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        trainer, steps = self._state.trainer, self._state.steps
        if trainer is not None:
            own = next((twin._state.steps[key] for key, step in steps.items() if step is trainer.step), None)
            twin._state.trainer = trainer.twin(twin._state.tensors()[0], own)
        return twin

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
        if state.trainer is not None and state.trainer.host is not None:
            return state.trainer.host.clip(params, max_norm, norm_type)
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

    def _only_evaluates(self) -> bool:
        """Whether a call is without gradients though they are enabled: the plan has them for `train_step` only.

        Raises:
            RuntimeUseError: the module is in training mode, so that gradients are what is wanted.
        """
        plan = self._state.plan
        hosted = plan is not None and bool(plan.on_host) and self._state.take is None
        if not torch.is_grad_enabled() or not (hosted or asynchronous(plan)):
            return False
        if self.training and hosted:
            assert plan is not None
            raise RuntimeUseError(
                f"the plan keeps gradients and optimizer state of {plan.on_host[0]} and {len(plan.on_host) - 1} more "
                "parameters on the host, where only the module itself can step them: pass optimizer=lambda params: "
                "torch.optim.AdamW(params) to autopar.compile and call pm.train_step(batch) in place of the module, or "
                "plan with offload=False; to evaluate, call pm.eval() first, or use torch.no_grad()"
            )
        if self.training:
            raise RuntimeUseError(
                "the pipeline's schedule steps the optimizer on its way: call pm.train_step(batch) in place of the "
                "module, or compile with a synchronous schedule; to evaluate, call pm.eval() first, or use "
                "torch.no_grad()"
            )
        return True

    def _step_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, PipelineStep, list[torch.Tensor]]:
        """The call, what runs it, and its inputs. Nothing is compared between ranks, unless it is new."""
        state = self._state
        if state.missing:
            raise RuntimeUseError(missing_text(state.missing))
        call, key = self._describe(args, kwargs)  # type: ignore[operator]
        step = state.steps.get(key)
        if step is None:
            self.settle()
            state.control.agree(call, None)
            step = state.steps[key] = self._build(args, kwargs, call)  # type: ignore[operator]
        return call, step, step.program.flatten(args, kwargs)

    def _trainer(self) -> Trainer:
        state = self._state
        if state.trainer is None:
            if state.options.recipe is None:
                raise RuntimeUseError(
                    "the module has no optimizer: pass optimizer=lambda params: torch.optim.AdamW(params) to "
                    "autopar.compile, or step your own behind loss.backward()"
                )
            self.plan  # noqa: B018  (raises if there is none)
            seed = state.control.share("choosing a seed", lambda: int(torch.randint(0, 2**60, ())))
            journal = Journal(state.control) if state.options.check and state.grid.size > 1 else None
            with state.control.together("making the optimizer"):
                names, params = state.plan.on_host, state.tensors()[0]
                host = HostOptimizer(params, names, state.grid) if names else None
                trainer = Trainer.of(state.options.recipe, params, seed, journal, host)
            state.trainer = trainer
        return state.trainer

    def _plain_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        trainer = self._trainer()
        self.zero_grad(set_to_none=True)
        host = trainer.host
        if host is not None:
            host.forget()
            host.follow()
            self._state.take = host.take
        try:
            out = self(*args, **kwargs)
        finally:
            self._state.take = None
        loss = loss_of(out)
        loss.backward()
        if self.scaler is not None and self.scaler.overflowed:
            trainer.skipped += 1
        else:
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


def asynchronous(plan: Plan | None) -> bool:
    """Whether the plan's schedule steps the optimizer on its way."""
    if plan is None or plan.pipeline is None or plan.pipeline.schedule == OWN:
        return False
    return schedule(plan.pipeline.schedule).asynchronous


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
