"""The rules of the house. Each checker is also handed something broken, to show that it would notice."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "autopar": "autopar",
    "costmodel": "autopar.costmodel",
    "passes": "autopar.passes",
    "runtime": "autopar.runtime",
}
MAX_LINES = 500

# ---- who may import whom -------------------------------------------------------------------------------------------

#: The plain data: imported by everybody, importing nothing of ours but each other.
BASE = {
    f"autopar.{m}"
    for m in (
        "buffers", "collector", "errors", "units", "moments", "mesh", "spec", "rule", "graph", "plan", "ops", "linear",
        "reshard", "tree", "recompute", "offload", "compression", "precision", "together", "pipeline",
    )
}  # fmt: skip
#: Capture and its parts.
CAPTURE = {
    f"autopar.{m}"
    for m in (
        "capture", "assemble", "call", "canonical", "casting", "checks", "decompose", "decompose_random", "depth",
        "explain", "modes", "param_views", "programs", "repeat", "shared_memory", "symbolic",
    )
}  # fmt: skip
#: The rest of the front door, and what each may use besides the plain data.
FRONT = {
    "autopar": {"autopar.driver", "autopar.answers", "autopar.explain"},
    **dict.fromkeys(CAPTURE, CAPTURE),
    "autopar.options": {f"autopar.{m}" for m in ("call", "checks", "programs", "costmodel")},
    "autopar.driver": {
        f"autopar.{m}"
        for m in (
            "checks", "decide", "fixes", "given", "lowering", "options", "programs", "costmodel", "runtime", "stages",
            "stage_search", "precision_search",
        )
    },
    "autopar.given": {"autopar.costmodel", "autopar.options"},
    "autopar.precision_search": set(),
    "autopar.decide": {
        f"autopar.{m}"
        for m in (
            "costmodel", "fixes", "mesh_search", "options", "precision_search", "programs", "runtime", "stage_search",
        )
    },
    "autopar.fixes": {f"autopar.{m}" for m in ("call", "costmodel", "options", "programs")},
    "autopar.lowering": {f"autopar.{m}" for m in ("capture", "costmodel", "passes", "runtime")},
    "autopar.mesh_search": {f"autopar.{m}" for m in ("costmodel", "options", "stages", "stage_search")},
    "autopar.stages": {"autopar.capture", "autopar.costmodel", "autopar.passes", "autopar.runtime"},
    "autopar.proposals": {"autopar.costmodel"},
    "autopar.stage_bytes": {"autopar.costmodel", "autopar.proposals"},
    "autopar.stage_search": {f"autopar.{m}" for m in ("options", "costmodel", "proposals", "stage_bytes")},
    "autopar.report": set(),
    "autopar.report_pipeline": {"autopar.report"},
    "autopar.targets": set(),
    "autopar.shrink": {"autopar.targets"},
    "autopar.certificate": set(),
    "autopar.verify": {
        f"autopar.{m}"
        for m in (
            "certificate", "targets", "shrink", "decide", "driver", "given", "capture", "costmodel", "verify_stages",
        )
    },
    "autopar.verify_stages": {"autopar.costmodel", "autopar.stage_search"},
    "autopar.questions": {f"autopar.{m}" for m in ("capture", "costmodel", "decide", "given", "targets")},
    "autopar.words": {"autopar.costmodel", "autopar.questions", "autopar.report"},
    "autopar.answers": {
        f"autopar.{m}"
        for m in ("capture", "memory_picture", "options", "questions", "report", "tradeoff", "words")
    },
    "autopar.chart": set(),
    "autopar.live_bytes": {"autopar.capture", "autopar.runtime"},
    "autopar.memory_picture": {
        f"autopar.{m}"
        for m in (
            "capture", "chart", "costmodel", "driver", "given", "live_bytes", "options", "questions", "report",
            "report_pipeline", "runtime", "targets",
        )
    },
    "autopar.tradeoff": {f"autopar.{m}" for m in ("chart", "driver", "options", "programs", "report")},
    "autopar.cli_memory": {f"autopar.{m}" for m in ("cli_tools", "memory_picture", "tradeoff")},
    "autopar.cli_tools": {"autopar.report"},
    "autopar.cli_explain": {
        f"autopar.{m}" for m in ("cli_tools", "questions", "report", "report_pipeline", "words")
    },
    "autopar.cli_calibrate": {"autopar.costmodel", "autopar.runtime"},
    "autopar.cli_simulate": {"autopar.cli_memory", "autopar.cli_tools", "autopar.report_pipeline"},
    "autopar.cli": {
        "autopar.cli_calibrate",
        "autopar.cli_explain",
        "autopar.cli_memory",
        "autopar.cli_simulate",
        "autopar.cli_tools",
        "autopar.driver",
        "autopar.options",
        "autopar.report",
        "autopar.report_pipeline",
        "autopar.targets",
        "autopar.verify",
    },
    "autopar.__main__": {"autopar.cli"},
}
FOLDERS = ("autopar.costmodel", "autopar.passes", "autopar.runtime")


def allowed(module: str) -> set[str]:
    """Modules and packages of ours that `module` may import."""
    if any(_is_under(module, base) for base in BASE):
        return BASE
    for folder in FOLDERS:
        if module == folder or module.startswith(folder + "."):
            return BASE | {folder}
    return BASE | FRONT[module]


def module_name(path: str) -> str:
    """`passes/cancel.py` -> `autopar.passes.cancel`."""
    folder, *rest = Path(path).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(p for p in rest if p != "__init__")])


def sources(*folders: str) -> dict[str, str]:
    """Path from the root -> text, of every Python file in the folders."""
    return {
        str(f.relative_to(ROOT)): f.read_text(encoding="utf-8")
        for folder in folders
        for f in sorted((ROOT / folder).rglob("*.py"))
    }


CODE = tuple(PACKAGES)
ALL = (*CODE, "tests", "examples", "benchmarks")


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only the type checker sees."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _runtime_nodes(other)
            continue
        yield child
        yield from _runtime_nodes(child)


def imported(tree: ast.AST, *, typing_too: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported; `from a import b` gives `a.b`."""
    for node in ast.walk(tree) if typing_too else _runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, not relative"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(tree: ast.AST, root: str, *, typing_too: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every whole attribute chain that starts at the name `root`."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree) if typing_too else _runtime_nodes(tree):
        if id(node) in inner:
            continue
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if parts and isinstance(at, ast.Name) and at.id == root:
            yield node.lineno, ".".join([root, *reversed(parts)])


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


