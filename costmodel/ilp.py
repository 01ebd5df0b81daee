"""The integer program of one mesh axis, through PuLP. Numbers in, numbers out: nothing here knows a tensor.

Given groups g with options o, each with seconds c[g,o], a tie-breaker t[g,o] and bytes m[g,o]; flows f with a producer
group, whose options fall into rows r, and consumers k, whose options fall into columns q; seconds d[f,r,q] of a
transport (infinite: impossible), counted once for all consumers that share it; keeps s with bytes per column:

    (1)  sum_o x[g,o] = 1                                             x binary              one option per group
    (2)  sum_q w[f,k,r,q] = sum_{o in row r} x[producer,o]            w in [0, 1]           leave from the row chosen
    (3)  sum_r w[f,k,r,q] = sum_{o in column q} x[k,o]                                      arrive at the column chosen
    (4)  y[f,r,q,share] >= w[f,k,r,q]                                 y in [0, 1]           shared transports paid once
    (5)  z[s,q] >= sum_{o in column q} x[k,o]                         z in [0, 1]           kept copies counted once
    (6)  fixed + sum m x + sum n y + sum b z <= limit + over          over >= 0             bytes per rank
    min  sum (c + t) x + sum d y + penalty * over

Built by: _groups (1), _transport (2, 3), _shared (4), _keeps (5), _memory (6). A flow with one row or one column left
has w as an expression of x and needs neither (2) nor (3). Options that no partner can meet are removed before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pulp

from autopar.errors import SolverError

try:
    import highspy
except ImportError:  # CBC, which comes with PuLP, is used instead, and the plan says so
    highspy = None  # type: ignore[assignment]

INF = math.inf


class NoOption(SolverError):
    """Group `group` has no option that fits its neighbours."""

    def __init__(self, group: int):
        super().__init__(f"decision {group} has no option that fits its neighbours")
        self.group = group


@dataclass
class Group:
    """One decision: seconds, tie-breaker and bytes of every option."""

    cost: list[float]
    tie: list[float]
    memory: list[float]


@dataclass
class Consumer:
    """`column[o]`: what option o of `group` asks for. `share`: consumers of one share number split one transport in
    rows that do not share everywhere."""

    group: int
    column: list[int]
    share: int = 0


@dataclass
class Flow:
    """A tensor (or `count` alike) from its producer to its consumers.

    row[o]: row of the producer's option o. cost[r][q]: seconds of one transport. memory[r][q]: bytes it leaves behind.
    apart[r]: in this row only consumers of the same share number share.
    """

    group: int
    row: list[int]
    consumers: list[Consumer]
    cost: list[list[float]]
    count: float = 1.0
    memory: list[list[float]] | None = None
    apart: list[bool] | None = None


@dataclass
class Keep:
    """Bytes kept for every distinct column that a consumer asks for."""

    size: list[float]
    consumers: list[Consumer]


@dataclass
class Problem:
    """All numbers of one axis. `limit` in bytes, None for none; `fixed` bytes and `constant` seconds come on top."""

    groups: list[Group]
    flows: list[Flow] = field(default_factory=list)
    keeps: list[Keep] = field(default_factory=list)
    limit: float | None = None
    fixed: float = 0.0
    penalty: float | None = None  # seconds per byte over the limit; None: the limit is hard


@dataclass
class Solution:
    """Chosen option per group; its seconds (without tie-breakers) and bytes as recomputed here, never as the solver
    says."""

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


def evaluate(problem: Problem, choice: Sequence[int]) -> tuple[float, float]:
    """Seconds and bytes of a choice, straight from the definition."""
    seconds = sum(g.cost[o] for g, o in zip(problem.groups, choice))
    memory = problem.fixed + sum(g.memory[o] for g, o in zip(problem.groups, choice))
    for flow in problem.flows:
        r = flow.row[choice[flow.group]]
        apart = flow.apart is not None and flow.apart[r]
        for q, _ in {(c.column[choice[c.group]], c.share if apart else 0) for c in flow.consumers}:
            seconds += flow.count * flow.cost[r][q]
            memory += flow.memory[r][q] if flow.memory else 0.0
    for keep in problem.keeps:
        memory += sum(keep.size[q] for q in {c.column[choice[c.group]] for c in keep.consumers})
    return seconds, memory


def prune(problem: Problem) -> list[list[int]]:
    """Options of every group that have a partner for every flow; the rest can never be chosen.

    Raises:
        NoOption: a group has none left.
    """
    alive = [set(range(len(g.cost))) for g in problem.groups]
    touching: list[list[tuple[Flow, Consumer]]] = [[] for _ in problem.groups]
    for flow in problem.flows:
        if any(c == INF for line in flow.cost for c in line):
            for consumer in flow.consumers:
                touching[flow.group].append((flow, consumer))
                touching[consumer.group].append((flow, consumer))
    queue = {g for g, row in enumerate(touching) if row}
    while queue:
        g = queue.pop()
        for flow, consumer in touching[g]:
            rows = {flow.row[o] for o in alive[flow.group]}
            cols = {consumer.column[o] for o in alive[consumer.group]}
            good_rows = {r for r in rows if any(flow.cost[r][q] < INF for q in cols)}
            good_cols = {q for q in cols if any(flow.cost[r][q] < INF for r in rows)}
            keep_p = {o for o in alive[flow.group] if flow.row[o] in good_rows}
            keep_c = {o for o in alive[consumer.group] if consumer.column[o] in good_cols}
            for group, kept in ((flow.group, keep_p), (consumer.group, keep_c)):
                if len(kept) < len(alive[group]):
                    alive[group] &= kept
                    queue.add(group)
    empty = [g for g, options in enumerate(alive) if not options]
    if empty:
        raise NoOption(empty[0])
    return [sorted(options) for options in alive]


Terms = dict[Any, float]  # variable -> coefficient; the key None holds the constant


class _Model:
    """Writes a Problem as a PuLP model."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.alive = prune(problem)
        self.lp = pulp.LpProblem("axis", pulp.LpMinimize)
        self.names = 0
        self.objective: Terms = {}
        self.bytes: Terms = {}
        self.num_rows = 0
        floor = sum(min(g.cost[o] for o in a) for g, a in zip(problem.groups, self.alive))
        # Seconds are tiny numbers; solvers work to absolute tolerances.
        self.scale = 1e4 / floor if floor > 0 else 1.0
        self.x: list[dict[int, Any]] = []
        self._groups()
        for flow in problem.flows:
            self._flow(flow)
        self._keeps()
        self._memory()
        self.lp.setObjective(_affine(self.objective))

    def _variable(self, binary: bool = False, high: float | None = 1.0) -> Any:
        self.names += 1
        if binary:
            return pulp.LpVariable(f"x{self.names}", cat=pulp.LpBinary)
        return pulp.LpVariable(f"v{self.names}", 0.0, high)

    def _row(self, terms: Terms, sense: int) -> None:
        """terms (sense) 0."""
        self.num_rows += 1
        self.lp.addConstraint(pulp.LpConstraint(_affine(terms), sense=sense, rhs=0.0))

    def _groups(self) -> None:
        for group, alive in zip(self.problem.groups, self.alive):
            if len(alive) == 1:
                self.x.append({alive[0]: None})
            else:
                self.x.append({o: self._variable(binary=True) for o in alive})
                self._row({**{v: 1.0 for v in self.x[-1].values()}, None: -1.0}, pulp.LpConstraintEQ)
            for o, v in self.x[-1].items():
                _add(self.objective, v, (group.cost[o] + group.tie[o]) * self.scale)
                _add(self.bytes, v, group.memory[o])

    def _parts(self, group: int, label: Sequence[int]) -> dict[int, Terms]:
        """label -> sum of the options that have it."""
        out: dict[int, Terms] = {}
        for o, v in self.x[group].items():
            _add(out.setdefault(label[o], {}), v, 1.0)
        return out

    def _flow(self, flow: Flow) -> None:
        rows = self._parts(flow.group, flow.row)
        used: dict[tuple[int, int, int], list[Terms]] = {}
        done: set[tuple[int, tuple[int, ...], int]] = set()
        for consumer in flow.consumers:
            key = (consumer.group, tuple(consumer.column), consumer.share)
            if key in done:
                continue
            done.add(key)
            cols = self._parts(consumer.group, consumer.column)
            if all(not flow.cost[r][q] and not (flow.memory and flow.memory[r][q]) for r in rows for q in cols):
                continue
            for (r, q), terms in self._transport(flow, rows, cols).items():
                if flow.cost[r][q] or (flow.memory and flow.memory[r][q]):
                    share = consumer.share if flow.apart and flow.apart[r] else 0
                    used.setdefault((r, q, share), []).append(terms)
        for (r, q, _), expressions in used.items():
            self._shared(flow, r, q, expressions)

    def _transport(self, flow: Flow, rows: dict[int, Terms], cols: dict[int, Terms]) -> dict[tuple[int, int], Terms]:
        if len(rows) == 1:
            return {(next(iter(rows)), q): terms for q, terms in cols.items()}
        if len(cols) == 1:
            return {(r, next(iter(cols))): terms for r, terms in rows.items()}
        w = {(r, q): self._variable() for r in rows for q in cols if flow.cost[r][q] < INF}
        for r, terms in rows.items():
            self._row(_minus({w[r, q]: 1.0 for q in cols if (r, q) in w}, terms), pulp.LpConstraintEQ)
        for q, terms in cols.items():
            self._row(_minus({w[r, q]: 1.0 for r in rows if (r, q) in w}, terms), pulp.LpConstraintEQ)
        return {key: {v: 1.0} for key, v in w.items()}

    def _shared(self, flow: Flow, r: int, q: int, expressions: list[Terms]) -> None:
        if len(expressions) == 1:
            y = expressions[0]
        elif any(e.get(None) == 1.0 and len(e) == 1 for e in expressions):
            y = {None: 1.0}
        else:
            variable = self._variable()
            for e in expressions:
                self._row(_minus({variable: 1.0}, e), pulp.LpConstraintGE)
            y = {variable: 1.0}
        for v, coefficient in y.items():
            _add(self.objective, v, coefficient * flow.cost[r][q] * flow.count * self.scale)
            if flow.memory:
                _add(self.bytes, v, coefficient * flow.memory[r][q])

    def _keeps(self) -> None:
        if self.problem.limit is None:
            return
        for keep in self.problem.keeps:
            wanted: dict[int, list[Terms]] = {}
            for consumer in keep.consumers:
                for q, terms in self._parts(consumer.group, consumer.column).items():
                    wanted.setdefault(q, []).append(terms)
            for q, expressions in wanted.items():
                if not keep.size[q]:
                    continue
                if len(expressions) == 1:
                    z = expressions[0]
                else:
                    variable = self._variable()
                    for e in expressions:
                        self._row(_minus({variable: 1.0}, e), pulp.LpConstraintGE)
                    z = {variable: 1.0}
                for v, coefficient in z.items():
                    _add(self.bytes, v, coefficient * keep.size[q])

    def _memory(self) -> None:
        limit = self.problem.limit
        if limit is None:
            return
        unit = max(limit, 1.0) / 1e3
        terms = {v: c / unit for v, c in self.bytes.items()}
        _add(terms, None, (self.problem.fixed - limit) / unit)
        if self.problem.penalty is not None:
            over = self._variable(high=None)
            terms[over] = -1.0
            _add(self.objective, over, self.problem.penalty * unit * self.scale)
        self._row(terms, pulp.LpConstraintLE)


