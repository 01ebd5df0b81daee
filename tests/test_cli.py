"""The command line: what it prints, its exit codes, and the words for bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from autopar import cli, verify
from autopar.errors import ConstraintError
from autopar.mesh import Mesh
from autopar.plan import Plan
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


@pytest.mark.tiny
def test_help_reads_well(capsys):
    for argv in (["--help"], ["plan", "--help"], ["show", "--help"], ["verify", "--help"]):
        code, out, _ = run(capsys, *argv)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 120
    _, out, _ = run(capsys, "plan", "--help")
    assert "autopar plan hf:llama" in out and "file.py:function" in out


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "autopar", "show", "missing.json"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("autopar: PlanError: cannot read plan missing.json")
