"""Local batches beside tensors that are no batch: `shared=` names them, and what looks like one is said."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from harness import Ranks
from torch import nn

import autopar
from autopar import tree


class Mixing(nn.Module):
    """A batch `x` and a square matrix `m` for all of it; masks that may be left out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x, m, masks=None):
        y = self.linear(x) * m.sum(dim=0)
        if masks is not None:
            y = y * masks["keep"] + masks["all"].sum()
        return y.pow(2).mean()


def mixing():
    torch.manual_seed(1)
    return Mixing()


def numbers(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


X, M = numbers(8, 4), numbers(4, 4, seed=8)
MASKS = {"keep": numbers(8, 4, seed=9), "all": numbers(4, seed=10)}


def mine(tensor):
    return tensor[4 * dist.get_rank() :][:4]


def local(shared=("m",), mesh="dp=2", example=(X[:4], M), **options):
    return autopar.compile(mixing(), mesh, example=example, batch="local", shared=shared, **options)


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as group:
        yield group


def with_shared(options):
    """Losses and gradients of a shared matrix, ours and the model's."""
    out = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pm, plain = local(**options), mixing()
        assert pm.plan.inputs["m"] == (autopar.R,) and pm.plan.inputs["x"] == (autopar.S(0),)
        for module, x in ((pm, mine(X)), (plain, X)):
            loss = module(x, M)
            loss.backward()
            grad = module.get_parameter("linear.weight").grad
            out.append((loss.item(), (grad.full_tensor() if module is pm else grad).tolist()))
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"shared": "m"}, {"shared": ["[lm]*"]}, {"constraints": {"dp": "zero3"}}, {"constraints": {"dp": "ddp"}}],
)
def test_a_shared_tensor_is_whole_on_every_rank(ranks, options):
    for (loss, grad), (plain_loss, plain_grad) in ranks.run(with_shared, options):
        assert loss == pytest.approx(plain_loss, rel=1e-12)
        torch.testing.assert_close(torch.tensor(grad), torch.tensor(plain_grad), rtol=1e-9, atol=1e-12)


def nested_and_left_out():
    """A tensor inside a container, which another call leaves out."""
    pm = local(["m", "masks.all"], example={"x": X[:4], "m": M, "masks": {"keep": X[:4], "all": MASKS["all"]}})
    ours = [pm(mine(X), M, {"keep": mine(MASKS["keep"]), "all": MASKS["all"]}).item(), pm(x=mine(X), m=M).item()]
    return ours, [mixing()(X, M, MASKS).item(), mixing()(X, M).item()]


@pytest.mark.filterwarnings("ignore:autopar has captured")
def test_shared_inside_a_container(ranks):
    for ours, plain in ranks.run(nested_and_left_out):
        assert ours == pytest.approx(plain, rel=1e-12)


def other_matrix():
    local()(mine(X), M + dist.get_rank())


def test_a_shared_tensor_must_be_equal(ranks):
    for text in ranks.failures(other_matrix):
        assert text.startswith("BatchError: argument 'm' (float64 (4, 4)) holds other values on rank 1 than on rank 0")
        assert "shared= names it" in text


def other_names():
    local("m" if dist.get_rank() else "x")


def test_ranks_must_share_the_same(ranks):
    for text in ranks.failures(other_names):
        assert text.startswith("RankMismatchError: the ranks disagree on the options of compile") and "shared x" in text


def everything_shared():
    local(("x", "m"))


def test_something_must_be_a_batch(ranks):
    for text in ranks.failures(everything_shared):
        assert text.startswith("BatchError: ") and "not named in shared=" in text


@pytest.mark.parametrize("batch", ["local", "global"])
def test_a_name_that_nothing_has(batch):
    options = {"example": (X, M), "batch": batch}
    with pytest.raises(autopar.ConstraintError, match=r"shared='mm' names no tensor .*; the tensor arguments are x, m"):
        autopar.plan(mixing(), "dp=2", shared=("mm",), **options)
    autopar.plan(mixing(), "dp=2", shared=("m", "masks"), **options)  # an argument that this call leaves out
    with pytest.raises(autopar.ConstraintError, match=r"cannot read shared=\(3,\); pass names of arguments, such as"):
        autopar.plan(mixing(), "dp=2", shared=(3,), **options)


def test_strategies_do_not_follow_a_shared_tensor():
    """Three rows do not divide, but they are no batch."""
    example = {"m": numbers(3, 4), "x": X[:4]}
    with pytest.raises(autopar.ConstraintError, match=r"input [mx] has a batch of 3"):
        autopar.plan(Rows(), "dp=2", example=example, constraints={"dp": "ddp"})
    plan = autopar.plan(Rows(), "dp=2", example=example, constraints={"dp": "ddp"}, shared=("m",))
    assert plan.stored("linear.weight").spec == (autopar.R,)


class Rows(nn.Module):
    """Takes the matrix first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, m, x):
        return (self.linear(x).sum() * m.sum()).pow(2)


def plan_without_shared():
    plan = autopar.plan(mixing(), "dp=2", example=(X[:4], M), batch="local")
    local(plan=plan)


def test_a_plan_must_share_the_same(ranks):
    for text in ranks.failures(plan_without_shared):
        assert text.startswith("PlanError: the plan is for another model (fingerprint ") and "sizes" in text


class Product(nn.Module):
    """Where a matrix that grows with the batch cannot be multiplied."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, m):
        return self.linear(x) @ m


def test_a_shape_that_does_not_fit_the_whole_batch_names_the_cure():
    example = (torch.ones(4, 4), torch.ones(4, 4))
    with pytest.raises(
        autopar.CaptureError, match=r"2 times the rows of the pieces: x, m; if one .* name it in shared"
    ):
        autopar.plan(Product(), "dp=2", example=example, batch="local")
    autopar.plan(Product(), "dp=2", example=example, batch="local", shared=("m",))


# ---- what looks shared ---------------------------------------------------------------------------------------------


def said(m, calls=2, options=None):
    """Warnings of some calls whose first argument differs between ranks."""
    pm = local(**(options or {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            pm(mine(X), m)
    return [str(w.message) for w in caught]


def test_a_piece_that_never_varies_is_said_once(ranks):
    first, second = ranks.run(said, M, 2, shared_nothing())
    assert first == [
        "argument 'm' is the same on every rank, though batch=\"local\" takes it for a piece of the batch: if it is "
        "one tensor for all, name it in shared=('m',); if it is data, give each rank its own piece "
        "(DistributedSampler(dataset, **pm.sampler_args))"
    ]
    assert second == []


def test_equal_rows_and_shared_tensors_are_normal(ranks):
    assert ranks.run(said, torch.ones(4, 4).double(), 1, shared_nothing()) == [[], []]
    assert ranks.run(said, M, 1) == [[], []]
    assert ranks.run(said, M, 1, {"shared": (), "check": False}) == [[], []]


def shared_nothing():
    return {"shared": ()}


def test_names():
    assert (
        tree.named("batch.mask", ["batch"]) and tree.named("args[1]", ["args[1]"]) and tree.named("args[1]", ["args"])
    )
    assert not tree.named("mask", ["mas"]) and not tree.named("mask", ())
