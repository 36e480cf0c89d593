"""Asks Slurm about jobs, requeues them, and keeps two attempts of a stage from running at once.

Outside a Slurm job every function returns at once and starts nothing. In a container, Slurm's programs are reached
through `aps.runtime.door`. It knows no stage and no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from aps.errors import Preempted, UserError
from aps.files import make_folder, read_json, write_json
from aps.runtime import door
from aps.runtime.signals import received

BEAT_SECONDS = 5.0  # between two touches of an attempt's mark
FRESH_SECONDS = 60.0  # a mark of another machine, whose clock may differ, counts as touched for so long
# In the folder of a run: of the attempt at work (a killed one leaves it), and two locks, of `Claim` and of `hold`.
MARKS = ATTEMPT, CLAIM, WRITER = "attempt.json", ".claim", ".writer"
HOLD_SECONDS = 60  # how long `hold` waits
KILL_SECONDS = 3.0  # how long a killed process may take to exit
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "RESIZING", "STOPPED"}
ENDINGS = {
    "OUT_OF_MEMORY": "was killed for its memory; this one may use more, set resources.{stage}.mem_mb to save the detour",
    "NODE_FAIL": "lost its node",
    "TIMEOUT": "reached its time limit before it could save its state",
    "PREEMPTED": "had to make room for another before it could save its state",
    "CANCELLED": "was cancelled",
}


def job_id() -> str | None:
    """The Slurm job this process runs in. A value that is not a number does not come from Slurm."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return job if job.isascii() and job.isdecimal() else None


def allocation() -> str | None:
    """The Slurm job, node and GPUs of this process, for its log."""
    if (job := job_id()) is None:
        return None
    return f"Slurm job {job} on {_host()}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'none')}"


def job_fields(job: str) -> dict[str, str]:
    """The fields of a job (JobState, Reason, PreemptTime, Restarts ...); empty where Slurm no longer knows it.

    Accounting, which gives only the state, is asked where slurmctld has forgotten the job.
    """
    if text := _ask("scontrol", "show", "job", "--oneliner", job):
        return dict(re.findall(r"(\S+?)=(\S*)", text))
    state = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    return {"JobState": state.split()[0]} if state.strip() else {}


def back_to_queue(asked: signal.Signals | None) -> tuple[str, bool]:
    """Requeue this job where Slurm, not a person, ends it; returns what happens in words, and whether it is requeued.

    A job that was warned of its time limit, or preempted with a grace period, still runs, and would end as failed. A job
    that Slurm cancelled for preemption or the time limit is completing, and can still be requeued. A job that was
    cancelled by scancel is not requeued.
    """
    job = job_id()
    fields = job_fields(job) if job is not None and asked != signal.SIGINT else {}
    if job is None or fields.get("BatchFlag", "0") == "0":  # it counts up when Slurm starts a batch job again
        return "", False
    preempted = fields.get("PreemptTime", "None") != "None"
    if fields.get("JobState") == "RUNNING":
        if asked is None:  # only the processes on the nodes got the signal
            why = "after a warning by Slurm"
        else:
            why = "to make room for another" if asked == signal.SIGTERM else "before its time limit"
    elif preempted or fields.get("Reason") == "TimeLimit":
        why = "after its preemption" if preempted else "after its time limit"
    else:
        return f"Slurm job {job} was cancelled (scancel); a new one goes on from here", False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm now ends this process, which still has to print its message
    done = _run("scontrol", "requeue", job)
    if done.returncode:
        return f"Slurm did not take job {job} back into the queue ({' '.join(done.stderr.split())})", False
    return f"Slurm job {job} goes back to the queue {why} and resumes by itself", True


