"""Branch and bound on a relaxation that is whole but for a few decisions, every node from the basis of the one before.

Without rows (8) and (6) the program of `costmodel.ilp` has a whole relaxation nearly always; where it has not, a few
decisions are torn between two ways, and all that hangs on them is torn with them. One of them fixed, the dual simplex
method repairs the rest in a few steps (Land and Doig, 1960; depth first for a first answer, then best bound first). A
general solver cuts, probes and presolves before it branches, which takes a hundred times as long here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import highspy
except ImportError:  # CBC, which comes with PuLP, is used instead, and the plan says so
    highspy = None  # type: ignore[assignment]

#: Nodes at most: what is not found in so many is told as a gap, or left to the general solver.
NODES = 60
_WHOLE = 1e-6


@dataclass
class Branched:
    """The best whole point that was found (None: none), its value, and one that no whole point is below."""

    values: Any | None
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """Relative; infinite if nothing was found."""
        return max(0.0, 1 - self.bound / self.value) if 0 < self.value < np.inf else np.inf


@dataclass
class _Node:
    """Columns and what they are fixed to, and what the relaxation can reach at best."""

    bound: float
    fixed: dict[int, float]


def branch(solver: Any, whole: Any, gap: float, end: float, nodes: int = NODES) -> Branched:
    """Whole values for the 0-1 columns `whole` of the relaxation that `solver` holds, within `gap` of the best.

    It stops earlier after so many nodes, or at `end` (of `time.perf_counter`). The solver has its own bounds of columns
    afterwards, and nothing else of before. No bound of `Branched` comes from what it held: the root is solved again,
    which takes no step if it was.
    """
    best = Branched(None, np.inf, np.inf)
    # HiGHS counts its limit over all runs.
    solver.setOptionValue("time_limit", solver.getRunTime() + max(0.0, end - time.perf_counter()))
    open_nodes = [_Node(-np.inf, {})]
    now: dict[int, float] = {}
    for _ in range(nodes):
        least = min(open_nodes, key=lambda n: n.bound, default=None)
        if least is None or least.bound >= best.value * (1 - gap) or time.perf_counter() > end:
            break
        node = open_nodes[-1] if best.values is None else least
        now = _fix(solver, now, node.fixed)
        solver.run()
        status = solver.getModelStatus()
        if status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kInfeasible):
            break  # the time is up: the node stays open
        open_nodes.remove(node)
        if status == highspy.HighsModelStatus.kInfeasible:
            continue
        value = float(solver.getInfo().objective_function_value)
        values = np.array(solver.getSolution().col_value)
        if value >= best.value:
            continue
        if is_whole(values, whole):
            best.values, best.value = values, value
            continue
        torn = int(whole[int(np.argmax(np.where(_torn(values, whole), values[whole], -1.0)))])
        open_nodes += [_Node(value, {**node.fixed, torn: 0.0}), _Node(value, {**node.fixed, torn: 1.0})]
    _fix(solver, now, {})
    best.bound = min([best.value, *(n.bound for n in open_nodes)])
    return best


def _fix(solver: Any, now: dict[int, float], to: dict[int, float]) -> dict[int, float]:
    """Change the bounds from one set of fixed columns to another."""
    for column in now.keys() - to.keys():
        solver.changeColBounds(column, 0.0, 1.0)
    for column, at in to.items():
        if now.get(column) != at:
            solver.changeColBounds(column, at, at)
    return to


def is_whole(values: Any, whole: Any) -> bool:
    """Whether the columns `whole` are whole numbers."""
    return not np.any(_torn(values, whole))


def _torn(values: Any, whole: Any) -> Any:
    return np.abs(values[whole] - np.round(values[whole])) >= _WHOLE


__all__ = ["NODES", "Branched", "branch", "highspy", "is_whole"]
