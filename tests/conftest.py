"""Shared by every test: one thread per process, so that runs repeat and several ranks do not fight for the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["AUTOPAR_PROFILE"] = ""  # plans of tests do not depend on whether this machine is calibrated

import pytest
import torch

from tests.harness import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two gloo processes for the tests of a file; a hang is for the harness's timeout, of the longest sweep."""
    with Ranks(2, timeout=500) as group:
        yield group


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    """Four, as `two`."""
    with Ranks(4, timeout=500) as group:
        yield group
