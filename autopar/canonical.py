"""One form per idea: clean-up of a captured graph, before rules, planner and passes see it.

`canonicalise` rebuilds the graph in one sweep (linear in its size), forward ops first, then backward ops:

* asserts, `detach`, `alias`, `lift_fresh`, and copies, casts, views and slices that change nothing disappear;
* `t`, `transpose`, `permute` become one `permute`; `_unsafe_view`, `reshape` become `view`; a view that undoes another
  disappears;
* `aten.rand` and `aten.randn` become `autopar::uniform` and `normal` of the graph's seed, numbered in graph order;
* equal pure ops of one phase are computed once; dead code is removed;
* every node gets its value, phase, module path and address.

The graph speaks of shapes, not of strides: whoever runs it makes every result contiguous, or reads `view` as reshape.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import autopar.ops  # noqa: F401  (registers autopar::uniform and normal)
from autopar.errors import CaptureError
from autopar.graph import BACKWARD, FORWARD, op_name, set_addresses

aten = torch.ops.aten

_DROP = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._linalg_check_errors.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_IDENTITY = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.clone.default,
    aten.contiguous.default,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_copy.default}
_RANDOM = {
    aten.rand.default: torch.ops.autopar.uniform.default,
    aten.randn.default: torch.ops.autopar.normal.default,
}


@dataclass(frozen=True)
class Canonical:
    """What `canonicalise` made. `placeholders` and `results` are the new nodes in the order of its arguments."""

    graph: fx.Graph
    placeholders: list[fx.Node]
    results: list[fx.Node | None]
    seed: fx.Node | None


def canonicalise(
    graph: fx.Graph,
    placeholders: Sequence[tuple[fx.Node, str]],
    results: Sequence[fx.Node | None],
    num_forward: int,
) -> Canonical:
    """Clean `graph`; it is not changed itself.

    Args:
        graph: functional ATen ops; `meta["val"]` on every node, `meta["module"]` where known.
        placeholders: those to keep, in their new order, each with its new name (made an identifier). The seed of a
            random graph follows them.
        results: what the new graph returns, as one flat tuple.
        num_forward: so many of `results` belong to the forward; what they need is the forward, all else the backward.

    Raises:
        CaptureError: the graph has a random op without a counter-based form, or a size that depends on values.
    """
    forward = [n for n in results[:num_forward] if n is not None]
    builder = _Builder(_ancestors(forward))
    for node, name in placeholders:
        builder.env[node] = _placeholder(builder.new, name, node.meta["val"])
    alive = _ancestors([n for n in results if n is not None])
    builder.sweep([n for n in graph.nodes if n in alive])
    made = [None if n is None else builder.env[n] for n in results]
    builder.new.output(tuple(made))
    _finish(builder.new, [n for n in made[:num_forward] if n is not None])
    return Canonical(builder.new, [builder.env[n] for n, _ in placeholders], made, builder.seed)


def _placeholder(graph: fx.Graph, name: str, val: torch.Tensor) -> fx.Node:
    node = graph.placeholder(re.sub(r"\W+", "_", name).strip("_"))
    node.meta = {"val": val, "phase": FORWARD, "module": ""}
    return node


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """`nodes` and all they are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


