"""`autopar plan` with an axis of stages, and `autopar simulate`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from autopar import cli
from autopar.pipeline.checks import check
from autopar.pipeline.table import from_csv
from autopar.plan import Plan

TARGET = (
    "hf:llama", "--batch", "8", "--seq", "16", "--set", "num_hidden_layers=2", "--set", "hidden_size=32",
    "--set", "intermediate_size=64", "--set", "num_attention_heads=4", "--set", "num_key_value_heads=2",
    "--set", "vocab_size=64",
)  # fmt: skip


def call(capsys, *words: object) -> tuple[int, str, str]:
    code = cli.main([str(w) for w in words])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    how = ["--mesh", "pp=2,dp=2", "--micro-batches", "4", "--schedule", "1f1b"]
    assert cli.main(["plan", *TARGET, *how, "-o", str(path)]) == 0
    return path


def test_a_plan_says_stages_and_schedule(capsys, plan):
    code, out, _ = call(capsys, "show", plan)
    assert code == 0
    assert "pipeline along pp: 1f1b, 4 micro-batches, 2 stages" in out
    assert "chosen: 1f1b, 4 micro-batches" in out
    loaded = Plan.load(plan)
    assert loaded.pipeline is not None and len(loaded.pipeline.starts) == 1
    assert Plan.from_json(loaded.to_json()) == loaded


def test_explain_says_why_stages_are_cut_so_and_where_things_are(capsys, plan):
    code, out, _ = call(capsys, "explain", plan)
    assert code == 0 and "pipeline along pp: 1f1b" in out and "chosen: 1f1b" in out
    code, out, _ = call(capsys, "explain", plan, "mlp.down_proj.weight")
    assert code == 0 and "in stage 0 (1), 1 (1)" in out and "dp=2" in out
    code, _, err = call(capsys, "top", plan)
    assert code == 2 and "pipeline stages along pp" in err


def test_simulate_draws_and_writes_the_table(capsys, plan, tmp_path):
    svg, trace, table = tmp_path / "t.svg", tmp_path / "t.json", tmp_path / "t.csv"
    code, out, _ = call(
        capsys, "simulate", plan, "--schedule", "zb-h1", "--svg", svg, "--trace", trace, "--csv", table, "--grid"
    )
    assert code == 0
    assert "zb-h1" in out and "step  rank 0" in out and "0F0" in out
    ElementTree.fromstring(svg.read_text())
    names = {e.get("name") for e in json.loads(trace.read_text())["traceEvents"]}
    assert any(str(n).startswith("1F") or n == "1F0" for n in names), names
    check(from_csv(table.read_text()), micro=4)


def test_simulated_seconds_are_those_of_the_plan(capsys, plan):
    code, out, _ = call(capsys, "simulate", plan, "--json")
    assert code == 0
    assert json.loads(out)["1f1b"]["step_s"] == pytest.approx(Plan.load(plan).predicted["step_s"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--schedule", "2f2b"), "no schedule is called '2f2b'; there are gpipe, 1f1b"),
        (("--schedule", "zb-v"), "schedule zb-v has 4 stages on 2 ranks, the plan is cut into 2"),
        (("--svg", "/nowhere/t.svg"), "cannot write /nowhere/t.svg"),
    ],
)
def test_bad_words(capsys, plan, words, text):
    code, _, err = call(capsys, "simulate", plan, *words)
    assert code == 2 and text in err


def test_a_plan_without_stages_cannot_be_simulated(capsys, tmp_path):
    path = tmp_path / "flat.json"
    assert call(capsys, "plan", *TARGET, "--mesh", "dp=2", "-o", path)[0] == 0
    code, _, err = call(capsys, "simulate", path)
    assert code == 2 and "the plan has no priced pipeline" in err


def test_words_for_pipelines_without_an_axis(capsys):
    code, _, err = call(capsys, "plan", *TARGET, "--mesh", "dp=2", "--micro-batches", "2")
    assert code == 2 and "mesh dp=2 has no axis 'pp'; add one" in err


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(("--mesh", "pp=2,dp=2", "--micro-batches", "4", "--schedule", "1f1b"), id="two axes"),
        pytest.param(
            ("--mesh", "pp=2", "--schedule", "zb-v", "--set", "num_hidden_layers=6", "--batch", "16"),
            id="two stages a rank",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_verify_proves_a_plan_with_stages(capsys, tmp_path, how):
    path = tmp_path / "plan.json"
    assert cli.main(["plan", *TARGET, *how, "-o", str(path)]) == 0
    capsys.readouterr()
    code, out, err = call(capsys, "verify", path)
    assert code == 0, out + err
    assert "equal to one device" in out and "pp=2" in out


@pytest.mark.slow
def test_verify_compares_batch_norms_that_train_with_the_same_micro_batches(capsys, tmp_path):
    """The plain model's see the whole batch, and move their statistics by it."""
    path = tmp_path / "plan.json"
    small = ("embedding_size=16", "hidden_sizes=[16,32,32,32]", "depths=[1,1,1,1]", "layer_type=basic")
    how = ("--batch", "8", "--mesh", "pp=2", "--micro-batches", "2", "--schedule", "1f1b")
    assert cli.main(["plan", "hf:resnet", *(x for s in small for x in ("--set", s)), *how, "-o", str(path)]) == 0
    capsys.readouterr()
    code, out, err = call(capsys, "verify", path)
    assert code == 0, out + err
    assert "batch norms see micro-batches" in out and "equal to one device" in out


def test_verify_refuses_what_no_plan_can_prove(capsys, tmp_path):
    path = tmp_path / "plan.json"
    how = ("--mesh", "pp=2", "--schedule", "paci", "--micro-batches", "4")
    assert cli.main(["plan", *TARGET, *how, "-o", str(path)]) == 0
    code, _, err = call(capsys, "verify", path)
    assert code == 2 and "stale by design" in err
