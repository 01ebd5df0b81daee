"""The truth machine: is a sharding rule right? Split, run the local ops of every rank, recombine, compare.

For one call of an op with real operands (float64 where the op allows) it tries every choice that its rule offers on
an axis of 2, strided splits included, and pairs of choices on a 2 x 2 mesh. Operands are cut (or, for partial sums,
written as random sums), the local graph of `passes.localise` runs for all ranks in lock-step on contiguous and on
strided pieces, the results are put together and compared with the op on the whole operands at 1e-9. Copies must
agree on all ranks.

`check` finds rules that are too bold, `shy` those that are too timid: it offers the machine what the rule forbids
and tells what would have been right. A choice that the shapes do not divide is reported as not tested, never as
passed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopar.costmodel.rules import rule_for
from autopar.errors import AutoparError
from autopar.graph import operands, results
from autopar.mesh import Mesh
from autopar.passes import lockstep
from autopar.passes.localise import LocalCall, emit
from autopar.rule import WHOLE, BoundRule, Choice
from autopar.spec import Spec, is_valid, layout, local_shape, shard, unshard

LINE = Mesh(("x",), (2,))
SQUARE = Mesh(("x", "y"), (2, 2))
TOLERANCE = 1e-9
#: Kernels that do not check their operands: offered what does not fit, they write over memory.
_TRUSTING = ("_pool", "_weight_norm")


@dataclass
class Case:
    """One call on real tensors. Results in `skip_results` have no defined values (empty): only shapes are compared."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    skip_results: tuple[int, ...] = ()
    tolerance: float = TOLERANCE

    def __str__(self) -> str:
        def show(a: Any) -> str:
            if isinstance(a, torch.Tensor):
                return f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
            if isinstance(a, (list, tuple)):
                return "[" + ", ".join(map(show, a)) + "]"
            return repr(a)

        words = [show(a) for a in self.args] + [f"{k}={show(v)}" for k, v in self.kwargs.items()]
        return f"{self.target}({', '.join(words)})"


@dataclass
class Verdict:
    """What the machine found about one case."""

    tested: int = 0
    wrong: list[str] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.wrong


