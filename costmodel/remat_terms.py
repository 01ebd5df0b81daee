"""What the program of `costmodel.remat` speaks of: tensors in a spec, when they are alive, and what is decided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from autopar.costmodel.items import Tensor
from autopar.spec import Spec


class Chosen(NamedTuple):
    """Classes of ops: those of which the backward has copies, and those whose results wait on the host."""

    again: frozenset[int] = frozenset()
    away: frozenset[int] = frozenset()


class Version(NamedTuple):
    """A tensor in a spec."""

    tensor: Tensor
    spec: Spec


#: First and last moment of the backward at which a version is read.
Spans = Mapping[Version, tuple[float, float]]


@dataclass
class Life:
    """When a version is alive, in moments of a step that keeps everything.

    made: where. read: its last reader in the forward. first, last: readers in the backward. by: ops of the forward
    that read it.
    """

    made: int
    read: int = -1
    first: float = math.inf
    last: float = -1.0
    by: list[int] = field(default_factory=list)


__all__ = ["Chosen", "Life", "Spans", "Version"]
