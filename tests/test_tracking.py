"""MLflow behind the journal: training never waits for it, and it gets everything in the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_study import fake_job

from aps import tracking
from aps.errors import UserError
from aps.files import read_json
from aps.journal import read_history
from aps.results import StageJob, StageRun
from aps.settings.reading import load_study
from aps.tracking import Tracker, log_report, prepare_store, sync, tracking_address

LINES = 30


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    prepare_store(f"sqlite:///{file}")
    return file


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Under tmp_path/results, as by default; on a busy machine it is waited for."""
    file = tmp_path / "results" / "mlflow.db"
    file.parent.mkdir()
    with contextlib.closing(sqlite3.connect(empty_store)) as whole, contextlib.closing(sqlite3.connect(file)) as copy:
        whole.backup(copy)  # a copied file would lack what is still in the write-ahead log
    uri = f"sqlite:///{file}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 300)
    return uri


def play(job: StageJob, lines: int = LINES, pause: float = 0.0, figure: bool = False) -> dict[str, Any]:
    """A whole stage -> metrics.json, whose `slowest` is its longest step in seconds."""
    slowest = 0.0
    with StageRun(job) as stage:
        for step in range(1, lines + 1):
            start = time.monotonic()
            stage.log(step, loss=1.0 / step, lr=0.1)
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(pause)
        if figure:
            path = stage.staging("picture.png")
            path.write_bytes(b"\x89PNG")
            stage.figure(path)
        stage.finish({"top1": 50.0, "per_class": {"0": 1.0}})
    return {**read_json(job.out / "metrics.json"), "slowest": slowest}


def runs(uri: str, study: str = "tiny") -> list[Any]:
    client = tracking._client(uri)
    experiment = client.get_experiment_by_name(study)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def assert_whole(uri: str, job: StageJob) -> None:
    """MLflow has one run of the job with all that the journal and metrics.json say."""
    (run,) = [run for run in runs(uri) if run.data.tags["results"] == str(job.out)]
    assert run.info.status == "FINISHED" and run.data.metrics["final/top1"] == 50.0
    lines = read_history(job.out / "history.jsonl")
    written = (job.out / "metrics.json").stat().st_mtime
    assert run.info.start_time / 1000 <= lines[0]["time"] <= lines[-1]["time"] < run.info.end_time / 1000 + 0.001
    assert run.info.end_time / 1000 <= written + 1  # of a coarse file system's clock
    assert run.data.params["knn.k"] == "[5]" and run.data.params["seed"] == str(job.settings.seed)
    history = {m.step: m.value for m in tracking._client(uri).get_metric_history(run.info.run_id, "loss")}
    assert history == {line["step"]: line["loss"] for line in lines}
    assert read_json(job.out / "metrics.json")["mlflow_run_id"] == run.info.run_id


# --------------------------------------------------------------------------------------------------
# Without mlflow: what the thread does and what waits for it.


