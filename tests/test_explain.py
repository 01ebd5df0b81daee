"""Explanations: prices of changes are exact, the next best is the best there is, and the words name what decided."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import autopar
from autopar import questions, words
from autopar.capture import capture
from autopar.costmodel.choices import Pins
from autopar.costmodel.explain import Bench
from autopar.costmodel.ilp import solve
from autopar.costmodel.lower import lift, lower
from autopar.costmodel.planner import plan
from autopar.costmodel.price import price
from autopar.costmodel.problem import NoOption
from autopar.costmodel.simulate import simulate
from autopar.costmodel.tally import compute_seconds, movements, update_seconds
from autopar.errors import PlanError
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.questions import open_program


class Net(nn.Module):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(depth)
        )
        self.head = nn.Linear(64, 32)

    def forward(self, x, y):
        for layer in self.layers:
            x = x + layer(x)
        return (self.head(x) - y).square().mean()


def example(batch: int = 64) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(batch, 128, 64), "y": torch.zeros(batch, 128, 32)}


@functools.cache
def program():
    return capture(Net(), (), example())


@functools.cache
def planned(mesh: str = "dp=2,tp=2", constraints: tuple[tuple[str, str], ...] = (), limit: int | None = None) -> Plan:
    return plan(program(), Mesh.parse(mesh), device="h100", constraints=dict(constraints), memory_limit=limit)


def opened(*arguments) -> questions.Opened:
    return open_program(program(), planned(*arguments))


def class_of(bench: Bench, name: str) -> int:
    return next(bench.prices.space.fold.of[i.index] for i in bench.items.items if i.name == name)


UP, DOWN = "fwd:layers.0.0/mm#0", "layers.0.2.weight"


# ---- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraints", [(), (("dp", "zero3"), ("tp", "tp_sp"))])
def test_pieces_add_up_to_the_price(constraints):
    bench = opened("dp=2,tp=2", constraints).bench
    moved = movements(bench.prices, bench.state)
    counts: Counter[str] = Counter()
    for m in moved:
        counts.update({s.kind: m.edge.count for s in m.sent if s.kind != "local_chunk"} if len(m.sent) < 2 else {})
        if len(m.sent) > 1:
            for s in m.sent:
                counts[s.kind] += m.edge.count * (s.kind != "local_chunk")
        assert math.isclose(sum(s.seconds for s in m.sent), m.seconds, rel_tol=1e-9)
    assert math.isclose(sum(m.total for m in moved), bench.price.comm_s, rel_tol=1e-9)
    assert math.isclose(sum(compute_seconds(bench.prices, bench.state).values()), bench.price.compute_s, rel_tol=1e-9)
    assert math.isclose(sum(update_seconds(bench.prices, bench.state).values()), bench.price.update_s, rel_tol=1e-9)
    assert {k: n for k, n in counts.items() if n} == dict(bench.price.collectives)


def test_every_change_is_priced_as_the_whole_plan_is():
    bench = opened().bench
    told = 0
    for name in (UP, "fwd:layers.1.2/mm#0", "bwd:layers.0.0/mm#0", DOWN, "head.bias"):
        cls = class_of(bench, name)
        for axis in (0, 1):
            for other in bench.ask(cls, axis, solved=False).fixed:
                c = other.change
                moved = sum(m.total for m in c.appears) - sum(m.total for m in c.goes)
                assert math.isclose(moved, c.comm_s, rel_tol=1e-6, abs_tol=1e-12), name
                assert math.isclose(sum(s for _, s in c.work), c.compute_s + c.update_s, rel_tol=1e-6, abs_tol=1e-12)
                told += 1
    assert told > 20


def test_a_change_equals_the_edited_plan_priced_from_scratch():
    here = opened()
    bench = here.bench
    cls = class_of(bench, UP)
    verdict = bench.ask(cls, 1, solved=False)
    members = [bench.items.items[m].name for m in bench.prices.space.fold.members[cls]]
    for other in verdict.fixed:
        rows = {name: (here.plan.choice(name)[0], other.value) for name in members}
        edited = replace(here.plan, choices={**here.plan.choices, **rows})
        found = price(program(), edited, "h100")
        c = other.change
        serial = c.compute_s + c.comm_s + c.update_s
        assert math.isclose(found.step_s - bench.price.step_s, serial, rel_tol=1e-6, abs_tol=1e-12)
        step = simulate(program(), edited, "h100").step_s - here.plan.predicted["step_s"]
        assert math.isclose(step, c.step_s, rel_tol=1e-6, abs_tol=1e-12)
        assert math.isclose(found.peak_bytes - bench.price.peak_bytes, other.change.peak_bytes, abs_tol=1.0)


@pytest.mark.parametrize("name", [UP, "bwd:layers.1.2/mm#1"])
def test_the_next_best_is_the_best_of_all_that_decide_otherwise(name):
    """One solve with everything but the chosen allowed, against one solve for every other choice."""
    bench = opened("dp=2").bench
    cls = class_of(bench, name)
    verdict = bench.ask(cls, 0)
    mine = bench.role(cls, verdict.value)
    steps = []
    for choice in bench.prices.space.offered[cls]:
        if bench.role(cls, choice) != mine:
            lowered = lower(
                bench.prices, bench.state, 0, None, 0.0, bench.usable, Pins(choices={(cls, 0): frozenset({choice})})
            )
            try:
                answer = solve(lowered.problem, 10.0, 1e-6)
            except NoOption:
                continue
            assert answer is not None
            steps.append((answer.step, lift(bench.prices, 0, lowered, answer.choice, bench.state)))
    best = bench.simulated(min(steps, key=lambda pair: pair[0])[1]).step_s
    assert verdict.free is not None
    # The solver does not see the copies in and out of buckets, which the simulation counts.
    assert bench.step.step_s + verdict.free.change.step_s == pytest.approx(best, rel=2e-2)


def test_an_edited_plan_with_gaps_and_oddities_is_laid_out():
    """Entries left out are whole; a whole parameter that is gathered twice is what an editor may write."""
    whole = Plan(Mesh.parse("dp=2,tp=1"), program().fingerprint, {}, {}, predicted={"device": "h100"})
    odd = replace(whole, storage={DOWN: autopar.Storage((autopar.R, autopar.R), "twice")})
    for made in (whole, odd):
        bench = open_program(program(), made).bench
        assert math.isclose(bench.step.step_s, simulate(program(), made, "h100").step_s, rel_tol=1e-6)
        assert bench.ask(class_of(bench, DOWN), 0, solved=False).fixed


# ---- what decided --------------------------------------------------------------------------------------------------


def test_a_communication_decides():
    here = opened()
    text = words.decided(here, here.bench.ask(class_of(here.bench, "fwd:head/mm#0"), 0, solved=False))[0]
    assert text.startswith("communication: +") and " over " in text and "from head/" in text


def test_memory_decides():
    """Sharding the weights costs time here, and is done only for the limit."""
    heavy = capture(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), (torch.zeros(8, 512),))
    free = plan(heavy, Mesh.parse("dp=2"), device="h100")
    tight = plan(heavy, Mesh.parse("dp=2"), device="h100", memory_limit=int(free.predicted["peak_bytes"] * 0.8))
    assert tight.predicted["step_s"] > free.predicted["step_s"]
    here = open_program(heavy, tight)
    told = [words.decided(here, here.bench.ask(c, 0))[0] for c in here.bench.state.storage]
    assert any(t.startswith("memory: whole on dp would save ") and "more than the limit of" in t for t in told)


def test_a_constraint_decides_and_says_what_it_costs():
    here = opened("dp=2", (("dp", "zero3"),))
    verdict = here.bench.ask(class_of(here.bench, DOWN), 0)
    assert verdict.why == "constraint dp=zero3"
    assert verdict.free is not None and verdict.free.value.gather == "once"
    assert words.decided(here, verdict)[0].startswith("you, by constraint dp=zero3: without it ")
    costs = questions.constraint_costs(here)
    assert [r.label for r in costs] == ["dp=zero3"]
    assert costs[0].bill is not None and costs[0].bill.step_s < here.bench.price.step_s


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.2.weight", {"layers.0.2.weight"}),
        ("layers.*.2.weight", {"layers.0.2.weight", "layers.1.2.weight"}),
        ("0.weight", {"layers.0.0.weight", "layers.1.0.weight"}),
        ("head", {"head.weight", "head.bias", "fwd:head/mm#0"}),
        ("fwd:head/mm#0", {"fwd:head/mm#0"}),
        ("*ead.b*", {"head.bias"}),
        ("mm#0", {"fwd:layers.0.0/mm#0", "fwd:head/mm#0"}),
    ],
)
def test_names(name, expected):
    here = opened()
    fold = here.bench.prices.space.fold
    found = {here.bench.items.items[m].name for c in questions.find(here, name) for m in fold.members[c]}
    assert expected <= found
    assert len(found) < 12


def test_a_name_that_is_nothing():
    with pytest.raises(PlanError, match=r"nothing in the plan is called 'haed.weight'; did you mean head.weight"):
        questions.find(opened(), "haed.weight")


# ---- whole plans ---------------------------------------------------------------------------------------------------


def test_rivals_are_no_better_and_say_why():
    here = opened("dp=2")
    mine = questions.bill(here)
    found = questions.rivals(here, ("ddp", "tp"))
    assert {r.label for r in found} == {"dp=ddp", "dp=tp"}
    for rival in found:
        assert rival.bill is not None and rival.bill.step_s >= mine.step_s * (1 - 1e-2)
        if not rival.same and rival.bill.step_s > mine.step_s * 1.001:
            assert words.lost(here, mine, rival).startswith("+")


def test_a_rival_that_does_not_fit_says_by_how_much():
    free = planned("dp=2")
    here = open_program(program(), free, memory_limit=free.predicted["peak_bytes"] * 0.5)
    mine = questions.bill(here)
    (rival,) = [r for r in questions.rivals(here, ("replicate",)) if r.label == "dp=replicate"]
    assert rival.over > 0
    assert words.lost(here, mine, rival).startswith("does not fit by ")


def test_solving_round_what_is_kept():
    here = opened("dp=2", (("dp", "zero3"),))
    loose = replace(here, constraints={})
    made, kept = questions.resolve(loose, ["layers.*.0", "head.weight"])
    assert kept > 10
    for name in ("fwd:layers.0.0/mm#0", "bwd:layers.1.0/mm#0"):
        assert made.choice(name) == here.plan.choice(name)
    for name in ("layers.1.0.weight", "head.weight"):
        assert made.stored(name) == here.plan.stored(name)
    assert made.predicted["step_s"] <= here.plan.predicted["step_s"] * 1.001  # what was not kept is chosen as well


def test_repricing_an_edited_plan():
    made = planned()
    edited = replace(made, choices={**made.choices, UP: (autopar.Choice(), autopar.Choice())})
    again = questions.reprice(open_program(program(), edited))
    assert again.predicted["step_s"] > made.predicted["step_s"]
    assert again.predicted["device"] == "h100"
    assert open_program(program(), again).bench.price.step_s == pytest.approx(again.predicted["compute_s"]
        + again.predicted["comm_s"] + again.predicted["update_s"])  # fmt: skip
    illegal = replace(made, choices={**made.choices, UP: (autopar.Choice("zz"), autopar.Choice())})
    with pytest.raises(PlanError, match=r"fwd:layers\.0\.0/mm#0"):
        open_program(program(), illegal)


def test_python_api():
    made = planned()
    text = autopar.explain(made, "head.weight", Net(), example=example(), quick=True)
    assert text.startswith("head.weight: parameter, 32 x 64 float32\n")
    assert "chosen" in text and "decided" in text
    with pytest.raises(PlanError, match=r"it was made in Python; ask in Python, autopar\.explain"):
        autopar.explain(made, "head.weight")
    with pytest.raises(PlanError, match="another model"):
        autopar.explain(made, "head.weight", Net(depth=1), example=example())


def test_an_unknown_device_is_said():
    made = replace(planned(), predicted={**planned().predicted, "device": "abacus"})
    with pytest.raises(PlanError, match="made for device 'abacus', which is neither a preset"):
        open_program(program(), made)
