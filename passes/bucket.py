"""Merge small collectives into few flat ones: latency is paid per call.

Merged are collectives of one kind, axis, dtype, reduction and phase that cannot depend on each other, because they have
as many such collectives before them and as many behind them (one that has none behind it would make the next of a chain
wait for more than its own operand):

* gathers of parameters: the operand comes from placeholders through moves only (perhaps through other such gathers).
  They are taken in the order of their first use, so that a bucket can be fetched just ahead of it;
* reductions of results: the result reaches the output through moves and other collectives only. They are taken in the
  order in which their operands are computed;
* besides, small all_reduces with nothing computed between them, such as those of the sum and the count of a mean.

Every piece is flattened and packed with `cat`, travels along dim 0, and is cut out and rearranged behind. The elements
meet the same partners in the same order as before, so results are equal bit for bit. Written with plain ATen ops
and the symbolic collectives, so nothing downstream needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from autopar.graph import is_op
from autopar.passes import collectives as c
from autopar.passes import edit

aten = torch.ops.aten

#: Bytes of a bucket: large enough that bandwidth, not latency, is what a call costs.
BUCKET_BYTES = 25 << 20
#: Bytes of all_reduces that are merged though results are waited for: packing more costs more than the call saved.
SMALL_BYTES = 64 << 10
_REDUCTIONS = (c.all_reduce, c.reduce_scatter)
_TRAVELS = (*_REDUCTIONS, c.all_gather, c.all_to_all)
#: Numbers of collectives before and behind one.
Level = tuple[int, int]


def bucket(gm: fx.GraphModule, bucket_bytes: int = BUCKET_BYTES) -> fx.GraphModule:
    """Merge collectives of a symbolic local graph into buckets of at most `bucket_bytes`.

    Bytes are the larger of sent and received, on one rank. A collective of that size or more stays alone.
    `gm` may be changed; use what is returned.
    """
    found = _reductions(gm)
    gathers, reductions = _pack(_gathers(gm), bucket_bytes), _pack(found, bucket_bytes)
    # What nobody computes with has no hurry, and may stand behind a bucket.
    taken = {n for n, _ in found}
    twins = [g for g in _neighbours(gm, min(bucket_bytes, SMALL_BYTES)) if taken.isdisjoint(g)]
    for group in gathers:
        _merge_gathers(gm.graph, group)
    wholes = [_merge_reductions(gm.graph, group) for group in reductions]
    for group in twins:
        _merge_reductions(gm.graph, group)
    if not gathers and not reductions and not twins:
        return gm
    # A bucket may stand behind a reader of one of its pieces: what is read early pulls it forward. Not for what only
    # brings a reduced piece to the output: it would pull all that the bucket waits for before the rest of the backward.
    late = behind_of(wholes)
    gm = edit.stable_sort(gm, key=late.__contains__)
    edit.remove_dead(gm)
    gm.recompile()
    return gm


def reductions_of(gm: fx.GraphModule) -> list[fx.Node]:
    """Reductions whose results only the output reads, in graph order."""
    return [node for node, _ in _reductions(gm)]


def _key(node: fx.Node, level: Level) -> tuple[Any, ...]:
    _, axis, parts, *how = edit.symbolic_args(node)
    reduce = how[-1] if node.target in (c.all_reduce, c.reduce_scatter) else ""
    again = bool(node.meta.get("regather"))
    return (node.target, axis, parts, reduce, node.meta["val"].dtype, node.meta["phase"], again, level)


def _pack(found: Iterable[tuple[fx.Node, Level]], limit: int) -> list[list[fx.Node]]:
    """Groups of two and more, in order of appearance; neighbours of one key until the bucket is full."""
    open_: dict[tuple[Any, ...], tuple[list[fx.Node], int]] = {}
    groups: list[list[fx.Node]] = []
    for node, level in found:
        size = max(edit.nbytes(node), edit.nbytes(node.args[0]))  # type: ignore[arg-type]
        if size >= limit or size == 0:
            continue
        key = _key(node, level)
        members, filled = open_.get(key, ([], 0))
        if filled + size > limit:
            members, filled = [], 0
        if not members:
            groups.append(members)
        members.append(node)
        open_[key] = (members, filled + size)
    return [g for g in groups if len(g) > 1]


def _gathers(gm: fx.GraphModule) -> list[tuple[fx.Node, Level]]:
    """All-gathers of what placeholders hold, with the numbers of gathers before and behind each, by first use."""
    before: dict[fx.Node, int] = {}
    found = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            before[node] = 0
        elif is_op(node) and (node.target in edit.MOVES or node.target is c.all_gather):
            inputs = node.all_input_nodes
            if inputs and all(n in before for n in inputs):
                level = max(before[n] + (n.target is c.all_gather) for n in inputs)
                before[node] = level
                if node.target is c.all_gather:
                    found.append(node)
    position = {n: i for i, n in enumerate(gm.graph.nodes)}
    first: dict[fx.Node, int] = {}
    behind: dict[fx.Node, int] = {}
    for node in reversed(gm.graph.nodes):
        if node in before:
            first[node] = min((first[u] if u in before else position[u] for u in node.users), default=position[node])
            inside = [u for u in node.users if u in before]
            behind[node] = max((behind[u] + (u.target is c.all_gather) for u in inside), default=0)
    found.sort(key=lambda n: (first[n], position[n]))
    return [(n, (before[n], behind[n])) for n in found]


def _reductions(gm: fx.GraphModule) -> list[tuple[fx.Node, Level]]:
    """Reductions that reach only the output, with the numbers of collectives before and behind each, in graph order."""
    behind: dict[fx.Node, int] = {}
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            behind[node] = 0
        elif node.op == "call_function" and (node.target in _TRAVELS or node.target in edit.MOVES):
            if node.users and all(u in behind for u in node.users):
                behind[node] = max(behind[u] + (u.target in _TRAVELS) for u in node.users)
    before: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node in behind:
            inside = [n for n in node.all_input_nodes if n in behind]
            before[node] = max((before[n] + (n.target in _TRAVELS) for n in inside), default=0)
    return [(n, (before[n], behind[n])) for n in gm.graph.nodes if n in behind and n.target in _REDUCTIONS]


def _neighbours(gm: fx.GraphModule, limit: int) -> list[list[fx.Node]]:
    """Groups of all_reduces of one key between which the graph only moves: none of them waits for another."""
    groups: list[list[fx.Node]] = []
    members: list[fx.Node] = []
    behind: set[fx.Node] = set()  # what waits for a member
    for node in gm.graph.nodes:
        if node.target is c.all_reduce:
            fits = sum(edit.nbytes(n) for n in (*members, node)) <= limit
            same = bool(members) and _key(members[0], (0, 0)) == _key(node, (0, 0))
            if not fits or not same or not behind.isdisjoint(node.all_input_nodes):
                members, behind = [], set()
                groups.append(members)
            members.append(node)
            behind.add(node)
        elif not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        elif node.op == "call_function" and node.target not in edit.MOVES:
            members, behind = [], set()
    return [g for g in groups if len(g) > 1]


def _merge_gathers(graph: fx.Graph, group: list[fx.Node]) -> None:
    rows = []
    with graph.inserting_before(group[-1]):
        pieces: list[fx.Node] = [n.args[0] for n in group]  # type: ignore[misc]
        for x, node in zip(pieces, group):
            rows.append(_flat(graph, x, node))
        _, axis, parts, _ = edit.symbolic_args(group[0])
        packed = edit.call(graph, aten.cat.default, rows, 0, like=group[0])
        whole = edit.call(graph, c.all_gather, packed, axis, parts, 0, like=group[0])
        whole = edit.view(graph, whole, (parts, edit.shape(packed)[0]))
        start = 0
        for x, row, node in zip(pieces, rows, group):
            dim = edit.symbolic_args(node)[3]
            end = start + edit.shape(row)[0]
            cut = edit.call(graph, aten.slice.Tensor, whole, 1, start, end, like=node)
            cut = edit.call(graph, aten.view.default, cut, [parts, *edit.shape(x)], like=node)
            order = [*range(1, dim + 1), 0, *range(dim + 1, len(edit.shape(x)) + 1)]
            if dim:
                cut = edit.call(graph, aten.permute.default, cut, order, like=node)
            out = edit.view(graph, edit.contiguous(graph, cut), edit.shape(node))
            node.replace_all_uses_with(out)
            start = end


def behind_of(starts: list[fx.Node]) -> set[fx.Node]:
    """Everything computed from `starts`, themselves not included."""
    found: set[fx.Node] = set()
    stack = list(starts)
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack.append(user)
    return found


def _merge_reductions(graph: fx.Graph, group: list[fx.Node]) -> fx.Node:
    """Merge a group; the node that travels."""
    scatter = group[0].target is c.reduce_scatter
    rows = []
    with graph.inserting_before(group[-1]):
        for node in group:
            x, _, parts, *how = edit.symbolic_args(node)
            if scatter:
                rows.append(_stacked(graph, x, parts, how[0], node))
            else:
                rows.append(_flat(graph, x, node))
        _, axis, parts, *how = edit.symbolic_args(group[0])
        packed = edit.call(graph, aten.cat.default, rows, 1 if scatter else 0, like=group[0])
        if scatter:
            travel = edit.call(graph, c.reduce_scatter, packed, axis, parts, 0, how[-1], like=group[0])
            whole = edit.view(graph, travel, (edit.shape(packed)[1],))
        else:
            travel = whole = edit.call(graph, c.all_reduce, packed, axis, parts, how[-1], like=group[0])
        if any(node.meta.get("keep") for node in group):
            travel.meta["keep"] = True
        start = 0
        for node in group:
            end = start + node.meta["val"].numel()
            cut = edit.call(graph, aten.slice.Tensor, whole, 0, start, end, like=node)
            # Its own memory: results are handed out, and one must not keep the whole bucket alive.
            out = edit.view(graph, edit.contiguous(graph, cut), edit.shape(node))
            node.replace_all_uses_with(out)
            start = end
    return travel


def _flat(graph: fx.Graph, x: fx.Node, like: fx.Node) -> fx.Node:
    """All elements in one dim. A producer may leave strides, so this is a reshape."""
    return edit.call(graph, aten.reshape.default, x, [x.meta["val"].numel()], like=like)


def _stacked(graph: fx.Graph, x: fx.Node, parts: int, dim: int, like: fx.Node) -> fx.Node:
    """(a, parts*n, b) -> (parts, a*n*b): what goes to each coordinate, flat."""
    shape = edit.shape(x)
    split = [*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :]]
    x = edit.call(graph, aten.reshape.default, x, split, like=like)
    order = [dim, *(d for d in range(len(split)) if d != dim)]
    x = edit.call(graph, aten.permute.default, x, order, like=like)
    return edit.call(graph, aten.reshape.default, x, [parts, x.meta["val"].numel() // parts], like=like)


__all__ = ["BUCKET_BYTES", "behind_of", "bucket", "reductions_of"]
