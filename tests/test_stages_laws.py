"""Laws of the choice of stages: what a change of the question may do to the answer."""

import dataclasses
import itertools
import math
import random

import pytest

from autopar.costmodel.stages import SYNCHRONOUS, Additive, Link, Option, choose, uniform
from autopar.costmodel.stages_table import SEGMENT
from autopar.errors import InfeasibleError, ScheduleError
from autopar.pipeline.laws import makespan
from autopar.pipeline.schedules import SCHEDULES

#: Relative; less is rounding.
SAME = 1e-9
FREE = Link(latency=0.0, bandwidth=1e30)
#: Lines, a loop and a vee.
SOME = ("gpipe", "1f1b", "zb-h1", "interleaved", "zb-v")


def a_piece(rng: random.Random, options: int) -> list[Option]:
    work, saved = rng.choice([0.5, 1.0, 1.0, 4.0]), rng.uniform(0.5, 2.0)
    keep = Option(
        work, work * rng.uniform(0.8, 1.3), work * rng.uniform(0.5, 1.0), rng.uniform(0, 0.5), rng.uniform(1, 3), saved,
        saved / 2, rng.uniform(0, 1), "keep",
    )  # fmt: skip
    again = dataclasses.replace(keep, input_grad=keep.input_grad + work, saved_bytes=saved / 5, name="recompute")
    return [keep, again][:options]


def a_question(seed: int, options: int = 2) -> dict:
    """A random small question; its chains are of one model, in micro-batches of two sizes."""
    rng = random.Random(seed)
    ranks = rng.choice([2, 2, 3])
    pieces = rng.randint(2 * ranks, 7)
    parts = [a_piece(rng, options) for _ in range(pieces)]
    gaps = [(rng.uniform(0, 2), rng.uniform(0, 2)) for _ in range(pieces - 1)]
    chains = {}
    for micro in rng.sample([2, 3, 4, 6], 2):
        share = 4 / micro + 0.1
        sized = [[timed(o, share, share) for o in part] for part in parts]
        chains[micro] = Additive(sized, [(f * share, b * share) for f, b in gaps], micro=micro)
    link = Link(latency=rng.uniform(0, 0.5), bandwidth=rng.uniform(0.5, 5))
    limit = rng.choice([None, rng.uniform(8, 20) * pieces / ranks])
    return {"chains": chains, "ranks": ranks, "link": link, "limit": limit, "schedules": rng.sample(SOME, 3)}


def timed(option: Option, seconds: float, size: float) -> Option:
    """The same of micro-batches of another size; what is no matter of their size stays."""
    return dataclasses.replace(
        option,
        forward=option.forward * seconds,
        input_grad=option.input_grad * seconds,
        weight_grad=option.weight_grad * seconds,
        saved_bytes=option.saved_bytes * size,
        pending_bytes=option.pending_bytes * size,
        transient_bytes=option.transient_bytes * size,
    )


def seconds(question: dict, ask=choose, **changes) -> float:
    """Of the answer; infinite if nothing fits or can run."""
    try:
        choice = ask(**{**question, **changes})
    except (InfeasibleError, ScheduleError):
        return math.inf
    assert choice.status == "optimal"
    return choice.best.seconds


def not_above(left: float, right: float) -> bool:
    return left <= right * (1 + SAME) or right == math.inf


SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 24))]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_faster_link_never_costs_time(seed):
    question = a_question(seed)
    link = question["link"]
    slow = seconds(question)
    quicker = seconds(question, link=Link(latency=link.latency / 3, bandwidth=link.bandwidth))
    wider = seconds(question, link=Link(latency=link.latency, bandwidth=2 * link.bandwidth))
    assert not_above(quicker, slow) and not_above(wider, slow)
    assert not_above(seconds(question, link=FREE), min(quicker, wider))


@pytest.mark.parametrize("seed", SEEDS)
def test_more_memory_never_costs_time(seed):
    question = a_question(seed)
    limits = [4.0, 10.0, 16.0, 24.0, 40.0, 80.0, None]
    times = [seconds(question, limit=limit) for limit in limits]
    assert all(not_above(after, before) for before, after in itertools.pairwise(times))
    assert times[0] == math.inf > times[-1]


def test_more_memory_often_saves_time():
    """Or the law above would be none."""
    gained = 0
    for seed in range(12):
        question = a_question(seed)
        times = [seconds(question, limit=limit) for limit in (16.0, 24.0, 40.0, None)]
        gained += len({t for t in times if t < math.inf}) > 1
    assert gained > 6


