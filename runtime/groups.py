"""This process's place in the mesh: its rank, its coordinates, and the process groups of every axis.

A `Grid` is what the rest of the runtime and the binding of local graphs need to know about the machine. A mesh of one
in a process without torch.distributed has no groups at all, and everything else treats it like any other.
"""

from __future__ import annotations

import atexit
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import MeshError, RankMismatchError, RuntimeUseError
from autopar.mesh import Mesh
from autopar.runtime.board import Board, share
from autopar.runtime.heap import keep_freed

#: What `connect` takes for a mesh.
MeshLike = Mesh | DeviceMesh | str | int


@dataclass(frozen=True)
class Grid:
    """One process's view of the mesh.

    Attributes:
        mesh: the mesh as plain data.
        rank: row-major index of this process in the mesh.
        device: where its shards live.
        group_names: mesh axis -> name of the process group along it, for functional collectives; empty without groups.
        device_mesh: the DeviceMesh of the DTensors; None in a single process without torch.distributed.
        control: gloo group of all ranks of the mesh, for small messages on the host; None without groups.
        board: where ranks that are all on one machine read each other's small messages; None if they are not.
        timeout: seconds after which a rank stops waiting for the others.
        staged: collectives on the mesh go through host memory, for NCCL is not to be had: ranks share a GPU.
    """

    mesh: Mesh
    rank: int
    device: torch.device
    group_names: Mapping[str, str] = field(default_factory=dict)
    device_mesh: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    board: Board | None = None
    timeout: float = 300.0
    staged: bool = False

    @property
    def coordinates(self) -> dict[str, int]:
        """Mesh axis -> coordinate of this process."""
        return dict(zip(self.mesh.names, self.mesh.coordinates(self.rank)))

    @property
    def size(self) -> int:
        return self.mesh.num_devices


_grids: dict[tuple[Any, ...], tuple[Any, Grid]] = {}


def as_mesh(mesh: MeshLike) -> Mesh:
    """The plain mesh of a text, an int, or a torch DeviceMesh (unnamed dims are called dim0, dim1, ...).

    Raises:
        MeshError: it cannot be read, or is something else.
    """
    if isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names or tuple(f"dim{i}" for i in range(mesh.ndim))
        return Mesh(tuple(names), tuple(int(n) for n in mesh.mesh.shape))
    if isinstance(mesh, bool) or not isinstance(mesh, (Mesh, str, int)):
        raise MeshError(f'cannot read mesh {mesh!r}; pass "dp=2,tp=4", an int, an autopar.Mesh or a torch DeviceMesh')
    return Mesh.parse(mesh)


def connect(mesh: MeshLike, device: torch.device, timeout: float = 300.0) -> Grid:
    """Find this process's place in `mesh`, initialising torch.distributed from torchrun's variables if need be.

    The groups of one mesh are made once and shared by every module compiled for it.

    Raises:
        MeshError: the mesh does not match the processes that run; on every rank, without communication.
    """
    plain = as_mesh(mesh)
    count = running()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed()
    if not isinstance(mesh, DeviceMesh) and plain.num_devices != count:
        are = "is" if count == 1 else "are"
        raise MeshError(
            f"mesh {plain} needs {plain.num_devices} process{'es' * (plain.num_devices > 1)}, {count} {are} running; "
            f"start with torchrun --nproc-per-node {plain.num_devices}, or use a mesh of {count}"
        )
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return Grid(plain, 0, device, timeout=timeout)
        _initialise(device, timeout)
    key = (plain, device, timeout, id(mesh) if isinstance(mesh, DeviceMesh) else None)
    world, grid = _grids.get(key, (None, None))
    if grid is None or world is not dist.group.WORLD:
        try:
            if isinstance(mesh, DeviceMesh):
                grid = _adopt(mesh, plain, device, timeout)
            else:
                grid = _make(plain, device, timeout)
        except RuntimeError as error:
            raise MeshError(
                f"the processes of mesh {plain} could not connect within {timeout:g} s: every one of them has to call "
                f"autopar.compile ({str(error).splitlines()[0]})"
            ) from error
        _grids[key] = (dist.group.WORLD, grid)
    return grid


