"""What a user does with PACI beside training: evaluation, copies, batches that differ, losses in other places."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import BatchError, RuntimeUseError
from autopar.runtime import module as runtime_module
from tests.test_paci import STEPS, Chain, batches, chain, made, state
from tests.trained import full


def evaluates_as_it_is() -> float:
    """Evaluation with gradients enabled is one without them, also as the very first call; training goes on."""
    batch = batches(1)[0]
    for example in (batch, None):
        pm = made("pp=2", "paci", example=example)
        pm.eval()
        loss = pm(**batch)
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()
        pm.train()
        for _ in range(2):
            with pytest.raises(RuntimeUseError, match=r"to evaluate, call pm\.eval\(\) first"):
                pm(**batch)
            pm.train_step(**batch)
        assert pm.drain().updates == 2
    pm = made("pp=2", "paci", example=None)
    with pytest.raises(RuntimeUseError, match=r"call pm\.train_step\(batch\)"):
        pm(**batch)
    pm.train_step(**batch)
    return float(loss)


def test_evaluation_needs_no_no_grad(two):
    want = float(chain()(**batches(1)[0]).detach())
    assert two.run(evaluates_as_it_is) == [pytest.approx(want, rel=1e-12)] * 2


def given_other_batches(check: bool) -> tuple[list[str], int]:
    """What drain and evaluation say of batches that differ on rank 1; number of checksums."""
    real, made_of, said = runtime_module.checksum, [], []

    def counted(tensor: torch.Tensor) -> int:
        made_of.append(tensor)
        return real(tensor)

    runtime_module.checksum = counted
    try:
        pm = made("pp=2", "paci", check=check)
        made_of.clear()
        for wrong, end in (((1, 3), pm.drain), ((), pm.drain), ((2,), pm.eval), ((), pm.eval)):
            for k, batch in enumerate(batches(4)):
                if k in wrong and torch.distributed.get_rank() == 1:
                    batch["x"] += 1
                pm.train_step(**batch)
            said.append(error_of(end))
            pm.train()
        count = len(made_of)
    finally:
        runtime_module.checksum = real
    return said, count


def error_of(act: Any) -> str:
    try:
        act()
    except BatchError as error:
        return str(error)
    return ""


def test_batches_are_compared_when_the_pipeline_is_emptied(two):
    text = "the ranks were given different batches in %s since they were last compared: rank 1 differs from rank 0"
    for said, count in two.run(given_other_batches, True):
        assert [s.split(";")[0] for s in said[::2]] == [
            text % where for where in ("calls 2, 4 of the 4", "call 3 of the 4")
        ]
        assert not any(said[1::2]) and count > 0
    for said, count in two.run(given_other_batches, False):
        assert not any(said) and count == 0, "nothing is compared, and checksums cost time"


def twins(mesh: str, weights: str, constraints: dict[str, str]) -> None:
    """A copy from the middle of a run trains its own parameters, and does as the original does."""
    pm = made(
        mesh, "paci", weights=weights, constraints=constraints,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    )  # fmt: skip
    given = batches()
    for batch in given[:3]:
        pm.train_step(**batch)
    twin = copy.deepcopy(pm)
    assert twin.optimizer is not pm.optimizer
    before = state(pm)
    for batch in given[3:]:
        twin.train_step(**batch)
    told = twin.drain()
    assert all(torch.equal(before[n], p) for n, p in state(pm).items()), "the original has moved"
    for batch in given[3:]:
        pm.train_step(**batch)
    assert pm.drain() == told and told.updates == STEPS
    one, two = state(pm), state(twin)
    assert all(torch.equal(one[n], two[n]) and not torch.equal(one[n], before[n]) for n in one)
    for batch in given:  # what the one has in flight ends before the other begins
        pm.train_step(**batch)
        twin.train_step(**batch)
    assert pm.drain() == twin.drain()
    one, two = state(pm), state(twin)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("mesh", "weights", "constraints"), [("pp=4", "predicted", {}), ("pp=2,dp=2", "current", {"dp": "zero3"})]
)
def test_a_copy_trains_itself(four, mesh, weights, constraints):
    four.run(twins, mesh, weights, constraints)


class Early(nn.Module):
    """The loss, and behind it heavier work that is only returned: the last stage does not know the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        self.extra = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and more; x [batch, 16], y [batch]."""
        h = torch.tanh(self.first(x))
        loss = nn.functional.cross_entropy(self.head(h), y)
        more = h.detach().repeat(1, 16)
        for layer in self.extra:
            more = torch.tanh(layer(more))
        return loss, more


def early() -> tuple[int, list[Any], float, list[float]]:
    """Stage of the loss, losses here, the last one as drain tells it, and how far gradients are off, by window."""
    torch.manual_seed(0)
    model, given, seen = Early().double(), batches(3), []
    for k, batch in enumerate(given):  # another window has other numbers of labels
        batch["y"] = torch.arange(8) % 5
        batch["y"][: 3 * k] = -100

    class Spy(torch.optim.SGD):
        def step(self, *args: Any) -> Any:
            params = [p for group in self.param_groups for p in group["params"]]
            seen.append({id(p): full(p.grad).clone() for p in params if p.grad is not None})
            return super().step(*args)

    pm = made(
        "pp=2", "paci", model=copy.deepcopy(model), example=given[0], optimizer=lambda ps: Spy(ps, lr=0.0),
        optimizer_class="sgd",  # so that it is not stepped to be measured
    )  # fmt: skip
    losses = [pm.train_step(**batch) for batch in given]
    told = pm.drain()
    off = []
    for batch, grads in zip(given, seen):
        model.zero_grad()
        model(**batch)[0].backward()
        own = [(p, model.get_parameter(n).grad) for n, p in pm.named_parameters() if id(p) in grads]
        off.append(max((float((grads[id(p)] - want).abs().max()) for p, want in own), default=0.0))
    step = pm._state.trainer.step
    return step.lowered.at[step.lowered.loss], [s if s is None else float(s) for s in losses], told.loss, off


def test_the_loss_may_be_on_another_stage_than_the_last(two):
    (stage, losses, told, off), (_, others, told_there, _) = two.run(early)
    assert stage == 0, "the planner cuts otherwise: the test shows nothing"
    assert others == [None] * 3 and told == told_there == losses[-1]
    assert None not in losses and len(off) == 3 and max(off) < 1e-12


class Hidden(Chain):
    """With the state behind every block among its outputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        """Loss, and a state for each block."""
        states = []
        for block in self.blocks:
            x = x + block(x)
            states.append(x)
        return nn.functional.cross_entropy(self.head(x), y), *states


