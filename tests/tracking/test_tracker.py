"""MLflow behind the journal: training never waits for it, and it gets everything in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_stores import RealServer, about, bad_server, hang, points, runs, sender, status
from tiny_study import fake_job

from aps.errors import Preempted
from aps.files import read_json
from aps.journal import read_history
from aps.results import StageJob, StageRun, forget
from aps.tracking import sending, system, tracker
from aps.tracking.describing import metric_name
from aps.tracking.sending import Sender
from aps.tracking.server import ARTIFACTS, Server
from aps.tracking.state import read_state
from aps.tracking.tracker import Tracker

LINES = 30


def play(job: StageJob, lines: int = LINES, pause: float = 0.0, figure: bool = False, first: int = 1) -> dict[str, Any]:
    """A whole stage -> metrics.json, whose `slowest` is its longest step in seconds."""
    slowest = 0.0
    with StageRun(job) as stage:
        stage.resume(first - 1)
        for step in range(first, lines + 1):
            start = time.monotonic()
            stage.log(step, loss=1.0 / step, step_ms=time.time() % 9)
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(pause)
        if figure:
            path = stage.staging("picture.png")
            path.write_bytes(b"\x89PNG")
        stage.finish({"knn_top1_k5": 50.0, "temperature": 0.07, "per_class": {"0": 1.0}})
    return {**read_json(job.out / "metrics.json"), "slowest": slowest}


def assert_whole(address: str, job: StageJob) -> Any:
    """MLflow has one run of the job with all that the journal and metrics.json say -> the run."""
    name = f"{job.settings.experiment}/seed{job.settings.seed}/{job.settings.stage}"
    (run,) = [run for run in runs(address) if run.info.run_name == name]
    assert run.info.status == "FINISHED" and run.data.metrics["knn/top1_k5"] == 50.0
    lines = read_history(job.out / "history.jsonl")
    written = (job.out / "metrics.json").stat().st_mtime
    assert run.info.start_time / 1000 <= lines[0]["time"] <= lines[-1]["time"] < run.info.end_time / 1000 + 0.001
    assert run.info.end_time / 1000 <= written + 1  # of a coarse file system's clock
    assert run.data.params["knn.k"] == "[5]" and run.data.params["seed"] == str(job.settings.seed)
    assert points(address, run.info.run_id, "knn/loss") == [(line["step"], line["loss"]) for line in lines]
    assert len(points(address, run.info.run_id, "knn/step_ms")) == len(lines)
    assert read_json(job.out / "metrics.json")["mlflow_run_id"] == run.info.run_id
    return run


# --------------------------------------------------------------------------------------------------
# The thread, with a sender of the test's.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEND_SECONDS", "RETRY_SECONDS", "LAST_RETRY_SECONDS"):
        monkeypatch.setattr(tracker, name, 0.01)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 1.0)


def own_tracker(folder: Path) -> Tracker:
    return Tracker("http://127.0.0.1:9", folder, about())


def test_a_server_that_hangs_holds_up_nothing_but_the_end_for_a_bounded_time(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, never = threading.Event(), threading.Event()
    monkeypatch.setattr(Sender, "send", lambda _: (hangs.set(), never.wait())[1])
    own = own_tracker(tmp_path)
    own.start()
    assert hangs.wait(10)
    start = time.monotonic()
    own.rewind(3)
    assert time.monotonic() - start < 0.5
    assert own.finish({"top1": 1.0}, []) is False and own.reason == "it does not answer (timed out)"
    own.stop()
    assert 1.0 <= time.monotonic() - start < 5.0
    state = read_state(own.state_file)
    assert state is not None and state.finals == {"top1": 1.0} and not state.complete
    never.set()
    own._thread.join(10)  # else it would call the next test's `send`
    assert not own._thread.is_alive()


def test_the_first_failure_after_the_end_ends_the_waiting_where_trying_again_is_in_vain(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 100.0)
    calls: list[bool] = []

    def refused(own: Sender) -> bool:
        calls.append(own.state.finals is not None)
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(Sender, "send", refused)
    own = own_tracker(tmp_path)
    own.start()
    while not calls:
        time.sleep(0.01)
    start = time.monotonic()
    assert own.finish({}, []) is False and own.reason == "nothing listens there (connection refused)"
    assert time.monotonic() - start < 30
    assert calls.count(True) == 1


def test_an_error_of_the_moment_is_tried_again_at_the_end(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 100.0)
    failures = iter([True, True, False])

    def busy(own: Sender) -> bool:
        if own.state.finals is None:
            return False
        if next(failures):
            raise RuntimeError("failed with error code 503")
        own.state.complete = True
        return True

    monkeypatch.setattr(Sender, "send", busy)
    own = own_tracker(tmp_path)
    own.start()
    assert own.finish({}, []) is True


def test_what_got_through_before_a_failure_is_kept(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str | None] = []

    def send(own: Sender) -> bool:
        calls.append(own.state.run_id)
        own.state.run_id = "abc"
        raise ConnectionError

    monkeypatch.setattr(Sender, "send", send)
    own = own_tracker(tmp_path)
    own.start()
    while len(calls) < 3:
        time.sleep(0.01)
    own.stop()
    assert calls[:3] == [None, "abc", "abc"] and own_tracker(tmp_path).run_id == "abc"


def test_a_state_of_another_job_and_a_damaged_one_start_afresh_under_the_same_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = own_tracker(tmp_path)
    own.state.run_id = "abc"
    own.state.write(own.state_file)
    assert Tracker("http://127.0.0.1:9", tmp_path, about(seed=1)).run_id is None
    own.state_file.write_text("[1]")
    again = own_tracker(tmp_path)
    assert again.run_id is None and again.state.about.key == own.state.about.key
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, told", [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (Preempted("x"), "KILLED")]
)
def test_a_run_that_did_not_finish_is_marked_and_goes_on_as_the_same_run(
    tmp_path: Path, store: str, error: BaseException, told: str
) -> None:
    job = fake_job(tmp_path / "results", tracking=store)
    with pytest.raises(type(error)), StageRun(job) as stage:
        stage.log(1, loss=1.0, step_ms=1.0)
        deadline = time.monotonic() + 120
        while stage.tracker.run_id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        raise error
    (run,) = runs(store)
    assert run.info.status == told
    play(job, first=2)
    assert_whole(store, job)


def test_none_turns_mlflow_off_and_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]; from tiny_study import fake_job\n"
        "from aps.results import StageRun\n"
        "with StageRun(fake_job(Path(sys.argv[1]))) as stage: stage.log(1, loss=1.0); stage.finish({})\n"
        "print('mlflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent.parent)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


# --------------------------------------------------------------------------------------------------
# Stages, a store, and servers that answer badly.


def test_a_run_has_params_tags_curves_final_metrics_figures_and_its_dataset(tmp_path: Path, store: str) -> None:
    job = fake_job(tmp_path / "results", tracking=store, description="What *it* is.")
    found = play(job, figure=True)
    assert found["mlflow_complete"] is True
    run = assert_whole(store, job)
    tags = run.data.tags
    assert (tags["stage"], tags["experiment"], tags["seed"], tags["dataset"]) == ("knn", "aps", "0", "digits")
    assert tags["mlflow.note.content"] == "What *it* is."
    assert tags["mlflow.aps.settings_digest"] == job.settings.digest and "digest" not in " ".join(
        key for key in tags if not key.startswith("mlflow.")
    )
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "0123")
    assert {"knn/loss", "knn/step_ms", "knn/top1_k5", "cost/seconds", "cost/peak_memory_gb"} == set(run.data.metrics)
    artifacts = tmp_path / "results" / ARTIFACTS / "tiny" / run.info.run_id / "artifacts" / "figures" / "picture.png"
    assert artifacts.read_bytes() == b"\x89PNG" and run.info.artifact_uri.startswith("mlflow-artifacts:/tiny/")


@pytest.mark.parametrize(
    "answer, reason",
    [
        (status(401, "who?"), "401: it asks who you are; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
         "MLFLOW_TRACKING_TOKEN"),
        (status(200, "{}", "application/json"), "it answers, but not as MLflow does"),
        (hang, "it does not answer (timed out)"),
    ],
    ids=["401", "{}", "hangs"],
)  # fmt: skip
def test_the_last_line_of_a_stage_says_why_mlflow_lacks_something_and_it_finishes(
    tmp_path: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: Any,
    reason: str,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 5)
    with bad_server(answer) as (address, _):
        found = play(fake_job(tmp_path / "results", tracking=address))
    assert found["mlflow_complete"] is False and found["metrics"]["knn_top1_k5"] == 50.0 and found["slowest"] < 1.0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"knn aps/seed0: MLflow did not take everything ({reason}); `python -m aps sync` sends it later"


def test_a_kill_while_the_end_waits_for_the_server_opens_no_second_run(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final figures were handed over and tracking.json says so; then the process died, and the stage runs again."""
    job = fake_job(tmp_path / "results", tracking=store)

    def die(*_: Any) -> bool:
        raise SystemExit

    with pytest.raises(SystemExit), StageRun(job) as stage:
        for step in range(1, LINES + 1):
            stage.log(step, loss=1.0 / step, step_ms=1.0)
        monkeypatch.setattr(stage.tracker, "stop", lambda *_: stage.tracker._end.set())
        monkeypatch.setattr(stage.tracker._ended, "wait", die)
        monkeypatch.setattr(stage.tracker._sender, "send", lambda: False)  # it hangs
        stage.finish({"knn_top1_k5": 50.0})
    stage.tracker._thread.join(60)
    state = read_state(job.checkpoints / "tracking.json")
    assert state is not None and state.finals is not None
    sender(store, job.checkpoints, state.about).send()  # its run is in MLflow, RUNNING
    assert [run.info.status for run in runs(store)] == ["RUNNING"]
    play(job)
    assert_whole(store, job)


