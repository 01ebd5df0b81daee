"""Answers about plans in words: tables and text from the data of `autopar.questions`. Nothing here prints."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
from rich.console import RenderableType
from rich.text import Text

from autopar.costmodel.explain import Bench, Change, Other, Verdict
from autopar.costmodel.formula import Formula
from autopar.costmodel.tally import Movement
from autopar.plan import Plan, Storage
from autopar.questions import Bill, Explanation, Opened, Rival, Subject, star_name
from autopar.report import Layer, choice_words, kept_text, layers, plain_table, seconds, strategy
from autopar.rule import Choice
from autopar.spec import format_spec
from autopar.units import bytes_

#: A difference below this part of a step is none.
TIE = 1e-5
#: Columns of running text.
WIDTH = 118
#: Causes named in one sentence.
CAUSES = 3


def signed(value: float, words: Any) -> str:
    """`+1.2 ms`, `-3 GB`."""
    return f"{'+' if value > 0 else '-' if value < 0 else ''}{words(abs(value))}"


# ---- one place -----------------------------------------------------------------------------------------------------


def explanation(opened: Opened, found: Explanation) -> list[RenderableType]:
    """Text of `questions.ask`."""
    parts: list[RenderableType] = []
    for about, verdicts in found.subjects:
        lines = [heading(opened, about)]
        for verdict in verdicts:
            axis = verdict.axis
            title = f"{opened.plan.mesh.names[axis]}={opened.plan.mesh.sizes[axis]}"
            for number, (label, text) in enumerate(verdict_lines(opened, verdict)):
                head = f"  {title if number == 0 else '':<6} {label:<8} "
                lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
        parts += [Text("\n".join(lines)), Text("")]
    if found.more:
        parts.append(Text(f"and {len(found.more)} more, with --all: {', '.join(found.more[:8])}"))
    return parts[:-1] if parts and not found.more else parts


def heading(opened: Opened, about: Subject) -> str:
    """`model.layers.*.mlp.up_proj.weight: parameter, 14336 x 4096 bfloat16, 32 alike`."""
    shape = " x ".join(map(str, about.shape)) or "scalar"
    kind = {"param": "parameter", "op": "op, its result is"}.get(about.kind, about.kind)
    alike = f", {about.count} alike" if about.count > 1 else ""
    return f"{about.name}: {kind}{',' if about.kind == 'param' else ''} {shape} {about.dtype}{alike}"


def verdict_lines(opened: Opened, v: Verdict) -> list[tuple[str, str]]:
    """Label and text of what is to be said about one class on one axis."""
    value = lambda x: value_words(opened, v.cls, v.axis, x)  # noqa: E731
    lines = [("chosen", value(v.value))]
    if v.why:
        lines.append(("asked", f"by {v.why}"))
    if v.free is not None:
        number = len(v.free.followers)
        led = f", and {number} other decision{'s' if number > 1 else ''} with it" if number else ""
        lines.append(("next", f"{value(v.free.value)}{led}: {change_words(v.free.change)}"))
    if v.barred is not None and (v.free is None or v.barred.change.step_s < v.free.change.step_s):
        lines.append(("barred", f"{value(v.barred.value)}: {change_words(v.barred.change)}"))
    if v.fixed:
        told: dict[str, Other] = {}
        for other in v.fixed:
            told.setdefault(value(other.value), other)
        texts = [f"{word} {difference(o.change.step_s)}" for word, o in list(told.items())[:4]]
        lines.append(("alone", "; ".join(texts)))
    reasons = decided(opened, v)
    return lines + [("decided" if n == 0 else "", text) for n, text in enumerate(reasons)]


def difference(value: float) -> str:
    """`+1.2 ms`, or `the same`."""
    return signed(value, seconds) if abs(value) > 1e-12 else "the same"


def value_words(opened: Opened, cls: int, axis: int, value: Any) -> str:
    """What one axis does, in a few words."""
    bench, names = opened.bench, opened.plan.mesh.names
    if isinstance(value, Storage):
        place = value.spec[axis]
        whole = all(p.kind == "R" for p in value.spec)
        split = f"dim {place.dim} over {names[axis]}" if place.kind == "S" else f"whole on {names[axis]}"
        if whole or (place.kind == "R" and not any(p.kind == "S" for p in value.spec)):
            return split
        return f"{split}, gathered {'again for the backward' if value.gather == 'twice' else 'once'}"
    if isinstance(value, Choice):
        return choice_text(bench, cls, value)
    return format_spec(value, 1 + max((p.dim for p in value if p.kind == "S"), default=-1), names)


def choice_text(bench: Bench, cls: int, choice: Choice) -> str:
    """`batch`, `output features`, `whole on every rank`."""
    if choice.through >= 0:
        return "partial sums pass"
    if not choice.factor:
        return "nothing: every rank does all of it"
    role = bench.role(cls, choice)
    address = bench.prices.space.fold.first(cls).name
    if role in ("batch", "sequence"):
        return role
    # Told once, in the table of the report, which also knows what the factors of an op mean.
    return choice_words(address.rpartition("/")[2].partition("#")[0], choice)


def change_words(c: Change) -> str:
    """`+1.2 ms (communication +1.3 ms, compute -0.1 ms), -2 GB`."""
    parts = [("compute", c.compute_s), ("communication", c.comm_s), ("optimizer", c.update_s)]
    told = [f"{word} {signed(s, seconds)}" for word, s in parts if abs(s) > 1e-9]
    text = signed(c.step_s, seconds) if abs(c.step_s) > 1e-8 else "no slower"
    serial = sum(s for _, s in parts)
    if abs(serial - c.step_s) > 0.01 * abs(serial) + 1e-7:
        told.append(f"{seconds(abs(serial - c.step_s))} {'more' if serial > c.step_s else 'less'} of it hidden")
    if len(told) > 1 or (told and told[0].split(" ", 1)[1] != text):
        text += f" ({', '.join(told)})"
    elif told:
        text += f" {told[0].split(' ', 1)[0]}"
    if abs(c.peak_bytes) >= 1e3:
        text += f", {signed(c.peak_bytes, bytes_)} at the peak"
    if c.over > 0:
        text += f", which is {bytes_(c.over)} over the memory limit"
    return text


def decided(opened: Opened, v: Verdict) -> list[str]:
    """What decided, most telling first: a constraint, the memory limit, an edge, or arithmetic."""
    step = opened.bench.step.step_s
    barred = [o for o in ((v.barred,) if v.barred else ()) + v.fixed if o.change.over > 0]
    faster = [o for o in barred if o.change.step_s < -TIE * step]
    if v.why:
        free = v.free or (v.fixed[0] if v.fixed else None)
        gain = -free.change.step_s if free is not None else 0.0
        return [
            f"you, by {v.why}: " + (f"without it {seconds(gain)} less" if gain > TIE * step else "it costs nothing")
        ]
    if faster:
        best = min(faster, key=lambda o: o.change.step_s)
        return [
            f"memory: {value_words(opened, v.cls, v.axis, best.value)} would save {seconds(-best.change.step_s)}, but "
            f"{bytes_(best.change.over)} more than the limit of {bytes_(opened.limit or 0)} would be needed"
        ]
    other = v.free or (v.fixed[0] if v.fixed else None)
    if other is None:
        return ["nothing: there is no other way"]
    change = other.change
    word = value_words(opened, v.cls, v.axis, other.value)
    if change.step_s < -TIE * step:
        return [
            f"the planner's search: with the other axes as they are now, {word} is {seconds(-change.step_s)} faster; "
            "it solves one axis after the other, each to within a gap"
        ]
    if change.step_s <= TIE * step:
        extra = f", and {word} takes {bytes_(change.peak_bytes)} more" if change.peak_bytes > 1e6 else ""
        return [f"nothing: {word} takes as long{extra}"]
    return causes(opened, change)


def causes(opened: Opened, change: Change) -> list[str]:
    """The largest things that would get dearer: communication by kind, axis and what travels, and work."""
    bench, names = opened.bench, opened.plan.mesh.names
    net: dict[tuple[str, int, str], float] = {}
    top: dict[tuple[str, int, str], Movement] = {}
    for sign, moved in ((1, change.appears), (-1, change.goes)):
        for m in moved:
            for s in m.sent:
                key = (s.kind, s.axis, m.what)
                net[key] = net.get(key, 0.0) + sign * s.seconds * m.edge.count
                if sign > 0 and (key not in top or m.total > top[key].total):
                    top[key] = m
    work = sum(s for _, s in change.work)
    found: list[tuple[float, str]] = []
    # Where communication is only of another kind and no dearer, it decided nothing.
    if change.comm_s > 0.1 * max(work, 0.0):
        less = [(cost, key) for key, cost in net.items() if cost < 0]
        instead = ""
        if less:
            cost, (kind, axis, what) = min(less)
            instead = f", in place of {seconds(-cost)} {collective(kind)} of {what} over {names[axis]}"
        for (kind, axis, what), cost in net.items():
            if (kind, axis, what) in top and cost > 0:
                m = top[kind, axis, what]
                times = f"{m.edge.count} times, " if m.edge.count > 1 else ""
                text = f"communication: {signed(cost, seconds)} {collective(kind)} of {what} over {names[axis]}"
                found.append((cost, f"{text} ({times}{edge_words(bench, m)}){instead}"))
    if work > 0:
        cls, most = max(change.work, key=lambda pair: pair[1])
        of = "the optimizer's update of " if cls in bench.state.storage else ""
        found.append(
            (work, f"work: {signed(work, seconds)} on each rank (of {of}{name_of(bench, cls)} {seconds(most)})")
        )
    found.sort(key=lambda pair: -pair[0])
    limit = 0.15 * found[0][0] if found else 0.0
    return [text for cost, text in found[:CAUSES] if cost >= limit] or ["the latency of many small pieces"]


def collective(kind: str) -> str:
    """A collective's name; a slice that each rank takes of its own is no collective."""
    return "slicing" if kind == "local_chunk" else kind