def solve(problem: Problem, time_limit: float = 30.0, gap: float = 1e-3) -> Solution | None:
    """Minimise; None if no choice meets the memory limit.

    HiGHS, or CBC (which comes with PuLP) where highspy is not installed. The answer is recomputed from the definition
    before it is returned; a status that is neither optimal nor feasible never leaves this function.

    Raises:
        SolverError: the solver gave up without an answer, or gave one that breaks a constraint.
    """
    started = time.perf_counter()
    model = _Model(problem)
    built = time.perf_counter()
    solver, name = _solver(time_limit, gap)
    free = any(len(a) > 1 for a in model.alive)
    if not free:
        choice = [a[0] for a in model.alive]
        seconds, memory = evaluate(problem, choice)
        if _over(problem, memory):
            return None
        return Solution(choice, seconds, memory, "optimal", 0.0, "none needed", 0, 0, built - started, 0.0)
    model.lp.solve(solver)
    solved = time.perf_counter()
    status = pulp.LpStatus[model.lp.status]
    if status == "Infeasible":
        return None
    found = model.lp.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if name == "HiGHS":
        found = found and solver.answered(model.lp.solverModel)
    if not found or any(v is not None and v.varValue is None for x in model.x for v in x.values()):
        raise SolverError(
            f"{name} found no plan in {time_limit:.0f} s (status {status}, {len(model.lp.variables())} variables, "
            f"{model.num_rows} rows); give it more time with time_limit="
        )
    choice = _read(model)
    seconds, memory = evaluate(problem, choice)
    if seconds == INF:
        raise SolverError(f"{name} returned a choice that its own constraints forbid (status {status})")
    if _over(problem, memory):
        raise SolverError(f"{name} returned a plan of {memory:.0f} bytes where {problem.limit:.0f} are allowed")
    optimal = model.lp.sol_status == pulp.LpSolutionOptimal
    return Solution(
        choice,
        seconds,
        memory,
        "optimal" if optimal else "feasible",
        _gap(model, name, gap),
        name,
        model.names,
        model.num_rows,
        built - started,
        solved - built,
    )


