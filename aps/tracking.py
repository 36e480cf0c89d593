"""MLflow, second to the journal: the only module that imports mlflow.

A stage writes history.jsonl; a thread here reads it and sends what is new. Training never waits for the server: while it
is down the thread tries again now and then, at the end of the stage for a bounded time, and what is still missing then is
sent by `python -m aps sync` or the next report. How far it got lies in tracking.json beside the journal.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.files import read_json, write_json
from aps.journal import read_history
from aps.seals import read_metrics, seal

OFF = "none"  # tracking_uri that turns MLflow off
SEND_SECONDS = 5.0  # between two looks at the journal
RETRY_SECONDS = 30.0  # after the server did not answer
FINISH_SECONDS = 30.0  # how long the end of a stage waits for the server
BATCH = 900  # metrics a request; MLflow takes 1000

_prepared: set[str] = set()  # SQLite stores that this process has seen whole


def tracking_address(wanted: str | None, results: str | Path) -> str:
    """MLFLOW_TRACKING_URI, else the address `wanted` by the study, else SQLite in its results folder."""
    default = f"sqlite:///{Path(results).resolve() / 'mlflow.db'}"
    return os.environ.get("MLFLOW_TRACKING_URI") or wanted or default


def prepare_store(uri: str) -> None:
    """Create a SQLite store, one process at a time: a race in MLflow's schema migration leaves it broken for good."""
    from mlflow.tracking import MlflowClient

    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"{file}: MLflow's store cannot be created ({error}); set tracking_uri or MLFLOW_TRACKING_URI"
        ) from None


class Tracker:
    """Sends one stage's journal to one MLflow run from a thread of its own.

    Args:
        address: of the server or store, or OFF.
        folder: where history.jsonl grows and tracking.json is kept; a folder that has a tracking.json goes on with its run.
        study: name of the MLflow experiment.
        name: of the run.
        params, tags: of the run.
    """

    def __init__(
        self, address: str, folder: Path, study: str, name: str, params: dict[str, Any], tags: dict[str, str]
    ) -> None:
        self.state_file = folder / "tracking.json"
        self._uri = address
        fresh = {
            "uri": self._uri,
            "study": study,
            "name": name,
            "params": params,
            "tags": tags,
            "key": uuid.uuid4().hex,
            "run_id": None,
            "described": False,
            "sent": 0,
            "started": _now(),  # of the stage: it may be long until the server hears of it
            "ended": None,
            "final": None,
            "status": "RUNNING",
        }
        state = read_json(self.state_file) if self.state_file.exists() else fresh
        self._state: dict[str, Any] = state if state["uri"] == self._uri and state["final"] is None else fresh
        self._figures: list[Path] = []
        self._journal = folder / "history.jsonl"
        self._wake, self._end, self._complete = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()  # of _state and _cut; never held while the server is talked to
        self._cut: int | None = None  # lines the journal was cut to while the thread was sending
        self._thread = threading.Thread(target=self._loop, daemon=True, name="mlflow")

    @property
    def run_id(self) -> str | None:
        return self._state["run_id"]

    def start(self) -> None:
        self._save()
        if self._uri != OFF:
            self._thread.start()

    def rewind(self, lines: int) -> None:
        """The journal was cut to `lines` lines."""
        with self._lock:
            self._state["sent"] = min(self._state["sent"], lines)
            self._cut = lines

    def finish(self, metrics: dict[str, float], figures: list[Path]) -> bool:
        """Hand over the final figures and wait a bounded time. Returns whether MLflow has everything."""
        with self._lock:
            self._state |= {"final": metrics, "status": "FINISHED", "ended": _now()}
            self._figures = figures
            self._save()
        if self._uri == OFF:
            return True
        self._wake.set()
        return self._complete.wait(FINISH_SECONDS)

    def stop(self, failed: bool) -> None:
        """End the thread; a run that failed is marked so if the server can be told now."""
        if self._uri == OFF:
            return
        if failed:
            with self._lock:
                self._state["status"] = "FAILED"
        self._end.set()
        self._wake.set()
        self._thread.join(timeout=5 if failed else 1)

    def _save(self) -> None:
        if self.state_file.parent.exists():
            write_json(self.state_file, self._state)

    def _loop(self) -> None:
        while True:
            ending = self._end.is_set()
            try:
                complete = self._send()
                pause = SEND_SECONDS
            except Exception as error:  # whatever a server or a locked database answers, training goes on
                logging.getLogger(__name__).debug("MLflow: %s", error)
                complete, pause = False, 2.0 if self._state["final"] is not None else RETRY_SECONDS
            if complete:
                self._complete.set()
            if ending or complete:
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _send(self) -> bool:
        """Send what is new; returns whether that was the last of it. What got through is kept where the rest fails."""
        with self._lock:
            self._cut, state = None, dict(self._state)
            failed = state["status"] == "FAILED"
        try:
            send(state, self._journal, self._figures)
        finally:
            with self._lock:
                sent = state["sent"] if self._cut is None else min(state["sent"], self._cut)
                self._state |= {"run_id": state["run_id"], "described": state["described"], "sent": sent}
                if failed:
                    self._state["status"] = state["status"]
                self._save()
        return state["final"] is not None


