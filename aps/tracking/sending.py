"""Sends what MLflow lacks of one run, each point once. A point is a metric at a step.

Design: at the start of a process, after a failure and at the end, the run's points are read from MLflow, and those that
only the journal has are sent. So a point is not sent twice if an earlier process sent it, if the answer to a request
was lost, or if a journal that was cut to a checkpoint repeats it. And a point that a proxy lost is sent again. Measured
times may differ when a step is repeated: MLflow keeps the first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aps.tracking import describing
from aps.tracking.describing import KEY, NOTE, About, metric_name, numbers
from aps.tracking.server import Server
from aps.tracking.state import FINISHED, RUNNING, State

BATCH, PARAMS, TAGS = 900, 100, 100  # most metrics, parameters and tags in a request; MLflow takes 1000 in all
SYSTEM = "system.jsonl"  # beside the journal: how busy the machine was


class Point(NamedTuple):
    key: str  # MLflow's name
    step: int
    value: float
    time: int  # ms


class Tail:
    """Reads the new lines of a growing file of JSON lines, without damaged ones and an incomplete last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None  # device and inode: cutting the journal makes a new file
        self._offset = 0

    def restart(self) -> None:
        """Read the file from its start again."""
        self._file = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """The complete lines that were not read yet."""
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if self._file != (status.st_dev, status.st_ino) or status.st_size < self._offset:
                    self._file, self._offset = (status.st_dev, status.st_ino), 0
                file.seek(self._offset)
                complete = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return
        self._offset += len(complete) + 1 if complete else 0
        for text in complete.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def points_of(line: dict[str, Any], stage: str | None) -> Iterator[Point]:
    """The points of a line of the journal. stage: None if the line has MLflow's names already."""
    step, seconds = line.get("step"), line.get("time")
    if not isinstance(step, int) or not isinstance(seconds, int | float):
        return
    for key, value in numbers({k: v for k, v in line.items() if k not in ("step", "time")}).items():
        yield Point(key if stage is None else metric_name(stage, key), step, value, int(seconds * 1000))


def pictures(folder: Path) -> list[Path]:
    """The pictures among a run's outputs, to be sent to MLflow."""
    return sorted(folder.glob("*.png"))


class Sender:
    """Each `send` brings the run in MLflow up to date, and changes `state` accordingly.

    Args:
        folder: has history.jsonl.

    Attributes:
        files: pictures to send when the run is finished.
    """

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.files = state, list[Path]()
        self._stage = state.about.stage
        self._tails = {self._stage: Tail(folder / "history.jsonl"), None: Tail(folder / SYSTEM)}
        self._waiting: list[Point] = []
        self._server: Server | None = None
        self._run: Any = None
        self._held: dict[str, set[int]] = {}  # the steps of each metric that MLflow has, where they are known
        self._last: dict[str, Point] = {}  # the last point of each metric in the journal
        self._described = False

    def restart(self) -> None:
        """Read the journal from its start, because it was cut. Points that the run has are not sent again."""
        for tail in self._tails.values():
            tail.restart()

    def send(self) -> bool:
        """Send what is new. Returns whether the stage is finished and MLflow has everything.

        Raises:
            Exception: any of mlflow's, if a request fails. Nothing is lost: the next call goes on.
        """
        try:
            return self._send()
        except Exception:
            self._run, self._described = None, False  # ask MLflow again what it has
            self._held.clear()
            self.restart()
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
            state.status, self._described = RUNNING, False  # if the run goes on, it is set running again
        return False

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = Server(self.state.address)
        return self._server

    def renew(self, run: Any, about: About) -> None:
        """Send what has changed in the description of a complete run, `about`. What people wrote in MLflow stays.

        Args:
            run: MLflow's.

        Raises:
            Exception: any of mlflow's, if a request fails. Then `state` is as it was.
        """
        before = self._tags(self.state.about, run)
        self._log_description(run, about.params, dict(self._tags(about, run).items() - before.items()))
        self.state.about = about

    def _tags(self, about: About, run: Any) -> dict[str, str]:
        note = describing.note(about, self.state.experiment_id or "", run.info.run_id)
        return about.tags | {KEY: about.key, NOTE: note}

    def _log_description(self, run: Any, params: dict[str, str], tags: dict[str, str]) -> None:
        """Send parameters that the run does not have, as they cannot change, and tags that it has otherwise."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        for start in range(0, max(len(new), len(changed)), min(PARAMS, TAGS)):
            self.server.client.log_batch(
                run.info.run_id, params=new[start : start + PARAMS], tags=changed[start : start + TAGS]
            )

    def _describe(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        run, about, client = self._run, self.state.about, self.server.client
        self._log_description(run, about.params, self._tags(about, run))
        if describing.SUPERSEDED_BY in run.data.tags:  # its results are back in their place
            client.delete_tag(run.info.run_id, describing.SUPERSEDED_BY)
        if about.datasets and not (run.inputs and run.inputs.dataset_inputs):
            inputs = [
                DatasetInput(
                    Dataset(**{key: value for key, value in dataset.items() if key != "context"}),
                    [InputTag("mlflow.data.context", dataset["context"])],
                )
                for dataset in about.datasets
            ]
            _if_supported(lambda: client.log_inputs(run.info.run_id, inputs))
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

        unique = {(point.key, point.step): point for point in reversed(points)}  # of two lines the first counts
        metrics = [Metric(p.key, p.value, p.time, p.step) for p in reversed(unique.values())]
        if metrics:
            self.server.client.log_batch(self._run.info.run_id, metrics=metrics)
        for key, step in unique:
            self._steps(key).add(step)

    def _steps(self, key: str) -> set[int]:
        """The steps of a metric that MLflow has."""
        if key not in self._held:
            client, run = self.server.client, self._run
            history = client.get_metric_history(run.info.run_id, key) if key in run.data.metrics else []
            self._held[key] = {metric.step for metric in history}
        return self._held[key]

    def _finish(self) -> bool:
        """Send the final metrics, check that MLflow has everything, end the run and send its files."""
        state, server, run_id = self.state, self.server, self._run.info.run_id
        self._send_finals()
        self._send_lost_points()
        server.delete_other_runs(state.experiment_id or "", state.about, run_id)
        server.client.set_terminated(run_id, FINISHED, self._ended)
        if state.replaces is not None:
            server.supersede(state.replaces, by=run_id)
        for file in self.files:
            server.add_artifact(self._run, file, "figures")
        state.complete = True
        return True

    def _send_lost_points(self) -> None:
        """Send again what MLflow lacks although it was sent: a proxy may have lost it."""
        sent, self._run = self._held, self.server.client.get_run(self._run.info.run_id)
        self._held = {key: steps for key, steps in sent.items() if len(steps) == 1 and key in self._run.data.metrics}
        if all(steps <= self._steps(key) for key, steps in sent.items()):
            return
        self.restart()
        self._send_points()
        self._send_finals()

    def _send_finals(self) -> None:
        """Send the final metrics that the journal does not have, at step 0: without a curve, MLflow draws bars."""
        finals = (self.state.finals or {}).items()
        self._log([Point(k, 0, v, self._ended) for k, v in finals if k not in self._last and 0 not in self._steps(k)])

    @property
    def _ended(self) -> int:
        if self.state.ended is None:
            self.state.ended = int(time.time() * 1000)
        return self.state.ended


def _if_supported(request: Callable[[], Any]) -> None:
    """Make a request that an older server may not know; then it is left out."""
    from mlflow.exceptions import MlflowException

    try:
        request()
    except MlflowException as error:
        if error.error_code not in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED"):
            raise
