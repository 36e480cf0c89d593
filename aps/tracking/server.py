"""A server or store of MLflow: finds, restores or creates experiments and runs.

Its answers are checked, because a proxy or another program may answer at the address.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.tracking.addresses import database_file, full, problem
from aps.tracking.describing import KEY, SUPERSEDED, SUPERSEDED_BY, About
from aps.tracking.reasons import NotMlflow, Unusable

ARTIFACTS = "mlartifacts"  # beside a SQLite store; `aps ui` serves it
PROXIED = "mlflow-artifacts:/"  # an artifact's address that does not say where the server keeps it
LOCK_SECONDS = 20  # how long to wait for another writer of a SQLite store, as mlflow does
PAGE = 500  # runs in an answer, which a busy server gives within REQUEST_SECONDS
REQUEST_SECONDS = 10  # time limit of a request, unless MLFLOW_HTTP_REQUEST_TIMEOUT is set


class Server:
    """The MLflow at an address.

    It and its methods raise whatever mlflow raises if a request fails (see `aps.tracking.reasons`).
    """

    def __init__(self, address: str, say: Callable[[str], None] | None = None) -> None:
        self.address, self._say = address, say or (lambda text: print(text, file=sys.stderr))
        if (reason := problem(address)) is not None:
            raise Unusable(reason)
        self.client = _client(address)

    def experiment(self, name: str, make: bool = True) -> str | None:
        """The id of the experiment of this name, which is restored if it was deleted, and created if `make`."""
        existing = self.client.get_experiment_by_name(name)
        if existing is None:
            if not make:
                return None
            try:
                return _identifier(self.client.create_experiment(name, artifact_location=self._artifacts(name)))
            except Exception:  # another stage may have created it meanwhile
                existing = self.client.get_experiment_by_name(name)
                if existing is None:
                    raise
        if existing.name != name:
            raise NotMlflow
        identifier = _identifier(existing.experiment_id)
        if existing.lifecycle_stage == "deleted":
            self.client.restore_experiment(identifier)
            self._say(f"MLflow: experiment '{name}' had been deleted there; it is restored")
        return identifier

    def run(self, experiment: str, about: About, known: str | None) -> Any:
        """The job's run, restored if it was deleted: that with the id `known`, or with the job's key, or a new one.

        More than one run may have the key: a request that timed out may have been carried out later.
        """
        run = self._known(known, about) if known else None
        if run is None:
            run = self._by_key(experiment, about)
        if run is None:
            if known:
                self._say(f"MLflow: run '{about.name}' is gone from there; it is made again")
            tags = about.tags | {KEY: about.key}
            run = self.client.create_run(experiment, about.started, tags, about.name)
        _identifier(run.info.run_id)
        if run.info.lifecycle_stage == "deleted":
            self.client.restore_run(run.info.run_id)
            self._say(f"MLflow: run '{about.name}' had been deleted there; it is restored")
        return run

    def runs(self, experiment: str, search: str = "", deleted: bool = False) -> Iterator[Any]:
        """The runs of an experiment that a search finds; deleted ones too if `deleted`."""
        from mlflow.entities import ViewType

        view, token = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY, None
        while True:
            found = self.client.search_runs([experiment], search, view, max_results=PAGE, page_token=token)
            yield from found
            token = found.token
            if not token:
                return

    def delete_other_runs(self, experiment: str, about: About, run_id: str) -> None:
        """Delete all runs of the job except `run_id`."""
        for other in self._with_key(experiment, about, deleted=False):
            if other.info.run_id != run_id:
                self.client.delete_run(other.info.run_id)

    def supersede(self, run_id: str, by: str) -> None:
        """Take a run out of the view of its stage, because the results of the run `by` are in its place now."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
            stage = run.data.tags.get("stage", "")
            if not stage.endswith(SUPERSEDED):
                self.client.set_tag(run_id, "stage", f"{stage}{SUPERSEDED}")
            self.client.set_tag(run_id, SUPERSEDED_BY, by)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # deleted, or elsewhere
                raise

    def add_artifact(self, run: Any, file: Path, folder: str | None = None) -> None:
        store = database_file(self.address)
        location = str(run.info.artifact_uri)
        if store is None or not location.startswith(PROXIED):
            self.client.log_artifact(run.info.run_id, str(file), folder)
            return
        target = store.parent / ARTIFACTS / location.removeprefix(PROXIED).lstrip("/") / (folder or "")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.name)

    def _known(self, run_id: str, about: About) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        if run.info.run_id != run_id:
            raise NotMlflow
        return run if run.data.tags.get(KEY) == about.key else None

    def _by_key(self, experiment: str, about: About) -> Any:
        active = self._with_key(experiment, about, deleted=False)
        return next(iter(active or self._with_key(experiment, about, deleted=True)), None)

    def _with_key(self, experiment: str, about: About, deleted: bool) -> list[Any]:
        """The runs of the job, in an order that is the same for every process."""
        from mlflow.entities import ViewType

        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        runs = self.client.search_runs([experiment], f"tags.`{KEY}` = '{about.key}'", view)
        return sorted((run for run in runs if run.data.tags.get(KEY) == about.key), key=lambda run: run.info.run_id)

    def _artifacts(self, experiment: str) -> str | None:
        """Location of an experiment's artifacts: beside a SQLite store, wherever it is; None: the server decides."""
        return f"{PROXIED}{experiment}" if database_file(self.address) else None


def _identifier(value: Any) -> str:
    """The value as an id. Raises NotMlflow if it is none."""
    if not isinstance(value, str | int) or not str(value):
        raise NotMlflow
    return str(value)


def _client(address: str) -> Any:
    quiet_mlflow()
    from mlflow.tracking import MlflowClient

    uri = full(address)
    if (file := database_file(address)) is not None:
        prepare_store(file)
    return MlflowClient(tracking_uri=uri)


def quiet_mlflow() -> None:
    """Make mlflow fail within seconds and print nothing: this package repeats requests and reports errors itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow refuses folders by default
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")


@cache
def prepare_store(file: Path) -> None:
    """Create a SQLite store, one process at a time. Two at once would break its schema for good.

    Raises:
        UserError: it cannot be created.
    """
    quiet_mlflow()
    from mlflow.tracking import MlflowClient

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f".{file.name}.lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments(max_results=1)
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"{file}: MLflow's store cannot be created ({error}); set tracking_uri or MLFLOW_TRACKING_URI"
        ) from error
