"""Adafactor on sharded parameters: each rank steps its piece, with norms and means of the whole parameter.

Torch's own step reads norms as Python numbers, which of a DTensor are those of the piece. This is the same update
(torch.optim.Adafactor; Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
algorithms 4 and 5) on local tensors, the sums that run over a split dim completed over the ranks that hold it. State
is DTensors: the row factor is split as the parameter but for its last dim, the column factor but for its last but one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.optimizer import Optimizer


def eligible(optimizer: Optimizer, meshes: Collection[DeviceMesh]) -> bool:
    """Whether `step` may take over: parameters with gradients are real DTensors on `meshes` in equal pieces, with
    gradients, and state of an earlier step, laid out as `step` does."""
    trained = list(_trained(optimizer))
    for param in trained:
        if not isinstance(param, DTensor):
            return False
        pieces = 1
        for axis, placement in enumerate(param.placements):
            pieces *= param.device_mesh.size(axis) if isinstance(placement, Shard) else 1
        even = param.to_local().numel() * pieces == param.numel()
        if param.device_mesh not in meshes or not even or param.is_complex():
            return False
        known = all(isinstance(p, (Shard, Replicate)) for p in param.placements)
        if not known or not _lies(param.grad, param, param.placements):
            return False
        state = optimizer.state.get(param, {})
        if state and not all(_lies(state[k], param, p) for k, p in _places(param).items()):
            return False
    return 0 < len(trained) == len(set(trained))


def step(optimizer: Optimizer) -> Optimizer:
    """One step of an `eligible` optimizer. What is given back has nothing left to step. A collective call."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(vars(optimizer))
    twin.param_groups = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            pieces = [_Piece.of(optimizer, p, group) for p in group["params"] if p.grad is not None]
            _update(pieces, group)
    return twin


def _update(pieces: Sequence[_Piece], group: dict[str, Any]) -> None:
    lr, (_, eps2) = float(group["lr"]), group["eps"]
    # Before weight decay, as torch has it.
    norms = _sums([(x.param.double().square().sum(), x.cut()) for x in pieces])
    factored = [x for x in pieces if x.param.dim() > 1]
    rows = _sums([(x.squares(-1), x.cut(-1)) for x in factored])
    columns = _sums([(x.squares(-2), x.cut(-2)) for x in factored])
    for x, row, column in zip(factored, rows, columns):
        weight = float(x.state["step"] + 1) ** group["beta2_decay"]
        x.local("row_var").lerp_((row / x.whole[-1]).to(x.grad.dtype), weight)
        x.local("col_var").lerp_((column / x.whole[-2]).to(x.grad.dtype), weight)
    means = dict(
        zip(map(id, factored), _sums([(x.local("row_var").sum(-2, keepdim=True), x.cut(-2)) for x in factored]))
    )
    for x, norm in zip(pieces, norms):
        x.state["step"] += 1
        count = float(x.state["step"])
        rho = min(lr, 1 / count**0.5)
        alpha = max(eps2, (norm.item() / x.numel) ** 0.5) * rho
        eps1 = group["eps"][0] if group["eps"][0] is not None else torch.finfo(x.param.dtype).eps
        if group["weight_decay"] != 0:
            x.param.mul_(1 - lr * group["weight_decay"])
        if id(x) in means:
            estimate = x.local("row_var") @ x.local("col_var")
            estimate.div_((means[id(x)] / x.whole[-2]).clamp_(min=eps1))
        else:
            x.local("variance").lerp_(x.grad * x.grad, count ** group["beta2_decay"])
            estimate = x.local("variance").clone()
        update = estimate.clamp_(min=eps1 * eps1).rsqrt_().mul_(x.grad)
        (square,) = _sums([(update.double().square().sum(), x.cut())])
        denominator = max(1.0, (square.item() / x.numel) ** 0.5 / group["d"])
        x.param.add_(update, alpha=-alpha / denominator)
        increment_version(x.owner)


