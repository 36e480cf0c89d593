"""Gives a stage GPUs that no other stage of this machine uses, where no scheduler does.

CUDA takes the first GPU unless told otherwise, so stages side by side would share it while the others idle. A stage, or a
verb that uses an encoder, locks a folder for each GPU that it uses, and sets CUDA_VISIBLE_DEVICES for itself and the
processes that it starts. The
kernel frees the locks when the process ends, in whatever way. Programs that are not of this package lock nothing.

Imports no torch, and starts no CUDA: from then on CUDA_VISIBLE_DEVICES would be ignored.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from aps.runtime.slurm import job_id
from aps.text import number_of

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOCKS = Path("/tmp")  # not TMPDIR, which users and jobs have each for themselves
SECONDS = 20.0  # for the driver's answer


def visible() -> dict[str, str]:
    """The GPUs that a process started now would see: name as in CUDA_VISIBLE_DEVICES -> UUID. None without a driver.

    A number there is CUDA's, which may count cards of different kinds in another order than the driver. Then a UUID here is
    another card's, but it is the same one for each process that counts.
    """
    here = _uuids()
    given = os.environ.get(VISIBLE)
    if given is None:
        return {str(number): uuid for number, uuid in enumerate(here)}
    found: dict[str, str] = {}
    for name in given.split(",") if here else ():
        name = name.strip()
        if name.isascii() and name.isdecimal() and int(name) < len(here):
            found[name] = here[int(name)]
        elif name.startswith(("GPU-", "MIG-")):  # the former may be cut short
            found[name] = next((uuid for uuid in here if uuid.startswith(name)), name)
        else:  # CUDA ends there too
            break
    return found


def _uuids() -> list[str]:
    """The UUID of each GPU of this machine, by the driver's own program; none where it is missing or does not answer."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        return re.findall(r"^GPU-\S+", answer.stdout, re.MULTILINE)
    return []


@contextmanager
def hold(
    count: int, what: str = "this stage", instead: str = "let Snakemake give turns (resources.STAGE.gpus)"
) -> Iterator[None]:
    """Use `count` GPUs, free ones first, until the block ends.

    `what` and `instead` are of the warning's words: who uses them, and what else to do where none is free.

    Where too few are free the rest is shared, with a warning: a person at a workstation who starts a second stage by hand
    wants it to run, and a small one beside a long one does. Snakemake's jobs wait for their turn (`Plan.share`).
    """
    found = visible() if os.environ.get("APS_DEVICE", "") in ("", "cuda") else {}
    if len(found) < count or (job_id() is not None and len(found) == count):  # too few is told later; Slurm chose these
        yield
        return
    before = os.environ.get(VISIBLE)
    with ExitStack() as locks:
        free: list[str] = []
        for name, uuid in found.items():
            if len(free) < count and _lock(uuid, locks):
                free.append(name)
        if len(free) < count:
            print(
                f"warning: {what} uses {number_of(count, 'GPU')} and others leave {len(free)} of {len(found)} free, so it shares; "
                f"where that is too slow or too much for their memory, wait for the others, or {instead}",
                file=sys.stderr,
                flush=True,
            )
        used = [*free, *(name for name in found if name not in free)][:count]
        os.environ[VISIBLE] = ",".join(sorted(used, key=list(found).index))
        try:
            yield
        finally:
            os.environ.pop(VISIBLE)
            if before is not None:
                os.environ[VISIBLE] = before


def _lock(uuid: str, locks: ExitStack) -> bool:
    """Whether no other stage has locked the GPU; then it is locked until `locks` ends.

    A folder, not a file: in a place that all users share another user's file may not be opened, a link or a pipe may stand
    in its place, and what cleans it deletes old files, but no locked folder.
    """
    path = LOCKS / f"aps-{re.sub(r'[^A-Za-z0-9-]', '-', uuid)}"
    try:
        with suppress(FileExistsError):
            path.mkdir()
            path.chmod(0o755)  # whatever the umask: other users have to open it
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # no locks here: all seem free
        return True
    locks.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
