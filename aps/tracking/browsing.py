"""Opens a study's runs in MLflow: the command and the address of the page, and a server for a store that has none."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aps.errors import UserError
from aps.layout import study_folder
from aps.settings.study import Study
from aps.tracking.addresses import OFF, database_file, full, page, settled
from aps.tracking.reasons import why
from aps.tracking.server import ARTIFACTS, Server, quiet_mlflow
from aps.tracking.state import read_state
from aps.tracking.syncing import show_views
from aps.tracking.views import views_of

PORT = 5000
START_SECONDS = 120.0


def how_to_browse(study: Study, address: str) -> str:
    """How to open the study's page: the command that starts a server, if one is needed, and the address."""
    address = settled(address)
    if address == OFF:
        return "off (tracking_uri: none)"
    if address.startswith("http"):
        return f"{address}/{_page(study, address)}"
    options = ["--backend-store-uri", _relative(address), "--port", str(PORT), *_artifact_options(address)]
    shorter = "make ui" if Path("Makefile").exists() else "python -m aps ui"
    return f"{' '.join([_program(), 'server', *options])}    (or {shorter}), then open http://127.0.0.1:{PORT}/{_page(study, address)}"


def show(study: Study, address: str, port: int = PORT) -> None:
    """Print the address of the study's page. For a store without a server, start one, and wait until it ends or Ctrl-C.

    Raises:
        UserError: tracking is off, MLflow can't be reached, or the port is taken.
    """
    address = settled(address)
    if address == OFF:
        raise UserError(
            "MLflow is off for this study (tracking_uri: none), so there is nothing to show; set tracking_uri"
        )
    try:
        server = Server(address)
        experiment = server.experiment(study.study, make=False)
        if experiment is not None:
            show_views(study, server, experiment)
    except Exception as error:
        raise UserError(f"MLflow at {address} cannot be shown ({why(error)}); mend that and try again") from None
    if experiment is None:
        print(f"MLflow at {address} has no runs of study '{study.study}' yet", file=sys.stderr)
    fragment = _fragment(study, experiment)
    if address.startswith("http"):
        print(f"{address}/{fragment}")
        return
    with contextlib.suppress(KeyboardInterrupt), serving(address, port) as (server_address, process):
        print(f"open {server_address}/{fragment}\nCtrl-C ends it", flush=True)
        process.wait()


@contextmanager
def serving(address: str, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs `mlflow server` over the store at `address`, until the block ends -> the server's address, its process.

    port: None: any free one.

    Raises:
        UserError: the port is taken, or the server does not start.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError:
            raise UserError(f"port {port} is taken, maybe by another MLflow; name another by --port") from None
        port = int(probe.getsockname()[1])
    quiet_mlflow()
    # The store is given in the environment: a database's address may hold a password, and everybody sees command lines.
    # Job execution would start ten processes that judge traces of language models.
    environment = (
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ | {"MLFLOW_BACKEND_STORE_URI": full(address)}
    )
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), *_artifact_options(address)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log, text=True)
        try:
            if not _answers(port, process):
                process.terminate()
                process.wait()
                log.seek(0)
                lines = log.read().strip().splitlines()
                raise UserError(
                    f"mlflow server did not start ({lines[-1] if lines else 'no word'}); try another --port"
                )
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.terminate()
            process.wait()


def _answers(port: int, process: subprocess.Popen[str]) -> bool:
    """Whether the server is ready within START_SECONDS; waits for it."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    return False


def _artifact_options(address: str) -> list[str]:
    """Options of `mlflow server`. Artifacts lie beside a SQLite store, so that both can be moved."""
    file = database_file(address)
    return ["--artifacts-destination", _relative(str(file.parent / ARTIFACTS))] if file else []


def _relative(text: str) -> str:
    """A path, or an address with one, relative to the working directory if it lies in it."""
    here = f"{Path.cwd()}/"
    for start in ("sqlite:///", "file://", ""):
        if text.startswith(start + here):
            return ("" if start == "file://" else start) + text.removeprefix(start + here)
    return text


def _program() -> str:
    program = Path(sys.executable).with_name("mlflow")
    here = Path.cwd()
    return str(program.relative_to(here)) if program.is_relative_to(here) else program.name


def _page(study: Study, address: str) -> str:
    """The fragment of the study's page, from the tracking.json of a run: no server is asked."""
    for file in study_folder(study).glob("*/seed*/*/tracking.json"):  # not sorted: the first will do
        state = read_state(file)
        if state is not None and state.address == address and state.experiment_id is not None:
            return _fragment(study, state.experiment_id)
    return _fragment(study, None)


def _fragment(study: Study, experiment: str | None) -> str:
    if experiment is None:
        return "#/experiments?workflowType=machine_learning"
    views = views_of(study)
    return page(experiment, views[0].name if views else None)
