"""Small tools that every graph pass needs: copy, read, emit, reorder.

Passes see a local graph: placeholders, `get_attr` constants, `call_function` nodes, one flat output tuple. A node that
stands for a Python number (coordinates and arithmetic on them) is *index arithmetic*: it carries no tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from autopar.errors import PassError
from autopar.graph import MOVES as GRAPH_MOVES
from autopar.graph import VIEWS as GRAPH_VIEWS
from autopar.graph import Draft
from autopar.passes import collectives as c

aten = torch.ops.aten

#: Views, and the picking of one of several results.
VIEWS: frozenset[Any] = GRAPH_VIEWS | {operator.getitem}
#: Views that may leave strides.
STRIDED = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.select.int,
        aten.diagonal.default,
        aten.unfold.default,
        operator.getitem,
    }
)
#: Copies if the operand has strides, else views.
MAYBE_COPIES = (aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default)
#: Ops that copy or rearrange elements (perhaps to another dtype) and compute nothing.
MOVES = VIEWS | GRAPH_MOVES | {c.local_chunk}
#: Moves that make no more of a tensor than there is.
CUTS = (VIEWS - {aten.expand.default, aten.unfold.default, operator.getitem}) | {*MAYBE_COPIES, c.local_chunk}


def finished(gm: fx.GraphModule) -> fx.GraphModule:
    """A plain GraphModule, its code written, for the runtime and for compilers."""
    new = fx.GraphModule(gm, gm.graph)
    new.meta.update(gm.meta)
    return new


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own graph and node meta; constants are shared."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    return module(gm, graph)


def module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module for `graph` with the constants and the `meta` of `root`."""
    new = Draft(root, graph)
    new.meta.update(root.meta)
    return new


def output_node(gm: fx.GraphModule) -> fx.Node:
    """The output node.

    Raises:
        PassError: there is none, or its argument is not one flat tuple.
    """
    last = next((n for n in gm.graph.nodes if n.op == "output"), None)
    if last is None or len(last.args) != 1 or not isinstance(last.args[0], (tuple, list)):
        raise PassError("a local graph ends in one output node that returns one flat tuple; this one does not")
    for i, value in enumerate(last.args[0]):
        if isinstance(value, (tuple, list, dict)):
            raise PassError(f"output {i} of the local graph is a {type(value).__name__}; outputs are one flat tuple")
    return last


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """Placeholders, in order."""
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_index_arithmetic(node: fx.Node) -> bool:
    """Whether the node is a Python number made from coordinates."""
    if node.op != "call_function":
        return False
    if node.target is c.coordinate:
        return True
    known = getattr(node.target, "__module__", "") in ("_operator", "builtins", "math")
    return known and all(is_index_arithmetic(n) for n in node.all_input_nodes)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Local shape of a tensor node."""
    return tuple(node.meta["val"].shape)


def nbytes(node: fx.Node) -> int:
    """Bytes of a node's tensors on one rank (0 for numbers)."""
    val = node.meta.get("val")
    vals = val if isinstance(val, (tuple, list)) else [val]
    return sum(v.numel() * v.dtype.itemsize for v in vals if isinstance(v, torch.Tensor))


