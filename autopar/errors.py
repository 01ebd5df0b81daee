"""Every error autopar raises at its users.

Each message says request, fact, remedy, with both numbers where two disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class AutoparError(Exception):
    """Base class: `except autopar.AutoparError` catches everything we raise on purpose."""


class MeshError(AutoparError, ValueError):
    """A mesh that cannot be parsed, or that does not match the processes that exist."""


class ProfileError(AutoparError, ValueError):
    """A measured device that is missing, damaged, or of another machine."""


class SpecError(AutoparError, ValueError):
    """A placement that does not fit the tensor or the mesh."""


class RuleError(AutoparError, ValueError):
    """A sharding rule that cannot be parsed or does not fit the op it is given for."""


class CaptureError(AutoparError, RuntimeError):
    """The model could not be captured; names the user's source line and what to change."""


class ConstraintError(AutoparError, ValueError):
    """A user constraint that names nothing or cannot be met."""


@dataclass(frozen=True)
class Fix:
    """A change of what was asked with which a plan fits, found by solving again.

    Attributes:
        what: the change in words. changes: the arguments of `autopar.plan` that it changes, by name.
        step_s: simulated seconds of a step of the plan. peak_bytes: of its fullest rank.
        command: what to type to `autopar plan`; "" where it has no word for it. share: the part of the samples that
            were asked for that a step takes: with half of them, a step of half the time is no quicker.
    """

    what: str
    changes: Mapping[str, Any] = field(compare=False)
    step_s: float
    peak_bytes: float
    command: str = ""
    share: float = 1.0

    @property
    def whole_s(self) -> float:
        """Seconds for as many samples as were asked for: what fixes are compared by."""
        return self.step_s / self.share


class InfeasibleError(AutoparError, RuntimeError):
    """No plan fits the memory limit; says by how many bytes and of what kind, and what would fit.

    Attributes:
        least: bytes per device that the smallest plan found needs. memory: by kind. Of an error that another rank has
            met, only the words are known: 0, {}.
        limit: bytes that there are. step_s: simulated seconds of the smallest plan; 0 where none was simulated.
        stages: of a pipeline, `memory` of every stage while its rank holds most. mesh: what the smallest plan is on.
        fixes: what would fit, the quickest first. untried: kinds of changes for which there was no time.
        way: of a pipeline, what its smallest plan is: micro-batches, pieces with which the stages begin and the end,
            and the option of each.
    """

    def __init__(
        self, message: str, least: float = 0.0, memory: Mapping[str, float] | None = None, *, limit: float = 0.0,
        step_s: float = 0.0, stages: Sequence[Mapping[str, float]] = (), mesh: str = "", fixes: Sequence[Fix] = (),
        untried: Sequence[str] = (), way: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.least, self.memory = least, dict(memory or {})
        self.limit, self.step_s, self.mesh = limit, step_s, mesh
        self.stages = tuple(dict(stage) for stage in stages)
        self.fixes, self.untried, self.way = tuple(fixes), tuple(untried), way

    @property
    def short(self) -> float:
        """Bytes by which the smallest plan misses the limit."""
        return max(0.0, self.least - self.limit)


class SolverError(AutoparError, RuntimeError):
    """The solver ended without a usable answer."""


class PlanError(AutoparError, ValueError):
    """A plan that is damaged, of another schema, or made for another model or mesh."""


class ScheduleError(AutoparError, ValueError):
    """A pipeline schedule that cannot be read, or that could not run; names rank, step and action."""


class PipelineError(AutoparError, RuntimeError):
    """A pipeline that stopped: a rank failed or did not answer; names rank, step, action and what was waited for."""


class PassError(AutoparError, RuntimeError):
    """A graph that breaks the invariant of its level after a pass."""


class BatchError(AutoparError, ValueError):
    """A batch the compiled module cannot take, or that differs between ranks."""


class RankMismatchError(AutoparError, RuntimeError):
    """The ranks disagree on the model, the plan or the mesh."""


class RuntimeUseError(AutoparError, RuntimeError):
    """A compiled module is used in a way it does not support."""
