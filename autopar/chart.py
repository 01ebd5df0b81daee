"""Charts as SVG, written by hand: pages, axes and text, for pictures of memory and of what it costs in time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

FONT = 'font-family="Helvetica, Arial, sans-serif"'
INK, SOFT, GRID, PAPER, MARK = "#1f2933", "#52606d", "#dde3e9", "#ffffff", "#c2402f"


@dataclass(frozen=True)
class Panel:
    """A rectangle of a page with a scale on either side: values 0 to `wide` and 0 to `high` are inside.

    Attributes:
        left, top, width, height: in pixels. least: the value at the left edge.
    """

    left: float
    top: float
    width: float
    height: float
    wide: float
    high: float
    least: float = 0.0

    def x(self, value: float) -> float:
        """Pixels of a value along the page."""
        return self.left + self.width * (value - self.least) / max(self.wide - self.least, 1e-300)

    def y(self, value: float) -> float:
        """Pixels of a value up the page."""
        return self.top + self.height * (1 - value / max(self.high, 1e-300))

    def frame(self) -> str:
        """Its ground."""
        return rect(self.left, self.top, self.width, self.height, "#f6f8fa")

    def lines_up(self, unit: float, label: str) -> Iterator[str]:
        """Lines across, with numbers at the left."""
        for value in ticks(0.0, self.high / unit, 5):
            y = self.y(value * unit)
            yield line(self.left, y, self.left + self.width, y, GRID)
            yield text(self.left - 8, y + 4, f"{value:g}", anchor="end", fill=SOFT)
        yield text(self.left - 8, self.top - 8, label, anchor="end", fill=SOFT)

    def lines_along(self, unit: float, label: str) -> Iterator[str]:
        """Lines up, with numbers below."""
        bottom = self.top + self.height
        for value in ticks(self.least / unit, self.wide / unit, 8):
            x = self.x(value * unit)
            yield line(x, self.top, x, bottom, GRID)
            yield text(x, bottom + 16, f"{value:g}", anchor="middle", fill=SOFT)
        yield text(self.left + self.width, bottom + 32, label, anchor="end", fill=SOFT)


def page(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A whole picture, with its title on it."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" {FONT}>',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>',
            text(24, 30, title, size=17, weight=600),
            *parts,
            "</svg>\n",
        ]
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / count * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def text(
    x: float, y: float, words: str, size: int = 11, weight: int = 400, anchor: str = "start", fill: str = INK
) -> str:
    """Words on the page; `y` is their base line."""
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{fill}">{escape(words)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, dash: str = "", width: float = 1.0) -> str:
    """A straight line."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="{stroke}" stroke-width="{width:g}"'
        f"{dashed}/>"
    )


def rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"/>'


def dot(x: float, y: float, fill: str, words: str, radius: float = 4.5) -> str:
    """A point, with words that a reader sees who rests on it."""
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:g}" fill="{fill}"><title>{escape(words)}</title></circle>'


def area(points: Sequence[tuple[float, float]], fill: str, words: str) -> str:
    """A filled polygon, with words as of `dot`."""
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f'<polygon points="{path}" fill="{fill}"><title>{escape(words)}</title></polygon>'


def path(points: Sequence[tuple[float, float]], stroke: str, width: float = 1.5) -> str:
    """A line through points."""
    told = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f'<polyline points="{told}" fill="none" stroke="{stroke}" stroke-width="{width:g}"/>'


def unit_of(amount: float) -> tuple[float, str]:
    """The unit in which so many bytes are a handy number."""
    for factor, label in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= factor:
            return factor, label
    return 1.0, "B"


__all__ = ["Panel", "area", "dot", "line", "page", "path", "rect", "text", "ticks", "unit_of"]
