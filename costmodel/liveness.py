"""Peak bytes on one rank, by kind: liveness over what the rank really executes, forward, backward and update.

A buffer lives from its making to its last reader, also one that the forward saves; views share their base's memory.
Buckets and the window of gathers started ahead are those of `passes/bucket.py` and `passes/overlap.py`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from autopar.costmodel.compress import tail_bytes, works
from autopar.costmodel.items import Items
from autopar.costmodel.legal import Specs, storage_of
from autopar.costmodel.memory import KINDS, Policy
from autopar.costmodel.order import ahead
from autopar.costmodel.saved import behind_operands, cut, late_as_possible, makers_of, pieces, placed
from autopar.costmodel.tape import Buffer, Event, Tape, Travel, record
from autopar.plan import DEVICE, Plan
from autopar.spec import local_shape

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
            state = storage_of(plan, item).state
            held = policy.stored(item, specs.outs[item.index][0], plan.mesh.sizes, state)
            found["parameters"] += held["parameters"]
            found["optimizer"] += held["optimizer"]
    for buffer in tape.placeholders:
        if buffer.held != "parameters":
            found[buffer.held] += buffer.size
    found["optimizer"] += sum(work.state_bytes for work in works(items, plan, specs))
    rest = Steps(tape).peak(scratch(items, plan, specs, policy, gloo))
    for kind, size in rest.items():
        found[kind] += size
    found["slack"] = slack * sum(found.values())
    return found


def scratch(items: Items, plan: Plan, specs: Specs, policy: Policy, gloo: bool) -> float:
    """Bytes of temporaries behind the backward: of the update, or of what compresses gradients before."""
    update = policy.temporaries(_trained(items, plan, specs), gpu=not gloo)
    return max(update, tail_bytes(works(items, plan, specs)))


def _trained(items: Items, plan: Plan, specs: Specs) -> list[tuple[int, int]]:
    """Elements of this rank's piece of every trained parameter, and bytes of one."""
    out = []
    for item in items.items:
        trained = item.kind == "param" and item.source is not None and item.source.trainable
        if trained and storage_of(plan, item).state == DEVICE:  # what the host updates, needs nothing here
            meta = item.outs[0]
            assert meta is not None
            shape = local_shape(meta.shape, specs.outs[item.index][0], plan.mesh.sizes)
            out.append((math.prod(shape), meta.itemsize))
    return out


