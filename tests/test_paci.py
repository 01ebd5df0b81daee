"""PACI on gloo processes: asynchronous steps, drained or not, against flushes and against the laws of versions."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import PlanError, RuntimeUseError, ScheduleError
from autopar.pipeline.laws import backward_version, forward_version
from tests.harness import Ranks
from tests.trained import captured_once, full

WINDOW, STEPS = 4, 6


class Chain(nn.Module):
    """Four blocks with a classifier; unequal numbers of labels in the micro-batches."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The loss; x [batch, width], y [batch]."""
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x), y)


def batches(count: int = STEPS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    out = []
    for _ in range(count):
        y = torch.randint(0, 5, (8,), generator=generator)
        y[torch.rand(8, generator=generator) < 0.2] = -100
        out.append({"x": torch.randn(8, 16, generator=generator, dtype=torch.float64), "y": y})
    return out


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain().double()


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def made(mesh: str, schedule: str, **options: Any) -> Any:
    options = {"optimizer": adam, "micro_batches": WINDOW, "example": batches(1)[0], **options}
    model = options.pop("model", None) or chain()
    return autopar.compile(model, mesh, device="cpu", schedule=schedule, timeout=60, **options)


def state(pm: Any) -> dict[str, torch.Tensor]:
    return {n: full(p).detach().clone() for n, p in pm.named_parameters()}


def drained_every_step(mesh: str, constraints: dict[str, str]) -> tuple[list[float], list[float], bool]:
    """Losses of PACI with a drain behind every window, of flushes, and whether all parameters are equal bit for bit."""
    with captured_once():
        paci = made(mesh, "paci", constraints=constraints)
        flush = made(mesh, "1f1b", constraints=constraints)
    ours, theirs = [], []
    for batch in batches():
        paci.train_step(**batch)
        ours.append(paci.drain().loss)
        theirs.append(float(flush.train_step(**batch)))
    a, b = paci.full_state_dict(), flush.full_state_dict()  # the two need not be cut at the same places
    return ours, theirs, a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def plain() -> list[float]:
    """Losses of the plain module."""
    model = chain()
    optimizer = adam(model.parameters())
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("mesh", "constraints"), [("pp=4", {}), ("pp=2,dp=2", {"dp": "ddp"})])
def test_drained_every_window_it_is_a_flush(four, mesh, constraints):
    want = plain()
    for ours, theirs, equal in four.run(drained_every_step, mesh, constraints):
        assert equal, "parameters differ"
        assert ours == theirs
        assert ours == pytest.approx(want, rel=1e-9)


def running(mesh: str, weights: str, clip: float | None) -> dict[str, Any]:
    """A run without drains: what it says at the end, and this rank's parameters."""
    pm = made(mesh, "paci", weights=weights, clip=clip)
    seen = [pm.train_step(**batch) for batch in batches()]
    told = pm.drain()
    return {"losses": [None if s is None else float(s) for s in seen], "told": told, "state": state(pm)}


@pytest.mark.parametrize("weights", ["current", "stashed", "predicted"])
def test_versions_are_those_of_the_laws(four, weights):
    """And what comes out is what one process finds that follows the laws."""
    found = four.run(running, "pp=4", weights, None)
    count = WINDOW * STEPS
    for stage, row in enumerate(found):
        told = row["told"]
        drifts = [backward_version(m, WINDOW) - forward_version(m, stage, 4, WINDOW) for m in range(count)]
        assert told.updates == STEPS and told.skipped == (0,) * 4
        assert told.drift[stage] == pytest.approx(sum(drifts) / count)
        assert told.most[stage] == max(drifts)
        assert (row["losses"][0] is None) == (stage < 3), "the loss is known on the last stage"
    losses = found[3]["losses"]
    assert found[0]["told"].loss == pytest.approx(losses[-1])
    want = simulated(weights)
    assert losses == pytest.approx(want["losses"], rel=1e-9)
    names = set().union(*(row["state"] for row in found))
    assert names == want["state"].keys()
    for row in found:
        for name, value in row["state"].items():
            torch.testing.assert_close(value, want["state"][name], rtol=1e-9, atol=1e-12, msg=name)


def flushing(weights: str, flush: int) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    pm = made("pp=4", "paci", weights=weights)
    for number, batch in enumerate(batches()):
        pm.train_step(**batch)
        if number < flush:
            pm.drain()
    told = pm.drain()
    return state(pm), told.most


