"""What micro-batches change: ops that see several rows of the batch are told of, and no others.

The walk over programs of the zoo and of models made for it; and what users see, on two processes.
"""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import autopar
from autopar.capture import capture
from autopar.costmodel.rows import rows_of
from autopar.errors import BatchError
from autopar.graph import Value
from autopar.spec import R, S
from autopar.stages import loss_of, unjoined
from tests import pipeline_runs, zoo
from tests.trained import full

H, ROWS, MICRO = 16, 8, 4


def captured(model, batch, micro=MICRO, training=True):
    """The programs of one of `micro` micro-batches, and of the batch."""
    whole = capture(model, (), batch, training=training)
    dims = dict(whole.batch_dims)
    part = {k: v.narrow(dims[k], 0, v.shape[dims[k]] // micro) if k in dims else v for k, v in batch.items()}
    one = capture(model, (), part, training=training)
    one.batch_dims = dims
    return one, whole


def mixing(model, batch, micro=MICRO):
    """Addresses of ops that mix rows on the way to the loss."""
    one, whole = captured(model, batch, micro)
    found = rows_of(one, whole, micro, [loss_of(whole)])
    return [node.meta["address"] for node in found.mixing]


# ---- the zoo: rows do not see each other ---------------------------------------------------------------------------

QUICK = [name for name in zoo.ZOO if name != "qwen3_moe"]


@pytest.mark.parametrize("micro", [MICRO, pytest.param(ROWS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*QUICK, "unet"])
def test_rows_of_the_zoo_are_independent(name, micro):
    model, batch = pipeline_runs.example(name, double=False)
    assert mixing(model, batch, micro) == []


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "encoder", "mlp_dropout"])
def test_dropout_is_of_every_row(name):
    model, batch = pipeline_runs.example(name, double=False, dropout=0.1)
    assert mixing(model, batch) == []


def test_rows_sorted_by_expert_are_independent_and_a_loss_that_balances_experts_is_not():
    model, batch = pipeline_runs.example("mixtral", double=False, experts="grouped_mm")
    assert mixing(model, batch) == []
    model, batch = pipeline_runs.example("qwen3_moe", double=False)
    assert mixing(model, batch) == ["fwd:/mul.Tensor#0"]  # a share of tokens times a probability, both of the batch
    model.config.output_router_logits = False
    assert mixing(model, batch) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.HF_ARCHITECTURES)
def test_rows_of_architectures_are_independent(name):
    model, batch = zoo.HF_ARCHITECTURES[name](0)
    # Losses that are contrastive, and one that is divided by how many patches were drawn.
    assert bool(mixing(model, batch)) == (name in ("clip", "siglip", "vit_mae"))


# ---- models made for it --------------------------------------------------------------------------------------------


