"""The integer program of one mesh axis. Numbers in, numbers out: nothing here knows a tensor.

Given groups g with options o, each with seconds c[g,o], a tie-breaker t[g,o] and bytes m[g,o]; flows f with a producer
group, whose options fall into rows r, and consumers k, whose options fall into columns q; seconds d[f,r,q] of a
transport (infinite: impossible), counted once for all consumers that share it; keeps s with bytes per column; bytes
a[g,o] that the backward adds, while it lets go of what transports and keeps have left it:

    (1)  sum_o x[g,o] = 1                                             x binary              one option per group
    (2)  sum_q w[f,k,r,q] = sum_{o in row r} x[producer,o]            w in [0, 1]           leave from the row chosen
    (3)  sum_r w[f,k,r,q] = sum_{o in column q} x[k,o]                                      arrive at the column chosen
    (4)  y[f,r,q,share] >= w[f,k,r,q]                                 y in [0, 1]           shared transports paid once
    (5)  z[s,q] >= sum_{o in column q} x[k,o]                         z in [0, 1]           kept copies counted once
    (6)  fixed + sum m x + sum n y + sum b z <= limit + over          over >= 0             bytes before the backward
         fixed + sum (m + a) x               <= limit + over                                bytes behind it
    min  sum (c + t) x + sum d y + penalty * over

That is the serial price: one thing after the other. With overlap, some transports are late: gathers of parameters and
reductions of gradients, which computation need not wait for. A transport keeps the links of tier t busy for h[f,r,q,t]
of its d seconds. Over the decisions of phase p (forward, backward):

    (7)  busy[p] = sum_p c x + sum_{p, late} (d - sum_t h) y + sum_{p, other} d y           computing, or waiting
         late[p,t] = sum_{p, late} h y,   block[p,t] = sum_{p, other} h y                   seconds of the links
    (8)  e[p] >= late[p,t] - u[p,t] (busy[p] - block[p,t])            e >= 0                exposed, every tier t
    min  sum_p busy[p] + sum_p e[p] + sum t x + penalty * over        (and c x of what is in no phase)

(8) with u = 1 is the bound of two machines: a phase takes no less than its busy time, and no less than what each
tier's links are busy. While another tier is waited for, late transports go on; while the same tier is, they cannot.
u < 1 is the part of that time which a bounded window of gathers can use; the planner fits it to a simulation
(`costmodel.simulate`), which also decides between plans in the end.

Built by: _groups (1), _transport (2, 3), _shared (4), _keeps (5), _memory (6), _exposed (8). A flow with one row or one
column left has w as an expression of x and needs neither (2) nor (3). Before that, options that no partner can meet and
options that another one beats are removed (`costmodel.problem`).

Rows (8) weigh all decisions at once, and make the relaxation mix choices; `costmodel.highs` says what is done then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pulp

from autopar.costmodel import highs
from autopar.costmodel.highs import highspy
from autopar.costmodel.model import CONST, Answer, Linear, Model, Terms, read
from autopar.costmodel.problem import INF, Consumer, Flow, Group, Keep, NoOption, Problem, evaluate, overlapped
from autopar.errors import SolverError


@dataclass
class Solution:
    """Chosen option per group; its seconds (serial, and with overlap; without tie-breakers) and bytes as recomputed
    here, never as the solver says."""

    choice: list[int]
    seconds: float
    memory: float
    status: str
    gap: float
    solver: str
    variables: int
    rows: int
    build_s: float
    solve_s: float
    step: float = 0.0


def solve(
    problem: Problem, time_limit: float = 30.0, gap: float = 1e-3, start: Sequence[int] | None = None
) -> Solution | None:
    """Minimise; None if no choice meets the memory limit.

    HiGHS, or CBC (which comes with PuLP) where highspy is not installed. The answer is recomputed from the definition
    before it is returned; a status that is neither optimal nor feasible never leaves this function.

    Args:
        time_limit: seconds. gap: relative, at which to stop. start: a choice to begin with.

    Raises:
        NoOption: a group has no option that fits its neighbours.
        SolverError: the solver gave up without an answer, or gave one that breaks a constraint.
    """
    started = time.perf_counter()
    model = Model(problem)
    built = time.perf_counter()
    if not model.whole:
        choice = [a[0] for a in model.alive]
        seconds, memory = evaluate(problem, choice)
        if _over(problem, memory):
            return None
        step = overlapped(problem, choice)
        return Solution(choice, seconds, memory, "optimal", 0.0, "none needed", 0, 0, built - started, 0.0, step)
    solver, name = _solver(time_limit, gap)
    answer = highs.run(model, time_limit, gap, start) if solver is None else _pulp(model, solver, gap)
    solved = time.perf_counter()
    if answer.status == "infeasible":
        return None
    if answer.values is None:
        raise SolverError(
            f"{name} found no plan in {time_limit:.0f} s (status {answer.status}, {len(model.high)} variables, "
            f"{len(model.rows)} rows); give it more time with time_limit="
        )
    choice = read(model, answer.values)
    seconds, memory = evaluate(problem, choice)
    if seconds == INF:
        raise SolverError(f"{name} returned a choice that its own constraints forbid (status {answer.status})")
    if _over(problem, memory):
        raise SolverError(f"{name} returned a plan of {memory:.0f} bytes where {problem.limit:.0f} are allowed")
    return Solution(
        choice,
        seconds,
        memory,
        answer.status,
        answer.gap,
        name,
        len(model.high),
        len(model.rows),
        built - started,
        solved - built,
        overlapped(problem, choice),
    )


def solve_linear(program: Linear, time_limit: float, gap: float) -> list[float] | None:
    """The columns of the least objective, within the gap; None if nothing meets the rows.

    Raises:
        SolverError: the solver gave up without an answer.
    """
    solver, name = _solver(time_limit, gap)
    answer = highs.mixed(program, time_limit, gap) if solver is None else _pulp(program, solver, gap)
    if answer.status.lower() == "infeasible":
        return None
    if answer.values is None:
        raise SolverError(f"{name} found no answer in {time_limit:.0f} s (status {answer.status}); give it more time")
    return [float(v) for v in answer.values]


def _over(problem: Problem, memory: float) -> bool:
    return problem.limit is not None and problem.penalty is None and memory > problem.limit * (1 + 1e-6) + 1


def _solver(time_limit: float, gap: float) -> tuple[Any, str]:
    """PuLP's solver (None: HiGHS is called directly), and its name."""
    if highspy is not None:
        return None, "HiGHS"
    return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap, threads=1), "CBC"


