"""Golden text: what a plan looks like to a reader."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar import report
from autopar.mesh import Mesh
from autopar.plan import Plan, Storage
from autopar.rule import WHOLE, Choice
from autopar.spec import R, S

pytestmark = pytest.mark.tiny

ROWS, COLUMNS, INNER = Choice("i"), Choice("j"), Choice("k")


def small_plan() -> Plan:
    """Two layers under data parallel with ZeRO-3 on dp, tensor parallel on tp."""
    layer = {
        "q_proj": ((ROWS, COLUMNS), (S(0), S(0))),
        "k_proj": ((ROWS, COLUMNS), (S(0), S(0))),
        "o_proj": ((ROWS, INNER), (S(0), S(1))),
    }
    choices = {"fwd:model.embed/embedding#0": (Choice("a"), Choice("v"))}
    storage = {"model.embed.weight": Storage((S(1), S(0)), "twice")}
    for name, (row, _) in layer.items():
        choices[f"fwd:model.layers.*.{name}/mm#0"] = row
        choices[f"fwd:model.layers.*.{name}/view#0"] = (Choice("a"), WHOLE)
        choices[f"bwd:model.layers.*.{name}/mm#0"] = (INNER, COLUMNS)
    choices["fwd:model.layers.*/add.Tensor#0"] = (Choice("a"), Choice("b"))
    for i in range(2):
        storage |= {f"model.layers.{i}.{name}.weight": Storage(spec, "twice") for name, (_, spec) in layer.items()}
        storage[f"model.layers.{i}.norm.weight"] = Storage((R, R), "once", "all_reduce")
    return Plan(
        mesh=Mesh.parse("dp=2,tp=4"),
        fingerprint="",
        choices=choices,
        storage=storage,
        inputs={"input_ids": (S(0), R)},
        outputs={"loss": (R, R)},
        predicted={
            "step_s": 0.0123,
            "compute_s": 0.01,
            "comm_s": 0.0021,
            "update_s": 0.0002,
            "memory": {"parameters": 2.5e9, "activations": 12e6, "buffers": 0},
            "peak_bytes": 2.512e9,
            "collectives": {"all_gather": 12, "all_reduce": 3},
            "device": "h100",
        },
        solver={"status": "optimal", "gap": 0.001},
        target={"text": "hf:llama"},
        notes=("aten.foo is whole on every axis: it has no rule",),
    )


GOLDEN = """\
Plan of hf:llama on dp=2,tp=4 (8 devices)
dp: data + ZeRO-3, tp: tensor
solver: optimal, gap 0.1 %
inputs: input_ids [dp]; outputs: loss whole
module                dp=2 splits   tp=4 splits                   parameters are stored
────────────────────────────────────────────────────────────────────────────────────────────────────
model.embed           batch         vocabulary, then summed       weight: dim 0 over tp, dim 1 over
                                                                  dp, gathered again for backward
model.layers.* (x2)   batch         sequence                      -
  {q_proj, k_proj}    tokens        output features               weight: dim 0 over dp and tp,
                                                                  gathered again for backward
  o_proj              tokens        input features, then summed   weight: dim 0 over dp, dim 1 over
                                                                  tp, gathered again for backward
  norm                -             -                             weight: whole
predicted step on h100: 12.3 ms = compute 10 ms + communication 2.1 ms + optimizer 200 us
predicted memory per rank: 2.51 GB (parameters 2.5 GB, activations 12 MB)
collectives per step: 12 all_gather, 3 all_reduce
note: aten.foo is whole on every axis: it has no rule
"""


def test_show():
    assert report.text(report.show(small_plan())) == GOLDEN


def test_a_plan_without_figures_shows_too():
    bare = Plan(Mesh.parse("dp=2"), "", {}, {})
    text = report.text(report.show(bare))
    assert text.startswith("Plan on dp=2 (2 devices)\ndp: whole\n")
    assert "predicted" not in text


@pytest.mark.parametrize(
    ("op", "choice", "words"),
    [
        ("mm", WHOLE, "-"),
        ("mm", INNER, "input features, then summed"),
        ("mm", Choice("j", 3), "output features (in 3 blocks)"),
        ("view", Choice("c"), "view c"),
        ("add.Tensor", Choice(through=0), "partial sums pass"),
        ("_scaled_dot_product_flash_attention_for_cpu", Choice("h"), "heads"),
        ("bmm", Choice("b"), "batch x heads"),
    ],
)
def test_choice_words(op, choice, words):
    assert report.choice_words(op, choice) == words


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        (Storage((R, R)), "whole"),
        (Storage((S(0), R)), "dim 0 over dp"),
        (Storage((S(1), S(1)), "twice"), "dim 1 over dp and tp, gathered again for backward"),
        (Storage((R, S(0)), "once", "all_reduce"), "dim 0 over tp, gradient all-reduced"),
        (Storage((R, S(0)), state="host"), "dim 0 over tp, optimizer state on the host"),
        (Storage((R, R), state="host"), "whole, optimizer state on the host"),
    ],
)
def test_storage_words(storage, words):
    assert report.storage_words(storage, ("dp", "tp")) == words


def test_units():
    assert [report.seconds(x) for x in (0, 2.5, 0.0123, 4e-6, 5e-9)] == ["0 s", "2.5 s", "12.3 ms", "4 us", "5 ns"]
    assert [report.bytes_(x) for x in (0, 512, 80e9, 1.5e12, 3.2e6)] == ["0 B", "512 B", "80 GB", "1.5 TB", "3.2 MB"]
    assert [report.bytes_(x) for x in (999, 999_499_999, 999_600_000)] == ["999 B", "999 MB", "1 GB"]


def test_glossary_names_factors_of_the_rule_table():
    """The words are for the factors that the rules of these ops really have."""
    import torch
    from torch import fx

    from autopar.costmodel.rules import rule_for

    aten = torch.ops.aten
    calls = {
        aten.mm.default: [(4, 6), (6, 8)],
        aten.bmm.default: [(2, 4, 6), (2, 6, 8)],
        aten.embedding.default: [(8, 6), (2, 4)],
    }
    for op, shapes in calls.items():
        graph = fx.Graph()
        operands = []
        for shape in shapes:
            node = graph.placeholder("x")
            dtype = torch.int64 if op is aten.embedding.default and len(operands) == 1 else torch.float32
            node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
            operands.append(node)
        call = graph.call_function(op, tuple(operands))
        call.meta["val"] = op(*(n.meta["val"] for n in operands))
        stem = op.__name__.partition(".")[0]
        assert set(rule_for(call).rule.factors) <= set(report.FACTORS[stem]), stem


def test_a_searched_plan_lists_the_other_meshes():
    tried = [
        {"mesh": "dp=2,tp=4", "step_s": 0.010, "peak_bytes": 5e9},
        {"mesh": "dp=8", "step_s": 0.0125, "peak_bytes": 7e9},
        {"mesh": "dp=4,tp=2", "reason": "does not fit by 2 GB"},
    ]
    plan = replace(small_plan(), predicted={"step_s": 0.010}, solver={"meshes": tried})
    lines = report.text(report.show(plan)).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("mesh tried"))
    rows = [line.split() for line in lines[head + 2 : head + 5]]
    assert rows[0] == ["dp=2,tp=4", "10", "ms", "5", "GB", "chosen"]
    assert rows[1] == ["dp=8", "12.5", "ms", "+2.5", "ms", "7", "GB"]
    assert rows[2] == ["dp=4,tp=2", "-", "-", "-", "does", "not", "fit", "by", "2", "GB"]
    assert "mesh tried" not in report.text(report.show(small_plan()))
