"""A stage that has no programs of Slurm asks through the process that started it; `scontrol` is a stand-in on the PATH of that.

The same with Apptainer and a real Slurm was done by hand: docs/containers.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aps.runtime import door, slurm


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is Snakemake's, in job 7, and has opened the door; the file `calls` here lists what scontrol was asked."""
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n'
        "[ $1 = show ] && echo JobId=7 JobState=RUNNING Reason=None PreemptTime=None BatchFlag=1\nexit 0\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(door.NAME, "")  # given back afterwards
    door.open_door()
    return tmp_path


def inside(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code as a stage in a container, where Slurm's programs are missing."""
    program = f"import signal; from aps.runtime import door, slurm; {code}"
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PATH": "/nowhere"}, capture_output=True, text=True
    )


def test_a_stage_in_a_container_requeues_its_job(outside: Path) -> None:
    done = inside("print(slurm.back_to_queue(signal.SIGUSR1))")
    said = "Slurm job 7 goes back to the queue before its time limit and resumes by itself"
    assert done.stdout == f"({said!r}, True)\n", done.stderr
    assert (outside / "calls").read_text().splitlines()[-1] == "requeue 7"


def test_only_programs_of_slurm_are_run(outside: Path) -> None:
    done = inside("door.run('sh', '-c', 'echo no')")
    assert done.returncode and done.stderr.splitlines()[-1] == "OSError: sh: not answered from outside the container"
    assert inside("print(slurm.job_fields('7')['JobState'])").stdout == "RUNNING\n"  # and others are answered after it


def test_where_nobody_answers_slurm_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(door.NAME, "aps-nobody")
    assert slurm.job_fields("7") == {}


def test_without_a_container_nobody_is_asked(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(door.NAME, "aps-nobody")
    assert slurm.job_fields("7")["JobState"] == "RUNNING"
