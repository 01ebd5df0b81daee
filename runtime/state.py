"""What a ParallelModule holds besides its parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from autopar.errors import RuntimeUseError
from autopar.plan import Plan
from autopar.runtime.groups import Grid
from autopar.runtime.handshake import Argument, Control
from autopar.runtime.step import Lowered, Step
from autopar.runtime.storage import Init

#: Captures, plans and lowers one call, the same on every rank: (skeleton, args, kwargs, with backward, first plan).
Build = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], bool, Plan | None], Lowered]


@dataclass(frozen=True)
class Options:
    """How a module behaves; see `autopar.compile`.

    Attributes:
        check: compare the ranks before each step.
        backend: "eager" or "inductor".
        data_axes: mesh axes over which each rank brings its own piece of the batch; empty for global batches.
        init: values for parameters without any.
        shared: names of arguments that are no piece of a local batch.
    """

    check: bool = True
    backend: str = "eager"
    data_axes: tuple[str, ...] = ()
    init: Init | None = None
    shared: tuple[str, ...] = ()


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
    steps: dict[Any, Step] = field(default_factory=dict)
    forms: list[tuple[bool, tuple[Argument, ...]]] = field(default_factory=list)
    compared: set[tuple[tuple[str, str], ...]] = field(default_factory=set)  # forms whose pieces were looked at
    missing: set[str] = field(default_factory=set)
    last: Step | None = None
    parts: tuple[int, ...] = ()  # which piece of the batch every rank brings
    places: tuple[list[_Place], list[_Place]] | None = None  # of parameters and buffers; see `tensors`

    def tensors(self) -> tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]:
        """Parameters and buffers as they are now, by all their names.

        As `named_parameters` and `named_buffers` (remove_duplicate=False), which walk over all modules; every step
        needs this, and the modules never change. What they hold may be replaced.
        """
        if self.places is None:
            root = self.shells[id(self.skeleton)]
            shells = list(root.named_modules(remove_duplicate=False))
            join = "{}.{}".format
            self.places = (
                [(join(at, k) if at else k, m._parameters, k) for at, m in shells for k in m._parameters],
                [(join(at, k) if at else k, m._buffers, k) for at, m in shells for k in m._buffers],
            )
        params, buffers = (
            {name: held[key] for name, held, key in places if held.get(key) is not None} for places in self.places
        )
        return params, buffers

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """For copy.deepcopy of the module (averages of weights): programs and groups are shared, values are not."""
        return replace(
            self,
            shells=copy.deepcopy(self.shells, memo),
            model=copy.deepcopy(self.model, memo),
            steps=dict(self.steps),
            forms=list(self.forms),
            compared=set(self.compared),
            missing=set(self.missing),
            places=None,
        )

    def __reduce__(self) -> Any:
        raise RuntimeUseError(
            "a compiled module cannot be pickled, for it holds process groups; save pm.state_dict() or "
            "pm.full_state_dict(), and pm.plan.save(path), and compile again where you load them"
        )
