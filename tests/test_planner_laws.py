"""Laws of the planner: overlap against brute force, and what a change of the question may do to the answer."""

import dataclasses
import functools
import itertools
import random
import re

import pytest
import torch
from torch import nn

from autopar.capture import capture
from autopar.costmodel.devices import DEVICES, Link
from autopar.costmodel.ilp import INF, Consumer, Flow, Group, Problem, overlapped, solve
from autopar.costmodel.planner import plan
from autopar.costmodel.problem import dominate, evaluate, loads
from autopar.errors import InfeasibleError
from autopar.mesh import Mesh

SLOW = dataclasses.replace(
    DEVICES["cpu"], name="slow", flops={"float32": 1e7}, bandwidth=1e7, launch=0.0, fast=Link(1e8, 1e-7),
    slow=Link(5e7, 1e-7),
)  # fmt: skip
#: Two plans of one step time may be found in either order; a search axis by axis is not exact.
SAME = 1e-2


def overlapping(seed: int) -> Problem:
    """A random problem of two phases and two tiers, with late and blocking flows."""
    rng = random.Random(seed)
    groups = [
        Group([rng.random() for _ in range(3)], [0.0] * 3, [float(rng.randint(0, 9))] * 3, rng.randrange(3))
        for _ in range(5)
    ]
    flows = []
    for _ in range(5):
        producer, *readers = rng.sample(range(5), rng.randint(2, 3))
        tiers = [[(rng.random(), rng.choice([0.0, rng.random()])) for _ in range(3)] for _ in range(3)]
        cost = [[sum(t) + rng.choice([0.0, 0.1]) for t in line] for line in tiers]
        cost[rng.randrange(3)][rng.randrange(1, 3)] = INF
        consumers = [Consumer(r, [0, *(rng.randrange(3) for _ in range(2))], rng.randrange(2)) for r in readers]
        row = [rng.randrange(3) for _ in range(3)]
        apart = [rng.random() < 0.5 for _ in range(3)]
        late = rng.random() < 0.6
        flows.append(Flow(producer, row, consumers, cost, 2.0, None, apart, late, tiers, rng.randrange(2)))
    return Problem(groups, flows, usable=[[rng.random(), 1.0], [0.8, rng.random()]])


@pytest.mark.parametrize("seed", range(25))
def test_overlap_equals_brute_force(seed):
    problem = overlapping(seed)
    everything = list(itertools.product(range(3), repeat=5))
    best = min(overlapped(problem, c) for c in everything)
    answer = solve(problem, gap=1e-7)
    assert answer is not None and answer.step == pytest.approx(best, rel=1e-5)
    rough = solve(problem, start=answer.choice)
    assert rough is not None and rough.step <= best * 1.02 and rough.gap <= 0.011
    for choice in random.Random(seed).sample(everything, 20):
        serial, step = evaluate(problem, choice)[0], overlapped(problem, choice)
        if serial < INF:
            here = loads(problem, choice, 2)
            assert step <= serial * (1 + 1e-9)
            assert step >= sum(here.busy) + here.after - 1e-9
            assert here.step([[0.0, 0.0]] * 2) >= step - 1e-9  # a window that hides nothing
    problem.usable = None
    alone = solve(problem, gap=1e-7)
    assert alone is not None and alone.step == alone.seconds >= answer.step * (1 - 1e-9)


def test_beaten_options_are_not_offered():
    flow = Flow(0, [0, 0, 1], [Consumer(1, [0, 1])], [[0.0, 1.0], [1.0, 0.0]])
    groups = [Group([1.0, 2.0, 3.0], [0.0] * 3, [5.0, 1.0, 9.0]), Group([1.0, 1.0], [0.0] * 2, [0.0] * 2)]
    kept, instead = dominate(Problem(groups, [flow]), [[0, 1, 2], [0, 1]])
    assert kept == [[0, 1, 2], [0, 1]]  # the second is slower, and smaller
    groups[0].memory[1] = 5.0
    kept, instead = dominate(Problem(groups, [flow]), [[0, 1, 2], [0, 1]])
    assert kept == [[0, 2], [0, 1]] and instead[0] == {1: 0}


