"""What a running stage asks of Slurm: what becomes of a job, to go back into the queue, and who else is at work.

Outside a Slurm job every function answers at once and starts nothing. It knows no stage and no torch.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import psutil

from aps.errors import Preempted, UserError
from aps.files import read_json, write_json
from aps.runtime.signals import received

KILL_SECONDS = 3.0  # how long a killed process may take to be gone
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "REQUEUED", "RESIZING", "STOPPED"}
ENDINGS = {
    "OUT_OF_MEMORY": "was killed for its memory; this one may use more, set resources.{stage}.mem_mb to save the detour",
    "NODE_FAIL": "lost its node",
    "TIMEOUT": "reached its time limit before it could save its state",
    "PREEMPTED": "had to make room for another before it could save its state",
    "CANCELLED": "was cancelled",
}


def job_id() -> str | None:
    """The Slurm job this process runs in."""
    return os.environ.get("SLURM_JOB_ID")


def allocation() -> str | None:
    """Where in Slurm this process runs, for its log."""
    if (job := job_id()) is None:
        return None
    return f"Slurm job {job} on {_host()}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'none')}"


def job_fields(job: str) -> dict[str, str]:
    """What Slurm says of a job (JobState, Reason, PreemptTime, Restarts ...); empty where it no longer knows it.

    Accounting is asked only where slurmctld has forgotten the job, and knows only its state.
    """
    if text := _ask("scontrol", "show", "job", "--oneliner", job):
        return dict(re.findall(r"(\S+?)=(\S*)", text))
    state = _ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    return {"JobState": state.split()[0]} if state.strip() else {}


def back_to_queue(asked: signal.Signals | None) -> tuple[str, bool]:
    """Requeues this job where Slurm, not a person, ended it; returns what happens now in words, and whether it comes back.

    Warned of the time limit or preempted with a grace period, the job still runs and would end as failed. Cancelled by
    preemption or by the time limit, it is completing and can still be taken back. After scancel it is left alone.
    """
    job = job_id()
    fields = job_fields(job) if job is not None and asked != signal.SIGINT else {}
    if job is None or fields.get("BatchFlag") != "1":
        return "", False
    preempted = fields.get("PreemptTime", "None") != "None"
    if fields.get("JobState") == "RUNNING":
        if asked is None:  # only the processes on the nodes were told
            why = "after a warning by Slurm"
        else:
            why = "to make room for another" if asked == signal.SIGTERM else "before its time limit"
    elif preempted or fields.get("Reason") == "TimeLimit":
        why = "after its preemption" if preempted else "after its time limit"
    else:
        return f"Slurm job {job} was cancelled (scancel); a new one goes on from here", False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm now ends this process, which has a last word to say
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        return f"Slurm did not take job {job} back into the queue ({' '.join(done.stderr.split())})", False
    return f"Slurm job {job} goes back to the queue {why} and resumes by itself", True


class Claim:
    """A stage's mark in its checkpoint folder: two jobs never write the same state, and after a kill the next attempt can say what ended the one before.

    Where the block raises `Preempted`, the Slurm job goes back to the queue if that is right, and the message says so.

    A mark that is still there when a stage starts means that the attempt before it wrote no last word: killed for its
    memory, lost with its node, or still at work because Snakemake was restarted and submitted it again.

    Raises:
        UserError: another job or process is at work in the folder.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self._file, self._stage = folder / "attempt.json", stage

    def __enter__(self) -> Claim:
        if (where := allocation()) is not None:
            print(where, file=sys.stderr, flush=True)
        if self._file.exists():
            self._look_back(read_json(self._file))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        me = psutil.Process()
        write_json(
            self._file,
            {"slurm_job": job_id(), "host": _host(), "pid": me.pid, "born": me.create_time(), "at": time.time()},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        waits = False
        if isinstance(error, Preempted):
            sentence, waits = back_to_queue(received())
            error.args = ("; ".join(filter(None, [str(error), sentence])),)
        if not waits:
            self._file.unlink(missing_ok=True)

    def _look_back(self, mark: dict[str, object]) -> None:
        job, host = mark.get("slurm_job"), mark.get("host")
        if job is None:
            if host == _host() and _outlives(mark):
                raise UserError(
                    f"process {mark['pid']} is already at work in {self._file.parent}; wait for it, or stop it first"
                )
            attempt, ending = f"on {host}", ""
        elif job == job_id():
            print(f"Slurm job {job} is back from the queue and goes on from its last checkpoint", file=sys.stderr)
            return
        else:
            state = job_fields(str(job)).get("JobState", "")
            if state in ALIVE:
                raise UserError(
                    f"Slurm job {job} ({state}) already works in {self._file.parent}; wait for it, or `scancel {job}` first"
                )
            attempt, ending = f"Slurm job {job} on {host}", ENDINGS.get(state, "")
        ending = ending.format(stage=self._stage) or "was ended from outside"
        print(
            f"the attempt before this one, {attempt}, {ending}; going on from its last checkpoint if it left one",
            file=sys.stderr,
        )


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def _outlives(mark: dict[str, object]) -> bool:
    """Whether the process that left the mark stays at work; a killed one needs a moment to go."""
    until = time.monotonic() + KILL_SECONDS
    try:
        process = psutil.Process(int(str(mark["pid"])))
        # A number may be another program's by now, and where nobody reaps the dead (containers) they stay as zombies.
        while abs(process.create_time() - float(str(mark["born"]))) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return True
            time.sleep(0.05)
    except psutil.Error:
        pass
    return False


def _ask(*command: str) -> str:
    """Standard output, or nothing where the command is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
