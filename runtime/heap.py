"""The C library's heap in a process that trains on the CPU: what a step has freed, the next one takes again.

glibc gives memory at the top of its heap back to the system when enough of it is free, and asks the system for every
large block, by limits that move only with what the process has freed before (mallopt(3), M_TRIM_THRESHOLD and
M_MMAP_THRESHOLD). Pages that come back are cleared and mapped anew at their first touch, in every step: gathered
parameters and buckets of gradients are where it shows, some thousands of page faults in a step of a small model.
"""

from __future__ import annotations

import ctypes
import os
import platform

#: Bytes of free memory at the top of the heap that a process keeps.
KEPT = 1 << 30
#: Bytes from which a block comes from the system: as far as glibc's own limit moves (DEFAULT_MMAP_THRESHOLD_MAX).
LARGE = 1 << 25
# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
#: Somebody who has set these knows what they want.
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed() -> bool:
    """Have this process keep the memory that it frees; whether it now does.

    Does nothing where the C library is not glibc, or where the environment has its own settings (`SETTINGS`).
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(mallopt(M_MMAP_THRESHOLD, LARGE))


__all__ = ["keep_freed"]
