"""HiGHS on a Model, handed over in memory as arrays: the linear relaxation first, then whole numbers.

Nearly all of the time goes into one relaxation from scratch per program; all that is asked afterwards (without rows (8)
and (6), at other prices, with decisions fixed) starts from its basis.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from autopar.costmodel.branch import branch, highspy, is_whole
from autopar.costmodel.model import CONST, Answer, Linear, Model, Terms, read
from autopar.costmodel.problem import INF

if highspy is not None:

    class _Silent(highspy.Highs):  # type: ignore[misc]
        """HiGHS without its first words, which it prints when callbacks are enabled, before it can be told not to."""

        def enableCallbacks(self) -> None:
            self.silent()
            super().enableCallbacks()


#: Seconds that a relaxation gets at least.
LEAST = 0.5
#: Relative gap of a choice at given prices, which are not exact either.
CLOSE = 1e-2
#: Prices of a byte that are tried where the first is too low.
PRICES = 6
#: With rows (8) or (6), a choice within so many times the gap asked for is taken without branching, and its gap told.
NEAR = 10.0
#: Columns up to which branching is quick; beyond, with rows (8) or (6), the best of the relaxations is taken as it is.
SMALL = 4000


def run(model: Model, time_limit: float, gap: float, start: Sequence[int] | None) -> Answer:
    """Minimise. start: a choice to begin with."""
    solver = _solver(_arrays(model), time_limit, gap)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return Answer("infeasible", None, INF)
    whole = np.array(model.whole, dtype=np.int32)
    relaxed = np.array(solver.getSolution().col_value)
    solved = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal  # else its value is no bound
    if solved and is_whole(relaxed, whole):
        return Answer("optimal", relaxed, 0.0)
    if (model.exposed or model.memory) and solved:
        bound = float(solver.getInfo().objective_function_value)
        start = _nearest(model, solver, whole, time_limit, start, bound / max(1e-9, 1 - NEAR * gap))
        if start is not None:
            value = model.value(start)
            reached = max(0.0, 1 - bound / value) if 0 < value < INF else INF
            large = len(model.high) > SMALL and reached < INF
            if gap >= 1e-3 and (reached <= NEAR * gap or large):
                columns, values = model.point(start)
                point = np.zeros(len(model.high))
                point[columns] = values
                return Answer("optimal" if reached <= gap else "feasible", point, reached)
        solver = _solver(_arrays(model), time_limit, gap)
    elif solved:
        found = branch(solver, whole, gap, time.perf_counter() + time_limit)
        if found.gap <= (NEAR * gap if len(model.high) > SMALL else gap):
            return Answer("optimal" if found.gap <= gap else "feasible", found.values, found.gap)
        start = start if found.values is None else read(model, found.values)
    if len(model.high) > SMALL:  # the last tenths of a percent would take all the time there is
        solver.setOptionValue("mip_rel_gap", NEAR * gap)
    else:
        solver.setOptionValue("presolve", "choose")
    return _search(model, solver, whole, time_limit, gap, start)


def mixed(program: Linear, time_limit: float, gap: float) -> Answer:
    """Minimise a plain mixed program."""
    solver = _solver(_arrays(program), time_limit, gap)
    solver.setOptionValue("presolve", "choose")
    return _search(program, solver, np.array(program.whole, dtype=np.int32), time_limit, gap, None)


def _search(
    model: Linear, solver: Any, whole: Any, time_limit: float, gap: float, start: Sequence[int] | None
) -> Answer:
    solver.changeColsIntegrality(len(whole), whole, _integer(whole))
    # HiGHS counts its limit over all runs: without this the search would start with what the relaxation left. On a
    # busy machine even that may end without any answer, so it gets longer before it gives up.
    for seconds in (time_limit, 4 * time_limit, max(16 * time_limit, 10.0)):
        if start is not None:
            assert isinstance(model, Model)
            columns, values = model.point(start)
            solver.setSolution(len(columns), np.array(columns, dtype=np.int32), np.array(values))
        solver.setOptionValue("time_limit", solver.getRunTime() + seconds)
        solver.run()
        if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return Answer("infeasible", None, INF)
        if _answered(solver):
            optimal = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
            found = float(solver.getInfo().mip_gap)
            found = 0.0 if found == INF and optimal else max(0.0, found)
            close = optimal and found <= gap
            return Answer("optimal" if close else "feasible", solver.getSolution().col_value, found)
    return Answer(str(solver.getModelStatus()), None, INF)


def _nearest(
    model: Model, solver: Any, whole: Any, time_limit: float, start: Sequence[int] | None, enough: float
) -> Sequence[int] | None:
    """The best choice of `start` and of relaxations without the rows that weigh all decisions at once; `solver`, which
    has solved the one with them, loses these rows.

    Rows (8) and the limit on memory (6) make the relaxation mix choices. Priced instead, by their multipliers in what
    `solver` holds (Lagrangian relaxation; Geoffrion, 1974), they leave a program that is integral nearly always. With
    rows (8) a relaxation in which nothing overlaps is asked, too, unless the first gives a value of `enough` or less.
    """
    end = time.perf_counter() + 2 * time_limit
    duals = np.abs(np.array(solver.getSolution().row_dual))
    found = [] if start is None else [list(start)]
    priced: Terms = {}
    for row in model.exposed:
        _weigh(priced, model.rows[row][0], duals[row])
    serial: Terms = {}
    for terms in (t for part in model.late for t in part):
        _weigh(serial, terms, 1.0)
    for extra in (priced, serial) if model.exposed else (priced,):
        found += _Relaxation(model, solver, extra, duals, whole, end).choices()
        if any(model.value(choice) <= enough for choice in found):
            break
    return min(found, key=model.value, default=None)


class _Relaxation:
    """A model without rows (8) and (6): the first at the cost `extra`, the second at prices per byte.

    The multipliers of (6) are where the relaxation changes its mind, so the choice at these prices may be just over the
    limit: the least multiple of them at which it is met is looked for.
    """

    def __init__(self, model: Model, solver: Any, extra: Terms, duals: Any, whole: Any, end: float) -> None:
        self.model, self.whole, self.end, self.solver = model, whole, end, solver
        self.memory: Terms = {}  # bytes at their prices
        for row in model.memory:
            if duals[row]:
                _weigh(self.memory, model.rows[row][0], float(duals[row]))
        self.base = _costs(model)
        for v, c in extra.items():
            if v != CONST:
                self.base[v] += c
        for row in (*model.exposed, *model.memory):
            solver.changeRowBounds(row, -INF, INF)

    def choices(self) -> list[list[int]]:
        """At the multiplier, and, where that does not meet the limit, the best that do."""
        first = self._at(1.0)
        found = [] if first is None else [first]
        if first is None or not self.memory or self.model.value(first) < INF:
            return found
        low, high = 1.0, 0.0
        for _ in range(PRICES):
            if time.perf_counter() > self.end:
                break
            factor = (low * high) ** 0.5 if high else 2 * low
            choice = self._at(factor)
            if choice is not None and self.model.value(choice) < INF:
                found.append(choice)
                high = factor
            else:
                low = factor
        return found

    def _at(self, factor: float) -> list[int] | None:
        """The choice at a multiple of the price; None if it was not found in time."""
        cost = self.base.copy()
        for v, c in self.memory.items():
            cost[v] += factor * c
        cost = np.where(np.abs(cost) < 1e-12, 0.0, cost)
        solver = self.solver
        columns = np.arange(len(cost), dtype=np.int32)
        solver.changeColsCost(len(cost), columns, cost)
        solver.setOptionValue("time_limit", solver.getRunTime() + max(LEAST, self.end - time.perf_counter()))
        solver.run()
        if not _answered(solver):
            return None
        values: Any = np.array(solver.getSolution().col_value)
        if not is_whole(values, self.whole):
            values = branch(solver, self.whole, CLOSE, max(self.end, time.perf_counter() + LEAST)).values
        return None if values is None else read(self.model, values)


def _weigh(into: Terms, terms: Terms, weight: float) -> None:
    for v, c in terms.items():
        into[v] = into.get(v, 0.0) + weight * c


def _solver(lp: Any, time_limit: float, gap: float) -> Any:
    solver = _Silent()
    # Not "threads": HiGHS refuses a number other than that of the first solver in the process, perhaps the user's. No
    # presolve: it takes as long as what follows, for `costmodel.problem` has pruned before.
    options: dict[str, Any] = {"output_flag": False, "parallel": "off", "presolve": "off"}
    options |= {"mip_rel_gap": gap, "time_limit": time_limit}
    for key, value in options.items():
        solver.setOptionValue(key, value)
    solver.passModel(lp)
    return solver


def _integer(whole: Any) -> Any:
    return np.full(len(whole), int(highspy.HighsVarType.kInteger), dtype=np.uint8)


def _costs(model: Linear) -> Any:
    cost = np.zeros(len(model.high))
    for v, c in model.objective.items():
        if v != CONST:
            cost[v] = c
    return cost


def _arrays(model: Linear) -> Any:
    """The model as HiGHS takes it."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(model.high), len(model.rows)
    lp.col_cost_, lp.offset_ = _costs(model), model.objective.get(CONST, 0.0)
    lp.col_lower_, lp.col_upper_ = np.zeros(len(model.high)), np.array(model.high)
    lp.row_lower_ = np.array([low for _, low, _ in model.rows])
    lp.row_upper_ = np.array([high for _, _, high in model.rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    rows = [terms for terms, _, _ in model.rows]
    lp.a_matrix_.start_ = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    lp.a_matrix_.index_ = np.fromiter(chain.from_iterable(rows), dtype=np.int32)
    lp.a_matrix_.value_ = np.fromiter(chain.from_iterable(map(dict.values, rows)), dtype=np.float64)
    return lp


def _answered(solver: Any) -> bool:
    """Whether HiGHS holds a feasible point (a time limit may leave none)."""
    return int(solver.getInfo().primal_solution_status) == int(highspy.SolutionStatus.kSolutionStatusFeasible)


__all__ = ["highspy", "mixed", "run"]
