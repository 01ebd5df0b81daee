"""Branch and bound from basis to basis, against all whole points of small programs."""

import itertools
import random
import time

import highspy
import numpy as np
import pytest

from autopar.costmodel.branch import branch, is_whole

COLUMNS = 8


def program(seed: int) -> tuple[list[float], list[tuple[list[float], float]]]:
    """Costs, and rows `coefficients >= least`: covers of odd cycles, whose relaxations are halves."""
    rng = random.Random(seed)
    costs = [1.0 + rng.random() for _ in range(COLUMNS)]
    rows = []
    for _ in range(6):
        three = rng.sample(range(COLUMNS), 3)
        for pair in itertools.combinations(three, 2):
            rows.append(([float(c in pair) for c in range(COLUMNS)], 1.0))
    return costs, rows


def relaxed(costs: list[float], rows: list[tuple[list[float], float]]) -> highspy.Highs:
    solver = highspy.Highs()
    for key, value in {"output_flag": False, "presolve": "off"}.items():
        solver.setOptionValue(key, value)
    for cost in costs:
        solver.addCol(cost, 0.0, 1.0, 0, [], [])
    for coefficients, least in rows:
        solver.addRow(least, highspy.kHighsInf, COLUMNS, np.arange(COLUMNS, dtype=np.int32), np.array(coefficients))
    solver.run()
    return solver


def best_of_all(costs: list[float], rows: list[tuple[list[float], float]]) -> float:
    points = itertools.product((0.0, 1.0), repeat=COLUMNS)
    met = [p for p in points if all(np.dot(c, p) >= least for c, least in rows)]
    return min((float(np.dot(costs, p)) for p in met), default=np.inf)


WHOLE = np.arange(COLUMNS, dtype=np.int32)


@pytest.mark.parametrize("seed", range(20))
def test_branching_finds_the_best_whole_point(seed):
    costs, rows = program(seed)
    solver = relaxed(costs, rows)
    before = solver.getInfo().objective_function_value
    found = branch(solver, WHOLE, 0.0, time.perf_counter() + 60)
    assert found.value == pytest.approx(best_of_all(costs, rows)) == pytest.approx(found.bound)
    assert is_whole(found.values, WHOLE) and found.gap <= 1e-9
    assert np.dot(costs, found.values) == pytest.approx(found.value)
    lp = solver.getLp()
    assert list(lp.col_lower_) == [0.0] * COLUMNS and list(lp.col_upper_) == [1.0] * COLUMNS
    solver.run()
    assert solver.getInfo().objective_function_value == pytest.approx(before)


def test_the_programs_are_torn():
    torn = [not is_whole(np.array(relaxed(*program(s)).getSolution().col_value), WHOLE) for s in range(20)]
    assert sum(torn) > 10


@pytest.mark.parametrize("nodes", [0, 1, 3, 6])
def test_fewer_nodes_give_an_honest_gap(nodes):
    for seed in range(20):
        costs, rows = program(seed)
        found = branch(relaxed(costs, rows), WHOLE, 0.0, time.perf_counter() + 60, nodes)
        best = best_of_all(costs, rows)
        assert found.bound <= best + 1e-9 <= found.value + 2e-9
        assert (found.values is None) == (found.value == np.inf) == (found.gap == np.inf)


def test_a_gap_ends_the_search_early():
    for seed in range(20):
        costs, rows = program(seed)
        found = branch(relaxed(costs, rows), WHOLE, 0.2, time.perf_counter() + 60)
        assert found.gap <= 0.2 and found.value <= best_of_all(costs, rows) / 0.8


def test_no_time_and_no_whole_point():
    costs, rows = program(3)
    assert branch(relaxed(costs, rows), WHOLE, 0.0, time.perf_counter() - 1).values is None
    halves = [([2.0] + [0.0] * (COLUMNS - 1), 1.0), ([-2.0] + [0.0] * (COLUMNS - 1), -1.0)]  # the first column is 1/2
    found = branch(relaxed(costs, halves), WHOLE, 0.0, time.perf_counter() + 60)
    assert found.values is None and found.bound == np.inf
