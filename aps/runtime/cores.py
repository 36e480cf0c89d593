"""How many CPU cores this process has, and how many workers decode its image files. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

from aps.errors import UserError

SHARED_MEMORY = Path("/dev/shm")  # where workers hand over what they have decoded
LOCKS, LOCKS_EACH = 8, 4  # more than DataLoader makes, in all and for each worker: a page of memory each
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
    """Worker processes for image files: those asked for, else as many as cores, but none without shared memory for them.

    Raises:
        UserError: workers are asked for, and what they need of the system can't be had.
    """
    if asked == 0:
        return 0
    room = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else ENOUGH
    wanted = asked if asked is not None else cores() if room >= ENOUGH else 0
    if wanted and (problem := _lacking(wanted)) is not None:
        if asked is None:
            return 0
        raise UserError(
            f"--workers {asked}: no shared memory for decoding workers ({SHARED_MEMORY}: {problem}); set --workers 0 "
            f"(resources.STAGE.workers: 0), or make {SHARED_MEMORY} larger and writable"
        )
    return wanted


def _lacking(workers: int) -> str | None:
    """What keeps the locks of so many workers from being made; else None. DataLoader meets it with half of them made."""
    held = []
    try:
        for _ in range(LOCKS + LOCKS_EACH * workers):
            held.append(multiprocessing.Lock())
    except OSError as error:
        return error.strerror
    return None
