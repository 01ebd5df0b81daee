"""The command line: what it prints, its exit codes, and the words for bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from autopar import cli, verify
from autopar.errors import ConstraintError
from autopar.mesh import Mesh
from autopar.plan import Plan, Storage
from autopar.spec import R
from autopar.verify import Certificate, Row
from tests.test_plan import small_plan

MLP = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x, y):
        return (self.down(self.up(x).relu()) - y).square().mean()

def build(batch):
    return Net(), {"x": torch.randn(batch, 8), "y": torch.randn(batch, 8)}
"""


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command line."""
    try:
        code = cli.main(argv)
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def mlp(tmp_path):
    (tmp_path / "net.py").write_text(MLP)
    return f"{tmp_path / 'net.py'}:build"


@pytest.mark.tiny
def test_plan_show_and_json(capsys, mlp, tmp_path):
    out_file = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", mlp, "--mesh", "dp=2", "--batch", "4", "-o", str(out_file))
    assert code == 0
    assert out.startswith(f"Plan of {mlp} on dp=2 (2 devices)\n")
    assert f"written to {out_file}" in out
    plan = Plan.load(out_file)
    assert (plan.mesh, plan.target["text"], plan.target["batch"]) == (Mesh.parse("dp=2"), mlp, 4)

    code, shown, _ = run(capsys, "show", str(out_file))
    assert code == 0
    assert shown.rstrip() in out

    code, text, _ = run(capsys, "show", str(out_file), "--json")
    assert code == 0
    data = json.loads(text)
    assert data["mesh"] == "dp=2"
    assert {"up", "down"} <= {layer["module"] for layer in data["layers"]}

    code, text, _ = run(capsys, "plan", mlp, "--mesh", "2", "--batch", "4", "--json")
    assert code == 0
    assert Plan.from_json(text).mesh == Mesh.parse("dp=2")


def test_constraints_are_obeyed(capsys, mlp, tmp_path):
    arguments = ["plan", mlp, "--mesh", "dp=2", "--batch", "4", "--json", "--constraint"]
    code, text, _ = run(capsys, *arguments, "dp=zero3")
    assert code == 0
    assert Plan.from_json(text).stored("up.weight").gather == "twice"
    code, text, _ = run(capsys, *arguments, "up.weight=shard(1, dp)")
    assert code == 0
    assert Plan.from_json(text).stored("up.weight").spec[0].dim == 1


def test_verify_proves_a_plan(capsys, mlp, tmp_path):
    out_file = tmp_path / "plan.json"
    pin = ["--constraint", "dp=zero3"]
    assert run(capsys, "plan", mlp, "--mesh", "dp=8", "--batch", "8", *pin, "-o", str(out_file))[0] == 0
    code, out, err = run(capsys, "verify", str(out_file), "--procs", "2", "--json")
    assert code == 0, err
    certificate = json.loads(out)
    assert certificate["equal"] is True
    assert (certificate["plan_mesh"], certificate["mesh"]) == ("dp=8", "dp=2")
    assert certificate["kept"] == certificate["total"] > 0
    assert [row["what"].split(",")[0] for row in certificate["rows"]] == [
        "loss",
        "gradients",
        "parameters and buffers after 3 AdamW steps",
    ]
    assert all(row["error"] < 1e-12 for row in certificate["rows"])


def test_what_is_decided_of_whole_plans_is_told(capsys, mlp, tmp_path):
    """In `diff`, where nothing else differs, and in `show --json`."""
    one, two = str(tmp_path / "one.json"), str(tmp_path / "two.json")
    assert run(capsys, "plan", mlp, "--mesh", "dp=2", "--batch", "4", "-o", one)[0] == 0
    low, saved = {"compute": "bf16", "reduce": "fp32"}, {"fwd:up/mm#0": "offload"}
    changed = {"compression": "bf16", "copies": 5, "optimizer": "lion", "precision": low, "saved": saved}
    before = {"compression": None, "copies": 2, "optimizer": "adamw", "precision": {}, "saved": {}}
    replace(Plan.load(one), **changed).save(two)
    code, out, _ = run(capsys, "diff", one, two, "--no-model", "--json")
    data = json.loads(out)
    assert code == 0 and not data["modules"]
    assert data["plan"] == {name: {"a": before[name], "b": value} for name, value in changed.items()}
    code, out, _ = run(capsys, "diff", one, two, "--no-model")
    told = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and "same decisions" not in out and "two.json waits on the host: up: mm" in told
    for line in ("copies to and from the host under way 2 5", "optimizer adamw lion",
                 "compression of gradients none bf16", "precision as the model is bf16, gradients added up in fp32"):
        assert line in told, out  # fmt: skip
    code, out, _ = run(capsys, "diff", one, one, "--no-model", "--json")
    assert json.loads(out)["plan"] == {}
    code, out, _ = run(capsys, "show", two, "--json")
    assert {name: json.loads(out)[name] for name in changed} == changed


# ---- questions about a plan ----------------------------------------------------------------------------------------


def test_questions_about_a_plan(capsys, mlp, tmp_path):
    """explain, diff, price, resolve and top, on one plan and an edited copy."""
    path, edited, again = (str(tmp_path / name) for name in ("plan.json", "edited.json", "again.json"))
    pin = ["--constraint", "dp=zero3"]
    assert run(capsys, "plan", mlp, "--mesh", "dp=2", "--batch", "4", *pin, "-o", path)[0] == 0

    code, out, err = run(capsys, "explain", path, "up.weight")
    assert code == 0, err
    assert out.startswith("up.weight: parameter, 16 x 8 float32\n  dp=2   chosen   dim 0 over dp, gathered again")
    assert "decided  you, by constraint dp=zero3" in out
    code, out, _ = run(capsys, "explain", path, "down", "--quick", "--json")
    data = json.loads(out)
    assert code == 0 and {s["name"] for s in data["subjects"]} >= {"down.weight", "fwd:down/mm#0"}
    axis = data["subjects"][0]["axes"]["dp"]
    assert {"chosen", "next", "barred", "alone", "decided"} <= set(axis) and axis["next"] is None
    assert {"step_s", "comm_s", "peak_bytes", "because"} <= set(axis["alone"][0])
    code, out, err = run(capsys, "explain", path, "up.wieght")
    assert (code, out) == (2, "") and "nothing in the plan is called 'up.wieght'; did you mean up.weight" in err

    plan = Plan.load(path)
    changed = replace(plan, storage={**plan.storage, "up.weight": Storage((R,))})
    changed.save(edited)
    code, out, _ = run(capsys, "price", edited, "-o", edited)
    assert code == 0 and out.rstrip().endswith(f"the plan is legal; written to {edited}")
    assert Plan.load(edited).predicted["step_s"] != plan.predicted["step_s"]
    code, out, _ = run(capsys, "price", edited, "--json")
    now = json.loads(out)
    assert code == 0 and now["now"]["comm_s"] == pytest.approx(now["was"]["comm_s"])

    code, out, _ = run(capsys, "diff", path, edited)
    assert code == 0 and "stored" in out and "time of a step" in out and "memory of a rank at the peak" in out
    code, out, _ = run(capsys, "diff", path, edited, "--no-model", "--json")
    assert [m["module"] for m in json.loads(out)["modules"]] == ["up"]
    code, out, _ = run(capsys, "diff", path, path, "--no-model")
    assert code == 0 and "the same decisions in every module" in out

    code, out, err = run(capsys, "resolve", edited, "--keep", "up.weight", "-o", again)
    assert code == 0, err
    assert out.startswith("1 decisions kept, the others chosen anew")
    assert Plan.load(again).stored("up.weight") == Storage((R,))

    code, out, err = run(capsys, "formula", path, "--at", "batch=8,dp=4")
    assert code == 0, err
    assert "  compute =" in out and "dp" in out and "checked at another batch" in out
    assert run(capsys, "formula", path, "--at", "batch")[2].startswith("autopar: PlanError: cannot read sizes 'batch'")

    code, out, err = run(capsys, "top", path, "--cost-of-constraints", "--json")
    assert code == 0, err
    assert [r["asked"] for r in json.loads(out)["others"]] == ["dp=zero3"]
    code, out, err = run(capsys, "top", path, "--most", "3")
    assert code == 0, err
    assert "chosen" in out and "why it lost" in out


def test_an_edited_plan_that_does_not_fit(capsys, mlp, tmp_path):
    path = str(tmp_path / "plan.json")
    assert run(capsys, "plan", mlp, "--mesh", "dp=2", "--batch", "4", "-o", path)[0] == 0
    plan = Plan.load(path)
    replace(plan, predicted={**plan.predicted, "memory_limit": 100}).save(path)
    code, out, _ = run(capsys, "price", path)
    assert code == 1 and "legal, but " in out and "over its limit" in out


def test_the_optimizer_is_in_the_plan(capsys, mlp, tmp_path):
    path = str(tmp_path / "plan.json")
    code, out, err = run(capsys, "plan", mlp, "--mesh", "dp=2", "--batch", "4", "--optimizer", "sgd", "-o", path)
    assert code == 0 and "optimizer: sgd" in out, err
    assert Plan.load(path).predicted["memory"]["optimizer"] == 0
    for command in ("price", "show", "explain"):
        code, out, err = run(capsys, command, path, *["up"] * (command == "explain"))
        assert code == 0, err
    priced = str(tmp_path / "priced.json")
    for command in (["price", path], ["resolve", path, "--keep", "up"]):
        assert run(capsys, *command, "-o", priced)[0] == 0
        assert Plan.load(priced).optimizer == "sgd" and Plan.load(priced).predicted["memory"]["optimizer"] == 0
    replace(Plan.load(path), optimizer="adamx").save(path)
    code, _, err = run(capsys, "price", path)
    assert code == 2 and "the plan is for optimizer 'adamx'; those known are adamw, " in err


def test_laws_and_compression_are_in_the_plan(capsys, mlp, tmp_path):
    path, again = str(tmp_path / "plan.json"), str(tmp_path / "again.json")
    words = ["--optimizer", "mine: 12*n", "--compression", "powersgd:1:1", "--constraint", "dp=ddp"]
    code, out, err = run(capsys, "plan", mlp, "--mesh", "dp=2", "--batch", "4", *words, "-o", path)
    assert code == 0 and "optimizer: mine: 12*n" in out and "gradients travel compressed: powersgd:1:1" in out, err
    plan = Plan.load(path)
    state = 12 * (2 * 8 * 16 + 8 + 16) + 4 * (2 * 8 * 16 + 8 + 16)  # besides: errors of two matrices, and two Q
    assert plan.predicted["memory"]["optimizer"] == state
    for command in (["price", path], ["resolve", path, "--keep", "up"]):
        code, _, err = run(capsys, *command, "-o", again)
        assert code == 0, err
        read = Plan.load(again)
        assert (read.optimizer, read.compression) == (plan.optimizer, plan.compression)
        assert read.predicted["memory"]["optimizer"] == state
    code, out, err = run(capsys, "verify", path)
    assert code == 0 and "compared with the plain model, without compression powersgd:1:1;" in out, err
    code, _, err = run(capsys, "plan", mlp, "--mesh", "dp=2", "--compression", "zip")
    assert code == 2 and "compression='zip' does not exist" in err


PAGE = Path(__file__).resolve().parent.parent / "docs" / "explain.md"
#: The page's model, small enough to be planned in seconds: what its commands say -> what is run.
TINY = {
    "hidden_size=4096": "hidden_size=32", "intermediate_size=14336": "intermediate_size=64",
    "num_attention_heads=32": "num_attention_heads=4", "num_key_value_heads=8": "num_key_value_heads=4",
    "vocab_size=128256": "vocab_size=64", "num_hidden_layers=32": "num_hidden_layers=1",
    "max_position_embeddings=8192": "max_position_embeddings=96", "dp=8,tp=8": "dp=2", "--constraint tp=tp": "",
    "--batch 32": "--batch 8", "--seq 8192": "--seq 96",
}  # fmt: skip


def test_commands_of_the_page_on_questions_run(capsys, tmp_path, monkeypatch):
    """Every command of docs/explain.md but the longest, in order, on a tiny Llama."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"(?m)^autopar (.+)$", PAGE.read_text(encoding="utf-8").replace("\\\n", " "))
    assert len({line.split()[0] for line in lines}) >= 6
    for line in lines:
        for big, small in TINY.items():
            line = line.replace(big, small)
        if not line.startswith("top"):  # a plan for every strategy; test_questions_about_a_plan runs it
            code, _, err = run(capsys, *shlex.split(line))
            assert code == 0, f"autopar {line}: {err}"
        if line.startswith("plan") and line.rstrip().endswith("megatron.json"):
            shutil.copy("plan.json", "edited.json")


