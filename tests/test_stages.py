"""The choice of stages, micro-batches and schedule: against brute force, against the clock, and what it says."""

import dataclasses
import itertools
import math
import random
import re
from typing import Any

import numpy as np
import pytest

from autopar.costmodel.stages import SYNCHRONOUS, Additive, Choice, Link, Option, choose
from autopar.costmodel.stages_chain import OWN, TRANSIENT, edges
from autopar.costmodel.stages_pairs import Pair
from autopar.costmodel.stages_search import Layers, Rows, beam, dual
from autopar.costmodel.stages_table import compiled, costs, shape
from autopar.errors import InfeasibleError, ScheduleError
from autopar.pipeline.clock import Costs, run
from autopar.pipeline.schedules import SCHEDULES, stage_homes
from autopar.pipeline.table import Action

FREE = Link(latency=0.0, bandwidth=1e30)
#: Ways that one brute force may go through for one schedule and number of micro-batches.
MANY = 600


@dataclasses.dataclass(frozen=True)
class Listed:
    """A chain by enumeration, where a stage costs whatever was drawn for it, and may have no option at all."""

    pieces: int
    table: dict
    gaps: list

    def options(self, first, last):
        return self.table[first, last]

    def gap_bytes(self, at):
        return self.gaps[at - 1]


def seeds(few: int, many: int) -> list[Any]:
    """Seeds of a test, the further ones for the long sweep."""
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(few, many))]


def an_option(rng: random.Random, size: float, name: str = "") -> Option:
    times = [size * rng.uniform(0.3, 1.0) for _ in range(3)]
    return Option(*times, rng.uniform(0, 0.5), *(size * rng.uniform(0.1, 1.0) for _ in range(4)), name)


def a_chain(rng: random.Random, pieces: int, options: int):
    """Half of them add up, half do not."""
    gaps = [(rng.choice([0.0, rng.random()]), rng.random()) for _ in range(pieces - 1)]
    names = ["keep", "recompute", "half"]
    if rng.random() < 0.5:
        sizes = [rng.choice([0.3, 1.0, 1.0, 3.0]) for _ in range(pieces)]
        return Additive([[an_option(rng, s, n) for n in names[:options]] for s in sizes], gaps)
    table = {}
    for first, last in itertools.combinations(range(pieces + 1), 2):
        count = rng.choice([*range(1, options + 1), options, 0 if rng.random() < 0.3 else 1])
        table[first, last] = [an_option(rng, last - first, n) for n in names[:count]]
    return Listed(pieces, table, gaps)


def every_way(chain, link: Link, stages: int):
    """(cuts, options, numbers as the clock takes them)."""
    for inner in itertools.combinations(range(1, chain.pieces), stages - 1):
        cuts = (0, *inner, chain.pieces)
        sends = [chain.gap_bytes(at) for at in inner]
        for options in itertools.product(*(chain.options(*span) for span in itertools.pairwise(cuts))):
            yield (
                cuts,
                options,
                Costs(
                    forward=[o.forward for o in options],
                    input_grad=[o.input_grad for o in options],
                    weight_grad=[o.weight_grad for o in options],
                    update=[o.update for o in options],
                    send_forward=[link.seconds(f) for f, _ in sends],
                    send_backward=[link.seconds(b) for _, b in sends],
                    saved_bytes=[o.saved_bytes for o in options],
                    pending_bytes=[o.pending_bytes for o in options],
                    transient_bytes=[o.transient_bytes for o in options],
                    static_bytes=[o.static_bytes for o in options],
                ),
            )


def stepped(name: str, ranks: int, micro: int):
    """A schedule's table, each rank's optimizer behind its row."""
    homes = stage_homes(name, ranks)
    return tuple(
        (*row, *(Action(stage, "U", 0) for stage, home in enumerate(homes) if home == rank))
        for rank, row in enumerate(SCHEDULES[name].make(ranks, micro))
    )


def brute_force(chains, ranks: int, link: Link, limit: float | None, schedules, overlap: bool = True) -> float:
    """Least seconds over everything; infinite if nothing fits."""
    best = math.inf
    for micro, chain in chains.items():
        for name in schedules:
            if SCHEDULES[name].allows(ranks, micro):
                continue
            table = stepped(name, ranks, micro)
            for _, _, numbers in every_way(chain, link, ranks * SCHEDULES[name].chunks):
                timeline = run(table, numbers, overlap)
                if limit is None or max(timeline.peak_bytes) <= limit:
                    best = min(best, timeline.makespan)
    return best


