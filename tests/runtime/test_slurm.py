"""What a stage makes of Slurm's answers; `scontrol` and `sacct` are stand-ins on the PATH that say what a test wrote.

The same on a real Slurm: tests/slurm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from aps.errors import Preempted, UserError
from aps.runtime import slurm
from aps.runtime.slurm import hold

Say = Callable[..., None]
RUNNING = "JobId=7 JobState=RUNNING Reason=None PreemptTime=None Requeue=1 BatchFlag=1 Restarts=0"


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """say(scontrol=..., sacct=..., requeue=...): what they print; None: they fail. This process runs in job 7."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("scontrol", "sacct"):
        program = programs / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n'
            f'file={tmp_path}/{name}; [ "$1" = requeue ] && file={tmp_path}/requeue\n'
            '[ -f "$file" ] && cat "$file" || { echo "slurm_load_jobs error: $file" >&2; exit 1; }\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")

    def write(**texts: str | None) -> None:
        for name, text in texts.items():
            (tmp_path / name).unlink(missing_ok=True)
            if text is not None:
                (tmp_path / name).write_text(text + "\n")

    return write


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


def requeued(tmp_path: Path) -> bool:
    return "scontrol requeue 7" in calls(tmp_path)


def test_outside_a_job_slurm_is_not_asked(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert (slurm.job_id(), slurm.allocation()) == (None, None)
    assert slurm.back_to_queue(signal.SIGTERM) == ("", False)
    with slurm.Claim(tmp_path / "checkpoints", "knn"):
        pass
    assert calls(tmp_path) == []


def test_accounting_is_asked_only_for_jobs_that_slurmctld_has_forgotten(say: Say, tmp_path: Path) -> None:
    say(scontrol=RUNNING, sacct="FAILED")
    assert slurm.job_fields("7")["JobState"] == "RUNNING"
    assert not any(call.startswith("sacct") for call in calls(tmp_path))
    say(scontrol=None, sacct="CANCELLED by 1000")
    assert slurm.job_fields("7") == {"JobState": "CANCELLED"}
    say(sacct=None)
    assert slurm.job_fields("7") == {}


@pytest.mark.parametrize(
    ("asked", "fields", "why"),
    [
        (signal.SIGUSR1, RUNNING, "before its time limit"),
        (signal.SIGUSR1, RUNNING.replace("BatchFlag=1", "BatchFlag=2"), "before its time limit"),
        (signal.SIGTERM, RUNNING, "to make room for another"),
        (None, RUNNING, "after a warning by Slurm"),
        (signal.SIGTERM, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None BatchFlag=1", "after its time limit"),
        (signal.SIGTERM, "JobState=COMPLETING Reason=None PreemptTime=2026-11-24T10:00:00 BatchFlag=1", "after its preemption"),
    ],
)  # fmt: skip
def test_a_job_that_slurm_ends_goes_back_to_the_queue(
    asked: signal.Signals | None, fields: str, why: str, say: Say, tmp_path: Path
) -> None:
    say(scontrol=fields, requeue="")
    sentence, waits = slurm.back_to_queue(asked)
    assert waits and sentence == f"Slurm job 7 goes back to the queue {why} and resumes by itself"
    assert requeued(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # Slurm ends the job while it says its last word


def test_a_cancelled_job_stays_cancelled(say: Say, tmp_path: Path) -> None:
    say(scontrol="JobState=CANCELLED Reason=None PreemptTime=None BatchFlag=1", requeue="")
    sentence, waits = slurm.back_to_queue(signal.SIGTERM)
    assert not waits and "was cancelled (scancel)" in sentence and not requeued(tmp_path)


@pytest.mark.parametrize(
    ("asked", "fields"), [(signal.SIGINT, RUNNING), (signal.SIGTERM, RUNNING.replace("BatchFlag=1", "BatchFlag=0"))]
)
def test_a_person_at_the_keyboard_or_in_an_interactive_job_decides_alone(
    asked: signal.Signals, fields: str, say: Say, tmp_path: Path
) -> None:
    say(scontrol=fields, requeue="")
    assert slurm.back_to_queue(asked) == ("", False)
    assert not requeued(tmp_path)


def test_where_a_site_forbids_requeueing_the_log_says_so_and_snakemake_has_to_retry(say: Say, tmp_path: Path) -> None:
    say(scontrol=RUNNING.replace("Requeue=1", "Requeue=0"), requeue=None)
    folder = tmp_path / "checkpoints"
    with pytest.raises(Preempted, match=r"after 3 batches; Slurm did not take job 7 back into the queue \(slurm_load"):  # noqa: SIM117
        with slurm.Claim(folder, "pretrain"):
            raise Preempted("after 3 batches")
    assert requeued(tmp_path) and not (folder / "attempt.json").exists()


def test_a_requeued_job_finds_its_own_mark(say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(scontrol=RUNNING, requeue="")
    folder = tmp_path / "checkpoints"
    with pytest.raises(Preempted, match=r"Slurm job 7 goes back to the queue"), slurm.Claim(folder, "pretrain"):
        raise Preempted("after 3 batches")
    with slurm.Claim(folder, "pretrain"):
        assert "Slurm job 7 is back from the queue and goes on from its last checkpoint" in capsys.readouterr().err
    assert not (folder / "attempt.json").exists()


def mark(folder: Path, **fields: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "attempt.json").write_text(json.dumps({"slurm_job": None, "host": "n1", "pid": 0, "born": 0, **fields}))


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETING"])
def test_two_jobs_never_work_in_one_folder(state: str, say: Say, tmp_path: Path) -> None:
    say(scontrol=f"JobState={state}")
    mark(tmp_path / "checkpoints", slurm_job="6")
    with pytest.raises(UserError, match=rf"Slurm job 6 \({state}\) already works in .* `scancel 6`"):
        slurm.Claim(tmp_path / "checkpoints", "pretrain").__enter__()
    assert json.loads((tmp_path / "checkpoints/attempt.json").read_text())["slurm_job"] == "6"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("OUT_OF_MEMORY", "was killed for its memory; this one may use more, set resources.pretrain.mem_mb"),
        ("NODE_FAIL", "lost its node"),
        ("TIMEOUT", "reached its time limit before it could save its state"),
        ("PREEMPTED", "had to make room for another"),
        ("CANCELLED", "was cancelled"),
        ("FAILED", "was ended from outside"),
    ],
)
def test_an_attempt_without_a_last_word_gets_its_ending_named(
    state: str, words: str, say: Say, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say(scontrol=f"JobState={state}")
    mark(tmp_path / "checkpoints", slurm_job="6")
    with slurm.Claim(tmp_path / "checkpoints", "pretrain"):
        said = capsys.readouterr().err
    assert f"the attempt before this one, Slurm job 6 on n1, {words}" in said
    assert "going on from its last checkpoint if it left one" in said


def test_a_living_process_of_this_machine_keeps_others_out_and_a_dead_one_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, host = tmp_path / "checkpoints", slurm._host()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        born = slurm._identity(other.pid)
        mark(folder, host=host, pid=other.pid, **born)
        with pytest.raises(UserError, match=f"process {other.pid} is already at work in"):
            slurm.Claim(folder, "knn").__enter__()
        other.kill()
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:  # dead, and nobody has asked how it ended
            time.sleep(0.01)
        with slurm.Claim(folder, "knn"):
            assert f"the attempt before this one, on {host}, was ended from outside" in capsys.readouterr().err
        mark(folder, host=host, pid=other.pid, **born)
    with slurm.Claim(folder, "knn"):
        assert f"the attempt before this one, on {host}, was ended from outside" in capsys.readouterr().err
    # its number may have been given to another program since
    mark(folder, host=host, pid=os.getpid(), **born)
    with slurm.Claim(folder, "knn"):
        pass


def test_a_killed_process_is_given_a_moment_to_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        mark(tmp_path, host=slurm._host(), pid=other.pid, **slurm._identity(other.pid))
        threading.Timer(0.5, other.kill).start()
        with slurm.Claim(tmp_path, "knn"):
            assert other.wait() == -signal.SIGKILL


START = """
import sys, time
from pathlib import Path
from aps.errors import UserError
from aps.runtime.slurm import Claim
folder, go = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
try:
    with Claim(folder, "knn"):
        print("in", flush=True)
        sys.stdin.read()
except UserError as error:
    print("out" if "is already at work in" in str(error) else error, flush=True)
"""


@pytest.mark.parametrize("left", [False, True], ids=["nobody was there", "a killed attempt was there"])
def test_of_many_that_start_at_once_one_goes_in(tmp_path: Path, left: bool) -> None:
    folder, go = tmp_path / "run", tmp_path / "go"
    if left:
        mark(folder, host=slurm._host(), pid=2**22 - 1, boot="before", born=1)
    command = [sys.executable, "-c", START, str(folder), str(go)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(12)]  # type: ignore[call-overload]
    try:
        assert all(process.stdout.readline() == "ready\n" for process in started)
        go.touch()
        assert sorted(process.stdout.readline() for process in started) == ["in\n", *11 * ["out\n"]]
    finally:
        for process in started:
            process.communicate()


def test_an_attempt_on_another_machine_is_known_by_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm, "BEAT_SECONDS", 0.05)
    with slurm.Claim(tmp_path, "knn"):
        monkeypatch.setattr(slurm, "_host", lambda: "another")
        with pytest.raises(UserError, match=r"a process on .* is already at work in"):
            slurm.Claim(tmp_path, "knn").__enter__()
    mark(tmp_path, host="a third")  # which touches nothing any more
    with slurm.Claim(tmp_path, "knn"):
        assert "the attempt before this one, on a third, was ended from outside" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[1]", "{", "null", "{}", '{"pid": "x"}', '{"pid": -1, "boot": 1, "born": []}']
)
def test_a_damaged_mark_keeps_nobody_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "attempt.json").write_text(content)
    with slurm.Claim(tmp_path, "knn"):
        assert json.loads((tmp_path / "attempt.json").read_text())["pid"] == os.getpid()


def test_one_process_at_a_time_writes_in_the_folder_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker of an attempt whose launcher was killed; the next attempt waits for it, or refuses."""
    code = "import sys; from pathlib import Path; from aps.runtime.slurm import hold; x = hold(Path(sys.argv[1]), 'first'); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        monkeypatch.setattr(slurm, "HOLD_SECONDS", 1)
        with pytest.raises(UserError, match=f"second: a process of an earlier attempt is still at work in {tmp_path}"):
            hold(tmp_path, "second")
        monkeypatch.setattr(slurm, "HOLD_SECONDS", 60)
        monkeypatch.setattr(slurm.time, "sleep", lambda _: other.communicate("\n"))
        hold(tmp_path, "third").close()
    assert f"third: waiting for a process of an earlier attempt to end in {tmp_path}" in capsys.readouterr().err
