"""Which precision is quicker: the plans of several, compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autopar.errors import InfeasibleError
from autopar.plan import Plan
from autopar.precision import FULL, LOW, Precision

#: What "auto" chooses from, in the order of preference where steps are equally long.
_TRIED = ("bf16", FULL)


def quickest(asked: Precision, plan_in: Callable[[Precision], Plan]) -> Plan:
    """Of the plans in each precision that "auto" stands for, the one of the shortest simulated step that fits.

    `solver["precisions"]` holds the seconds of each, None where none fits; a note says so too.

    Raises:
        InfeasibleError: none fits; that of the precision that needs least.
    """
    found: dict[str, Plan] = {}
    failed: list[InfeasibleError] = []
    for compute in _TRIED:
        # What partial sums are added up in is said for the low precision.
        reduce = asked.reduce if compute in LOW else FULL
        try:
            found[compute] = plan_in(Precision(compute, reduce))
        except InfeasibleError as error:
            failed.append(error)
    if not found:
        raise min(failed, key=lambda error: error.least)
    best = min(found, key=lambda compute: found[compute].predicted["step_s"])
    seconds = {compute: found[compute].predicted["step_s"] if compute in found else None for compute in _TRIED}
    told = ", ".join(f"{c} does not fit" if s is None else f"{c} {1e3 * s:.4g} ms a step" for c, s in seconds.items())
    plan = found[best]
    return replace(plan, solver={**plan.solver, "precisions": seconds}, notes=(*plan.notes, f"precision: {told}"))


__all__ = ["quickest"]
