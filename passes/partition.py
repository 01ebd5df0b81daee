"""Cut a joint local graph into a forward and a backward graph.

Works on the symbolic level (one cut serves every rank; run it there, then bind each half) and on the bound one alike.

What the backward needs of the forward is either saved or computed again:

* a placeholder is handed over as it is;
* numbers, views, constants, and what copies without computing (permutes, casts, local chunks) are computed again where
  the tensors they start from are at hand anyway (placeholders, or saved for another reader), or are smaller than the
  result: a bool mask is saved and its float copy made again;
* a local chunk that the backward cuts from a forward tensor counts as such a move: it is saved in place of the tensor
  if nobody else keeps that, and then cut in the forward, as soon as the tensor is there;
* anything else is saved, once. Of a view, it is the base that is saved: the view would keep it alive anyhow.

Where kernels are fused, an element-wise result whose operands are at hand anyway, and which only element-wise ops and
sums read, is computed again: within their kernel it costs no traffic, and keeping it would cost the forward a write and
the backward a read.

Backward nodes that need no gradient (parameters gathered again, their transposes, zeros) stand in the backward graph.
What is computed again stands right before its first reader: earlier, it would only take memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.errors import PassError
from autopar.graph import BACKWARD, FORWARD, Sink, Source
from autopar.passes import edit

aten = torch.ops.aten
#: Reductions that a compiler fuses with what they read.
_SUMS = {aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default}


@dataclass(frozen=True)
class Parts:
    """The two halves.

    Attributes:
        forward: placeholders: the joint's that are not tangents or late, in order. Outputs: `num_outputs` forward
            outputs (sinks of the forward, in order), then the tensors of `saved`.
        backward: placeholders: those of `saved_inputs`, then `saved`, then the tangents and late inputs, in order.
            Outputs: the gradients (sinks of the backward, in order).
        num_outputs: number of forward outputs.
        saved_inputs: positions among the forward's placeholders that the backward reads.
        saved: names of the forward nodes handed over as further outputs.
        saved_bytes: bytes of `saved` on one rank.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_outputs: int
    saved_inputs: tuple[int, ...]
    saved: tuple[str, ...]
    saved_bytes: int


def partition(gm: fx.GraphModule, sources: Sequence[Source], sinks: Sequence[Sink], fuses: bool = False) -> Parts:
    """Cut `gm`, whose placeholders are those of `sources` and whose outputs those of `sinks`, in order.

    `gm` is not changed. A graph without gradients gives an empty backward. fuses: a compiler will fuse what it can.

    Raises:
        PassError: placeholders or outputs do not fit `sources` and `sinks`, or a forward output depends on a tangent.
    """
    places, out = edit.placeholders(gm), edit.output_node(gm)
    if len(places) != len(sources) or len(out.args[0]) != len(sinks):  # type: ignore[arg-type]
        raise PassError(
            f"the graph has {len(places)} placeholders and {len(out.args[0])} outputs; "  # type: ignore[arg-type]
            f"the program has {len(sources)} sources and {len(sinks)} sinks"
        )
    tangents = [n for n, s in zip(places, sources) if s.phase == BACKWARD]
    inputs = [n for n, s in zip(places, sources) if s.phase == FORWARD]
    values = list(out.args[0])  # type: ignore[arg-type]
    results = [v for v, s in zip(values, sinks) if s.phase == FORWARD]
    grads = [v for v, s in zip(values, sinks) if s.phase == BACKWARD]
    late = _backward_nodes(gm, tangents)
    for value, sink in zip(values, sinks):
        if sink.phase == FORWARD and value in late:
            raise PassError(
                f"{sink.kind} {sink.name} is computed by backward node {value}; outputs belong to the forward"
            )

    needed = _needed(grads, late)
    saved = _choose_saved(gm, needed)
    if fuses:
        saved = _without_fusable(saved, late, [v for v in results if isinstance(v, fx.Node)])
    again = _recomputed(needed, saved)

    forward = _extract(gm, inputs, [*results, *saved], late)
    given = [n for n in inputs if n in again]
    inside = late | {n: None for n in again if n.op != "placeholder"}
    backward = _extract(gm, [*given, *saved, *tangents], grads, {}, only=inside)
    return Parts(
        forward,
        backward,
        len(results),
        tuple(i for i, n in enumerate(inputs) if n in again),
        tuple(n.name for n in saved),
        sum(edit.nbytes(n) for n in saved),
    )


