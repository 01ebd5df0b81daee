"""Find the rule of an op nobody gave one for, by running it.

The op runs on small random operands, positive ones and, if it takes them, ones of both signs. For every way to split
one dim of some operands (all of one size) it runs on two halves: contiguous ones, and ones drawn at random from the
dim. If every result is the concatenation of the two along some dim, or their sum, maximum or minimum, the split is a
factor. Factors must hold alone and in pairs. An operand in which sums pass through is a linear group. What is not
proven stays whole, so a rule found here may be timid, but is only as bold as what ran.

The rule is found for the shapes of the call if they are small, else for smaller shapes of the same pattern; once per
op, pattern of shapes, dtypes and other arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from autopar.costmodel.rules_call import Call, Operand, floats, names, numbered, text, whole
from autopar.rule import Rule

Tensors = list[torch.Tensor]

#: Elements of all operands up to which the shapes of the call are used as they are.
SMALL = 1 << 15
#: Splits that are tried at most.
LIMIT = 400
#: Errors by which an op refuses operands: it was not made for them, so the split is not one.
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, NotImplementedError)

_SIZES = (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26)
_MERGES: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
_found: dict[Any, Rule | None] = {}


class Split(NamedTuple):
    """A way to cut: per operand the dim cut or None; per result ("cat", dim), or ("sum" | "max" | "min", -1)."""

    ins: tuple[int | None, ...]
    outs: tuple[tuple[str, int], ...]

    @property
    def reduce(self) -> str | None:
        """The reduction that some result needs."""
        return next((kind for kind, _ in self.outs if kind != "cat"), None)

    @property
    def coverage(self) -> int:
        """How many dims it cuts."""
        return sum(d is not None for d in self.ins) + sum(kind == "cat" for kind, _ in self.outs)


def discover(node: fx.Node) -> Rule | None:
    """The rule of an op node, found by experiment; None if the op cannot be run here or nothing could be proven."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or _trusting(target):
        return None
    call = Call(node)
    args = numbered(node)
    key = (target, _pattern(call), tuple(call.dtypes), repr(_plain(args)))
    if key not in _found:
        _found[key] = _discover(call, args)
    return _found[key]


def _trusting(target: Any) -> bool:
    """Internal ATen kernels trust their callers: on operands that do not fit they write over memory."""
    space, _, name = target._schema.name.partition("::")
    return space == "aten" and (name.startswith("_") or name.endswith("_backward"))


def _discover(call: Call, args: tuple[Any, ...]) -> Rule | None:
    for shapes in _candidate_shapes(call):
        for bound in sorted({_index_bound(call, shapes), 2}, reverse=True):
            try:
                trial = _Trial(call, args, shapes, bound)
            except REFUSALS:
                continue
            if trial.trustworthy:
                return trial.rule()
    return None


def _index_bound(call: Call, shapes: Sequence[tuple[int, ...]]) -> int:
    """Integers below it are indices into any dim of the floating operands; 0 and 1 alone would tell little."""
    if all(floats(d) or d == torch.bool for d in call.dtypes):
        return 2
    return max(2, min((n for s, d in zip(shapes, call.dtypes) if floats(d) for n in s if n > 1), default=2))


def _candidate_shapes(call: Call) -> Iterator[list[tuple[int, ...]]]:
    """The call's own shapes if small, then shapes with the same pattern of equal sizes and ones."""
    if sum(math.prod(s) for s in call.ins) <= SMALL:
        yield call.ins
    different = sorted({n for s in call.ins for n in s if n != 1})
    if len(different) <= len(_SIZES) and 0 not in different:
        small = dict(zip(different, _SIZES)) | {1: 1}
        yield [tuple(small[n] for n in s) for s in call.ins]


