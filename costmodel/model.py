"""A Problem as columns and rows: equations (1) to (8) of `costmodel.ilp`, before any solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autopar.costmodel.problem import AFTER, INF, PHASES, Flow, Problem, dominate, evaluate, overlapped, prune
from autopar.errors import SolverError

#: Column -> coefficient; the key CONST holds the constant.
Terms = dict[int, float]
CONST = -1


@dataclass
class Linear:
    """A plain mixed program: minimise `objective` over columns of 0 <= x <= high, those of `whole` 0 or 1."""

    high: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    rows: list[tuple[Terms, float, float]] = field(default_factory=list)  # lower <= terms <= upper
    objective: Terms = field(default_factory=dict)

    def column(self, cost: float = 0.0, binary: bool = False, high: float = 1.0) -> int:
        """A new column."""
        self.high.append(high)
        if binary:
            self.whole.append(len(self.high) - 1)
        if cost:
            self.objective[len(self.high) - 1] = cost
        return len(self.high) - 1

    def row(self, terms: Terms, low: float, high: float) -> None:
        """low <= terms <= high, the constant of `terms` included."""
        constant = terms.pop(CONST, 0.0)
        self.rows.append((terms, low - constant, high - constant))


class Model(Linear):
    """A Problem as columns and rows."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.problem = problem
        self.alive, self.instead = dominate(problem, prune(problem))
        self.exposed: list[int] = []  # which of them are of kind (8)
        self.memory: list[int] = []  # and which of kind (6)
        self.bytes: Terms = {}  # before the backward
        self.grown: Terms = {}  # behind it
        floor = sum(min(g.cost[o] for o in a) for g, a in zip(problem.groups, self.alive))
        # Seconds are tiny numbers; solvers work to absolute tolerances.
        self.scale = 1e4 / floor if floor > 0 else 1.0
        tiers = len(problem.usable[0]) if problem.usable else 0
        self.busy: list[Terms] = [{} for _ in range(PHASES)]
        self.late: list[list[Terms]] = [[{} for _ in range(tiers)] for _ in range(PHASES)]
        self.block: list[list[Terms]] = [[{} for _ in range(tiers)] for _ in range(PHASES)]
        self.x: list[dict[int, int | None]] = []
        self._groups()
        for flow in problem.flows:
            self._flow(flow)
        self._keeps()
        self._memory()
        self._exposed()

    def _groups(self) -> None:
        for group, alive in zip(self.problem.groups, self.alive):
            if len(alive) == 1:
                self.x.append({alive[0]: None})
            else:
                self.x.append({o: self.column(binary=True) for o in alive})
                self.row({v: 1.0 for v in self.x[-1].values() if v is not None}, 1.0, 1.0)
            overlaps = self.problem.usable is not None and group.phase != AFTER
            into = self.busy[group.phase] if overlaps else self.objective
            for o, v in self.x[-1].items():
                column = CONST if v is None else v
                _add(into, column, group.cost[o] * self.scale)
                _add(self.objective, column, group.tie[o] * self.scale)
                _add(self.bytes, column, group.memory[o])
                _add(self.grown, column, group.memory[o] + (group.grown[o] if group.grown else 0.0))

    def _parts(self, group: int, label: Sequence[int]) -> dict[int, Terms]:
        """label -> sum of the options that have it."""
        out: dict[int, Terms] = {}
        for o, v in self.x[group].items():
            _add(out.setdefault(label[o], {}), CONST if v is None else v, 1.0)
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
        for (r, q, share), expressions in used.items():
            self._shared(flow, r, q, share, expressions)

    def _transport(self, flow: Flow, rows: dict[int, Terms], cols: dict[int, Terms]) -> dict[tuple[int, int], Terms]:
        if len(rows) == 1:
            return {(next(iter(rows)), q): terms for q, terms in cols.items()}
        if len(cols) == 1:
            return {(r, next(iter(cols))): terms for r, terms in rows.items()}
        w = {(r, q): self.column() for r in rows for q in cols if flow.cost[r][q] < INF}
        for r, terms in rows.items():
            self.row(_minus({w[r, q]: 1.0 for q in cols if (r, q) in w}, terms), 0.0, 0.0)
        for q, terms in cols.items():
            self.row(_minus({w[r, q]: 1.0 for r in rows if (r, q) in w}, terms), 0.0, 0.0)
        return {key: {v: 1.0} for key, v in w.items()}

    def _either(self, expressions: list[Terms]) -> Terms:
        """At least each of the expressions."""
        if len(expressions) == 1:
            return expressions[0]
        if any(e.get(CONST) == 1.0 and len(e) == 1 for e in expressions):
            return {CONST: 1.0}
        column = self.column()
        for e in expressions:
            self.row(_minus({column: 1.0}, e), 0.0, INF)
        return {column: 1.0}

    def _shared(self, flow: Flow, r: int, q: int, share: int, expressions: list[Terms]) -> None:
        seconds = flow.cost[r][q] * flow.count * self.scale
        tiers = flow.tiers[r][q] if flow.tiers and self.problem.usable is not None else ()
        links = [h * flow.count * self.scale for h in tiers]
        phase = flow.when(r, share)
        into = self.objective if self.problem.usable is None else self.busy[phase]
        for v, coefficient in self._either(expressions).items():
            _add(into, v, coefficient * (seconds - (sum(links) if flow.late else 0.0)))
            for t, h in enumerate(links):
                if h:
                    _add((self.late if flow.late else self.block)[phase][t], v, coefficient * h)
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
                if keep.size[q]:
                    for v, coefficient in self._either(expressions).items():
                        _add(self.bytes, v, coefficient * keep.size[q])

    def _memory(self) -> None:
        limit = self.problem.limit
        if limit is None:
            return
        # A limit far below what has to be held must not blow up the row.
        moments = [self.bytes, self.grown] if any(g.grown for g in self.problem.groups) else [self.bytes]
        unit = max(limit, max((abs(c) for m in moments for c in m.values()), default=0.0) / 1e3, 1.0) / 1e3
        over = None
        if self.problem.penalty is not None:
            over = self.column(high=INF)
            _add(self.objective, over, self.problem.penalty * unit * self.scale)
        for moment in moments:
            terms = {v: c / unit for v, c in moment.items()}
            _add(terms, CONST, (self.problem.fixed - limit) / unit)
            if over is not None:
                terms[over] = -1.0
            self.memory.append(len(self.rows))
            self.row(terms, -INF, 0.0)

    def _exposed(self) -> None:
        for p, part in enumerate(self.problem.usable or ()):
            rows = []
            for t, u in enumerate(part):
                if self.late[p][t]:
                    cover = _minus(self.busy[p], self.block[p][t])
                    rows.append(_minus(self.late[p][t], {v: u * c for v, c in cover.items()}))
            if rows:
                seen = self.column(high=INF)
                _add(self.objective, seen, 1.0)
                for terms in rows:
                    terms[seen] = -1.0
                    self.exposed.append(len(self.rows))
                    self.row(terms, -INF, 0.0)
            for v, c in self.busy[p].items():
                _add(self.objective, v, c)

    def value(self, choice: Sequence[int]) -> float:
        """The objective of a choice, ties and penalty included; infinite where the limit is hard and not met."""
        seconds = overlapped(self.problem, choice) + sum(g.tie[o] for g, o in zip(self.problem.groups, choice))
        if self.problem.limit is not None and seconds < INF:
            over = evaluate(self.problem, choice)[1] - self.problem.limit
            if over > 1 + 1e-6 * self.problem.limit:
                seconds += INF if self.problem.penalty is None else self.problem.penalty * over
        return seconds * self.scale

    def point(self, choice: Sequence[int]) -> tuple[list[int], list[float]]:
        """The binary columns, and their values under a choice."""
        columns, values = [], []
        for x, instead, o in zip(self.x, self.instead, choice):
            o = instead.get(o, o)
            for option, v in x.items():
                if v is not None:
                    columns.append(v)
                    values.append(float(option == o))
        return columns, values


@dataclass
class Answer:
    """What a solver said: `values` of every column (None: no answer)."""

    status: str  # "optimal", "feasible", "infeasible", or what else the solver calls it
    values: Sequence[float] | Any | None  # an array of numpy, where the solver gives one
    gap: float


def read(model: Model, values: Sequence[float] | Any) -> list[int]:
    """The option that every group takes in a solver's answer.

    Raises:
        SolverError: a group takes none.
    """
    choice = []
    for g, x in enumerate(model.x):
        shares = {o: 1.0 if v is None else values[v] for o, v in x.items()}
        best = max(shares, key=lambda o: shares[o])
        if shares[best] < 0.5:
            raise SolverError(f"the solver chose no option for decision {g} (best value {shares[best]:.3f})")
        choice.append(best)
    return choice


def _add(terms: Terms, column: int, coefficient: float) -> None:
    terms[column] = terms.get(column, 0.0) + coefficient


def _minus(left: Terms, right: Terms) -> Terms:
    out = dict(left)
    for v, c in right.items():
        out[v] = out.get(v, 0.0) - c
    return out