@pytest.mark.parametrize("seed", SEEDS)
def test_smaller_pieces_never_cost_time(seed):
    """Every piece cut in two, with nothing to send more over the old gaps: what could be done still can be."""
    question = a_question(seed, options=1)
    rng = random.Random(seed)
    finer = {}
    for micro, chain in question["chains"].items():
        parts, gaps = [], []
        for at, (option,) in enumerate(chain.parts):
            share = rng.uniform(0.2, 0.8)
            if at:
                gaps.append(chain.gaps[at - 1])
            gaps.append((rng.uniform(0, 3), rng.uniform(0, 3)))
            for part in (share, 1 - share):
                numbers = [n * part for n in option.numbers()[:-1]]
                parts.append([Option(*numbers, option.transient_bytes, option.name)])
        finer[micro] = Additive(parts, gaps)
    question["schedules"] = ["1f1b", "zb-h1"]
    assert not_above(seconds(question, chains=finer), seconds(question))


@pytest.mark.parametrize("seed", SEEDS)
def test_more_to_choose_from_never_costs_time(seed):
    question = a_question(seed)
    whole = seconds(question)
    assert all(not_above(whole, seconds(question, schedules=[name])) for name in question["schedules"])
    assert all(not_above(whole, seconds(question, chains={m: c})) for m, c in question["chains"].items())
    assert not_above(seconds(question, schedules=SOME), whole)
    only = {m: Additive([part[:1] for part in c.parts], c.gaps) for m, c in question["chains"].items()}
    assert not_above(seconds(question, limit=None), seconds(question, chains=only, limit=None))
    assert whole == min(
        seconds(question, chains={m: c}, schedules=[name])
        for (m, c), name in itertools.product(question["chains"].items(), question["schedules"])
    ) or whole == pytest.approx(seconds(question))


@pytest.mark.parametrize("seed", SEEDS)
def test_units_are_no_matter(seed):
    """Times in another unit scale the answer; bytes in another unit do not change it."""
    question = a_question(seed)
    plain = seconds(question)
    if plain == math.inf:
        return
    best = choose(**question).best
    for time, size in ((7.0, 1.0), (1e-6, 1.0), (1.0, 1e9), (1e-3, 1e6)):
        chains = {}
        for micro, chain in question["chains"].items():
            parts = [[unit(o, time, size) for o in part] for part in chain.parts]
            chains[micro] = Additive(parts, [(f * size, b * size) for f, b in chain.gaps], micro=micro)
        link = Link(latency=question["link"].latency * time, bandwidth=question["link"].bandwidth * size / time)
        limit = question["limit"] and question["limit"] * size
        scaled = choose(**{**question, "chains": chains, "link": link, "limit": limit}).best
        assert scaled.seconds == pytest.approx(plain * time, rel=1e-9)
        assert scaled.peak_bytes == pytest.approx([b * size for b in best.peak_bytes]) or scaled.cuts != best.cuts


def unit(option: Option, time: float, size: float) -> Option:
    numbers = option.numbers()
    return Option(*(n * time for n in numbers[:4]), *(n * size for n in numbers[4:]), option.name)


@pytest.mark.parametrize("seed", SEEDS)
def test_dearer_pieces_never_save_time(seed):
    question = a_question(seed, options=1)
    rng = random.Random(seed)
    dearer = {}
    for micro, chain in question["chains"].items():
        parts = [[Option(*(n * rng.uniform(1, 1.5) for n in o.numbers()), o.name) for o in p] for p in chain.parts]
        dearer[micro] = Additive(parts, chain.gaps, micro=micro)
    assert not_above(seconds(question), seconds(question, chains=dearer))


# ---- stages that are not alike -------------------------------------------------------------------------------------


def a_model(layers: int, head: float, embedding: float = 0.2) -> Additive:
    """An embedding, equal layers of one second a forward, and a head."""
    parts = [[Option(w, w, w, 0.0, 1.0, 1.0, 0.5, 0.0)] for w in (embedding, *[1.0] * layers, head)]
    return Additive(parts, [(1.0, 1.0)] * (layers + 1))


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
def test_a_heavy_head_gets_fewer_layers(name):
    question = {"chains": {8: a_model(16, 3.0)}, "ranks": 4, "link": FREE, "schedules": [name]}
    choice, equal = choose(**question), uniform(**question, starts=range(1, 17))
    *_, begin, end = choice.best.cuts
    layers = [b - a for a, b in itertools.pairwise(choice.best.cuts)]
    assert layers[-1] - 1 < min(layers[1:-1]) and (begin, end) != tuple(equal.best.cuts[-2:])
    assert equal.best.cuts == (0, 5, 9, 13, 18)
    assert choice.best.seconds < 0.9 * equal.best.seconds
    assert equal.best.parts.imbalance > choice.best.parts.imbalance


