"""In which precision a program computes, and in which partial sums of its gradients are added up: plain data.

Parameters stay as the user has them (fp32 masters, which optimizers step); `autopar/casting.py` makes a program that
computes in another precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from autopar.errors import ConstraintError

#: What computes as the model is; those with a dtype; what leaves it to the planner.
FULL, AUTO = "fp32", "auto"
LOW: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (FULL, *LOW, AUTO)
#: Where the cast of a parameter's gradient to the parameter's own precision carries the name of the dtype in which
#: partial sums of that gradient are added up (`meta` of the node).
ADDED = "added"
#: Precisions whose gradients need a scaled loss: their smallest number is 6e-8.
SCALED = frozenset({"fp16"})


@dataclass(frozen=True)
class Precision:
    """compute: one of PRECISIONS. reduce: FULL, or the same as `compute` ("bf16" for AUTO, which does not try fp16)."""

    compute: str = FULL
    reduce: str = FULL

    def __post_init__(self) -> None:
        if self.compute not in PRECISIONS:
            raise ConstraintError(f"precision={self.compute!r} does not exist; choose one of {', '.join(PRECISIONS)}")
        known = (FULL,) if self.compute == FULL else (FULL, "bf16") if self.compute == AUTO else (FULL, self.compute)
        if self.reduce not in known:
            raise ConstraintError(
                f"reduce_dtype={self.reduce!r} with precision={self.compute!r}: gradients are added up in "
                f"{' or '.join(known)}; choose that, or leave reduce_dtype out"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """The low precision; None if everything computes as the model is."""
        return LOW.get(self.compute)

    def record(self) -> dict[str, str]:
        """As programs and plans hold it: nothing where everything computes as the model is."""
        return {} if self.dtype is None else {"compute": self.compute, "reduce": self.reduce}

    @classmethod
    def of(cls, record: Mapping[str, str]) -> Precision:
        """Inverse of `record`.

        Raises:
            ConstraintError: it names a precision that does not exist, or leaves it open.
        """
        found = cls(**record)
        if found.compute == AUTO:
            raise ConstraintError(
                f"precision={AUTO!r} is none that a program computes in; name one of {', '.join((FULL, *LOW))}, "
                "or plan again"
            )
        return found

    def __str__(self) -> str:
        """For messages and reports."""
        if self.compute == FULL:
            return "as the model is"
        return f"{self.compute}, gradients added up in {self.reduce}"


#: Everything computes as the model is.
AS_IS = Precision()

__all__ = ["AS_IS", "AUTO", "FULL", "LOW", "PRECISIONS", "ADDED", "SCALED", "Precision"]