def count_ways(chain, stages: int) -> int:
    counts = [1] + [0] * chain.pieces
    for _ in range(stages):
        counts = [
            sum(counts[first] * len(chain.options(first, last)) for first in range(last) if counts[first])
            for last in range(chain.pieces + 1)
        ]
    return counts[-1]


def a_question(seed: int):
    """A random small question that brute force can answer."""
    rng = random.Random(seed)
    while True:
        ranks = rng.choice([2, 2, 3, 4])
        pieces = rng.randint(ranks, 8)
        micros = rng.sample(range(1, 7), 2)
        options = rng.choice([1, 2, 3])
        chains = {m: a_chain(rng, pieces, options) for m in micros}
        names = rng.sample(SYNCHRONOUS, 3)
        stages = {ranks * SCHEDULES[n].chunks for n in names}
        able = [m for m in micros for n in names if not SCHEDULES[n].allows(ranks, m) and ranks <= pieces]
        ways = [count_ways(c, s) for c in chains.values() for s in stages if s <= pieces]
        if able and ways and max(ways) <= MANY:
            break
    link = Link(latency=rng.choice([0.0, 0.1]), bandwidth=rng.choice([0.5, 2.0, 100.0]))
    limit = rng.choice([None, rng.uniform(0.5, 1.5) * pieces * 2 / ranks, rng.uniform(1, 3) * pieces * 2 / ranks])
    return chains, ranks, link, limit, names


def told(ask, **question) -> tuple[float, Choice | None]:
    """Seconds of the answer; infinite if nothing fits or nothing can run."""
    try:
        choice = ask(**question)
    except (InfeasibleError, ScheduleError):
        return math.inf, None
    return choice.best.seconds, choice


# ---- against brute force -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(50, 220))
def test_equals_brute_force(seed):
    chains, ranks, link, limit, names = a_question(seed)
    overlap = seed % 4 > 0
    best = brute_force(chains, ranks, link, limit, names, overlap)
    seconds, choice = told(choose, chains=chains, ranks=ranks, link=link, limit=limit, schedules=names, overlap=overlap)
    assert seconds == pytest.approx(best, rel=1e-9)
    if choice is not None:
        assert choice.status == "optimal" and choice.gap == 0 and choice.simulated > 0
        check(choice, chains, ranks, link, limit, overlap)


def check(choice: Choice, chains, ranks: int, link: Link, limit: float | None, overlap: bool = True) -> None:
    """Every candidate is what the clock says of it, keeps the limit, and its parts add up."""
    everyone = [choice.best, *choice.runners]
    assert [c.seconds for c in everyone] == sorted(c.seconds for c in everyone)
    assert len({(c.schedule, c.micro, c.cuts) for c in everyone}) == len(everyone)
    assert choice.best.why == "" and all(c.why for c in choice.runners)
    for c in everyone:
        chain, stages = chains[c.micro], ranks * SCHEDULES[c.schedule].chunks
        spans = list(itertools.pairwise(c.cuts))
        assert len(spans) == stages and c.cuts[0] == 0 and c.cuts[-1] == chain.pieces
        assert all(o == chain.options(*span)[k] for o, span, k in zip(c.options, spans, c.choices))
        ways = every_way(chain, link, stages)
        numbers = next(n for cuts, options, n in ways if (cuts, options) == (c.cuts, c.options))
        timeline = run(stepped(c.schedule, ranks, c.micro), numbers, overlap)
        assert c.seconds == pytest.approx(timeline.makespan, rel=1e-12)
        assert c.peak_bytes == pytest.approx(timeline.peak_bytes, rel=1e-12)
        assert limit is None or max(c.peak_bytes) <= limit * (1 + 1e-9)
        assert c.parts.seconds == pytest.approx(c.seconds, rel=1e-9)
        assert min(c.parts.work, c.parts.memory, c.parts.imbalance, c.parts.bubble) >= -1e-9 * c.seconds


