"""Memory over a step: the predicted moments, the measured ones beside them, words and pictures."""

from __future__ import annotations

import gc
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from torch import nn

import autopar
from autopar import cli
from autopar.capture import capture
from autopar.costmodel import track as tracking
from autopar.errors import BatchError, PlanError
from autopar.live_bytes import LiveBytes
from autopar.memory_picture import MemoryTimeline, pipeline_tracks
from autopar.moments import Alive, Moment, Track
from autopar.plan import HOST
from autopar.report import text
from autopar.report_pipeline import step_of
from tests.test_cli import MLP
from tests.zoo import ZOO

SVG = "{http://www.w3.org/2000/svg}"


def planned(name: str, mesh: str, **options: object) -> tuple[autopar.Plan, nn.Module, dict[str, torch.Tensor]]:
    model, batch = ZOO[name](seed=0)
    return autopar.plan(model, mesh, example=batch, device="cpu", quick=True, **options), model, batch


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def measured(request) -> tuple[autopar.Plan, MemoryTimeline]:
    plan, model, batch = planned(request.param, "dp=1")
    return plan, autopar.memory_timeline(plan, model, example=batch, measure=True)


def test_the_largest_moment_is_the_predicted_peak(measured):
    plan, found = measured
    (track,) = found.predicted
    assert track.peak_bytes == pytest.approx(plan.predicted["peak_bytes"], abs=1)
    assert {k: round(v) for k, v in track.peak.bytes.items()} == plan.predicted["memory"]
    phases = [m.phase for m in track.moments]
    assert sorted(set(phases), key=phases.index) == ["forward", "backward", "update"]
    assert [m.at for m in track.moments] == list(range(len(phases)))


def test_measured_within_three_percent(measured):
    plan, found = measured
    assert found.measured_bytes == pytest.approx(plan.predicted["peak_bytes"], rel=0.03)
    (track,) = found.measured
    assert {"forward", "backward", "update"} == {m.phase for m in track.moments}
    then, said = track.peak, found.predicted[0].peak
    assert then.phase == said.phase == "backward"
    for kind in ("parameters", "optimizer", "activations"):
        assert then.bytes[kind] == pytest.approx(said.bytes[kind], rel=0.03), kind
    # The step hands gradients over: at its end every parameter has one.
    assert track.moments[-1].bytes["gradients"] == pytest.approx(track.moments[-1].bytes["parameters"], rel=0.03)


def test_what_is_alive_at_the_peak(measured):
    _, found = measured
    (track,) = found.predicted
    sizes = [a.bytes for a in track.largest]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) <= track.peak_bytes
    stacked = [a for a in track.largest if a.kind == "activations" and a.count == 2]
    assert stacked and all(".*." in a.module and a.name.startswith(f"fwd:{a.module}/") for a in stacked)
    assert any(a.name.startswith("state of ") and a.kind == "optimizer" for a in track.largest)


def test_words_and_picture(measured):
    _, found = measured
    told = text(found.text(), 120)
    assert "predicted, every rank: peak" in told and "measured, this process: peak" in told
    assert "predicted / measured: " in told and "alive at the peak, predicted" in told
    assert found.predicted[0].peak.name in told.replace("\n", "")
    picture = ElementTree.fromstring(found.svg())
    areas = [p.find(f"{SVG}title").text for p in picture.iter(f"{SVG}polygon")]
    assert sum(a.startswith("activations, ") for a in areas) == 2  # predicted, and measured beside it
    words = [t.text for t in picture.iter(f"{SVG}text")]
    assert words.count("backward") == 2 and "optimizer" in words
    left = {round(float(p.get("points").split(",")[0])) for p in picture.iter(f"{SVG}polygon")}
    assert len(left) == 2
    assert json.loads(json.dumps(found.as_dict()))["measured_bytes"] == found.measured_bytes


def test_the_limit_is_drawn():
    plan, model, batch = planned("gpt2", "dp=1", memory_limit=560_000)
    found = autopar.memory_timeline(plan, model, example=batch)
    assert found.peak_bytes <= 560_000 == found.limit and found.measured == () and found.measured_bytes is None
    assert "limit 560 kB" in [t.text for t in ElementTree.fromstring(found.svg()).iter(f"{SVG}text")]
    assert found.peak_bytes == pytest.approx(plan.predicted["peak_bytes"], abs=1)  # with what is computed again


@pytest.mark.parametrize("constraints", [{"dp": "zero3"}, {"dp": "zero1"}])
def test_ranks_of_a_mesh_are_alike(constraints):
    plan, model, batch = planned("llama", "dp=2", constraints=constraints)
    (track,) = autopar.memory_timeline(plan, model, example=batch).predicted
    assert track.peak_bytes == pytest.approx(plan.predicted["peak_bytes"], abs=1)


def test_gradients_on_the_host_are_not_alive_here():
    """The others keep their names."""
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 16, bias=False), nn.Linear(16, 4, bias=False))
    program = capture(model, (torch.randn(2, 8),), {}, loss=None)
    plan = autopar.plan(model, "dp=1", example=(torch.randn(2, 8),), device="cpu")
    there = replace(plan, storage={**plan.storage, "1.weight": replace(plan.stored("1.weight"), state=HOST)})
    for one, hosted in ((plan, 0), (there, 1)):
        found = {a.name: a.bytes for a in tracking.track(program, one, most=100).largest if a.kind == "gradients"}
        want = {"gradient of 0.weight": 4 * 8 * 32, "gradient of 1.weight": 4 * 32 * 16, "gradient of 2.weight": 4 * 64}
        assert found == {name: size for name, size in want.items() if not (hosted and "1.weight" in name)}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    (path.parent / "net.py").write_text(MLP)
    target = ["plan", f"{path.parent / 'net.py'}:build", "--mesh", "pp=2", "--batch", "8"]
    assert cli.main([*target, "--micro-batches", "4", "--schedule", "1f1b", "-o", str(path)]) == 0
    return path


