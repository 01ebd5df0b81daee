"""Masks that say no more than "causal", or nothing: attention is told so, and the mask is not made.

Models write masks out while they are traced, from positions alone. Such a mask is a constant: it is computed here,
once, on the host, and compared. The kernels of GPUs skip what a causal flag rules out, and some take no mask at all.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from autopar.graph import named_arguments
from autopar.mesh import Mesh
from autopar.passes import attention, edit
from autopar.passes import collectives as c

aten = torch.ops.aten

#: Elements of a mask up to which it is looked at: some seconds.
LARGEST = 1 << 33
#: Rows that are computed and compared at a time.
BLOCK = 1024
#: Bytes of a tensor up to which all of it is computed at once.
MOST_BYTES = 1 << 32
#: Ops that work element by element, on operands that broadcast.
_POINTWISE = frozenset(
    {
        aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten._to_copy.default,
        aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_not.default,
        aten.logical_and.default, aten.logical_or.default, aten.logical_not.default,
        aten.eq.Tensor, aten.ne.Tensor, aten.le.Tensor, aten.lt.Tensor, aten.ge.Tensor, aten.gt.Tensor,
        aten.eq.Scalar, aten.ne.Scalar, aten.le.Scalar, aten.lt.Scalar, aten.ge.Scalar, aten.gt.Scalar,
        aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar,
    }
)  # fmt: skip
CAUSAL, NOTHING, OTHER = "causal", "nothing", "other"


def causal(gm: fx.GraphModule, mesh: Mesh) -> fx.GraphModule:
    """Rewrite the attention of a symbolic local graph, still the CPU's, as described above. `gm` is changed."""
    known: dict[fx.Node, str] = {}
    for node in list(gm.graph.nodes):
        if node.target not in (attention.FORWARD, attention.BACKWARD):
            continue
        given = named_arguments(node.target, node.args, node.kwargs)
        mask, rows, columns = given["attn_mask"], edit.shape(given["query"])[2], edit.shape(given["key"])[2]
        if mask is None or given["is_causal"]:
            continue
        while mask.target is aten.contiguous.default:
            mask = mask.args[0]
        if mask not in known:
            known[mask] = _meaning(gm, mask, mesh)
        if known[mask] == NOTHING or (known[mask] == CAUSAL and rows == columns):
            given |= {"attn_mask": None, "is_causal": known[mask] == CAUSAL}
            scale = {"scale": given.pop("scale")}
            del given["attn_mask"]
            node.args, node.kwargs = tuple(given.values()), scale
    edit.remove_dead(gm)
    gm.recompile()
    return gm


def _meaning(gm: fx.GraphModule, mask: fx.Node, mesh: Mesh) -> str:
    """What the mask says, the same on every rank; `OTHER` also where it depends on arguments or on other ranks."""
    val = mask.meta["val"]
    if not val.is_floating_point() or val.dim() < 2 or not 0 < val.numel() <= LARGEST:
        return OTHER
    made = _made_from(mask)
    if any(n.op == "placeholder" or n.target in c.COLLECTIVES for n in made):
        return OTHER
    axes = sorted({_axis(n) for n in made if n.target in (c.coordinate, c.local_chunk)})
    found = set()
    for at in itertools.product(*(range(mesh.sizes[mesh.axis(a)]) for a in axes)):
        found.add(_Values(gm, dict(zip(axes, at))).meaning(mask))
        if OTHER in found:
            break
    return found.pop() if len(found) == 1 else OTHER


def _axis(node: fx.Node) -> str:
    return str(edit.symbolic_args(node)[0 if node.target is c.coordinate else 1])


def _made_from(node: fx.Node) -> set[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for before in stack.pop().all_input_nodes:
            if before not in seen:
                seen.add(before)
                stack.append(before)
    return seen


class _Values:
    """Constants of a local graph as the rank at the coordinates `at` has them."""

    def __init__(self, gm: fx.GraphModule, at: dict[str, int]) -> None:
        self.gm, self.at = gm, at
        self.whole: dict[fx.Node, Any] = {}
        self.block: dict[fx.Node, torch.Tensor] = {}  # of what is read at present

    @torch.no_grad()
    def meaning(self, mask: fx.Node) -> str:
        """What `mask` [..., queries, keys], added to the scores, says. Read block by block: it may be large."""
        *lead, rows, columns = edit.shape(mask)
        lowest = torch.finfo(mask.meta["val"].dtype).min
        left = {CAUSAL, NOTHING} if rows == columns > 1 else {NOTHING}
        for first in range(lead[0] if lead else 1):
            for top in range(0, rows, BLOCK):
                self.block.clear()
                block = self.piece(mask, len(lead) + 2, first, top)
                if block is None:
                    return OTHER
                open_, closed = block == 0, block <= lowest
                if CAUSAL in left:
                    size = min(BLOCK, rows - top)
                    below = torch.ones(size, columns, dtype=torch.bool).tril(top)
                    if not ((open_ == below) & (closed != below)).all():
                        left.discard(CAUSAL)
                if not open_.all():
                    left.discard(NOTHING)
                if not left:
                    return OTHER
        return left.pop()

    def piece(self, node: fx.Node, dims: int, first: int, top: int) -> torch.Tensor | None:
        """Entry `first` of the first of `dims` dims, and rows from `top`: what is element-wise is computed for these.

        Dims of size one may be left as they are. None where a constant has no values, or too many.
        """
        if node in self.block:
            return self.block[node]
        if node.target is aten.expand.default:
            return self.piece(node.args[0], dims, first, top)  # type: ignore[arg-type]
        if node.target in _POINTWISE:
            parts = {n: self.piece(n, dims, first, top) for n in node.all_input_nodes}
            if any(p is None for p in parts.values()):
                return None
            args, kwargs = fx.map_arg((node.args, node.kwargs), parts.__getitem__)
            self.block[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return self.block[node]
        value = self.value(node)
        if value is None:
            return None
        if value.dim() == dims > 2 and value.shape[0] > 1:
            value = value[first : first + 1]
        return value[..., top : top + BLOCK, :] if value.dim() > 1 and value.shape[-2] > 1 else value

    def value(self, node: fx.Node) -> Any:
        """All of a tensor, or a number; None as in `piece`."""
        if node in self.whole:
            return self.whole[node]
        found: Any
        if edit.nbytes(node) > MOST_BYTES:
            found = None
        elif node.op == "get_attr":
            found = getattr(self.gm, str(node.target))
            found = None if found.is_meta else found
        elif node.target is c.coordinate:
            found = self.at[_axis(node)]
        else:
            parts = {n: self.value(n) for n in node.all_input_nodes}
            if any(p is None for p in parts.values()):
                found = None
            elif node.target is c.local_chunk:
                x, axis, pieces, dim = edit.symbolic_args(node)
                found = parts[x].chunk(pieces, dim)[self.at[axis]]
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), parts.__getitem__)
                found = node.target(*args, **kwargs)  # type: ignore[operator]
        self.whole[node] = found
        return found


__all__ = ["causal"]
