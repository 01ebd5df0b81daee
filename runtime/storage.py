"""Parameters and buffers on this rank: made from rank 0's values, one at a time, and put back together.

Parameters are DTensors in the plan's placements (plain parameters in a single process without torch.distributed);
buffers are plain replicated tensors, on every rank alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from autopar.errors import PlanError, RuntimeUseError
from autopar.plan import Plan, storage_shards
from autopar.runtime.groups import Grid
from autopar.runtime.handshake import Control
from autopar.spec import P, Placement, R, S, Spec, format_spec, local_shape, shard, unshard

#: Gives the full tensor of a parameter or buffer that has no value: (name, shape, dtype) -> tensor. Called on rank 0.
Init = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers have shapes but no values (meta device); tied ones stay tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def placements(spec: Spec) -> list[Shard | Replicate]:
    """The DTensor placements of a storage or output spec.

    Raises:
        PlanError: a partial or strided placement, which no DTensor can say.
    """
    if not storage_shards(spec):
        names = [f"axis{i}" for i in range(len(spec))]
        text = format_spec(spec, 1 + max(p.dim for p in spec), names)
        raise PlanError(f"plan stores a tensor as {text}; only whole or contiguous shards can be stored")
    return [Shard(p.dim) if p.kind == "S" else Replicate() for p in spec]


def as_dtensor(local: torch.Tensor, shape: torch.Size | tuple[int, ...], spec: Spec, grid: Grid) -> torch.Tensor:
    """The DTensor of global `shape` of which `local` is this rank's piece; `local` itself without a DeviceMesh."""
    if grid.device_mesh is None:
        return local
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, grid.device_mesh, placements(spec), run_check=False, shape=torch.Size(shape), stride=stride
    )


def rewrap(like: DTensor) -> Callable[[torch.Tensor], DTensor]:
    """A function that makes a local piece a DTensor laid out as `like`."""
    mesh, placements, size, stride = like.device_mesh, like.placements, like.shape, like.stride()

    def wrap(piece: torch.Tensor) -> DTensor:
        if piece.storage_offset():
            # The DTensor would take over the offset without the memory: torch then fails to copy it (copy.deepcopy).
            piece = torch.from_dlpack(piece)
        return DTensor.from_local(piece, mesh, placements, run_check=False, shape=size, stride=stride)

    return wrap


def whole(value: DTensor, grid: Grid) -> torch.Tensor:
    """The full tensor of a DTensor on the mesh of `grid`; a collective call. Staged, it is gathered on the host."""
    if not grid.staged:
        return value.full_tensor()
    local = value.to_local().detach().cpu().contiguous()
    pieces = [torch.empty_like(local) for _ in range(grid.size)]
    # As bytes: every dtype travels, also those the backend does not know.
    flat = [piece.reshape(-1).view(torch.uint8) for piece in (*pieces, local)]
    dist.all_gather(flat[:-1], flat[-1], group=grid.control)
    spec = tuple(_placement(p) for p in value.placements)
    return unshard(pieces, tuple(value.shape), spec, grid.mesh.sizes).to(value.device)


def _placement(place: Any) -> Placement:
    if type(place) is Shard:
        return S(place.dim)
    if type(place) is Replicate:
        return R
    if type(place) is Partial and place.reduce_op in ("sum", "max", "min"):
        return P(place.reduce_op)
    raise RuntimeUseError(
        f"a DTensor placed as {place} cannot be gathered where ranks share a GPU; redistribute it to Replicate() first"
    )


def piece_of(full: torch.Tensor, spec: Spec, grid: Grid) -> torch.Tensor:
    """This rank's piece of a full tensor, on this rank's device; never the caller's own memory."""
    piece = shard(full.detach(), spec, grid.mesh.sizes, grid.mesh.coordinates(grid.rank))
    return piece.to(grid.device)