def test_the_same_stage_computed_again_is_another_run(tmp_path: Path, store: str) -> None:
    job = fake_job(tmp_path / "results", tracking=store)
    play(job)
    forget(job.checkpoints)
    time.sleep(1.1)  # runs are told apart by the second they began in
    play(job)
    assert len(runs(store)) == 2


def test_the_machine_is_sampled_beside_a_long_stage_and_goes_on_where_it_was(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("FIRST_SECONDS", 0.0), ("SAMPLE_SECONDS", 0.01)):
        monkeypatch.setattr(system, name, seconds)
    job = fake_job(tmp_path / "results", tracking=store)
    file = job.checkpoints / sending.SYSTEM

    def until(lines: int) -> None:
        deadline = time.monotonic() + 120
        while (not file.exists() or len(file.read_text().splitlines()) < lines) and time.monotonic() < deadline:
            time.sleep(0.05)

    with pytest.raises(Preempted), StageRun(job) as stage:
        until(2)
        raise Preempted("asked to")
    with StageRun(job) as stage:
        until(len(file.read_text().splitlines()) + 2)
        stage.finish({})
    (run,) = runs(store)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= set(run.data.metrics)
    steps = [step for step, _ in points(store, run.info.run_id, "system/cpu_utilization_percentage")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4


def test_names_are_the_stages_and_the_same_for_curves_and_final_figures() -> None:
    names = {
        ("pretrain", "loss"): "pretrain/loss",
        ("finetune", "test_top1"): "finetune/test_top1",
        ("linear_probe", "test_top1"): "probe/test_top1",
        ("linear_probe", "loss_lr0.01"): "probe/loss_lr0.01",
        ("knn", "knn_top1_k20"): "knn/top1_k20",
        ("detection", "box_AP"): "detection/box_AP",
        ("detection", "mask_AP/traffic light"): "detection/mask_AP/traffic light",
        ("detection", "mask_AP/é+"): "detection/mask_AP/__",
        ("pretrain", "epoch"): "epoch",
    }
    assert {(stage, key): metric_name(stage, key) for stage, key in names} == names


WRITER = (
    "import sys; from pathlib import Path; sys.path[:0] = sys.argv[4:]; from test_tracker import *\n"
    "tracker.FINISH_SECONDS = 240\n"
    "play(fake_job(Path(sys.argv[1]), seed=int(sys.argv[2]), tracking=sys.argv[3]))"
)


def writer(results: Path, seed: int, address: str) -> subprocess.Popen[str]:
    helpers = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", WRITER, str(results), str(seed), address, *helpers]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.end_to_end
def test_several_processes_create_one_store_at_once_and_write_to_it_together(tmp_path: Path) -> None:
    """No rule has prepared the store: as when people start several stages by hand."""
    results = tmp_path / "results"
    address = f"sqlite:///{results}/mlflow.db"
    jobs = [fake_job(results, seed=seed) for seed in range(3)]
    processes = [writer(results, seed, address) for seed in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and "did not take everything" not in errors, errors
    for job in jobs:
        assert_whole(address, job)
    assert len(runs(address)) == 3


# --------------------------------------------------------------------------------------------------
# A real server.


@pytest.fixture
def real_server(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path)
    yield server
    server.kill()


def sync_study(tmp_path: Path, results: Path, address: str, seeds: list[int]) -> subprocess.CompletedProcess[str]:
    """`python -m aps sync` of the fake jobs' study."""
    experiment = {
        "dataset": "digits",
        "seeds": seeds,
        "stages": ["knn"],
        "encoder": {"weights": "random"},
        "knn": {"k": [5]},
    }
    study = {"study": "tiny", "results": str(results), "tracking_uri": address, "experiments": {"aps": experiment}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    command = [sys.executable, "-m", "aps", "sync", "--configfile", str(tmp_path / "study.yaml")]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_a_server_down_at_the_start_killed_in_the_middle_and_restarted_loses_nothing(
    tmp_path: Path, real_server: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("SEND_SECONDS", 0.2), ("RETRY_SECONDS", 0.5), ("FINISH_SECONDS", 5.0)):
        monkeypatch.setattr(tracker, name, seconds)
    results = tmp_path / "results"

    down = fake_job(results, seed=0, tracking=real_server.uri)  # the server is not there at all
    found = play(down, pause=0.02)
    assert found["mlflow_complete"] is False and found["slowest"] < 1.0

    real_server.start()
    killed = fake_job(results, seed=1, tracking=real_server.uri)  # it goes in the middle, and stays away
    with StageRun(killed) as stage:
        for step in range(1, 11):
            stage.log(step, loss=1.0 / step, step_ms=1.0)
        deadline = time.monotonic() + 60
        while stage.tracker.run_id is None and time.monotonic() < deadline:
            time.sleep(0.1)
        real_server.kill()
        slowest = 0.0
        for step in range(11, 21):
            start = time.monotonic()
            stage.log(step, loss=1.0 / step, step_ms=1.0)
            slowest = max(slowest, time.monotonic() - start)
        stage.finish({"knn_top1_k5": 50.0})
    assert slowest < 1.0 and not read_json(killed.out / "metrics.json")["mlflow_complete"]

    away = sync_study(tmp_path, results, real_server.uri, [0, 1])
    assert away.returncode == 2 and "did not take 2 runs (nothing listens there (connection refused))" in away.stderr
    real_server.start()
    back = sync_study(tmp_path, results, real_server.uri, [0, 1])
    assert (
        back.returncode == 0
        and back.stdout == "MLflow: 2 runs brought up to date, 0 models logged, 0 could not be sent\n"
    ), back
    for job in (down, killed):
        assert_whole(real_server.uri, job)


@pytest.mark.slow
def test_stages_killed_again_and_again_against_a_real_server_that_sleeps_now_and_then_send_each_point_once(
    tmp_path: Path, real_server: RealServer
) -> None:
    """SIGKILL to the stage at chosen moments, SIGSTOP to the server around some of them."""
    real_server.start()
    results, job = tmp_path / "results", fake_job(tmp_path / "results", tracking=real_server.uri)
    code = WRITER.replace("240", "20").replace(
        "play(", "tracker.SEND_SECONDS = tracker.RETRY_SECONDS = 0.1; play(pause=0.1, lines=60, job="
    )
    helpers = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", code, str(results), "0", real_server.uri, *helpers]
    for attempt in range(4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        lines = job.checkpoints / "history.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not lines.exists() or len(lines.read_text().splitlines()) < 30):
            time.sleep(0.05)
        time.sleep(0.5 + attempt)
        if attempt % 2:
            real_server.stop_answering()
            time.sleep(1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if attempt % 2:
            real_server.answer_again()
    subprocess.run(command, check=True, timeout=300)
    (run,) = runs(real_server.uri)
    for key in ("knn/loss", "knn/step_ms"):
        assert [step for step, _ in points(real_server.uri, run.info.run_id, key)] == list(range(1, 61))
    assert run.info.status == "FINISHED"
    assert [run.info.status for run in Server(real_server.uri).client.search_runs([run.info.experiment_id])] == [
        "FINISHED"
    ]
