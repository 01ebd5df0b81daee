"""The integer program against brute force on random problems, and its refusals."""

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import pulp
import pytest

from autopar.costmodel import ilp
from autopar.costmodel.ilp import INF, Consumer, Flow, Group, Keep, NoOption, Problem, evaluate, solve
from autopar.errors import SolverError


def _bytes(rng: random.Random) -> float:
    return float(rng.randint(0, 9))


def random_problem(seed: int) -> Problem:
    rng = random.Random(seed)

    def group() -> Group:
        n = rng.randint(1, 3)
        cost, held, grown = (
            [scale(rng) for _ in range(n)]
            for scale in (random.Random.random, _bytes, rng.choice([_bytes, lambda r: 0.0]))
        )
        return Group(cost, [0.0] * n, held, grown=grown)

    groups = [group() for _ in range(5)]
    flows, keeps = [], []
    for _ in range(4):
        producer, *readers = rng.sample(range(5), rng.randint(2, 4))
        rows, cols = 3, 3
        cost = [[rng.choice([0.0, rng.random(), rng.random(), INF]) for _ in range(cols)] for _ in range(rows)]
        for line in cost:
            line[0] = 0.3  # column 0 can always be reached
        consumers = [
            Consumer(r, [0] + [rng.randrange(cols) for _ in groups[r].cost[1:]], rng.randrange(2)) for r in readers
        ]
        row = [rng.randrange(rows) for _ in groups[producer].cost]
        memory = [[float(rng.randint(0, 4)) for _ in range(cols)] for _ in range(rows)]
        flows.append(Flow(producer, row, consumers, cost, 2.0, memory, [rng.random() < 0.5 for _ in range(rows)]))
        keeps.append(Keep([float(rng.randint(0, 4)) for _ in range(cols)], consumers))
    return Problem(groups, flows, keeps, fixed=1.0)


def apart(code: str) -> str:
    """What a fresh process prints that runs `code`."""
    start = "import highspy\nfrom autopar.costmodel.ilp import solve\nfrom tests.test_ilp import random_problem\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_nothing_is_printed():
    """What a command prints may be read by another."""
    assert apart("solve(random_problem(0))\n") == ""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_solver_of_the_users_own_comes_first(threads):
    """HiGHS has one pool of threads in a process."""
    apart(f"""
theirs = highspy.Highs()
theirs.setOptionValue("threads", {threads})
theirs.addCol(1.0, 0.0, 1.0, 0, [], [])
theirs.run()
assert solve(random_problem(0)).status == "optimal"
""")


def brute(problem: Problem) -> float:
    best = INF
    for choice in itertools.product(*(range(len(g.cost)) for g in problem.groups)):
        seconds, memory = evaluate(problem, choice)
        if problem.limit is None or memory <= problem.limit:
            best = min(best, seconds)
    return best


@pytest.mark.parametrize("seed", range(25))
def test_optimum_equals_brute_force(seed):
    problem = random_problem(seed)
    free = solve(problem, gap=1e-7)
    assert free is not None and free.status == "optimal"
    assert free.seconds == pytest.approx(brute(problem), rel=1e-5)
    problem.limit = 0.8 * free.memory
    held = solve(problem, gap=1e-7)
    expected = brute(problem)
    if expected == INF:
        assert held is None
    else:
        assert held is not None and held.memory <= problem.limit
        assert held.seconds == pytest.approx(expected, rel=1e-5)


def test_what_is_kept_and_what_grows_are_never_held_together():
    kept = Keep([80.0], [Consumer(1, [0])])
    problem = Problem([Group([1.0, 2.0], [0, 0], [20.0, 20.0], grown=[90.0, 60.0]), Group([1.0], [0], [0])], [], [kept])
    assert evaluate(problem, [0, 0])[1] == 110.0 and evaluate(problem, [1, 0])[1] == 100.0
    for limit, choice in ((110.0, [0, 0]), (100.0, [1, 0])):
        problem.limit = limit
        answer = solve(problem)
        assert answer is not None and answer.choice == choice and answer.memory == limit
    problem.limit = 90.0
    assert solve(problem) is None


def test_a_penalty_buys_what_a_limit_forbids():
    problem = Problem([Group([1.0, 2.0], [0, 0], [10.0, 5.0])], limit=1.0)
    assert solve(problem) is None
    problem.penalty = 10.0
    answer = solve(problem)
    assert answer is not None and answer.choice == [1]


def test_a_tie_is_broken_as_asked_but_not_counted():
    answer = solve(Problem([Group([1.0, 1.0], [0.01, 0.0], [0.0, 0.0])]))
    assert answer is not None and answer.choice == [1] and answer.seconds == 1.0


def test_a_decision_without_partner_is_named():
    flow = Flow(0, [0], [Consumer(1, [0])], [[INF]])
    with pytest.raises(NoOption, match="decision 0 has no option"):
        solve(Problem([Group([1.0], [0], [0]), Group([1.0], [0], [0])], [flow]))


def test_cbc_agrees(monkeypatch):
    """The fall-back of an installation without highspy."""
    if not pulp.PULP_CBC_CMD(msg=False).available():
        pytest.skip("PuLP has no CBC for this processor, so that there is no fall-back to compare")
    problem = random_problem(3)
    expected = solve(problem, gap=1e-7)
    monkeypatch.setattr(ilp, "highspy", None)
    answer = solve(problem, gap=1e-7)
    assert answer is not None and expected is not None and answer.solver == "CBC"
    assert answer.seconds == pytest.approx(expected.seconds, rel=1e-5)


def test_no_answer_in_time_is_an_error(monkeypatch):
    class Late(pulp.PULP_CBC_CMD):
        def actualSolve(self, lp, **_):
            lp.assignStatus(pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound)
            return pulp.LpStatusNotSolved

    monkeypatch.setattr(ilp, "_solver", lambda time_limit, gap: (Late(msg=False), "CBC"))
    with pytest.raises(SolverError, match=r"CBC found no plan in 3 s \(status Not Solved, .* time_limit="):
        solve(random_problem(0), time_limit=3.0)


def test_a_wrong_answer_of_the_solver_is_not_believed(monkeypatch):
    flow = Flow(0, [0, 1], [Consumer(1, [0, 1])], [[0.0, INF], [0.5, 0.0]])
    problem = Problem([Group([1.0, 2.0], [0, 0], [0, 0]), Group([2.0, 1.0], [0, 0], [0, 0])], [flow])
    monkeypatch.setattr(ilp, "read", lambda model, values: [0, 1])
    with pytest.raises(SolverError, match="its own constraints forbid"):
        solve(problem)
    assert math.isinf(evaluate(problem, [0, 1])[0])


@pytest.mark.parametrize("seed", range(6))
def test_a_time_limit_too_short_for_an_answer_is_stretched(seed):
    """On a busy machine a run may end with nothing; what the solver then holds must not be read as a plan."""
    problem = random_problem(seed)
    problem.limit = 0.8 * solve(problem).memory
    wanted, hurried = solve(problem), solve(problem, time_limit=1e-5)
    assert (wanted is None) == (hurried is None)
    if wanted is not None:
        assert hurried.seconds >= wanted.seconds * (1 - 1e-3)