def edge_words(bench: Bench, m: Movement) -> str:
    """`from layers.*.mlp/mul to layers.*.mlp.down_proj/mm`."""
    readers = list(dict.fromkeys(name_of(bench, c) for c in m.readers))
    more = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
    return f"from {name_of(bench, m.edge.cls)} to {readers[0]}{more}"


def name_of(bench: Bench, cls: int) -> str:
    """Short name of a class: no phase of forward ops, no number of the first op of its kind."""
    return star_name(bench, cls).removeprefix("fwd:").removesuffix("#0").replace("bwd:", "backward of ")


# ---- whole plans ---------------------------------------------------------------------------------------------------


def top_table(opened: Opened, mine: Bill, found: Sequence[Rival], most: int) -> list[RenderableType]:
    """The plan and the best of its rivals: time, memory, and why they lost."""
    table = plain_table()
    for column in ("", "what was asked", "step", "difference", "memory per rank"):
        table.add_column(column, justify="left" if column in ("", "what was asked") else "right", no_wrap=True)
    table.add_column("why it lost", overflow="fold", ratio=1)
    table.add_row("1", strategy(opened.plan), seconds(mine.step_s), "", bytes_(mine.peak_bytes), "chosen")
    rank = 1
    told: set[tuple[float, float]] = set()
    for rival in found:
        if rank >= most:
            break
        if rival.bill is None:
            continue
        key = (round(rival.bill.step_s / mine.step_s, 6), round(rival.bill.peak_bytes / mine.peak_bytes, 4))
        if key in told or rival.same:
            continue
        told.add(key)
        rank += 1
        delta = rival.bill.step_s - mine.step_s
        table.add_row(
            str(rank),
            rival.label,
            seconds(rival.bill.step_s),
            signed(delta, seconds),
            bytes_(rival.bill.peak_bytes),
            lost(opened, mine, rival),
        )
    parts: list[RenderableType] = [table]
    same = [r.label for r in found if r.same]
    if same:
        parts.append(Text(f"the chosen plan is itself the best with {', '.join(same)}"))
    failed = [r for r in found if r.error]
    if failed:
        parts.append(Text("cannot be met: " + "; ".join(f"{r.label} ({r.error})" for r in failed)))
    return parts


