"""Peak bytes on one rank, by kind: liveness over what the rank really executes, forward, backward and update.

A buffer lives from its making to its last reader, also one that the forward saves; views share their base's memory.
Buckets and the window of gathers started ahead are those of `passes/bucket.py` and `passes/overlap.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from autopar.costmodel.items import Items
from autopar.costmodel.legal import Specs
from autopar.costmodel.memory import KINDS, Policy
from autopar.costmodel.order import ahead
from autopar.costmodel.tape import Buffer, Event, Tape, Travel, record
from autopar.plan import Plan

#: As in `passes/bucket.py` and `passes/overlap.py` (tests compare them).
BUCKET_BYTES = 25 << 20
AHEAD_BYTES, PENDING_BYTES = 2 * BUCKET_BYTES, 4 * BUCKET_BYTES


def peak(
    items: Items, plan: Plan, specs: Specs, policy: Policy, slack: float = 0.0, gloo: bool = False,
    weights_from: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bytes by kind at the moment of the peak of a step.

    slack: part of the peak that the allocator loses; its kind is "slack". gloo, weights_from: as of `Device`.
    """
    tape = record(items, plan, specs, gloo, weights_from)
    found = dict.fromkeys(KINDS, 0.0)
    for item in items.items:
        if item.kind == "param":
            held = policy.stored(item, specs.outs[item.index][0], plan.mesh.sizes)
            found["parameters"] += held["parameters"]
            found["optimizer"] += held["optimizer"]
    for buffer in tape.placeholders:
        if buffer.held != "parameters":
            found[buffer.held] += buffer.size
    rest = Steps(tape).peak(policy.scratch)
    for kind, size in rest.items():
        found[kind] += size
    found["slack"] = slack * sum(found.values())
    return found


def moving(
    items: Items, plan: Plan, specs: Specs, piece: Mapping[int, int], count: int, gloo: bool = False,
    weights_from: float | None = None,
) -> list[float]:  # fmt: skip
    """Per piece of a program, bytes at most of what comes and goes while its ops run: neither saved nor gradients.

    piece: number of an op -> number of its piece, of `count`. What belongs to no op, buckets, is of its neighbours'.
    """
    tape = record(items, plan, specs, gloo, weights_from)
    found, at = [0.0] * count, 0

    def look(event: Event, totals: Mapping[str, float], alive: Mapping[Buffer, None]) -> None:
        nonlocal at
        at = piece.get(tape.owner.get(event, -1), at)
        found[at] = max(found[at], sum(totals[kind] for kind in ("gathered", "collectives", "transient")))

    Steps(tape).peak(0.0, look)
    return found


#: What looks on while events run: bytes by kind, and what is alive, right behind each.
Look = Callable[[Event, Mapping[str, float], Mapping[Buffer, None]], None]


