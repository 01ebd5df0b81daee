"""Every error autopar raises at its users.

Each message says request, fact, remedy, with both numbers where two disagree.
"""

from __future__ import annotations

from collections.abc import Mapping


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


class InfeasibleError(AutoparError, RuntimeError):
    """No plan fits the memory limit; says by how many bytes and of what kind.

    Attributes:
        least: bytes per device that the smallest plan found needs. memory: by kind. Of an error that another rank has
            met, only the words are known: 0, {}.
    """

    def __init__(self, message: str, least: float = 0.0, memory: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.least, self.memory = least, dict(memory or {})


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
