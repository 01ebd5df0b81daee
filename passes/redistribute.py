"""Emit the steps of `autopar.reshard` into a local graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from autopar.mesh import Mesh
from autopar.passes import collectives as c
from autopar.reshard import Step, steps
from autopar.spec import Spec

aten = torch.ops.aten


def redistribute(graph: fx.Graph, x: fx.Node, shape: Sequence[int], src: Spec, dst: Spec, mesh: Mesh) -> fx.Node:
    """Append what takes local `x`, a piece of a tensor of global `shape`, from `src` to `dst`.

    Raises:
        SpecError: as `autopar.reshard.steps`.
    """
    for step in steps(tuple(shape), src, dst, mesh.sizes):
        x = _emit(graph, x, step, mesh)
    return x


def _emit(graph: fx.Graph, x: fx.Node, step: Step, mesh: Mesh) -> fx.Node:
    axis, parts = mesh.names[step.axis], mesh.sizes[step.axis]
    # A strided cut sees its dim as (outer, rest): make the two visible, then the collective works on plain dims.
    shape: list[int] = []
    at: dict[str, int] = {}
    for dim, n in enumerate(step.before):
        outer = {step.split: step.split_outer, step.cat: step.cat_outer}.get(dim, 1)
        if outer != 1:
            shape.append(outer)
            n //= outer
        if dim == step.split:
            at["split"] = len(shape)
        if dim == step.cat:
            at["cat"] = len(shape)
        shape.append(n)
    x = _reshape(graph, x, shape)
    if step.kind == "local_chunk":
        x = c.emit(graph, c.local_chunk, x, axis, parts, at["split"])
    elif step.kind == "all_gather":
        x = c.emit(graph, c.all_gather, x, axis, parts, at["cat"])
    elif step.kind == "all_reduce":
        x = c.emit(graph, c.all_reduce, x, axis, parts, step.reduce)
    elif step.kind == "reduce_scatter":
        x = c.emit(graph, c.reduce_scatter, x, axis, parts, at["split"], step.reduce)
    else:
        x = c.emit(graph, c.all_to_all, x, axis, parts, at["split"], at["cat"])
    return _reshape(graph, x, step.after)


def _reshape(graph: fx.Graph, x: fx.Node, shape: Sequence[int]) -> fx.Node:
    if tuple(x.meta["val"].shape) == tuple(shape):
        return x
    node = graph.call_function(aten.reshape.default, (x, list(shape)))
    node.meta.update({k: v for k, v in x.meta.items() if k in ("phase", "module")})
    node.meta["val"] = torch.empty(tuple(shape), dtype=x.meta["val"].dtype, device="meta")
    return node