class Steps:
    """The two halves as they run: buckets packed, saved tensors chosen, then walked.

    Attributes:
        forward, backward: events in the order in which they run. saved: what the one hands to the other.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        forward, backward = _packed(tape.forward), _packed(tape.backward)
        pieces, backward = _pieces(forward, backward)
        self.saved, again = _cut([*forward, *pieces], backward, tape.grads)
        cuts = _makers(self.saved, pieces)
        self.forward = ahead(_behind_operands(forward, cuts), AHEAD_BYTES, cuts)
        self.backward = ahead(_late_as_possible(again, backward), AHEAD_BYTES)

    def peak(self, scratch: float, look: Look | None = None) -> dict[str, float]:
        """The largest sum over forward, backward and update, by kind; `scratch`: of the update, in largest pieces."""
        outputs = {b.base for b in self.tape.outputs}
        saved = {b.base for b in self.saved}
        grads = {b.base for b in self.tape.grads}
        for buffer in saved:
            if buffer.kind == "transient":
                buffer.kind = "activations"
        held = {b for b in saved | outputs if not b.held}
        best = _walk(self.forward, (), held, look)
        if self.tape.backward:
            late = _walk(self.backward, held, grads | {b for b in outputs if not b.held}, look)
            best = max(best, late, key=lambda m: sum(m.values()))
            update = {"gradients": sum(b.size for b in grads), "transient": scratch * self.tape.largest}
            best = max(best, update, key=lambda m: sum(m.values()))
        return best


def _walk(
    events: Sequence[Event], start: Iterable[Buffer], keep: set[Buffer], look: Look | None = None
) -> dict[str, float]:
    """Live bytes by kind at the peak over `events`; `start` is alive before them, `keep` is never let go of."""
    last: dict[Buffer, int] = {}
    arrived: set[Buffer] = set()
    for at, event in enumerate(events):
        for x in (*event.ins, *event.outs):
            last[x.base] = at
        for x in event.ins:
            if x.sent and x not in arrived:
                arrived.add(x)
                last.update({y.base: at for y in x.sent})
    alive = dict.fromkeys(b for b in start if b in last or b in keep)
    given = set(alive)  # not ours to write over
    totals = dict.fromkeys(KINDS, 0.0)
    for buffer in alive:
        totals[buffer.kind] += buffer.size
    now, most, best = sum(totals.values()), -1.0, dict(totals)
    dying: dict[int, list[Buffer]] = {}
    for buffer, at in last.items():
        if buffer not in keep:
            dying.setdefault(at, []).append(buffer)
    for at, event in enumerate(events):
        if event.over:
            for x in event.ins:
                base = x.base
                own = base in alive and last[base] == at and base not in keep and base not in given
                if own and x.dense and base.size == event.outs[0].size:
                    del alive[base]
                    totals[base.kind] -= base.size
                    now -= base.size
                    break
        for x in event.outs:
            base = x.base
            if base not in alive and not base.held:
                alive[base] = None
                totals[base.kind] += base.size
                now += base.size
        if now > most:
            most, best = now, dict(totals)
        if look is not None:
            look(event, totals, alive)
        for buffer in dying.get(at, ()):
            if buffer in alive:
                del alive[buffer]
                totals[buffer.kind] -= buffer.size
                now -= buffer.size
    return best


# ---- buckets -------------------------------------------------------------------------------------------------------


def _packed(events: list[Event | Travel]) -> list[Event]:
    """Travels replaced by what they do alone or in a bucket; results of reductions stand where they are waited for."""
    groups = _groups([e for e in events if isinstance(e, Travel)], _first_uses(events))
    head = {member: group for group in groups for member in group}
    makers = {member.out: member for member in head if not member.key[2]}
    out: list[Event] = []
    wholes: dict[int, Buffer] = {}  # group of gathers -> what it brings
    late: dict[Buffer, int] = {}  # what stands behind a reduction of gradients -> its group
    tails: dict[int, list[Event]] = {}  # group of reductions -> what unpacks it
    packs: dict[int, Buffer] = {}  # group of reductions -> its bucket
    pending: dict[int, float] = {}  # groups started and not waited for -> bytes
    for event in events:
        if isinstance(event, Event):
            group = next((late[x] for x in event.ins if x in late), None)
            if group is None:
                out.append(event)
            else:
                tails[group].append(event)
                late.update(dict.fromkeys(event.outs, group))
            continue
        members = head[event]
        if event.key[2]:
            # What another reduction brings is packed when that has been waited for.
            here = tails[late[event.source]] if event.source in late else out
            late[event.out] = id(members)
            tail = tails.setdefault(id(members), [])
            if len(members) > 1:
                _write(event, members, packs, here)
            if event is members[-1]:
                tail[:0] = _reduce(members, packs.get(id(members)), here)
                pending[id(members)] = sum(t.sent for t in members)
                while len(pending) > 1 and sum(pending.values()) > PENDING_BYTES:
                    first = next(iter(pending))
                    out += tails.pop(first)
                    late = {x: g for x, g in late.items() if g != first}
                    del pending[first]
            continue
        _unpack(event, head, makers, wholes, out)
    for tail in tails.values():
        out += tail
    return _operands_first(out)


def _operands_first(events: Sequence[Event]) -> list[Event]:
    """The events in their order, each behind what makes its operands: a bucket pulls forward what it packs."""
    makers: dict[Buffer, Event] = {}
    for event in events:
        for x in event.outs:
            makers.setdefault(x, event)
    return _placed(events, makers)


def _placed(events: Iterable[Event], makers: Mapping[Buffer, Event]) -> list[Event]:
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


def _unpack(
    travel: Travel,
    head: dict[Travel, list[Travel]],
    makers: dict[Buffer, Travel],
    wholes: dict[int, Buffer],
    out: list[Event],
) -> None:
    """What cuts a gathered tensor out of what its bucket brings; before the first of a bucket, the bucket's start."""
    if travel.out.ins[0] is not travel.source:
        return  # done, for a bucket that packs it
    members = head[travel]
    if id(members) not in wholes:
        for member in members:
            if member.source in makers:
                _unpack(makers[member.source], head, makers, wholes, out)
        wholes[id(members)] = _gather(members, out)
    travel.out.ins, travel.out.free = (wholes[id(members)],), True
    travel.out.alias = len(members) == 1 and not travel.moved
    out.append(Event(travel.out.ins, (travel.out,)))


def _first_uses(events: list[Event | Travel]) -> dict[Buffer, int]:
    first: dict[Buffer, int] = {}
    for at, event in enumerate(events):
        for x in event.ins:
            first.setdefault(x, at)
            first.setdefault(x.base, at)
    return first


