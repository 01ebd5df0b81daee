"""What must hold of a local graph, on each of its two levels. Called after every pass.

Both levels: placeholders, constants and calls only, one flat output; every tensor node has `val` and a phase; no
forward node reads a backward one. Symbolic level: the arguments of every symbolic node are legal and its `val` follows
from its operand. Bound level: no symbolic node is left; what a functional collective returns is read by wait_tensor
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.errors import PassError
from autopar.graph import BACKWARD, FORWARD, op_name
from autopar.mesh import Mesh
from autopar.offload import ARRIVED
from autopar.offload import STARTS as COPIES
from autopar.passes import collectives as c
from autopar.passes import edit
from autopar.passes.bind import BOUND, GATHER_INTO, IN_PLACE_REDUCE, STARTS, WAIT

_REDUCES = ("sum", "max", "min")


def verify(gm: fx.GraphModule, *, mesh: Mesh | None = None, deep: bool = False) -> None:
    """Check every invariant of the graph's level (`bind` marks what it returns as bound).

    Args:
        gm: the local graph.
        mesh: if given, axes and sizes must be its own.
        deep: also run every op on meta tensors and compare shape and dtype of the result (slow).

    Raises:
        PassError: the first node that breaks an invariant, by name, with what it has and what it should have.
    """
    edit.output_node(gm)
    bound = bool(gm.meta.get(BOUND))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        _common(node, order)
        if node.op == "call_function":
            if bound:
                _bound(node)
            else:
                _symbolic(node, mesh)
            if deep:
                _deep(node)


def signature(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What no pass may change: names of the placeholders; shape and dtype of every output."""
    outs = []
    for value in edit.output_node(gm).args[0]:  # type: ignore[union-attr]
        tensor = isinstance(value, fx.Node) and edit.is_tensor(value)
        outs.append((edit.shape(value), value.meta["val"].dtype) if tensor else value)  # type: ignore[arg-type, union-attr]
    return tuple(n.target for n in edit.placeholders(gm)), tuple(outs)


def _common(node: fx.Node, order: dict[fx.Node, int]) -> None:
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        raise PassError(f"{node.name} is a {node.op}; a local graph has placeholders, constants and calls only")
    for used in node.all_input_nodes:
        if order[used] > order[node]:
            raise PassError(f"{node.name} reads {used.name}, which comes after it")
    if node.op == "output" or edit.is_index_arithmetic(node):
        return
    if "val" not in node.meta:
        raise PassError(f"{node.name} ({_title(node)}) has no meta['val']; give it the tensor of its local shape")
    phase = node.meta.get("phase")
    if node.op != "call_function":
        return
    if phase not in (FORWARD, BACKWARD):
        raise PassError(f"{node.name} ({_title(node)}) has phase {phase!r}; write {FORWARD!r} or {BACKWARD!r}")
    for used in node.all_input_nodes:
        if phase == FORWARD and used.meta.get("phase") == BACKWARD:
            raise PassError(f"forward node {node.name} reads backward node {used.name}")


