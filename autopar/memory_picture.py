"""A picture of memory: what a rank holds over a step, by kind, as predicted, and as measured beside it.

Predicted, of a plan without stages, is every moment of its ranks, which are alike; of a pipeline, every rank over
simulated time. Measured is one step of training run here, with every op watched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import nn

from autopar import chart, driver, options, questions, report_pipeline, targets
from autopar.capture import capture
from autopar.costmodel.track import track
from autopar.errors import BatchError, PlanError
from autopar.given import check_plan
from autopar.live_bytes import LiveBytes
from autopar.moments import Moment, Track
from autopar.pipeline.clock import Costs, Timeline
from autopar.plan import Plan
from autopar.report import plain_table
from autopar.runtime.training import loss_of
from autopar.units import bytes_

#: Kinds of memory: what they are called, and their colours, from the bottom of a picture up. Others come on top, grey.
LOOKS = {
    "parameters": ("parameters", "#2f5f9e"),
    "static": ("parameters, gradients, optimizer", "#2f5f9e"),
    "optimizer": ("optimizer", "#6d8fc2"),
    "buffers": ("buffers", "#a9bddb"),
    "inputs": ("inputs", "#c9d5e8"),
    "gradients": ("gradients", "#1f9d76"),
    "gathered": ("gathered", "#7cc4ab"),
    "activations": ("activations", "#e9b949"),
    "saved": ("kept by micro-batches in flight", "#e9b949"),
    "pending": ("waiting for gradients of weights", "#f3d68f"),
    "collectives": ("collectives", "#8a63c9"),
    "transient": ("transient", "#d9825b"),
    "slack": ("slack", "#cfd6dd"),
}
#: Steps before the one that is measured, after which the optimizer has its state; and steps that are measured, of which
#: the lowest counts: a thread may let go of something late.
WARM, TRIES = 2, 3
#: Columns of a panel into which moments are gathered, and of the page.
COLUMNS, WIDTH, HEIGHT = 420, 1180, 250
#: What a plan's optimizer is here.
STEPPERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-3),
    "sgd_momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


@dataclass(frozen=True)
class MemoryTimeline:
    """Memory over a step.

    Attributes:
        predicted: a track for all ranks, or of a pipeline one for each. measured: of this process, if it was.
        limit: bytes that the plan was to fit.
    """

    title: str
    predicted: tuple[Track, ...]
    measured: tuple[Track, ...] = ()
    limit: float | None = None

    @property
    def peak_bytes(self) -> float:
        """Predicted bytes of the fullest rank."""
        return max(t.peak_bytes for t in self.predicted)

    @property
    def measured_bytes(self) -> float | None:
        """Measured bytes at the peak."""
        return max((t.peak_bytes for t in self.measured), default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: peaks and what is alive then, without the moments."""

        def told(one: Track) -> dict[str, Any]:
            top = one.peak
            return {
                "name": one.name, "peak_bytes": one.peak_bytes, "phase": top.phase, "at": top.at, "unit": one.unit,
                "op": top.name, "memory": dict(top.bytes), "largest": [asdict(a) for a in one.largest],
            }  # fmt: skip

        return {
            "peak_bytes": self.peak_bytes, "measured_bytes": self.measured_bytes, "limit": self.limit,
            "predicted": [told(t) for t in self.predicted], "measured": [told(t) for t in self.measured],
        }  # fmt: skip

    def text(self) -> list[RenderableType]:
        """The peaks in words, and the largest tensors then."""
        parts: list[RenderableType] = [Text(self.title)]
        for words, tracks in (("predicted", self.predicted), ("measured", self.measured)):
            for one in tracks:
                parts.append(Text(f"{words}, {one.name}: {_peak(one)}"))
        if self.measured_bytes:
            parts.append(Text(f"predicted / measured: {100 * (self.peak_bytes / self.measured_bytes - 1):+.2f} %"))
        if self.limit is not None:
            parts.append(Text(f"limit: {bytes_(self.limit)}, {bytes_(self.limit - self.peak_bytes)} above the peak"))
        for words, tracks in (("predicted", self.predicted), ("measured", self.measured)):
            fullest = max(tracks, key=lambda t: t.peak_bytes, default=None)
            if fullest is not None and fullest.largest:
                columns = plain_table()
                for head in (f"alive at the peak, {words}", "made by", "kind"):
                    columns.add_column(head, overflow="fold")
                columns.add_column("how many", justify="right")
                columns.add_column("bytes", justify="right")
                for held in fullest.largest:
                    columns.add_row(held.name, held.module or "-", held.kind, str(held.count), bytes_(held.bytes))
                parts.append(columns)
        return parts

    def svg(self) -> str:
        """Areas by kind over the moments of a step: a row for every track, the measured one beside the predicted."""
        high = max(t.peak_bytes for t in (*self.predicted, *self.measured))
        high = 1.12 * max(high, self.limit if self.limit and self.limit < 1.5 * high else 0.0)
        rows = max(len(self.predicted), len(self.measured))
        wide = (WIDTH - 84 - 24) / (2 if self.measured else 1) - (64 if self.measured else 0)
        parts = list(self._legend(58))
        for words, tracks, left in (("predicted", self.predicted, 84.0), ("measured", self.measured, 84 + wide + 88)):
            longest = max((_end(t) for t in tracks), default=1.0)
            for row, one in enumerate(tracks):
                panel = chart.Panel(left, 112 + row * (HEIGHT + 76), wide, HEIGHT, longest, high)
                parts += _panel(panel, one, f"{words}, {one.name}", self.limit)
        return chart.page(WIDTH, 112 + rows * (HEIGHT + 76), self.title, parts)

    def _legend(self, y: float) -> Iterator[str]:
        x = 84.0
        kinds = {k for t in (*self.predicted, *self.measured) for k in t.kinds}
        for kind in _ordered(kinds):
            words, fill = _look(kind)
            yield chart.rect(x, y - 10, 12, 12, fill)
            yield chart.text(x + 17, y, words, fill=chart.SOFT)
            x += 17 + 6.1 * len(words) + 16


