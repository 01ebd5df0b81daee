"""Every rule of the table against the truth machine, and the machine against rules that are wrong."""

from __future__ import annotations

import torch
from truth_cases import HAND, automatic

from autopar.costmodel import rules

aten = torch.ops.aten
_covered = {case.target for case in HAND}
CASES = [*HAND, *(automatic(op) for op in rules.RULES if op not in _covered)]
