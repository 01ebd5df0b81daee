"""The device mesh as plain data: ordered named axes with sizes. No torch inside.

>>> str(Mesh.parse("dp=2,tp=4"))
'dp=2,tp=4'
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from autopar.errors import MeshError

_AXIS = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=(\d+)$")


@dataclass(frozen=True)
class Mesh:
    """Named axes, slowest-varying first: rank = row-major index of its coordinates."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes):
            raise MeshError(f"mesh has {len(self.names)} names but {len(self.sizes)} sizes")
        if len(set(self.names)) != len(self.names):
            raise MeshError(f"mesh axis names must differ, got {', '.join(self.names)}")
        if not 1 <= len(self.names) <= 3:
            raise MeshError(f"mesh has {len(self.names)} axes; 1 to 3 are supported")
        for name, size in zip(self.names, self.sizes):
            if not _AXIS.match(f"{name}={size}"):
                raise MeshError(f"bad mesh axis {name}={size}; write e.g. dp=2,tp=4")
            if size < 1:
                raise MeshError(f"mesh axis {name} has size {size}; sizes start at 1")

    @classmethod
    def parse(cls, text: str | int | Mesh) -> Mesh:
        """`"dp=2,tp=4"`, or an int `n` meaning `dp=n`. (`autopar.compile` and `plan` search the shape of an int.)

        Raises:
            MeshError: the text is not of that form.
        """
        if isinstance(text, Mesh):
            return text
        if isinstance(text, int):
            return cls(("dp",), (text,))
        names, sizes = [], []
        for part in str(text).split(","):
            match = _AXIS.match(part.strip())
            if not match:
                raise MeshError(f"cannot read mesh {text!r}: {part.strip()!r} is not NAME=SIZE; write e.g. dp=2,tp=4")
            names.append(match[1])
            sizes.append(int(match[2]))
        return cls(tuple(names), tuple(sizes))

    def __str__(self) -> str:
        return ",".join(f"{n}={s}" for n, s in zip(self.names, self.sizes))

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes)

    def axis(self, name: str) -> int:
        """Index of the axis called `name`.

        Raises:
            MeshError: no axis has that name.
        """
        if name not in self.names:
            raise MeshError(f"mesh {self} has no axis {name!r}; its axes are {', '.join(self.names)}")
        return self.names.index(name)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Coordinates of `rank` along every axis (row-major)."""
        out = []
        for size in reversed(self.sizes):
            out.append(rank % size)
            rank //= size
        return tuple(reversed(out))

    def groups(self, axis: int) -> list[list[int]]:
        """Every group of ranks that differ only in their coordinate on `axis`, in coordinate order."""
        seen: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_devices):
            coord = self.coordinates(rank)
            seen.setdefault(coord[:axis] + coord[axis + 1 :], []).append(rank)
        return list(seen.values())