def kept_outputs() -> list[int]:
    """Micro-batches of which outputs are kept behind each of three steps."""
    pm, found = made("pp=2", "paci", model=Hidden().double(), outputs="full"), []
    for batch in batches(3):
        pm.train_step(**batch)
        found.append(sum(len(work.outputs) for work in pm._state.trainer.step.works.values()))
    with torch.no_grad():
        assert len(pm(**batch)) == 5
    return found


def test_outputs_that_nobody_asks_for_are_not_kept(two):
    assert two.run(kept_outputs) == [[0, 0, 0]] * 2


class Gated(Chain):
    """A parameter whose gradient is not finite where its gate is shut; the loss is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The loss; gate [batch, 16]."""
        return super().forward(x + (self.scale.square() * gate).sqrt(), y)


def gated(nonfinite: str) -> tuple[tuple[int, ...], bool]:
    """Updates left out, and whether this rank's stage has moved in a step that meets a NaN in one rank's shard."""
    torch.manual_seed(0)
    given = [{**batch, "gate": torch.ones(8, 16, dtype=torch.float64)} for batch in batches(2)]
    given[1]["gate"][:, 12:] = 0
    pm = made(
        "pp=2,dp=2", "paci", model=Gated().double(), example=given[0], nonfinite=nonfinite,
        constraints={"dp": "zero3", "scale": "shard(0, dp)"},
    )  # fmt: skip
    pm.train_step(**given[0])
    pm.drain()
    before = state(pm)
    pm.train_step(**given[1])
    if nonfinite == "raise":
        pm.train_step(**given[0])  # the other stage goes on until it waits for this one
    told = pm.drain()
    return told.skipped, any(not torch.equal(before[n], p) for n, p in state(pm).items())


def test_the_ranks_of_a_stage_step_together_or_not_at_all(four):
    assert four.run(gated, "skip") == [((1, 0), False)] * 2 + [((1, 0), True)] * 2
    said = four.failures(gated, "raise")
    for text in said[:2]:
        assert "is not finite; look at the batch and at the learning rate" in text
    assert sorted("the gradient of scale" in text for text in said[:2]) == [False, True]
