"""How many CPU cores this process has, and how many workers decode its image files. Imports no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # where workers hand over what they have decoded
ENOUGH = 2**30  # bytes; containers often have 64 MiB, in which a worker dies of a bus error


def threads_given() -> int | None:
    """Of OMP_NUM_THREADS, which may list one number for each level of nesting (`2,1`); None where it says nothing."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) or None if first.isascii() and first.isdecimal() else None


def cores() -> int:
    """This process's share: OMP_NUM_THREADS, which Snakemake and `aps.runtime.launch` set to it; without, what the system
    grants, over the processes that torchrun started on this machine."""
    if (given := threads_given()) is not None:
        return given
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, granted // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def decoding_workers(asked: int | None) -> int:
    """Worker processes for image files: those asked for, else as many as cores, but none without shared memory for them."""
    if asked is not None:
        return asked
    room = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else ENOUGH
    return cores() if room >= ENOUGH else 0
