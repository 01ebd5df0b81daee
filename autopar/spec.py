"""Where the pieces of a tensor lie: one placement per mesh axis.

A placement is R (every rank holds all), P (every rank holds a partial sum/max/min), or S(dim, outer):
dimension `dim`, of N elements, is seen as (outer, N / outer) and the second part is split; with
`outer` = 1 that is the plain contiguous shard, otherwise a strided one. The strided shard is what makes
views total: fused QKV, grouped heads and flattened batch x sequence need no special case.

Several axes may split one dim. Sorted by (outer, axis index) their cuts nest: axes with the same outer
are nested with the lower axis outermost, and each later outer must be a multiple of all that was cut so far.

Text form by dim, for mesh axes dp and tp: `[dp, -, tp@3] +cp` reads: dim 0 split on dp, dim 2 split on tp
inside blocks of the first 3, partial sum on cp (`max:cp` for another reduction).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from autopar.errors import SpecError


class Placement(NamedTuple):
    """What one mesh axis does to one tensor. Build with `R`, `S(dim, outer)`, `P(reduce)`."""

    kind: str
    dim: int = -1
    outer: int = 1
    reduce: str = ""

    def __str__(self) -> str:
        if self.kind == "R":
            return "R"
        if self.kind == "P":
            return f"P({self.reduce})"
        return f"S({self.dim})" if self.outer == 1 else f"S({self.dim}@{self.outer})"


R = Placement("R")
Spec = tuple[Placement, ...]
Shape = tuple[int, ...]


def S(dim: int, outer: int = 1) -> Placement:
    """Split of dim `dim` seen as (outer, rest)."""
    return Placement("S", dim, outer)


def P(reduce: str = "sum") -> Placement:
    """Partial result still to be reduced by `reduce` (sum, max, min)."""
    return Placement("P", reduce=reduce)


class Radix(NamedTuple):
    """One digit of a dim seen as a mixed-radix number; `axis` is the mesh axis holding it, or None if it is whole."""

    size: int
    axis: int | None


@lru_cache(maxsize=65536)
def dim_layout(size: int, cuts: tuple[tuple[int, int, int], ...]) -> tuple[Radix, ...]:
    """Digits, outermost first, of a dim of `size` elements under `cuts` = ((outer, axis, parts), ...).

    Raises:
        SpecError: a cut does not divide what is left, or two cuts cross.
    """
    digits: list[Radix] = []
    cut_so_far, group = 1, 0
    for outer, axis, parts in sorted(cuts):
        if outer > cut_so_far or (outer == cut_so_far and outer != group):
            if outer % cut_so_far:
                raise SpecError(f"cuts cross: outer {outer} is not a multiple of {cut_so_far} already cut")
            if outer != cut_so_far:
                digits.append(Radix(outer // cut_so_far, None))
            cut_so_far = outer
        elif outer != group:
            raise SpecError(f"cuts cross: outer {outer} lies inside {cut_so_far} already cut")
        group = outer
        digits.append(Radix(parts, axis))
        cut_so_far *= parts
    if size % cut_so_far or size == 0:
        raise SpecError(f"a dim of {size} cannot be split into {cut_so_far} equal pieces")
    if size != cut_so_far:
        digits.append(Radix(size // cut_so_far, None))
    return tuple(digits)


def layout(shape: Sequence[int], spec: Spec, sizes: Sequence[int]) -> tuple[tuple[Radix, ...], ...]:
    """`dim_layout` of every dim. Two specs of equal layout and equal partials are the same placement.

    Axes of size 1 cut nothing. Raises SpecError as `dim_layout` does, or if a placement names a dim that is not there.
    """
    cuts: list[list[tuple[int, int, int]]] = [[] for _ in shape]
    for axis, place in enumerate(spec):
        if place.kind == "S":
            if not 0 <= place.dim < len(shape):
                raise SpecError(f"placement {place} names dim {place.dim} of a tensor with {len(shape)} dims")
            if sizes[axis] > 1:
                cuts[place.dim].append((place.outer, axis, sizes[axis]))
    return tuple(dim_layout(int(n), tuple(c)) if c else ((Radix(int(n), None),)) for n, c in zip(shape, cuts))


def is_valid(shape: Sequence[int], spec: Spec, sizes: Sequence[int]) -> bool:
    """Whether `spec` divides `shape` evenly on a mesh of axis `sizes`."""
    try:
        layout(shape, spec, sizes)
    except SpecError:
        return False
    return True


def local_shape(shape: Sequence[int], spec: Spec, sizes: Sequence[int]) -> Shape:
    """Shape of one rank's piece."""
    out = list(shape)
    for axis, place in enumerate(spec):
        if place.kind == "S":
            if out[place.dim] % sizes[axis]:
                raise SpecError(f"dim {place.dim} of shape {tuple(shape)} cannot be split by {format_placements(spec)}")
            out[place.dim] //= sizes[axis]
    return tuple(out)