class Made(nn.Module):
    """A layer, then `function(module, hidden, y)`; x [rows, H], y [rows]."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.head, self.function = nn.Linear(H, H), nn.Linear(H, 5), function
        self.norm = nn.BatchNorm1d(H)
        self.register_buffer("table", torch.randn(ROWS, H))

    def forward(self, x, y):
        return self.function(self, torch.tanh(self.layer(x)), y)


def pair():
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(ROWS, H, generator=generator), "y": torch.randint(0, 5, (ROWS,), generator=generator)}


def classes(m, h, y):
    return F.cross_entropy(m.head(h), y)


def first_dim_in_the_middle(m, h, y):
    h = h.view(-1, 4, 4).transpose(0, 1).contiguous()  # [4, rows, 4]
    h = h.flatten(0, 1).view(4, -1, 4).softmax(-1)
    return classes(m, h.transpose(0, 1).flatten(1), y)


def of_own_row(m, h, y):
    rows = torch.arange(len(h))
    own = m.head(h)[rows, y]  # as a lookup by hand
    return -own.mean()


def ranked(m, h, y):
    each = F.cross_entropy(m.head(h), y, reduction="none")
    return each.sort(descending=True).values[: len(h) // 2].mean()


INDEPENDENT = {
    "classes": classes,
    "batch in the middle": first_dim_in_the_middle,
    "row numbers": of_own_row,
    "batch norm": lambda m, h, y: classes(m, m.norm(h), y),
    "divided by the number of rows": lambda m, h, y: (F.cross_entropy(m.head(h), y, reduction="none") / len(h)).sum(),
    "zeros of the batch": lambda m, h, y: classes(m, h + h.new_zeros(len(h), 1) + torch.ones(len(h), H), y),
    "noise": lambda m, h, y: classes(m, h * torch.rand(len(h), H), y),
    "guarded": lambda m, h, y: torch.where((y > 0).any(), classes(m, h, y), 0.0),
    "labels": lambda m, h, y: (F.cross_entropy(m.head(h), y, reduction="none") * (y > 1)).sum() / (y > 1).sum(),
    "one sum": lambda m, h, y: (h.sum(0) * m.table[0]).sum() + classes(m, h, y),
}
MIXING = {
    "contrastive": (lambda m, h, y: F.cross_entropy(h @ m.norm(h).T, torch.arange(len(h))), "/mm#"),
    "root of a mean": (lambda m, h, y: h.square().mean().sqrt(), "/sqrt#"),
    "batch statistics": (lambda m, h, y: classes(m, (h - h.mean(0)) / h.std(0), y), "/sub.Tensor#"),
    "mixed up": (lambda m, h, y: classes(m, 0.5 * h + 0.5 * h.flip(0), y), "/flip#"),
    "hard examples": (ranked, "/sort"),
    "running sums": (lambda m, h, y: classes(m, h.cumsum(0), y), "/cumsum#"),
    "largest of all": (lambda m, h, y: classes(m, h / h.amax(), y), "/amax#"),
    "one row": (lambda m, h, y: classes(m, h - h[0], y), "/select.int#"),
    "softmax over rows": (lambda m, h, y: classes(m, h.softmax(0), y), "/_softmax#"),
    "table of rows": (lambda m, h, y: classes(m, h + m.table[torch.arange(len(h))], y), "/index.Tensor#"),
    "weights of all rows": (lambda m, h, y: (m.head(h).logsumexp(-1) * y / y.sum()).sum(), "/div.Tensor#"),
    "by the number of rows": (lambda m, h, y: classes(m, torch.tanh(h / len(h)), y), "/tanh#"),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_rows_that_do_not_see_each_other(name):
    torch.manual_seed(0)
    assert mixing(Made(INDEPENDENT[name]), pair()) == []


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_see_each_other(name):
    torch.manual_seed(0)
    function, where = MIXING[name]
    found = mixing(Made(function), pair())
    assert found and where in found[0]


class Seq(nn.Module):
    """Torch's default layout: [time, batch, features]."""

    def __init__(self, first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(H, 2, 32, dropout=0.0, batch_first=first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(H, 5)

    def forward(self, x, y):
        return F.cross_entropy(self.head(self.encoder(x)).flatten(0, 1), y.flatten())


def sequences():
    return {"x": torch.randn(ROWS, 4, H), "y": torch.randint(0, 5, (ROWS, 4))}


def test_a_batch_in_dim_1_is_cut_in_time():
    assert mixing(Seq(first=True), sequences()) == []
    found = mixing(Seq(), sequences())
    assert found and "self_attn" in found[0]


# ---- outputs -------------------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(H, H), function

    def forward(self, x, z):
        return self.function(self.layer(x), z)


def joined(function, micro=MICRO):
    batch = {"x": torch.randn(ROWS, H), "z": torch.randn(ROWS, H)}
    return unjoined(*captured(Outputs(function), batch, micro, training=False), micro)


OUTPUTS = {
    "similarities": (lambda u, v: u @ v.T, r"output .* has shape \(8, 8\) for the whole batch and \(2, 2\)"),
    "one behind the other": (lambda u, v: torch.cat([u, v]), "in another order"),
    "two of each": (lambda u, v: torch.stack([u, v]), r"has shape \(2, 8, 16\)"),
    "divided": (lambda u, v: u / len(u), "divided by their own length"),
    "length": (lambda u, v: (u, torch.full((), len(u))), "depends on the batch"),
    "mean": (lambda u, v: (u, v.mean(0)), "has no row for each"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be_put_together(name):
    function, why = OUTPUTS[name]
    found = joined(function)
    assert re.search(why, found), found
    assert "micro_batches=1" in found
    assert joined(function, micro=1) == ""


def test_outputs_that_can_be():
    assert joined(lambda u, v: (u, u * v, [v.sum(-1)], len(u))) == ""


# ---- what users see ------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, loss=None):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(H, H) for _ in range(4)), nn.Linear(H, 5)
        self.loss = loss

    def forward(self, x, y):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.loss(self, self.head(x), y)


def made(model, batch, micro=MICRO, **options):
    """The plain model, the pipeline, and the warnings of compiling it."""
    torch.manual_seed(0)
    model = model.double()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pm = autopar.compile(
            copy.deepcopy(model), "pp=2", example=batch, device="cpu", timeout=30, schedule="1f1b",
            micro_batches=micro, **options,
        )  # fmt: skip
    return model, pm, [str(w.message) for w in told if "micro-batch" in str(w.message)]


def doubles(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def guarded(m, o, y):
    n = (y != -100).sum()
    return F.cross_entropy(o, y, reduction="sum") / n.clamp(min=1) * (n > 0)


def guards():
    batch = doubles(pair())
    batch["y"][:2] = -100  # the first micro-batch has no label
    model, pm, told = made(Chain(guarded), batch)
    assert not told
    a, b = model(**batch), pm(**batch)
    a.backward(), b.backward()
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    plain = dict(model.named_parameters())
    for name, p in pm.named_parameters():
        torch.testing.assert_close(full(p.grad), plain[name].grad, rtol=1e-9, atol=1e-12, msg=name)


def sums():
    batch = doubles(pair())

    def loss(m, o, y):
        return F.cross_entropy(o, y, reduction="sum") + 1e-4 * m.head.weight.square().sum()

    _, pm, _ = made(Chain(loss), batch)
    with pytest.raises(BatchError, match="adds a sum over the rows of the batch"):
        pm(**batch)
    model, pm, _ = made(Chain(loss), batch, micro=1)
    torch.testing.assert_close(pm(**batch), model(**batch), rtol=1e-9, atol=0)


def unlike_terms():
    batch = doubles(pair())
    batch["y"][:2] = -100
    _, pm, _ = made(Chain(lambda m, o, y: F.cross_entropy(o, y) + o.square().mean()), batch)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            loss = pm(**batch)
            loss.backward()
    assert len([w for w in told if "divided by different counts" in str(w.message)]) == (dist.get_rank() == 0)
    assert loss.isfinite() and all(full(p.grad).isfinite().all() for p in pm.parameters())


def told():
    """Of rows that see each other, on rank 0, naming the op and its module; and nothing else of a model without any."""
    batch = doubles(sequences())
    _, _, messages = made(Seq(), batch)
    assert len(messages) == (dist.get_rank() == 0)
    for message in messages:
        assert "micro_batches=1" in message and "shared=" in message
        assert "module encoder.layers.0.self_attn" in message
    assert not made(Seq(), batch, micro=1)[2]
    assert not made(Seq(first=True), batch)[2]


def wholes():
    """Outputs in evaluation, and a number among them."""

    def rows_and_number(m, o, y):
        return F.cross_entropy(o, y), o, len(o)

    batch = doubles(pair())
    model, pm, _ = made(Chain(rows_and_number), batch)
    with torch.no_grad():
        for a, b in zip(model(**batch), pm(**batch)):
            torch.testing.assert_close(a, b)
    similar = Chain(lambda m, o, y: (F.cross_entropy(o @ o.T, torch.arange(len(o))), o @ o.T))
    model, pm, messages = made(similar, batch)
    assert len(messages) == (dist.get_rank() == 0)
    pm(**batch)[0].backward()
    with torch.no_grad():  # [rows, rows] of micro-batches cannot be put together: the batch is evaluated whole
        for a, b in zip(model(**batch), pm(**batch)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", [guards, sums, unlike_terms, told, wholes], ids=lambda f: f.__name__)
def test_as_users_see_it(two, case):
    two.run(case)


# ---- parts ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_of_values():
    torch.manual_seed(0)
    one, whole = captured(Made(classes), pair())
    rows = rows_of(one, whole, MICRO, [loss_of(whole)])
    at = {s.name: Value(whole.node(s.node), 0) for s in whole.sources}
    assert not rows.unlike(at["x"], S(0)) and rows.unlike(at["x"], R)
    assert not rows.unlike(at["layer.weight"], R)
    sums = [rows.scale(v) for v in rows.held if v.node.op == "call_function"]
    assert any(s == 1.0 for s in sums)