def scatter(full: torch.Tensor, like: DTensor, grid: Grid) -> DTensor:
    """A whole tensor, equal on every rank, in the placements of `like`; no communication."""
    local = full
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            dim: int = placement.dim  # type: ignore[attr-defined]
            size = grid.mesh.sizes[axis]
            local = local.chunk(size, dim)[grid.mesh.coordinates(grid.rank)[axis]]
    return DTensor.from_local(
        local.contiguous().to(grid.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


class Loader:
    """Brings rank 0's values to everybody, one tensor at a time.

    `missing` collects the names that have no value anywhere yet (meta device, no `init`).
    """

    def __init__(self, grid: Grid, control: Control, init: Init | None, local: Grid | None = None) -> None:
        """`local`: the grid on which tensors lie, if it is not that of all ranks: of one pipeline stage."""
        self.grid, self.control, self.init, self.local = grid, control, init, local or grid
        self.missing: set[str] = set()

    def load(self, name: str, value: torch.Tensor, spec: Spec) -> torch.Tensor:
        """This rank's piece of the tensor called `name`; a collective call. `value` is only read on rank 0.

        Raises:
            RuntimeUseError: `init` gave something else than asked for.
        """
        shape, dtype = tuple(value.shape), value.dtype
        (absent, *_), *_ = self.control.rows([int(value.is_meta)])
        if absent and self.init is None:
            self.missing.add(name)
            return torch.empty(local_shape(shape, spec, self.local.mesh.sizes), dtype=dtype, device=self.grid.device)
        full = value.detach()
        if absent:
            with self.control.together(f"init of {name}"):
                if self.grid.rank == 0:
                    full = self._made(name, shape, dtype)
        if self.grid.control is not None and self.grid.size > 1:
            full = self._broadcast(full, shape, dtype)
        return piece_of(full, spec, self.local)

    def _made(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        assert self.init is not None
        made: Any = self.init(name, shape, dtype)
        if not isinstance(made, torch.Tensor) or tuple(made.shape) != shape or made.dtype != dtype or made.is_meta:
            got = f"{made.dtype} {tuple(made.shape)} on {made.device}" if isinstance(made, torch.Tensor) else repr(made)
            raise RuntimeUseError(
                f"init({name!r}) must return a {dtype} tensor of shape {shape} with values, got {got}"
            )
        return made.detach()

    def _broadcast(self, full: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self.grid.rank == 0:
            full = full.cpu().contiguous()
        else:
            full = torch.empty(shape, dtype=dtype, device="cpu")
        # As bytes: every dtype travels, also those the backend does not know.
        dist.broadcast(full.reshape(-1).view(torch.uint8), group_src=0, group=self.grid.control)
        return full


def build_tree(root: nn.Module, model: nn.Module) -> dict[int, nn.Module]:
    """Give `root` the module names of `model` as plain empty modules; id of a module of `model` -> its shell."""
    shells: dict[int, nn.Module] = {id(model): root}
    root.training = model.training
    for module in model.modules():
        shell = shells.setdefault(id(module), nn.Module())
        shell.training = module.training
        for name, child in module.named_children():
            # Not add_module: a child of the root may be called like an attribute of ours ("plan").
            shell._modules[name] = shells.setdefault(id(child), nn.Module())
    return shells


def fill_tree(
    shells: dict[int, nn.Module],
    source: nn.Module,
    values: nn.Module,
    plan: Plan,
    loader: Loader,
    elsewhere: frozenset[str] = frozenset(),
) -> None:
    """Register sharded parameters and replicated buffers in the shells. Collective.

    Args:
        shells: from `build_tree(root, source)`.
        source: the skeleton, whose modules `shells` is keyed by.
        values: the user's model, of the same structure, which has the values on rank 0.
        elsewhere: names of what other pipeline stages have: not registered here.
    """
    have: dict[str, torch.Tensor] = dict(values.named_parameters(remove_duplicate=False))
    have.update(values.named_buffers(remove_duplicate=False))
    names: dict[int, list[str]] = {}  # id of the skeleton's parameter -> all its names
    for name, parameter in source.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    made: dict[int, Any] = {}  # id of the skeleton's tensor -> ours, so that tied ones stay one object
    whole = plan.stored("").spec
    for prefix, module in source.named_modules():
        shell = shells[id(module)]
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            if id(parameter) not in made:
                # Under any of the names of a tied parameter.
                spec = plan.stored(next((n for n in names[id(parameter)] if n in plan.storage), path)).spec
                local = as_dtensor(loader.load(path, have[path], spec), parameter.shape, spec, loader.local)
                made[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)
                if path in elsewhere:
                    loader.missing.discard(path)
                    made[id(parameter)] = None
            if made[id(parameter)] is not None:
                shell._parameters[name] = made[id(parameter)]
        persistent = module.state_dict(keep_vars=True)
        for name, buffer in module.named_buffers(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            if id(buffer) not in made:
                made[id(buffer)] = loader.load(path, have[path], whole)
            if path in elsewhere:
                loader.missing.discard(path)
                continue
            # Not register_buffer: a buffer of the root may be called like an attribute of ours.
            shell._buffers[name] = made[id(buffer)]
            if name not in persistent:
                shell._non_persistent_buffers_set.add(name)


def same_fields(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], str, bool]]:
    """What must agree between ranks: (kind, name, shape, dtype, requires grad) of every parameter and buffer."""

    def fields(kind: str, pairs: Iterator[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        return ((kind, n, tuple(t.shape), str(t.dtype), t.requires_grad) for n, t in pairs)

    named = model.named_parameters(remove_duplicate=False)
    return [*fields("parameter", named), *fields("buffer", model.named_buffers(remove_duplicate=False))]


def first_difference(ours: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]]) -> str:
    """In words: the first entry of two `same_fields` lists that differs."""
    for a, b in zip(ours, theirs):
        if a != b:
            return (
                f"{a[0]} {a[1]} {a[2]} {a[3]} there, {b[0]} {b[1]} {b[2]} {b[3]} here"
                if a[:4] != b[:4]
                else (f"{a[0]} {a[1]} {'needs' if a[4] else 'needs no'} gradient there, unlike here")
            )
    return f"{len(ours)} tensors there, {len(theirs)} here"