# ---- the checkers: files -> complaints -----------------------------------------------------------------------------


def check_directions(files: dict[str, str]) -> list[str]:
    """Import directions, by the table above."""
    bad = []
    for path, text in files.items():
        module = module_name(path)
        if module not in FRONT and not any(_is_under(module, m) for m in (*BASE, *FOLDERS)):
            bad.append(f"{path}: new module; say in tests/test_house.py what it may import")
            continue
        may = allowed(module)
        for line, name in imported(ast.parse(text), typing_too=False):
            if not _is_under(name, "autopar"):
                continue
            # `from autopar import spec` names a module, `from autopar.spec import R` something in one.
            known = [m for m in (*BASE, *FRONT, *FOLDERS) if _is_under(name, m)]
            target = max(known, key=len)
            if target != module and target not in may and not any(_is_under(target, m) for m in may if m != "autopar"):
                bad.append(f"{path}:{line}: {module} may not import {name}")
    return bad


def check_top_level_names(files: dict[str, str]) -> list[str]:
    """Nobody imports the folders by their bare names: installed, they do not exist."""
    return [
        f"{path}:{line}: import autopar.{name}, not {name}"
        for path, text in files.items()
        for line, name in imported(ast.parse(text))
        if name.split(".")[0] in ("passes", "costmodel", "runtime")
    ]


#: The classes of what `torch.ops` holds: torch has no public name for them.
OP_CLASSES = ("torch._ops.OpOverload",)