# ---- verify notices ------------------------------------------------------------------------------------------------


def certificate(error: float) -> Certificate:
    rows = (Row("loss, 3 steps", 1e-16, "step 0"), Row("gradients, first step", error, "up.weight"))
    return Certificate("hf:llama", "dp=8", "dp=4", 1234, 7, 8, ("fwd:/mm#0",), "the plain model", rows, 3.0)


@pytest.mark.tiny
@pytest.mark.parametrize(("error", "code", "verdict"), [(1e-15, 0, "equal to"), (1e-3, 1, "NOT equal to")])
def test_verify_exit_code(capsys, monkeypatch, tmp_path, error, code, verdict):
    path = tmp_path / "plan.json"
    small_plan().save(path)
    monkeypatch.setattr(verify, "verify", lambda plan, **_: certificate(error))
    got, out, _ = run(capsys, "verify", str(path))
    assert got == code
    assert out.splitlines()[-1].startswith(verdict)
    assert "7 of 8 decisions run as planned" in out
    assert json.loads(run(capsys, "verify", str(path), "--json")[1])["equal"] is (code == 0)


@pytest.mark.tiny
def test_comparison_notices_what_differs():
    import torch

    ones = torch.ones(3, dtype=torch.float64)
    good = verify._Result([ones[0]], {"a": ones, "b": None, "zero": 0 * ones}, {"a": ones})
    assert all(row.equal for row in verify.compare(good, good))
    for grads in (
        {"a": ones * (1 + 1e-6), "b": None, "zero": 0 * ones},
        {"a": ones, "b": ones, "zero": 0 * ones},
        {"a": ones, "b": None},
        {"a": ones[:2], "b": None, "zero": 0 * ones},
        {"a": ones * float("nan"), "b": None, "zero": 0 * ones},
        {"a": ones, "b": None, "zero": 1e-3 * ones},
    ):
        bad = verify._Result([ones[0]], grads, {"a": ones})
        assert [row.equal for row in verify.compare(bad, good)] == [True, False, True], grads
    # No gradient and a zero gradient are the same; rounding of a zero gradient is not an error.
    fine = verify._Result([ones[0]], {"a": ones, "b": 0 * ones, "zero": 1e-17 * ones}, {"a": ones})
    assert all(row.equal for row in verify.compare(fine, good))