def _backward_nodes(gm: fx.GraphModule, tangents: Sequence[fx.Node]) -> dict[fx.Node, None]:
    late: dict[fx.Node, None] = dict.fromkeys(tangents)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or edit.is_index_arithmetic(node):
            continue
        from_late = next((n for n in node.all_input_nodes if n in late), None)
        if node.meta.get("phase") == BACKWARD and (from_late is not None or not _cuts(node)):
            late[node] = None
        elif from_late is not None:
            raise PassError(f"forward node {node.name} reads backward node {from_late.name}")
    # A result picked from a forward op belongs to the forward, whoever reads it.
    for node in list(late):
        if edit.is_pick(node) and node.args[0] not in late:
            del late[node]
    return late


def _cuts(node: fx.Node) -> bool:
    """Whether the node is a local chunk or a view of a tensor: on either side it makes the same from the same."""
    return node.target in edit.CUTS and any(edit.is_tensor(n) for n in node.all_input_nodes)


def _needed(grads: Sequence[object], late: dict[fx.Node, None]) -> list[fx.Node]:
    """Forward nodes, in graph order of discovery, that the live backward reads directly."""
    seen: dict[fx.Node, None] = {}
    found: dict[fx.Node, None] = {}
    stack = [g for g in grads if isinstance(g, fx.Node)]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen[node] = None
        if node not in late:
            found[node] = None
        elif node.op != "placeholder":
            stack.extend(node.all_input_nodes)
    return list(found)


def _free(node: fx.Node) -> bool:
    """Whether computing the node again costs no arithmetic."""
    if node.op == "get_attr" or edit.is_index_arithmetic(node):
        return True
    if all(edit.is_index_arithmetic(n) for n in node.all_input_nodes):
        return True  # a constant: full, zeros, arange
    return node.target in edit.MOVES and not _picks_computed(node)


def _picks_computed(node: fx.Node) -> bool:
    """Whether the node is one result of an op that computes (a piece of a split is not)."""
    return edit.is_pick(node) and node.args[0].target not in edit.VIEWS  # type: ignore[union-attr]


def _is_alias(node: fx.Node) -> bool:
    if node.target in edit.MAYBE_COPIES:
        return not edit.may_have_strides(node.all_input_nodes[0])
    return node.target in edit.VIEWS and not _picks_computed(node)


def _missing(node: fx.Node, saved: dict[fx.Node, None]) -> list[fx.Node]:
    """What must be saved besides, to compute a free node again."""
    out: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in seen or top in saved or top.op == "placeholder":
            continue
        seen.add(top)
        if _free(top):
            stack.extend(top.all_input_nodes)
        else:
            out[top] = None
    return list(out)


