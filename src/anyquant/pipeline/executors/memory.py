"""Freed memory stays with the process: worker threads free and ask again for the same few megabytes, block after block.

By default glibc hands the end of a thread's heap back to the system as soon as 128 kB of it are free, and every block
pays for its pages anew. That was two thirds of the system time of a data-free run; the peak is the same.
"""

import ctypes
import sys
from functools import cache

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
KEPT, SEPARATE = 256 << 20, 32 << 20  # bytes; the second is the most that glibc allows


@cache
def keep_freed_memory() -> None:
    """Once; nothing where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(TRIM, KEPT)
        mallopt(MMAP, SEPARATE)