def _over(problem: Problem, memory: float) -> bool:
    return problem.limit is not None and problem.penalty is None and memory > problem.limit * (1 + 1e-6) + 1


class _RelaxedFirst(pulp.HiGHS):
    """HiGHS that tries the linear relaxation first: it is integral nearly always, and three times as fast.

    The model is handed over as arrays in one call; PuLP's own way, a call per column and row, takes longer than the
    solve.
    """

    def buildSolverModel(self, lp: Any) -> None:
        """Hand the model over without integrality."""
        variables = lp.variables()
        for index, variable in enumerate(variables):
            variable.index = index
        model = highspy.HighsLp()
        model.num_col_ = len(variables)
        model.col_cost_ = [lp.objective.get(v, 0.0) for v in variables]
        model.col_lower_ = [-INF if v.lowBound is None else v.lowBound for v in variables]
        model.col_upper_ = [INF if v.upBound is None else v.upBound for v in variables]
        starts, columns, values, low, high = [0], [], [], [], []
        for index, row in enumerate(lp.constraints.values()):
            row.index = index
            for variable, coefficient in row.items():
                columns.append(variable.index)
                values.append(coefficient)
            starts.append(len(columns))
            lower, upper = row.getLb(), row.getUb()
            low.append(-INF if lower is None else lower)
            high.append(INF if upper is None else upper)
        model.num_row_, model.row_lower_, model.row_upper_ = len(low), low, high
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = starts, columns, values
        lp.solverModel.passModel(model)

    def callSolver(self, lp: Any) -> None:
        """Solve the relaxation, and again with integrality where its answer is not whole."""
        model = lp.solverModel
        model.run()
        whole = [v.index for v in lp.variables() if v.cat == pulp.LpInteger]
        values = model.getSolution().col_value
        infeasible = model.getModelStatus() == highspy.HighsModelStatus.kInfeasible
        if infeasible or (self.answered(model) and all(abs(values[i] - round(values[i])) < 1e-6 for i in whole)):
            return
        for index in whole:
            model.changeColIntegrality(index, highspy.HighsVarType.kInteger)
        # HiGHS counts its limit over all runs: without this the search would start with what the relaxation left. On a
        # busy machine even that may end without any answer, so it gets longer before it gives up.
        limit = self.timeLimit
        for seconds in (limit, 4 * limit, max(16 * limit, 10.0)):
            model.setOptionValue("time_limit", model.getRunTime() + seconds)
            model.run()
            if self.answered(model) or model.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
                return

    @staticmethod
    def answered(model: Any) -> bool:
        """Whether HiGHS holds a feasible point (a time limit may leave none)."""
        return int(model.getInfo().primal_solution_status) == int(highspy.SolutionStatus.kSolutionStatusFeasible)


