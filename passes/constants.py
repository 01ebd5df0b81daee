"""What depends on nothing but shapes is computed once, when the graph is made: positions, masks, tables. On the CPU.

Models compute these anew at every step, from `arange` and its kin: dozens of small ops. Only small results are kept,
and none that is handed out, for who gets it may write to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.passes import edit

#: Bytes of a tensor that is kept, at most.
LARGEST = 1 << 20


def constants(gm: fx.GraphModule, largest: int = LARGEST) -> fx.GraphModule:
    """Rewrite a bound, functional local graph as described above, on the device that it names. `gm` is changed.

    largest: bytes of a tensor up to which it is kept.
    """
    known: dict[fx.Node, Any] = {}
    out = edit.output_node(gm)
    leaves = _handed_out(out)
    with torch.no_grad():
        for node in gm.graph.nodes:
            if node not in leaves and _is_constant(node, known) and edit.nbytes(node) <= largest:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for node, value in known.items():
        if isinstance(value, torch.Tensor) and any(u not in known for u in node.users):
            name = f"constant_{node.name}"
            gm.register_buffer(name, value.clone())  # its own memory, not a piece of something larger
            with gm.graph.inserting_before(node):
                kept = gm.graph.get_attr(name)
            kept.meta["val"] = node.meta["val"]
            edit.inherit(kept, node)
            node.replace_all_uses_with(kept, delete_user_cb=lambda u: u not in known)
    edit.remove_dead(gm)
    gm.recompile()
    return gm


def _is_constant(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    if node.op != "call_function" or not all(n in known for n in node.all_input_nodes):
        return False
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or target._schema.is_mutable:
        return False
    seeded = torch.Tag.nondeterministic_seeded in target.tags or "empty" in target._schema.name
    return edit.is_tensor(node) and not seeded


def _handed_out(output: fx.Node) -> set[fx.Node]:
    """Results of the graph, and what they may be views of."""
    found: set[fx.Node] = set()
    stack = list(output.all_input_nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node.target in edit.VIEWS or node.target in edit.MAYBE_COPIES:
                stack += node.all_input_nodes
    return found


__all__ = ["LARGEST", "constants"]
