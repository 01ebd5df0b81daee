"""This process's place in a pipeline: the ranks along the pipeline's axis, and the grid of its own stage.

The ranks of a mesh that differ only on the pipeline's axis are one *lane*: stages pass on to their neighbours of the
same lane. Those that differ only on the other axes are together one stage, with a grid of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from autopar.pipeline.plans import ALONE, inner_mesh
from autopar.runtime.groups import Grid
from autopar.runtime.transport import Transport, connect


@dataclass
class Lane:
    """The lane of this process.

    Attributes:
        grid: of the whole mesh. inner: of this stage's ranks. axis: of the mesh, along which the lane goes.
        rank, size: this process's place in the lane, and how long that is.
        group: the lane's process group; None in a process without torch.distributed.
        transport: what carries the executor's messages.
        shared: parameter that several stages of this lane have -> group of the ranks that have it.
        record: whether executors keep what ran when.
        rest: what empties the pipeline, if there may be micro-batches in flight (`hold`).
    """

    grid: Grid
    inner: Grid
    axis: str
    rank: int
    size: int
    group: dist.ProcessGroup | None
    transport: Transport | None
    shared: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    record: bool = False
    rest: Callable[[], None] | None = None
    _groups: dict[tuple[int, ...], dist.ProcessGroup | None] = field(default_factory=dict)

    def share(self, owners: Mapping[str, Collection[int]]) -> None:
        """Make the groups of parameters that several ranks of a lane have. `owners`: name -> places in the lane.

        A collective call of all ranks of the mesh.
        """
        for name, places in owners.items():
            key = tuple(sorted(set(places)))
            if len(key) < 2:
                continue
            if key not in self._groups:
                self._groups[key] = self._group(key)
            group = self._groups[key]
            if group is not None:
                self.shared[name] = group

    def _group(self, places: tuple[int, ...]) -> dist.ProcessGroup | None:
        mine = None
        limit = timedelta(seconds=self.grid.timeout)
        nccl = self.grid.device.type == "cuda" and not self.grid.staged
        for lane in _lanes(self.grid, self.axis):  # every process makes every group, in the same order
            ranks = [lane[place] for place in places]
            group = dist.new_group(ranks, timeout=limit, backend="nccl" if nccl else "gloo")
            if dist.get_rank() in ranks:
                mine = group
        return mine

    def hold(self, rest: Callable[[], None]) -> None:
        """Leave micro-batches in flight from now on, which `rest` brings to their end; those of others end before.

        One transport carries the messages of a module and of its copies, in order and without names.
        """
        if self.rest != rest:
            self.settle()
        self.rest = rest

    def settle(self) -> None:
        """Empty the pipeline, whoever has filled it. If something is in flight, a collective call."""
        rest, self.rest = self.rest, None
        if rest is not None:
            rest()

    def broadcast(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        """The tensor of the rank at place `owner`, on every rank of the lane. A collective call of the lane."""
        if self.group is None or self.size == 1:
            return tensor
        if owner == self.rank:
            there = (tensor.cpu() if self.grid.staged else tensor).contiguous()
        else:  # what the others pass only says what comes
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if self.grid.staged else tensor.device)
        # As bytes: every dtype travels, also those the backend does not know.
        dist.broadcast(there.reshape(-1).view(torch.uint8), group_src=owner, group=self.group)
        return there.to(tensor.device)


def _lanes(grid: Grid, axis: str) -> list[list[int]]:
    """Ranks of torch.distributed in every lane, in order."""
    lanes = grid.mesh.groups(grid.mesh.axis(axis))
    if grid.device_mesh is None:
        return lanes
    members = [int(r) for r in grid.device_mesh.mesh.flatten()]
    return [[members[r] for r in lane] for lane in lanes]


def lane_of(grid: Grid, axis: str) -> Lane:
    """The lane along `axis` of this process. A collective call of all ranks of the mesh."""
    mesh = inner_mesh(grid.mesh, axis)
    at = grid.mesh.axis(axis)
    rank, size = grid.mesh.coordinates(grid.rank)[at], grid.mesh.sizes[at]
    device_mesh = grid.device_mesh
    if device_mesh is None:
        return Lane(grid, replace(grid, mesh=mesh, rank=0), axis, rank, size, None, None)
    inner = replace(grid, mesh=ALONE, rank=0, group_names={}, device_mesh=None, control=None, board=None)
    if mesh is not ALONE:
        place = 0
        for n, c in zip(mesh.names, [c for a, c in enumerate(grid.mesh.coordinates(grid.rank)) if a != at]):
            place = place * mesh.sizes[mesh.axis(n)] + c
        names = {name: group for name, group in grid.group_names.items() if name != axis}
        control = None
        for ranks in _stages(grid, axis):
            group = dist.new_group(ranks, timeout=timedelta(seconds=grid.timeout), backend="gloo")
            if dist.get_rank() in ranks:
                control = group
        inner = replace(
            inner, mesh=mesh, rank=place, group_names=names, device_mesh=device_mesh[mesh.names], control=control
        )
    transport = connect(_lanes(grid, axis), grid.device, grid.timeout, grid.staged) if size > 1 else None
    return Lane(grid, inner, axis, rank, size, device_mesh.get_group(at), transport)


def _stages(grid: Grid, axis: str) -> list[list[int]]:
    """Ranks of torch.distributed in every stage, in order of the stage's own mesh."""
    return [list(ranks) for ranks in zip(*_lanes(grid, axis))]


__all__ = ["Lane", "lane_of"]
