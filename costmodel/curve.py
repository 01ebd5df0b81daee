"""A measured quantity by size: piecewise linear in the logarithms of both, flat beyond the ends or not, as asked."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autopar.errors import ProfileError


@dataclass(frozen=True)
class Curve:
    """Points (size, value), sizes ascending, all above zero.

    Between two points the value is interpolated log-log. Below the first it is the first; above the last it is the
    last, or grows with the size if `grows` (seconds of a transfer, unlike a rate, do).
    """

    points: tuple[tuple[float, float], ...]
    grows: bool = False

    def __post_init__(self) -> None:
        sizes = [s for s, _ in self.points]
        fine = all(math.isfinite(n) and n > 0 for point in self.points for n in point)
        if not self.points or not fine or any(a >= b for a, b in pairwise(sizes)):
            raise ProfileError(
                f"a curve needs points (size, value) above zero with rising sizes, got {list(self.points)}"
            )

    def __call__(self, size: float) -> float:
        """The value at `size`."""
        points = self.points
        if size <= points[0][0]:
            return points[0][1]
        last, value = points[-1]
        if size >= last:
            return value * size / last if self.grows else value
        at = bisect.bisect_right(points, (size, math.inf))
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        share = math.log(size / x0) / math.log(x1 / x0)
        return y0 * (y1 / y0) ** share

    def scaled(self, factor: float) -> Curve:
        """All values times `factor`."""
        return Curve(tuple((s, v * factor) for s, v in self.points), self.grows)


def curve(points: Sequence[tuple[float, float]], grows: bool = False) -> Curve:
    """A Curve of points in any order; of equal sizes the smallest value counts.

    Raises:
        ProfileError: no points, or one that is not above zero.
    """
    best: dict[float, float] = {}
    for size, value in points:
        best[size] = min(value, best.get(size, math.inf))
    return Curve(tuple(sorted(best.items())), grows)