def lost(opened: Opened, mine: Bill, rival: Rival) -> str:
    """`does not fit by 3.1 GB; +12 ms: 128 all_reduce of activations over tp`."""
    assert rival.bill is not None
    text = f"does not fit by {bytes_(rival.over)}" if rival.over > 0 else ""
    deltas = bill_changes(mine, rival.bill)
    more = [(s, words) for s, words in deltas if s > 0]
    if rival.bill.step_s - mine.step_s > TIE * mine.step_s:
        reasons = [f"{signed(s, seconds)}: {words}" for s, words in more[:2] if s >= 0.2 * more[0][0]]
        text += ("; " if text else "") + "; ".join(reasons)
    elif mine.step_s - rival.bill.step_s > TIE * mine.step_s and not text:
        text = "it did not: the search, which solves one axis after the other, missed it"
    return text or "the same time"


def bill_changes(a: Bill, b: Bill) -> list[tuple[float, str]]:
    """Seconds by which b is dearer than a, by part in words, largest change first."""
    found = [(b.compute_s - a.compute_s, "compute"), (b.update_s - a.update_s, "optimizer")]
    for key in dict.fromkeys((*a.moved, *b.moved)):
        kind, axis, what = key
        had, has = a.number.get(key, 0), b.number.get(key, 0)
        number = f"{has} instead of {had}" if had != has and had else f"{has}"
        if had == has:
            number += " of more bytes" if b.sent[key] > a.sent[key] else " of fewer bytes"
        found.append(
            (b.moved.get(key, 0.0) - a.moved.get(key, 0.0), f"{collective(kind)} of {what} over {axis}, {number}")
        )
    return sorted((pair for pair in found if abs(pair[0]) > 1e-12), key=lambda pair: -abs(pair[0]))


