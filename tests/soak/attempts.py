"""Makes one attempt at a stage: starts it in one of several ways, sends it a signal, and records how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from aps.runtime.launch import SHELL_PREFIX

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Exit statuses after a signal to the stage: from the default action, after saving its state, or because it had
# finished.
ALLOWED = {
    signal.SIGKILL: {-9, 137},
    signal.SIGTERM: {-15, 143, 75, 0},
    signal.SIGINT: {-2, 130, 75, 0},
    signal.SIGHUP: {-1, 129, 75, 0},
}
REAL = "real"  # a fresh interpreter under the shell of the workflow's rules
FORKED = "forked"  # from the interpreter that has imported everything


@dataclass
class Hit:
    """A signal to one process of an attempt, or to all of them."""

    signal: str
    target: str  # stage, group, child, parent
    seconds: float  # since the start
    delivered: bool = False


@dataclass
class Outcome:
    start: str
    status: int
    seconds: float
    hit: Hit | None = None
    peak: int | None = None  # KiB, where it is known
    memory: int | None = None  # bytes, right before the hit
    files: int | None = None  # open ones, right before the hit
    log: str = field(default="", repr=False)

    def record(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "log"}

    @property
    def expected(self) -> bool:
        """Whether the exit status is a possible one after this hit."""
        if self.hit is None or not self.hit.delivered:
            return self.status == 0
        if self.hit.target == "stage" and self.start == FORKED:
            return self.status in ALLOWED[signal.Signals[self.hit.signal]]
        return True  # after a hit to a group, a child or a parent, any exit status is right


class Starter:
    """The interpreter that has imported everything; it is started again if it has ended."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process: subprocess.Popen[str] | None = None

    def start(self, request: dict[str, Any]) -> int:
        """Fork an attempt -> its process id."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("starter.py"))], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, cwd=ROOT, env=self.environment, start_new_session=True,
            )  # fmt: skip
            assert self._answer() == "ready\n"
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(json.loads(self._answer())["pid"])

    def outcome(self) -> tuple[int, int]:
        """Wait for the end of the attempt -> exit status, peak memory in KiB."""
        answer = json.loads(self._answer())
        return answer["status"], answer["peak"]

    def _answer(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


def attempt(
    starter: Starter, arguments: list[str], folder: Path, start: str, hit: Hit | None, chance: random.Random,
    moment: Callable[[], bool] | None = None,
) -> Outcome:  # fmt: skip
    """Run `python -m aps ARGUMENTS` in a folder. moment: says when the hit's seconds begin to count; None: at once."""
    log = folder / "attempt.log"
    log.write_text("")
    begun = time.monotonic()
    shell: subprocess.Popen[bytes] | None = None
    if start == FORKED:
        request = {"arguments": arguments, "folder": str(folder), "log": str(log), "environment": {}}
        pid = session = starter.start(request)
    else:
        command = shlex.join([sys.executable, "-m", "aps", *arguments])
        shell = subprocess.Popen(
            ["bash", "-c", f"{SHELL_PREFIX}{command} 2>&1 | tee {shlex.quote(str(log))}"], cwd=folder,
            env=starter.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        pid = session = shell.pid
    outcome = Outcome(start, 0, 0.0, hit)
    thread = threading.Thread(target=_send_signal, args=(outcome, pid, session, chance, moment, shell is None))
    if hit is not None:
        thread.start()
    if shell is None:
        outcome.status, outcome.peak = starter.outcome()
    else:
        outcome.status = shell.wait()
    outcome.seconds = round(time.monotonic() - begun, 2)
    if hit is not None:
        thread.join()
    outcome.log = log.read_text(errors="replace")
    return outcome


def _send_signal(
    outcome: Outcome, pid: int, session: int, chance: random.Random, moment: Callable[[], bool] | None, forked: bool
) -> None:
    hit = outcome.hit
    assert hit is not None
    deadline = time.monotonic() + 60
    while moment is not None and not moment() and _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.002)
    _sleep_while(lambda: _alive(pid), hit.seconds)
    processes = members(session)
    stages = [process for process in processes if forked or "aps" in _command(process)] or processes
    if not _alive(pid) or not stages:
        return
    stage = next((process for process in stages if process.pid == pid), stages[0])
    with contextlib.suppress(psutil.Error):
        outcome.memory, outcome.files = stage.memory_info().rss, stage.num_fds()
    number = signal.Signals[hit.signal]
    others = [process for process in processes if process.pid != stage.pid]
    try:
        if hit.target == "group":
            os.killpg(session, number)
        elif hit.target == "child" and others:
            chance.choice(others).send_signal(number)
        elif hit.target == "parent":  # the shell of the stage's rule
            os.kill(pid, number)
        else:
            hit.target = "stage"
            stage.send_signal(number)
        hit.delivered = True
    except (ProcessLookupError, psutil.Error):
        pass


def _sleep_while(alive: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and alive():
        time.sleep(min(left, 0.01))


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def members(session: int) -> list[psutil.Process]:
    """The living processes of a session, in the order of their ids."""
    processes = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except (OSError, psutil.Error):
            continue
    return sorted(processes, key=lambda process: process.pid)
