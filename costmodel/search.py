"""Which axes: plan on every sensible shape of a number of devices, and keep the best.

Ranks are numbered row by row, so the last axis lies closest together: with 8 devices a node, `dp=8,tp=8` has the fast
links on `tp`. Two shapes are the same problem if their axes have the same sizes and links in some order. An axis cut in
two can do all that it did whole (each half does the same), so finer shapes are not worse, but each costs a solve:
all shapes of one and two axes are planned, then the finer ones of the best few.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.costmodel import planner
from autopar.costmodel.devices import Device, machine
from autopar.errors import ConstraintError, InfeasibleError, MeshError
from autopar.graph import Program
from autopar.mesh import Mesh
from autopar.plan import Plan

#: Names of the axes of a found mesh, outermost first, by their number. They are names only.
NAMES = (("dp",), ("dp", "tp"), ("dp", "sp", "tp"))
#: So many of the best shapes of two axes are cut finer.
FINER = 2

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Tried:
    """A shape and what came of it: a plan, or the reason why there is none."""

    mesh: Mesh
    plan: Plan | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For `Plan.solver`."""
        if self.plan is None:
            return {"mesh": str(self.mesh), "reason": self.reason}
        found = self.plan.predicted
        return {"mesh": str(self.mesh), "step_s": found["step_s"], "peak_bytes": found["peak_bytes"]}


def search(
    program: Program,
    count: int,
    *,
    device: str | Device = "cpu",
    axes: int = 3,
    constraints: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Tried]:
    """Plan `program` on the shapes of `count` devices; the best first, those without a plan last.

    Args:
        device: preset name or Device; it says how many devices a node has, and the links in and between nodes.
        axes: at most so many axes, 1 to 3.
        constraints: as `planner.plan`; shapes without an axis that one names are left out.
        progress: called with what is being done and the part done, 0 to 1.
        options: what else `planner.plan` takes.

    Raises:
        InfeasibleError, ConstraintError: no shape has a plan; with the reason of the one that came closest.
        MeshError: `count` is not a positive number, or the device is unknown.
    """
    if count < 1:
        raise MeshError(f"{count} devices; a mesh has at least one")
    tell = progress or (lambda what, done: None)
    named = frozenset(_named(constraints, axes))
    tried: dict[tuple[Any, ...], Tried] = {}
    errors: list[InfeasibleError | ConstraintError] = []

    def attempt(shapes: list[Mesh], begin: float, end: float) -> None:
        for i, mesh in enumerate(shapes):
            key = _kind(mesh, device, named)
            if key in tried:
                continue
            tell(f"planning on {mesh}", begin + (end - begin) * i / len(shapes))
            try:
                found = planner.plan(program, mesh, device=device, constraints=constraints, **options)
                tried[key] = Tried(mesh, found)
            except (InfeasibleError, ConstraintError) as error:
                errors.append(error)
                tried[key] = Tried(mesh, None, str(error))

    coarse = [m for m in _shapes(count, min(axes, 2)) if _has_axes(m, constraints, axes)]
    attempt(coarse, 0.0, 0.6)
    if axes > 2:
        best = [t.mesh for t in ranked(tried.values()) if t.plan is not None and len(t.mesh.sizes) == 2]
        finer = [m for m in _shapes(count, 3) if any(_refines(m, b) for b in best[:FINER])]
        if not best:  # nothing coarse fits or may be used
            finer = [m for m in _shapes(count, 3) if len(m.sizes) == 3]
        attempt([m for m in finer if _has_axes(m, constraints, axes)], 0.6, 1.0)
    found = ranked(tried.values())
    if not found or found[0].plan is None:
        if errors:
            raise min(errors, key=lambda e: e.least if isinstance(e, InfeasibleError) else math.inf)
        raise ConstraintError(f"no shape of {count} devices has all axes that the constraints {constraints} name")
    tell("done", 1.0)
    return found


def choices(count: int) -> int:
    """Number of shapes of `count` devices, orders counted."""
    return len(_shapes(count, len(NAMES)))


def best_plan(found: list[Tried]) -> Plan:
    """The best plan of a search; its `solver["meshes"]` lists what else was tried, best first."""
    plan = found[0].plan
    assert plan is not None
    return replace(plan, solver={**plan.solver, "meshes": [t.as_dict() for t in found]})


def ranked(tried: Iterable[Tried]) -> list[Tried]:
    """The quickest first, those without a plan last."""
    return sorted(tried, key=lambda t: (t.plan is None, t.plan and t.plan.predicted["step_s"], len(t.mesh.sizes)))


def _factors(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Ordered ways to write `count` as a product of `parts` numbers above 1."""
    if parts == 1:
        if count > 1:
            yield (count,)
        return
    for first in range(2, count // 2 + 1):
        if count % first == 0:
            for rest in _factors(count // first, parts - 1):
                yield (first, *rest)


def _shapes(count: int, axes: int) -> list[Mesh]:
    if count == 1:
        return [Mesh(NAMES[0], (1,))]
    return [Mesh(NAMES[n - 1], sizes) for n in range(1, axes + 1) for sizes in _factors(count, n)]


def _kind(mesh: Mesh, device: str | Device, named: frozenset[str]) -> tuple[Any, ...]:
    """Equal for shapes that are the same problem; an axis that a constraint names is not like the others."""
    links = machine(device, mesh).links
    rows = zip(mesh.names, mesh.sizes, links)
    return tuple(sorted((name if name in named else "", n, link.bandwidth, link.latency) for name, n, link in rows))


def _refines(fine: Mesh, coarse: Mesh) -> bool:
    """Whether `fine` is `coarse` with one axis cut in two where it lies."""
    a, b, c = fine.sizes if len(fine.sizes) == 3 else (0, 0, 0)
    return coarse.sizes in ((a * b, c), (a, b * c))


def _named(constraints: Mapping[str, str] | None, axes: int) -> set[str]:
    """The axes that constraints name, by a strategy or inside a placement such as "shard(0, tp)"."""
    words = {word for text in (constraints or {}).items() for part in text for word in re.findall(r"\w+", part)}
    return words & set(NAMES[axes - 1])


def _has_axes(mesh: Mesh, constraints: Mapping[str, str] | None, axes: int) -> bool:
    """Whether the mesh has every axis that a constraint names."""
    return _named(constraints, axes) <= set(mesh.names)
