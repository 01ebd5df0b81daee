"""The formula of a plan: equal to the price at the plan's own sizes, and at sizes that it was not made from."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from autopar.capture import capture
from autopar.costmodel.devices import DEVICES
from autopar.costmodel.formula import RANKS, _over_ranks, collective, formula
from autopar.costmodel.planner import plan
from autopar.costmodel.price import price
from autopar.errors import MeshError, PlanError
from autopar.mesh import Mesh

BATCH, SEQ = 8, 32


class Attention(nn.Module):
    """Tokens, attention (quadratic in the sequence), a vocabulary: every kind of term."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 64)

    def forward(self, ids, labels):
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@functools.cache
def at(batch: int, seq: int):
    ids = torch.zeros(batch, seq, dtype=torch.long)
    return capture(Attention(), (), {"ids": ids, "labels": ids})


CASES = {
    "free": {},
    "dp": {"dp": "zero3", "tp": "replicate"},
    "zero3 and tp": {"dp": "zero3", "tp": "tp"},
    "zero1 and tp_sp": {"dp": "zero1", "tp": "tp_sp"},
}


@functools.cache
def made(case: str):
    found = plan(at(BATCH, SEQ), Mesh.parse("dp=2,tp=2"), device="h100", constraints=CASES[case])
    return found, formula(at, found, BATCH, SEQ, "h100")


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_price(case):
    found, made_ = made(case)
    right = price(at(BATCH, SEQ), found, "h100")
    here = made_.at()
    assert here["serial_s"] == pytest.approx(right.step_s, rel=1e-6)
    assert here["seconds"]["compute"] == pytest.approx(right.compute_s, rel=1e-6)
    assert here["seconds"]["optimizer"] == pytest.approx(right.update_s, rel=1e-6)
    assert {k: v for k, v in here["memory"].items() if v} == pytest.approx({k: v for k, v in right.memory.items() if v})
    # Strides are taken to follow the sizes, and said to; the plan as it is written moves more elsewhere.
    strided = any("strides" in note for note in made_.notes)
    assert made_.checked is not None and (strided or made_.checked < 1e-4)  # lookups, see below


def test_equal_to_the_price_at_other_sizes():
    found, made_ = made("dp")
    for batch, seq in ((16, 64), (4, 16), (40, 32)):
        other = at(batch, seq)
        right = price(other, found.__class__(**{**found.__dict__, "fingerprint": other.fingerprint}), "h100")
        # A lookup reads at most what it writes, which is no polynomial, and is said.
        assert made_.at(batch, seq)["serial_s"] == pytest.approx(right.step_s, rel=1e-4)


def test_equal_to_the_price_on_another_mesh():
    """The same decisions on more ranks: the axes are symbols too."""
    found, made_ = made("zero3 and tp")
    wider = Mesh.parse("dp=4,tp=4")
    right = price(at(BATCH, SEQ), found.__class__(**{**found.__dict__, "mesh": wider}), "h100")
    here = made_.at(dp=4, tp=4)
    assert here["serial_s"] == pytest.approx(right.step_s, rel=1e-4)
    assert here["memory"]["parameters"] == pytest.approx(right.memory["parameters"])
    assert "activations" not in here["memory"]  # holds for the plan's own mesh only, and is not made up
    with pytest.raises(MeshError, match="no axis 'pp'"):
        made_.at(pp=2)


def test_the_plain_form_has_the_same_value_and_no_maximum():
    _, made_ = made("free")
    text = str(made_.plain(made_.step))
    assert "Max" not in text and "B" in text
    values = made_.values(BATCH, SEQ, made_.mesh)
    assert float(made_.plain(made_.step).subs(values)) == pytest.approx(made_.at()["serial_s"], rel=1e-6)


def test_collectives_are_asked_of_the_cost_model():
    import sympy

    kind = collective(DEVICES["h100"], "all_reduce")
    assert float(kind.sent(sympy.Integer(8))) == pytest.approx(2 * 7 / 8)
    assert float(kind.rounds(sympy.Integer(8))) == pytest.approx(6)
    with pytest.raises(PlanError, match="no combination"):
        _over_ranks("strange", [float(p**2) for p in RANKS])


def test_what_is_no_formula_is_said():
    found, _ = made("free")
    with pytest.raises(PlanError, match="too short"):
        formula(at, found, BATCH, 6, "h100")
    with pytest.raises(PlanError, match="another program at batch 16"):
        formula(lambda b, s: at(b, s) if b == BATCH else other(), found, BATCH, SEQ, "h100")


def other():
    return capture(nn.Linear(4, 4), (torch.zeros(4, 4),))