def test_a_heavy_embedding_gets_fewer_layers():
    choice = choose({8: a_model(16, 0.0, embedding=4.0)}, ranks=4, link=FREE, schedules=["1f1b"])
    first, *others = (b - a for a, b in itertools.pairwise(choice.best.cuts))
    assert first < min(others)


def test_thick_gaps_are_not_cut():
    """Equal pieces, every other gap a hundred times as thick, and a slow link: cuts are at the thin ones."""
    piece = [Option(1, 1, 1, 0, 1, 1, 1, 0)]
    chain = Additive([piece] * 24, [((100.0, 100.0) if at % 2 else (1.0, 1.0)) for at in range(1, 24)])
    choice = choose({8: chain}, ranks=4, link=Link(latency=0.0, bandwidth=1.0), schedules=["1f1b"])
    assert all(cut % 2 == 0 for cut in choice.best.cuts)


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_layers_are_never_better(seed):
    question = a_question(seed)
    pieces = next(iter(question["chains"].values())).pieces
    equal = seconds(question, uniform, starts=range(pieces))
    assert not_above(seconds(question), equal)
    by_name = {n: seconds(question, uniform, starts=range(pieces), schedules=[n]) for n in question["schedules"]}
    assert equal == pytest.approx(min(by_name.values()))


def test_layers_are_dealt_out():
    """What comes before the first layer and behind the last is in the first stage and in the last."""
    piece = [Option(1, 1, 1, 0, 1, 1, 1, 0)]
    chain = Additive([piece] * 14, [(0, 0)] * 13)
    starts = [2, 3, 5, 7, 9, 11, 12]
    cuts = uniform({4: chain}, ranks=3, link=FREE, starts=starts, schedules=["1f1b"]).best.cuts
    assert cuts == (0, 7, 11, 14)  # three layers, two, two
    with pytest.raises(ScheduleError, match="8 stages need as many layers, and there are 7"):
        uniform({4: chain}, ranks=4, link=FREE, starts=starts, schedules=["interleaved"])


# ---- against what is known -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYNCHRONOUS)
def test_even_pieces_take_the_time_of_the_closed_form(name):
    ranks, micro = 4, 8
    known = SCHEDULES[name]
    piece = [Option(1 / known.chunks, 1 / known.chunks, 1 / known.chunks, 0, 1, 1, 1, 0)]
    stages = ranks * known.chunks
    choice = uniform(
        {micro: Additive([piece] * stages, [(0, 0)] * (stages - 1))},
        ranks=ranks, link=FREE, schedules=[name], starts=range(stages),
    )  # fmt: skip
    closed = makespan(name, ranks, micro)
    assert choice.best.seconds == pytest.approx(closed, rel=0.05 if name == "zb-v" else 1e-9)


def test_without_a_flush_the_bubble_is_paid_once_a_segment():
    piece = [Option(1, 1, 1, 0, 1, 1, 1, 0)]
    chain = Additive([piece] * 4, [(0, 0)] * 3)
    choice = choose({4: chain}, ranks=4, link=FREE, schedules=["paci", "1f1b"])
    assert choice.best.schedule == "paci"
    assert choice.best.seconds == pytest.approx(makespan("paci", 4, 4 * SEGMENT) / SEGMENT)
    assert [r.schedule for r in choice.runners] == ["1f1b"]


@pytest.mark.parametrize("limit", [pytest.param(None, marks=pytest.mark.slow), 60.0])
def test_large_questions_are_answered_within_a_few_percent(limit):
    """What no brute force could: 90 pieces, two options, loops and vees."""
    rng = random.Random(5)
    parts = [a_piece(rng, 2) for _ in range(90)]
    chains = {}
    for micro in (8, 16):
        share = 8 / micro
        sized = [[timed(o, share, share / 9) for o in part] for part in parts]
        chains[micro] = Additive(sized, [(share * rng.uniform(1, 3),) * 2 for _ in range(89)], micro=micro)
    question = {"chains": chains, "ranks": 4, "link": Link(latency=0.01, bandwidth=10.0), "limit": limit}
    choice = choose(**question, schedules=SOME)
    assert choice.gap < 0.08 and choice.bound <= choice.best.seconds
    assert choice.best.seconds < seconds_of(uniform(**question, schedules=SOME, starts=range(90)))
    again = choose(**question, schedules=SOME)
    assert again == choice  # nothing hangs on chance or on the machine


def seconds_of(choice) -> float:
    return choice.best.seconds
