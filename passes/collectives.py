"""Communication as symbolic nodes on mesh axes: what passes insert, move, merge, and finally lower.

Each is a plain function used as the target of a `call_function` node. They name a mesh axis, not a process group, so
one local graph serves every rank; `passes/bind.py` replaces them by functional collectives and constants of one rank.
`parts` is the size of the axis. All tensors are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.errors import PassError

Tensor = torch.Tensor


def all_reduce(x: Tensor, axis: str, parts: int, reduce: str) -> Tensor:
    """Reduce over the axis by sum, max or min; everyone gets the result."""
    raise _unbound("all_reduce")


def all_gather(x: Tensor, axis: str, parts: int, dim: int) -> Tensor:
    """Concatenate the pieces of all coordinates along `dim`, in coordinate order."""
    raise _unbound("all_gather")


def reduce_scatter(x: Tensor, axis: str, parts: int, dim: int, reduce: str) -> Tensor:
    """Reduce over the axis; coordinate c keeps chunk c of `dim`."""
    raise _unbound("reduce_scatter")


def all_to_all(x: Tensor, axis: str, parts: int, split: int, cat: int) -> Tensor:
    """Send chunk c of dim `split` to coordinate c; concatenate what arrives along dim `cat`."""
    raise _unbound("all_to_all")


def local_chunk(x: Tensor, axis: str, parts: int, dim: int) -> Tensor:
    """Keep this coordinate's chunk of `dim`. No communication."""
    raise _unbound("local_chunk")


def coordinate(axis: str) -> int:
    """This rank's coordinate on the axis (an int node; arithmetic on it is folded when the rank is bound)."""
    raise _unbound("coordinate")


#: Nodes that communicate.
COLLECTIVES = (all_reduce, all_gather, reduce_scatter, all_to_all)
#: All symbolic targets.
SYMBOLIC = (*COLLECTIVES, local_chunk, coordinate)


def result_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a symbolic node's result, from its operand's `meta["val"]`."""
    shape = list(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    args: Any = node.args
    if node.target is all_gather:
        shape[args[3]] *= args[2]
    elif node.target in (reduce_scatter, local_chunk):
        shape[args[3]] //= args[2]
    elif node.target is all_to_all:
        shape[args[3]] //= args[2]
        shape[args[4]] *= args[2]
    return tuple(shape)


def emit(graph: fx.Graph, target: Any, x: fx.Node, *args: Any) -> fx.Node:
    """Append a symbolic node with its `meta["val"]` (a meta tensor of the local shape)."""
    node = graph.call_function(target, (x, *args))
    node.meta["val"] = torch.empty(result_shape(node), dtype=x.meta["val"].dtype, device="meta")
    for key in ("phase", "module"):
        if key in x.meta:
            node.meta[key] = x.meta[key]
    return node


def _unbound(name: str) -> PassError:
    return PassError(f"symbolic {name} was executed; lower the graph with autopar.passes.bind first")