def _peak(one: Track) -> str:
    top = one.peak
    when = f"at {1e3 * top.at:.4g} ms" if one.unit == "s" else f"{top.at + 1:g} of {len(one.moments)}"
    kinds = ", ".join(f"{k} {bytes_(v)}" for k, v in top.bytes.items() if v >= 0.5)
    return f"peak {bytes_(one.peak_bytes)} in the {_PHASES.get(top.phase, top.phase)}, {when}: {top.name} ({kinds})"


#: Actions of a pipeline by their letters.
_PHASES = {
    "F": "forward", "B": "backward", "I": "gradient of inputs", "W": "gradient of weights", "U": "update",
}  # fmt: skip


# ---- drawing -------------------------------------------------------------------------------------------------------


def _look(kind: str) -> tuple[str, str]:
    return LOOKS.get(kind, (kind, "#9aa5b1"))


def _ordered(kinds: set[str]) -> list[str]:
    return [*(k for k in LOOKS if k in kinds), *sorted(kinds - set(LOOKS))]


def _end(one: Track) -> float:
    last = one.moments[-1].at
    return last + 1 if one.unit == "ops" else max(last, 1e-300)


def _panel(panel: chart.Panel, one: Track, words: str, limit: float | None) -> Iterator[str]:
    unit, label = chart.unit_of(panel.high)
    yield panel.frame()
    yield from panel.lines_up(unit, label)
    if one.unit == "s":
        scale, per = next((s, w) for s, w in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")) if panel.wide >= s)
        yield from panel.lines_along(scale, f"simulated time, {per}")
    columns = _columns(one, panel)
    floor = [0.0] * len(columns)
    for kind in _ordered(set(one.kinds)):
        top = [low + moment.bytes.get(kind, 0.0) for low, (_, _, moment) in zip(floor, columns)]
        upper = [(panel.x(x), panel.y(t)) for t, (a, b, _) in zip(top, columns) for x in (a, b)]
        lower = [(panel.x(x), panel.y(f)) for f, (a, b, _) in zip(floor, columns) for x in (a, b)]
        most = max(m.bytes.get(kind, 0.0) for m in one.moments)
        yield chart.area([*upper, *reversed(lower)], _look(kind)[1], f"{_look(kind)[0]}, {bytes_(most)} at most")
        floor = top
    yield from _phases(panel, one)
    peak = one.peak
    x, y = panel.x(peak.at), panel.y(one.peak_bytes)
    yield chart.dot(x, y, chart.INK, f"{peak.name}: {bytes_(one.peak_bytes)}", 3)
    yield chart.text(panel.left, panel.top - 22, words, size=13, weight=600)
    more = f"peak {bytes_(one.peak_bytes)} at {peak.name}"
    yield chart.text(panel.left, panel.top - 7, more, fill=chart.SOFT)
    if limit is not None and limit <= panel.high:
        yield chart.line(panel.left, panel.y(limit), panel.left + panel.width, panel.y(limit), chart.MARK, "6 4")
        yield chart.text(panel.left + 6, panel.y(limit) - 5, f"limit {bytes_(limit)}", fill=chart.MARK)


def _columns(one: Track, panel: chart.Panel) -> list[tuple[float, float, Moment]]:
    """(from, to, what is held there): of many moments in one column of the picture, the one at which most is held."""
    ends = [*(m.at for m in one.moments[1:]), _end(one)]
    spans = [(m.at, end, m) for m, end in zip(one.moments, ends)]
    if len(spans) <= COLUMNS:
        return spans
    width, found = panel.wide / COLUMNS, list[tuple[float, float, Moment]]()
    for start, end, moment in spans:
        if found and int(start / width) == int(found[-1][0] / width):
            begin, _, was = found[-1]
            found[-1] = (begin, end, moment if moment.total > was.total else was)
        else:
            found.append((start, end, moment))
    return found


def _phases(panel: chart.Panel, one: Track) -> Iterator[str]:
    """Where forward, backward and update begin; a pipeline has them all at once."""
    if one.unit == "s":
        return
    last = ""
    for moment in one.moments:
        if moment.phase != last:
            last, x = moment.phase, panel.x(moment.at)
            if moment.at:
                yield chart.line(x, panel.top, x, panel.top + panel.height, chart.SOFT, "2 3")
            anchor = "end" if x > panel.left + 0.93 * panel.width else "start"
            yield chart.text(x + 3, panel.top + panel.height + 16, last, anchor=anchor, fill=chart.SOFT)


# ---- predicted -----------------------------------------------------------------------------------------------------


def pipeline_tracks(plan: Plan) -> tuple[Track, ...]:
    """Of every rank of a lane, what it holds over the simulated time of a step. Their peaks are those of the clock.

    Raises:
        PlanError: the plan does not say what its stages cost.
    """
    _, timeline = report_pipeline.step_of(plan)
    return tuple(_rank(rank, timeline, report_pipeline.costs_of(plan)) for rank in range(len(timeline.spans)))


def _rank(rank: int, timeline: Timeline, costs: Costs) -> Track:
    row = timeline.spans[rank]
    trains = any(span.action.kind in ("B", "I") for spans in timeline.spans for span in spans)
    stages = sorted({span.action.stage for span in row})
    held = {"static": float(sum(costs.static_bytes[s] for s in stages)), "saved": 0.0, "pending": 0.0, "transient": 0.0}
    moments = [Moment(0.0, "", "the start of the step", dict(held))]
    begins: dict[str, list[tuple[str, Sequence[float]]]] = {
        "F": [("saved", costs.saved_bytes)] if trains else [], "I": [("pending", costs.pending_bytes)],
    }  # fmt: skip
    ends: dict[str, list[tuple[str, Sequence[float]]]] = {
        "B": [("saved", costs.saved_bytes)], "I": [("saved", costs.saved_bytes)],
        "W": [("pending", costs.pending_bytes)],
    }  # fmt: skip
    for span in row:
        stage, kind, _ = span.action
        if kind not in _PHASES:
            continue  # messages hold nothing by themselves
        for name, sizes in begins.get(kind, []):
            held[name] += float(sizes[stage])
        during = {**held, "transient": float(costs.transient_bytes[stage])}
        moments.append(Moment(float(span.start - timeline.start), kind, str(span.action), during))
        for name, sizes in ends.get(kind, []):
            held[name] -= float(sizes[stage])
        moments.append(Moment(float(span.end - timeline.start), kind, f"behind {span.action}", dict(held)))
    words = ", ".join(map(str, stages))
    return Track(f"rank {rank} (stage{'s' if len(stages) > 1 else ''} {words})", tuple(moments), "s")


# ---- measured ------------------------------------------------------------------------------------------------------


def measured_track(
    plan: Plan, model: nn.Module, args: Any, kwargs: Any, loss: Callable[..., Any] | None = None
) -> Track:
    """One step of training of the plan in this process, with every op watched. Needs the model's values.

    Raises:
        PlanError: the plan is for more than this process, for an optimizer that is not known here, has some of its
            state on the host, or holds more than this machine has. BatchError: positional and named arguments together.
        RuntimeUseError: the model gives no loss.
    """
    if plan.mesh.num_devices != 1 or plan.pipeline is not None:
        raise PlanError(
            f"the plan is for {plan.mesh.num_devices} devices, and memory is measured in one process; make one for "
            "--mesh dp=1, perhaps with a smaller batch"
        )
    if plan.optimizer not in STEPPERS:
        raise PlanError(
            f"no optimizer here is {plan.optimizer!r}, for which the plan was made; to measure, plan for one of "
            f"{', '.join(STEPPERS)}"
        )
    if plan.on_host:  # which is this process's memory, too: it would count as the device's
        raise PlanError(
            f"the plan keeps gradients and optimizer state of {len(plan.on_host)} parameters on the host, which is no "
            "memory apart from the device's where it is measured; to measure, plan with host_state=False "
            "(--no-host-state)"
        )
    need = float(plan.predicted.get("peak_bytes", 0.0))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > free:
        raise PlanError(
            f"a step needs {bytes_(need)}, and {bytes_(free)} of this machine's memory are free; measure a smaller "
            "model or batch"
        )
    if args and kwargs:
        raise BatchError("pass the arguments all by position or all by name, to measure")
    pm = driver.compile(model, plan.mesh, example=args or kwargs, loss=loss, plan=plan, check=False)
    optimizer = STEPPERS[plan.optimizer](pm.parameters())

    def step(live: LiveBytes | None) -> None:
        def phase(name: str) -> None:
            if live is not None:
                live.phase = name

        phase("forward")
        out = pm(*args, **kwargs)
        phase("backward")
        loss_of(out).backward()
        phase("update")
        optimizer.step()

    best: Track | None = None
    for number in range(WARM + TRIES):
        if number < WARM:
            step(None)
        else:
            held = {
                "parameters": pm.parameters(),
                "buffers": pm.buffers(),
                "inputs": [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)],
                "optimizer": [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)],
            }
            with LiveBytes(held, trace=True) as live:
                step(live)
            grads = [p.grad.untyped_storage().data_ptr() for p in pm.parameters() if p.grad is not None]
            found = live.track("this process", grads)
            best = found if best is None or found.peak_bytes < best.peak_bytes else best
        optimizer.zero_grad()
    assert best is not None
    return best


