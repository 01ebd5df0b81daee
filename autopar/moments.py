"""The memory of one rank over a step, moment by moment, by kind: predicted or measured. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Moment:
    """What is held right behind something that runs.

    Attributes:
        at: its place on the track: a number of events, or seconds. phase: "forward", "backward", "update", or of a
            pipeline the kind of action. name: what runs: the address of an op, or words. bytes: by kind of memory.
    """

    at: float
    phase: str
    name: str
    bytes: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Alive:
    """Tensors that are held at the peak: one, or as many equal ones of repeated layers (`*` in the name).

    Attributes:
        name: op address or parameter that it comes from, or words. module: path of the module that made it; "" where
            none did, or where that is not known. bytes: of all `count` together.
    """

    name: str
    module: str
    kind: str
    bytes: float
    count: int = 1


@dataclass(frozen=True)
class Track:
    """The moments of one rank, or of all that are alike.

    Attributes:
        name: whose it is. unit: of `Moment.at`: "ops" or "s". largest: of what is alive at the peak, the largest first.
    """

    name: str
    moments: tuple[Moment, ...]
    unit: str = "ops"
    largest: tuple[Alive, ...] = field(default=())

    @property
    def peak(self) -> Moment:
        """The first moment at which most is held."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak_bytes(self) -> float:
        """Bytes of all kinds at the peak."""
        return self.peak.total

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of which there ever is a byte, in the order in which they first come."""
        found: dict[str, None] = {}
        for moment in self.moments:
            found.update(dict.fromkeys(kind for kind, size in moment.bytes.items() if size >= 0.5))
        return tuple(found)


__all__ = ["Alive", "Moment", "Track"]