def _solver(time_limit: float, gap: float) -> tuple[Any, str]:
    if highspy is not None:
        return _RelaxedFirst(msg=False, timeLimit=time_limit, gapRel=gap, threads=1), "HiGHS"
    return pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit, gapRel=gap, threads=1), "CBC"


def _gap(model: _Model, name: str, asked: float) -> float:
    """Relative distance to the proven bound; CBC through PuLP tells no more than that the gap asked for was met."""
    if name != "HiGHS":
        return asked if model.lp.sol_status == pulp.LpSolutionOptimal else INF
    gap = float(model.lp.solverModel.getInfo().mip_gap)
    return 0.0 if gap == INF else max(0.0, gap)  # infinite: the relaxation was whole, no tree was searched


def _read(model: _Model) -> list[int]:
    choice = []
    for g, x in enumerate(model.x):
        best = max(x, key=lambda o: 1.0 if x[o] is None else x[o].varValue)
        value = 1.0 if x[best] is None else x[best].varValue
        if value < 0.5:
            raise SolverError(f"the solver chose no option for decision {g} (best value {value:.3f})")
        choice.append(best)
    return choice


def _add(terms: Terms, variable: Any, coefficient: float) -> None:
    terms[variable] = terms.get(variable, 0.0) + coefficient


def _minus(left: Terms, right: Terms) -> Terms:
    out = dict(left)
    for v, c in right.items():
        _add(out, v, -c)
    return out


def _affine(terms: Terms) -> pulp.LpAffineExpression:
    constant = terms.get(None, 0.0)
    return pulp.LpAffineExpression([(v, c) for v, c in terms.items() if v is not None], constant=constant)
