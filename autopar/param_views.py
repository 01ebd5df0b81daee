"""Give the backward its own views of parameters.

The backward of a linear layer reads the forward's transposed weight. Taken literally, a weight that is gathered for the
forward would be kept for the backward; with its own chain of views (and casts) down to the parameter, the backward can
gather again (ZeRO-3), and a pipeline stage or PACI can read the current weight.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar.graph import BACKWARD, FORWARD, LOOKS, is_op, operands


def separate_parameter_views(graph: fx.Graph, parameters: set[fx.Node]) -> int:
    """Copy chains of views from `parameters` (placeholders) into the backward where the backward reads them.

    Every node must have its phase. Returns how many nodes were added.
    """
    derived: set[fx.Node] = set()
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node, before: fx.Node) -> fx.Node:
        if node in parameters:
            return node
        if node not in copies:
            source = copy(operands(node)[0].node, before)
            with graph.inserting_before(before):
                new = graph.node_copy(node, lambda arg: source)
            new.meta = {**node.meta, "phase": BACKWARD}
            copies[node] = new
        return copies[node]

    for node in list(graph.nodes):
        if not is_op(node):
            continue
        if node.meta["phase"] == BACKWARD:
            for used in node.all_input_nodes:
                if used in derived:
                    node.replace_input_with(used, copy(used, node))
        elif node.meta["phase"] == FORWARD and node.target in LOOKS:
            source = operands(node)
            one = len(source) == 1 and isinstance(node.meta["val"], torch.Tensor)  # a split is left to the forward
            if one and (source[0].node in parameters or source[0].node in derived):
                derived.add(node)
    return len(copies)
