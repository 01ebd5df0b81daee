"""The frontier of time and memory: what a step costs as a device has less memory, down to the least that will do.

Every point is a plan, solved under its limit. A plan that fits a limit fits every larger one, so a point has the
quickest of all plans that were found for it or for less: more memory is never slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autopar import chart, driver
from autopar.errors import InfeasibleError, PlanError
from autopar.graph import FORWARD, Program, is_op
from autopar.options import parse_bytes
from autopar.plan import Plan
from autopar.programs import Kept
from autopar.recompute import OFFLOADED, RECOMPUTE
from autopar.report import plain_table, seconds
from autopar.units import UNLIMITED, bytes_

#: Points of a frontier unless asked otherwise, the ends included.
POINTS = 8
#: A difference of bytes that is told.
_TOLD = 0.99


@dataclass(frozen=True)
class Point:
    """A limit and the quickest plan found for it.

    Attributes:
        limit: bytes per device; None: no limit. asked: it is the user's own. slower: than without a limit, a part of 1.
        given_up: what the plan does, to hold less, that the one without a limit does not.
    """

    limit: float | None
    plan: Plan
    asked: bool = False
    slower: float = 0.0
    given_up: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> float:
        """Predicted bytes of the fullest rank."""
        return float(self.plan.predicted["peak_bytes"])

    @property
    def step_s(self) -> float:
        """Simulated seconds of a step."""
        return float(self.plan.predicted["step_s"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "limit": self.limit,
            "asked": self.asked,
            "peak_bytes": self.peak_bytes,
            "step_s": self.step_s,
            "slower": self.slower,
            "given_up": list(self.given_up),
        }


@dataclass(frozen=True)
class Frontier:
    """Points from the least limit that is feasible to none.

    Attributes:
        refused: the user's limit, if not even the least plan fits it.
    """

    title: str
    points: tuple[Point, ...]
    refused: float | None = None

    def table(self) -> list[RenderableType]:
        """The points as a table."""
        columns = plain_table()
        for head in ("limit", "predicted peak", "step", "slower"):
            columns.add_column(head, justify="right")
        columns.add_column("what is given up", overflow="fold", ratio=1)
        for point in self.points:
            limit = "none" if point.limit is None else bytes_(point.limit)
            columns.add_row(
                f"> {limit}" if point.asked else limit, bytes_(point.peak_bytes), seconds(point.step_s),
                f"{100 * point.slower:.1f} %", ", ".join(point.given_up) or "-",
            )  # fmt: skip
        parts: list[RenderableType] = [Text(self.title), columns]
        if any(point.asked for point in self.points):
            parts.append(Text("> the limit that was asked for"))
        if self.refused is not None:
            least = self.points[0].peak_bytes
            parts.append(Text(f"{bytes_(self.refused)} were asked for, which is {bytes_(least - self.refused)} short"))
        return parts

    def svg(self) -> str:
        """The points as a picture: memory along, time up, the user's limit marked."""
        peaks, steps = [p.peak_bytes for p in self.points], [p.step_s for p in self.points]
        limits = [*peaks, *(p.limit for p in self.points if p.asked and p.limit), *filter(None, [self.refused])]
        low, high = min(limits), max(limits)
        edge = 0.06 * (high - low) or 0.1 * high
        panel = chart.Panel(84, 84, 760, 330, high + edge, 1.15 * max(steps), max(0.0, low - edge))
        unit, label = chart.unit_of(high)
        scale, per = next((s, w) for s, w in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")) if max(steps) >= s)
        parts = [
            panel.frame(),
            *panel.lines_up(scale, f"step, {per}"),
            *panel.lines_along(unit, f"predicted peak per rank, {label}"),
            *self._steps(panel),
        ]
        for point in self.points:
            given_up = ", ".join(point.given_up) or ("no limit" if point.limit is None else "nothing is given up")
            words = f"{bytes_(point.peak_bytes)}, {seconds(point.step_s)}: {given_up}"
            fill = chart.MARK if point.asked else "#3f7fd9"
            parts.append(chart.dot(panel.x(point.peak_bytes), panel.y(point.step_s), fill, words))
            if point.slower >= 0.0005:
                told = f"+{100 * point.slower:.3g} %"
                x, y = panel.x(point.peak_bytes), panel.y(point.step_s)
                parts.append(chart.text(x + 7, y - 7, told, fill=chart.SOFT))
        asked = self.refused or next((p.limit for p in self.points if p.asked), None)
        if asked:
            x = panel.x(asked)
            parts.append(chart.line(x, panel.top, x, panel.top + panel.height, chart.MARK, "5 4"))
            parts.append(chart.text(x + 6, panel.top + 14, f"asked for: {bytes_(asked)}", fill=chart.MARK))
        return chart.page(880, 470, self.title, parts)

    def _steps(self, panel: chart.Panel) -> Iterator[str]:
        """The staircase: between two points the plan of the lower one runs."""
        corners: list[tuple[float, float]] = []
        for point in self.points:
            if corners:
                corners.append((panel.x(point.peak_bytes), corners[-1][1]))
            corners.append((panel.x(point.peak_bytes), panel.y(point.step_s)))
        yield chart.path(corners, "#9aa5b1")


def frontier(
    model: Any,
    mesh: Any,
    *,
    points: int = POINTS,
    memory_limit: float | str | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Frontier:
    """What a step costs under less and less memory.

    Args:
        model, mesh, options: as of `autopar.plan`. points: so many limits, from the least that is feasible to none,
            evenly apart in ratio. memory_limit: of interest: a further point, marked. progress: told what happens.

    Raises:
        PlanError: fewer than two points. Others: as `autopar.plan`, but for a limit that nothing fits, which
            `Frontier.refused` tells.
    """
    if points < 2:
        raise PlanError(f"{points} points of a frontier, which has two ends; ask for 2 or more")
    programs = Kept()
    plan_of = partial(driver.plan_model, model, mesh, programs=programs, fixes=0.0, **options)
    asked = parse_bytes(memory_limit)
    progress("planning without a limit ...")
    free = plan_of(memory_limit=UNLIMITED)
    progress("looking for the least memory ...")
    least = _least(plan_of)
    high = float(free.predicted["peak_bytes"])
    inner = [least * (high / least) ** (k / (points - 1)) for k in range(points - 1)] if least < high else []
    refused = float(asked) if asked is not None and asked < least else None
    wanted = sorted({*map(float, map(round, inner)), *([float(asked)] if asked is not None and not refused else [])})
    plans = [free]
    for number, limit in enumerate(wanted):
        progress(f"planning within {bytes_(limit)}, {number + 1} of {len(wanted)} ...")
        try:
            plans.append(plan_of(memory_limit=round(limit)))
        except InfeasibleError:  # as near to the least as this, that it is feasible need not be found again
            continue
    found = [p for limit in (*wanted, None) for p in _point(limit, limit == asked, plans)]
    end, whole = found[-1], programs.first
    told = tuple(
        replace(p, slower=p.step_s / end.step_s - 1, given_up=tuple(_given_up(p.plan, end.plan, whole))) for p in found
    )
    name = (options.get("target") or {}).get("text", "the model")
    return Frontier(f"{name} on {mesh}: time against memory", told, refused)


def _least(plan_of: Callable[..., Plan]) -> float:
    """Bytes of the plan of least memory."""
    try:
        return float(plan_of(memory_limit=1).predicted["peak_bytes"])
    except InfeasibleError as error:
        return error.least


def _point(limit: float | None, asked: bool, plans: list[Plan]) -> Iterator[Point]:
    """The quickest of the plans within a limit, and of those as quick the one that holds least, if there is any."""
    fits = [p for p in plans if limit is None or p.predicted["peak_bytes"] <= limit]
    if fits:
        quickest = min(fits, key=lambda p: (p.predicted["step_s"], p.predicted["peak_bytes"]))
        yield Point(limit, quickest, asked and limit is not None)


def _given_up(plan: Plan, free: Plan, program: Program) -> Iterator[str]:
    """What a plan does otherwise than the one without a limit, in words."""
    now, then = (p.predicted.get("memory", {}).get("parameters", 0.0) for p in (plan, free))
    if now < _TOLD * then:
        yield f"parameters cut finer ({bytes_(now)} in place of {bytes_(then)})"
    saved = [
        plan.how_saved(n.meta["address"])
        for n in program.gm.graph.nodes
        if is_op(n) and n.meta.get("phase", FORWARD) == FORWARD and "address" in n.meta
    ]
    again, waiting, hosted = saved.count(RECOMPUTE), saved.count(OFFLOADED), len(plan.on_host)
    if again:
        yield f"{again} ops done again"
    if waiting:
        yield f"results of {waiting} ops wait on the host"
    if hosted:
        yield f"optimizer state of {hosted} parameters on the host"
    if plan.optimizer != free.optimizer:
        yield f"{plan.optimizer} in place of {free.optimizer}"
    mine, whole = plan.pipeline, free.pipeline
    if mine is not None and whole is not None and mine != whole:
        if (mine.schedule, mine.micro) != (whole.schedule, whole.micro):
            yield f"{mine.schedule} with {mine.micro} micro-batches"
        elif mine.starts != whole.starts:
            yield "stages cut elsewhere"
    differ = sum(plan.choice(a) != c for a, c in free.choices.items())
    if differ and plan.mesh == free.mesh and plan.mesh.num_devices > 1:
        yield f"{differ} of {len(free.choices)} decisions split otherwise"


__all__ = ["POINTS", "Frontier", "Point", "frontier"]