def same(shape: Sequence[int], a: Spec, b: Spec, sizes: Sequence[int]) -> bool:
    """Whether `a` and `b` place every element of the tensor alike."""
    if a == b:
        return True
    partial_a = [p if p.kind == "P" and n > 1 else None for p, n in zip(a, sizes)]
    partial_b = [p if p.kind == "P" and n > 1 else None for p, n in zip(b, sizes)]
    return partial_a == partial_b and layout(shape, a, sizes) == layout(shape, b, sizes)


def shard(tensor: torch.Tensor, spec: Spec, sizes: Sequence[int], coord: Sequence[int]) -> torch.Tensor:
    """The piece of `tensor` that the rank at `coord` holds (contiguous copy).

    A partial placement gives the whole value to coordinate 0 and the neutral element to the others (sum), or the whole
    value to everyone (max, min).
    """
    digits = layout(tensor.shape, spec, sizes)
    view = tensor.reshape([r.size for dim in digits for r in dim])
    index = tuple(coord[r.axis] if r.axis is not None else slice(None) for dim in digits for r in dim)
    out = view[index].reshape(local_shape(tensor.shape, spec, sizes)).clone(memory_format=torch.contiguous_format)
    for axis, place in enumerate(spec):
        if place.kind == "P" and place.reduce == "sum" and coord[axis] != 0:
            out = torch.zeros_like(out)
    return out


def unshard(pieces: Sequence[torch.Tensor], shape: Sequence[int], spec: Spec, sizes: Sequence[int]) -> torch.Tensor:
    """Inverse of `shard`: the global tensor from every rank's piece (row-major by rank); partials are reduced.

    Pieces that should be equal copies are not compared here: see `replicas_agree`.
    """
    stack = torch.stack([p.contiguous() for p in pieces]).reshape(list(sizes) + list(pieces[0].shape))
    for axis in reversed(range(len(sizes))):
        place = spec[axis]
        if place.kind == "P":
            reduce: Any = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}[place.reduce]
            stack = reduce(stack, dim=axis, keepdim=True)
        elif place.kind == "R":
            stack = stack.narrow(axis, 0, 1)
    digits = layout(shape, spec, sizes)
    used = {r.axis for dim in digits for r in dim if r.axis is not None}
    free_sizes = [r.size for dim in digits for r in dim if r.axis is None]
    stack = stack.reshape([sizes[a] if a in used else 1 for a in range(len(sizes))] + free_sizes)
    order, free = [], len(sizes)
    for dim in digits:
        for r in dim:
            if r.axis is None:
                order.append(free)
                free += 1
            else:
                order.append(r.axis)
    order += [a for a in range(len(sizes)) if a not in used]
    return stack.permute(order).reshape(tuple(shape))


def format_placements(spec: Spec) -> str:
    """One placement per axis, in axis order: `S(0) P(sum)`."""
    return " ".join(str(p) for p in spec)


def format_spec(spec: Spec, ndim: int, names: Sequence[str]) -> str:
    """Text form by dim, `[dp, -, tp@3] +cp`; inverse of `parse_spec`."""
    dims = []
    for dim in range(ndim):
        cuts = [(p.outer, a) for a, p in enumerate(spec) if p.kind == "S" and p.dim == dim]
        dims.append(" ".join(names[a] + (f"@{o}" if o != 1 else "") for o, a in sorted(cuts)) or "-")
    partial = [("+" if p.reduce == "sum" else p.reduce + ":") + names[a] for a, p in enumerate(spec) if p.kind == "P"]
    return " ".join([f"[{', '.join(dims)}]", *partial])


def parse_spec(text: str, names: Sequence[str]) -> tuple[Spec, int]:
    """Spec and number of dims from its text form.

    Raises:
        SpecError: the text is malformed, names an unknown axis, or uses an axis twice.
    """
    match = re.fullmatch(r"\[([^\]]*)\]((?: \S+)*)", text.strip())
    if not match:
        raise SpecError(f"cannot read placement {text!r}; write e.g. [dp, -, tp] +cp")
    found: dict[str, Placement] = {}

    def put(name: str, place: Placement) -> None:
        if name not in names:
            raise SpecError(f"placement {text!r} names axis {name!r}; the mesh has {', '.join(names)}")
        if name in found:
            raise SpecError(f"placement {text!r} uses axis {name!r} twice")
        found[name] = place

    dims = [d.strip() for d in match[1].split(",")] if match[1].strip() else []
    if not all(dims):
        raise SpecError(f"placement {text!r} leaves a dim empty; write - for a whole one")
    for i, dim in enumerate(dims):
        for cut in [] if dim == "-" else dim.split():
            name, at, outer = cut.partition("@")
            if at and not re.fullmatch(r"[1-9]\d*", outer):
                raise SpecError(f"placement {text!r}: the stride in {cut!r} must be a whole number above zero")
            put(name, S(i, int(outer) if at else 1))
    for word in match[2].split():
        if word.startswith("+"):
            put(word[1:], P())
        else:
            reduce, _, name = word.partition(":")
            if reduce not in ("max", "min"):
                raise SpecError(f"placement {text!r}: cannot read {word!r}; write +AXIS, max:AXIS or min:AXIS")
            put(name, P(reduce))
    return tuple(found.get(n, R) for n in names), len(dims)
