"""What the forward of a rank saves for its backward, and what the backward computes again: `passes/partition.py`.

Events are those of `costmodel.tape`, buckets packed (`costmodel.liveness`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from autopar.costmodel.tape import Buffer, Event


def placed(events: Iterable[Event], makers: Mapping[Buffer, Event]) -> list[Event]:
    """`events` in order, each behind those of `makers` that make what it reads."""
    placed: dict[Event, None] = {}
    opened: set[Event] = set()  # what waits for its operands: never for itself
    for event in events:
        stack = [event]
        while stack:
            top = stack[-1]
            opened.add(top)
            found = (makers[x] for x in top.ins if x in makers)
            before = [e for e in found if e not in placed and e not in opened]
            if before:
                stack += reversed(before)
            else:
                placed[stack.pop()] = None
    return list(placed)


def cut(forward: list[Event], backward: list[Event], grads: list[Buffer]) -> tuple[list[Buffer], list[Event]]:
    """What the forward saves, and what the backward computes again; by the rules of `passes/partition.py`."""
    early: dict[Buffer, Event] = {}
    for event in forward:
        for x in event.outs:
            early[x] = event
    needed: dict[Buffer, None] = {}
    for event in backward:
        needed.update(dict.fromkeys(x for x in event.ins if x in early))
    needed.update(dict.fromkeys(g for g in grads if g in early))
    saved: dict[Buffer, None] = {}
    todo: dict[Buffer, None] = {}
    for x in needed:
        x = x.base
        if not x.held:
            (todo if x.free else saved)[x] = None
    groups: dict[frozenset[Buffer], list[Buffer]] = {}
    for x in todo:
        groups.setdefault(frozenset(_missing(x, saved)), []).append(x)
    for leaves, members in groups.items():
        missing = [x for x in leaves if x not in saved]
        if sum(x.size for x in missing) < sum(x.size for x in members):
            saved.update(dict.fromkeys(missing))
        elif missing:
            saved.update(dict.fromkeys(members))
    again: dict[Event, None] = {}
    fresh: dict[Buffer, None] = {}
    stack = list(needed)
    while stack:
        x = stack.pop()
        if x in saved or x in fresh or x.held or x not in early:
            continue
        fresh[x] = None
        again[early[x]] = None
        stack.extend(x.ins)
    order = [e for e in forward if e in again]
    return list(saved), order


def pieces(forward: Sequence[Event], backward: Sequence[Event]) -> tuple[list[Event], list[Event]]:
    """Local chunks and views that the backward makes of what the forward has made, and the rest of the backward."""
    early = {x for e in forward for x in e.outs}
    pieces: list[Event] = []
    rest: list[Event] = []
    for event in backward:
        if event.cuts and all(x in early for x in event.ins):
            pieces.append(event)
            early.update(event.outs)
        else:
            rest.append(event)
    return pieces, rest


def makers_of(wanted: Iterable[Buffer], pieces: Sequence[Event]) -> list[Event]:
    """Those of `pieces` that it takes to make what is wanted."""
    need = set(wanted)
    found = []
    for event in reversed(pieces):
        if need.intersection(event.outs):
            found.append(event)
            need.update(event.ins)
    return found[::-1]


def behind_operands(forward: Sequence[Event], cuts: Sequence[Event]) -> list[Event]:
    """The forward with `cuts`, each right behind what makes its operand."""
    behind: dict[Buffer, list[Event]] = {}
    for event in cuts:
        behind.setdefault(event.ins[0], []).append(event)
    out = []
    for event in forward:
        stack = [event]
        while stack:
            out.append(stack.pop())
            stack += [e for x in out[-1].outs for e in behind.get(x, ())]
    return out


def late_as_possible(again: Sequence[Event], backward: Sequence[Event]) -> list[Event]:
    """The backward with what is computed again right before its first reader."""
    return placed((*backward, *again), {x: e for e in again for x in e.outs})


def _missing(x: Buffer, saved: dict[Buffer, None]) -> list[Buffer]:
    """What must be saved besides, to compute a free buffer again."""
    out: dict[Buffer, None] = {}
    stack, seen = [x], set()
    while stack:
        top = stack.pop()
        if top in seen or top in saved or top.held:
            continue
        seen.add(top)
        if top.free or top.alias:
            stack.extend(top.ins)
        else:
            out[top] = None
    return list(out)


__all__ = ["behind_operands", "cut", "late_as_possible", "makers_of", "pieces", "placed"]
