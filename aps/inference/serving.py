"""Logs a stage's result as a model that `mlflow models serve` can serve, and loads weights back from MLflow.

A logged model holds the weights and all that loading them needs, the code of this package, the versions of the packages it
imports, a signature and an example, so it can be served wherever these packages are installed. Besides `aps.tracking`,
only this module imports mlflow.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import aps
from aps.errors import UserError
from aps.files import read_json
from aps.inference.upstream import find_encoder
from aps.layout import stage_folder, study_folder
from aps.seals import read_metrics
from aps.settings.study import Study
from aps.text import listed, number_of
from aps.tracking.addresses import HTTP, OFF, database_file, full, settled
from aps.tracking.reasons import why, will_last
from aps.tracking.server import ARTIFACTS, PROXIED, Server

STORE = "results/mlflow.db"  # where a study without a server tracks
NAME = "model"  # name of the logged model in its run
SWITCH = "APS_LOG_MODELS"  # environment variable; 0 keeps models out of MLflow, where disks are small
SECONDS = 60.0  # how long the end of a stage waits for MLflow to take its model
ANSWERS = {"pretrain": "embeddings", "finetune": "classes", "linear_probe": "classes", "detection": "detections"}
# What `aps.inference.served` imports.
NEEDED = ("mlflow", "torch", "torchvision", "timm", "safetensors", "pydantic", "pyyaml", "numpy", "pandas", "pillow",
          "pycocotools", "tqdm", "psutil")  # fmt: skip


def track_model(folder: Path, address: str, label: str, seconds: float = SECONDS) -> None:
    """Log the model of a stage that has just finished, within `seconds`; on failure or delay, `sync_models` does it later.

    Args:
        folder: the stage's complete results.
        address: of MLflow's server or store, or OFF.
        label: the stage's, for the message.
    """
    if not _wanted(address):
        return
    reasons = ["it does not answer (timed out)"]

    def log() -> None:
        try:
            _track(folder, address, _client)
            reasons.clear()
        except Exception as error:  # the stage is finished, whatever the server answers
            reasons[:] = [why(error)]

    thread = threading.Thread(target=log, daemon=True, name="mlflow-model")
    thread.start()
    thread.join(seconds)
    for reason in reasons:
        print(
            f"{label}: MLflow did not take its model ({reason}); `python -m aps sync` sends it later", file=sys.stderr
        )


def sync_models(study: Study, address: str) -> tuple[int, int]:
    """Log models of a study's finished stages that MLflow does not have yet. Returns (sent, still missing).

    A stage whose weights are gone here has no model to send, which one warning tells.
    """
    sent, connect, gone = 0, cache(_client), list[str]()
    folders = [stage_folder(study_folder(study), *job) for job in study.jobs()]
    waiting = [folder for folder in folders if (folder / "metrics.json").exists()] if _wanted(address) else []
    missing = 0
    for number, folder in enumerate(waiting):
        try:
            sent += _track(folder, address, connect)
        except Gone:
            gone.append(str(folder))
        except UserError as error:  # the report names damaged results
            logging.getLogger(__name__).debug("%s", error)
        except Exception as error:  # any of mlflow's
            missing += 1
            print(f"{folder}: MLflow at {address} did not take its model: {why(error)}", file=sys.stderr)
            if will_last(error):  # the server is away, and trying every other model would take minutes
                missing += len(waiting) - number - 1
                break
    if gone:
        print(
            f"warning: MLflow gets no model of {number_of(len(gone), 'result')} whose weights are gone here: {listed(gone, 3)}",
            file=sys.stderr,
        )
    return sent, missing


class Gone(UserError):
    """A result without its weights, as in a copy that leaves them out."""


def _wanted(address: str) -> bool:
    return address != OFF and os.environ.get(SWITCH) != "0"


def _track(folder: Path, address: str, connect: Callable[[str], Any]) -> bool:
    """Log the model of a stage's results, unless its MLflow run has one or was deleted; returns whether it did.

    Args:
        connect: gives an MlflowClient of an address.

    Raises:
        Gone: the stage's weights, or those of a linear probe's encoder, are not here.
        Exception: any error of mlflow, and UserError where the results are not complete.
    """
    metrics = read_metrics(folder / "metrics.json")
    run = metrics.get("mlflow_run_id")
    if metrics["stage"] not in ANSWERS or run is None:
        return False
    client = connect(address)
    info = client.get_run(run).info
    if info.lifecycle_stage == "deleted" or _logged(client, run, info.experiment_id) is not None:
        return False
    encoder, here = None, (folder / _weights(metrics["stage"])).exists()
    if here and metrics["stage"] == "linear_probe":
        encoder = find_encoder(folder, metrics)
        here = encoder is not None or metrics["encoder"]["sha256"] is None
    if not here:
        raise Gone(f"{folder}: its weights are gone")
    log_model(client, address, run, folder, encoder)
    return True


def _client(address: str) -> Any:
    return Server(address).client


def log_model(client: Any, address: str, run_id: str, folder: Path, encoder: Path | None = None) -> str | None:
    """Log a finished stage's result as a model of its MLflow run. Logging it again does nothing.

    It uses only methods of the client, which neither load the network nor change mlflow's global state, because it runs
    in parallel with training.

    Args:
        client: an MlflowClient of `address`.
        run_id: the stage's run.
        folder: the stage's results.
        encoder: the encoder's weights, which a linear probe needs too.

    Returns:
        The model's address, `models:/ID`; None where the stage has no model.

    Raises:
        Exception: any error of mlflow when the server does not accept the model.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    metrics = read_json(folder / "metrics.json")
    stage = metrics["stage"]
    if stage not in ANSWERS:
        return None
    if known := _logged(client, run_id):
        return known
    about = {key: str(metrics[key]) for key in ("stage", "experiment", "seed", "settings_digest")}
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id, NAME, run_id, about, model_type="pyfunc"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        out = Path(temporary) / "model"
        record = Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
        save_model(out, folder, encoder, mlflow_model=record, metadata=about)
        if (local := _beside_store(address, logged.artifact_location)) is not None:
            shutil.copytree(out, local)
        else:
            client.log_model_artifacts(logged.model_id, str(out))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    return f"models:/{logged.model_id}"