def test_ranks_of_a_pipeline_over_time(stages):
    plan = autopar.Plan.load(stages)
    tracks = pipeline_tracks(plan)
    _, timeline = step_of(plan)
    assert [t.peak_bytes for t in tracks] == pytest.approx(list(timeline.peak_bytes))
    assert max(t.peak_bytes for t in tracks) == pytest.approx(plan.predicted["peak_bytes"])
    for track in tracks:
        assert track.unit == "s" and [m.at for m in track.moments] == sorted(m.at for m in track.moments)
        assert track.moments[-1].at <= timeline.makespan * (1 + 1e-9)
        assert track.moments[-1].bytes["saved"] == pytest.approx(0, abs=1e-6)  # all that was kept has been read
    kept = plan.solver["stage_costs"]["saved_bytes"]
    most = [max(m.bytes["saved"] for m in t.moments) for t in tracks]
    assert most == pytest.approx([2 * kept[0], kept[1]])  # 1f1b: as many as there are ranks from here on


def test_the_command_line(capsys, stages, tmp_path):
    svg = tmp_path / "memory.svg"
    assert cli.main(["simulate", str(stages), "--memory", str(svg)]) == 0
    told = capsys.readouterr().out
    assert "predicted, rank 0 (stage 0): peak" in told and "predicted, rank 1 (stage 1): peak" in told
    words = [t.text for t in ElementTree.fromstring(svg.read_text()).iter(f"{SVG}text")]
    assert "kept by micro-batches in flight" in words and any(str(w).startswith("simulated time, ") for w in words)
    assert cli.main(["simulate", str(stages), "--measure"]) == 2
    assert "--measure is for --memory" in capsys.readouterr().err
    assert cli.main(["simulate", str(stages), "--memory", "--measure"]) == 2
    assert "memory is measured in one process; make one for --mesh dp=1" in capsys.readouterr().err
    assert cli.main(["simulate", str(stages), "--memory", "/nowhere/m.svg"]) == 2
    assert "cannot write /nowhere/m.svg" in capsys.readouterr().err


def test_the_command_line_measures(capsys, stages, tmp_path):
    path = tmp_path / "one.json"
    target = f"{stages.parent / 'net.py'}:build"
    assert cli.main(["plan", target, "--mesh", "dp=1", "--batch", "256", "--optimizer", "sgd", "-o", str(path)]) == 0
    capsys.readouterr()
    assert cli.main(["simulate", str(path), "--memory", "--measure", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["peak_bytes"] == pytest.approx(told["measured_bytes"], rel=0.03)


def test_what_cannot_be_measured_is_refused(stages):
    model, batch = ZOO["gpt2"](seed=0)
    plan = autopar.plan(model, "dp=1", example=batch, device="cpu", quick=True, optimizer_class="lion")
    with pytest.raises(PlanError, match="no optimizer here is 'lion'"):
        autopar.memory_timeline(plan, model, example=batch, measure=True)
    plan = autopar.plan(model, "dp=1", example=batch, device="cpu", quick=True)
    name = next(iter(plan.storage))
    hosted = replace(plan, storage={**plan.storage, name: replace(plan.stored(name), state=HOST)})
    with pytest.raises(PlanError, match=r"of 1 parameters on the host.*host_state=False"):
        autopar.memory_timeline(hosted, model, example=batch, measure=True)
    with pytest.raises(BatchError, match="needs example="):
        autopar.memory_timeline(plan, model)
    with pytest.raises(PlanError, match="made in Python"):
        autopar.memory_timeline(plan)
    other, shapes = ZOO["llama"](seed=0)
    with pytest.raises(PlanError, match="another model"):
        autopar.memory_timeline(plan, other, example=shapes)


def test_live_bytes_traces_lives():
    """What lives from the forward into the backward is activations; what dies before, transient."""
    x = torch.zeros(100)
    with LiveBytes({"inputs": [x]}, trace=True) as live:
        live.phase = "forward"
        kept = x + 1
        gone = x + 2
        del gone
        gc.collect()
        live.phase = "backward"
        last = kept + 1
        del kept
        last.mul_(2)
    track = live.track("here", [last.untyped_storage().data_ptr()])
    assert [m.total for m in track.moments] == [800, 1200, 1200, 800] and track.peak_bytes == live.peak == 1200
    assert track.moments[1].bytes == {"inputs": 400, "activations": 400, "transient": 400}
    assert track.moments[2].bytes == {"inputs": 400, "activations": 400, "gradients": 400}
    assert track.moments[3].bytes == {"inputs": 400, "gradients": 400}
    assert [(a.name, a.kind) for a in track.largest if a.kind == "inputs"] == [("inputs (100,)", "inputs")]
    with pytest.raises(ValueError, match="no op has run"):
        LiveBytes().track("nothing")


def test_a_long_track_keeps_its_peak_when_drawn():
    moments = tuple(Moment(at, "forward", f"op{at}", {"transient": 1000.0 + (at == 4321)}) for at in range(9000))
    one = Track("every rank", moments, "ops", (Alive("op4321", "m", "transient", 1001.0),))
    picture = ElementTree.fromstring(MemoryTimeline("long", (one,)).svg())
    (area,) = [p for p in picture.iter(f"{SVG}polygon")]
    heights = [float(pair.split(",")[1]) for pair in area.get("points").split()]
    assert len(heights) < 2000 and len({round(h, 3) for h in heights}) == 3  # the floor, 1000 and 1001