class Net(nn.Module):
    def __init__(self, names=("up", "down"), width=64):
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Linear(width, 2 * width))
        self.add_module(names[1], nn.Linear(2 * width, width))

    def forward(self, x):
        first, second = (getattr(self, n) for n in self.names)
        return (x + second(torch.relu(first(x)))).square().sum()


@functools.cache
def net(names=("up", "down"), batch=16):
    return capture(Net(names), (torch.zeros(batch, 64),))


def step(mesh="dp=2", names=("up", "down"), **options):
    return plan(net(names), Mesh.parse(mesh), device=SLOW, **options).predicted["step_s"]


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=2"])
def test_a_faster_link_never_costs_time(mesh):
    times = [step(mesh, links={"dp": Link(b, 1e-7)}) for b in (1e6, 1e7, 1e9)]
    assert all(b <= a * (1 + SAME) for a, b in itertools.pairwise(times))
    assert times[-1] < times[0]


def test_more_memory_never_costs_time():
    peak = plan(net(), Mesh.parse(2), device=SLOW).predicted["peak_bytes"]
    times = [step(memory_limit=int(part * peak)) for part in (1.0, 1.2, 3.0)]
    assert all(b <= a * (1 + SAME) for a, b in itertools.pairwise(times))


def test_axes_of_one_and_names_change_nothing():
    here = step("dp=2")
    assert step("a=1,dp=2,b=1") == pytest.approx(here, rel=SAME)
    assert step("other=2") == pytest.approx(here, rel=1e-9)
    assert step("dp=2", names=("alpha", "omega")) == pytest.approx(here, rel=1e-9)


def test_more_choice_is_never_worse():
    free = step("dp=2,tp=2")
    for constraints in ({"dp": "zero3"}, {"tp": "tp"}, {"dp": "ddp", "tp": "replicate"}):
        assert free <= step("dp=2,tp=2", constraints=constraints) * (1 + SAME)


def test_what_does_not_fit_is_said_by_kind():
    peak = plan(net(), Mesh.parse(2), device=SLOW).predicted["peak_bytes"]
    with pytest.raises(InfeasibleError) as error:
        plan(net(), Mesh.parse(2), device=SLOW, memory_limit=int(0.3 * peak))
    text = str(error.value)
    assert re.search(r"the best found needs [\d.]+ kB, [\d.]+ kB more\n  \(parameters [\d.]+ kB, ", text)
    assert re.search(r"Give at least \d+ bytes \(memory_limit\)", text)
    found = error.value
    assert found.limit == int(0.3 * peak) and found.short == found.least - found.limit and found.mesh == "dp=2"
    assert sum(found.memory.values()) == pytest.approx(found.least, abs=1) and found.step_s > 0


class Deep(nn.Module):
    """Mostly activations, which the program sees less of than the walk that prices memory."""

    def __init__(self, width=16, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.softmax(nn.functional.gelu(layer(x)), -1) + x
        return x.square().mean()


@pytest.mark.parametrize("mesh", ["dp=2", pytest.param("dp=2,tp=2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("constraints", [None, {"dp": "ddp"}])
def test_the_bytes_that_the_error_asks_for_are_enough(mesh, constraints):
    program = capture(Deep(), (torch.zeros(16, 16),))
    with pytest.raises(InfeasibleError) as error:
        plan(program, Mesh.parse(mesh), device=SLOW, memory_limit=1000, constraints=constraints)
    enough = int(re.search(r"at least (\d+) bytes", str(error.value))[1])
    for limit in (enough, int(1.02 * enough)):
        found = plan(program, Mesh.parse(mesh), device=SLOW, memory_limit=limit, constraints=constraints)
        assert found.predicted["peak_bytes"] <= limit
