"""What a ParallelModule holds besides its parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autopar.errors import RuntimeUseError
from autopar.plan import Plan
from autopar.runtime.groups import Grid
from autopar.runtime.handshake import Argument, Control
from autopar.runtime.lane import Lane
from autopar.runtime.pipeline import Pipelined, PipelineStep
from autopar.runtime.powersgd import PowerSgd
from autopar.runtime.scaler import LossScaler
from autopar.runtime.step import Lowered, Step, Take
from autopar.runtime.storage import Init
from autopar.runtime.training import Recipe, Trainer, asynchronous

#: Captures, plans and lowers one call, the same on every rank: (skeleton, args, kwargs, with backward, first plan).
Build = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], bool, Plan | None], Lowered | Pipelined]


@dataclass(frozen=True)
class Options:
    """How a module behaves; see `autopar.compile`.

    Attributes:
        check: compare the ranks before each step.
        backend: "eager" or "inductor".
        data_axes: mesh axes over which each rank brings its own piece of the batch; empty for global batches.
        init: values for parameters without any.
        shared: names of arguments that are no piece of a local batch.
        recipe: how the module trains itself (`train_step`).
        scaled: whether gradients need a scaled loss.
    """

    check: bool = True
    backend: str = "eager"
    data_axes: tuple[str, ...] = ()
    init: Init | None = None
    shared: tuple[str, ...] = ()
    recipe: Recipe | None = None
    scaled: bool = False


#: Name, the dict that holds the tensor, and its key there.
_Place = tuple[str, dict[str, Any], str]


@dataclass
class State:
    """What a ParallelModule holds besides parameters and buffers; apart, so that no name meets one of the user's."""

    grid: Grid
    control: Control
    build: Build
    options: Options
    skeleton: nn.Module
    shells: dict[int, nn.Module]
    model: nn.Module | None  # the user's model, until its values are taken
    order: list[str]  # of the parameters of the model's forward
    names: list[str]  # of what it takes by position
    plan: Plan | None = None
    steps: dict[Any, Step | PipelineStep] = field(default_factory=dict)
    forms: list[tuple[bool, tuple[Argument, ...]]] = field(default_factory=list)
    compared: set[tuple[tuple[str, str], ...]] = field(default_factory=set)  # forms whose pieces were looked at
    missing: set[str] = field(default_factory=set)
    last: Step | PipelineStep | None = None
    parts: tuple[int, ...] = ()  # which piece of the batch every rank brings
    holders: tuple[list[_Place], list[_Place]] | None = None  # of parameters and buffers; see `tensors`
    lane: Lane | None = None  # with a pipeline
    trainer: Trainer | None = None
    powersgd: PowerSgd = field(default_factory=PowerSgd)  # what compressed gradients have left out
    take: Take | None = None  # while `train_step` runs: where gradients that lie on the host go
    scaler: LossScaler | None = None
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # as of `Pipelined`

    def __post_init__(self) -> None:
        if self.options.scaled and self.scaler is None:
            self.scaler = LossScaler()

    @property
    def local(self) -> Grid:
        """The grid on which this rank's parameters lie: that of its stage, with a pipeline."""
        return self.grid if self.lane is None else self.lane.inner

    @property
    def host_bytes(self) -> int:
        """Bytes that `train_step` keeps on the host."""
        host = self.trainer.host if self.trainer is not None else None
        return host.nbytes if host is not None else 0

    def elsewhere(self) -> frozenset[str]:
        """Names of the parameters and buffers that other stages have, and this rank has not."""
        if self.lane is None:
            return frozenset()
        return frozenset(name for name, places in self.places.items() if self.lane.rank not in places)

    def adopt(self, places: Mapping[str, tuple[int, ...]]) -> None:
        """Of buffers that no program has changed before, say which places of the lane have them from now on."""
        if self.lane is None:
            return
        self.tensors()
        assert self.holders is not None
        for name, held, key in self.holders[1]:
            if name in places and name not in self.places and self.lane.rank not in places[name]:
                held[key] = None  # what is here would grow old
        self.places = {**places, **self.places}

    def from_owner(self, name: str, value: Any, like: torch.Tensor) -> Any:
        """A whole tensor from a stage that has it, on every rank. A collective call with a pipeline.

        `value`: what this rank has, if it has any; `like`: a tensor of the same form, without values.
        """
        if self.lane is None or not isinstance(like, torch.Tensor):
            return value
        if not isinstance(value, torch.Tensor):
            value = torch.empty(like.shape, dtype=like.dtype, device=self.grid.device)
        return self.lane.broadcast(value.detach(), self.places.get(name, (0,))[0])

    def tensors(self) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
        """Parameters and buffers as they are now, by all their names.

        As `named_parameters` and `named_buffers` (remove_duplicate=False), which walk over all modules; every step
        needs this, and the modules never change. What they hold may be replaced.
        """
        if self.holders is None:
            root = self.shells[id(self.skeleton)]
            shells = list(root.named_modules(remove_duplicate=False))
            join = "{}.{}".format
            self.holders = (
                [(join(at, k) if at else k, m._parameters, k) for at, m in shells for k in m._parameters],
                [(join(at, k) if at else k, m._buffers, k) for at, m in shells for k in m._buffers],
            )
        params, buffers = (
            {name: value for name, held, key in places if (value := held.get(key)) is not None}
            for places in self.holders
        )
        return params, buffers

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """For copy.deepcopy of the module (averages of weights): programs and groups are shared, values are not.

        What runs under an asynchronous schedule holds values; the trainer is the module's to copy, when it has its own.
        """
        apart = asynchronous(self.plan)
        steps = {k: s.twin() if apart and isinstance(s, PipelineStep) else s for k, s in self.steps.items()}
        powersgd = copy.deepcopy(self.powersgd)
        for key, step in steps.items():
            if isinstance(step, Step) and step.left:
                steps[key] = twin = copy.copy(step)
                twin.powersgd = powersgd
        return replace(
            self,
            shells=copy.deepcopy(self.shells, memo),
            model=copy.deepcopy(self.model, memo),
            steps=steps,
            trainer=None,
            powersgd=powersgd,
            take=None,
            scaler=copy.copy(self.scaler),
            forms=list(self.forms),
            compared=set(self.compared),
            missing=set(self.missing),
            holders=None,
        )

    def __reduce__(self) -> Any:
        raise RuntimeUseError(
            "a compiled module cannot be pickled, for it holds process groups; save pm.state_dict() or "
            "pm.full_state_dict(), and pm.plan.save(path), and compile again where you load them"
        )