def tracker(folder: Path, lines: int = 0) -> Tracker:
    (folder / "history.jsonl").write_text("".join(f'{{"step": {n}, "time": 1.0, "loss": 0.5}}\n' for n in range(lines)))
    return Tracker(folder, "tiny", "run", {"a": 1}, {"b": "c"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for name, seconds in (("SEND_SECONDS", 0.01), ("RETRY_SECONDS", 0.01), ("FINISH_SECONDS", 1.0)):
        monkeypatch.setattr(tracking, name, seconds)


def test_a_server_that_hangs_holds_up_nothing_but_the_end_for_a_bounded_time(
    tmp_path: Path, server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, never = threading.Event(), threading.Event()
    monkeypatch.setattr(tracking, "send", lambda *_: (hangs.set(), never.wait()))
    own = tracker(tmp_path, 5)
    own.start()
    assert hangs.wait(10)
    start = time.monotonic()
    own.rewind(3)
    assert time.monotonic() - start < 0.5
    assert own.finish({"top1": 1.0}, []) is False
    own.stop(failed=False)
    assert 1.0 <= time.monotonic() - start < 5.0
    assert read_json(own.state_file)["final"] == {"top1": 1.0}
    never.set()
    own._thread.join(10)  # else it would call the next test's `send`
    assert not own._thread.is_alive()


def test_lines_logged_after_a_cut_are_sent_even_if_the_thread_was_sending(
    tmp_path: Path, server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread has read ten lines; the journal is cut to six and grows again before it is done."""
    reading, cut, seen = threading.Event(), threading.Event(), []

    def send(state: dict[str, Any], journal: Path, figures: list[Path]) -> None:
        lines = [json.loads(text) for text in journal.read_text().splitlines()][state["sent"] :]
        reading.set()
        cut.wait(10)
        seen.extend(line.get("new", -1) for line in lines)
        state["sent"] += len(lines)

    monkeypatch.setattr(tracking, "send", send)
    own = tracker(tmp_path, 10)
    own.start()
    assert reading.wait(10)
    journal = tmp_path / "history.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:6]))
    own.rewind(6)
    with journal.open("a") as file:
        file.writelines(f'{{"step": {n}, "time": 2.0, "new": {n}}}\n' for n in (6, 7, 8))
    cut.set()
    assert own.finish({}, [])
    own.stop(failed=False)
    assert [n for n in seen if n >= 0] == [6, 7, 8] and read_json(own.state_file)["sent"] == 9


def test_what_got_through_before_a_failure_is_not_sent_twice(
    tmp_path: Path, server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, int]] = []

    def send(state: dict[str, Any], journal: Path, figures: list[Path]) -> None:
        calls.append((state["run_id"], state["sent"]))
        state["run_id"] = "abc"
        if len(calls) < 4:
            state["sent"] += 1
            raise ConnectionError

    monkeypatch.setattr(tracking, "send", send)
    own = tracker(tmp_path, 5)
    own.start()
    while len(calls) < 4:
        time.sleep(0.01)
    own.stop(failed=False)
    assert calls[:4] == [(None, 0), ("abc", 1), ("abc", 2), ("abc", 3)]
    again = Tracker(tmp_path, "tiny", "run", {}, {})
    assert again.run_id == "abc"


def test_a_failed_run_is_told_once_and_goes_on_as_the_same_run(
    tmp_path: Path, server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def send(state: dict[str, Any], journal: Path, figures: list[Path]) -> None:
        told.append(state["status"])
        state["run_id"] = "abc"
        if state["status"] == "FAILED":
            state |= {"status": "RUNNING", "described": False}

    monkeypatch.setattr(tracking, "send", send)
    own = tracker(tmp_path)
    own.start()
    own.stop(failed=True)
    assert told.count("FAILED") == 1 and told[-1] == "FAILED"
    state = read_json(own.state_file)
    assert (state["run_id"], state["status"], state["described"]) == ("abc", "RUNNING", False)


def test_none_turns_mlflow_off_and_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); from test_tracking import *\n"
        "play(fake_job(Path(sys.argv[1]))); print('mlflow' in sys.modules)"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": "none"}
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def test_the_environment_wins_over_the_study_over_the_results_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plain: dict[str, Any] = {"results": "out", "experiments": {"e": {"dataset": "digits"}}}
    study = load_study([], plain)
    assert tracking_address(study.tracking_uri, study.results) == f"sqlite:///{tmp_path}/out/mlflow.db"
    study = load_study([], plain | {"tracking_uri": "http://study"})
    assert tracking_address(study.tracking_uri, study.results) == "http://study"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_address(study.tracking_uri, study.results) == "http://environment"


# --------------------------------------------------------------------------------------------------
# SQLite.


def test_a_run_has_params_tags_curves_final_metrics_and_figures(tmp_path: Path, store: str) -> None:
    job = fake_job(tmp_path / "results")
    found = play(job, figure=True)
    assert found["mlflow_complete"] is True
    assert_whole(store, job)
    (run,) = runs(store)
    assert run.info.run_name == "aps/seed0/knn"
    assert {
        "stage": "knn",
        "experiment": "aps",
        "dataset": "digits",
        "settings_digest": job.settings.digest,
    }.items() <= (run.data.tags.items())
    artifacts = tracking._client(store).list_artifacts(run.info.run_id, "figures")
    assert [file.path for file in artifacts] == ["figures/picture.png"]
    assert sync(tmp_path / "results", store) == (0, 0)  # nothing to do


def test_a_resumed_stage_goes_on_in_its_run(tmp_path: Path, store: str) -> None:
    job = fake_job(tmp_path / "results")
    with pytest.raises(KeyboardInterrupt), StageRun(job) as stage:
        stage.log(1, loss=9.0)
        stage.log(2, loss=9.0)
        deadline = time.monotonic() + 120
        while stage.tracker.run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        raise KeyboardInterrupt
    with StageRun(job) as stage:
        stage.resume(1)
        stage.log(2, loss=0.5)
        stage.finish({"top1": 50.0})
    assert_whole(store, job)


def test_what_a_dead_server_missed_comes_with_sync_and_only_once(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    with monkeypatch.context() as away:
        away.setattr(tracking, "send", lambda *_: (_ for _ in ()).throw(ConnectionError("down")))
        job = fake_job(tmp_path / "results")
        found = play(job)
        assert found["mlflow_complete"] is False and found["mlflow_run_id"] is None
        assert sync(tmp_path / "results", store) == (0, 1)
    assert sync(tmp_path / "results", store) == (1, 0)
    assert_whole(store, job)
    assert sync(tmp_path / "results", store) == (0, 0)
    assert len(runs(store)) == 1


def test_results_made_without_mlflow_or_for_another_server_can_be_sent_later(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as off:
        off.setenv("MLFLOW_TRACKING_URI", "none")
        job = fake_job(tmp_path / "results")
        play(job)
    assert sync(tmp_path / "results", store) == (1, 0)
    assert_whole(store, job)


def test_a_run_whose_creation_was_not_heard_of_is_found_again(tmp_path: Path, store: str) -> None:
    job = fake_job(tmp_path / "results")
    play(job)
    state = read_json(job.out / "tracking.json")
    (job.out / "tracking.json").write_text(json.dumps(state | {"run_id": None, "described": False, "sent": 0}))
    found = read_json(job.out / "metrics.json")
    (job.out / "metrics.json").write_text(json.dumps(found | {"mlflow_complete": False}))
    assert sync(tmp_path / "results", store) == (1, 0)
    assert_whole(store, job)


def test_a_moved_results_folder_keeps_its_runs_and_gets_no_others(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(fake_job(tmp_path / "results"))
    moved = (tmp_path / "results").rename(tmp_path / "moved")
    uri = f"sqlite:///{moved / 'mlflow.db'}"
    assert sync(moved, uri) == (1, 0)
    assert len(runs(uri)) == 1 and sync(moved, uri) == (0, 0)


def test_the_report_is_one_run_however_often_it_is_made(tmp_path: Path, store: str) -> None:
    log_report(store, "tiny", [])  # no study yet: nothing happens
    assert runs(store) == []
    play(fake_job(tmp_path / "results"), lines=1)
    page = tmp_path / "report.html"
    for text in ("first", "second"):
        page.write_text(text)
        log_report(store, "tiny", [page])
    (report,) = [run for run in runs(store) if run.data.tags["stage"] == "report"]
    assert [file.path for file in tracking._client(store).list_artifacts(report.info.run_id)] == ["report.html"]


def test_a_store_that_cannot_be_created_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"mlflow.db: MLflow's store cannot be created \(.*\); set tracking_uri or"):
        prepare_store(f"sqlite:///{tmp_path}/file/mlflow.db")


WRITER = (
    "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from test_tracking import *\n"
    "tracking.FINISH_SECONDS = 240\n"
    "play(fake_job(Path(sys.argv[1]), seed=int(sys.argv[2])))"
)


def writer(results: Path, seed: int, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(results), str(seed), str(Path(__file__).parent)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.end_to_end
def test_several_processes_create_one_store_at_once_and_write_to_it_together(tmp_path: Path, store: str) -> None:
    """No rule has prepared the store: as when people start several stages by hand."""
    results = tmp_path / "results"
    (results / "mlflow.db").unlink()
    jobs = [fake_job(results, seed=seed) for seed in range(3)]
    processes = [writer(results, seed) for seed in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and "did not take everything" not in errors, errors
    for job in jobs:
        assert_whole(store, job)
    assert len(runs(store)) == 3


# --------------------------------------------------------------------------------------------------
# A real server.


class Server:
    """`mlflow server` on a free port; killed, it can be started again there with the same store."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--default-artifact-root", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                if urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200:
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_down_at_the_start_killed_in_the_middle_and_restarted_loses_nothing(
    tmp_path: Path, real_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("SEND_SECONDS", 0.2), ("RETRY_SECONDS", 0.5), ("FINISH_SECONDS", 5.0)):
        monkeypatch.setattr(tracking, name, seconds)
    results = tmp_path / "results"

    down = fake_job(results, seed=0)  # the server is not there at all
    found = play(down, pause=0.02)
    assert found["mlflow_complete"] is False and found["slowest"] < 1.0

    real_server.start()
    killed = fake_job(results, seed=1)  # it goes in the middle, and stays away
    with StageRun(killed) as stage:
        for step in range(1, 11):
            stage.log(step, loss=1.0 / step)
        deadline = time.monotonic() + 60
        while read_json(killed.checkpoints / "tracking.json")["sent"] < 10 and time.monotonic() < deadline:
            time.sleep(0.1)
        real_server.kill()
        slowest = 0.0
        for step in range(11, 21):
            start = time.monotonic()
            stage.log(step, loss=1.0 / step)
            slowest = max(slowest, time.monotonic() - start)
        stage.finish({"top1": 50.0})
    state = read_json(killed.out / "tracking.json")
    assert state["sent"] == 10 and state["run_id"] is not None and slowest < 1.0

    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"results": str(results), "experiments": {"aps": {"dataset": "digits"}}}))
    command = [sys.executable, "-m", "aps", "sync", "--configfile", str(study)]
    away = subprocess.run(command, capture_output=True, text=True)
    assert away.returncode == 2 and "did not take 2 runs; start it and run" in away.stderr

    real_server.start()
    back = subprocess.run(command, capture_output=True, text=True)
    assert back.returncode == 0 and "2 runs brought up to date, 0 could not be sent" in back.stdout, back.stderr
    for job in (down, killed):
        assert_whole(real_server.uri, job)
