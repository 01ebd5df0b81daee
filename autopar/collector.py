"""The garbage collector rests while large graphs are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def resting_collector() -> Iterator[None]:
    """Within, nothing is collected that only a cycle keeps.

    A trace or a plan makes millions of objects that live on; walking them again and again costs a third of the time
    for 80 layers.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


__all__ = ["resting_collector"]
