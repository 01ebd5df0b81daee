"""Optimizers that work element by element step this rank's pieces, not DTensors.

Torch dispatches every op of an optimizer on every DTensor in Python: dozens of microseconds each, some fifty times a
parameter. Where an update of an element depends on that element alone, the same step on the local pieces gives the same
numbers. So, before such a step, a stand-in of the optimizer is made whose parameters, gradients and state are the local
tensors (no copies), and the step runs on that; afterwards, state that is new is wrapped, so that `state_dict()` and
checkpoints see DTensors as ever. Nothing of the user's optimizer changes before the step has succeeded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from autopar.runtime.storage import rewrap

#: Classes of torch whose step is element by element. Not their subclasses, which may do anything.
ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.AdamW,
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.SGD,
    }
)
#: State that is one number for a parameter, whatever the parameter's shape.
_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})


def eligible(optimizer: Optimizer, meshes: Collection[DeviceMesh]) -> bool:
    """Whether its step may run on local pieces: of a known class, on parameters and gradients laid out alike."""
    if type(optimizer) not in ELEMENTWISE or optimizer.defaults.get("differentiable"):
        return False
    cut = False
    for param in _parameters(optimizer):
        if isinstance(param, DTensor):
            grad, cut = param.grad, True
            if param.device_mesh not in meshes or any(p.is_partial() for p in param.placements):
                return False
            if grad is not None and not (isinstance(grad, DTensor) and grad.placements == param.placements):
                return False
    return cut


@torch.no_grad()
def stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same class and options over the local tensors of `optimizer`, which is not changed."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    twin.state, twin.param_groups = defaultdict(dict), []
    for group in optimizer.param_groups:
        pieces = []
        for param in group["params"]:
            piece = param
            if isinstance(param, DTensor):
                piece = param.to_local().detach()
                piece.grad = None if param.grad is None else param.grad.to_local()
            if param in optimizer.state:
                twin.state[piece] = {k: _local(v) for k, v in optimizer.state[param].items()}
            pieces.append(piece)
        twin.param_groups.append({**group, "params": pieces})
    return twin


@torch.no_grad()
def take_over(optimizer: Optimizer, twin: Optimizer) -> None:
    """After a step of `twin`: its new state goes to `optimizer`, and autograd hears that parameters have changed."""
    for param, piece in zip(_parameters(optimizer), _parameters(twin)):
        entry = twin.state.get(piece)
        if entry is None:
            continue
        known = optimizer.state[param]
        for key, value in entry.items():
            if key not in known or _local(known[key]) is not value:
                cut = isinstance(param, DTensor) and isinstance(value, torch.Tensor) and key not in _NUMBERS
                known[key] = rewrap(param)(value) if cut else value
        if isinstance(param, DTensor) and piece.grad is not None:
            increment_version(param)


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


__all__ = ["ELEMENTWISE", "eligible", "stand_in", "take_over"]
