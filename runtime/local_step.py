"""Optimizers that work element by element step this rank's pieces, not DTensors.

Torch dispatches every op of an optimizer on every DTensor in Python. Where an update of an element depends on that
element alone, the same step on the local pieces gives the same numbers. So, before such a step, a stand-in of the
optimizer is made whose parameters, gradients and state are the local tensors (no copies), and the step runs on that;
then state that is new is wrapped, so that `state_dict()`, checkpoints and hooks see DTensors as ever.
"""

from __future__ import annotations

import inspect
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
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)
#: State that is one number for a parameter, whatever the parameter's shape.
_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})


def eligible(optimizer: Optimizer, meshes: Collection[DeviceMesh]) -> bool:
    """Whether its step may run on local pieces: of a known class; parameters, gradients and state laid out alike."""
    if type(optimizer) not in ELEMENTWISE or optimizer.defaults.get("differentiable"):
        return False
    cut = False
    for param in _parameters(optimizer):
        if isinstance(param, DTensor):
            cut = True
            if param.device_mesh not in meshes or any(p.is_partial() for p in param.placements):
                return False
            if param.grad is not None and not _alike(param.grad, param):
                return False
            state = optimizer.state.get(param, {})
            if not all(k in _NUMBERS or _alike(v, param) for k, v in state.items() if isinstance(v, torch.Tensor)):
                return False  # of another plan, say: torch brings it over, op by op
    return cut


def _alike(value: torch.Tensor, param: DTensor) -> bool:
    """Whether the local pieces of both are the same part of the whole."""
    if not isinstance(value, DTensor):
        return value.shape == param.shape and all(p.is_replicate() for p in param.placements)
    same = value.placements == param.placements and value.shape == param.shape
    return same and value.device_mesh == param.device_mesh


def step_pieces(optimizer: Optimizer) -> Optimizer:
    """Step an `eligible` optimizer on its local pieces. What is given back has nothing left to step."""
    twin = _stand_in(optimizer)
    try:
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(twin)
    finally:
        _take_over(optimizer, twin)
    twin.param_groups = []
    return twin


@torch.no_grad()
def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer of the same class and options over the local tensors of `optimizer`, which is not changed."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    twin.state, twin.param_groups = defaultdict(dict), []
    pieces: dict[torch.Tensor, torch.Tensor] = {}  # a parameter may be listed twice
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in pieces:
                pieces[param] = piece = _piece(param) if isinstance(param, DTensor) else param
                if param in optimizer.state:
                    twin.state[piece] = {k: _local(v) for k, v in optimizer.state[param].items()}
        twin.param_groups.append({**group, "params": [pieces[p] for p in group["params"]]})
    return twin


def _piece(param: DTensor) -> torch.Tensor:
    piece = param.to_local().detach()
    if param.grad is not None:
        if param.grad.dtype != piece.dtype:
            piece.grad_dtype = None
        piece.grad = _local(param.grad)
    return piece


@torch.no_grad()
def _take_over(optimizer: Optimizer, twin: Optimizer) -> None:
    """After a step of `twin`: its new state goes to `optimizer`, and autograd hears that parameters have changed."""
    for param, piece in zip(_parameters(optimizer), _parameters(twin)):
        if isinstance(param, DTensor) and piece.grad is not None:
            increment_version(param)
        for key, value in twin.state.get(piece, {}).items():
            known = optimizer.state[param]
            if key not in known or _local(known[key]) is not value:
                if isinstance(param, DTensor) and isinstance(value, torch.Tensor) and key not in _NUMBERS:
                    value = rewrap(param)(value)
                known[key] = value


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


__all__ = ["ELEMENTWISE", "eligible", "step_pieces"]
