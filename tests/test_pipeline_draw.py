"""Pictures and traces of timelines: valid, to scale, with everything in them."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from autopar.errors import ScheduleError
from autopar.pipeline.clock import Costs, Span, Timeline, run
from autopar.pipeline.draw import LOOKS, perfetto, svg
from autopar.pipeline.schedules import interleaved, one_f_one_b, paci, zb_h1
from autopar.pipeline.table import KINDS, Action, Table

SVG = "{http://www.w3.org/2000/svg}"


def parsed(timelines, title="") -> ElementTree.Element:
    return ElementTree.fromstring(svg(timelines, title))


def boxes(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """What is said of an action -> its box."""
    return {r.find(f"{SVG}title").text: r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None}


def words(root: ElementTree.Element) -> list[str]:
    return ["".join(t.itertext()) for t in root.iter(f"{SVG}text")]


def middle(box: ElementTree.Element) -> float:
    return float(box.get("x")) + float(box.get("width")) / 2


def ran(table: Table, stages: int = 2) -> Timeline:
    """F, I and W of one millisecond."""
    return run(table, Costs.even(stages, forward=1e-3, input_grad=1e-3, weight_grad=1e-3))


def test_every_action_is_a_box_to_scale():
    found = boxes(parsed({"1f1b": ran(one_f_one_b(2, 3))}))
    assert len(found) == 12
    forward, backward = found["0F0: forward, 0 to 1 ms"], found["1B0: backward, 2 to 4 ms"]
    # A light line of half a pixel at both ends of every box.
    assert float(backward.get("width")) + 1 == pytest.approx(2 * (float(forward.get("width")) + 1), abs=0.05)
    assert middle(backward) - middle(forward) == pytest.approx(2.5 * (float(forward.get("width")) + 1), abs=0.05)
    assert float(backward.get("y")) > float(forward.get("y"))
    assert forward.get("fill") != backward.get("fill")


def test_timelines_have_one_scale_and_start_together():
    short, late = ran(paci(2, 2, 1)), ran(paci(2, 2, 2))
    shifted = Timeline(tuple(tuple(Span(a, s + 7.5, e + 7.5) for a, s, e in row) for row in late.spans))
    root = parsed({"predicted": short, "measured": shifted})
    first, second = (r for r in root.iter(f"{SVG}rect") if r.findtext(f"{SVG}title", "").startswith("0F0"))
    assert first.get("x") == second.get("x") and first.get("width") == second.get("width")
    assert float(first.get("y")) < float(second.get("y"))


def test_what_stands_in_the_picture():
    said = words(parsed({"paci": ran(paci(2, 2, 2)), "zb-h1": ran(zb_h1(2, 2))}, "Two of them"))
    for text in ("forward", "backward", "gradient of inputs", "gradient of weights", "optimizer step"):
        assert text in said
    assert {"Two of them", "time, ms", "paci  15 ms, ranks compute 80.0% of it", "0", "10"} <= set(said)
    assert "message" not in said and not any(text.startswith("paler") for text in said)
    assert said.count("rank 1") == 2


def test_numbers_stand_where_there_is_room():
    few, many = (words(parsed({"1f1b": ran(one_f_one_b(2, micro))})) for micro in (24, 400))
    assert few.count("23") == 4
    assert "399" not in many


def test_a_long_table_is_drawn_whole():
    assert len(boxes(parsed({"1f1b": ran(one_f_one_b(2, 400))}))) == 1600


def test_stages_of_one_rank_differ():
    root = parsed({"interleaved": ran(interleaved(2, 2), stages=4)})
    fills = {said[:2]: box.get("fill") for said, box in boxes(root).items()}
    assert fills["0F"] == fills["1F"] == LOOKS["F"].fill != fills["2F"] == fills["3F"]
    assert "paler: later stages of the rank" in words(root)


def test_messages_that_keep_ranks_are_shown():
    kept = run(one_f_one_b(2, 2), Costs.even(2, send=1), overlap=False)
    root = parsed({"kept": kept})
    assert "message" in words(root) and "0SF0: message, 1 to 2 s" in boxes(root)


def test_what_takes_no_time_is_still_seen():
    found = boxes(parsed({"paci": ran(paci(2, 2, 2))}))
    steps = [box for said, box in found.items() if "optimizer step" in said]
    assert len(steps) == 4 and all(float(box.get("width")) > 1 for box in steps)


def test_names_with_signs_of_their_own():
    root = parsed({'a < b & "c"': ran(paci(2, 2, 2))}, title="<script>")
    assert any(text.startswith('a < b & "c"') for text in words(root)) and "<script>" in words(root)
    assert list(root.iter("script")) == list(root.iter(f"{SVG}script")) == []


@pytest.mark.parametrize(
    ("seconds", "unit"), [(5e-8, "ns"), (3e-5, "µs"), (4e-3, "ms"), (1.5, "ms"), (2.5, "s"), (4000, "s")]
)
def test_units_of_time(seconds, unit):
    one = Timeline(((Span(Action(0, "F", 0), 0.0, seconds),),))
    said = words(parsed({"one": one}))
    assert f"time, {unit}" in said
    ticks = [text for text in said if re.fullmatch(r"[\d.]+(e\+\d+)?", text)]
    assert 6 <= len(ticks) <= 15


def test_nothing_to_draw():
    for timelines in ({}, {"none": Timeline(((), ()))}):
        with pytest.raises(ScheduleError, match="in which no time passes; there is nothing to draw"):
            svg(timelines)


def test_every_kind_has_a_look():
    assert LOOKS.keys() == set(KINDS)


# ---- traces --------------------------------------------------------------------------------------------------------


def test_perfetto():
    """A process for every timeline, a thread for every rank, microseconds."""
    now = ran(paci(2, 2, 2))
    late = Timeline(tuple(tuple(Span(a, s + 3, e + 3) for a, s, e in row) for row in now.spans))
    trace = json.loads(perfetto({"predicted": now, "measured": late}))
    meta = [(e["name"], e["pid"], e["tid"], e["args"]) for e in trace["traceEvents"] if e["ph"] == "M"]
    assert ("process_name", 1, 0, {"name": "predicted"}) in meta and (
        "process_name",
        2,
        0,
        {"name": "measured"},
    ) in meta
    assert ("thread_name", 2, 1, {"name": "rank 1"}) in meta
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(events) == 2 * sum(map(len, now.spans))
    first = next(e for e in events if e["name"] == "1B0" and e["pid"] == 2)
    assert first["ts"] == pytest.approx(2000) and first["dur"] == pytest.approx(2000)
    assert (first["tid"], first["cat"], first["args"]) == (1, "backward", {"stage": 1, "micro-batch": 0})
    assert next(e for e in events if e["name"] == "0U1")["args"] == {"stage": 0, "update": 1}
