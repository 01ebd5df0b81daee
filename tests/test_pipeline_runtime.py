"""What a user does with a pipeline of two processes beside training steps of one shape, against the plain module.

In float64: evaluation in between, other batch sizes, accumulation and scaled losses, state dicts, copies, plans and
tables from files, outputs, failures. (Schedules and models: `test_pipeline_parity.py`.)
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.capture import capture
from autopar.costmodel import planner
from autopar.errors import RuntimeUseError
from autopar.mesh import Mesh
from autopar.pipeline.plans import ALONE, inner, outer
from autopar.pipeline.schedules import schedule
from autopar.pipeline.table import to_csv
from autopar.plan import Pipeline
from autopar.proposals import merged
from tests.harness import Ranks
from tests.trained import full

H = 16


class Net(nn.Module):
    """Tied embeddings, four layers, a loss that ignores labels. Without labels, logits."""

    def __init__(self, tied=True, norm=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, H), nn.Linear(H, 20, bias=False)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(4))
        self.norm = nn.BatchNorm1d(H, affine=False) if norm else nn.Identity()
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        h = self.embed(ids)
        for i, layer in enumerate(self.layers):
            h = h + torch.tanh(layer(h))
            if i == 2:
                h = self.norm(h)
        out = self.head(h)
        return out if labels is None else (F.cross_entropy(out, labels), out)


def data(rows=8, seed=0):
    """Rows of which micro-batches of two have unequally many labels; the first of them none."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, 20, (rows,), generator=generator) for _ in range(2))
    labels[::3] = -100
    if rows > 4:
        labels[:2] = -100
    else:
        labels[0] = 3
    return {"ids": ids, "labels": labels}


def made(schedule="1f1b", model=None, example=True, **options):
    """The plain model, and the pipeline."""
    torch.manual_seed(0)
    model = (model or Net()).double()
    options = {"micro_batches": 4, "schedule": schedule, **options}
    example = data() if example is True else example
    pm = autopar.compile(copy.deepcopy(model), "pp=2", example=example, device="cpu", timeout=30, **options)
    return model, pm


def loss(module, batch):
    return module(**batch)[0]


def same_gradients(model, pm):
    plain = dict(model.named_parameters())
    own = dict(pm.named_parameters())
    assert own, "this rank has no parameters"
    for name, p in own.items():
        want = plain[name].grad
        assert (p.grad is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(full(p.grad), want, rtol=1e-9, atol=1e-12, msg=name)


def close(a, b):
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-12)


def step(model, pm, batch):
    """One backward of each, and the comparison."""
    for module in (model, pm):
        module.zero_grad()
    a, b = loss(model, batch), loss(pm, batch)
    close(b, a)
    a.backward()
    b.backward()
    same_gradients(model, pm)


# ---- cases ---------------------------------------------------------------------------------------------------------


def evaluation():
    model, pm = made()
    batch = data()
    with torch.no_grad():
        for a, b in zip(pm(**batch), model(**batch)):  # the loss too, with unequally many labels
            close(a, b)
        close(pm(ids=batch["ids"][:3]), model(ids=batch["ids"][:3]))
    step(model, pm, batch)
    pm.eval()
    with torch.no_grad():
        close(pm(**batch)[0], model(**batch)[0])


def sizes(name):
    model, pm = made(name)
    for rows in (8, 16, 6, 7, 1, 8):
        step(model, pm, data(rows, rows))


def accumulation():
    model, pm = made("zb-h1")
    one, two = data(), data(8, 3)
    for module in (model, pm):
        (loss(module, one) * 0.25).backward()
        (loss(module, two) * 3).backward()
    same_gradients(model, pm)
    for module in (model, pm):
        module.zero_grad(set_to_none=False)
        (loss(module, one) - 2 * loss(module, two)).backward()
    same_gradients(model, pm)
    again = loss(pm, one)
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeUseError, match="handed over"):
        again.backward()


def states():
    model, pm = made("zb-v")
    found = pm.full_state_dict()
    assert list(found) == list(model.state_dict())
    model.load_state_dict(found)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    pm.load_state_dict(model.state_dict())
    step(model, pm, data())
    pm.load_state_dict(pm.state_dict())
    for name, value in pm.full_state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    twin = copy.deepcopy(pm)
    with torch.no_grad():
        for p in pm.parameters():
            p.mul_(2)
    step(model, twin, data())
    other = copy.deepcopy(twin.state_dict())
    twin.load_state_dict(other)


def statistics():
    """Buffers that change: of one stage alone, and as they are after every micro-batch."""
    model, pm = made(model=Net(norm=True))
    batch = {**data(), "labels": torch.arange(8)}
    loss(pm, batch).backward()
    for k in range(4):
        model(**{n: t.chunk(4)[k] for n, t in batch.items()})
    model.eval(), pm.eval()
    with torch.no_grad():
        close(pm(ids=batch["ids"]), model(ids=batch["ids"]))
    for name, value in pm.full_state_dict().items():
        close(value.double(), model.state_dict()[name].double())