def constraints_table(mine: Bill, found: Sequence[Rival]) -> list[RenderableType]:
    """What each constraint costs: the best plan without it beside the plan."""
    table = plain_table()
    for column in ("without constraint", "step", "saved", "memory per rank", "saved "):
        table.add_column(column, justify="left" if column.startswith("without") else "right", no_wrap=True)
    table.add_column("what goes", overflow="fold", ratio=1)
    for rival in found:
        if rival.bill is None:
            table.add_row(rival.label, "-", "", "", "", rival.error)
            continue
        less = [(s, w) for s, w in bill_changes(rival.bill, mine) if s > 0]
        table.add_row(
            rival.label,
            seconds(rival.bill.step_s),
            saved(mine.step_s - rival.bill.step_s, seconds, mine.step_s),
            bytes_(rival.bill.peak_bytes),
            saved(mine.peak_bytes - rival.bill.peak_bytes, bytes_, mine.peak_bytes),
            less[0][1] if less and mine.step_s - rival.bill.step_s > TIE * mine.step_s else "",
        )
    return [table]


def saved(value: float, words: Any, whole: float) -> str:
    """A saving, or `nothing`; a loss has a minus."""
    return "nothing" if abs(value) <= TIE * whole else signed(value, words).lstrip("+")


# ---- two plans -----------------------------------------------------------------------------------------------------


