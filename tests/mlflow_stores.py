"""MLflow for tests: a real server, servers that answer badly, and the runs and points that a store has."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aps.tracking.describing import About, describe
from aps.tracking.sending import Sender
from aps.tracking.server import Server
from aps.tracking.state import State


def about(name: str = "aps", seed: int = 0, stage: str = "pretrain", study: str = "tiny", **more: Any) -> About:
    """The description of a made-up run."""
    settings = {"stage": stage, "experiment": name, "seed": seed, "upstream": None, stage: {"epochs": 2}}
    metrics = {
        "stage": stage, "experiment": name, "seed": seed, "settings": settings, "settings_digest": "0" * 16,
        "started": "2026-11-25T12:00:00+00:00", "dataset": {"name": "digits", "digest": "01" * 32},
    }  # fmt: skip
    return describe(metrics | more, study)


def journal(folder: Path, lines: int, first: int = 1, clock: float = 1.7e9) -> None:
    """Append lines with two metrics to the journal."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "history.jsonl").open("a") as file:
        for step in range(first, first + lines):
            file.write(json.dumps({"step": step, "time": clock + step, "loss": 1 / step, "step_ms": clock % 7}) + "\n")


def sender(address: str, folder: Path, run: About, finals: dict[str, float] | None = None, **more: Any) -> Sender:
    return Sender(State(address=address, about=run, finals=finals, **more), folder)


def runs(address: str, study: str = "tiny") -> list[Any]:
    client = Server(address).client
    experiment = client.get_experiment_by_name(study)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def points(address: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Every point of a metric in MLflow: (step, value); one that is there twice is listed twice."""
    return sorted((m.step, m.value) for m in Server(address).client.get_metric_history(run_id, key))


def assert_once(address: str, job: About, steps: int, study: str = "tiny") -> Any:
    """Assert that MLflow has one run of the job, with each of the journal's points once -> the run."""
    (run,) = [run for run in runs(address, study) if run.info.run_name == job.name]
    for key in ("loss", "step_ms"):
        counts = Counter(step for step, _ in points(address, run.info.run_id, f"{job.stage}/{key}"))
        assert counts == Counter(range(1, steps + 1)), (key, counts)
    return run


class RealServer:
    """`mlflow server` on a free port. After a kill it can be started again with the same port and store."""

    def __init__(self, folder: Path, store: str | None = None, workers: int = 1) -> None:
        self.port = free_port()
        self.uri, self.folder, self.workers = f"http://127.0.0.1:{self.port}", folder, workers
        self.store = store or f"sqlite:///{folder}/server.db"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.store, "--workers", str(self.workers)]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), *more]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves ten processes
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=environment
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            try:
                if urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def stop_answering(self) -> None:
        """Pause all its processes: connections are accepted, but nothing is answered."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def answer_again(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def status(code: int, body: str = "", kind: str = "text/html") -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


def hang(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(60)


@contextmanager
def bad_server(answer: Answer) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that gives the same answer to every request -> its address, and the headers of the requests."""
    requests: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            requests.append(dict(self.headers))
            answer(self)

        do_GET = do_POST = do_PATCH = do_PUT = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