def moving(
    items: Items, plan: Plan, specs: Specs, piece: Mapping[int, int], count: int, gloo: bool = False,
    weights_from: float | None = None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Per piece of a program, bytes at most of what comes and goes while its ops run: neither saved nor gradients; and
    bytes of what is gathered for its forward and kept for the backward.

    piece: number of an op -> number of its piece, of `count`. What belongs to no op, buckets, is of its neighbours'.
    """
    tape = record(items, plan, specs, gloo, weights_from)
    found, at = [0.0] * count, 0
    steps = Steps(tape)
    gathered = {b.base for b in steps.saved if b.base.kind in ("gathered", "collectives")}
    kept = [0.0] * count
    for buffer in gathered:
        buffer.kind = "activations"

    def look(event: Event, totals: Mapping[str, float], alive: Mapping[Buffer, None]) -> None:
        nonlocal at
        at = piece.get(tape.owner.get(event, -1), at)
        found[at] = max(found[at], sum(totals[kind] for kind in ("gathered", "collectives", "transient")))
        for x in event.ins:
            if x.base in gathered and event in tape.owner:
                gathered.discard(x.base)
                kept[at] += x.base.size

    steps.peak(0.0, look)
    return found, kept


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
        bits, backward = pieces(forward, backward)
        self.saved, again = cut([*forward, *bits], backward, tape.grads)
        cuts = makers_of(self.saved, bits)
        self.forward = _landed(ahead(behind_operands(forward, cuts), AHEAD_BYTES, tape.copies, cuts), tape.copies)
        self.backward = ahead(late_as_possible(again, backward), AHEAD_BYTES, tape.copies)

    def peak(self, scratch: float, look: Look | None = None) -> dict[str, float]:
        """The largest sum over forward, backward and update, by kind; `scratch`: temporaries of the update."""
        outputs = {b.base for b in self.tape.outputs}
        saved = {b.base for b in self.saved}
        grads = {b.base for b in self.tape.grads}
        for buffer in saved:
            if buffer.kind == "transient":
                buffer.kind = "activations"
        held = {b for b in saved | outputs if not b.held}
        written = {b.base for b in self.tape.written if not b.base.held}
        best = _walk(self.forward, (), held | written, look)
        if self.tape.backward:
            late = _walk(self.backward, held, grads | {b for b in outputs if not b.held}, look)
            best = max(best, late, key=lambda m: sum(m.values()))
            update = {"gradients": sum(b.size for b in grads), "transient": scratch}
            best = max(best, update, key=lambda m: sum(m.values()))
        return best

    def micro_batch(self) -> tuple[float, float, float]:
        """Of a stage of a pipeline: bytes that a micro-batch keeps between forward and backward, and at most while its
        forward and its backward run, with what is kept. What was given to it is not counted."""
        saved = {b.base for b in self.saved}
        outputs = {b.base for b in (*self.tape.outputs, *self.tape.written) if not b.base.held}
        early = _walk(self.forward, (), saved | outputs)
        ends = {b.base for b in (*self.tape.grads, *self.tape.sent_back) if not b.base.held}
        late = _walk(self.backward, saved, ends)
        return sum(b.size for b in saved), sum(early.values()), sum(late.values())


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
                if x.strided and base.size == event.outs[0].size:
                    break  # the result has these strides, and none else
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


def _landed(events: list[Event], copies: int) -> list[Event]:
    """The events with the ends of copies to the host, until which what is copied is held.

    Of `copies` that are on their way the oldest ends behind the start of the next one; what is left at the end.
    """
    out: list[Event] = []
    leaving: deque[Event] = deque()
    for event in events:
        out.append(event)
        if event.down:
            leaving.append(event)
            if len(leaving) > copies:
                out.append(Event(leaving.popleft().outs, ()))
    return [*out, *(Event(e.outs, ()) for e in leaving)]


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
                pending[id(members)] = sum(t.sent * t.part for t in members)
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
    return placed(events, makers)


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
        if travel.part < 1:
            return _reduce_half(row, travel.out, group, out)
        if not travel.exchanged:
            out.append(Event((row,), (travel.out,), over=in_place))
            return []
        travel.out.ins = (_arrive(row, out),)
        return [Event(travel.out.ins, (travel.out,))]
    whole, tail = packed, []
    if group[0].part < 1:
        whole = Buffer(sum(t.received for t in group), kind="gradients")
        tail = _reduce_half(packed, whole, group, out)
    elif not in_place:
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


def _reduce_half(x: Buffer, result: Buffer, group: list[Travel], out: list[Event]) -> list[Event]:
    """Start of a reduction that travels cast, and what makes `result` of it, cast back, at the end."""
    part = group[0].part
    half = Buffer(x.size * part, (x,), kind="collectives")
    out.append(Event((x,), (half,)))
    tail = []
    if group[0].key[0] != "all_reduce":
        summed = Buffer(result.size * part, (half,), kind="collectives")
        if group[0].exchanged:
            summed.ins = (_arrive(half, out),)
            tail.append(Event(summed.ins, (summed,)))
        else:
            out.append(Event((half,), (summed,)))
        half = summed
    result.ins = (half,)
    return [*tail, Event((half,), (result,))]


def _arrive(x: Buffer, out: list[Event]) -> Buffer:
    """Start of an exchange: everybody's pieces, before they are summed."""
    arrived = Buffer(x.size, (x,), kind="collectives", sent=(x,))
    out.append(Event((x,), (arrived,)))
    return arrived


__all__ = ["AHEAD_BYTES", "BUCKET_BYTES", "PENDING_BYTES", "Steps", "moving", "peak", "scratch"]
