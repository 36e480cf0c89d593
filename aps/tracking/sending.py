"""One run brought up to date, each point once.

Design: what MLflow has is asked of MLflow. A point is a metric at a step; at the start of a process, after a failure and at
the end the run's points are read back, and what the journal has beyond them is sent. So nothing is sent twice that an
earlier process sent, that an unheard answer confirmed, or that a journal cut back to a checkpoint grows again; and what a
proxy swallowed is sent again. A journal that grows again may differ in what the clock measures: MLflow keeps the first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aps.tracking import describing
from aps.tracking.describing import KEY, NOTE, metric_name, numbers
from aps.tracking.server import Server
from aps.tracking.state import FINISHED, RUNNING, State

BATCH, PARAMS, TAGS = 900, 100, 100  # metrics, parameters, tags of a request; MLflow takes 1000 in all
SYSTEM = "system.jsonl"  # beside the journal: what the machine was busy with


class Point(NamedTuple):
    key: str  # MLflow's name
    step: int
    value: float
    time: int  # ms


class Tail:
    """The lines of a file of JSON that were not read yet; bad ones, and the last while it is being written, left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None  # device and inode: a journal that is cut is another file
        self._offset = 0

    def again(self) -> None:
        self._file = None

    def lines(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    self._file, self._offset = (status.st_dev, status.st_ino), 0
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return
        self._offset += len(whole) + 1 if whole else 0
        for text in whole.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def points_of(line: dict[str, Any], stage: str | None) -> Iterator[Point]:
    """Of a line of the journal; stage None: the names are MLflow's already."""
    step, moment = line.get("step"), line.get("time")
    if not isinstance(step, int) or not isinstance(moment, int | float):
        return
    for key, value in numbers({k: v for k, v in line.items() if k not in ("step", "time")}).items():
        yield Point(key if stage is None else metric_name(stage, key), step, value, int(moment * 1000))


def pictures(folder: Path) -> list[Path]:
    """A run's pictures, which MLflow shows."""
    return sorted(folder.glob("*.png"))


class Sender:
    """Brings the MLflow run of `state` up to date, as often as `send` is called; `state` changes as it goes.

    Args:
        folder: with history.jsonl.
        files: to show with the run, once it is done.
    """

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.files = state, list[Path]()
        self._stage = state.about.stage
        self._tails = {self._stage: Tail(folder / "history.jsonl"), None: Tail(folder / SYSTEM)}
        self._waiting: list[Point] = []
        self._server: Server | None = None
        self._run: Any = None
        self._held: dict[str, set[int]] = {}  # steps that the run has of each metric, where they are known
        self._last: dict[str, Point] = {}  # of the journal
        self._described = False

    def again(self) -> None:
        """The journal was cut: read it from its start. Points that the run has are not sent again."""
        for tail in self._tails.values():
            tail.again()

    def send(self) -> bool:
        """Send what is new; returns whether that was the last of it, and the run has all.

        Raises:
            Exception: whatever mlflow raises where the server does not take it. Nothing is lost: the next call goes on.
        """
        try:
            return self._send()
        except Exception:
            self._run, self._described = None, False  # what it has, is asked again
            self._held.clear()
            self.again()
            self._waiting.clear()
            raise

    def _send(self) -> bool:
        state = self.state
        if self._run is None:
            state.experiment_id = self.server.experiment(state.about.study)
            self._run = self.server.run(str(state.experiment_id), state.about, state.run_id)
            state.run_id = self._run.info.run_id
        if not self._described:
            self._describe()
        self._send_points()
        if state.finals is not None:
            return self._finish()
        if state.status != RUNNING:
            self.server.client.set_terminated(self._run.info.run_id, state.status)
            state.status, self._described = RUNNING, False  # a run that goes on is set running again
        return False

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = Server(self.state.address)
        return self._server

    def _describe(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        run, about, client = self._run, self.state.about, self.server.client
        has = run.data.params  # parameters cannot change
        params = [Param(key, value) for key, value in about.params.items() if key not in has]
        tags = about.tags | {
            KEY: about.key,
            NOTE: describing.note(about, self.state.experiment_id or "", run.info.run_id),
        }
        new = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        for start in range(0, max(len(params), len(new)), min(PARAMS, TAGS)):
            client.log_batch(run.info.run_id, params=params[start : start + PARAMS], tags=new[start : start + TAGS])
        if about.datasets and not (run.inputs and run.inputs.dataset_inputs):
            inputs = [
                DatasetInput(
                    Dataset(**{key: value for key, value in dataset.items() if key != "context"}),
                    [InputTag("mlflow.data.context", dataset["context"])],
                )
                for dataset in about.datasets
            ]
            _where_it_can(lambda: client.log_inputs(run.info.run_id, inputs))
        if run.info.status != RUNNING and self.state.finals is None and self.state.status == RUNNING:
            client.update_run(run.info.run_id, status=RUNNING)
        self._described = True

    def _send_points(self) -> None:
        for stage, tail in self._tails.items():
            for line in tail.lines():
                self._waiting += points_of(line, stage)
        for point in self._waiting:
            self._last[point.key] = point
        self._waiting = [point for point in self._waiting if point.step not in self._steps(point.key)]
        while self._waiting:
            self._log(self._waiting[:BATCH])
            self._waiting = self._waiting[BATCH:]

    def _log(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        once = {(point.key, point.step): point for point in reversed(points)}  # of two lines the first counts
        metrics = [Metric(p.key, p.value, p.time, p.step) for p in reversed(once.values())]
        if metrics:
            self.server.client.log_batch(self._run.info.run_id, metrics=metrics)
        for key, step in once:
            self._steps(key).add(step)

    def _steps(self, key: str) -> set[int]:
        if key not in self._held:
            client, run = self.server.client, self._run
            history = client.get_metric_history(run.info.run_id, key) if key in run.data.metrics else []
            self._held[key] = {metric.step for metric in history}
        return self._held[key]

    def _finish(self) -> bool:
        """The final figures, a look at what the run has, its end, its files."""
        state, server, run_id = self.state, self.server, self._run.info.run_id
        self._send_finals()
        self._look_again()
        server.only(state.experiment_id or "", state.about, run_id)
        server.client.set_terminated(run_id, FINISHED, self._ended)
        for file in self.files:
            server.add_artifact(self._run, file, "figures")
        state.complete = True
        return True

    def _look_again(self) -> None:
        """Sends what the run lacks though it was sent: whoever sits between may have swallowed it."""
        sent, self._run = self._held, self.server.client.get_run(self._run.info.run_id)
        self._held = {key: steps for key, steps in sent.items() if len(steps) == 1 and key in self._run.data.metrics}
        if all(steps <= self._steps(key) for key, steps in sent.items()):
            return
        self.again()
        self._send_points()
        self._send_finals()

    def _send_finals(self) -> None:
        """Those that the journal does not have, at step 0, so that MLflow draws bars: they are no curves."""
        finals = (self.state.finals or {}).items()
        self._log([Point(k, 0, v, self._ended) for k, v in finals if k not in self._last and 0 not in self._steps(k)])

    @property
    def _ended(self) -> int:
        if self.state.ended is None:
            self.state.ended = int(time.time() * 1000)
        return self.state.ended


def _where_it_can(ask: Callable[[], Any]) -> None:
    """An older server lacks what it never heard of, and keeps the rest."""
    from mlflow.exceptions import MlflowException

    try:
        ask()
    except MlflowException as error:
        if error.error_code not in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED"):
            raise
