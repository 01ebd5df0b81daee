"""What happens when an optimizer steps our parameters: it is refused if it would be wrong, and quickened if it can be.

Torch runs an optimizer on DTensors op by op. Some read a norm as a Python number, which for a sharded tensor is the
norm of this rank's piece: wrong updates, without a word. Others use ops that DTensor refuses with an error from inside.
Both say so before their first step. What works element by element steps local pieces (`runtime/local_step.py`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from autopar.errors import RuntimeUseError
from autopar.runtime import adafactor
from autopar.runtime.local_step import ELEMENTWISE, eligible, step_pieces

_WHOLE = 'or keep the parameters whole (constraints={"*": "replicate"})'
#: Class -> why not, and what to do; for parameters that are sharded.
_REFUSED: dict[type[Optimizer], tuple[str, str]] = {
    torch.optim.Adafactor: ("takes norms of each rank's piece for norms of the parameter", f"use AdamW, {_WHOLE}"),
}
#: Classes whose fused form torch's DTensor does not know, sharded or not; and one whose masks it does not.
_NOT_FUSED = (torch.optim.SGD, torch.optim.Adagrad)
_MASKS = (torch.optim.Rprop,)
#: Those that are stepped here, on pieces, if they can be. Not their subclasses, which may do anything.
_OURS = ELEMENTWISE | {torch.optim.Adafactor}
#: By id: equal meshes of two lives of torch.distributed are two.
_meshes: weakref.WeakValueDictionary[int, DeviceMesh] = weakref.WeakValueDictionary()
_last: weakref.WeakKeyDictionary[Optimizer, RemovableHandle] = weakref.WeakKeyDictionary()
_hooked = False


def watch(mesh: DeviceMesh | None) -> None:
    """Look, from now on, at every optimizer that steps parameters on `mesh` (None: nothing is sharded)."""
    global _hooked
    if mesh is None:
        return
    _meshes[id(mesh)] = mesh
    if not _hooked:
        register_optimizer_step_pre_hook(_before)
        _hooked = True


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check; then have `_localise` run after the optimizer's own hooks, which may change gradients."""
    _check(optimizer)
    if type(optimizer) in _OURS:
        if optimizer in _last:
            _last.pop(optimizer).remove()
        if not torch.compiler.is_compiling():
            _last[optimizer] = optimizer.register_step_pre_hook(_localise)


def _localise(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Step local pieces, if that is the same; torch's own step then gets an optimizer with nothing left to do.

    A closure, which brings gradients, is called first, once, as these classes do. The arguments of a step begin with
    the optimizer itself; a torch where they do not is left alone.

    Raises:
        RuntimeUseError: the class can only step pieces, and parameters and state do not lie alike.
    """
    closure = args[1] if len(args) == 2 else kwargs.get("closure")
    plain = args[:1] == (optimizer,) and len(args) + len(kwargs) <= 2 and set(kwargs) <= {"closure"}
    if not any(_ours(p) for group in optimizer.param_groups for p in group["params"]):
        return None
    told: tuple[Any, ...] = ()
    if plain and closure is not None:
        with torch.enable_grad():
            loss = closure()
        told = (lambda: loss,)
    meshes = list(_meshes.values())
    if plain and eligible(optimizer, meshes):
        return (step_pieces(optimizer), *told), {}
    if plain and type(optimizer) is torch.optim.Adafactor and adafactor.eligible(optimizer, meshes):
        return (adafactor.step(optimizer), *told), {}
    _check_whole_step(optimizer)
    return ((optimizer, *told), {}) if told else None


def _check_whole_step(optimizer: Optimizer) -> None:
    """Before a step that goes over DTensors.

    Raises:
        RuntimeUseError: DTensor does not know the ops of that.
    """
    _check_norms(optimizer)
    masks = isinstance(optimizer, _MASKS)
    if not masks and not isinstance(optimizer, _NOT_FUSED):
        return
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not any(_ours(p) for p in group["params"]):
            continue
        if masks or group.get("fused"):
            what, remedy = ("", f"use AdamW, {_WHOLE}") if masks else ("(fused=True)", "leave out fused=True")
            raise RuntimeUseError(
                f"{name}{what} can step DTensor parameters only where parameters, gradients and state lie alike on one "
                f"mesh, without differentiable=True, and in a class that is torch's own; {remedy}"
            )


def _ours(param: torch.Tensor) -> bool:
    return isinstance(param, DTensor) and param.device_mesh in list(_meshes.values())


def _check(optimizer: Optimizer) -> None:
    """Before a step.

    Raises:
        RuntimeUseError: `optimizer` would give wrong numbers, or torch's error from inside; nothing has changed yet.
    """
    if type(optimizer) not in _OURS:
        _check_whole_step(optimizer)


def _check_norms(optimizer: Optimizer) -> None:
    """Raise RuntimeUseError where torch's own step would take norms of pieces for norms of parameters."""
    name = type(optimizer).__name__
    reason = next((why for cls, why in _REFUSED.items() if isinstance(optimizer, cls)), None)
    if reason is None:
        return
    for group in optimizer.param_groups:
        if any(p.is_shard() for tensor in group["params"] if _ours(tensor) for p in tensor.placements):
            raise RuntimeUseError(f"{name} cannot update sharded parameters: it {reason[0]}; {reason[1]}")
