"""The frontier of time and memory: its ends, that it is monotone, and how it is told."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from torch import nn

import autopar
from autopar import cli
from autopar.capture import capture
from autopar.errors import InfeasibleError, PlanError
from autopar.graph import is_op
from autopar.plan import HOST
from autopar.report import text
from autopar.tradeoff import Frontier, Point, _given_up, frontier

SVG = "{http://www.w3.org/2000/svg}"


class Deep(nn.Module):
    """Mostly activations."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(nn.functional.gelu(layer(x)).sin()) + x
        return x.square().mean()


EXAMPLE = {"x": torch.randn(64, 16)}


@pytest.fixture(scope="module")
def found() -> Frontier:
    free = autopar.plan(Deep(), "dp=1", example=EXAMPLE, device="cpu").predicted["peak_bytes"]
    return autopar.frontier(Deep(), "dp=1", example=EXAMPLE, device="cpu", points=5, memory_limit=0.8 * free)


def test_it_runs_from_the_least_to_no_limit(found):
    with pytest.raises(InfeasibleError) as caught:
        autopar.plan(Deep(), "dp=1", example=EXAMPLE, device="cpu", memory_limit=1, fixes=0)
    assert found.points[0].limit == caught.value.least and found.points[0].peak_bytes <= caught.value.least
    free = autopar.plan(Deep(), "dp=1", example=EXAMPLE, device="cpu")
    assert found.points[-1].limit is None and found.points[-1].slower == 0
    assert found.points[-1].step_s == free.predicted["step_s"]
    assert len(found.points) == 6 and found.refused is None


def test_it_is_monotone(found):
    """More memory is never slower, and every plan fits its limit and says what it gave up."""
    points = found.points
    limits = [p.limit if p.limit is not None else float("inf") for p in points]
    assert limits == sorted(limits)
    assert [p.step_s for p in points] == sorted((p.step_s for p in points), reverse=True)
    assert all(p.peak_bytes <= limit for p, limit in zip(points, limits))
    assert all(p.slower == pytest.approx(p.step_s / points[-1].step_s - 1) for p in points)
    assert re.fullmatch(r"\d+ ops done again", points[0].given_up[0]) and points[0].slower > 0
    assert points[-1].given_up == ()
    again = [int(p.given_up[0].split()[0]) if p.given_up else 0 for p in points]
    assert again[0] == max(again) and again[-1] == 0


def test_the_limit_that_was_asked_for_is_marked(found):
    (asked,) = [p for p in found.points if p.asked]
    assert found.points[0].peak_bytes < asked.limit < found.points[-1].peak_bytes
    told = text(found.table(), 120)
    assert len(re.findall(r"(?m)^> [\d.]+ kB ", told)) == 1 and "> the limit that was asked for" in told
    picture = ElementTree.fromstring(found.svg())
    words = [t.text for t in picture.iter(f"{SVG}text")]
    assert any(str(w).startswith("asked for: ") for w in words) and "predicted peak per rank, kB" in words
    dots = list(picture.iter(f"{SVG}circle"))
    assert len(dots) == len(found.points) and sum(d.get("fill") == "#c2402f" for d in dots) == 1
    across = [float(d.get("cx")) for d in dots]
    up = [-float(d.get("cy")) for d in dots]
    assert across == sorted(across) and up == sorted(up, reverse=True)


def test_a_limit_below_the_least_is_told_as_such():
    found = frontier(Deep(depth=1), "dp=1", example=EXAMPLE, device="cpu", points=2, memory_limit=1000)
    assert found.refused == 1000 and not any(p.asked for p in found.points)
    assert "1 kB were asked for, which is " in text(found.table(), 120)
    ElementTree.fromstring(found.svg())


@pytest.mark.slow
def test_a_mesh_that_cuts_and_a_pipeline():
    """Cutting finer is told in bytes of parameters; of a pipeline, its micro-batches and schedule."""
    pinned = {"device": "cpu", "example": EXAMPLE, "quick": True, "points": 2}
    found = frontier(Deep(), "dp=2", **pinned)
    assert found.points[0].peak_bytes < found.points[-1].peak_bytes and found.points[0].given_up
    stages = frontier(Deep(), "pp=2", **pinned, schedule="gpipe")
    assert stages.points[0].peak_bytes < stages.points[-1].peak_bytes
    told = stages.points[0].given_up
    assert any(re.match(r"gpipe with \d+ micro-batches|\d+ ops done again", words) for words in told)


def test_what_lies_on_the_host_is_told():
    """And a point that gives nothing up has a limit all the same."""
    model, program = Deep(), capture(Deep(), (), EXAMPLE)
    free = autopar.plan(model, "dp=1", example=EXAMPLE, device="cpu")
    away = [n.meta["address"] for n in program.gm.graph.nodes if is_op(n) and n.meta["phase"] == "fwd"][:2]
    hosted = {name: replace(s, state=HOST) for name, s in list(free.storage.items())[:3]}
    plan = replace(free, saved=dict.fromkeys(away, "offload"), storage={**free.storage, **hosted})
    told = tuple(_given_up(plan, free, program))
    assert told == ("results of 2 ops wait on the host", "optimizer state of 3 parameters on the host")
    points = (Point(500_000.0, plan, given_up=told), Point(600_000.0, free), Point(None, free))
    picture = ElementTree.fromstring(Frontier("host", points).svg())
    ends = [dot.find(f"{SVG}title").text.partition(": ")[2] for dot in picture.iter(f"{SVG}circle")]
    assert ends == [", ".join(told), "nothing is given up", "no limit"]


NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)

    def forward(self, x):
        return torch.tanh(self.down(torch.sigmoid(torch.exp(self.up(x)).sin()))).square().mean()

def build(batch):
    return Net(), {"x": torch.randn(batch, 8)}
"""


def test_the_command_line(capsys, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    svg = tmp_path / "frontier.svg"
    plan = ["plan", f"{tmp_path / 'net.py'}:build", "--mesh", "dp=1", "--batch", "32", "--what-if", "--points", "3"]
    assert cli.main([*plan, "--svg", str(svg), "--memory", "1kB"]) == 1
    told = capsys.readouterr().out
    assert "time against memory" in told and "what is given up" in told and "short" in told
    ElementTree.fromstring(svg.read_text())
    assert cli.main([*plan, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert points[-1]["limit"] is None and points[0]["peak_bytes"] <= points[-1]["peak_bytes"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--what-if", "-o", "plan.json"), "--what-if makes many plans and writes none"),
        (("--svg", "x.svg"), "--svg draws what --what-if finds"),
        (("--what-if", "--points", "1"), "a frontier, which has two ends"),
    ],
)
def test_options_that_do_not_go_together(capsys, tmp_path, words, told):
    (tmp_path / "net.py").write_text(NET)
    assert cli.main(["plan", f"{tmp_path / 'net.py'}:build", "--mesh", "dp=1", *words]) == 2
    assert told in capsys.readouterr().err


def test_one_point_is_no_frontier():
    with pytest.raises(PlanError, match="two ends"):
        frontier(Deep(), "dp=1", example=EXAMPLE, device="cpu", points=1)