# ---- both ----------------------------------------------------------------------------------------------------------


def memory_timeline(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    example: options.Example | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    measure: bool = False,
    tell: Callable[[str], None] = questions.silent,
) -> MemoryTimeline:
    """What a rank holds over a step of `plan`, by kind, moment by moment.

    Args:
        model, example, loss: what the plan was made for; may be left out for plans made by `autopar plan`, and for the
            prediction of a pipeline, which is in the plan.
        measure: also run a step here, of a plan for one device, with the model's own values. tell: told what happens.

    Raises:
        PlanError: the plan is for another model, cannot be measured here, or does not say what it is asked.
        BatchError: a model without an example.
    """
    title = f"Memory of {plan.target.get('text', 'a plan')} on {plan.mesh}"
    limit = plan.predicted.get("memory_limit")
    args, kwargs, real = (), dict[str, Any](), None
    if model is not None:
        call = options.arguments(example)
        if call is None:
            raise BatchError("memory_timeline needs example= with a model: the arguments of one call")
        (args, kwargs), real = call, model  # type: ignore[assignment]
    if plan.pipeline is not None:
        predicted = pipeline_tracks(plan)
    else:
        program = (
            questions.rebuild(plan, tell)
            if model is None
            else capture(model, args, kwargs, loss=loss, precision=plan.computes)
        )
        check_plan(program, plan)
        predicted = (track(program, plan, questions.device_of(plan)),)
    measured: tuple[Track, ...] = ()
    if measure:
        if real is None:
            tell("building the model ...")
            built = targets.build(targets.Target.from_dict(plan.target), real=True)
            real, args, kwargs, loss = built.model, built.args, built.kwargs, built.loss  # type: ignore[assignment]
        tell("running a step ...")
        measured = (measured_track(plan, real, args, kwargs, loss),)
    return MemoryTimeline(title, predicted, measured, float(limit) if limit is not None else None)


__all__ = ["MemoryTimeline", "measured_track", "memory_timeline", "pipeline_tracks"]
