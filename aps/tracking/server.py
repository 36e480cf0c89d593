"""A server or store of MLflow's: its experiments and runs, found, restored or made.

Whatever it answers is looked at before it is believed: a proxy or another program may sit at the address.
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
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.tracking.addresses import database_file, full, problem
from aps.tracking.describing import KEY, About
from aps.tracking.reasons import NotMlflow, Unusable

ARTIFACTS = "mlartifacts"  # beside a SQLite store; `aps ui` serves it
PROXIED = "mlflow-artifacts:/"  # an artifact's address that does not say where the server keeps it
LOCK_SECONDS = 20  # that a SQLite store waits for another writer; mlflow's own are as many
REQUEST_SECONDS = 10  # of a request to a server, unless MLFLOW_HTTP_REQUEST_TIMEOUT says otherwise


class Server:
    """What is at an address.

    Raises, as every method does, whatever mlflow raises where the server does not take it (`aps.tracking.reasons`).
    """

    def __init__(self, address: str, say: Callable[[str], None] | None = None) -> None:
        self.address, self._say = address, say or (lambda text: print(text, file=sys.stderr))
        if (wrong := problem(address)) is not None:
            raise Unusable(wrong)
        self.client = _client(address)

    def experiment(self, name: str, make: bool = True) -> str | None:
        """Id of the experiment of this name: restored where it was deleted, made where there is none and `make`."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            if not make:
                return None
            try:
                return _identifier(self.client.create_experiment(name, artifact_location=self._artifacts(name)))
            except Exception:  # two stages may both find none: whoever comes second takes the first one's
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.name != name:
            raise NotMlflow
        identifier = _identifier(found.experiment_id)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(identifier)
            self._say(f"MLflow: experiment '{name}' had been deleted there; it is restored")
        return identifier

    def run(self, experiment: str, about: About, known: str | None) -> Any:
        """The job's run: the one that is `known`, else the one with its key, restored where it was deleted, else a new one.

        Other runs with its key are deleted: a request that was given up may have been carried out later.
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

    def only(self, experiment: str, about: About, run_id: str) -> None:
        """Deletes other runs of the job."""
        for other in self._with_key(experiment, about, deleted=False):
            if other.info.run_id != run_id:
                self.client.delete_run(other.info.run_id)

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
        """Runs of the job, the same one first whoever asks."""
        from mlflow.entities import ViewType

        view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
        found = self.client.search_runs([experiment], f"tags.`{KEY}` = '{about.key}'", view)
        return sorted((run for run in found if run.data.tags.get(KEY) == about.key), key=lambda run: run.info.run_id)

    def _artifacts(self, experiment: str) -> str | None:
        """Where an experiment's artifacts lie: for a SQLite store beside it, wherever it is moved; else the server knows."""
        return f"{PROXIED}{experiment}" if database_file(self.address) else None


def _identifier(value: Any) -> str:
    """Raises NotMlflow where an answer lacks what MLflow always gives."""
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
    """Fail within seconds, and without a word: this room has its own patience and its own sentences."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # who names a folder means it
    logging.getLogger("alembic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")


@cache
def prepare_store(file: Path) -> None:
    """Create a SQLite store, one process at a time: a race in MLflow's schema migration leaves it broken for good.

    Raises:
        UserError: it cannot be created.
    """
    quiet_mlflow()
    from mlflow.tracking import MlflowClient

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments(max_results=1)
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"{file}: MLflow's store cannot be created ({error}); set tracking_uri or MLFLOW_TRACKING_URI"
        ) from error