def evaluated_first():
    """The stage that changes a buffer is known at the first training step only: from then on it alone has it."""
    model, pm = made(model=Net(norm=True), example=None)
    batch = {**data(), "labels": torch.arange(8)}
    model.eval(), pm.eval()
    with torch.no_grad():
        close(pm(**batch)[0], model(**batch)[0])
    model.train(), pm.train()
    loss(pm, batch).backward()
    for k in range(4):
        model(**{n: t.chunk(4)[k] for n, t in batch.items()})
    for name, value in pm.full_state_dict().items():
        close(value.double(), model.state_dict()[name].double())
    model.eval(), pm.eval()
    with torch.no_grad():
        close(pm(**batch)[0], model(**batch)[0])


def inside_another_module():
    model, pm = made()
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    outer = nn.ModuleDict({"net": pm})
    outer.load_state_dict({f"net.{name}": value for name, value in model.state_dict().items()})
    step(model, pm, data())


class Counting(Net):
    """Says how many labels count: a number that is no row of the batch."""

    def forward(self, ids, labels=None):
        found, out = super().forward(ids, labels)
        return found, out, (labels != -100).sum()


def counts():
    model, pm = made(model=Counting())
    loss(pm, data()).backward()  # in training it is not asked for
    with torch.no_grad():  # evaluated whole: micro-batches could not say it
        for a, b in zip(pm(**data()), model(**data()), strict=True):
            close(a, b)
    with pytest.raises(autopar.errors.BatchError, match="has no row for each of its rows"):
        made(model=Counting(), outputs="full")


def frozen():
    model = Net(tied=False)
    for part in (model.embed, *model.layers[:2]):
        part.requires_grad_(False)
    model, pm = made(model=model)
    assert any(p.requires_grad for p in pm.parameters())
    step(model, pm, data())
    tied = Net()
    tied.embed.weight.requires_grad_(False)
    step(*made(model=tied), data())


def frozen_stages(part):
    """One of two stages trains nothing: the first, or the last, through which gradients pass."""
    model = Net(tied=False)
    model.requires_grad_(False).get_submodule(part).requires_grad_(True)
    for name in ("1f1b", "zb-h1"):
        plain, pm = made(name, model=model, optimizer=sgd, clip=0.5, plan=halved(model, name))
        here = any(p.requires_grad for p in pm.parameters())
        assert pm._state.control.rows([here]) in ([[0], [1]], [[1], [0]])
        step(plain, pm, data())
        optimizer = sgd(plain.get_submodule(part).parameters())
        for k in range(2):
            close(pm.train_step(**data(8, k)), trained(plain, optimizer, data(8, k), 0.5))
        same_parameters(plain, pm)
        assert len(pm.optimizers) == here
        if not here:
            with pytest.raises(RuntimeUseError, match="all parameters of its stages are frozen"):
                _ = pm.optimizer
    plain, pm = made("paci", model=model, optimizer=sgd, clip=0.5, plan=halved(model, "paci"))
    for _ in range(2):
        pm.train_step(**data())
    assert pm.drain().updates == 2
    still = dict(plain.named_parameters())
    assert all(torch.equal(p, still[n]) != p.requires_grad for n, p in pm.named_parameters())


def halved(model, name):
    """A plan of two stages; the planner itself lets each of them have something to train."""
    program = capture(model.double(), (), {name: value[:2] for name, value in data().items()})
    pipeline = Pipeline("pp", ("fwd:layers.2/mm#0",), 4, name)
    return outer(planner.plan(program, ALONE), Mesh.parse("pp=2"), pipeline)


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


def trained(model, optimizer, batch, clip):
    """The loss of one step of the plain module."""
    model.zero_grad()
    found = loss(model, batch)
    found.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return found


def same_parameters(model, pm):
    plain = dict(model.named_parameters())
    for name, p in pm.named_parameters():
        torch.testing.assert_close(full(p), plain[name], rtol=1e-9, atol=1e-12, msg=name)


def clipped():
    """Gradients of what no optimizer steps, and those of somebody's own backward, do not add up in the norm."""

    def matrices(params):
        return sgd([p for p in params if p.dim() == 2])

    model, pm = made(model=Net(tied=False), optimizer=matrices, clip=0.05)
    loss(pm, data()).backward()
    optimizer = matrices(model.parameters())
    for k in range(3):
        close(pm.train_step(**data(8, k)), trained(model, optimizer, data(8, k), 0.05))
    same_parameters(model, pm)


class Stubborn(torch.optim.SGD):
    """It takes over nobody's state."""

    def load_state_dict(self, state_dict):
        raise ValueError("not mine")


