"""Batches that do not divide: ignored labels on some ranks only, an uneven last batch, batch 1, odd sizes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.distributed.tensor import DTensor

import autopar
from tests import zoo
from tests.harness import Ranks
from tests.widen import widen_to_float64


@pytest.fixture(scope="module")
def ranks():
    with Ranks(4, timeout=300) as group:
        yield group


def _batch(rows: int, seq: int, keep: slice) -> dict[str, torch.Tensor]:
    ids = zoo.tokens(0, rows, seq)
    labels = torch.full_like(ids, -100)
    labels[keep] = ids[keep]
    return {"input_ids": ids, "labels": labels}


def _losses(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Loss and a gradient norm of each batch, with a step of SGD after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        found += [loss.detach(), torch.stack([g.norm() for g in grads]).norm()]
        optimizer.step()
    return found


def _parity(mesh: str, constraints: dict[str, str], shapes: list[tuple[int, int, slice]]) -> list[str]:
    """Runs on every rank: the batches one after the other through one compiled module. Returns the warnings."""
    torch.manual_seed(0)
    model, _ = zoo.ZOO["llama"](0)
    model = model.double().train()
    batches = [_batch(*shape) for shape in shapes]
    with widen_to_float64(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pm = autopar.compile(model, mesh, example=batches[0], constraints=constraints, device="cpu")
        got = _losses(pm, batches)
        want = _losses(copy.deepcopy(model), batches)
    for i, (a, b) in enumerate(zip(got, want)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0, msg=lambda m, i=i: f"value {i} of {shapes}: {m}")
    return [str(w.message) for w in caught]


ALL = slice(None)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_ignored_labels_on_some_ranks_only(ranks, strategy):
    # ranks 0..3 hold rows 0-1, 2-3, 4-5, 6-7: all valid labels on rank 0, then on rank 3, then one row in the middle
    shapes = [(8, 8, slice(0, 2)), (8, 8, slice(6, 8)), (8, 8, slice(3, 4))]
    ranks.run(_parity, "dp=4", {"dp": strategy}, shapes)


def test_uneven_last_batch_under_the_planner(ranks):
    notes = ranks.run(_parity, "dp=2,tp=2", {}, [(8, 8, ALL), (8, 8, ALL), (5, 8, ALL)])
    assert any("input_ids" in n and "5" in n for n in notes[0]), notes[0]


def test_batch_of_one_and_odd_sizes(ranks):
    ranks.run(_parity, "dp=4", {}, [(1, 7, ALL)])
    ranks.run(_parity, "dp=2,tp=2", {}, [(3, 5, ALL)])


def _refused(rows: int) -> str:
    model, _ = zoo.ZOO["llama"](0)
    try:
        autopar.compile(model, "dp=4", example=_batch(rows, 8, ALL), constraints={"dp": "ddp"}, device="cpu")
    except autopar.AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_a_strategy_that_needs_the_batch_split_says_so(ranks):
    for message in ranks.run(_refused, 6):
        assert "ConstraintError" in message and "6" in message and "4" in message, message


def _uneven_under_ddp() -> str:
    """A last batch that the pinned strategy cannot split."""
    model, _ = zoo.ZOO["llama"](0)
    pm = autopar.compile(model, "dp=4", example=_batch(8, 8, ALL), constraints={"dp": "ddp"}, device="cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pm(**_batch(6, 8, ALL))
    except autopar.AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_uneven_last_batch_under_ddp_is_refused_with_both_numbers(ranks):
    for message in ranks.run(_uneven_under_ddp):
        assert "6" in message and "4" in message and "batch" in message, message