def save_model(out: Path, folder: Path, encoder: Path | None = None, **more: Any) -> None:
    """Write a finished stage as a model folder that `mlflow models serve -m OUT` serves.

    Args:
        out: the folder to make.
        folder, encoder: as in `log_model`.
    """
    import mlflow

    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # otherwise it logs each step
    stage = read_json(folder / "metrics.json")["stage"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        mlflow.pyfunc.save_model(
            path=str(out),
            loader_module="aps.inference.served",
            data_path=str(_gathered(folder, stage, encoder, Path(temporary) / "weights")),
            code_paths=[str(Path(aps.__file__).parent)],
            signature=_signature(ANSWERS[stage]),
            input_example=_example(),
            pip_requirements=requirements(),
            **more,
        )


def weights_of(address: str) -> Path:
    """The folder of the weights of `runs:/ID`, `models:/NAME/VERSION` or `models:/NAME@ALIAS`, downloaded if not local.

    The server is that of MLFLOW_TRACKING_URI, else the store of the results folder in the working directory.

    Raises:
        UserError: MLflow does not know the address, does not answer, needs a server to give its files, or has no
            weights of this software there.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if not server:
        if not Path(STORE).is_file():
            raise UserError(f"{address}: set MLFLOW_TRACKING_URI to the server that has it (there is no {STORE} here)")
        server = f"sqlite:///{Path(STORE).resolve()}"
    if (server := settled(server)) == OFF:
        raise UserError(
            f"{address}: MLFLOW_TRACKING_URI is {OFF}, so no server is asked; set it to the one that has it"
        )
    try:
        folder = _downloaded(address, server)
    except UserError:
        raise
    except Exception as error:  # a server may answer anything
        raise UserError(f"{address}: MLflow at {server} does not give it ({why(error)}); check the address") from None
    found = next(iter(folder.glob("**/metrics.json")), None)
    if found is None:
        raise UserError(f"{address}: it holds no weights of this software; name a model that one of its stages logged")
    return found.parent


def _downloaded(address: str, server: str) -> Path:
    """A folder with the files of the model, or of the stage whose run it is."""
    from mlflow.artifacts import download_artifacts

    client, wanted = _client(server), address.rstrip("/")
    run_id, _, path = wanted.removeprefix("runs:/").partition("/")
    if wanted.startswith("runs:/") and path in ("", NAME):
        results = client.get_run(run_id).data.tags.get("results")
        known = _logged(client, run_id)
        if known is None:
            if results is not None and Path(results).is_dir():
                return Path(results)
            raise UserError(
                f"{address}: this run logged no model, and its results are not at {results}; give their folder"
            )
        wanted = known
    location = _location(client, wanted, server)
    if location.startswith(PROXIED) and not server.startswith(HTTP):
        local = _beside_store(server, location)
        if local is None or not local.is_dir():
            raise UserError(
                f"{address}: its files are at {location}, which only a server finds; start `aps ui` and set "
                "MLFLOW_TRACKING_URI to its address"
            )
        return local
    # The server is an argument, because MLflow's global one, and the environment, belong to the caller.
    return Path(download_artifacts(location, tracking_uri=full(server)))


def _location(client: Any, address: str, server: str) -> str:
    """Where the artifacts of a model, by its id, version, alias or stage, or of a path in a run are."""
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    if address.startswith("runs:/"):
        run_id, _, path = address.removeprefix("runs:/").partition("/")
        return f"{str(client.get_run(run_id).info.artifact_uri).rstrip('/')}/{path}"
    if server.startswith(("databricks", "uc")):  # their registry resolves names by itself, with its own credentials
        return address
    name, *version = get_model_name_and_version(client, address)
    if version:
        return str(client.get_model_version_download_uri(name, version[0]))
    return str(client.get_logged_model(name).artifact_location)


def _beside_store(address: str, location: str) -> Path | None:
    """The folder of artifacts beside a SQLite store, which has no server that could resolve their location; else None."""
    store = database_file(address)
    if store is None or not location.startswith(PROXIED):
        return None
    return store.parent / ARTIFACTS / location.removeprefix(PROXIED).lstrip("/")


def requirements() -> list[str]:
    """Every package that a served model imports, at the installed version."""
    pinned = []
    for name in NEEDED:
        try:
            pinned.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return pinned


def _logged(client: Any, run_id: str, experiment: str | None = None) -> str | None:
    """The address of the complete model that a run, of MLflow's experiment, has logged before; None where there is none."""
    experiment = experiment or client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    ready = [model for model in models if model.name == NAME and model.status == "READY"]
    return f"models:/{ready[0].model_id}" if ready else None


def _weights(stage: str) -> str:
    return {"pretrain": "encoder.safetensors", "linear_probe": "heads.safetensors"}.get(stage, "model.safetensors")


def _gathered(folder: Path, stage: str, encoder: Path | None, data: Path) -> Path:
    """Copy the files of a stage that `aps.load` needs into the folder `data`."""
    data.mkdir()
    for file in (folder / "metrics.json", folder / _weights(stage), *([encoder] if encoder is not None else [])):
        shutil.copyfile(file, data / file.name)
    return data


def _signature(answer: str) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, Map, Object, Property

    numbers = Array("double")
    mask = Object([Property("size", Array("long")), Property("counts", "string")])
    columns: list[Any] = {
        "classes": [
            ColSpec("string", "class"),
            ColSpec("double", "probability"),
            ColSpec(Map("double"), "probabilities"),
        ],
        "embeddings": [ColSpec(numbers, "embedding")],
        "detections": [
            ColSpec(Array(numbers), "boxes"),
            ColSpec(Array("string"), "labels"),
            ColSpec(numbers, "scores"),
            ColSpec(Array(mask), "masks"),
        ],
    }[answer]
    return ModelSignature(inputs=Schema([ColSpec("string", "image")]), outputs=Schema(columns))


def _example() -> Any:
    """An example of a request: one small image in base64."""
    import numpy as np
    import pandas as pd
    import PIL.Image

    rows = np.arange(16, dtype=np.uint8)[:, None, None] * np.array([16, 8, 4], dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(np.broadcast_to(rows, (16, 16, 3)).copy()).save(out, format="PNG")
    return pd.DataFrame({"image": [base64.b64encode(out.getvalue()).decode()]})
