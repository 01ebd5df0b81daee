"""HiGHS on a Model, handed over in memory as arrays: the linear relaxation first, then whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autopar.costmodel.model import CONST, Answer, Model, Terms, read
from autopar.costmodel.problem import INF

try:
    import highspy
except ImportError:  # CBC, which comes with PuLP, is used instead, and the plan says so
    highspy = None  # type: ignore[assignment]

#: With rows (8), a choice within so many times the gap asked for is taken without branching; its own gap is told.
NEAR = 10.0
#: Columns up to which branching is quick; beyond, with rows (8), the best of the relaxations is taken as it is.
SMALL = 4000


def run(model: Model, time_limit: float, gap: float, start: Sequence[int] | None) -> Answer:
    """Minimise. start: a choice to begin with."""
    solver = _solver(_arrays(model), time_limit, gap)
    solver.run()
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return Answer("infeasible", None, INF)
    whole = np.array(model.whole, dtype=np.int32)
    relaxed = np.array(solver.getSolution().col_value)
    if _answered(solver) and _is_whole(relaxed, whole):
        return Answer("optimal", relaxed, 0.0)
    if model.exposed and _answered(solver):
        bound = float(solver.getInfo().objective_function_value)
        start = _nearest(model, solver, whole, time_limit, start, bound / max(1e-9, 1 - NEAR * gap))
        if start is not None:
            value = model.value(start)
            reached = max(0.0, 1 - bound / value) if 0 < value < INF else INF
            if gap >= 1e-3 and (reached <= NEAR * gap or (len(model.high) > SMALL and reached < INF)):
                columns, values = model.point(start)
                point = np.zeros(len(model.high))
                point[columns] = values
                return Answer("optimal" if reached <= gap else "feasible", point, reached)
        solver = _solver(_arrays(model), time_limit, gap)
    return _branch(model, solver, whole, time_limit, start)


def _branch(model: Model, solver: Any, whole: Any, time_limit: float, start: Sequence[int] | None) -> Answer:
    solver.changeColsIntegrality(len(whole), whole, _integer(whole))
    # HiGHS counts its limit over all runs: without this the search would start with what the relaxation left. On a
    # busy machine even that may end without any answer, so it gets longer before it gives up.
    for seconds in (time_limit, 4 * time_limit, max(16 * time_limit, 10.0)):
        if start is not None:
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
            return Answer("optimal" if optimal else "feasible", solver.getSolution().col_value, found)
    return Answer(str(solver.getModelStatus()), None, INF)


def _nearest(
    model: Model, solver: Any, whole: Any, time_limit: float, start: Sequence[int] | None, enough: float
) -> Sequence[int] | None:
    """The best choice of `start` and of two relaxations without rows (8), which make them mix choices.

    In the one, these rows are priced by their multipliers in what `solver` holds (Lagrangian relaxation; Geoffrion,
    1974), in the other nothing overlaps. Both are integral nearly always. The second is left out when the first gives
    a value of `enough` or less.
    """
    duals = np.abs(np.array(solver.getSolution().row_dual))
    priced: Terms = {}
    for row in model.exposed:
        for v, c in model.rows[row][0].items():
            priced[v] = priced.get(v, 0.0) + duals[row] * c
    serial: Terms = {}
    for terms in (t for part in model.late for t in part):
        for v, c in terms.items():
            serial[v] = serial.get(v, 0.0) + c
    found = [] if start is None else [list(start)]
    for extra in (priced, serial):
        lp = _arrays(model, model.exposed)
        cost = np.array(lp.col_cost_)
        for v, c in extra.items():
            if v != CONST:
                cost[v] += c
        lp.col_cost_ = np.where(np.abs(cost) < 1e-12, 0.0, cost)
        other = _solver(lp, time_limit, 1e-3)
        other.run()
        values = np.array(other.getSolution().col_value)
        if _answered(other) and not _is_whole(values, whole):
            other.changeColsIntegrality(len(whole), whole, _integer(whole))
            other.setOptionValue("time_limit", other.getRunTime() + time_limit)
            other.run()
            values = np.array(other.getSolution().col_value)
        if _answered(other):
            found.append(read(model, values))
            if model.value(found[-1]) <= enough:
                break
    return min(found, key=model.value, default=None)


def _solver(lp: Any, time_limit: float, gap: float) -> Any:
    solver = highspy.Highs()
    for key, value in (("output_flag", False), ("threads", 1), ("mip_rel_gap", gap), ("time_limit", float(time_limit))):
        solver.setOptionValue(key, value)
    solver.passModel(lp)
    return solver


def _is_whole(values: Any, whole: Any) -> bool:
    return bool(np.all(np.abs(values[whole] - np.round(values[whole])) < 1e-6))


def _integer(whole: Any) -> Any:
    return np.full(len(whole), int(highspy.HighsVarType.kInteger), dtype=np.uint8)


def _arrays(model: Model, without: Sequence[int] = ()) -> Any:
    """The model as HiGHS takes it; the rows in `without` are there and hold nothing."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(model.high), len(model.rows)
    cost = np.zeros(len(model.high))
    for v, c in model.objective.items():
        if v != CONST:
            cost[v] = c
    lp.col_cost_, lp.offset_ = cost, model.objective.get(CONST, 0.0)
    lp.col_lower_, lp.col_upper_ = np.zeros(len(model.high)), np.array(model.high)
    lp.row_lower_ = np.array([low for _, low, _ in model.rows])
    upper = np.array([high for _, _, high in model.rows])
    upper[list(without)] = INF
    lp.row_upper_ = upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(terms) for terms, _, _ in model.rows)], dtype=np.int32)
    lp.a_matrix_.index_ = np.array([v for terms, _, _ in model.rows for v in terms], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([c for terms, _, _ in model.rows for c in terms.values()], dtype=np.float64)
    return lp


def _answered(solver: Any) -> bool:
    """Whether HiGHS holds a feasible point (a time limit may leave none)."""
    return int(solver.getInfo().primal_solution_status) == int(highspy.SolutionStatus.kSolutionStatusFeasible)


__all__ = ["highspy", "run"]