@dataclass(eq=False)
class _Piece:
    """A parameter's piece on this rank, its gradient (of the sign that is descended) and state."""

    owner: DTensor
    param: torch.Tensor
    grad: torch.Tensor
    state: dict[str, Any]

    @classmethod
    def of(cls, optimizer: Optimizer, owner: DTensor, group: dict[str, Any]) -> _Piece:
        assert isinstance(owner.grad, DTensor)
        grad = owner.grad.to_local()
        state = optimizer.state[owner]
        if not state:
            wide = torch.get_default_dtype() == torch.float64
            state["step"] = torch.tensor(0.0, dtype=torch.float64 if wide else torch.float32)
            for key, placements in _places(owner).items():
                state[key] = _zeros(grad, owner, key, placements)
        return cls(owner, owner.to_local(), -grad if group["maximize"] else grad, state)

    @property
    def whole(self) -> torch.Size:
        return self.owner.shape

    @property
    def numel(self) -> int:
        return self.owner.numel()

    def local(self, key: str) -> torch.Tensor:
        """This rank's piece of a tensor of state."""
        piece: torch.Tensor = self.state[key].to_local()
        return piece

    def squares(self, dim: int) -> torch.Tensor:
        """Sums of squares of the gradient along a dim, of what this rank has."""
        wide = self.grad.dtype if self.grad.dtype.itemsize >= 4 else torch.float32
        return torch.linalg.vector_norm(self.grad, dim=dim, keepdim=True, dtype=wide).square_()

    def cut(self, dim: int | None = None) -> tuple[dist.ProcessGroup, ...]:
        """Groups of the ranks among which the parameter, or one of its dims, is divided."""
        mesh, at = self.owner.device_mesh, None if dim is None else dim % self.param.dim()
        return tuple(
            mesh.get_group(axis)
            for axis, p in enumerate(self.owner.placements)
            if isinstance(p, Shard) and at in (None, p.dim) and mesh.size(axis) > 1
        )


def _places(param: DTensor) -> dict[str, tuple[Any, ...]]:
    """Where the tensors of state lie."""
    if param.dim() < 2:
        return {"variance": tuple(param.placements)}
    gone = {"row_var": param.dim() - 1, "col_var": param.dim() - 2}
    return {
        key: tuple(Replicate() if isinstance(p, Shard) and p.dim == dim else p for p in param.placements)
        for key, dim in gone.items()
    }


def _shape(shape: Sequence[int], key: str) -> tuple[int, ...]:
    """Shape of a tensor of state beside a parameter, or a piece of it, of `shape`."""
    dim = {"row_var": len(shape) - 1, "col_var": len(shape) - 2}.get(key)
    return tuple(1 if at == dim else n for at, n in enumerate(shape))


def _zeros(grad: torch.Tensor, owner: DTensor, key: str, placements: Sequence[Any]) -> DTensor:
    shape = _shape(owner.shape, key)
    stride = torch.empty(shape, device="meta").stride()
    piece = grad.new_zeros(_shape(grad.shape, key))
    return DTensor.from_local(
        piece, owner.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _lies(value: Any, param: DTensor, placements: Sequence[Any]) -> bool:
    """Whether it is a DTensor on the parameter's mesh, placed so."""
    own = isinstance(value, DTensor) and value.device_mesh == param.device_mesh
    return own and tuple(value.placements) == tuple(placements)


def _trained(optimizer: Optimizer) -> Iterable[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


def _sums(parts: Sequence[tuple[torch.Tensor, tuple[dist.ProcessGroup, ...]]]) -> list[torch.Tensor]:
    """Sums of tensors over the ranks of their groups, those of the same groups in one message."""
    together: dict[tuple[Any, ...], list[int]] = {}
    for at, (part, groups) in enumerate(parts):
        together.setdefault((groups, part.dtype, part.device), []).append(at)
    out = [part for part, _ in parts]
    for (groups, *_), members in together.items():
        if not groups:
            continue
        flat = torch.cat([out[at].reshape(-1) for at in members])
        home = flat.device
        for group in groups:
            # Ranks that share a GPU speak through host memory.
            flat = flat.cpu() if dist.get_backend(group) == "gloo" else flat.to(home)
            dist.all_reduce(flat, group=group)
        pieces = flat.to(home).split([out[at].numel() for at in members])
        for at, piece in zip(members, pieces):
            out[at] = piece.view(out[at].shape)
    return out


__all__ = ["eligible", "step"]