def default_device(mesh: MeshLike, model: torch.nn.Module) -> torch.device:
    """Where the shards should live: the mesh's device type, else the process group's, else the model's own device.

    Raises:
        RuntimeUseError: autopar does not run there, or it is not there; on every rank, without communication.
    """
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if isinstance(mesh, DeviceMesh):
        kind = mesh.device_type
    elif dist.is_initialized() and "nccl" in str(dist.get_backend()):
        kind = "cuda"
    elif kind == "meta":
        kind = "cuda" if torch.cuda.is_available() and "RANK" in os.environ else "cpu"
    if kind not in ("cpu", "cuda"):
        raise RuntimeUseError(
            f"a module on {kind!r} devices is asked for; autopar runs on CPU and CUDA devices: use model.cpu() or "
            "model.cuda() first"
        )
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise RuntimeUseError(
            f"a module on CUDA devices is asked for (by the mesh, the process group or the model), but this torch "
            f"{built}; keep the model on the CPU, or install a torch with CUDA where there is a GPU"
        )
    if "LOCAL_RANK" in os.environ:  # more ranks than GPUs share them
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    own = next((p.device.index for p in model.parameters() if p.device.type == "cuda"), None)
    return torch.device("cuda", torch.cuda.current_device() if own is None else own)


def running() -> int:
    """Number of processes in torch.distributed, or that torchrun has started; 1 in a plain process."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def _initialise(device: torch.device, timeout: float) -> None:
    alone = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if alone and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    atexit.register(_finish)


def _finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _make(plain: Mesh, device: torch.device, timeout: float) -> Grid:
    rank, limit = dist.get_rank(), timedelta(seconds=timeout)
    control = dist.new_group(list(range(plain.num_devices)), timeout=limit, backend="gloo")
    staged = _must_stage(device, control)
    backend = "nccl" if device.type == "cuda" and not staged else "gloo"
    own = []
    for axis in range(len(plain.sizes)):
        mine = None
        for ranks in plain.groups(axis):  # every process makes every group, in the same order
            group = dist.new_group(ranks, timeout=limit, backend=backend)
            if rank in ranks:
                mine = group
        assert mine is not None
        own.append(mine)
    ranks_of = torch.arange(math.prod(plain.sizes)).reshape(plain.sizes)
    groups: Any = own[0] if len(own) == 1 else own
    device_mesh = DeviceMesh.from_group(groups, device.type, mesh=ranks_of, mesh_dim_names=plain.names)
    names = {name: group.group_name for name, group in zip(plain.names, own)}
    board = share(control, timeout)
    return Grid(plain, rank, device, names, device_mesh, control, board, timeout, staged)


def _must_stage(device: torch.device, control: dist.ProcessGroup) -> bool:
    """Whether collectives must go through host memory; the same on every rank of `control`. A collective call.

    Raises:
        RankMismatchError: the ranks are on different kinds of device; on every rank.
    """
    cuda = device.type == "cuda"
    found: list[Any] = [None] * control.size()
    own = (device.type, str(torch.cuda.get_device_properties(device).uuid) if cuda else "")
    dist.all_gather_object(found, own, group=control)
    kinds = {kind for kind, _ in found}
    if len(kinds) > 1:
        raise RankMismatchError(
            f"the ranks are on different kinds of device ({', '.join(sorted(kinds))}); put the model on the same kind "
            "on every rank"
        )
    if not cuda:
        return False
    shared = len(set(found)) < len(found)
    if dist.is_nccl_available() and not shared:
        return False
    if dist.get_rank(control) == 0:
        why = f"{len(found)} ranks share {len(set(found))} GPU(s), which NCCL refuses" if shared else "there is no NCCL"
        warnings.warn(
            f"{why}: collectives go through host memory (gloo), which is right but slow. For speed, start one process "
            "for each GPU",
            stacklevel=2,
        )
    return True


def _adopt(device_mesh: DeviceMesh, plain: Mesh, device: torch.device, timeout: float) -> Grid:
    coordinate = device_mesh.get_coordinate()
    members = [int(r) for r in device_mesh.mesh.flatten()]
    if coordinate is None:
        raise MeshError(f"rank {dist.get_rank()} is not in the DeviceMesh {plain}, whose ranks are {members}")
    rank = 0
    for at, size in zip(coordinate, plain.sizes):
        rank = rank * size + int(at)
    control = dist.new_group(
        members, timeout=timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True
    )
    groups = [device_mesh.get_group(axis) for axis in range(len(plain.names))]
    names = {name: group.group_name for name, group in zip(plain.names, groups)}
    nccl = any("nccl" in str(dist.get_backend(group)) for group in groups)
    staged = _must_stage(device, control) or (device.type == "cuda" and not nccl)
    if staged and nccl:
        raise MeshError(
            f"the DeviceMesh {plain} has NCCL groups, but its ranks share GPUs, which NCCL refuses; initialise "
            'torch.distributed with "gloo", or pass the mesh as text, such as "dp=2"'
        )
    board = share(control, timeout)
    return Grid(plain, rank, device, names, device_mesh, control, board, timeout, staged)