class Claim:
    """A stage's mark in the folder of its run, a file `attempt.json`.

    The mark keeps two jobs from writing the same state, and after a kill it lets the next attempt say what ended the one
    before. Where the block raises `Preempted`, the Slurm job is requeued if that is right, and the message says so.

    If the mark exists when a stage starts, the attempt before did not end normally: it was killed for its memory, lost
    with its node, or it still runs because Snakemake was restarted and submitted the stage again.

    Design: the mark is read and written under a lock of the file system, so of many attempts that start at once only one
    continues. Whether an attempt still runs is asked of Slurm, or of the process table: a process is identified by its
    number, its start in ticks and the boot of its machine, which do not depend on a clock. An attempt on another machine
    touches its mark every few seconds.

    Raises:
        UserError: another job or process works in the folder.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._file, self._stage = folder / ATTEMPT, stage
        self._ended = threading.Event()

    def __enter__(self) -> Claim:
        if (where := allocation()) is not None:
            print(where, file=sys.stderr, flush=True)
        with _locked(self._file.with_name(CLAIM)):
            if self._file.exists():
                self._check_previous(_read_mark(self._file))
            write_json(
                self._file, {"slurm_job": job_id(), "host": _host(), "pid": os.getpid(), **_identity(os.getpid())}
            )
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        waits = False
        if isinstance(error, Preempted):
            sentence, waits = back_to_queue(received())
            error.args = ("; ".join(filter(None, [str(error), sentence])),)
        if not waits:
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _check_previous(self, mark: dict[str, object]) -> None:
        job, host = mark.get("slurm_job"), mark.get("host")
        elsewhere = host != _host()
        if job is not None and job == job_id():
            print(f"Slurm job {job} is back from the queue and goes on from its last checkpoint", file=sys.stderr)
            return
        state = job_fields(str(job)).get("JobState", "") if job is not None else ""
        if state in ALIVE:
            raise UserError(
                f"Slurm job {job} ({state}) already works in {self._file.parent}; wait for it, or `scancel {job}` first"
            )
        if not elsewhere and _is_alive(mark):
            raise UserError(
                f"process {mark['pid']} is already at work in {self._file.parent}; wait for it, or stop it first"
            )
        if elsewhere and not state and self._is_touched():
            raise UserError(
                f"a process on {host} is already at work in {self._file.parent}; wait for it, or stop it first"
            )
        attempt = f"on {host}" if job is None else f"Slurm job {job} on {host}"
        ending = ENDINGS.get(state, "").format(stage=self._stage) or "was ended from outside"
        print(
            f"the attempt before this one, {attempt}, {ending}; going on from its last checkpoint if it left one",
            file=sys.stderr,
        )

    def _is_touched(self) -> bool:
        """Whether another machine touches the mark, seen by a change of its time, since clocks may differ."""
        first, until = self._file.stat().st_mtime_ns, time.monotonic() + 3 * BEAT_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 5)
            try:
                if self._file.stat().st_mtime_ns != first:
                    return True
            except OSError:  # the attempt has just ended
                return False
        return False


def hold(folder: Path, label: str) -> IO[str]:
    """Lock the folder of a run for the process that writes in it; the lock ends with the returned file, or the process.

    `Claim` knows the process that started an attempt. If that was killed, the ones that it had started may need a moment to end.

    Raises:
        UserError: another process works in it, and goes on to.
    """
    lock = (folder / WRITER).open("a", encoding="utf-8")
    for second in range(HOLD_SECONDS):
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: its children do not inherit it
            return lock
        except (BlockingIOError, PermissionError):
            if second == 0:
                print(f"{label}: waiting for a process of an earlier attempt to end in {folder}", file=sys.stderr)
            time.sleep(1)
        except OSError:  # no locks on this file system, of which `Claim` has warned
            return lock
    lock.close()
    raise UserError(
        f"{label}: a process of an earlier attempt is still at work in {folder}; wait for it, or stop it first"
    )


def running_attempt(folder: Path) -> dict[str, object] | None:
    """The mark of the attempt that now runs in the folder of a run; None where none does.

    An attempt on another machine counts as running while it touches its mark every few seconds.
    """
    file = folder / ATTEMPT
    try:
        age, mark = time.time() - file.stat().st_mtime, read_json(file)
    except (OSError, UserError):
        return None
    if not isinstance(mark, dict):
        return None
    if mark.get("host") == _host() and mark.get("born") is not None:
        try:
            pid = int(str(mark.get("pid")))
        except ValueError:
            return None
        alive = _identity(pid) == {"boot": mark.get("boot"), "born": mark["born"]} and not _is_zombie(pid)
        return mark if alive else None
    return mark if age < FRESH_SECONDS else None


def may_run(folder: Path) -> bool:
    """Whether an attempt is at work in the folder of a run, or waits in Slurm's queue to go on there."""
    if running_attempt(folder) is not None:
        return True
    file = folder / ATTEMPT
    try:
        mark = read_json(file)
    except UserError:  # gone, or not to be read, so that nobody knows whose it is
        return file.exists() and time.time() - file.stat().st_mtime < FRESH_SECONDS
    job = mark.get("slurm_job") if isinstance(mark, dict) else None
    return job is not None and job_fields(str(job)).get("JobState") in ALIVE


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock of the file system; where it has no locks, warn that no second attempt may be started."""
    make_folder(file.parent)
    with file.open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"warning: {file}: this file system has no locks ({error.strerror}); start no second attempt",
                file=sys.stderr,
            )
        yield


def _read_mark(file: Path) -> dict[str, object]:
    """The content of a mark; empty where it can't be read. Marks are written atomically, so no attempt wrote that one."""
    try:
        mark = read_json(file)
    except UserError:
        mark = None
    if not isinstance(mark, dict):
        print(f"warning: {file}: not a mark of an attempt; it is written anew", file=sys.stderr)
        return {}
    return mark


def _identity(pid: int) -> dict[str, object]:
    """What distinguishes processes with the same number: boot of the machine, and start in ticks since then."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return {"boot": boot, "born": int(ticks)}
    except (OSError, IndexError, ValueError):  # not Linux, or it is gone
        with contextlib.suppress(psutil.Error):
            return {"boot": None, "born": round(psutil.Process(pid).create_time())}
        return {"boot": None, "born": None}


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _is_alive(mark: dict[str, object]) -> bool:
    """Whether the process that wrote the mark keeps running; a killed one needs a moment to exit."""
    until = time.monotonic() + KILL_SECONDS
    try:
        pid = int(str(mark["pid"]))
        theirs = {"boot": mark["boot"], "born": mark["born"]}
    except (KeyError, ValueError):
        return False
    # Another process may have the number by now, and in containers ended processes can stay as zombies.
    while _identity(pid) == theirs and theirs["born"] is not None and not _is_zombie(pid):
        if time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _ask(*command: str) -> str:
    """Standard output of a command; "" where it is missing, fails or hangs."""
    done = _run(*command)
    return done.stdout if done.returncode == 0 else ""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """A finished command of Slurm; one that is missing or hangs has failed."""
    try:
        return door.run(*command)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