def diff_table(a: Plan, b: Plan, names: tuple[str, str]) -> list[RenderableType]:
    """By module, what two plans do differently: splits per axis and storage; then `plan_changes`."""
    left, right = ({row.module: row for row in flat_layers(plan)} for plan in (a, b))
    table = plain_table()
    table.add_column("module", overflow="fold", ratio=3)
    table.add_column("", no_wrap=True)
    table.add_column(names[0], overflow="fold", ratio=3)
    table.add_column(names[1], overflow="fold", ratio=3)
    grouped: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for module in dict.fromkeys((*left, *right)):
        lines = tuple(module_changes(left.get(module), right.get(module), a, b))
        if lines:
            grouped.setdefault(lines, []).append(module)
    for lines, modules in grouped.items():
        for number, (what, x, y) in enumerate(lines):
            table.add_row("\n".join(modules) if number == 0 else "", what, x, y)
    rows: list[RenderableType] = [table] if grouped else []
    changed = [name for name, _, _ in plan_changes(a, b)]
    if "saved" in changed:
        rows += [Text(f"{name} {kept_text(plan)}") for name, plan in zip(names, (a, b))]
    rest = plain_table()
    for column in ("of all modules", *names):
        rest.add_column(column, overflow="fold")
    for name in changed:
        if name in _WHOLE:
            label, told = _WHOLE[name]
            rest.add_row(label, told(a), told(b))
    if rest.row_count:
        rows.append(rest)
    return rows or [Text("the same decisions in every module")]


#: Decisions about a plan as a whole: field -> what it is called, and what a plan has, in words. `saved` has its own.
_WHOLE: dict[str, tuple[str, Callable[[Plan], str]]] = {
    "copies": ("copies to and from the host under way", lambda plan: str(plan.copies)),
    "optimizer": ("optimizer", lambda plan: plan.optimizer),
    "compression": ("compression of gradients", lambda plan: plan.compression or "none"),
    "precision": ("precision", lambda plan: str(plan.computes)),
}


def plan_changes(a: Plan, b: Plan) -> list[tuple[str, Any, Any]]:
    """(field of a plan, in a, in b) of what is decided of no module by itself, where two plans differ in it."""
    found = [(name, _plain(getattr(a, name)), _plain(getattr(b, name))) for name in ("saved", *_WHOLE)]
    return [(name, x, y) for name, x, y in found if x != y]


def _plain(value: Any) -> Any:
    """A field of a plan as JSON takes it."""
    return dict(value) if isinstance(value, Mapping) else value


def flat_layers(plan: Plan) -> list[Layer]:
    """The rows of the report, one per module."""
    return layers(plan, merged=False)


def module_changes(x: Layer | None, y: Layer | None, a: Plan, b: Plan) -> Iterable[tuple[str, str, str]]:
    """(what, in a, in b) for everything that a module does differently."""
    axes = dict.fromkeys((*a.mesh.names, *b.mesh.names))
    for axis in axes:
        one, two = (
            row.splits[plan.mesh.names.index(axis)] if row is not None and axis in plan.mesh.names else "(none)"
            for row, plan in ((x, a), (y, b))
        )
        if one != two:
            yield f"splits on {axis}", one, two
    stored = ["\n".join(row.storage) if row is not None else "" for row in (x, y)]
    if stored[0] != stored[1]:
        yield "stored", stored[0] or "-", stored[1] or "-"


