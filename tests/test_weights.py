"""Weights of micro-batches: the weighted sum of their losses is the loss of the batch, or the user is told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar.capture import capture
from autopar.costmodel.rows import rows_of
from autopar.errors import BatchError
from autopar.pipeline.weights import divisors, weights

H = 16
LABELS = torch.tensor([-100, -100, 3, -100, 1, 0, 4, 2])


class Loss(nn.Module):
    """A layer, and a loss of logits and labels. `self.w`: a weight for every class."""

    def __init__(self, loss):
        super().__init__()
        self.layer, self.loss = nn.Linear(H, 5), loss
        self.register_buffer("w", torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0]))

    def forward(self, x, t):
        return self.loss(self, self.layer(x), t)


def kept(t):
    return (t != -100).double()


def likelihood(o, t):
    return (o.log_softmax(-1).gather(1, t.clamp(min=0)[:, None])[:, 0] * kept(t)).sum()


def summed(o, t):
    return F.cross_entropy(o, t, reduction="sum")


def guarded(o, t):
    n = (t != -100).sum()
    return summed(o, t) / n.clamp(min=1) * (n > 0)


def guarded_by_where(o, t):
    n = (t != -100).sum()
    return torch.where(n > 0, summed(o, t) / n.clamp(min=1), 0.0)


def penalty(m):
    return 0.01 * m.layer.weight.square().sum()


#: Losses of a batch whose micro-batches have unequally many labels.
EXACT = {
    "mean": lambda m, o, t: F.cross_entropy(o, t),
    "sum": lambda m, o, t: summed(o, t),
    "by elements": lambda m, o, t: o.square().mean(-1).mean(),
    "weighted": lambda m, o, t: F.cross_entropy(o, t, weight=m.w),
    "ignored label out of range": lambda m, o, t: F.cross_entropy(
        o, torch.where(t < 0, 255, t), weight=m.w, ignore_index=255
    ),
    "smoothed": lambda m, o, t: F.cross_entropy(o, t, label_smoothing=0.1),
    "smoothed and weighted": lambda m, o, t: F.cross_entropy(o, t, weight=m.w, label_smoothing=0.1),
    "negated": lambda m, o, t: -likelihood(o, t) / kept(t).sum(),
    "negated mean, guarded": lambda m, o, t: -(likelihood(o, t) / kept(t).sum().clamp(min=1)),
    "times a tensor": lambda m, o, t: m.w[3] * summed(o, t),
    "times a parameter": lambda m, o, t: F.cross_entropy(o, t) * m.layer.bias[0].exp() + m.layer.bias[0],
    "two sums": lambda m, o, t: summed(o, t) + 0.1 * o.square().sum(),
    "two means of labels": lambda m, o, t: (
        F.cross_entropy(o, t) - 0.1 * (o.square() * kept(t)[:, None]).sum() / kept(t).sum()
    ),
    "with a penalty": lambda m, o, t: F.cross_entropy(o, t) + penalty(m) + 0.5,
    "guarded": lambda m, o, t: guarded(o, t),
    "guarded by where": lambda m, o, t: guarded_by_where(o, t),
    "guarded, with a penalty": lambda m, o, t: guarded(o, t) + penalty(m),
    "guarded count, with a penalty": lambda m, o, t: -likelihood(o, t) / kept(t).sum().clamp(min=1) + penalty(m),
    "rows divided by their number": lambda m, o, t: (o.square().sum(-1) / len(o)).sum(),
    "divided by a tensor of their number": lambda m, o, t: o.square().sum() / torch.full((), float(len(o))),
    "columns first": lambda m, o, t: (o.sum(0) * m.w).sum(),
    "columns' means first": lambda m, o, t: (o.mean(0) * m.w).sum(),
    "a product": lambda m, o, t: torch.einsum("ij,ij->", o, o.tanh()),
}
#: No weights make these exact: why.
UNLIKE = {
    "means over labels and elements": (
        lambda m, o, t: F.cross_entropy(o, t) + 0.1 * o.square().mean(), "divided by different counts"
    ),
    "a share of rows": (lambda m, o, t: o.square().mean() * (t > 2).double().mean(), "left out"),
}  # fmt: skip
#: A sum and what is none.
REFUSED = {
    "sum with a penalty": lambda m, o, t: summed(o, t) + penalty(m),
    "sum with a mean": lambda m, o, t: summed(o, t) + o.square().mean(),
    "sum with a mean of labels": lambda m, o, t: F.cross_entropy(o, t) + o.square().sum(),
    "sum with a root": lambda m, o, t: summed(o, t) + o.square().mean().sqrt(),
    "all divided": lambda m, o, t: (summed(o, t) + penalty(m)) / len(o),
}
#: No sum over the batch.
NONE = {
    "of a mean over the batch": lambda m, o, t: o.mean(0).square().sum(),
    "root": lambda m, o, t: o.square().mean().sqrt(),
    "row": lambda m, o, t: o.sum(1)[0],
}


def weighed(loss, labels=LABELS):
    """Weights for 4 micro-batches, or None; the micro-batches' losses, and the batch's."""
    torch.manual_seed(0)
    model, batch, micro = Loss(loss).double(), {"x": torch.randn(8, H).double(), "t": labels}, 4
    parts = [{k: v.chunk(micro)[i] for k, v in batch.items()} for i in range(micro)]
    whole, one = (capture(model, (), b) for b in (batch, parts[0]))
    name = one.of_kind("tangent")[0].name
    held = rows_of(one, whole, micro, [s for s in whole.sinks if s.kind == "output"])
    found = divisors(one, whole, name, micro, held.scale)
    if found is None:
        return None, None, None
    return weights(found, parts, batch, {"w": model.w}), [model(**p) for p in parts], model(**batch)


def together(found, parts):
    return sum(w * part for w, part in zip(found.values, parts) if w)


@pytest.mark.parametrize("name", EXACT)
def test_weighted_losses_are_the_loss_of_the_batch(name):
    found, parts, whole = weighed(EXACT[name])
    assert found is not None and not found.inexact
    torch.testing.assert_close(together(found, parts), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", UNLIKE)
def test_terms_that_ask_for_different_weights_are_told_of_and_never_nan(name):
    loss, why = UNLIKE[name]
    found, parts, _ = weighed(loss)
    assert why in found.inexact and "micro_batches=1" in found.inexact
    assert together(found, parts).isfinite()


@pytest.mark.parametrize("name", REFUSED)
def test_a_sum_and_what_is_none_are_refused(name):
    with pytest.raises(BatchError, match=r"adds a sum over the rows of the batch \(fwd:.*micro_batches=1"):
        weighed(REFUSED[name])


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_sum_over_the_batch_has_no_divisor(name):
    assert weighed(NONE[name]) == (None, None, None)


def test_a_micro_batch_without_labels_counts_for_nothing():
    assert weighed(EXACT["mean"])[0].values == [0.0, 0.2, 0.4, 0.4]
    assert weighed(EXACT["guarded"])[0].values == [0.0, 0.2, 0.4, 0.4]


def test_a_batch_without_labels_is_what_it_is_for_the_plain_module():
    none = torch.full_like(LABELS, -100)
    found, parts, whole = weighed(EXACT["mean"], none)
    assert whole.isnan() and together(found, parts).isnan()
    found, parts, whole = weighed(EXACT["guarded"], none)
    assert whole == 0 and together(found, parts) == 0 and not found.inexact