class Prepared:
    """A case as a global node, with its operands and the results of the whole op."""

    def __init__(self, case: Case) -> None:
        self.case = case
        graph = fx.Graph()
        self.operands: list[torch.Tensor] = []

        def visit(arg: Any) -> Any:
            if isinstance(arg, torch.Tensor):
                node = graph.placeholder(f"x{len(self.operands)}")
                node.meta["val"] = torch.empty(arg.shape, dtype=arg.dtype, device="meta")
                self.operands.append(arg)
                return node
            if isinstance(arg, (list, tuple)):
                return [visit(a) for a in arg]
            return arg

        args = tuple(visit(a) for a in case.args)
        kwargs = {k: visit(v) for k, v in case.kwargs.items()}
        self.node = graph.call_function(case.target, args, kwargs)
        found = case.target(*case.args, **case.kwargs)
        many = isinstance(found, (tuple, list))

        def meta(v: Any) -> Any:
            return torch.empty(v.shape, dtype=v.dtype, device="meta") if isinstance(v, torch.Tensor) else v

        self.node.meta["val"] = tuple(meta(v) for v in found) if many else meta(found)
        self.node.meta.update(phase="fwd", module="", address="fwd:/op#0")
        self.results: list[Any] = list(found) if many else [found]
        assert len(operands(self.node)) == len(self.operands)
        assert len(results(self.node)) == len(self.results)

    def specs(self, bound: BoundRule, mesh: Mesh, choices: Sequence[Choice]) -> tuple[list[Spec], list[Spec]] | None:
        """Specs of operands and results under the choices; None where shapes do not divide or cuts cross."""
        if not bound.fits(choices, mesh.sizes):
            return None
        columns = [bound.placements(c) for c in choices]
        ins = [tuple(col[0][i] for col in columns) for i in range(len(self.operands))]
        outs = [tuple(col[1][i] for col in columns) for i in range(len(self.results))]
        tensors = [*zip(self.operands, ins), *zip(self.results, outs)]
        if not all(is_valid(t.shape, s, mesh.sizes) for t, s in tensors if isinstance(t, torch.Tensor)):
            return None
        return ins, outs

    def _local(
        self, bound: BoundRule, mesh: Mesh, choices: Sequence[Choice], specs: tuple[list[Spec], list[Spec]]
    ) -> tuple[fx.Graph, list[fx.Node], LocalCall]:
        graph, local = fx.Graph(), []
        for i, (x, spec) in enumerate(zip(self.operands, specs[0])):
            node = graph.placeholder(f"x{i}")
            node.meta["val"] = torch.empty(local_shape(x.shape, spec, mesh.sizes), dtype=x.dtype, device="meta")
            node.meta.update(phase="fwd", module="")
            local.append(node)
        return graph, local, LocalCall(bound, tuple(choices), tuple(specs[0]), tuple(specs[1]), mesh)

    def shapes_agree(self, bound: BoundRule, mesh: Mesh, choices: Sequence[Choice]) -> bool:
        """Whether the local op gives results of the shapes its nodes say, judged on the meta device."""
        specs = self.specs(bound, mesh, choices)
        assert specs is not None
        graph, local, call = self._local(bound, mesh, choices, specs)
        emitted = emit(graph, self.node, local, call)
        graph.output(tuple(emitted))
        found = fx.GraphModule({}, graph)(*(n.meta["val"] for n in local))
        return all(
            n is None or (r.shape == n.meta["val"].shape and r.dtype == n.meta["val"].dtype)
            for n, r in zip(emitted, found)
        )

    def run(self, bound: BoundRule, mesh: Mesh, choices: Sequence[Choice], strided: bool, seed: int) -> str | None:
        """What is wrong under the choices, or None. The choices must be valid."""
        specs = self.specs(bound, mesh, choices)
        assert specs is not None
        ins, outs = specs
        rng = torch.Generator().manual_seed(seed)
        graph, local, call = self._local(bound, mesh, choices, specs)
        pieces = [decompose(x, spec, mesh, strided, rng) for x, spec in zip(self.operands, ins)]
        try:
            emitted = emit(graph, self.node, local, call)
            if len(emitted) != len(self.results):
                return f"{len(emitted)} local results for {len(self.results)}"
            graph.output(tuple(emitted))
            module = fx.GraphModule({}, graph)
            found = lockstep.run(module, mesh, [[p[r] for p in pieces] for r in range(mesh.num_devices)])
        except (AutoparError, RuntimeError, IndexError, ValueError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        for i, whole in enumerate(self.results):
            if isinstance(whole, torch.Tensor) and i not in self.case.skip_results:
                fault = compare([row[i] for row in found], whole, emitted[i], outs[i], mesh, self.case.tolerance)
                if fault:
                    return f"result {i}: {fault}"
        return None


def compare(
    pieces: Sequence[torch.Tensor], whole: torch.Tensor, node: fx.Node | None, spec: Spec, mesh: Mesh, tolerance: float
) -> str | None:
    """What differs between the pieces of a result and the whole, or None."""
    assert node is not None
    want = node.meta["val"]
    for piece in pieces:
        if piece.shape != want.shape or piece.dtype != want.dtype:
            return f"local result is {piece.dtype}{list(piece.shape)}, its node says {want.dtype}{list(want.shape)}"
    for axis, place in enumerate(spec):
        if place.kind == "R":
            for group in mesh.groups(axis):
                for r in group[1:]:
                    if not close(pieces[group[0]], pieces[r], tolerance):
                        return f"copies differ along mesh axis {mesh.names[axis]}"
    layout(whole.shape, spec, mesh.sizes)
    pieces = [p.to(torch.float64) if p.dtype == torch.bool else p for p in pieces]
    again = unshard(pieces, whole.shape, spec, mesh.sizes).to(whole.dtype)
    if not close(again, whole, tolerance):
        worst = (again.to(torch.complex128) - whole.to(torch.complex128)).abs().max().item()
        return f"differs from the whole op by {worst:.3g}"
    return None


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Equal for integers and booleans; else within the tolerance, NaN and infinities in the same places."""
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def decompose(x: torch.Tensor, spec: Spec, mesh: Mesh, strided: bool, rng: torch.Generator) -> list[torch.Tensor]:
    """The pieces of every rank; along partial axes, terms of a random sum."""
    plain = tuple(p if p.kind == "S" else type(p)("R") for p in spec)
    partial = [a for a, p in enumerate(spec) if p.kind == "P"]
    terms: dict[tuple[int, ...], torch.Tensor] = {}
    keys = list(itertools.product(*(range(mesh.sizes[a]) for a in partial)))
    rest = x.clone()
    for key in keys[1:]:
        noise = (torch.randint(4, 24, x.shape, generator=rng) / 4 + 1 / 8).to(x.dtype)
        terms[key] = noise
        rest = rest - noise
    terms[keys[0]] = rest
    out = []
    for r in range(mesh.num_devices):
        coord = mesh.coordinates(r)
        piece = shard(terms[tuple(coord[a] for a in partial)], plain, mesh.sizes, coord)
        out.append(spread(piece) if strided else piece)
    return out


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps in memory, and dims in reverse order there."""
    if x.dim() == 0:
        return x
    room = torch.empty([*reversed(x.shape), 2], dtype=x.dtype)[..., 0].permute(*reversed(range(x.dim())))
    return room.copy_(x)


def choices(bound: BoundRule, parts: int = 2) -> Iterator[Choice]:
    """Every choice a rule offers: factors with every stride that divides, and linear groups."""
    for factor in bound.splittable():
        size = bound.sizes[factor]
        outers = [o for o in range(1, size) if size % o == 0 and (size // o) % parts == 0]
        for outer in outers or [1]:
            yield Choice(factor, outer)
    for group in range(len(bound.rule.linear)):
        yield Choice(through=group)


def check(case: Case, *, bound: BoundRule | None = None, pairs: int = 12, seed: int = 0) -> Verdict:
    """Try every choice of the rule, and up to `pairs` pairs of them."""
    prepared = Prepared(case)
    bound = bound if bound is not None else rule_for(prepared.node)
    verdict = Verdict()
    singles = list(choices(bound))
    done: set[str] = set()
    for strided in (False, True):
        for choice in singles:
            if prepared.specs(bound, LINE, [choice]) is None:
                continue
            _record(verdict, prepared, bound, LINE, (choice,), strided, seed)
            done.add(choice.factor or str(choice))
    missing = {c.factor or str(c) for c in singles} - done
    verdict.untested += [f"{case}: {m} of rule '{bound.rule}' does not divide by 2" for m in sorted(missing)]
    mixed = [p for p in itertools.product(singles, repeat=2) if prepared.specs(bound, SQUARE, p) is not None]
    if len(mixed) > pairs:
        mixed = random.Random(seed).sample(mixed, pairs)
    for i, pair in enumerate(mixed):
        _record(verdict, prepared, bound, SQUARE, pair, bool(i % 2), seed)
    return verdict


def _record(
    verdict: Verdict,
    prepared: Prepared,
    bound: BoundRule,
    mesh: Mesh,
    row: tuple[Choice, ...],
    strided: bool,
    seed: int,
) -> None:
    verdict.tested += 1
    fault = prepared.run(bound, mesh, row, strided, seed)
    if fault:
        how = " on strided pieces" if strided else ""
        text = " ".join(map(str, row))
        verdict.wrong.append(f"{prepared.case}: choice {text} of rule '{bound.rule}'{how}: {fault}")


def shy(case: Case, *, bound: BoundRule | None = None, seed: int = 0) -> list[str]:
    """What the rule forbids and would have been right: `FACTOR` (as it is), `FACTOR+`, or `linear N ...`."""
    prepared = Prepared(case)
    bound = bound if bound is not None else rule_for(prepared.node)
    rule = bound.rule
    found = []
    for factor in rule.factors:
        # Out-of-range indices crash some kernels: the table calls every indexed dim v, and pooling indexes space.
        indexed = factor.startswith("v") or any(s in str(case.target) for s in _TRUSTING)
        if factor in rule.never and bound.sizes[factor] > 1 and not indexed:
            free = replace(rule, never=rule.never - {factor})
            for text, candidate in ((factor, free), (f"{factor}+", replace(free, plus=rule.plus | {factor}))):
                if _right(prepared, replace(bound, rule=candidate), Choice(factor), seed):
                    found.append(text)
                    break
    floating = [i for i, x in enumerate(prepared.operands) if x.is_floating_point() or x.is_complex()]
    groups = [(i,) for i in floating] + ([tuple(floating)] if len(floating) > 1 else [])
    whole = [r for r in prepared.results if isinstance(r, torch.Tensor)]
    if all(r.is_floating_point() or r.is_complex() for r in whole):
        for group in groups:
            if group not in rule.linear:
                candidate = replace(rule, linear=(*rule.linear, group))
                if _right(prepared, replace(bound, rule=candidate), Choice(through=len(rule.linear)), seed):
                    found.append("linear " + " ".join(map(str, group)))
    return found


def _right(prepared: Prepared, bound: BoundRule, choice: Choice, seed: int) -> bool:
    if prepared.specs(bound, LINE, [choice]) is None:
        return False
    return all(prepared.run(bound, LINE, [choice], False, s) is None for s in (seed, seed + 1))


__all__ = ["LINE", "SQUARE", "WHOLE", "Case", "Prepared", "Verdict", "check", "choices", "shy"]
