"""Run a symbolic local graph for every rank of a mesh in one process, node by node, emulating the collectives.

For tests and for `autopar verify` of plans bigger than the machine: no process group, exact, and deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from autopar.errors import PassError
from autopar.mesh import Mesh
from autopar.passes import collectives as c
from autopar.passes.edit import symbolic_args


def run(gm: fx.GraphModule, mesh: Mesh, inputs: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Outputs of every rank, given every rank's placeholders in order.

    Raises:
        PassError: the number of ranks or of inputs does not fit, or a node fails; names it.
    """
    ranks = range(mesh.num_devices)
    if len(inputs) != mesh.num_devices:
        raise PassError(f"lockstep run got inputs for {len(inputs)} ranks; mesh {mesh} has {mesh.num_devices}")
    envs: list[dict[fx.Node, Any]] = [{} for _ in ranks]
    feeds = [iter(row) for row in inputs]
    last_use = _last_uses(gm.graph)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            for r in ranks:
                envs[r][node] = next(feeds[r])
        elif node.op == "get_attr":
            for r in ranks:
                envs[r][node] = getattr(gm, str(node.target))
        elif node.op == "output":
            return [fx.map_arg(node.args[0], envs[r].__getitem__) for r in ranks]
        else:
            try:
                found = _call(node, mesh, envs)
            except Exception as error:
                raise PassError(f"lockstep run failed at {node.format_node()}: {error}") from error
            for r in ranks:
                envs[r][node] = found[r]
        for dead in last_use.get(node, ()):
            for r in ranks:
                envs[r].pop(dead, None)
    raise PassError("lockstep run: the graph has no output node")


def _call(node: fx.Node, mesh: Mesh, envs: Sequence[dict[fx.Node, Any]]) -> list[Any]:
    if node.target not in c.SYMBOLIC:
        values: Any = [fx.map_arg((node.args, node.kwargs), env.__getitem__) for env in envs]
        return [node.target(*args, **kwargs) for args, kwargs in values]  # type: ignore[operator]
    rows = [fx.map_arg(symbolic_args(node), env.__getitem__) for env in envs]
    if node.target is c.coordinate:
        axis = mesh.axis(rows[0][0])
        return [mesh.coordinates(r)[axis] for r in range(mesh.num_devices)]
    axis = mesh.axis(rows[0][1])
    out: list[Any] = [None] * mesh.num_devices
    for group in mesh.groups(axis):
        pieces = [rows[r][0].contiguous() for r in group]
        shapes = {(tuple(p.shape), p.dtype) for p in pieces}
        if len(shapes) != 1:
            raise PassError(f"ranks {group} bring different shapes: {sorted(map(str, shapes))}")
        for r, piece in zip(group, emulate(node.target, pieces, rows[group[0]][2:])):
            out[r] = piece
    return out


def emulate(target: Any, pieces: Sequence[torch.Tensor], args: Sequence[Any]) -> list[torch.Tensor]:
    """What each member of one group gets from a symbolic collective, given each member's operand and (parts, ...)."""
    parts = args[0]
    if parts != len(pieces):
        raise PassError(f"collective says {parts} parts, the axis has {len(pieces)}")
    if target is c.local_chunk:
        return [_chunk(p, parts, args[1], i) for i, p in enumerate(pieces)]
    if target is c.all_gather:
        return [torch.cat(list(pieces), dim=args[1]) for _ in pieces]
    if target is c.all_reduce:
        return [_reduce(pieces, args[1]).clone() for _ in pieces]
    if target is c.reduce_scatter:
        whole = _reduce(pieces, args[2])
        return [_chunk(whole, parts, args[1], i) for i in range(parts)]
    split, cat = args[1], args[2]
    return [torch.cat([_chunk(p, parts, split, i) for p in pieces], dim=cat) for i in range(parts)]


def _chunk(x: torch.Tensor, parts: int, dim: int, index: int) -> torch.Tensor:
    if x.shape[dim] % parts:
        raise PassError(f"dim {dim} of {tuple(x.shape)} cannot be split into {parts}")
    size = x.shape[dim] // parts
    return x.narrow(dim, index * size, size).contiguous()


def _reduce(pieces: Sequence[torch.Tensor], reduce: str) -> torch.Tensor:
    op: Any = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[reduce]
    return functools.reduce(op, pieces)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    out: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                out.setdefault(node, []).append(used)
    return out