class _Builder:
    """The new graph while it is being made. `env` maps old nodes to new ones."""

    def __init__(self, needed: set[fx.Node]) -> None:
        self.needed = needed
        self.new = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.known: dict[Any, fx.Node] = {}
        self.streams = 0
        self.seed: fx.Node | None = None

    def sweep(self, nodes: list[fx.Node]) -> None:
        """Rebuild `nodes`, those that the forward needs first."""
        first_random = next((n for n in nodes if n.target in _RANDOM), None)
        if first_random is not None:
            with first_random.meta["val"].fake_mode:
                val = torch.empty((), dtype=torch.int64, device=first_random.meta["val"].device)
            self.seed = _placeholder(self.new, "seed", val)
        for phase in (FORWARD, BACKWARD):
            for node in nodes:
                if node.op in ("get_attr", "call_function") and (node in self.needed) == (phase == FORWARD):
                    made = self.visit(node, phase)
                    if made is not None:
                        self.env[node] = made

    # ---- one node ----------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node, phase: str) -> fx.Node | None:
        if node.op == "get_attr":
            return self.emit(node, phase, "get_attr", node.target, (), {}, pure=True)
        target: Any = node.target
        if target in _DROP:
            return None
        args = fx.map_arg(node.args, self.env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.env.__getitem__)
        if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat)):
            raise CaptureError(
                f"{where(node)}: {op_name(node)} gives a number that depends on the values of a tensor, so sizes are "
                f"not known before running; keep it a tensor (torch.where, masks) instead of .item() or int()"
            )
        if not isinstance(target, torch._ops.OpOverload) and target is not operator.getitem:
            raise CaptureError(
                f"{where(node)}: {target} holds graphs of its own (torch.cond, while_loop, scan and the like), which "
                f"cannot be split; use torch.where for a choice, a Python loop for a repetition"
            )
        if target in _RANDOM and phase == BACKWARD:
            raise CaptureError(
                f"{where(node)}: the backward draws random numbers anew (activation checkpointing of a part with "
                f"dropout), so its mask would not be that of the forward; switch the checkpointing off"
            )
        if target in _RANDOM:
            stream, self.streams = self.streams, self.streams + 1
            size: Any = args[0]
            return self.emit(
                node, phase, "call_function", _RANDOM[target], (self.seed, stream, list(size)), {}, pure=False
            )
        if _is_random(target, args, kwargs):
            raise CaptureError(
                f"{where(node)}: the random op {op_name(node)} has no form that is independent of how tensors are "
                f"split; build it from torch.rand or torch.randn"
            )
        simple = self.simplify(node, target, args, kwargs)
        if isinstance(simple, fx.Node):
            return simple
        target, args, kwargs = simple
        return self.emit(node, phase, "call_function", target, args, kwargs, pure=True)

    def simplify(
        self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node | tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The node that `node` equals, or the canonical form of its call."""
        val: Any = node.meta.get("val")
        if target in _IDENTITY:
            return args[0]
        if target in _CAST and _same(val, args[0]):
            return args[0]
        if target in _VIEWS:
            source = args[0]
            if source.op == "call_function" and source.target is aten.view.default:
                if tuple(source.args[0].meta["val"].shape) == tuple(val.shape):
                    return source.args[0]
            if _same_shape(val, source):
                return source
            return aten.view.default, (source, list(val.shape)), {}
        if target in _PERMUTE:
            source = args[0]
            order = _PERMUTE[target](source.meta["val"].dim(), *args[1:])
            if source.op == "call_function" and source.target is aten.permute.default:
                order = [source.args[1][d] for d in order]
                source = source.args[0]
            if order == list(range(len(order))):
                return source
            return aten.permute.default, (source, order), {}
        if target is aten.cat.default:
            # an empty 1-D operand stands for nothing, whatever the shape of the others (an old rule of cat)
            parts = [p for p in args[0] if tuple(p.meta["val"].shape) != (0,)]
            if len(parts) == 1 and _same(val, parts[0]):
                return parts[0]
            return target, (parts or args[0], *args[1:]), kwargs
        if target in _SHAPE_ONLY and _same_shape(val, args[0]):
            return args[0]
        if target is aten.slice_scatter.default and _same(val, args[1]):  # all of it is written
            return args[1]
        if target is aten.expand.default:
            return target, (args[0], list(val.shape)), {}
        if target in _LAZY:
            return _LAZY[target], args, kwargs
        if target is aten.sum.default:
            return aten.sum.dim_IntList, (args[0], list(range(args[0].meta["val"].dim()))), kwargs
        if target is aten.copy.default:  # what was there before does not matter
            source = args[1]
            if source.meta["val"].dtype != val.dtype:
                return target, args, kwargs
            return source if _same_shape(val, source) else (aten.expand.default, (source, list(val.shape)), {})
        if target in _STRIDED:
            source, size, stride, offset = _STRIDED[target](args)
            if _covers(node.args[0], size, stride, offset):
                return source if _same_shape(val, source) else (aten.view.default, (source, list(val.shape)), {})
            raise CaptureError(
                f"{where(node)}: {op_name(node)} reads memory by strides, which means nothing once tensors are split; "
                f"use view, reshape, unfold or slices"
            )
        return target, args, kwargs

    def emit(
        self, node: fx.Node, phase: str, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any],
        pure: bool,
    ) -> fx.Node:  # fmt: skip
        key = (FORWARD if op == "get_attr" else phase, target, _freeze(args), _freeze(kwargs)) if pure else None
        if key in self.known:
            return self.known[key]
        made = self.new.create_node(op, target, args, dict(kwargs), name=node.name if op == "get_attr" else None)
        made.meta = {k: node.meta[k] for k in ("val", "stack_trace", "seq_nr") if k in node.meta}
        made.meta["phase"] = phase
        made.meta["module"] = _module(node, made)
        if key is not None:
            self.known[key] = made
        return made


def _is_random(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers inside. Attention ops do so only with dropout."""
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for i, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[i] if i < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


def _same_shape(val: Any, source: fx.Node) -> bool:
    return tuple(val.shape) == tuple(source.meta["val"].shape)


def _same(val: Any, source: fx.Node) -> bool:
    """A cast that changes neither type nor device nor shape."""
    old = source.meta["val"]
    return val.dtype == old.dtype and val.device == old.device and val.shape == old.shape


_CAST = {aten._to_copy.default, aten.to.dtype}
_SHAPE_ONLY = {
    aten.expand.default,
    aten.slice.Tensor,
    aten.slice_backward.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}


#: Views that only set a bit, which neither collectives nor views of complex numbers as real ones can read -> the op.
_LAZY = {aten._conj.default: aten._conj_physical.default, aten._neg_view.default: aten.neg.default}

#: Ops on strides -> (what the result equals if all of the base is covered, size, stride, offset).
_STRIDED: dict[Any, Callable[[tuple[Any, ...]], tuple[Any, Any, Any, Any]]] = {
    aten.as_strided.default: lambda a: (a[0], a[1], a[2], a[3] if len(a) > 3 else None),
    aten.as_strided_scatter.default: lambda a: (a[1], a[2], a[3], a[4] if len(a) > 4 else None),
}


def _covers(base: Any, size: Sequence[int], stride: Sequence[int], offset: int | None) -> bool:
    """Whether sizes and strides name every element of a contiguous base, in its order."""
    val, step = base.meta["val"], 1
    for n, s in zip(reversed(size), reversed(stride)):
        if n != 1 and s != step:
            return False
        step *= n
    return step == val.numel() and not offset and val.is_contiguous()


def _swapped(n: int, a: int = 0, b: int = 1) -> list[int]:
    order = list(range(n))
    if n:
        order[a], order[b] = order[b], order[a]
    return order


_PERMUTE: dict[Any, Callable[..., list[int]]] = {
    aten.t.default: lambda n: _swapped(n) if n == 2 else list(range(n)),
    aten.transpose.int: _swapped,
    aten.permute.default: lambda n, dims: [d % n for d in dims],
}


def _freeze(arg: Any) -> Any:
    """A hashable twin; the type tells 1 from True and from 1.0."""
    if isinstance(arg, (list, tuple)):
        return tuple(_freeze(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(arg.items()))
    if isinstance(arg, (bool, int, float, complex)):
        return type(arg), repr(arg)
    return arg


# ---- after the sweep -----------------------------------------------------------------------------------------------


def _finish(graph: fx.Graph, forward: list[fx.Node]) -> None:
    """Dead code, then phases and addresses; backward ops after forward ops."""
    alive = _ancestors([graph.output_node()])
    for node in reversed(list(graph.nodes)):
        if node not in alive and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)
    needed = _ancestors(forward)
    output = graph.output_node()
    late: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr"):
            node.meta["phase"] = FORWARD if node in needed else BACKWARD
            if node not in needed:
                late.append(node)
    for node in late:  # moving them all to the end keeps their order
        output.prepend(node)
    set_addresses(graph)
    graph.lint()


#: Where a traced op carries {anything: (path of its module, ...)}; AOTAutograd copies it to backward ops under "fwd_".
MODULE_KEY = "nn_module_stack"


def module_path(node: fx.Node) -> str | None:
    """Path of the module whose forward the node is in, or is the backward of; None if it carries none."""
    stack = node.meta.get(MODULE_KEY) or node.meta.get(f"fwd_{MODULE_KEY}")
    return str(list(stack.values())[-1][0]) if stack else None


def set_modules(graph: fx.Graph) -> None:
    """`meta["module"]`, as the user's path, on every op that carries one."""
    for node in graph.nodes:
        path = module_path(node)
        if path is not None:
            node.meta["module"] = path


def _module(node: fx.Node, made: fx.Node) -> str:
    path = node.meta.get("module")
    if path is None:  # a sum of gradients: it belongs where its first operand comes from
        inputs = [n for n in made.all_input_nodes if n.op == "call_function"] or made.all_input_nodes
        path = inputs[0].meta.get("module", "") if inputs else ""
    return path


def where(node: fx.Node) -> str:
    """The user's line of a node, else its module, for messages."""
    trace = str(node.meta.get("stack_trace") or "")
    lines = re.findall(r'File "([^"]+)", line (\d+)', trace)
    if lines:
        return f"{lines[-1][0]}:{lines[-1][1]}"
    return f"module {node.meta.get('module') or '(root)'}"
