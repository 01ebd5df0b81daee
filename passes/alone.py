"""Results of a graph that lie in memory of their own: of those, the runtime need not look at each call who else has it.

The rest may share memory with what the graph was given (views), with another result, or with what a collective or an op
of ours returns, of which the schema does not tell.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from autopar.passes import edit
from autopar.passes.inplace import aliased

#: `meta` of a graph: positions of such results.
ALONE = "alone"


def alone(gm: fx.GraphModule) -> frozenset[int]:
    """Positions of results that kernels of torch make, and that share memory with no operand and no other result."""
    (results,) = edit.output_node(gm).args
    memory = {i: _memory(r) for i, r in enumerate(results) if isinstance(r, fx.Node)}  # type: ignore[arg-type]
    shared = Counter(memory.values())
    return frozenset(i for i, m in memory.items() if _made(m[0]) and shared[m] == 1)


def _memory(node: fx.Node) -> tuple[fx.Node, Any]:
    """The op that made the memory of a tensor, and which of its results that is."""
    while (base := aliased(node)) is not None:
        if edit.is_pick(node) and base.op == "call_function" and aliased(base) is None:
            return base, node.args[1]
        node = base
    return node, None


def _made(node: fx.Node) -> bool:
    """Whether a kernel of torch allocates what it returns."""
    target = node.target
    return node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


__all__ = ["ALONE", "alone"]
