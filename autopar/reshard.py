"""How a tensor travels from one spec to another: a short list of collectives, decided once, on the layout's digits.

The lowering emits these steps and the cost model prices them; neither decides anything of its own.

A dim under several cuts is a mixed-radix number (`autopar.spec.dim_layout`). A cut is named here by its *effective
outer*: the product of all digits outside it. In that form closing a cut (gather) never disturbs the others, and opening
one is legal if its digit boundary meets theirs. Greedy: an axis changes in one step where that is legal, cheap steps
(slices) first and growing ones (gathers) last; if no axis can move, one is closed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from autopar.errors import SpecError
from autopar.spec import Shape, Spec, format_placements, layout


class Cut(NamedTuple):
    """A split on one axis in effective form; `dim` -1: whole (`reduce` empty) or partial."""

    dim: int
    outer: int
    reduce: str = ""


class Step(NamedTuple):
    """One collective (or local slice) on one axis.

    kind: local_chunk, reduce_scatter, all_to_all, all_reduce, all_gather.
    split / split_outer: local dim that is divided, seen as (split_outer, rest): the rest is divided. -1: none.
    cat / cat_outer: local dim along which pieces are joined, likewise.
    before / after: local shapes on either side.
    """

    kind: str
    axis: int
    split: int
    split_outer: int
    cat: int
    cat_outer: int
    reduce: str
    before: Shape
    after: Shape

    @property
    def stacks(self) -> bool:
        """Whether what is sent is first brought together: pieces of a dim that is not the outermost lie apart."""
        if self.kind not in ("reduce_scatter", "all_to_all"):
            return False
        return self.split_outer > 1 or any(n > 1 for n in self.before[: max(0, self.split)])

    @property
    def unpacks(self) -> bool:
        """Whether what arrives has to be put in its place, likewise."""
        if self.kind not in ("all_gather", "all_to_all"):
            return False
        return self.cat_outer > 1 or any(n > 1 for n in self.after[: max(0, self.cat)])


#: On gloo, an all_reduce of which all ranks together have at most so many bytes is an exchange of copies: one round.
SMALL_EXCHANGE = 4096
WHOLE = Cut(-1, 1)
_ORDER = ("local_chunk", "reduce_scatter", "all_to_all", "all_reduce", "all_gather")
#: Elements of the local tensor from which an all-reduce over several axes is done in levels. Below, what counts is the
#: number of calls, and small all-reduces are merged later (`passes/bucket.py`).
LEVELS_FROM = 1 << 16
#: Places in _ORDER of the steps that shrink what the next one has to carry, or can.
_REDUCING = (_ORDER.index("reduce_scatter"), _ORDER.index("all_reduce"))


def effective(shape: Sequence[int], spec: Spec, sizes: Sequence[int]) -> tuple[Cut, ...]:
    """The cut of every axis in effective form. Raises SpecError if `spec` does not fit `shape`."""
    digits = layout(shape, spec, sizes)
    cuts = [Cut(-1, 1, p.reduce) if p.kind == "P" and n > 1 else WHOLE for p, n in zip(spec, sizes)]
    for dim, row in enumerate(digits):
        outside = 1
        for digit in row:
            if digit.axis is not None:
                cuts[digit.axis] = Cut(dim, outside)
            outside *= digit.size
    return tuple(cuts)


@lru_cache(maxsize=65536)
def steps(shape: Shape, src: Spec, dst: Spec, sizes: tuple[int, ...]) -> tuple[Step, ...]:
    """Collectives that take a tensor of global `shape` from `src` to `dst`, in order; empty if nothing moves.

    Raises:
        SpecError: a spec does not fit, or `dst` asks for a partial value that `src` does not have.
    """
    now, want = list(effective(shape, src, sizes)), effective(shape, dst, sizes)
    for axis, (a, b) in enumerate(zip(now, want)):
        if b.reduce and a != b:
            raise SpecError(
                f"cannot go from {format_placements(src)} to {format_placements(dst)}: "
                f"axis {axis} would have to make a partial value"
            )
    out: list[Step] = []
    while True:
        moves = []
        for axis, (a, b) in enumerate(zip(now, want)):
            if a != b and _fits(shape, [*now[:axis], b, *now[axis + 1 :]], sizes):
                moves.append((_ORDER.index(_kind(a, b)), axis, b))
        if not moves:
            stuck = [axis for axis, (a, b) in enumerate(zip(now, want)) if a != b and a != WHOLE]
            if not stuck:
                break
            # Innermost first: closing it leaves the others as they are.
            axis = max(stuck, key=lambda i: (now[i].outer, i))
            moves = [(0, axis, WHOLE)]
        rank, axis, target = min(moves, key=lambda m: (m[0], -m[1] if m[0] in _REDUCING else m[1]))
        if rank == _ORDER.index("all_reduce") and sum(m[0] == rank for m in moves) > 1:
            target = _piece(shape, now, axis, sizes) or target
        out += _move(shape, now, axis, target, sizes)
        now[axis] = target
    return tuple(out)


def _piece(shape: Shape, now: Sequence[Cut], axis: int, sizes: Sequence[int]) -> Cut | None:
    """Where the sum over `axis` may lie split while the other axes reduce; None: nowhere, or it does not pay."""
    if math.prod(_local(shape, now, sizes)) < LEVELS_FROM:
        return None
    for dim in range(len(shape)):
        inside = max((c.outer * sizes[a] for a, c in enumerate(now) if c.dim == dim), default=1)
        cut = Cut(dim, inside)
        if _fits(shape, [*now[:axis], cut, *now[axis + 1 :]], sizes):
            return cut
    return None


def _kind(a: Cut, b: Cut) -> str:
    if a == WHOLE:
        return "local_chunk"
    if a.reduce:
        return "reduce_scatter" if b.dim >= 0 else "all_reduce"
    if b.dim < 0:
        return "all_gather"
    return "all_to_all" if a.dim != b.dim else "all_gather"


def _fits(shape: Sequence[int], cuts: Sequence[Cut], sizes: Sequence[int]) -> bool:
    for dim, n in enumerate(shape):
        done = 1
        for cut, parts in sorted((c, sizes[a]) for a, c in enumerate(cuts) if c.dim == dim):
            if cut.outer % done:
                return False
            done = cut.outer * parts
        if n % done:
            return False
    return True


def _local(shape: Sequence[int], cuts: Sequence[Cut], sizes: Sequence[int]) -> Shape:
    out = list(shape)
    for axis, cut in enumerate(cuts):
        if cut.dim >= 0:
            out[cut.dim] //= sizes[axis]
    return tuple(out)


def _inside(cuts: Sequence[Cut], axis: int, cut: Cut, sizes: Sequence[int]) -> int:
    """The cut's outer in local elements: without the digits that other axes hold outside it."""
    held = [sizes[a] for a, c in enumerate(cuts) if a != axis and c.dim == cut.dim and c.outer < cut.outer]
    return cut.outer // math.prod(held)


def _move(shape: Shape, now: Sequence[Cut], axis: int, target: Cut, sizes: Sequence[int]) -> list[Step]:
    source = now[axis]
    kind = _kind(source, target)
    if kind == "all_gather" and target.dim >= 0:  # same dim, other stride: there is no single collective for it
        closed = [*now[:axis], WHOLE, *now[axis + 1 :]]
        return _move(shape, now, axis, WHOLE, sizes) + _move(shape, closed, axis, target, sizes)
    after = [*now[:axis], target, *now[axis + 1 :]]
    split = _inside(after, axis, target, sizes) if target.dim >= 0 else 1
    cat = _inside(now, axis, source, sizes) if source.dim >= 0 else 1
    shapes = _local(shape, now, sizes), _local(shape, after, sizes)
    return [Step(kind, axis, target.dim, split, source.dim, cat, source.reduce, *shapes)]