def _symbolic(node: fx.Node, mesh: Mesh | None) -> None:
    if node.target in STARTS or node.target is WAIT or node.target in COPIES:
        raise PassError(f"{node.name} is {op_name(node)}, but the graph is not bound; passes before bind are symbolic")
    if node.target not in c.SYMBOLIC:
        return
    args = edit.symbolic_args(node)
    name = f"{node.name} ({_title(node)})"
    axis = args[0] if node.target is c.coordinate else args[1]
    if mesh is not None and axis not in mesh.names:
        raise PassError(f"{name} names axis {axis!r}; mesh {mesh} has {', '.join(mesh.names)}")
    if node.target is c.coordinate:
        return
    x, _, parts, *rest = args
    if not isinstance(x, fx.Node) or not edit.is_tensor(x):
        raise PassError(f"{name} has operand {x!r}, which is not one tensor")
    if mesh is not None and parts != mesh.sizes[mesh.axis(axis)]:
        raise PassError(f"{name} says axis {axis} has {parts} parts; mesh {mesh} has {mesh.sizes[mesh.axis(axis)]}")
    if parts < 1:
        raise PassError(f"{name} has {parts} parts; an axis has at least 1")
    want = list(edit.shape(x))
    if node.target in (c.all_reduce, c.reduce_scatter) and rest[-1] not in _REDUCES:
        raise PassError(f"{name} reduces by {rest[-1]!r}; write one of {', '.join(_REDUCES)}")
    for dim in rest[:1] if node.target is not c.all_to_all else rest:
        if node.target is not c.all_reduce and not (isinstance(dim, int) and 0 <= dim < len(want)):
            raise PassError(f"{name} works on dim {dim}; its operand has shape {tuple(want)}")
    if node.target in (c.reduce_scatter, c.local_chunk, c.all_to_all):
        if want[rest[0]] % parts:
            raise PassError(f"{name} cuts dim {rest[0]} of shape {tuple(want)} into {parts} equal parts")
        want[rest[0]] //= parts
    if node.target in (c.all_gather, c.all_to_all):
        want[rest[-1]] *= parts
    _agree(node, tuple(want), x.meta["val"].dtype)


def _bound(node: fx.Node) -> None:
    if node.target in c.SYMBOLIC:
        raise PassError(f"{node.name} ({_title(node)}) is symbolic, but the graph is bound; bind lowers all of them")
    starts = (*STARTS, IN_PLACE_REDUCE, GATHER_INTO)
    wait, what = (ARRIVED, "arrived") if node.target in COPIES else (WAIT, "wait_tensor")
    if node.target in starts or node.target in COPIES:
        if not node.users:
            raise PassError(f"{node.name} ({_title(node)}) is never waited for")
        for user in node.users:
            if user.target is not wait:
                raise PassError(f"{user.name} reads {node.name} ({_title(node)}) without {what}")
        if len(node.users) > 1:
            names = ", ".join(u.name for u in node.users)
            raise PassError(f"{node.name} ({_title(node)}) is waited for {len(node.users)} times: {names}")
    if node.target is WAIT and node.args[0].target not in starts:  # type: ignore[union-attr, operator]
        raise PassError(f"{node.name} waits for {node.args[0]}, which is no collective")
    if node.target is ARRIVED and node.args[0].target not in COPIES:  # type: ignore[union-attr, operator]
        raise PassError(f"{node.name} waits for {node.args[0]}, which is no copy to or from the host")


def _deep(node: fx.Node) -> None:
    if node.target in c.SYMBOLIC or edit.is_index_arithmetic(node):
        return

    def value(n: fx.Node) -> Any:
        return 0 if edit.is_index_arithmetic(n) else n.meta["val"]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    try:
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise PassError(f"{node.name} ({_title(node)}) cannot run on its operands' shapes: {error}") from error
    said = node.meta["val"]
    pairs = zip(found, said) if isinstance(found, (tuple, list)) else [(found, said)]
    for got, has in pairs:
        if isinstance(got, torch.Tensor) and isinstance(has, torch.Tensor):
            if (got.shape, got.dtype) != (has.shape, has.dtype):
                raise PassError(
                    f"{node.name} ({_title(node)}) says {has.dtype} {tuple(has.shape)}; "
                    f"it computes {got.dtype} {tuple(got.shape)}"
                )


def _agree(node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    has = node.meta["val"]
    if not isinstance(has, torch.Tensor) or (tuple(has.shape), has.dtype) != (shape, dtype):
        text = f"{has.dtype} {tuple(has.shape)}" if isinstance(has, torch.Tensor) else repr(has)
        raise PassError(f"{node.name} ({_title(node)}) says {text}; its operand gives {dtype} {shape}")


def _title(node: fx.Node) -> str:
    return op_name(node) if node.op == "call_function" else node.op