def _pulp(model: Linear, solver: Any, gap: float) -> Answer:
    """Through PuLP. It tells of the gap no more than that the one asked for was met."""
    whole = set(model.whole)
    columns = []
    for i, high in enumerate(model.high):
        kind = pulp.LpInteger if i in whole else pulp.LpContinuous
        columns.append(pulp.LpVariable(f"v{i}", 0.0, None if high == INF else high, kind))
    lp = pulp.LpProblem("axis", pulp.LpMinimize)
    lp.setObjective(_affine(model.objective, columns))
    for terms, low, high in model.rows:
        for sense, side in ((pulp.LpConstraintGE, low), (pulp.LpConstraintLE, high)):
            if abs(side) < INF and not (low == high and sense == pulp.LpConstraintLE):
                kind = pulp.LpConstraintEQ if low == high else sense
                lp.addConstraint(pulp.LpConstraint(_affine(terms, columns), sense=kind, rhs=side))
    lp.solve(solver)
    status = pulp.LpStatus[lp.status]
    if status == "Infeasible":
        return Answer("infeasible", None, INF)
    found = lp.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if not found or any(columns[i].varValue is None for i in model.whole):
        return Answer(status, None, INF)
    optimal = lp.sol_status == pulp.LpSolutionOptimal
    values = [v.varValue or 0.0 for v in columns]
    return Answer("optimal" if optimal else "feasible", values, gap if optimal else INF)


def _affine(terms: Terms, columns: Sequence[Any]) -> pulp.LpAffineExpression:
    pairs = [(columns[v], c) for v, c in terms.items() if v != CONST]
    return pulp.LpAffineExpression(pairs, constant=terms.get(CONST, 0.0))


__all__ = [
    "INF",
    "Consumer",
    "Flow",
    "Group",
    "Keep",
    "NoOption",
    "Problem",
    "Solution",
    "evaluate",
    "overlapped",
    "solve",
    "solve_linear",
]