def _groups(travels: list[Travel], first: dict[Buffer, int]) -> list[list[Travel]]:
    """Neighbours of one key, until a bucket is full; what is as large as a bucket stays alone."""
    gathers = sorted((t for t in travels if not t.key[2]), key=lambda t: first.get(t.out, math.inf))
    groups: list[list[Travel]] = []
    open_: dict[tuple[object, ...], tuple[list[Travel], float]] = {}
    for travel in [*gathers, *(t for t in travels if t.key[2])]:
        size = max(travel.sent, travel.received)
        if size >= BUCKET_BYTES:
            groups.append([travel])
            continue
        key = (travel.key, travel.level)
        members, filled = open_.get(key, ([], 0.0))
        if not members or filled + size > BUCKET_BYTES:
            members, filled = [], 0.0
            groups.append(members)
        members.append(travel)
        open_[key] = (members, filled + size)
    return groups


def _gather(group: list[Travel], out: list[Event]) -> Buffer:
    """Start of a gather: pack, travel. The result is cut up by its readers."""
    sources = tuple(t.source for t in group)
    whole = Buffer(sum(t.received for t in group), sources, kind="collectives", sent=sources)
    if len(group) == 1:
        whole.kind = "gathered"
        if group[0].copied:
            copy = Buffer(group[0].sent, sources, free=True, kind="collectives")
            out.append(Event(sources, (copy,)))
            sources = whole.ins = whole.sent = (copy,)
        out.append(Event(sources, (whole,), ahead=True))
        return whole
    packed = Buffer(sum(t.sent for t in group), sources, free=True, kind="collectives")
    whole.ins = whole.sent = (packed,)
    out.append(Event(sources, (packed,)))
    out.append(Event((packed,), (whole,), ahead=True))
    return whole


def _write(travel: Travel, group: list[Travel], packs: dict[int, Buffer], out: list[Event]) -> None:
    """A gradient goes into its bucket when it is computed: a product at once, anything else by a copy.

    What is to be scattered is cut up first, which moves it: that stands right before the start.
    """
    if travel.key[0] != "all_reduce":
        if travel is group[-1]:
            packed = packs[id(group)] = Buffer(sum(t.sent for t in group), kind="collectives")
            out.append(Event(tuple(t.source for t in group), (packed,)))
        return
    packed = packs.setdefault(id(group), Buffer(sum(t.sent for t in group), kind="collectives"))
    base = travel.source.base
    if base.product and not base.held and base.size == travel.source.size:
        base.ins, base.alias = (packed, *base.ins), True
    else:
        out.append(Event((travel.source,), (Buffer(travel.sent, (packed,), alias=True),)))


def _reduce(group: list[Travel], packed: Buffer | None, out: list[Event]) -> list[Event]:
    """Start of a reduction of gradients, and what hands its results out at the end; pieces of a bucket are views."""
    in_place = group[0].key[0] == "all_reduce"
    if packed is None:
        (travel,) = group
        row = travel.source
        if travel.copied:
            row = Buffer(travel.sent, (row,), kind="collectives")
            out.append(Event((travel.source,), (row,)))
        if not travel.exchanged:
            out.append(Event((row,), (travel.out,), over=in_place))
            return []
        travel.out.ins = (_arrive(row, out),)
        return [Event(travel.out.ins, (travel.out,))]
    whole, tail = packed, []
    if not in_place:
        whole = Buffer(sum(t.received for t in group), (packed,), kind="gradients")
        if group[0].exchanged:
            whole.ins = (_arrive(packed, out),)
            tail.append(Event(whole.ins, (whole,)))
        else:
            out.append(Event((packed,), (whole,)))
    whole.kind = "gradients"
    for travel in group:
        travel.out.ins, travel.out.alias = (whole,), True
    return tail + [Event((whole,), (t.out,), lands=in_place) for t in group]


def _arrive(x: Buffer, out: list[Event]) -> Buffer:
    """Start of an exchange: everybody's pieces, before they are summed."""
    arrived = Buffer(x.size, (x,), kind="collectives", sent=(x,))
    out.append(Event((x,), (arrived,)))
    return arrived


# ---- what is saved -------------------------------------------------------------------------------------------------


def _cut(forward: list[Event], backward: list[Event], grads: list[Buffer]) -> tuple[list[Buffer], list[Event]]:
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


def _pieces(forward: Sequence[Event], backward: Sequence[Event]) -> tuple[list[Event], list[Event]]:
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


def _makers(wanted: Iterable[Buffer], pieces: Sequence[Event]) -> list[Event]:
    """Those of `pieces` that it takes to make what is wanted."""
    need = set(wanted)
    found = []
    for event in reversed(pieces):
        if need.intersection(event.outs):
            found.append(event)
            need.update(event.ins)
    return found[::-1]


def _behind_operands(forward: Sequence[Event], cuts: Sequence[Event]) -> list[Event]:
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


def _late_as_possible(again: Sequence[Event], backward: Sequence[Event]) -> list[Event]:
    """The backward with what is computed again right before its first reader."""
    return _placed((*backward, *again), {x: e for e in again for x in e.outs})


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


__all__ = ["AHEAD_BYTES", "BUCKET_BYTES", "PENDING_BYTES", "Steps", "moving", "peak"]