@pytest.mark.tiny
def test_widening():
    import torch

    with verify.Widen():
        x = torch.zeros(2, dtype=torch.float32)
        y = torch.zeros(2, dtype=torch.float64).to(torch.float32).float() + x
        z = torch.softmax(y, dim=0, dtype=torch.float32)
    assert x.dtype is y.dtype is z.dtype is torch.float64


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "hf:llama", "--mesh", "dp2"], "MeshError: cannot read mesh 'dp2': 'dp2' is not NAME=SIZE"),
        (["plan", "hf:lama", "--mesh", "dp=2"], "TargetError: transformers "),
        (["plan", "what", "--mesh", "dp=2"], "TargetError: cannot read target 'what'; write hf:CONFIG.json"),
        (["plan", "hf:llama", "--mesh", "dp=2", "--set", "x"], "TargetError: cannot read 'x': write KEY=VALUE"),
        (["plan", "hf:llama", "--mesh", "dp=2", "--constraint", "tp"], "ConstraintError: cannot read constraint 'tp'"),
        (
            ["plan", "hf:llama", "--mesh", "dp=2", "--memory", "lots"],
            "ConstraintError: cannot read memory limit 'lots",
        ),
        (["plan", "hf:llama", "--mesh", "dp=2", "-o", "no/such/p.json"], "PlanError: cannot write no/such/p.json: the"),
        (["show", "missing.json"], "PlanError: cannot read plan missing.json: "),
        (["explain", "missing.json", "x"], "PlanError: cannot read plan missing.json: "),
        (["verify", "missing.json"], "PlanError: cannot read plan missing.json: "),
    ],
)
def test_our_errors_are_one_line_on_stderr(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.splitlines()[-1].startswith("autopar: ")
    assert "Traceback" not in err


@pytest.mark.tiny
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["plan", "hf:llama"], "the following arguments are required: --mesh"),
        (["plan", "hf:llama", "--mesh", "dp=2", "--batch", "0"], "'0' is not a whole number above zero"),
        (["plan", "hf:llama", "--mesh", "dp=2", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_bad_usage(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.tiny
def test_plan_made_in_python_cannot_be_verified(capsys, tmp_path):
    path = tmp_path / "plan.json"
    Plan(Mesh.parse("dp=2"), "", {}, {}).save(path)
    code, _, err = run(capsys, "verify", str(path))
    assert code == 2
    assert "the plan does not say how to build its model: it was made in Python" in err


@pytest.mark.tiny
def test_no_plan_fits(capsys, mlp):
    code, out, err = run(capsys, "plan", mlp, "--mesh", "dp=2", "--batch", "4", "--memory", "1kB")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.tiny
def test_constraints_are_parsed():
    assert cli.parse_constraints(["dp=zero3", "*.weight=shard(0, tp)"]) == {"dp": "zero3", "*.weight": "shard(0, tp)"}
    with pytest.raises(ConstraintError, match=r"write AXIS=STRATEGY \(dp=zero3\)"):
        cli.parse_constraints(["dp="])


QUESTIONS = [[name, "--help"] for name in ("explain", "top", "diff", "price", "resolve", "formula")]


@pytest.mark.tiny
def test_help_reads_well(capsys):
    for argv in (["--help"], ["plan", "--help"], ["show", "--help"], ["verify", "--help"], *QUESTIONS):
        code, out, _ = run(capsys, *argv)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 120
    _, out, _ = run(capsys, "plan", "--help")
    assert "autopar plan hf:llama" in out and "file.py:function" in out


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "autopar", "show", "missing.json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("autopar: PlanError: cannot read plan missing.json")
