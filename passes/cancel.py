"""Drop work that undoes or repeats other work: the straightforward rewrites, until none applies.

Exact, bit for bit. What a rewrite needs to be right:

* `all_gather(local_chunk(x))` is x only because lowering cuts nothing but tensors that are whole on that axis;
* a node marked `regather` (a parameter brought again for the backward) never takes the place of an unmarked one, or the
  forward's copy would have to live until the backward;
* an all_reduce marked `keep` is what the plan asked for and is not merged into a reduce_scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.graph import BACKWARD, FORWARD
from autopar.passes import collectives as c
from autopar.passes import edit

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, aten.contiguous.default)


def cancel(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a symbolic local graph in place until no rule applies, then drop dead code."""
    changed = True
    while changed:
        changed = False
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            for rule in RULES:
                with gm.graph.inserting_before(node):
                    found = rule(gm.graph, node)
                if found is not None:
                    node.replace_all_uses_with(found)
                    changed = True
                    break
        changed = _merge_equal(gm) or changed
        changed = bool(edit.remove_dead(gm)) or changed
    gm.recompile()
    return gm


def _alone(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Symbolic nodes on an axis of size 1 are their operand."""
    if node.target in c.SYMBOLIC and node.target is not c.coordinate and edit.symbolic_args(node)[2] == 1:
        return node.args[0]  # type: ignore[return-value]
    return None


def _inverse(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """gather of chunk, chunk of gather, and two all_to_alls of which one undoes the other."""
    inner = node.args[0] if node.args else None
    if not isinstance(inner, fx.Node) or node.target not in c.SYMBOLIC or inner.target not in c.SYMBOLIC:
        return None
    if inner.target is c.coordinate or node.meta.get("regather"):
        return None
    _, axis, _, *how = edit.symbolic_args(node)
    x, inner_axis, _, *inner_how = edit.symbolic_args(inner)
    pairs = {(c.all_gather, c.local_chunk), (c.local_chunk, c.all_gather)}
    undone = (node.target, inner.target) in pairs and how == inner_how
    undone = undone or (node.target is inner.target is c.all_to_all and how == inner_how[::-1])
    return x if undone and axis == inner_axis else None


def _scatter(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A chunk of an all_reduce that nobody else reads is a reduce_scatter."""
    inner = node.args[0] if node.args else None
    if node.target is not c.local_chunk or not isinstance(inner, fx.Node) or inner.target is not c.all_reduce:
        return None
    x, axis, parts, reduce = edit.symbolic_args(inner)
    _, chunk_axis, _, dim = edit.symbolic_args(node)
    if axis != chunk_axis or len(inner.users) > 1 or inner.meta.get("keep"):
        return None
    return edit.call(graph, c.reduce_scatter, x, axis, parts, dim, reduce, like=node)


def _reshape(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Reshape of reshape is one; reshape to the same shape is none."""
    if node.target not in _RESHAPES:
        return None
    inner: fx.Node = node.args[0]  # type: ignore[assignment]
    if edit.shape(inner) == edit.shape(node):
        return inner
    if inner.target not in _RESHAPES:
        return None
    both_views = node.target is inner.target is aten.view.default
    target = aten.view.default if both_views else aten.reshape.default
    return edit.call(graph, target, inner.args[0], list(edit.shape(node)), like=node)


def _permute(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Permute of permute is one; permute that moves nothing is none."""
    if node.target is not aten.permute.default:
        return None
    inner: fx.Node = node.args[0]  # type: ignore[assignment]
    order = _order(node)
    if order == list(range(len(order))):
        return inner
    if inner.target is not aten.permute.default:
        return None
    return edit.call(graph, aten.permute.default, inner.args[0], [_order(inner)[d] for d in order], like=node)


def _whole(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """expand to the same shape, slice of everything, cast to the same dtype."""
    if node.target in (aten.expand.default, aten.slice.Tensor):
        inner: fx.Node = node.args[0]  # type: ignore[assignment]
        step = (node.args + (1,) * 5)[4] if node.target is aten.slice.Tensor else 1
        return inner if edit.shape(inner) == edit.shape(node) and step == 1 else None
    if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"} and not _is_output(node):
        inner = node.args[0]  # type: ignore[assignment]
        return inner if inner.meta["val"].dtype is node.meta["val"].dtype else None
    return None


def _copy(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Copy of a copy, unless one could be told from the other: by strides, or because both are handed out."""
    if node.target not in _COPIES or _is_output(node):
        return None
    inner: fx.Node = node.args[0]  # type: ignore[assignment]
    if node.target is aten.contiguous.default and len(node.args) == 1 and not node.kwargs and _is_contiguous(inner):
        return inner
    if inner.target not in _COPIES:
        return None
    plain = node.target is aten.clone.default and node.kwargs.get("memory_format") is None
    return inner if plain or _is_contiguous(inner) else None


#: Tried in this order at every node.
RULES: tuple[Callable[[fx.Graph, fx.Node], fx.Node | None], ...] = (
    _alone,
    _inverse,
    _scatter,
    _reshape,
    _permute,
    _whole,
    _copy,
)


def _merge_equal(gm: fx.GraphModule) -> bool:
    """One node in place of several that move the same data the same way."""
    seen: dict[Any, fx.Node] = {}
    changed = False
    for node in list(gm.graph.nodes):
        moves = node.target in edit.MOVES or node.target in c.SYMBOLIC or edit.is_index_arithmetic(node)
        if node.op != "call_function" or not moves:
            continue
        marks = (bool(node.meta.get("regather")), bool(node.meta.get("keep")))
        key = (node.target, _freeze(node.args), _freeze(node.kwargs), marks)
        first = seen.setdefault(key, node)
        if first is node or (_is_output(node) and _is_output(first)):
            continue
        if first.meta.get("phase") == BACKWARD and node.meta.get("phase") == FORWARD:
            # Equal operands, so the operands are forward: only the first reader was not.
            first.meta["phase"] = FORWARD
        node.replace_all_uses_with(first)
        gm.graph.erase_node(node)
        changed = True
    return changed


def _freeze(value: Any) -> Any:
    """Something hashable that is equal for equal arguments, and tells 1 from 1.0 and True."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(value.items()))
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


def _order(node: fx.Node) -> list[int]:
    dims: list[int] = list(node.args[1])  # type: ignore[arg-type]
    return [d % len(dims) for d in dims]


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_contiguous(node: fx.Node) -> bool:
    """Whether the result is contiguous whatever the operand's strides."""
    while node.target in (aten.view.default, aten.reshape.default):
        node = node.args[0]  # type: ignore[assignment]
    if node.target in c.COLLECTIVES or node.target is c.local_chunk:
        return True
    fixed = node.target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format
    return fixed or (node.target is aten.contiguous.default and not node.kwargs and len(node.args) == 1)
