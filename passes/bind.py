"""Bind the symbolic local graph to one rank: constants for coordinates, functional collectives for symbolic ones.

What each symbolic node becomes (`c` is the rank's coordinate, `n` the size of the axis):

    coordinate      the int c; arithmetic on it is folded away
    local_chunk     slice c of n, copied to contiguous memory
    all_reduce      _c10d_functional.all_reduce, wait_tensor
    all_gather      _c10d_functional.all_gather_into_tensor, wait_tensor; then the pieces, which arrive stacked on dim
                    0, are moved before the gathered dim
    reduce_scatter  the chunks are stacked on dim 0, then _c10d_functional.reduce_scatter_tensor, wait_tensor
    all_to_all      chunks stacked, _c10d_functional.all_to_all_single, wait_tensor, pieces moved

Staged, for ranks that share a GPU: the operand is copied to the host, travels from there, and comes back.

On an axis of size 1 every one of them is its operand. Tensors without elements travel nowhere. Dtypes that backends
cannot carry travel as others of the same width; bool is reduced as uint8 (sum means "any"), int16 as int32.
Every rank gets the same nodes in the same order: only the constants differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autopar.errors import PassError
from autopar.mesh import Mesh
from autopar.passes import collectives as c
from autopar.passes import edit

aten = torch.ops.aten
functional = torch.ops._c10d_functional

#: The functional collectives that start communication, and what ends it.
STARTS = (
    functional.all_reduce.default,
    functional.all_gather_into_tensor.default,
    functional.reduce_scatter_tensor.default,
    functional.all_to_all_single.default,
)
WAIT = functional.wait_tensor.default
#: Of `passes/inplace.py`: all_reduce over its operand, all_gather into a buffer that is there.
IN_PLACE_REDUCE = functional.all_reduce_.default
GATHER_INTO = functional.all_gather_into_tensor_out.default
#: `gm.meta` key that says the graph has no symbolic node left.
BOUND = "autopar_bound"

_CARRIED = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
    }
)
_SAME_WIDTH = {1: torch.uint8, 2: torch.bfloat16, 4: torch.int32, 8: torch.int64}


def bind(
    gm: fx.GraphModule,
    mesh: Mesh,
    coordinates: Sequence[int],
    group_names: Mapping[str, str],
    staged: torch.device | None = None,
) -> fx.GraphModule:
    """The graph of the rank at `coordinates`.

    Args:
        gm: a symbolic local graph; not changed.
        mesh: the mesh it was made for.
        coordinates: this rank's coordinate on every axis.
        group_names: axis name -> registered name of the process group of the ranks that differ only on that axis, in
            coordinate order. Axes of size 1 need none.
        staged: if given, collectives go through host memory, and their results come back to this device.

    Raises:
        PassError: a node names an axis, a size or a dtype that cannot be bound; names the node.
    """
    if len(coordinates) != len(mesh.sizes) or any(not 0 <= i < n for i, n in zip(coordinates, mesh.sizes)):
        raise PassError(f"coordinates {tuple(coordinates)} are not on mesh {mesh}")
    graph = fx.Graph()
    binder = _Binder(graph, mesh, tuple(coordinates), group_names, staged)
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        env[node] = binder.node(node, env)
    out = edit.module(gm, graph)
    out.meta[BOUND] = True
    edit.remove_dead(out)
    out.recompile()
    return out


class _Binder:
    def __init__(
        self,
        graph: fx.Graph,
        mesh: Mesh,
        coordinates: tuple[int, ...],
        group_names: Mapping[str, str],
        staged: torch.device | None,
    ) -> None:
        self.graph, self.mesh, self.coordinates, self.group_names = graph, mesh, coordinates, group_names
        self.staged = staged

    def node(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """The bound node, or the number, that stands for `node`."""
        if node.op == "call_function" and node.target in c.SYMBOLIC:
            args = fx.map_arg(edit.symbolic_args(node), lambda n: env[n])
            if node.target is c.coordinate:
                return self.coordinates[self.mesh.axis(args[0])]
            return self._symbolic(node, args)
        if edit.is_index_arithmetic(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            return node.target(*args, **kwargs)  # type: ignore[operator]
        bound = self.graph.node_copy(node)
        bound.args, bound.kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        return bound

    def _symbolic(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        x, axis, parts = args[:3]
        size = self.mesh.sizes[self.mesh.axis(axis)]
        if parts != size:
            raise PassError(f"{node.name} says axis {axis} has {parts} parts; mesh {self.mesh} has {size}")
        if parts == 1:
            return x
        if node.target is c.local_chunk:
            return self._chunk(node, x, axis, parts, args[3])
        if 0 in edit.shape(x):
            return edit.call(self.graph, aten.new_zeros.default, x, list(edit.shape(node)), like=node)
        if axis not in self.group_names:
            known = ", ".join(self.group_names) or "none"
            raise PassError(f"{node.name} communicates on axis {axis}; process groups are given for: {known}")
        return self._travel(node, x, args)

    def _chunk(self, node: fx.Node, x: fx.Node, axis: str, parts: int, dim: int) -> fx.Node:
        size = edit.shape(x)[dim] // parts
        start = self.coordinates[self.mesh.axis(axis)] * size
        piece = edit.call(self.graph, aten.slice.Tensor, x, dim, start, start + size, like=node)
        return edit.contiguous(self.graph, piece)

    def _travel(self, node: fx.Node, x: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """Bring `x` to a dtype that travels, communicate, and come back."""
        dtype = x.meta["val"].dtype
        # A producer may leave strides (a kernel's own layout); this is free where it did not.
        x = edit.call(self.graph, aten.contiguous.default, x, like=node)
        if node.target not in (c.all_reduce, c.reduce_scatter):
            if dtype.is_complex:
                return self._as_complex(self._plain(node, self._as_real(x), args))
            if dtype in _CARRIED:
                return self._plain(node, x, args)
            carrier = _SAME_WIDTH[dtype.itemsize]
            moved = self._plain(node, edit.call(self.graph, aten.view.dtype, x, carrier, like=x), args)
            return edit.call(self.graph, aten.view.dtype, moved, dtype, like=x)
        if dtype in _CARRIED:
            return self._plain(node, x, args)
        if dtype is torch.bool:
            reduce = "max" if args[-1] == "sum" else args[-1]
            x = edit.call(self.graph, aten.view.dtype, x, torch.uint8, like=x)
            out = self._plain(node, x, (*args[:-1], reduce))
            return edit.call(self.graph, aten.view.dtype, out, torch.bool, like=x)
        if dtype is torch.int16:
            wide = edit.call(self.graph, aten._to_copy.default, x, like=x, dtype=torch.int32)
            return edit.call(self.graph, aten._to_copy.default, self._plain(node, wide, args), like=x, dtype=dtype)
        if dtype.is_complex and args[-1] == "sum":
            return self._as_complex(self._plain(node, self._as_real(x), args))
        raise PassError(
            f"{node.name} reduces {dtype} by {args[-1]}; no backend can. Cast the tensor to a wider float or integer"
        )

    def _as_real(self, x: fx.Node) -> fx.Node:
        return edit.call(self.graph, aten.view_as_real.default, x, like=x)

    def _as_complex(self, x: fx.Node) -> fx.Node:
        return edit.call(self.graph, aten.view_as_complex.default, x, like=x)

    def _plain(self, node: fx.Node, x: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """Communicate contiguous `x` of a dtype that travels. Functional collectives split and stack dim 0 only."""
        _, axis, parts, *rest = args
        group = self.group_names[axis]
        if node.target is c.all_reduce:
            return self._start(functional.all_reduce.default, x, (rest[0], group), edit.shape(x))
        if node.target is c.all_gather:
            (dim,) = rest
            shape = edit.shape(x)
            stacked = (parts * shape[0], *shape[1:])
            out = self._start(functional.all_gather_into_tensor.default, x, (parts, group), stacked)
            return self._unstack(edit.view(self.graph, out, (parts, *edit.shape(x))), dim)
        if node.target is c.reduce_scatter:
            dim, reduce = rest
            x = self._stack(x, dim, parts)
            shape = edit.shape(x)
            x = edit.view(self.graph, x, (shape[0] * shape[1], *shape[2:]))
            return self._start(functional.reduce_scatter_tensor.default, x, (reduce, parts, group), shape[1:])
        split, cat = rest
        x = self._stack(x, split, parts)
        shape = edit.shape(x)
        x = edit.view(self.graph, x, (shape[0] * shape[1], *shape[2:]))
        rows = [shape[1]] * parts
        out = self._start(functional.all_to_all_single.default, x, (rows, rows, group), edit.shape(x))
        return self._unstack(edit.view(self.graph, out, shape), cat)

    def _start(self, target: Any, x: fx.Node, args: tuple[Any, ...], shape: Sequence[int]) -> fx.Node:
        x = x if self.staged is None else self._copy(x, torch.device("cpu"))
        start = self.graph.call_function(target, (x, *args))
        wait = self.graph.call_function(WAIT, (start,))
        for node in (start, wait):
            edit.inherit(node, x)
            node.meta["val"] = torch.empty(tuple(shape), dtype=x.meta["val"].dtype, device="meta")
        return wait if self.staged is None else self._copy(wait, self.staged)

    def _copy(self, x: fx.Node, device: torch.device) -> fx.Node:
        node = self.graph.call_function(aten._to_copy.default, (x,), {"device": device})
        edit.inherit(node, x)
        node.meta["val"] = x.meta["val"]
        return node

    def _stack(self, x: fx.Node, dim: int, parts: int) -> fx.Node:
        """(a, parts*n, b) -> contiguous (parts, a, n, b)."""
        shape = edit.shape(x)
        x = edit.view(self.graph, x, (*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :]))
        return edit.permute(self.graph, x, [dim, *(d for d in range(len(shape) + 1) if d != dim)])

    def _unstack(self, x: fx.Node, dim: int) -> fx.Node:
        """(parts, a, n, b) -> contiguous (a, parts*n, b)."""
        order = list(range(1, len(edit.shape(x))))
        order.insert(dim, 0)
        x = edit.permute(self.graph, x, order)
        shape = edit.shape(x)
        return edit.view(self.graph, x, (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :]))
