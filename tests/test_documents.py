"""The front door: public names, what the documents say and what make and the continuous integration run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import autopar
from autopar import cli
from tests.zoo import HF_ARCHITECTURES, UNSUPPORTED

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = [
    "AutoparError",
    "BatchError",
    "CaptureError",
    "Choice",
    "ConstraintError",
    "Fix",
    "InfeasibleError",
    "Mesh",
    "MeshError",
    "P",
    "PassError",
    "PipelineError",
    "Placement",
    "Plan",
    "PlanError",
    "R",
    "RankMismatchError",
    "Rule",
    "RuleError",
    "RuntimeUseError",
    "S",
    "ScheduleError",
    "SolverError",
    "SpecError",
    "Storage",
    "compile",
    "explain",
    "explain_plan",
    "frontier",
    "memory_timeline",
    "plan",
    "plan_model",
    "register_rule",
]


def test_public_names_are_frozen():
    """Names only come and go on purpose: change this list in the same commit, and say so in the README."""
    assert sorted(autopar.__all__) == PUBLIC
    assert [n for n in PUBLIC if not hasattr(autopar, n)] == []


def check_commands(text: str, targets: set[str]) -> list[str]:
    """Documented commands exist: make targets, and `autopar` command lines that the parser takes."""
    bad = [f"make {t}: no such target" for t in re.findall(r"(?m)(?:`|^\s*)make ([a-z-]+)", text) if t not in targets]
    for line in re.findall(r"(?m)^\s*(?:\$ )?autopar (.+)$", text.replace("\\\n", " ")):
        try:
            cli.parser().parse_args(shlex.split(line, comments=True))
        except SystemExit:
            bad.append(f"autopar {line}: not understood")
    return bad


def make_targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/explain.md"])
def test_documented_commands_exist(page):
    assert check_commands((ROOT / page).read_text(encoding="utf-8"), make_targets()) == []


def test_files_named_in_the_documentation_exist():
    for page in ("CONTRIBUTING.md", "docs/architecture.md", "docs/explain.md", "README.md"):
        named = re.findall(r"`([a-z_]+/[a-z_/]+\.(?:py|md))`", (ROOT / page).read_text(encoding="utf-8"))
        assert [n for n in named if not (ROOT / n).is_file()] == [], page


def test_command_checker_notices():
    text = "`make tea`\n    autopar plan hf:llama\n    autopar show plan.json\n    autopar fly\n"
    assert check_commands(text, {"test"}) == [
        "make tea: no such target",
        "autopar plan hf:llama: not understood",
        "autopar fly: not understood",
    ]


def test_every_target_of_make_is_helped():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    helped = set(re.findall(r"(?m)^([a-z-]+):.*## ", text))
    assert {"help", "setup", "demo", "test", "test-all", "check", "clean"} <= helped


def test_ci_runs_check_then_test():
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make check\nmake test")


def test_support_table_names_what_is_not_supported():
    """Every family that cannot be captured or planned stands in the README, with its reason."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name, reason in UNSUPPORTED.items() if f"| {name} | {reason} |" not in readme] == []
    assert [name for name in HF_ARCHITECTURES if not re.search(rf"\b{name}\b", readme)] == []