def symbolic_args(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of a symbolic node, all positional."""
    target: Any = node.target
    code = target.__code__
    names = code.co_varnames[: code.co_argcount]
    missing = [n for n in names[len(node.args) :] if n not in node.kwargs]
    if missing or len(node.args) + len(node.kwargs) != len(names):
        raise PassError(f"{node.name}: {target.__name__} takes ({', '.join(names)}), got {node.format_node()}")
    return tuple(node.args) + tuple(node.kwargs[n] for n in names[len(node.args) :])


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Append an op; `meta["val"]` by running it on meta tensors, phase and marks from `like`."""
    node = graph.call_function(target, args, kwargs)
    if target in c.SYMBOLIC:
        dtype = args[0].meta["val"].dtype
        node.meta["val"] = torch.empty(c.result_shape(node), dtype=dtype, device="meta")
    else:
        found = target(*fx.map_arg(args, lambda n: n.meta["val"]), **fx.map_arg(kwargs, lambda n: n.meta["val"]))
        node.meta["val"] = torch.empty(found.shape, dtype=found.dtype, device="meta")
    inherit(node, like)
    return node


def inherit(node: fx.Node, like: fx.Node) -> None:
    """Give `node` the phase, the module and the marks of `like`."""
    node.meta.update({k: like.meta[k] for k in ("phase", "module", "regather", "keep") if k in like.meta})


def contiguous(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """Append a copy of `x` in contiguous memory."""
    return call(graph, aten.clone.default, x, like=x, memory_format=torch.contiguous_format)


def view(graph: fx.Graph, x: fx.Node, to: Sequence[int]) -> fx.Node:
    """Append a view of contiguous `x`, unless it has that shape already."""
    base = x
    while base.target is aten.view.default:
        base = base.args[0]  # type: ignore[assignment]
    if shape(base) == tuple(to):
        return base
    return call(graph, aten.view.default, base, list(to), like=x)


def permute(graph: fx.Graph, x: fx.Node, order: Sequence[int]) -> fx.Node:
    """Append a permutation and the copy that makes it contiguous.

    Where it moves only dims of size one, it is a view.
    """
    kept = [d for d in order if shape(x)[d] != 1]
    if kept == sorted(kept):
        return view(graph, x, [shape(x)[d] for d in order])
    return contiguous(graph, call(graph, aten.permute.default, x, list(order), like=x))


def remove_dead(gm: fx.GraphModule) -> int:
    """Drop calls and constants nobody reads (local graphs have no side effects); their number."""
    dead = [n for n in reversed(gm.graph.nodes) if n.op not in ("placeholder", "output")]
    count = 0
    for node in dead:
        if not node.users:
            gm.graph.erase_node(node)
            count += 1
    return count


def rebuild(gm: fx.GraphModule, order: Iterable[fx.Node]) -> fx.GraphModule:
    """A new module with the same nodes in another order (placeholders first, output last, users after operands)."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in order:
        env[node] = graph.node_copy(node, lambda n: env[n])
    return module(gm, graph)


def stable_sort(gm: fx.GraphModule, key: Callable[[fx.Node], Any] | None = None) -> fx.GraphModule:
    """Nodes in an order where operands come before users, otherwise as they stand (or by `key`).

    Raises:
        PassError: nodes wait for each other.
    """
    nodes = list(gm.graph.nodes)
    if key is not None:
        nodes.sort(key=key)
    done: dict[fx.Node, None] = {}

    def place(node: fx.Node) -> None:
        stack = [(node, iter(node.all_input_nodes))]
        above = {node}
        while stack:
            top, inputs = stack[-1]
            nxt = next((n for n in inputs if n not in done), None)
            if nxt is not None:
                if nxt in above:
                    raise PassError(f"{nxt.name} and {top.name} wait for each other")
                above.add(nxt)
                stack.append((nxt, iter(nxt.all_input_nodes)))
                continue
            stack.pop()
            above.discard(top)
            done.setdefault(top)

    for node in nodes:
        if node.op == "placeholder":
            done.setdefault(node)
    for node in nodes:
        if node.op != "output" and node not in done:
            place(node)
    return rebuild(gm, [*done, output_node(gm)])


def may_have_strides(node: fx.Node) -> bool:
    """Whether the tensor is a view with strides. Results of ops that compute are taken for contiguous."""
    while node.target in VIEWS and node.target not in STRIDED:
        node = node.all_input_nodes[0]
    if is_pick(node):
        return node.args[0].target in VIEWS  # type: ignore[union-attr]
    return node.target in STRIDED


def is_pick(node: fx.Node) -> bool:
    """Whether the node picks one result of an op that has several."""
    return node.op == "call_function" and node.target is operator.getitem