def test_brute_force_has_met_everything():
    """The questions above are of all kinds: limits that bind, that nothing meets, links that cost, every schedule."""
    kinds, names, outcomes = set(), set(), set()
    for seed in range(60):
        chains, ranks, link, limit, asked = a_question(seed)
        names.update(asked)
        kinds.add((ranks, link.latency > 0, isinstance(next(iter(chains.values())), Listed)))
        if limit is not None:
            question = {"chains": chains, "ranks": ranks, "link": link, "schedules": asked}
            bound, free = (told(choose, limit=most, **question)[0] for most in (limit, None))
            outcomes.add("nothing fits" if bound == math.inf > free else "binds" if bound > free else "is no matter")
    assert names == set(SYNCHRONOUS) and {k[0] for k in kinds} == {2, 3, 4} and len(kinds) > 8
    assert outcomes == {"nothing fits", "binds", "is no matter"}


@pytest.mark.parametrize("seed", seeds(10, 40))
def test_a_search_cut_short_is_honest(seed):
    """With hardly any room the best may be missed, but never lies outside what is told."""
    rng = random.Random(seed)
    chain = a_chain(rng, 8, 2)
    name, micro = rng.choice(["1f1b", "zb-h1", "gpipe"]), rng.randint(2, 5)
    link = Link(latency=0.05, bandwidth=3.0)
    best = brute_force({micro: chain}, 3, link, None, [name])
    pair = Pair(name, micro, edges(chain, link, 3), 3, None)
    pair.begin()
    for work in (1, 200, 10**6):
        pair.improve(math.inf, work)
        assert pair.bound <= best * (1 + 1e-9) and best <= pair.seconds * (1 + 1e-9)
    assert pair.seconds == pytest.approx(best) and pair.bound == pytest.approx(best)


# ---- its parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_compiled_tables_agree_with_the_clock(name, overlap):
    rng = np.random.default_rng(len(name))
    for ranks, micro in ((2, 4), (3, 6), (4, 8)):
        form = shape(name, ranks, micro, overlap)
        numbers = rng.random((5, form.stages, OWN + 2))
        seconds, paths = form.makespans(numbers), form.critical(numbers)
        assert (paths * numbers).sum((1, 2)) == pytest.approx(seconds, rel=1e-12)
        other = rng.random(numbers.shape)
        assert ((paths * other).sum((1, 2)) <= form.makespans(other) * (1 + 1e-12)).all()
        for line, taken in zip(numbers, seconds):
            timeline = run(form.table, costs(line), overlap)
            assert taken == pytest.approx(timeline.makespan / form.steps, rel=1e-12)
            assert form.peaks(line) == pytest.approx(timeline.peak_bytes, rel=1e-12)
            assert (form.passes * line).sum((1, 2)) == pytest.approx(np.array(timeline.busy) / form.steps)


def test_one_message_at_a_time():
    """The compiled form queues messages of one way, as the clock does: without the queue this would take 5."""
    table = ((Action(0, "F", 0), Action(0, "F", 1)), (Action(1, "F", 0), Action(1, "F", 1)))
    form = compiled(table, (0, 1))
    numbers = np.zeros((2, OWN + 2))
    numbers[:, 0], numbers[1, OWN] = 1.0, 3.0
    assert form.makespans(numbers[None])[0] == run(table, costs(numbers)).makespan == 8.0


def test_additive_is_the_sum_of_its_pieces():
    rng = random.Random(0)
    chain = a_chain(rng, 7, 3)
    while not isinstance(chain, Additive):
        chain = a_chain(rng, 7, 3)
    assert chain.policies[0] == tuple(
        min(range(3), key=lambda j: part[j].work + part[j].update) for part in chain.parts
    )
    for first, last in itertools.combinations(range(8), 2):
        for policy, option in zip(chain.policies, chain.options(first, last)):
            chosen = [chain.parts[i][policy[i]] for i in range(first, last)]
            for column in range(TRANSIENT):
                assert option.numbers()[column] == pytest.approx(sum(o.numbers()[column] for o in chosen))
            assert option.transient_bytes == max(o.transient_bytes for o in chosen)
    table = edges(chain, FREE, 1)
    for e in range(len(table)):
        option = chain.options(int(table.first[e]), int(table.last[e]))[int(table.option[e])]
        assert table.numbers[e, :OWN] == pytest.approx(option.numbers())