def send(state: dict[str, Any], journal: Path, figures: list[Path]) -> None:
    """Bring the MLflow run of `state` up to date; changes `state` as it goes, so that a failure loses nothing.

    Raises:
        Exception: whatever mlflow raises when the server does not take it.
    """
    from mlflow.entities import Metric, Param, RunTag

    client = _client(state["uri"])
    if state["run_id"] is None:
        experiment = client.get_experiment_by_name(state["study"])
        experiment_id = experiment.experiment_id if experiment else _create_experiment(client, state)
        # The answer to an earlier attempt may have been lost with the server or this process.
        known = client.search_runs([experiment_id], f"tags.journal = '{state.get('key')}'", max_results=1)
        tags = state["tags"] | {"journal": state.get("key", "")}
        run = (
            known[0]
            if known
            else client.create_run(experiment_id, start_time=state.get("started"), run_name=state["name"], tags=tags)
        )
        state["run_id"] = run.info.run_id
    run_id = state["run_id"]
    if not state["described"]:
        params = [Param(key, str(value)) for key, value in state["params"].items()]
        client.log_batch(run_id, params=params, tags=[RunTag("mlflow.source.name", "python -m aps")])
        client.update_run(run_id, status="RUNNING")
        state["described"] = True
    lines = read_history(journal, state["sent"])
    while lines:
        some = 0
        metrics: list[Metric] = []
        for line in lines:
            values = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "time")}
            if metrics and len(metrics) + len(values) > BATCH:
                break
            metrics += [Metric(k, v, int(line["time"] * 1000), line["step"]) for k, v in values.items()]
            some += 1
        client.log_batch(run_id, metrics=metrics)
        state["sent"] += some
        lines = lines[some:]
    if state["final"] is not None:
        ended = state.get("ended") or _now()
        client.log_batch(run_id, metrics=[Metric(f"final/{k}", float(v), ended, 0) for k, v in state["final"].items()])
        for figure in figures:
            client.log_artifact(run_id, str(figure), "figures")
        client.set_terminated(run_id, "FINISHED", ended)
    elif state["status"] == "FAILED":
        client.set_terminated(run_id, "FAILED")
        state |= {"status": "RUNNING", "described": False}  # a resumed run is set running again


def sync(folder: Path, uri: str) -> tuple[int, int]:
    """Send what MLflow missed of every finished stage in a study's folder. Returns (sent, still missing)."""
    sent = missing = 0
    for state_file in sorted(folder.glob("*/seed*/*/tracking.json")):
        metrics_file = state_file.with_name("metrics.json")
        if uri == OFF or not metrics_file.exists():
            continue
        metrics, state = read_metrics(metrics_file), read_json(state_file)
        if metrics["mlflow_complete"] and state["uri"] == uri:
            continue
        state["final"] = {k: v for k, v in metrics["metrics"].items() if isinstance(v, int | float)}
        try:
            if state["uri"] != uri:  # the stage ran without tracking, its results went to another server or were moved
                state["uri"] = uri
                if not _has_run(uri, state["run_id"]):
                    state |= {"run_id": None, "described": False, "sent": 0}
            send(state, state_file.with_name("history.jsonl"), sorted(state_file.parent.glob("*.png")))
        except Exception as error:
            logging.getLogger(__name__).warning("MLflow at %s does not answer: %s", uri, error)
            missing += 1
            continue
        finally:
            write_json(state_file, state)
        write_json(metrics_file, seal(metrics | {"mlflow_complete": True, "mlflow_run_id": state["run_id"]}))
        sent += 1
    return sent, missing


def _has_run(uri: str, run_id: str | None) -> bool:
    """Raises what mlflow raises when the server does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        return run_id is not None and _client(uri).get_run(run_id) is not None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def log_report(uri: str, study: str, files: list[Path]) -> None:
    """One MLflow run with the study's table and figures; silent where the server is away."""
    if uri == OFF:
        return
    try:
        client = _client(uri)
        experiment = client.get_experiment_by_name(study)
        if experiment is None:
            return
        old = client.search_runs([experiment.experiment_id], "tags.stage = 'report'", max_results=1)
        run = (
            old[0] if old else client.create_run(experiment.experiment_id, run_name="report", tags={"stage": "report"})
        )
        for file in files:
            client.log_artifact(run.info.run_id, str(file))
        client.set_terminated(run.info.run_id, "FINISHED")
    except Exception as error:
        logging.getLogger(__name__).warning("MLflow at %s does not take the report: %s", uri, error)


def _create_experiment(client: Any, state: dict[str, Any]) -> str:
    """Two stages may both find no experiment: whoever comes second takes the first one's."""
    location = None
    if state["uri"].startswith("sqlite:///"):  # else artifacts land in the working directory
        location = (Path(state["uri"].removeprefix("sqlite:///")).parent / "mlartifacts" / state["study"]).as_uri()
    try:
        return str(client.create_experiment(state["study"], artifact_location=location))
    except Exception:
        experiment = client.get_experiment_by_name(state["study"])
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _now() -> int:
    """Milliseconds, as MLflow counts."""
    return int(time.time() * 1000)


def _client(uri: str) -> Any:
    # Fail within seconds: this module has its own patience.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    if uri.startswith("sqlite:///"):
        uri += "" if "?" in uri else "?timeout=60"  # seconds to wait for another writer's lock
        if uri not in _prepared:  # a client that meets an empty store migrates it at once
            prepare_store(uri)
            _prepared.add(uri)
    return MlflowClient(tracking_uri=uri)
