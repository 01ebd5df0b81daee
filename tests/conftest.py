"""Shared by every test: one thread per process, so that runs repeat and several ranks do not fight for the cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["AUTOPAR_PROFILE"] = ""  # plans of tests do not depend on whether this machine is calibrated

import torch

torch.set_num_threads(1)