def test_additive_prices_are_common():
    """Two kinds of pieces: the one that saves more bytes a second changes its mind first, all of a kind together."""
    keep = Option(1, 1, 1, 0, 0, 10, 0, 0, "keep")
    cheap, dear = dataclasses.replace(keep, input_grad=1.1, saved_bytes=1, name="again"), None
    dear = dataclasses.replace(keep, input_grad=2.0, saved_bytes=1, name="again")
    chain = Additive([[keep, cheap], [keep, dear], [keep, cheap], [keep, dear]], [(0, 0)] * 3)
    assert chain.policies == ((0, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 1))
    assert [o.name for o in chain.options(0, 4)] == ["keep", "again x2, keep x2", "again"]
    assert [o.name for o in chain.options(0, 1)] == ["keep", "again", "again"]


def test_additive_has_few_options():
    rng = random.Random(3)
    sizes = [rng.uniform(1, 2) for _ in range(40)]
    parts = [[an_option(rng, s) for _ in range(4)] for s in sizes]
    for most in (2, 4, 6):
        chain = Additive(parts, [(0, 0)] * 39, most=most)
        assert min(3, most) <= len(chain.policies) <= max(most, 3)
    with pytest.raises(ValueError, match=re.escape("40 pieces have one gap less between them, not 40")):
        Additive(parts, [(0, 0)] * 40)
    with pytest.raises(ValueError, match="every piece needs an option"):
        Additive([*parts, []], [(0, 0)] * 40)


def test_beaten_options_are_not_offered():
    good = Option(1, 1, 1, 1, 1, 1, 1, 1)
    worse = dataclasses.replace(good, update=2)
    other = dataclasses.replace(good, forward=2, saved_bytes=0)
    table = edges(Listed(1, {(0, 1): [worse, good, good, other]}, []), FREE, 1)
    assert table.option.tolist() == [1, 3]


@pytest.mark.parametrize("seed", range(20))
def test_bounds_of_rows_alone(seed):
    """Prices bound the least of the largest row, removal keeps the best way, and the beam says what it left."""
    rng = np.random.default_rng(seed)
    table = edges(a_chain(random.Random(seed), 7, 2), FREE, 3)
    layers = Layers.of(table, [np.ones(len(table), dtype=bool)] * 3)
    ways = [
        way
        for way in itertools.product(*(k.tolist() for k in layers.keep))
        if all(table.last[a] == table.first[b] for a, b in itertools.pairwise(way))
    ]
    objective, limits = rng.random((4, 3, OWN + 2)), rng.random((2, 3, OWN + 2))
    held = [(limits * table.numbers[list(way)]).sum((1, 2)).max() for way in ways]
    rows = Rows.of(objective, limits / np.quantile(held, 0.3))  # so that most ways exceed them
    values = {w: rows.least((rows.coefficients * table.numbers[list(w)]).sum((1, 2))).item() for w in ways}
    winner = min(values, key=lambda w: values[w])
    best = values[winner]
    assert best < math.inf and sum(map(math.isinf, values.values())) >= len(ways) / 2
    priced = dual(layers, rows, best, 60)
    assert 0 < priced.bound <= best * (1 + 1e-9)
    kept = layers.within(rows.joined(priced.row), best * (1 + 1e-6))
    assert all(edge in k for edge, k in zip(winner, kept.keep))
    assert sum(map(len, kept.keep)) < sum(map(len, layers.keep))
    found, allowed, dropped = beam(layers, rows, best * (1 + 1e-6), 10**6)
    assert found[0] == winner and allowed[0] == pytest.approx(best) and dropped == math.inf
    found, allowed, dropped = beam(layers, rows, math.inf, 1)
    assert winner in found or dropped <= best * (1 + 1e-9)


# ---- what it says --------------------------------------------------------------------------------------------------


def even(pieces: int, micro: int, saved: float = 1.0, static: float = 1.0) -> Additive:
    """Pieces that all cost the same, for a whole batch of 8 seconds of forward."""
    unit = 8.0 / micro
    keep = Option(unit, unit, unit, 0.0, static, saved * unit, saved * unit / 2, 0.0, "keep")
    return Additive([[keep] for _ in range(pieces)], [(1.0, 1.0)] * (pieces - 1))


def test_even_pieces_are_dealt_out_evenly():
    choice = choose({8: even(8, 8)}, ranks=4, link=FREE, schedules=["1f1b"])
    assert choice.best.cuts == (0, 2, 4, 6, 8) and choice.best.seconds == pytest.approx((8 + 3) * 6)
    assert choice.best.parts.bubble == pytest.approx(3 * 6) and choice.best.parts.imbalance == pytest.approx(0)
    assert choice.status == "optimal"