def copies():
    """A copy trains its own parameters, with an optimizer and a scheduler in the same state."""
    _, pm = made(
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
    )
    pm.train_step(**data())
    twin = copy.deepcopy(pm)
    before = {n: p.detach().clone() for n, p in pm.named_parameters()}
    found = [float(twin.train_step(**data(8, k))) for k in range(3)]
    assert all(torch.equal(p, before[n]) for n, p in pm.named_parameters()), "the original has moved"
    assert found == [float(pm.train_step(**data(8, k))) for k in range(3)]
    assert twin.optimizer is not pm.optimizer
    assert twin.optimizer.param_groups[0]["lr"] == pm.optimizer.param_groups[0]["lr"] == 2.5e-3
    same_parameters(twin, pm)
    _, pm = made(optimizer=lambda params: Stubborn(params, lr=0.1))
    copy.deepcopy(pm)
    pm.train_step(**data())
    with pytest.raises(RuntimeUseError, match=r"cannot be copied with its optimizer.*ValueError: not mine"):
        copy.deepcopy(pm)


def files(folder):
    rank = torch.distributed.get_rank()
    model, pm = made("zb-h1")
    pm.plan.save(f"{folder}/plan{rank}.json")
    again = autopar.compile(
        copy.deepcopy(model), "pp=2", example=data(), device="cpu", timeout=30, plan=f"{folder}/plan{rank}.json"
    )
    assert again.plan.pipeline == pm.plan.pipeline
    step(model, again, data())
    path = f"{folder}/table{rank}.csv"
    with open(path, "w") as file:
        file.write(to_csv(schedule("gpipe").make(2, 4)))
    model, pm = made(path, micro_batches=None)
    step(model, pm, data())
    with torch.no_grad():
        close(pm(**data())[1], model(**data())[1])


def outputs():
    model, pm = made(outputs="full")
    (a, x), (b, y) = model(**data()), pm(**data())
    close(x, y)
    assert not y.requires_grad
    a.backward(), b.backward()
    same_gradients(model, pm)


def failure():
    model, pm = made()
    step(model, pm, data())
    batch = data()
    if torch.distributed.get_rank() == 1:
        batch["ids"] = batch["ids"].float()
    with pytest.raises(autopar.AutoparError, match="differs between ranks"):
        pm(**batch)
    step(model, pm, data())  # as if nothing had been
    batch = data()
    batch["ids"][-1] = 99
    with pytest.raises(autopar.errors.PipelineError, match="index out of range"):
        pm(**batch)


def given_loss():
    torch.manual_seed(0)
    model, batch = Net().double(), data()
    pm = autopar.compile(
        copy.deepcopy(model), "pp=2", example={"ids": batch["ids"], "target": batch["labels"]}, loss=F.cross_entropy,
        device="cpu", timeout=30, micro_batches=4, schedule="1f1b",
    )  # fmt: skip
    a, b = F.cross_entropy(model(batch["ids"]), batch["labels"]), pm(batch["ids"], target=batch["labels"])
    close(a, b)
    a.backward(), b.backward()
    same_gradients(model, pm)


def without_values():
    with torch.device("meta"):
        empty = Net().double()
    pm = autopar.compile(empty, "pp=2", example=data(), device="cpu", timeout=30, micro_batches=4, schedule="1f1b")
    with pytest.raises(RuntimeUseError, match="no values"):
        pm(**data())
    model = Net().double()
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p)
    pm.load_state_dict(model.state_dict())
    step(model, pm, data())


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        evaluation, evaluated_first, accumulation, states, inside_another_module, statistics, counts, frozen, outputs,
        given_loss, without_values, clipped, copies,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_as_the_plain_module(two, case):
    two.run(case)


@pytest.mark.parametrize("part", [pytest.param("head", marks=pytest.mark.slow), "embed"])
def test_stages_that_train_nothing(two, part):
    two.run(frozen_stages, part)


@pytest.mark.parametrize("name", ["1f1b", pytest.param("zb-v", marks=pytest.mark.slow)])
def test_batches_of_any_size(two, name):
    two.run(sizes, name)


def test_plans_and_tables_from_files(two, tmp_path):
    two.run(files, str(tmp_path))


def test_a_rank_with_other_arguments_is_told_and_a_failure_inside_ends_the_pipeline():
    with Ranks(2, timeout=90) as ranks:  # of its own: a pipeline that has failed stays so
        ranks.run(failure)


def mixed_plans():
    """The first stage shards its parameters, the last has them whole."""
    torch.manual_seed(0)
    model, batch = Net(tied=False).double(), data(16)
    asked = {"example": batch, "device": "cpu", "micro_batches": 4, "schedule": "1f1b"}
    plans = [autopar.plan(model, "pp=2,dp=2", constraints={"dp": s}, **asked) for s in ("zero3", "ddp")]
    pipeline = plans[0].pipeline
    program = capture(model, (), {name: value[:4] for name, value in batch.items()})
    found = outer(merged(program, [inner(p) for p in plans], pipeline.starts), plans[0].mesh, pipeline)
    kinds = {tuple(str(p) for p in s.spec) for s in found.storage.values()}
    assert len(kinds) > 1, "both stages store alike"
    pm = autopar.compile(copy.deepcopy(model), "pp=2,dp=2", plan=found, timeout=30, **asked)
    step(model, pm, batch)
    step(model, pm, data(16, 4))


def test_stages_may_run_different_plans():
    with Ranks(4, timeout=120) as ranks:
        ranks.run(mixed_plans)
