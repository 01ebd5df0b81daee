"""The program in which the backward computes again what the forward does not keep for it.

A plan names ops of the forward (`Plan.saved`: "recompute"). Their results are not handed over: the backward gets its
own copy of each such op, right before its first reader, from operands that are kept, or copied in their turn. All that
comes later (layouts, prices, memory, passes) sees ordinary ops of the backward, whose communication and memory are
those of any other; a parameter that is gathered again for the backward is gathered for them too.

A copy of a random op draws the same numbers: they depend on the step's seed and the op's own number, not on when it
runs (`autopar/ops.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import fx

from autopar.errors import PlanError
from autopar.graph import BACKWARD, FORWARD, MOVES, Draft, Program, is_op, pattern

#: What a plan may say of the result of an op of the forward that the backward reads: it is computed again, or kept, as
#: all that is not named (of one layer, where a star says something else of all).
RECOMPUTE, KEEP = "recompute", "keep"
SAVED = (RECOMPUTE, KEEP)
#: Programs that are kept of one.
MOST = 4
#: Ends the address of a copy.
AGAIN = "~"


def recomputed(program: Program, saved: Mapping[str, str]) -> Program:
    """`program` with the backward's copies of the ops that `saved` names; the same program if it names none.

    saved: address of an op of the forward, exact or starred, -> one of SAVED.

    Raises:
        PlanError: an address names no op of the forward, or says something else.
    """
    if not saved:
        return program
    key = frozenset(saved.items())
    if key not in program.derived:
        while len(program.derived) >= MOST:  # a search tries many, and comes back to few
            del program.derived[next(iter(program.derived))]
        program.derived[key] = _rewritten(program, _nodes(program, saved))
    return program.derived[key]


def present(program: Program, saved: Mapping[str, str]) -> dict[str, str]:
    """Of `saved`, made for another size of the model, what names ops of the forward of this one."""
    forward = {n.meta["address"] for n in program.gm.graph.nodes if is_op(n) and n.meta["phase"] == FORWARD}
    known = forward | {pattern(address) for address in forward}
    return {address: how for address, how in saved.items() if address in known}


def copy_of(address: str) -> str:
    """The address of the backward's copy of an op of the forward."""
    return f"{BACKWARD}{address.removeprefix(FORWARD)}{AGAIN}"


def original(address: str) -> str | None:
    """The address of the op of which `address` is a copy; None if it is none."""
    if not address.endswith(AGAIN):
        return None
    return f"{FORWARD}{address.removeprefix(BACKWARD).removesuffix(AGAIN)}"


def _nodes(program: Program, saved: Mapping[str, str]) -> set[fx.Node]:
    unused = dict.fromkeys(saved)
    found: set[fx.Node] = set()
    for node in program.gm.graph.nodes:
        if not is_op(node) or node.meta["phase"] != FORWARD:
            continue
        address = node.meta["address"]
        key = address if address in saved else pattern(address)
        unused.pop(address, None)
        unused.pop(pattern(address), None)
        if saved.get(key) == RECOMPUTE:
            found.add(node)
    for address, how in saved.items():
        if how not in SAVED:
            raise PlanError(f"saved of {address} is {how!r}; it may be {', '.join(SAVED)}")
    if unused:
        raise PlanError(
            f"saved names {next(iter(unused))!r}, which is no op of the forward of this program; those that there are "
            'stand under "choices" in the plan'
        )
    return found


def _rewritten(program: Program, again: Collection[fx.Node]) -> Program:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    copies: dict[fx.Node, fx.Node] = {}  # node of the forward -> what the backward reads in its place
    early = _early(program)
    given = {s.node for s in program.of_kind("param")}

    def wanted(node: fx.Node) -> fx.Node:
        """What the backward reads for a node of the old graph, made if need be."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in copies:
                stack.pop()
                continue
            if top.op != "call_function" or (top.meta.get("phase") == BACKWARD and top not in early):
                copies[top] = env[top]
                continue
            if top in early:
                missing = [n for n in top.all_input_nodes if n not in copies]
                stack += missing
                if not missing:
                    env[top] = copies[top] = graph.node_copy(top, lambda n: copies[n])
                continue
            picked = not is_op(top)
            if not (picked or top in again or top.target in MOVES):
                copies[top] = env[top]
                continue
            missing = [n for n in top.all_input_nodes if n not in copies]
            if missing:
                stack += missing
                continue
            # Another look at a parameter is had again: else it would keep what has been gathered for the forward.
            same = all(copies[n] is env[n] and n.name not in given for n in top.all_input_nodes)
            if top not in again and same:
                copies[top] = env[top]
                continue
            args, kwargs = fx.map_arg((top.args, top.kwargs), lambda n: copies[n])
            made = graph.create_node(top.op, top.target, args, kwargs, f"{top.name}_again")
            made.meta.update(top.meta, phase=BACKWARD)
            if not picked:
                made.meta["address"] = copy_of(top.meta["address"])
            copies[top] = made
        return copies[node]

    for node in program.gm.graph.nodes:
        if node in early:
            continue  # when it is wanted
        for n in node.all_input_nodes if node.op == "output" else ():
            if n in early:
                wanted(n)
        late = node.op == "call_function" and node.meta.get("phase") == BACKWARD
        env[node] = graph.node_copy(node, wanted if late else lambda n: env[n])
    gm = Draft(program.gm, graph)
    gm.meta.update(program.gm.meta)
    return replace(program, gm=gm, _by_name={})


def _early(program: Program) -> set[fx.Node]:
    """What serves the backward but depends on no gradient: it, too, can wait for its first reader that does."""
    given = {s.node for s in program.sources if s.phase == BACKWARD}
    late: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in program.gm.graph.nodes:
        if node.name in given or any(n in late for n in node.all_input_nodes):
            late.add(node)
        elif node.op == "call_function" and node.meta.get("phase") == BACKWARD:
            found.add(node)
    return found


__all__ = ["AGAIN", "KEEP", "RECOMPUTE", "SAVED", "copy_of", "original", "present", "recomputed"]
