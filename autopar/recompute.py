"""The program in which the forward does not keep everything for the backward.

A plan names ops of the forward (`Plan.saved`) whose results are not handed over:

* "recompute": the backward gets its own copy of the op, right before its first reader, from operands that are kept, or
  copied in their turn. A copy of a random op draws the same numbers: they depend on the step's seed and the op's own
  number, not on when it runs (`autopar/ops.py`).
* "offload": what the op makes waits on the host (`autopar/offload.py`): it is copied there as soon as it is made, and
  fetched right before its first reader in the backward; passes start both copies early.

All that comes later (layouts, prices, memory, passes) sees ordinary ops, whose communication and memory are those of
any other; a parameter that is gathered again for the backward is gathered for copies too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import fx

from autopar.errors import PlanError
from autopar.graph import BACKWARD, FORWARD, MOVES, Draft, Program, is_op, pattern
from autopar.offload import FETCH, OFFLOAD

#: What a plan may say of the result of an op of the forward that the backward reads: it is computed again, it waits on
#: the host, or it is kept, as all that is not named (of one layer, where a star says something else of all).
RECOMPUTE, OFFLOADED, KEEP = "recompute", "offload", "keep"
SAVED = (RECOMPUTE, OFFLOADED, KEEP)
#: Programs that are kept of one.
MOST = 4
#: Ends the address of a copy; and, with the number of the result, of what takes it to the host and brings it back.
AGAIN, DOWN, UP = "~", ">", "<"
_WAY = re.compile(rf"(?:{FORWARD}|{BACKWARD})(:.*)[{DOWN}{UP}](\d+)")


def recomputed(program: Program, saved: Mapping[str, str]) -> Program:
    """`program` as `saved` has it: with the backward's copies and ways to the host; itself if that names nothing.

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
        program.derived[key] = _rewritten(program, *_nodes(program, saved))
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


def way_of(address: str, index: int) -> tuple[str, str]:
    """The addresses of what takes result `index` of an op of the forward to the host, and of what brings it back."""
    return f"{address}{DOWN}{index}", f"{BACKWARD}{address.removeprefix(FORWARD)}{UP}{index}"


def traveller(address: str) -> tuple[str, int] | None:
    """The op, and the number of its result, that `address` takes to the host or brings back; None if it does not."""
    found = _WAY.fullmatch(address)
    return None if found is None else (f"{FORWARD}{found[1]}", int(found[2]))


def _nodes(program: Program, saved: Mapping[str, str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The ops to be computed again, and those whose results wait on the host."""
    unused = dict.fromkeys(saved)
    found: dict[str, set[fx.Node]] = {how: set() for how in SAVED}
    for node in program.gm.graph.nodes:
        if not is_op(node) or node.meta["phase"] != FORWARD:
            continue
        address = node.meta["address"]
        key = address if address in saved else pattern(address)
        unused.pop(address, None)
        unused.pop(pattern(address), None)
        how = saved.get(key, KEEP)
        if how in found:
            found[how].add(node)
    for address, how in saved.items():
        if how not in SAVED:
            raise PlanError(f"saved of {address} is {how!r}; it may be {', '.join(SAVED)}")
    if unused:
        raise PlanError(
            f"saved names {next(iter(unused))!r}, which is no op of the forward of this program; those that there are "
            'stand under "choices" in the plan'
        )
    return found[RECOMPUTE], found[OFFLOADED]


def _rewritten(program: Program, again: Collection[fx.Node], away: Collection[fx.Node]) -> Program:
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
            picked = not is_op(top)
            maker: fx.Node = top.args[0] if picked else top  # type: ignore[assignment]
            if maker in away and isinstance(top.meta["val"], torch.Tensor):
                copies[top] = fetched(top, maker, int(top.args[1]) if picked else 0)  # type: ignore[arg-type]
                stack.pop()
                continue
            if top in early:
                missing = [n for n in top.all_input_nodes if n not in copies]
                stack += missing
                if not missing:
                    env[top] = copies[top] = graph.node_copy(top, lambda n: copies[n])
                continue
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

    def fetched(node: fx.Node, maker: fx.Node, index: int) -> fx.Node:
        """What the backward has of a result that waits on the host."""
        down, up = way_of(maker.meta["address"], index)
        dense = torch.empty_like(node.meta["val"])
        if node not in env:  # picked for the backward alone
            with graph.inserting_after(env[maker]):
                env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta["phase"] = FORWARD
        with graph.inserting_after(env[node]):
            sent = graph.create_node("call_function", OFFLOAD, (env[node],), {}, f"{node.name}_down")
        sent.meta.update(node.meta, address=down, val=dense, phase=FORWARD)
        back = graph.create_node("call_function", FETCH, (sent,), {}, f"{node.name}_up")
        back.meta.update(node.meta, address=up, val=dense, phase=BACKWARD)
        return back

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


__all__ = [
    "AGAIN", "KEEP", "OFFLOADED", "RECOMPUTE", "SAVED", "copy_of", "original", "present", "recomputed", "traveller",
    "way_of",
]  # fmt: skip
