"""Timelines to look at: one picture as SVG, or a trace for ui.perfetto.dev.

Timelines stand below one another on one scale of time, each from its own first action, so that what was predicted and
what was measured can be compared by eye.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from autopar.errors import ScheduleError
from autopar.pipeline.clock import Span, Timeline


class Look(NamedTuple):
    """How a kind of action is shown: in words, its colour, and the colour of what is written on it."""

    words: str
    fill: str
    ink: str


_MESSAGE = Look("message", "#9aa5b1", "#ffffff")
LOOKS: dict[str, Look] = {
    "F": Look("forward", "#3f7fd9", "#ffffff"),
    "B": Look("backward", "#1f9d76", "#ffffff"),
    "I": Look("gradient of inputs", "#8a63c9", "#ffffff"),
    "W": Look("gradient of weights", "#e9b949", "#4a3500"),
    "U": Look("optimizer step", "#c2402f", "#ffffff"),
    **dict.fromkeys(("SF", "RF", "SB", "RB"), _MESSAGE),
}

# Pixels.
_WIDTH, _LEFT, _RIGHT = 1200, 72, 72
_LANE, _GAP = 22, 3
_HEAD, _BETWEEN = 30, 20
_SIZES = ((11, 6.2), (9, 5.2))  # of the number in a box: letters, and how wide a digit is then
_FONT = 'font-family="Helvetica, Arial, sans-serif"'


def svg(timelines: Mapping[str, Timeline], title: str = "") -> str:
    """A picture with a panel for every timeline: name -> timeline. A line of a panel is a rank, a box is an action.

    The number in a box is its micro-batch. Where a rank has several stages, the later ones are paler. At the right of
    every line stands the share of the time that the rank computes.

    Raises:
        ScheduleError: nothing has run in any of them.
    """
    longest = float(max((t.makespan for t in timelines.values()), default=0))
    if longest <= 0:
        raise ScheduleError(f"{len(timelines)} timelines in which no time passes; there is nothing to draw")
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    top = 64 if title else 30
    bottom = top
    panels: list[str] = []
    for name, timeline in timelines.items():
        panels += _panel(name, timeline, bottom, scale, longest)
        bottom += _HEAD + len(timeline.spans) * (_LANE + _GAP) + _BETWEEN
    height = bottom + 26
    words = title or ", ".join(timelines)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}" {_FONT}>',
            f"<title>{escape(words)}</title>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            *([_text(_LEFT, 26, title, size=17, weight=600)] if title else []),
            *_legend(timelines, top - 14),
            *panels,
            *_axis(top + _HEAD - 6, bottom - 10, scale, longest),
            "</svg>\n",
        ]
    )


def _panel(name: str, timeline: Timeline, top: float, scale: float, longest: float) -> Iterator[str]:
    busy = timeline.utilisation
    mean = sum(busy) / len(busy) if busy else 0.0
    unit, label = _unit(longest)
    facts = f"{float(timeline.makespan) / unit:.4g} {label}, ranks compute {float(mean):.1%} of it"
    yield _text(_LEFT, top + 18, name, size=13, weight=600, more=f"  {facts}")
    for rank, row in enumerate(timeline.spans):
        y = top + _HEAD + rank * (_LANE + _GAP)
        yield _text(_LEFT - 10, y + 15, f"rank {rank}", anchor="end", fill="#52606d")
        width = float(timeline.makespan) * scale
        yield f'<rect x="{_LEFT}" y="{y}" width="{width:.2f}" height="{_LANE}" rx="2" fill="#eef1f4"/>'
        stages = sorted({span.action.stage for span in row})
        for span in row:
            yield from _box(span, timeline.start, y, scale, stages, unit, label)
        yield _text(_LEFT + width + 8, y + 15, f"{float(busy[rank]):.0%}", fill="#52606d")


def _box(span: Span, start: float, y: float, scale: float, stages: list[int], unit: float, label: str) -> Iterator[str]:
    """One action. What takes no time is a line, so that it is seen where optimizers step."""
    action, look = span.action, LOOKS[span.action.kind]
    x = _LEFT + float(span.start - start) * scale
    width = float(span.end - span.start) * scale
    edge = 0.5 if width > 3 else 0.0  # a line of light between neighbours
    pale = 0.45 * stages.index(action.stage) / max(1, len(stages) - 1)
    fill = _mixed(look.fill, pale)
    if width < 1:
        x, width, edge = x - 0.75, 1.5, 0.0
    when = f"{float(span.start - start) / unit:.4g} to {float(span.end - start) / unit:.4g} {label}"
    yield (
        f'<rect x="{x + edge:.2f}" y="{y}" width="{width - 2 * edge:.2f}" height="{_LANE}" rx="{2 if edge else 0}" '
        f'fill="{fill}"><title>{action}: {look.words}, {when}</title></rect>'
    )
    number = str(action.index)
    size = next((size for size, digit in _SIZES if digit * len(number) + 3 <= width), None)
    if size is not None and action.kind != "U":
        ink = look.ink if pale < 0.3 else "#1f2933"
        yield _text(x + width / 2, y + 4 + size, number, size=size, anchor="middle", fill=ink)


def _legend(timelines: Mapping[str, Timeline], y: float) -> Iterator[str]:
    rows = [row for timeline in timelines.values() for row in timeline.spans]
    used = {LOOKS[span.action.kind] for row in rows for span in row}
    x = float(_LEFT)
    for look in dict.fromkeys(LOOKS.values()):
        if look in used:
            yield f'<rect x="{x:.1f}" y="{y - 10}" width="12" height="12" rx="2" fill="{look.fill}"/>'
            yield _text(x + 18, y, look.words, fill="#323f4b")
            x += 18 + 6.1 * len(look.words) + 20
    if any(len({span.action.stage for span in row}) > 1 for row in rows):
        yield _text(x, y, "paler: later stages of the rank", fill="#52606d")


def _axis(top: float, bottom: float, scale: float, longest: float) -> Iterator[str]:
    unit, label = _unit(longest)
    step = _round_step(longest / unit / 12)
    for k in range(math.floor(longest / unit / step + 1e-9) + 1):
        x = _LEFT + k * step * unit * scale
        yield f'<line x1="{x:.2f}" y1="{top}" x2="{x:.2f}" y2="{bottom}" stroke="#1f2933" stroke-opacity="0.13"/>'
        yield _text(x, bottom + 16, f"{k * step:g}", anchor="middle", fill="#52606d")
    yield _text(_WIDTH - _RIGHT + 8, bottom + 16, f"time, {label}", fill="#52606d")


def _unit(seconds: float) -> tuple[float, str]:
    """The unit in which so many seconds are a handy number."""
    for unit, label in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 2 * unit:
            return unit, label
    return 1e-9, "ns"


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least as large."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _mixed(colour: str, white: float) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(p + (255 - p) * white):02x}" for p in parts)


def _text(
    x: float, y: float, words: str, size: int = 11, weight: int = 400, anchor: str = "start", fill: str = "#1f2933",
    more: str = "",
) -> str:  # fmt: skip
    tail = f'<tspan font-weight="400" font-size="11" fill="#52606d" xml:space="preserve">{escape(more)}</tspan>'
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{fill}">{escape(words)}{tail if more else ""}</text>'
    )


def perfetto(timelines: Mapping[str, Timeline]) -> str:
    """The same as trace events in JSON, to be opened in ui.perfetto.dev: a process for every timeline, a thread for
    every rank.

    Source: Trace Event Format (complete events "X" and metadata "M"; times in microseconds).
    """
    events: list[dict[str, Any]] = []
    for pid, (name, timeline) in enumerate(timelines.items(), start=1):
        events.append(_meta("process_name", pid, 0, name=name))
        events.append(_meta("process_sort_index", pid, 0, sort_index=pid))
        for tid, row in enumerate(timeline.spans):
            events.append(_meta("thread_name", pid, tid, name=f"rank {tid}"))
            events.append(_meta("thread_sort_index", pid, tid, sort_index=tid))
            for action, start, end in row:
                what = "update" if action.kind == "U" else "micro-batch"
                events.append(
                    {
                        "name": str(action),
                        "cat": LOOKS[action.kind].words,
                        "ph": "X",
                        "ts": float(start - timeline.start) * 1e6,
                        "dur": float(end - start) * 1e6,
                        "pid": pid,
                        "tid": tid,
                        "args": {"stage": action.stage, what: action.index},
                    }
                )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, ensure_ascii=False)


def _meta(kind: str, pid: int, tid: int, **what: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": what}


__all__ = ["LOOKS", "Look", "perfetto", "svg"]
