"""What the backward of a pipeline reads where it computes ops of the forward again: which values that takes, and when.

Stages are cut from the program without copies, and each makes its own (`autopar.recompute`). So a copy is where its op
is; what an op of the backward reads through copies is what its stage keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from torch import fx

from autopar.graph import Program, Value, pattern, resolve
from autopar.pipeline.regions import regions_of
from autopar.recompute import KEEP, original


class Copies:
    """The copies in a program, which `recomputed` has made. Nodes of the program before that are known by their names.

    Attributes:
        of: address of a copy -> that of the op.
    """

    def __init__(self, program: Program) -> None:
        self._regions = regions_of(program)
        self._nodes = {n.name: n for n in program.gm.graph.nodes}
        addresses = (str(n.meta.get("address", "")) for n in program.gm.graph.nodes)
        self.of = {a: op for a in addresses if (op := original(a)) is not None}

    def values(self, node: fx.Node) -> list[Value]:
        """What of the forward must be kept for an op of the backward."""
        return list(self._regions.reads(self._nodes[node.name]).values)

    def early(self, sent: Collection[fx.Node]) -> set[fx.Node]:
        """The copies, and what else depends on no gradient, that gradients which are sent back take."""
        found: set[fx.Node] = set()
        stack = [self._nodes[n.name] for n in sent]
        while stack:
            for other in stack.pop().all_input_nodes:
                maker = resolve(other).node
                if maker in self._regions.helpers and maker not in found:
                    found.add(maker)
                    stack.append(maker)
        return found

    def waits(self, node: fx.Node, early: Collection[fx.Node]) -> list[Value]:
        """As `values`, of an op that runs when gradients have been sent: the copies made for these are there."""
        found: dict[Value, None] = {}
        seen: set[fx.Node] = set()
        stack = [self._nodes[node.name]]
        while stack:
            for other in stack.pop().all_input_nodes:
                value, regions = resolve(other), self._regions
                if value.node in regions.helpers and value.node not in early:
                    if value.node not in seen:
                        seen.add(value.node)
                        stack.append(value.node)
                elif value.node.op == "call_function" and not (
                    value.node in regions.late or value.node in regions.free or value.node in regions.parameter
                ):
                    found[value] = None
        return list(found)


def starred(saved: Mapping[str, str | None]) -> dict[str, str]:
    """What a plan says (`Plan.saved`) so that every op is done as given: starred where most layers agree.

    saved: address of every op of the forward -> what is to be said of it, or None.
    """
    groups: dict[str, dict[str, str | None]] = {}
    for address, how in saved.items():
        groups.setdefault(pattern(address), {})[address] = how
    found: dict[str, str] = {}
    for star, members in groups.items():
        said, count = Counter(members.values()).most_common(1)[0]
        if said is not None and 2 * count > len(members):
            found[star] = said
            found.update({address: how or KEEP for address, how in members.items() if how != said})
        else:
            found.update({address: how for address, how in members.items() if how is not None})
    return found


__all__ = ["Copies", "starred"]
