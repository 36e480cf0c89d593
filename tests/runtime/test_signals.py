"""Asked to stop, in processes of their own: signals and the module's memory of them belong to a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from tiny_study import ROOT, STUDY

# What `python -m aps` does before anything else, then whatever the test adds. `here` waits for the test's next word.
START = """
import signal, sys, time
from types import SimpleNamespace
from aps.runtime import signals as interrupt
interrupt.listen()
ONE = SimpleNamespace(world=1)
def here(word=""):
    print(word, flush=True)
    sys.stdin.readline()
"""
Stage = subprocess.Popen[str]


@pytest.fixture
def start() -> Iterator[Callable[..., Stage]]:
    with ExitStack() as stack:

        def start(code: str, shell: str = 'exec "$@"') -> Stage:
            command = ["bash", "-c", shell, "sh", sys.executable, "-c", START + code]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


def heard(process: Stage) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: Stage) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


ASK = """
here("polled" if not interrupt.stop_requested(ONE) else "too early")
here(str(interrupt.stop_requested(ONE)) + " " + str(interrupt.received().name))
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_loop_that_polls_hears_of_the_signal_and_lives(number: signal.Signals, start: Callable[..., Stage]) -> None:
    stage = start(ASK)
    assert heard(stage) == "polled"
    stage.send_signal(number)
    go_on(stage)
    assert heard(stage) == f"True {number.name}"
    go_on(stage)
    assert stage.wait() == 0


def test_a_warning_before_the_first_poll_is_not_lost(start: Callable[..., Stage]) -> None:
    stage = start("here('loading')\nhere(interrupt.stop_requested(ONE))")
    assert heard(stage) == "loading"
    stage.send_signal(signal.SIGUSR1)
    go_on(stage)
    assert heard(stage) == "True"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_never_polls_ends_like_any_program(number: signal.Signals, start: Callable[..., Stage]) -> None:
    # under the rules' shell, which ignores both for itself
    from aps.runtime.launch import SHELL_PREFIX

    stage = start("here('loading')", shell=SHELL_PREFIX + 'exec "$@"')
    assert heard(stage) == "loading"
    stage.send_signal(number)
    assert stage.wait(10) == -number


DROPPED = """
class Dropping:
    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        drop()
        return handler(int)
def drop():
    try:
        print("building", flush=True)
        time.sleep(30)
    except BaseException:  # as C and Rust code does, which has nowhere to raise it
        print("dropped", flush=True)
"""
BUILDERS = {
    "an import": "Path('built.py').write_text('import __main__\\n__main__.drop()')\nimport built",
    "a model": "from pydantic import create_model\ncreate_model('Built', x=(Dropping, 1))",
}


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)
def test_ctrl_c_is_heard_where_an_exception_would_be_dropped(
    builder: str, start: Callable[..., Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    monkeypatch.chdir(tmp_path)
    stage = start(f"from pathlib import Path\n{DROPPED}\n{builder}\nhere('went on')")
    assert heard(stage) == "building"
    stage.send_signal(signal.SIGINT)
    output, error = stage.communicate(timeout=20)
    assert (stage.returncode, output) == (130, "")
    assert error == "stopped by the keyboard; the same command goes on from the last checkpoint\n"


def test_a_ctrl_c_that_was_dropped_stops_the_loop_at_its_first_poll(start: Callable[..., Stage]) -> None:
    stage = start(f"{DROPPED}\ndrop()\nhere(interrupt.stop_requested(ONE))")
    assert heard(stage) == "building"
    stage.send_signal(signal.SIGINT)
    assert (heard(stage), heard(stage)) == ("dropped", "True")


def listening(process: subprocess.Popen[str]) -> bool:
    """Whether a process has called `listen`; Ctrl-C before it is the interpreter's."""
    blocked = int(Path(f"/proc/{process.pid}/status").read_text().partition("SigBlk:")[2].split()[0], 16)
    return bool(blocked >> (signal.SIGUSR1 - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads signal masks in /proc")
@pytest.mark.parametrize("moments", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", ["check", "pretrain"])
def test_ctrl_c_at_any_moment_of_a_start_ends_it(verb: str, moments: int, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    options = {"check": [], "pretrain": ["--experiment", "aps", "--manifest", str(digits)]}
    environment = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "none", "APS_DEVICE": "cpu"}

    def begin(verb: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "aps", verb, "--configfile", "study.yaml", *options[verb]],
            cwd=tmp_path, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and not listening(process):
            time.sleep(0.001)
        return process

    with begin("check") as process:  # its time is that in which any verb reads a study
        since = time.monotonic()
        process.communicate()
        span = 1.2 * (time.monotonic() - since)
    for moment in range(moments):
        with begin(verb) as process:
            time.sleep(span * moment / moments)
            done = process.poll() is not None
            process.send_signal(signal.SIGINT)
            output, error = process.communicate(timeout=30)
        assert "Traceback" not in error and "Exception ignored" not in error, error
        finished = verb == "check" and "nothing speaks against it" in output
        assert done or finished or process.returncode in (130, -signal.SIGINT), (process.returncode, output, error)


def test_a_second_ctrl_c_stops_at_once(start: Callable[..., Stage]) -> None:
    stage = start("interrupt.stop_requested(ONE)\nprint('polled', flush=True)\nwhile True: time.sleep(0.05)")
    assert heard(stage) == "polled"
    stage.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert stage.poll() is None
    stage.send_signal(signal.SIGINT)
    assert stage.wait(10) == -signal.SIGINT


def test_the_first_signal_is_the_reason(start: Callable[..., Stage]) -> None:
    stage = start(ASK)
    assert heard(stage) == "polled"
    stage.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # standard signals of one moment arrive in any order
    stage.send_signal(signal.SIGINT)
    go_on(stage)
    assert heard(stage) == "True SIGTERM"


def test_decoding_workers_started_afresh_survive_the_warning(start: Callable[..., Stage]) -> None:
    stage = start(
        "import subprocess\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.5)'])\n"
        "here(worker.pid)\nhere(worker.wait())"
    )
    os.kill(int(heard(stage)), signal.SIGUSR1)
    go_on(stage)
    assert heard(stage) == "0"


AGREE = """
import os, sys, time
import torch
from aps.runtime import signals as interrupt
from aps.runtime.processes import processes
interrupt.listen()
interrupt.EXCHANGE_SECONDS = 0.05
with processes() as distributed:
    calls, until = 0, time.monotonic() + 60
    while time.monotonic() < until:
        calls += 1
        if calls == 20 and distributed.rank == 1:
            os.kill(os.getpid(), 10)
        if interrupt.stop_requested(distributed):
            break
        time.sleep(0.001 * distributed.rank)
    print(calls, interrupt.received())
"""


def test_processes_stop_at_the_same_call_though_only_one_was_asked() -> None:
    assert signal.SIGUSR1 == 10
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE],
            env=environment
            | {
                "TORCHELASTIC_RUN_ID": "test",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "APS_DEVICE": "cpu",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (calls0, asked0), (calls1, asked1) = (process.communicate(timeout=120)[0].split(maxsplit=1) for process in both)
    assert calls0 == calls1 and int(calls0) >= 20
    assert (asked0.strip(), asked1.strip()) == ("None", str(signal.SIGUSR1))


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