def _choose_saved(gm: fx.GraphModule, needed: Sequence[fx.Node]) -> list[fx.Node]:
    """The tensors to save, in graph order."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    saved: dict[fx.Node, None] = {}
    todo: dict[fx.Node, None] = {}
    for node in sorted(needed, key=order.__getitem__):
        # Saving a view would keep its base alive, so the base is what counts.
        while _is_alias(node):
            node = node.all_input_nodes[0]
        if node.op == "placeholder":
            continue
        (todo if _free(node) else saved)[node] = None
    # Those that start from the same tensors are weighed together: both would be paid for by one.
    groups: dict[tuple[fx.Node, ...], list[fx.Node]] = {}
    for node in todo:
        groups.setdefault(tuple(sorted(_missing(node, saved), key=order.__getitem__)), []).append(node)
    for leaves, members in groups.items():
        missing = [n for n in leaves if n not in saved]
        if sum(map(edit.nbytes, missing)) < sum(map(edit.nbytes, members)):
            saved.update(dict.fromkeys(missing))
        elif missing:
            saved.update(dict.fromkeys(members))
    return sorted(saved, key=order.__getitem__)


def _without_fusable(saved: list[fx.Node], late: dict[fx.Node, None], results: list[fx.Node]) -> list[fx.Node]:
    """Without what fused kernels of the backward compute on their way; the last first: of a chain the head stays."""
    kept = dict.fromkeys(saved)
    outputs = set(results)
    for node in reversed(saved):
        if not _pointwise(node) or node in outputs or not _read_by_fused(node, late):
            continue
        del kept[node]
        if any(_missing(operand, kept) for operand in node.all_input_nodes):
            kept[node] = None
    return [n for n in saved if n in kept]


def _pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _read_by_fused(node: fx.Node, late: dict[fx.Node, None]) -> bool:
    """Whether every reader in the backward, behind moves, is an op that a compiler fuses with what it reads."""
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user.target in edit.MOVES:
            stack.extend(user.users)
        elif user in late and not _pointwise(user) and user.target not in _SUMS:
            return False
    return True


def _recomputed(needed: Sequence[fx.Node], saved: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """Placeholders handed over and nodes computed again, from what is saved."""
    kept = set(saved)
    out: dict[fx.Node, None] = {}
    stack = list(needed)
    while stack:
        node = stack.pop()
        if node in kept or node in out:
            continue
        out[node] = None
        stack.extend(node.all_input_nodes)
    return out


def _early_as_possible(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes with what is cut for the backward right behind its operand; the others keep their order."""
    inside = set(nodes)
    placed: dict[fx.Node, None] = {}
    for node in nodes:
        stack = [node]
        while stack:
            top = stack.pop()
            if top in placed or any(n in inside and n not in placed for n in top.all_input_nodes):
                continue  # done, or its turn comes with another operand
            placed[top] = None
            stack += [n for n in reversed(top.users) if n in inside and n.meta.get("phase") == BACKWARD]
    return list(placed)


def _late_as_possible(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes with those of the forward right before their first reader; the others keep their order."""
    again = {n: None for n in nodes if n.meta.get("phase") != BACKWARD}
    placed: dict[fx.Node, None] = {}
    for node in (*(n for n in nodes if n not in again), *again):
        stack = [node]
        while stack:
            top = stack[-1]
            before = [n for n in top.all_input_nodes if n in again and n not in placed and n is not top]
            if before:
                stack += reversed(before)
            else:
                placed[stack.pop()] = None
    return list(placed)


def _extract(
    gm: fx.GraphModule,
    inputs: Sequence[fx.Node],
    outputs: Sequence[object],
    without: dict[fx.Node, None],
    only: dict[fx.Node, None] | None = None,
) -> fx.GraphModule:
    """The graph that computes `outputs` from `inputs`; other nodes as they stand, dead ones left out.

    only: of the backward; nodes of the forward in it stand right before their first reader.
    """
    live: set[fx.Node] = set()
    stack = [n for n in outputs if isinstance(n, fx.Node)]
    given = set(inputs)
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            if node not in given:
                stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta.update(node.meta)
    body = [n for n in gm.graph.nodes if n in live and n not in given]
    for node in _early_as_possible(body) if only is None else _late_as_possible(body):
        outside = node in without or (only is not None and node not in only and not edit.is_index_arithmetic(node))
        if node.op in ("placeholder", "output") or outside:
            raise PassError(f"{node.name} is on the wrong side of the cut between forward and backward")
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta["phase"] = FORWARD if only is None else BACKWARD
    graph.output(tuple(env[v] if isinstance(v, fx.Node) else v for v in outputs))  # type: ignore[misc]
    out = edit.module(gm, graph)
    out.recompile()
    return out