def check_private_torch(files: dict[str, str]) -> list[str]:
    """Private torch names only in autopar/capture.py; ops (`torch.ops.*`) are public by contract."""
    bad = []
    for path, text in files.items():
        if path == "autopar/capture.py":
            continue
        tree = ast.parse(text)
        for line, name in sorted({*imported(tree), *dotted(tree, "torch")}):
            parts = name.split(".")
            private = any(p.startswith("_") and not p.endswith("__") for p in parts[1:])
            if parts[0] == "torch" and parts[1:2] != ["ops"] and private and not name.startswith(OP_CLASSES):
                bad.append(f"{path}:{line}: {name} is private; only autopar/capture.py may use it")
    return bad


def check_only(files: dict[str, str], package: str, where: str) -> list[str]:
    """`package` is imported (or reached as an attribute) at run time only in files whose path matches `where`."""
    bad = []
    for path, text in files.items():
        if re.fullmatch(where, path):
            continue
        tree = ast.parse(text)
        names = {*imported(tree, typing_too=False), *dotted(tree, package.split(".")[0], typing_too=False)}
        bad += [
            f"{path}:{line}: {name}: only {where} may use {package}"
            for line, name in sorted(names)
            if _is_under(name, package)
        ]
    return bad


def check_no_local_imports(files: dict[str, str]) -> list[str]:
    """Imports stand at the top; only autopar/__init__.py imports the driver and the answers lazily."""
    bad = []
    for path, text in files.items():
        for outer in ast.walk(ast.parse(text)):
            if not isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for line, name in imported(outer):
                lazy = any(_is_under(name, m) for m in ("autopar.driver", "autopar.answers"))
                if not (path == "autopar/__init__.py" and lazy):
                    bad.append(f"{path}:{line}: import of {name} inside {outer.name}()")
    return bad


def check_docstrings(files: dict[str, str]) -> list[str]:
    """Every module, public class and public function says what it is."""
    bad = []
    for path, text in files.items():
        tree = ast.parse(text)
        if tree.body and not ast.get_docstring(tree):
            bad.append(f"{path}:1: module without docstring")
        for node in tree.body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                bad.append(f"{path}:{node.lineno}: {node.name} without docstring")
    return bad


def check_length(files: dict[str, str]) -> list[str]:
    """A file has one job; past 500 lines it has two."""
    lines = {path: text.count("\n") for path, text in files.items()}
    return [f"{path}: {n} lines, at most {MAX_LINES}; split it by job" for path, n in lines.items() if n > MAX_LINES]


def check_wheel(names: list[str]) -> list[str]:
    """Everything in the wheel lies under `autopar/` or its metadata."""
    bad = [
        f"{n}: lands in site-packages outside autopar/"
        for n in names
        if not re.match(r"autopar(-[^/]*\.dist-info)?/", n)
    ]
    wanted = [f"{p.replace('.', '/')}/__init__.py" for p in PACKAGES.values()] + ["autopar/py.typed"]
    return bad + [f"{w}: missing from the wheel" for w in wanted if w not in names]


# ---- the tree keeps them -------------------------------------------------------------------------------------------


def test_import_directions():
    assert check_directions(sources(*CODE)) == []


def test_nobody_imports_the_folders_by_bare_name():
    assert check_top_level_names(sources(*ALL)) == []


def test_private_torch_only_in_capture():
    assert check_private_torch(sources(*CODE)) == []


def test_pulp_only_in_the_ilp_file():
    assert check_only(sources(*CODE), "pulp", r"costmodel/ilp\.py") == []


def test_torch_distributed_only_in_runtime():
    assert check_only(sources(*CODE), "torch.distributed", r"runtime/.*") == []


def test_triton_only_in_kernels():
    assert check_only(sources(*CODE), "triton", r"passes/kernels/.*") == []


def test_no_imports_inside_functions():
    assert check_no_local_imports(sources(*CODE)) == []


def test_public_things_have_docstrings():
    assert check_docstrings(sources(*CODE)) == []


def test_files_are_short():
    assert check_length(sources(*CODE)) == []


@pytest.fixture(scope="session")
def wheel_names(tmp_path_factory) -> list[str]:
    """Names in a wheel built from a copy of the tree (the build leaves files behind)."""
    copy = tmp_path_factory.mktemp("wheel")
    for folder in CODE:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "out").glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_is_clean(wheel_names):
    assert check_wheel(wheel_names) == []


