"""Bytes: as text, and as many as no plan needs."""

from __future__ import annotations

#: A limit that nothing comes near to.
UNLIMITED = 1 << 62


def bytes_(value: float) -> str:
    """`80e9` -> `80 GB`: three digits, decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * scale:  # what rounds up to it, too
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


__all__ = ["UNLIMITED", "bytes_"]