class _Trial:
    """The op on one set of shapes."""

    def __init__(self, call: Call, args: tuple[Any, ...], shapes: Sequence[tuple[int, ...]], bound: int) -> None:
        self.call, self.args, self.bound = call, args, bound
        self.rng = torch.Generator().manual_seed(1)
        self.wide = all(d != torch.float32 for d in call.dtypes) or self._accepts_double(shapes)
        self.operands = [self._values(s, d) for s, d in zip(shapes, call.dtypes)]
        self.second = [self._values(s, d) for s, d in zip(shapes, call.dtypes)]
        self.results, self.again = self.run(self.operands), self.run(self.operands)
        self.results2 = self.run(self.second)
        self.samples = [(self.operands, self.results), (self.second, self.results2), *self._signed()]

    @property
    def trustworthy(self) -> bool:
        """Deterministic, of as many results as the call, and not constant (a constant would pass every test)."""
        if len(self.results) != len(self.call.outs) or any(
            shape is None or r.dim() != len(shape) for r, shape in zip(self.results, self.call.outs)
        ):
            return False
        repeats = all(self.same(a, b) for a, b in zip(self.results, self.again))
        varied = all(r.shape == s.shape and not torch.equal(r, s) for r, s in zip(self.results, self.results2))
        return repeats and varied

    def run(self, operands: Tensors) -> Tensors:
        """The results of the op, all of them tensors.

        Raises:
            Whatever the op does.
        """

        def visit(arg: Any) -> Any:
            if isinstance(arg, Operand):
                return operands[arg.number].clone()
            return [visit(a) for a in arg] if isinstance(arg, list) else arg

        args, kwargs = self.args
        found = self.call.target(*[visit(a) for a in args], **{k: visit(v) for k, v in kwargs.items()})
        out = list(found) if isinstance(found, (tuple, list)) else [found]
        if not all(isinstance(r, torch.Tensor) for r in out):
            raise TypeError("a result is not a tensor")
        return out

    def _values(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return torch.rand(shape, generator=self.rng) < 0.5
        if not floats(dtype):
            return torch.randint(0, self.bound, shape, generator=self.rng).to(dtype)
        if dtype.is_complex:
            return torch.complex(self._values(shape, torch.float64), self._values(shape, torch.float64)).to(dtype)
        x = torch.rand(shape, generator=self.rng, dtype=torch.float64) + 0.1
        return x if self.wide and dtype == torch.float32 else x.to(dtype)

    def _signed(self) -> list[tuple[Tensors, Tensors]]:
        """Samples with floats of both signs, and big ones: what holds of small positive numbers need not hold."""
        found: list[tuple[Tensors, Tensors]] = []
        for scale in (4, 64) if any(floats(x.dtype) for x in self.operands) else ():
            signed = [self._noise(x) * scale if floats(x.dtype) else x for x in self.second]
            try:
                found.append((signed, self.run(signed)))
            except REFUSALS:
                continue
        return found

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return self._values(tuple(like.shape), like.dtype) * 3 - 1.7

    def _accepts_double(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        self.wide = True
        try:
            self.run([self._values(s, d) for s, d in zip(shapes, self.call.dtypes)])
        except REFUSALS:
            return False
        return True

    def same(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Equal; floats within rounding of their dtype, NaN and infinities in the same places."""
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not floats(a.dtype):
            return torch.equal(a, b)
        tolerance = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4}.get(a.dtype, 1e-2)
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

    # ---- factors --------------------------------------------------------------------------------------------

    def rule(self) -> Rule | None:
        """The rule of all that holds, or None if nothing does."""
        chosen: list[Split] = []
        for split in sorted(self._splits(), key=lambda s: -s.coverage):
            if all(_disjoint(split, other) and self._together(split, other) for other in chosen):
                chosen.append(split)
        kinds = [s.reduce for s in chosen if s.reduce]
        reduce = kinds[0] if kinds else "sum"
        chosen = [s for s in chosen if s.reduce in (None, reduce)]
        linear = self._linear()
        if not chosen and not linear:
            return None
        ins = [whole(x.shape, f"x{i}_") for i, x in enumerate(self.operands)]
        outs = [whole(x.shape, f"y{i}_") for i, x in enumerate(self.results)]
        for split, letter in zip(sorted(chosen, key=_order), names(len(chosen))):
            name = letter + ("+" if split.reduce else "")
            for dims, d in zip(ins, split.ins):
                if d is not None:
                    dims[d] = name
            for dims, (kind, d) in zip(outs, split.outs):
                if kind == "cat":
                    dims[d] = name
        return Rule.parse(text(ins, outs, linear, reduce=reduce))

    def _splits(self) -> list[Split]:
        found: list[Split] = []
        sizes = sorted({n for x in self.operands for n in x.shape if n > 1 and n % 2 == 0})
        tried = 0
        for size in sizes:
            options = [[None, *(d for d, n in enumerate(x.shape) if n == size)] for x in self.operands]
            rows = sorted(itertools.product(*options), key=lambda row: sum(d is None for d in row))
            for row in rows:
                if all(d is None for d in row):
                    continue
                tried += 1
                if tried > LIMIT:
                    return found
                split = self._test(row, size)
                if split is not None:
                    found.append(split)
        return found

    def _test(self, row: tuple[int | None, ...], size: int) -> Split | None:
        order = torch.randperm(size, generator=self.rng)
        halves = [torch.arange(size).chunk(2), order.chunk(2)]
        agreed: set[Split] | None = None
        for operands, results in self.samples:
            for pair in halves:
                ways = self._recombine(operands, results, row, pair)
                agreed = ways if agreed is None else agreed & ways
                if not agreed:
                    return None
        assert agreed is not None
        return max(agreed, key=lambda s: s.coverage)

    def _recombine(self, operands: Tensors, results: Tensors, row: Any, pair: Sequence[torch.Tensor]) -> set[Split]:
        """Ways in which the results of two pieces make up the whole ones."""
        try:
            parts = [self.run([x if d is None else x.index_select(d, i) for x, d in zip(operands, row)]) for i in pair]
        except REFUSALS:
            return set()
        every: list[list[tuple[str, int]]] = []
        for want, first, second in zip(results, *parts):
            ways: list[tuple[str, int]] = []
            for d in range(want.dim()):
                if first.dim() == want.dim() and first.shape[d] + second.shape[d] == want.shape[d] == len(pair[0]) * 2:
                    if self.same(first, want.index_select(d, pair[0])) and self.same(
                        second, want.index_select(d, pair[1])
                    ):
                        ways.append(("cat", d))
            if first.shape == second.shape == want.shape and want.dtype != torch.bool:
                # Of pieces that are equal anything is the maximum.
                merges = ("sum",) if want.is_complex() or self.same(first, second) else ("sum", "max", "min")
                ways += [(k, -1) for k in merges if self.same(_MERGES[k](first, second), want)]
            every.append(ways)
        return {
            Split(tuple(row), outs)
            for outs in itertools.product(*every)
            if len({kind for kind, _ in outs if kind != "cat"}) <= 1
        }

    def _together(self, a: Split, b: Split) -> bool:
        """Whether both cuts at once give a quarter of the whole (each result cut twice, or reduced)."""
        if a.reduce and b.reduce and a.reduce != b.reduce:
            return False
        grid: list[list[Tensors]] = []
        try:
            for i in range(2):
                grid.append([])
                for j in range(2):
                    cut = [_chunk(_chunk(x, da, i), db, j) for x, da, db in zip(self.operands, a.ins, b.ins)]
                    grid[i].append(self.run(cut))
        except REFUSALS:
            return False
        for r, want in enumerate(self.results):
            rows = [_merge([cell[r] for cell in line], b.outs[r]) for line in grid]
            if not self.same(_merge(rows, a.outs[r]), want):
                return False
        return True

    # ---- linear groups --------------------------------------------------------------------------------------

    def _linear(self) -> list[tuple[int, ...]]:
        floating = [i for i, x in enumerate(self.operands) if floats(x.dtype)]
        if not all(floats(r.dtype) for r in self.results) or not floating:
            return []
        groups: list[tuple[int, ...]] = [(i,) for i in floating]
        if 1 < len(floating) <= 4:
            groups += [g for n in range(2, len(floating) + 1) for g in itertools.combinations(floating, n)]
        held: list[tuple[int, ...]] = []
        for group in groups:
            if self._additive(group):
                held.append(group)
        return held

    def _additive(self, group: tuple[int, ...]) -> bool:
        exact = all(self.operands[i].dtype in (torch.float64, torch.complex128) for i in group)
        for scale in (1, 64) if exact else (1,):  # big ones too: a bound (clamp) may lie far out
            noise = {i: self._noise(self.operands[i]) * scale for i in group}
            try:
                first = self.run([x - noise[i] if i in noise else x for i, x in enumerate(self.operands)])
                second = self.run([noise.get(i, x) for i, x in enumerate(self.operands)])
            except REFUSALS:
                return False
            if not all(self.same(a + b, want) for a, b, want in zip(first, second, self.results)):
                return False
        return True


def _disjoint(a: Split, b: Split) -> bool:
    pairs = [*zip(a.ins, b.ins), *((x[1], y[1]) for x, y in zip(a.outs, b.outs) if x[0] == y[0] == "cat")]
    return all(x is None or x != y for x, y in pairs)


def _order(split: Split) -> tuple[Any, ...]:
    return tuple(99 if d is None else d for d in split.ins)


def _chunk(x: torch.Tensor, dim: int | None, index: int) -> torch.Tensor:
    return x if dim is None else x.chunk(2, dim)[index]


def _merge(pieces: Tensors, way: tuple[str, int]) -> torch.Tensor:
    kind, dim = way
    if kind == "cat":
        return torch.cat(pieces, dim)
    return _MERGES[kind](*pieces)


def _pattern(call: Call) -> tuple[Any, ...]:
    """Which sizes are equal, and which are one."""
    seen: dict[int, int] = {}
    return tuple(tuple(0 if n == 1 else seen.setdefault(n, len(seen) + 1) for n in s) for s in call.ins)


def _plain(value: Any) -> Any:
    if isinstance(value, Operand):
        return f"#{value.number}"
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


__all__ = ["discover"]
