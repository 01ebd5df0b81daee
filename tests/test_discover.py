"""Rules found by running an op that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from autopar.costmodel import rules
from autopar.costmodel.discover import discover
from tests.truth import Case, Prepared, check

_library = torch.library.Library("discovertest", "DEF")
_runs: dict[str, int] = {}


def define(name: str, schema: str, function: Callable[..., Any]) -> Any:
    """A custom op that counts its runs."""
    _library.define(f"{name}{schema}")

    def counted(*args: Any) -> Any:
        _runs[name] = _runs.get(name, 0) + 1
        return function(*args)

    _library.impl(name, counted, "CompositeExplicitAutograd")
    return getattr(torch.ops.discovertest, name).default


swiglu = define("swiglu", "(Tensor x, Tensor y) -> Tensor", lambda x, y: x * torch.sigmoid(x) * y)
project = define("project", "(Tensor x, Tensor w) -> Tensor", lambda x, w: torch.einsum("bsi,io->bso", x, w))
biased = define("biased", "(Tensor x, Tensor w, Tensor b) -> Tensor", lambda x, w, b: x @ w + b)
mean_last = define("mean_last", "(Tensor x) -> Tensor", lambda x: x.mean(-1))
top = define("top", "(Tensor x) -> Tensor", lambda x: x.amax(-1))
running = define("running", "(Tensor x) -> Tensor", lambda x: x.cumsum(1))
both = define("both", "(Tensor x) -> (Tensor, Tensor)", lambda x: (x * 2, x.sum(0)))
lookup = define("lookup", "(Tensor w, Tensor i) -> Tensor", lambda w, i: w[i])
noisy = define("noisy", "(Tensor x) -> Tensor", lambda x: x + torch.rand_like(x))
constant = define("constant", "(Tensor x) -> Tensor", lambda x: torch.ones_like(x))
pairs = define("pairs", "(Tensor x) -> Tensor", lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))
fussy = define("fussy", "(Tensor x, int n) -> Tensor", lambda x, n: x.reshape(n, -1).cumsum(1).reshape(x.shape))


def num(*shape: int) -> torch.Tensor:
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(3)).double()


FOUND = {
    "swiglu": (Case(swiglu, (num(4, 8, 6), num(4, 8, 6))), "a b c, a b c -> a b c ; linear 1"),
    "broadcast": (Case(swiglu, (num(4, 8), num(4, 1))), "a b, a x1_1^ -> a b ; linear 1"),
    "project": (Case(project, (num(4, 6, 8), num(8, 10))), "a b c+, c+ d -> a b d ; linear 0 | 1"),
    "biased": (Case(biased, (num(4, 8), num(8, 6), num(6))), "a x0_1^, x1_0^ b, b -> a b ; linear 0 2 | 1 2"),
    "mean_last": (Case(mean_last, (num(4, 8),)), "a x0_1^ -> a ; linear 0"),
    "top": (Case(top, (num(4, 8),)), "a b+ -> a ; reduce max"),
    "running": (Case(running, (num(4, 8, 6),)), "a x0_1^ b -> a x0_1^ b ; linear 0"),
    "both": (Case(both, (num(4, 8),)), "a+ b -> a+ b, b ; linear 0"),
    "lookup": (Case(lookup, (num(8, 6), torch.arange(4) % 2)), "x0_0^ a, b -> b a ; linear 0"),
    "pairs": (Case(pairs, (num(4, 8),)), "a x0_1^ -> a y0_1^ ; linear 0"),
    "large": (Case(swiglu, (num(64, 32, 64), num(64, 32, 64))), "a b c, a b c -> a b c ; linear 1"),
}


@pytest.mark.parametrize("name", FOUND)
def test_finds_the_rule(name: str) -> None:
    case, want = FOUND[name]
    found = discover(Prepared(case).node)
    assert found is not None
    got = str(found)
    assert got.replace("y0_1^", "x0_1^") == want.replace("y0_1^", "x0_1^")


@pytest.mark.parametrize("name", [n for n in FOUND if n != "large"])
def test_what_it_finds_is_true(name: str) -> None:
    verdict = check(FOUND[name][0])
    assert verdict.tested and not verdict.wrong, verdict.wrong[:3]


def test_says_so_and_runs_once() -> None:
    node = Prepared(FOUND["project"][0]).node
    assert rules.rule_source(node) == "discovered"
    before = _runs["project"]
    other = Prepared(Case(project, (num(6, 4, 10), num(10, 12)))).node  # same pattern of sizes
    assert rules.rule_source(other) == "discovered"
    assert _runs["project"] == before + 1  # only the call that made the node
    assert any(
        line.startswith("discovertest::project: no rule in the table; found by running it") and "a b c+, c+ d" in line
        for line in rules.report()
    )
    # A plan tells of its own ops only, whatever else this process has met.
    assert len(rules.report([node, other])) == 1 and rules.report([]) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(noisy, (num(4, 8),)),
        Case(constant, (num(4, 8),)),
        Case(fussy, (num(4, 8), 1)),
    ],
    ids=["random", "constant", "sizes among the arguments"],
)
def test_replicates_what_it_cannot_prove(case: Case) -> None:
    node = Prepared(case).node
    name = rules.qualified_name(node.target)
    assert rules.rule_source(node) in ("replicated", "discovered")
    bound = rules.rule_for(node)
    assert not bound.splittable()
    if rules.rule_source(node) == "replicated":
        assert (
            f"{name}: no rule, so every device computes all of it; to split it add e.g. "
            + (f'autopar.register_rule("{name}", "a^ b^ -> a^ b^")  # without ^ where a dim may be split')
            in rules.report()
        )


def test_ops_that_cannot_run_here_are_replicated() -> None:
    _library.define("nowhere(Tensor x) -> Tensor")
    _library.impl("nowhere", torch.empty_like, "Meta")
    node = Prepared(Case(swiglu, (num(4, 8), num(4, 8)))).node
    node.target = torch.ops.discovertest.nowhere.default
    node.args = node.args[:1]
    assert discover(node) is None
    assert rules.rule_source(node) == "replicated"
