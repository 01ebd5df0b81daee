"""How gradients travel when they are reduced: as they are, as bfloat16, or as products of two thin matrices (PowerSGD).

The text form is what `compression=` takes and a plan holds: "bf16", "powersgd:RANK", or "powersgd:RANK:LEAST", where a
gradient is compressed only if it then is more than LEAST times smaller (default 2, as torch's `powerSGD_hook`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import ConstraintError
from autopar.spec import R, Shape, Spec, local_shape

BF16, POWERSGD = "bf16", "powersgd"


@dataclass(frozen=True)
class Compression:
    """One way of compressing gradients.

    Attributes:
        kind: `BF16` or `POWERSGD`.
        rank: of the products, of PowerSGD. least: by how much they must be smaller than the gradient.
    """

    kind: str
    rank: int = 0
    least: float = 2.0

    def __str__(self) -> str:
        if self.kind == BF16:
            return BF16
        return f"{POWERSGD}:{self.rank}" + (f":{self.least:g}" if self.least != 2 else "")

    @classmethod
    def parse(cls, text: str | None) -> Compression | None:
        """Inverse of `str`; None stays None.

        Raises:
            ConstraintError: it cannot be read; says what can.
        """
        if text is None:
            return None
        if text == BF16:
            return cls(BF16)
        match = re.fullmatch(rf"{POWERSGD}:(\d+)(?::(\d+(?:\.\d+)?))?", text) if isinstance(text, str) else None
        if match is None or int(match[1]) < 1:
            raise ConstraintError(
                f"compression={text!r} does not exist; choose 'bf16', or 'powersgd:RANK' with a rank of 1 or more: "
                "'powersgd:4'"
            )
        return cls(POWERSGD, int(match[1]), float(match[2] or 2))

    def rank_of(self, piece: Shape) -> int:
        """Rank of the products for a gradient whose piece on a rank has this shape; 0: it is not compressed.

        The piece is taken as a matrix, its first dim by all others. As `_should_compress` of torch's
        `powerSGD_hook`: it must be `least` times as large as the two thin matrices.
        """
        if self.kind != POWERSGD or len(piece) < 2 or 0 in piece:
            return 0
        rows, columns = piece[0], math.prod(piece[1:])
        return min(self.rank, rows, columns) if rows * columns > (rows + columns) * self.rank * self.least else 0

    def left(self, shape: Shape, home: Spec, stored: Spec, sizes: Sequence[int]) -> Spec:
        """Where the graph leaves the gradient of a parameter: as that is stored, or a sum still on some axes.

        PowerSGD reduces what is summed over axes on which the parameter is whole. What is scattered (ZeRO) travels as
        it is.
        """
        sums = [h.kind == "P" and h.reduce == "sum" and s == R and n > 1 for h, s, n in zip(home, stored, sizes)]
        if not any(sums) or not self.rank_of(local_shape(shape, stored, sizes)):
            return stored
        return tuple(h if left else s for h, s, left in zip(home, stored, sums))


__all__ = ["BF16", "POWERSGD", "Compression"]
