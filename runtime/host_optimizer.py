"""Parameters whose gradients and optimizer state lie on the host: ZeRO-Offload (Ren et al., 2021, section 4).

Of this rank's piece of such a parameter the host has a master copy, which the user's optimizer steps there. A gradient
is copied down as soon as the backward has made it, and the device lets go of it; behind the step the parameter is
copied up. On CUDA host tensors are pinned, and copies down run on a stream of their own, beside the rest of the
backward; copies up are waited for by what comes next on the device. The host waits only before it reads or writes what
is copied: to clip, to step, to show gradients, and to take over parameters that somebody else has written to. The
optimizer of the other parameters is launched first, so that the device works while the host steps.

Where the device is the CPU the same happens within one memory: the numbers are the same, and nothing is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autopar.errors import RuntimeUseError
from autopar.offload import host_empty
from autopar.runtime.groups import Grid
from autopar.runtime.local_step import ELEMENTWISE
from autopar.runtime.step import local_of
from autopar.runtime.storage import rewrap

_ASTRAY = (
    "optimizer= has made an optimizer of other tensors than the parameters that it was given: of those whose state "
    "lies on the host it is given the copies there; make it of its argument alone, or plan with offload=False"
)


class HostOptimizer:
    """The masters of this rank, and what steps them.

    Attributes:
        masters: on the host, by the names of their parameters; tied ones under one name.
        optimizers: of the masters, made by the user's function.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], names: Collection[str], grid: Grid) -> None:
        """names: of the parameters, of those in `params`; what is frozen is left out."""
        self.grid, self.names = grid, frozenset(names)
        self.params: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self.optimizers: Sequence[Optimizer] = ()
        first: dict[int, str] = {}
        hosted = {id(params[name]) for name in names if name in params}
        for name, param in params.items():
            if id(param) in hosted and param.requires_grad:
                first.setdefault(id(param), name)
        self._own = {name: first[id(p)] for name, p in params.items() if id(p) in first}
        self._grads: dict[str, torch.Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        for name in first.values():
            self.params[name] = params[name]
            self.masters[name] = nn.Parameter(host_empty(local_of(params[name])))
            self._grads[name] = host_empty(local_of(params[name]))
        self._cuda = grid.device.type == "cuda" and bool(self.masters)
        self._down = torch.cuda.Stream(grid.device) if self._cuda else None
        self._up: Any = None
        self.follow()

    def holds(self, param: nn.Parameter) -> bool:
        """Whether it is one of the parameters that are stepped here."""
        return any(param is own for own in self.params.values())

    def twin(self, params: Mapping[str, nn.Parameter]) -> HostOptimizer:
        """The same for copies of the parameters, with no optimizers yet."""
        return HostOptimizer(params, self.names, self.grid)

    def make(
        self, recipe: Callable[[Iterable[nn.Parameter]], Any], others: Sequence[Optimizer] = ()
    ) -> list[Optimizer]:
        """What the user's function makes of the masters. others: what it has made of the other parameters.

        Raises:
            RuntimeUseError: it, or one of the others, steps tensors that it was not given, or it takes a piece for the
                whole of a parameter.
        """
        astray = [p for o in others for group in o.param_groups for p in group["params"] if self.holds(p)]
        if astray:
            raise RuntimeUseError(_ASTRAY)
        if not self.masters:
            return []
        made = recipe(list(self.masters.values()))
        optimizers = list(made) if isinstance(made, Iterable) else [made]
        ours = {id(m): name for name, m in self.masters.items()}
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise RuntimeUseError(
                    f"optimizer= has made {made!r}; return a torch.optim.Optimizer, or a list of those that this rank "
                    "needs"
                )
            for param in (p for group in optimizer.param_groups for p in group["params"]):
                if id(param) not in ours:
                    raise RuntimeUseError(_ASTRAY)
                whole = self.params[ours[id(param)]]
                cut = isinstance(whole, DTensor) and any(p.is_shard() for p in whole.placements)
                if cut and type(optimizer) not in ELEMENTWISE:
                    raise RuntimeUseError(
                        f"{type(optimizer).__name__} would step this rank's piece of {ours[id(param)]} on the host as "
                        "if it were the whole: only optimizers that work element by element "
                        f"({', '.join(sorted(c.__name__ for c in ELEMENTWISE))}) can do that; use one of them, or plan "
                        "with offload=False"
                    )
        if not optimizers:
            raise RuntimeUseError(
                f"optimizer= has made nothing of {len(ours)} parameters whose state lies on the host; return a "
                "torch.optim.Optimizer of them"
            )
        self.optimizers = optimizers
        return optimizers

    # ---- gradients ---------------------------------------------------------------------------------------------

    def take(self, name: str, grad: torch.Tensor) -> None:
        """Copy a gradient down; the caller may let go of it at once."""
        own = self._own.get(name)
        if own is None:  # frozen when the optimizers were made: nobody steps it
            return
        there, master = self._grads[own], self.masters[own]
        if master.grad is not None:
            raise RuntimeUseError(
                f"a second gradient of {name} arrives in one train_step; its optimizer state lies on the host, where "
                "gradients of one backward are taken only"
            )
        if self._down is None:
            there.copy_(grad)
        else:
            self._down.wait_stream(torch.cuda.current_stream(self.grid.device))
            with torch.cuda.stream(self._down):
                there.copy_(grad, non_blocking=True)
            grad.record_stream(self._down)
        master.grad = there

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those that have come, by name; laid out as their parameters."""
        self.wait()
        found = {name: m.grad for name, m in self.masters.items() if m.grad is not None}
        like = self.params
        return {n: rewrap(p)(g) if isinstance(p := like[n], DTensor) else g for n, g in found.items()}

    def forget(self) -> None:
        """Drop gradients; their memory is kept for the next ones, which come down behind them."""
        for master in self.masters.values():
            master.grad = None

    def wait(self) -> None:
        """Until all copies have arrived, in both directions: now the host may read and write."""
        if self._down is not None:
            self._down.synchronize()
        if self._up is not None:
            self._up.synchronize()

    # ---- a step ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Take over parameters that somebody else has written to, as load_state_dict does.

        What is written past torch's version counters (`param.data`) is not seen. If nobody has, nothing is waited for.
        """
        for name, param in self.params.items():
            if self._versions.get(name) != _version(param):
                self.wait()  # the master may still be on its way up
                with torch.no_grad():
                    self.masters[name].copy_(local_of(param))
                self._versions[name] = _version(param)

    def step(self) -> None:
        """Step the masters whose gradients have come, and copy them up."""
        if not self.masters:
            return
        self.wait()
        with torch.enable_grad():
            for optimizer in self.optimizers:
                optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                param = self.params[name]
                if master.grad is None:
                    continue
                local_of(param).copy_(master, non_blocking=True)
                if isinstance(param, DTensor):
                    increment_version(param)
                self._versions[name] = _version(param)
        if self._cuda:
            self._up = torch.cuda.Event()
            self._up.record(torch.cuda.current_stream(self.grid.device))

    def clip(self, others: Sequence[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale the gradients here and those of `others`, on the device, by the norm of all together; that norm.

        As torch.nn.utils.clip_grad_norm_ does it, the norm on the device in the dtype of the gradients. A collective
        call.
        """
        self.wait()
        there = [p.grad for p in others if p.grad is not None]
        parts = [self._norm(norm_type)]
        if there:
            norm = nn.utils.get_total_norm(there, norm_type)
            parts.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).to("cpu", torch.float64))
        total = torch.linalg.vector_norm(torch.stack(parts), norm_type)
        scale = float((max_norm / (total + 1e-6)).clamp(max=1.0))
        grads = [*there, *(m.grad for m in self.masters.values() if m.grad is not None)]
        for grad in grads:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            local.mul_(scale)
        dtype = functools.reduce(torch.promote_types, (g.dtype for g in grads)) if grads else torch.float32
        return total.to(self.grid.device, dtype)

    def _norm(self, norm_type: float) -> torch.Tensor:
        """The norm of the gradients here, of all ranks together: what several ranks have counts once."""
        at = self.grid.mesh.coordinates(self.grid.rank)
        found = [torch.zeros((), dtype=torch.float64)]
        for name, master in self.masters.items():
            param = self.params[name]
            places = param.placements if isinstance(param, DTensor) else ()
            if master.grad is not None and not any(at[a] for a, p in enumerate(places) if not p.is_shard()):
                found.append(torch.linalg.vector_norm(master.grad, norm_type).double())
        mine = torch.linalg.vector_norm(torch.stack(found), norm_type)
        if self.grid.control is None or self.grid.size == 1:
            return mine
        rows = [torch.zeros_like(mine) for _ in range(self.grid.size)]
        dist.all_gather(rows, mine, group=self.grid.control)
        return torch.linalg.vector_norm(torch.stack(rows), norm_type)

    @property
    def held(self) -> list[torch.Tensor]:
        """All tensors that lie on the host: masters, memory of gradients, and state of the optimizers."""
        state = [v for o in self.optimizers for s in o.state.values() for v in s.values()]
        return [*self.masters.values(), *self._grads.values(), *(v for v in state if isinstance(v, torch.Tensor))]

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(t.nbytes for t in self.held)


def _version(param: nn.Parameter) -> tuple[int, int]:
    """How often a parameter has been changed: as such, and as this rank's piece."""
    return param._version, local_of(param)._version


__all__ = ["HostOptimizer"]
