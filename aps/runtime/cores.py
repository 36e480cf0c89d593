"""How many CPU cores this process has, and how many workers decode its image files. Imports no torch."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
from pathlib import Path

from aps.errors import UserError

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
SHARED_MEMORY = Path("/dev/shm")  # workers pass decoded images through it
LOCKS, LOCKS_EACH = 8, 4  # upper bounds of the locks that DataLoader makes, in all and per worker; one takes a page
ENOUGH = 2**30  # bytes; containers often have 64 MiB, and then a worker dies with a bus error
AHEAD = 4  # batches that a worker makes ahead


def threads_given() -> int | None:
    """The number of threads in OMP_NUM_THREADS, the first where it lists several (`2,1`); None where it is not set."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) or None if first.isascii() and first.isdecimal() else None


def cores() -> int:
    """CPU cores of this process: OMP_NUM_THREADS, which Snakemake and `aps.runtime.launch` set; without it, the cores
    that the system grants, divided by the processes that torchrun started on this machine."""
    if (given := threads_given()) is not None:
        return given
    return max(1, granted() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def granted() -> int:
    """CPU cores that the system grants: those on which this process may run (a cluster gives a job fewer than the machine
    has), but no more than the quota of its container, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota())))


def _quota() -> float:
    """CPU time a second that `docker --cpus` or a Kubernetes limit leaves this process: the least of its control groups and
    those above them, of version 2 and 1; infinite where none has one."""
    least = math.inf
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return least
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = CGROUPS / "cpu" if controllers else CGROUPS
        # A container may see the machine's name of its group, of which only the top is there.
        group = top / own.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                least = min(least, _quota_of(folder, bool(controllers)))
    return least


def _quota_of(folder: Path, version_1: bool) -> float:
    """The quota of one control group, of version 1 or 2."""
    try:
        if version_1:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        else:
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # it has none: "max", or no such file
        return math.inf


def decoding_workers(asked: int | None) -> int:
    """Worker processes for image files: as many as asked for, else one per core, or none where shared memory is small.

    Raises:
        UserError: workers are asked for, and the system lacks the shared memory or locks that they need.
    """
    if asked == 0:
        return 0
    size = shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else ENOUGH
    wanted = asked if asked is not None else cores() if size >= ENOUGH else 0
    if wanted and (problem := _lock_problem(wanted)) is not None:
        if asked is None:
            return 0
        raise UserError(
            f"--workers {asked}: no shared memory for decoding workers ({SHARED_MEMORY}: {problem}); set --workers 0 "
            f"(resources.STAGE.workers: 0), or make {SHARED_MEMORY} larger and writable"
        )
    return wanted


def loading(asked: int | None, batch_bytes: int) -> dict[str, int | None]:
    """`num_workers` and `prefetch_factor` of every DataLoader of images: `decoding_workers`, each with AHEAD batches.

    What they make ahead takes at most half of the free shared memory, with fewer batches and then fewer workers where it is
    small. As many are reckoned with for the other processes that torchrun started on this machine.

    Args:
        batch_bytes: size of a process's batch, decoded.

    Raises:
        UserError: as `decoding_workers`.
    """
    workers = decoding_workers(asked)
    if not SHARED_MEMORY.is_dir():
        return {"num_workers": workers, "prefetch_factor": AHEAD if workers else None}
    room = shutil.disk_usage(SHARED_MEMORY).free // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers = min(workers, room // batch_bytes)
    return {"num_workers": workers, "prefetch_factor": min(AHEAD, room // (workers * batch_bytes)) if workers else None}


def _lock_problem(workers: int) -> str | None:
    """Why the locks of so many workers can't be made, else None. Tested here, because DataLoader would fail halfway."""
    held = []
    try:
        for _ in range(LOCKS + LOCKS_EACH * workers):
            held.append(multiprocessing.Lock())
    except OSError as error:
        return error.strerror
    return None