# ---- each checker notices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        (
            "costmodel/bad.py",
            "from autopar.passes import cancel",
            "autopar.costmodel.bad may not import autopar.passes.cancel",
        ),
        ("passes/bad.py", "import autopar.runtime.module", "autopar.passes.bad may not import autopar.runtime.module"),
        (
            "runtime/bad.py",
            "from autopar.driver import compile",
            "autopar.runtime.bad may not import autopar.driver.compile",
        ),
        (
            "autopar/mesh.py",
            "from autopar.capture import capture",
            "autopar.mesh may not import autopar.capture.capture",
        ),
        (
            "autopar/capture.py",
            "from autopar.costmodel import rules",
            "autopar.capture may not import autopar.costmodel.rules",
        ),
        ("autopar/new.py", "", "new module; say in tests/test_house.py what it may import"),
    ],
)
def test_directions_checker_notices(path, text, complaint):
    assert complaint in check_directions({path: text})[0]


def test_directions_checker_lets_pass():
    good = {
        "costmodel/a.py": "from autopar.costmodel.b import x\nfrom autopar.rule import bind\nimport torch",
        "autopar/lowering.py": "from autopar.passes.cancel import cancel\nfrom autopar import errors",
        "autopar/__init__.py": "from autopar.mesh import Mesh\ndef f():\n    from autopar.driver import compile\n",
    }
    assert check_directions(good) == []


@pytest.mark.parametrize("text", ["import passes", "from runtime.module import x", "import costmodel.ilp as i"])
def test_bare_name_checker_notices(text):
    assert "import autopar." in check_top_level_names({"tests/bad.py": text})[0]


@pytest.mark.parametrize(
    "text",
    [
        "import torch._dynamo",
        "from torch._subclasses import FakeTensorMode",
        "import torch\nx = torch._C._y",
        "from torch.fx import _pytree",
    ],
)
def test_private_checker_notices(text):
    assert "is private" in check_private_torch({"passes/bad.py": text})[0]
    assert check_private_torch({"autopar/capture.py": text}) == []


def test_private_checker_lets_ops_and_dunders_pass():
    text = "import torch\na = torch.ops._c10d_functional.all_reduce\nb = torch.ops.aten._softmax\nc = torch.__version__"
    assert check_private_torch({"passes/good.py": text}) == []


def test_only_checker_notices():
    hidden = "import torch\nx = torch.distributed.get_rank()"
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch.distributed as dist\n"
    assert check_only({"autopar/driver.py": hidden}, "torch.distributed", r"runtime/.*")
    assert check_only(
        {"passes/bad.py": "from torch.distributed.tensor import DTensor"}, "torch.distributed", r"runtime/.*"
    )
    assert check_only({"costmodel/lower.py": "import pulp"}, "pulp", r"costmodel/ilp\.py")
    assert check_only({"autopar/driver.py": typing}, "torch.distributed", r"runtime/.*") == []
    assert check_only({"runtime/module.py": hidden}, "torch.distributed", r"runtime/.*") == []


def test_local_import_checker_notices():
    text = "def f():\n    from autopar.driver import compile\n"
    assert "inside f()" in check_no_local_imports({"autopar/cli.py": text})[0]
    assert check_no_local_imports({"autopar/__init__.py": text}) == []


def test_docstring_checker_notices():
    text = '"""Module."""\ndef public():\n    pass\ndef _private():\n    pass\nclass Also:\n    pass\n'
    assert [c.split(": ")[1] for c in check_docstrings({"passes/bad.py": text})] == [
        "public without docstring",
        "Also without docstring",
    ]
    assert check_docstrings({"passes/bad.py": "x = 1"}) == ["passes/bad.py:1: module without docstring"]


def test_length_checker_notices():
    assert check_length({"passes/bad.py": "x\n" * 501}) == ["passes/bad.py: 501 lines, at most 500; split it by job"]


def test_wheel_checker_notices():
    complaints = check_wheel(["runtime/__init__.py", "autopar/__init__.py"])
    assert complaints[0] == "runtime/__init__.py: lands in site-packages outside autopar/"
    assert "autopar/passes/__init__.py: missing from the wheel" in complaints
