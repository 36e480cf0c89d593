"""How to look at a study's runs in MLflow: the command, the address, and the server for a store without one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
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
    """The command and the address of the page, for people."""
    address = settled(address)
    if address == OFF:
        return "off (tracking_uri: none)"
    if address.startswith("http"):
        return f"{address}/{_page(study, address)}"
    command = " ".join([_program(), *_options(address, PORT)])
    return f"{command}    (or make ui), then open http://127.0.0.1:{PORT}/{_page(study, address)}"


def show(study: Study, address: str, port: int = PORT) -> None:
    """Prints the address of the page; where a store has no server, starts one and stays until it ends or Ctrl-C.

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
    fragment = _of(study, experiment)
    if address.startswith("http"):
        print(f"{address}/{fragment}")
        return
    _serve(address, port, f"http://127.0.0.1:{port}/{fragment}")


def _serve(address: str, port: int, shown: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"port {port} is taken, maybe by another MLflow; name another by --port") from None
    quiet_mlflow()
    options = [option for option in _options(address, port) if option not in ("--backend-store-uri", _short(address))]
    # In the environment, because a database's address may hold a password, and command lines are seen by everybody.
    # Without the ten processes that judge traces of language models.
    environment = (
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ | {"MLFLOW_BACKEND_STORE_URI": full(address)}
    )
    command = [sys.executable, "-m", "mlflow", *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        if not _answers(port, process):
            process.terminate()
            said = process.communicate()[1].strip().splitlines()
            raise UserError(f"mlflow server did not start ({said[-1] if said else 'no word'}); try another --port")
        print(f"open {shown}\nCtrl-C ends it", flush=True)
        process.communicate()
    except KeyboardInterrupt:
        pass
    finally:
        process.terminate()
        process.wait()


def _answers(port: int, process: subprocess.Popen[str]) -> bool:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    return False


def _options(address: str, port: int) -> list[str]:
    """Of `mlflow server`. Artifacts lie beside a SQLite store, so that both can be moved."""
    file = database_file(address)
    artifacts = ["--artifacts-destination", _short(str(file.parent / ARTIFACTS))] if file else []
    return ["server", "--backend-store-uri", _short(address), "--port", str(port), *artifacts]


def _short(text: str) -> str:
    """A path, or an address with one, relative to the working directory where it lies under it."""
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
    """By what the runs know: no server is asked."""
    for file in sorted(study_folder(study).glob("*/seed*/*/tracking.json")):
        state = read_state(file)
        if state is not None and state.address == address and state.experiment_id is not None:
            return _of(study, state.experiment_id)
    return _of(study, None)


def _of(study: Study, experiment: str | None) -> str:
    if experiment is None:
        return "#/experiments?workflowType=machine_learning"
    views = views_of(study)
    return page(experiment, views[0].name if views else None)