def test_words():
    choice = choose(
        {m: even(6, m) for m in (2, 4)},
        ranks=2,
        link=Link(latency=0.25, bandwidth=1e9),
        top=3,
        schedules=["gpipe", "1f1b", "interleaved", "dualpipe-v"],
    )
    lines = str(choice).splitlines()
    best = "dualpipe-v, 4 micro-batches, cuts 0 1 2 4 6: 78.75 s, 17 B on the fullest rank (optimal; "
    assert lines[0].startswith(best) and lines[0].endswith(" simulated)")
    assert (
        "  gpipe, 4 micro-batches, cuts 0 3 6: 90.5 s, 27 B on the fullest rank; 11.75 s (15 %) slower: bubble +12 s"
    ) in lines
    assert lines[-1] == "  dualpipe-v, 2 micro-batches: it fills from both ends and needs at least 4; zb-v takes fewer"


def test_memory_is_a_reason():
    """Where the limit lets only some stages keep what they saved, the slower options are a part of the time."""
    keep = Option(1, 1, 1, 0, 1, 4, 0, 0, "keep")
    again = Option(1, 2, 1, 0, 1, 1, 0, 0, "recompute")
    chain = Additive([[keep, again]] * 4, [(0, 0)] * 3)
    choice = choose({4: chain}, ranks=2, link=FREE, limit=12.0, schedules=["gpipe", "1f1b"])
    assert str(choice) == (
        "1f1b, 4 micro-batches, cuts 0 2 4: 36 s, 10 B on the fullest rank (optimal; 5 simulated)\n"
        "  gpipe, 4 micro-batches, cuts 0 2 4: 40 s, 10 B on the fullest rank; 4 s (11 %) slower: "
        "memory +4 s, bubble +4 s, imbalance -4 s (recompute, to fit 12 B)"
    )
    assert [o.name for o in choice.best.options] == ["recompute", "keep"]
    assert choice.best.parts.memory > 0


def test_a_limit_that_nothing_fits():
    chains = {4: even(8, 4, saved=2.0)}
    question = {"ranks": 2, "link": FREE, "schedules": ["gpipe", "1f1b"]}
    with pytest.raises(InfeasibleError) as caught:
        choose(chains, limit=24.0, spare={16: even(8, 16, saved=2.0)}, **question)
    assert str(caught.value) == (
        "nothing fits 24 B per rank: 8 pieces cut for 2 ranks; the least, 1f1b with 4 micro-batches, needs 27 B, "
        "3 B more, on rank 0, stage 0 (pieces 0 to 2)\n"
        "  (static 3 B, saved 24 B in 2 micro-batches, pending 0 B, transient 0 B).\n"
        "  Give at least 27 bytes (limit)\n"
        "  or more micro-batches: 1f1b, 16 micro-batches, cuts 0 4 8: 102 s, 12 B on the fullest rank\n"
        "  or more ranks: 1f1b, 4 micro-batches, cuts 0 1 2 4 8: 120 s, 20 B on the fullest rank"
    )
    with pytest.raises(InfeasibleError, match="Give at least 27 bytes") as caught:
        choose(chains, limit=3.0, **question)
    assert choose(chains, limit=27.0, **question).best.peak_bytes == (27.0, 25.0)


def test_no_schedule_can_run():
    with pytest.raises(ScheduleError) as caught:
        choose({3: even(3, 3)}, ranks=2, link=FREE, schedules=["interleaved", "dualpipe-v"])
    assert str(caught.value) == (
        "no schedule can run on 2 ranks; give other numbers of micro-batches, other schedules, or fewer ranks\n"
        "  interleaved, 3 micro-batches: 4 stages need as many pieces, and there are 3\n"
        "  dualpipe-v, 3 micro-batches: 4 stages need as many pieces, and there are 3"
    )
    with pytest.raises(ScheduleError, match="no schedule is called 'zb'"):
        choose({3: even(3, 3)}, ranks=2, link=FREE, schedules=["zb"])


def test_pieces_that_cannot_be_stages():
    chain = Listed(2, {(0, 1): [], (1, 2): [Option(1, 1, 1, 0, 0, 0, 0, 0)], (0, 2): []}, [(0, 0)])
    with pytest.raises(ScheduleError, match="every stage of a cut needs an option"):
        choose({2: chain}, ranks=2, link=FREE, schedules=["1f1b"])
