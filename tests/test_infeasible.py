"""What no plan fits: what is told of it, and that everything that is proposed in its place does fit."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar import cli, fixes
from autopar.errors import Fix, InfeasibleError
from tests.test_cli import MLP
from tests.test_host_search import HOSTED
from tests.zoo import ZOO


class Net(nn.Module):
    """A few layers of one width."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


class Wide(nn.Module):
    """One op whose result is far larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return (y.unsqueeze(0) * y.unsqueeze(1)).relu().sum((0, 1)).mean()


def refused(
    model: nn.Module, mesh: str, limit: float, rows: int = 64, width: int = 16, quick: bool = True, **options: Any
) -> Any:
    """The error, and how to plan again with a fix; quick: for a plan that fits, which need not be the quickest."""
    example = {"x": torch.randn(rows, width)}
    asked = {"mesh": mesh, "example": example, "memory_limit": limit, "device": "cpu", **options}
    with pytest.raises(InfeasibleError) as caught:
        autopar.plan(model, **{"fixes": 300.0, **asked})

    def again(fix: Fix) -> autopar.Plan:
        return autopar.plan(model, **{**asked, **fix.changes, "fixes": 0.0, "quick": quick})

    return caught.value, again


def check(error: InfeasibleError, again: Any, limit: float) -> dict[str, Fix]:
    """Every fix fits, as it is told; returns them by their words up to the first digit or quote."""
    assert error.limit == limit and error.least > limit and error.short == error.least - limit
    assert sum(error.memory.values()) == pytest.approx(error.least, abs=1)
    assert "\n  Nearest that fit: " in str(error) and not error.untried
    assert list(error.fixes) == sorted(error.fixes, key=lambda fix: fix.whole_s)
    for fix in error.fixes:
        plan = again(fix)
        within = autopar.options.parse_bytes(fix.changes.get("memory_limit", limit))
        assert plan.predicted["peak_bytes"] <= within, fix.what
        # It was solved in short: with more time, there may be a quicker plan, but no slower one.
        assert 0 < plan.predicted["step_s"] <= fix.step_s * (1 + 1e-9), fix.what
        assert fix.peak_bytes <= (within if "memory_limit=" in fix.what else limit), fix.what
        assert fix.what in str(error)
    return {re.split(r'[\d"]', fix.what)[0].strip(): fix for fix in error.fixes}


@pytest.fixture(scope="module")
def few():
    """One device, whose memory is a little too small for the activations."""
    kinds = {name: kind for name, kind in fixes.KINDS.items() if name != "more devices"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixes, "KINDS", kinds)
        error, again = refused(Net(), "dp=1", 30_000, quick=False)
    return error, check(error, again, 30_000)


def test_too_few_devices():
    error, again = refused(Net(width=32), "dp=1", 45_000, rows=8, width=32)
    found = check(error, again, 45_000)
    assert found["mesh dp="].changes == {"mesh": "dp=2"} and found["mesh dp="].command == "--mesh dp=2"


def test_what_is_told(few):
    error, found = few
    assert error.mesh == "dp=1" and error.step_s > 0
    assert found["memory_limit="].changes["memory_limit"] == fixes.readable(error.least)
    assert found["optimizer_class="].command == "--optimizer adafactor"
    assert re.search(
        r"no plan fits 30 kB per device on mesh dp=1; the best found needs 34\.4 kB, 4\.4 kB more\n"
        r"  \(parameters 3\.26 kB, optimizer 6\.55 kB, .*\)\.\n  Give at least 34400 bytes \(memory_limit\)\.\n"
        r"  Nearest that fit: \S.* \([\d.]+ ms a step, [\d.]+ kB; --\S+ .*\);\n    ",
        str(error),
    ), str(error)


def test_the_largest_batch_that_fits(few):
    """One row more does not."""
    error, found = few
    batch = found["a batch of"]
    rows = batch.changes["example"]["x"].shape[0]
    assert 32 < rows < 64 and batch.share == rows / 64 and batch.command == f"--batch {rows}"
    asked = {"mesh": "dp=1", "memory_limit": error.limit, "device": "cpu", "fixes": 0.0, "quick": True}
    with pytest.raises(InfeasibleError):
        autopar.plan(Net(), **asked, host_state=False, example={"x": torch.randn(rows + 1, 16)})


def test_gradients_that_are_added_up_leave_room_for_themselves(few):
    error, _ = few
    (halves,) = [fix for fix in error.fixes if "added up" in fix.what]
    assert halves.changes["example"]["x"].shape[0] == 32 and halves.share == 0.5
    room = autopar.options.parse_bytes(halves.changes["memory_limit"])
    assert room + error.memory["parameters"] <= error.limit


@pytest.mark.slow
def test_gradients_that_are_added_up_keep_optimizer_state_here(monkeypatch):
    """With it on the host every backward is a step: that is for smaller batches only."""
    monkeypatch.setattr(fixes, "KINDS", {"a smaller batch": fixes.smaller_batches})
    error, again = refused(Net(), "dp=1", 22_000, device=HOSTED)
    check(error, again, 22_000)
    (smaller,) = [fix for fix in error.fixes if "a batch of" in fix.what]
    (parts,) = [fix for fix in error.fixes if "added up" in fix.what]
    assert again(smaller).on_host and not again(parts).on_host
    assert parts.changes["host_state"] is False and parts.command.endswith(" --no-host-state")


def test_less_than_the_parameters(monkeypatch):
    """Nothing that leaves the parameters where they are is proposed."""
    names = ("more devices", "a smaller batch", "another optimizer")
    monkeypatch.setattr(fixes, "KINDS", {name: fixes.KINDS[name] for name in names})
    error, again = refused(Net(width=32, depth=4), "dp=1", 16_000, rows=8, width=32)
    assert error.memory["parameters"] > error.limit
    found = check(error, again, 16_000)
    assert "a batch of" not in found and "optimizer_class=" not in found
    assert found["mesh dp="].changes["mesh"] in ("dp=4", "dp=8")


def test_one_op_alone_is_larger():
    error, again = refused(Wide(), "dp=1", 50_000, width=8)
    assert re.search(r"\n  fwd:\S+ alone makes 131 kB on a rank, as finely as it can be cut here\.", str(error))
    found = check(error, again, 50_000)
    assert found["a batch of"].changes["example"]["x"].shape[0] < 64


def test_recomputation_that_was_forbidden(monkeypatch):
    monkeypatch.setattr(fixes, "KINDS", {"keeping less": fixes.keeping_less})
    model, batch = ZOO["gpt2"](seed=0)
    free = autopar.plan(model, "dp=1", example=batch, device="cpu").predicted["peak_bytes"]
    kept = {"recompute": False, "host_state": False, "offload": False}
    with pytest.raises(InfeasibleError) as caught:
        autopar.plan(model, "dp=1", example=batch, device="cpu", memory_limit=int(0.9 * free), **kept)
    (fix,) = [fix for fix in caught.value.fixes if "recompute" in fix.changes]
    kept.update(fix.changes)
    found = autopar.plan(model, "dp=1", example=batch, device="cpu", memory_limit=int(0.9 * free), **kept)
    assert found.saved and found.predicted["peak_bytes"] <= 0.9 * free


def test_a_constraint_that_binds(monkeypatch):
    monkeypatch.setattr(fixes, "KINDS", {"fewer constraints": fixes.fewer_constraints})
    pins = {"*": "replicate", "layers.0.bias": "shard(0, dp)"}
    error, again = refused(Net(width=64, depth=2), "dp=2", 100_000, rows=4, width=64, constraints=pins)
    found = check(error, again, 100_000)
    assert found["without the constraint *=replicate"].changes == {"constraints": {"layers.0.bias": "shard(0, dp)"}}
    assert "under these constraints" in str(error)


def test_a_pipeline_says_what_its_stages_hold():
    error, again = refused(Net(depth=4), "pp=2", 28_000, micro_batches=2, schedule="gpipe")
    assert len(error.stages) == 2 and set(error.memory) == {"static", "saved", "pending", "transient"}
    elements = sum(p.numel() for p in Net(depth=4).parameters())
    assert sum(stage["parameters"] for stage in error.stages) == 4 * elements
    assert all(stage["gradients"] == stage["parameters"] for stage in error.stages)
    assert all(stage["optimizer"] >= 2 * stage["parameters"] for stage in error.stages)
    assert re.search(r"\n  stage 0: parameters [\d.]+ kB, gradients .*\n  stage 1: ", str(error))
    assert max(sum(stage.values()) for stage in error.stages) == pytest.approx(error.least, abs=1)
    found = check(error, again, 28_000)
    assert "micro_batches left open" in found, error
    assert found["memory_limit="].step_s > 0


def test_a_table_of_ones_own_says_it_too(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    error, _ = refused(Net(depth=4), "pp=2", 1_000, schedule=path, fixes=0.0)
    assert error.least > error.limit == 1_000 and error.step_s > 0 and error.mesh == "pp=2"


def test_sequences_of_tokens_may_be_shorter(monkeypatch):
    """Where the batch is of integers of one length; floats of that shape are not cut."""
    monkeypatch.setattr(fixes, "KINDS", {"shorter sequences": fixes.shorter_sequences})

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(16, 32), nn.Linear(32, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.out(self.table(ids))).square().mean()

    example = {"ids": torch.randint(16, (4, 64))}
    asked: dict[str, Any] = {"mesh": "dp=1", "memory_limit": 80_000, "device": "cpu"}
    with pytest.raises(InfeasibleError) as caught:
        autopar.plan(Tokens(), **asked, example=example)
    (fix,) = [fix for fix in caught.value.fixes if "tokens" in fix.what]
    seq = fix.changes["example"]["ids"].shape[1]
    assert seq < 64 and fix.command == f"--seq {seq}" and fix.share == seq / 64
    assert autopar.plan(Tokens(), **{**asked, **fix.changes}).predicted["peak_bytes"] <= 80_000
    assert not [fix for fix in refused(Net(), "dp=1", 30_000)[0].fixes if "tokens" in fix.what]


def test_no_time_for_fixes():
    error, _ = refused(Net(), "dp=1", 30_000, fixes=0.0)
    assert error.fixes == () and "Nearest" not in str(error)
    error, _ = refused(Net(), "dp=1", 30_000, fixes=1e-9)
    assert [fix.what.split("=")[0] for fix in error.fixes] == ["memory_limit"]
    assert set(error.untried) == set(fixes.KINDS) and "There was no time to try all of" in str(error)


def test_a_kind_of_change_is_one_function(monkeypatch):
    """It is sent what came of each of its candidates."""
    sent: list[Fix | None] = []

    def mine(question: fixes.Question) -> fixes.Kind:
        assert isinstance(question.given, Mapping)
        sent.append((yield fixes.Candidate("no mesh at all", {"mesh": "dp=0"})))
        sent.append((yield fixes.Candidate("all the memory", {"memory_limit": "1GB"}, "--memory 1GB", raises=True)))

    monkeypatch.setattr(fixes, "KINDS", {"mine": mine})
    error, _ = refused(Net(), "dp=1", 30_000)
    assert sent[0] is None and sent[1] in error.fixes and sent[1].peak_bytes > 30_000


def test_compile_proposes_too(monkeypatch):
    monkeypatch.setattr(fixes, "KINDS", {"another optimizer": fixes.other_optimizers})
    example = {"x": torch.randn(64, 16)}
    with pytest.raises(InfeasibleError) as caught:
        autopar.compile(Net(), "dp=1", example=example, memory_limit=30_000, device="cpu")
    (fix,) = [fix for fix in caught.value.fixes if "optimizer_class" in fix.changes]
    pm = autopar.compile(Net(), "dp=1", example=example, device="cpu", **{"memory_limit": 30_000, **fix.changes})
    assert pm.plan.predicted["peak_bytes"] <= 30_000


def test_the_command_line_says_what_to_type(capsys, tmp_path):
    (tmp_path / "net.py").write_text(MLP)
    plan = ["plan", f"{tmp_path / 'net.py'}:build", "--mesh", "dp=1", "--json", "--no-host-state"]
    assert cli.main([*plan, "--memory", "4kB"]) == 1
    told = capsys.readouterr().err
    (typed,) = re.findall(r'memory_limit="\S+" \(.*?; (--memory \S+?)\)', told)
    assert cli.main([*plan, *shlex.split(typed)]) == 0
    size = autopar.Plan.from_json(capsys.readouterr().out).predicted["peak_bytes"]
    assert 4_000 < size <= autopar.options.parse_bytes(typed.split()[1])


@pytest.mark.parametrize(
    ("amount", "up", "down"),
    [(0.5, "1", "0"), (999, "999", "999"), (34_400, "34.4kB", "34.4kB"), (34_401, "34.5kB", "34.4kB"),
     (12_683_411_092, "12.7GB", "12.6GB"), (7.0e12 + 1, "7001GB", "7000GB")],
)  # fmt: skip
def test_sizes_are_rounded_to_what_can_be_typed(amount, up, down):
    assert (fixes.readable(amount), fixes.readable(amount, down=True)) == (up, down)
    assert autopar.options.parse_bytes(up) >= amount >= autopar.options.parse_bytes(down)