def bills_table(a: Bill, b: Bill, names: tuple[str, str]) -> list[RenderableType]:
    """Time by part and collective, and memory by kind, side by side."""
    time = plain_table()
    time.add_column("time of a step", no_wrap=True)
    for column in (*names, "difference"):
        time.add_column(column, justify="right", no_wrap=True)
    rows: list[tuple[str, float, float]] = [("compute", a.compute_s, b.compute_s)]
    for key in sorted(dict.fromkeys((*a.moved, *b.moved)), key=lambda k: -max(a.moved.get(k, 0), b.moved.get(k, 0))):
        kind, axis, what = key
        label = f"{collective(kind)} of {what} over {axis} ({a.number.get(key, 0)}, {b.number.get(key, 0)} times)"
        rows.append((label, a.moved.get(key, 0.0), b.moved.get(key, 0.0)))
    rows += [("optimizer", a.update_s, b.update_s), ("hidden behind one another", -a.hidden_s, -b.hidden_s)]
    rows.append(("step", a.step_s, b.step_s))
    for label, x, y in rows:
        if abs(x - y) > 1e-9 or label in ("compute", "step"):
            time.add_row(label, seconds(x), seconds(y), delta(y - x, seconds))
    memory = plain_table()
    memory.add_column("memory of a rank at the peak", no_wrap=True)
    for column in (*names, "difference"):
        memory.add_column(column, justify="right", no_wrap=True)
    for kind in dict.fromkeys((*a.memory, *b.memory)):
        x, y = a.memory.get(kind, 0.0), b.memory.get(kind, 0.0)
        if abs(x - y) >= 1:
            memory.add_row(kind, bytes_(x), bytes_(y), delta(y - x, bytes_))
    memory.add_row("all", bytes_(a.peak_bytes), bytes_(b.peak_bytes), delta(b.peak_bytes - a.peak_bytes, bytes_))
    return [time, Text(""), memory]


def delta(value: float, words: Any) -> str:
    """A difference, empty where there is none."""
    return signed(value, words) if abs(value) > 1e-12 else ""


def figures_table(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[RenderableType]:
    """Predicted figures before and after an edit."""
    table = plain_table()
    for column in ("", "as written in the file", "as it is now", "difference"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    rows: list[tuple[str, float | None, float, Any]] = [
        (word, old.get(key), new[key], seconds)
        for key, word in (("step_s", "step"), ("compute_s", "compute"), ("comm_s", "communication"),
                          ("update_s", "optimizer"))
        if key in new
    ]  # fmt: skip
    rows.append(("memory of a rank", old.get("peak_bytes"), new["peak_bytes"], bytes_))
    for kind, size in new["memory"].items():
        before = old.get("memory", {}).get(kind)
        if size or before:
            rows.append((f"  {kind}", before, size, bytes_))
    for label, before, now, words in rows:
        change = "" if before is None else delta(now - before, words)
        table.add_row(label, "-" if before is None else words(before), words(now), change)
    return [table]


# ---- formulas ------------------------------------------------------------------------------------------------------


def formula_text(made: Formula, values: Sequence[Mapping[str, Any]], exact: bool) -> list[RenderableType]:
    """The formula by part, its values, and what it leaves out."""
    lines = [
        f"seconds of a step, one thing after the other; B batch, S sequence, {', '.join(made.mesh.names)} axis sizes"
    ]
    for name, expression in made.seconds.items():
        if expression != 0:
            lines.append(f"  {name} =")
            lines += _expression(expression if exact else made.plain(expression))
    lines.append("bytes of a rank")
    for name, expression in made.memory.items():
        if expression != 0:
            here = f"  (on {made.mesh} only)" if name in made.meshless else ""
            lines.append(f"  {name}{here} =")
            lines += _expression(expression if exact else made.plain(expression))
    table = plain_table()
    table.add_column("", no_wrap=True)
    for found in values:
        table.add_column(f"batch {found['batch']}, sequence {found['seq']}, {found['mesh']}", justify="right")
    for name in made.seconds:
        table.add_row(name, *(seconds(found["seconds"][name]) for found in values))
    table.add_row("step, nothing hidden", *(seconds(found["serial_s"]) for found in values))
    out: list[RenderableType] = [Text("\n".join(lines)), Text(""), table]
    if made.checked is not None:
        out.append(Text(f"checked at another batch and sequence: {100 * made.checked:.2g} % off the price"))
    return out + [Text(f"note: {note}") for note in made.notes]


def _expression(expression: Any) -> list[str]:
    """A sum with three digits, wrapped."""
    rounded = expression.xreplace({n: sympy.Float(n, 3) for n in expression.atoms(sympy.Float)})
    text = str(rounded).replace("**", "^")
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