@pytest.mark.parametrize("weights", ["current", "predicted"])
def test_the_first_updates_can_be_drained(four, weights):
    want = simulated(weights, flush=2)["state"]
    for values, most in four.run(flushing, weights, 2):
        assert most == (1, 1, 1, 0)
        for name, value in values.items():
            torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-12, msg=name)


def sizes_that_change() -> bool:
    """With a drain behind every window nothing is to be predicted, whichever program runs."""
    given = batches(5)
    given = [{n: v[: 4 if k in (1, 3) else 8] for n, v in batch.items()} for k, batch in enumerate(given)]
    found = []
    for weights in ("predicted", "current"):
        pm = made("pp=2", "paci", weights=weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in given:
                pm.train_step(**batch)
                pm.drain()
        found.append(state(pm))
    return all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_batches_of_other_sizes_do_not_disturb_predictions(two):
    assert two.run(sizes_that_change) == [True, True]


def two_optimizers() -> tuple[int, bool]:
    """Parameters of the rank that each of two optimizers moves."""

    def made_of(params: Any) -> list[torch.optim.Optimizer]:
        kinds = ([p for p in params if p.dim() == 2], [p for p in params if p.dim() != 2])
        return [torch.optim.SGD(kinds[0], lr=0.1), torch.optim.AdamW(kinds[1], lr=0.1)]

    pm = made("pp=2", "paci", optimizer=made_of, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    before = state(pm)
    pm.train_step(**batches(1)[0])
    pm.drain()
    rates = [o.param_groups[0]["lr"] for o in pm.optimizers]
    moved = all(not torch.equal(before[n], p) for n, p in state(pm).items())
    return len(pm.optimizers), rates == [0.05, 0.05] and moved


def test_several_optimizers(two):
    assert two.run(two_optimizers) == [(2, True)] * 2


def simulated(weights: str, flush: int = 0) -> dict[str, Any]:
    """The laws followed by hand, in one process: every version of every stage's weights is kept."""
    model = chain()
    owner = owners()
    stages = [[n for n, _ in model.named_parameters() if owner[n] == s] for s in range(4)]
    optimizers = [adam([model.get_parameter(n) for n in names]) for names in stages]
    versions = [[{n: model.get_parameter(n).detach().clone() for n in names}] for names in stages]
    losses = []
    for step, batch in enumerate(batches()):
        total = (batch["y"] != -100).sum()
        sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        loss_sum = 0.0
        for k, (x, y) in enumerate(zip(batch["x"].chunk(WINDOW), batch["y"].chunk(WINDOW))):
            micro = step * WINDOW + k
            old, new = {}, {}
            for s in range(4):
                forward, backward = forward_version(micro, s, 4, WINDOW), backward_version(micro, WINDOW)
                if step < flush:
                    forward = step
                elif flush:
                    forward = flush + forward_version(micro - flush * WINDOW, s, 4, WINDOW)
                expected = versions[s][forward]
                if weights == "predicted" and forward:
                    before, more = versions[s][forward - 1], backward - forward
                    expected = {n: now + more * (now - before[n]) for n, now in expected.items()}
                old.update(expected)
                new.update(versions[s][forward if weights == "stashed" else backward])
            loss, grads = by_hand(old, new, x, y, total)
            loss_sum += loss
            for name, grad in grads.items():
                sums[name] += grad
        losses.append(loss_sum)
        for s, names in enumerate(stages):
            for name in names:
                model.get_parameter(name).grad = sums[name]
            optimizers[s].step()
            versions[s].append({n: model.get_parameter(n).detach().clone() for n in names})
    return {"losses": losses, "state": {n: p.detach() for n, p in model.named_parameters()}}


def by_hand(old: Any, new: Any, x: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> tuple[float, Any]:
    """Forward with `old` weights, backward with `new` ones through the activations of the forward."""
    inputs, acts = [x], []
    for i in range(4):
        acts.append(torch.tanh(inputs[-1] @ old[f"blocks.{i}.0.weight"].T + old[f"blocks.{i}.0.bias"]))
        inputs.append(inputs[-1] + acts[-1])
    logits = (inputs[-1] @ old["head.weight"].T + old["head.bias"]).requires_grad_()
    loss = nn.functional.cross_entropy(logits, y, reduction="sum") / total
    (grad,) = torch.autograd.grad(loss, logits)
    grads = {"head.weight": grad.T @ inputs[-1], "head.bias": grad.sum(0)}
    grad = grad @ new["head.weight"]
    for i in reversed(range(4)):
        inner = grad * (1 - acts[i] ** 2)
        grads[f"blocks.{i}.0.weight"], grads[f"blocks.{i}.0.bias"] = inner.T @ inputs[i], inner.sum(0)
        grad = grad + inner @ new[f"blocks.{i}.0.weight"]
    return float(loss.detach()), grads


_owners: dict[str, int] = {}


def owners() -> dict[str, int]:
    """Parameter -> its stage, as the planner cuts the chain on four ranks."""
    if not _owners:
        with Ranks(4, timeout=100) as ranks:
            for rank, names in enumerate(ranks.run(names_here)):
                _owners.update(dict.fromkeys(names, rank))
    return _owners


def names_here() -> list[str]:
    return [n for n, _ in made("pp=4", "paci").named_parameters()]


def evaluates_between() -> tuple[list[float], bool]:
    """Evaluation and state dicts in the middle of a run see all stages at one version."""
    pm = made("pp=2", "paci")
    found = []
    for batch in batches(3):
        pm.train_step(**batch)
        pm.eval()
        with torch.no_grad():
            found.append(float(pm(**batch)))
        values = pm.full_state_dict()
        model = chain()
        model.load_state_dict(values)
        found.append(float(model(**batch).detach()))
        pm.train()
    return found, len(values) == len(chain().state_dict())


def test_evaluation_empties_the_pipeline(two):
    for found, whole in two.run(evaluates_between):
        assert whole
        assert found[0::2] == pytest.approx(found[1::2], rel=1e-12)


def poisoned(nonfinite: str) -> Any:
    pm = made("pp=2", "paci", nonfinite=nonfinite)
    given = batches(3)
    given[1]["x"][:] = float("nan")
    for batch in given:
        pm.train_step(**batch)
    told = pm.drain()
    return told.skipped, told.updates, all(bool(torch.isfinite(p).all()) for p in state(pm).values())


def test_a_step_that_is_not_finite_is_left_out(two):
    for skipped, updates, finite in two.run(poisoned, "skip"):
        assert skipped == (1, 1) and updates == 3 and finite


def clipped(clip: float) -> tuple[float, float]:
    """Norm of the gradients of one step, before it, with a loop of one's own; and what train_step makes of it."""
    pm = made("pp=2", "1f1b", clip=clip, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    before = pm.full_state_dict()
    pm.train_step(**batches(1)[0])
    after = pm.full_state_dict()
    moved = torch.linalg.vector_norm(torch.stack([(after[n] - before[n]).norm() for n in before]))
    return float(moved), clip


def test_clipping_of_a_flush_is_by_the_norm_of_all_stages(two):
    for moved, clip in two.run(clipped, 1e-3):
        assert moved == pytest.approx(clip, rel=1e-2)


def says(schedule: str, kind: str, **options: Any) -> str:
    """The error that compile, or the plain loop, raises on this rank."""
    try:
        pm = made("pp=2", schedule, **options)
        if kind == "loop":
            pm(**batches(1)[0])
    except (ScheduleError, PlanError, RuntimeUseError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_cannot_be_is_refused(two):
    for text in two.run(says, "paci", "loop"):
        assert text.startswith("RuntimeUseError: the pipeline's schedule steps the optimizer on its way: call pm.train")


def test_options_of_paci_are_checked():
    model, batch = chain(), batches(1)[0]
    with pytest.raises(ScheduleError, match="needs micro_batches="):
        autopar.compile(copy.deepcopy(model), "pp=1", example=batch, schedule="paci", optimizer=adam)
    with pytest.raises(ScheduleError, match="pass optimizer=lambda params"):
        autopar.compile(copy.deepcopy(model), "pp=1", example=batch, schedule="paci", micro_batches=4)
    with pytest.raises(ScheduleError, match="can be simulated and drawn, but not trained with"):
        autopar.compile(
            copy.deepcopy(model), "pp=1", example=batch, schedule="2bw", micro_batches=4, optimizer=adam
        )
    with pytest.raises(RuntimeUseError, match="weights='old' does not exist; choose one of current, stashed, pre"):
        autopar.compile(
            copy.deepcopy(model), "pp=1", example=batch, schedule="paci", micro_batches=4, optimizer=adam, weights="old"
        )


def warned(window: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pm = made("pp=4", "paci", micro_batches=window)
        pm.train_step(**batches(1)[0])
        pm.drain()
    return [str(w.message) for w in caught if "newer than" in str(w.message)]


def test_a_small_window_is_warned_about(four):
    found = four.run(warned, 2)
    assert len(found[0]) == 1 and "0.75 updates newer" in found[0][0] and "2.50 times" in found[0][0]
    assert not any(found[1:]), "once is enough"
    assert not any(four.run(warned, 4))
