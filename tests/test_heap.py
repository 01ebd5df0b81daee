"""What a step has freed the next one takes again, without asking the system for its pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from autopar.runtime.heap import SETTINGS

#: Steps that allocate, touch and free 24 MiB in three blocks; page faults of each after the first few.
STEPS = """
import resource, torch
{first}
faults = []
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 21) for _ in range(3)]
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[6:])[3])
"""
PAGES = 3 * (1 << 23) // 4096
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap of glibc")


def faults(first: str, **settings: str) -> int:
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    made = subprocess.run(
        [sys.executable, "-c", STEPS.format(first=first)], env={**env, **settings}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return int(made.stdout)


@glibc
def test_a_cpu_mesh_keeps_what_steps_free() -> None:
    connected = "from autopar.runtime.groups import connect; connect(1, torch.device('cpu'))"
    assert faults(connected) < PAGES / 20


@glibc
def test_settings_of_the_environment_are_left_alone() -> None:
    told = "from autopar.runtime.heap import keep_freed; assert not keep_freed()"
    assert faults(told, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > PAGES / 2
