"""Memory that is freed in one step and needed in the next, kept by the C library in between."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
NEVER, LARGEST = -1, 32 << 20  # the largest threshold that glibc takes
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for what is asked for next, in this process and for good.

    By itself it gives the end of its heap back to the system once that is larger than a threshold, and what a training
    step asks for next comes in fresh pages, each with a fault (docs/performance.md says what that takes). The process
    then holds the most that it ever needed. It is a choice for the program, not for a library: assay's own commands
    that train make it, `assay.Run` does not.

    Returns:
        Whether memory is kept from now on: not with another C library, nor where the environment sets glibc's
        thresholds itself.
    """
    if sys.platform != "linux" or any(name in os.environ for name in SETTINGS):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # setting either threshold ends glibc's own adaptation of both, so both are set
    return bool(library.mallopt(M_MMAP_THRESHOLD, LARGEST) and library.mallopt(M_TRIM_THRESHOLD, NEVER))
