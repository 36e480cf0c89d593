"""The C library's memory, for training on CPUs.

glibc gives a large block back to the system as soon as it is freed, and the next one of its size arrives as new pages,
each cleared at its first touch. A training step frees and takes the same blocks over and over: that is a tenth of its
time (docs/performance.md).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 4096  # bytes: the largest multiple of a page that mallopt takes


def keep_memory() -> bool:
    """Keep freed blocks for the next ones -> whether the C library could be asked (glibc); values do not change.

    For steps of the same shapes: the peak stays what it was. Where sizes vary, holes could add up.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
