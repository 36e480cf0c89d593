"""What a stage left is a model of MLflow: logged once, loaded by its address, served over HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from pycocotools import mask as rle

from aps.cli import main
from aps.detection.engine import Prediction
from aps.errors import UserError
from aps.inference import serving
from aps.inference.load import load
from aps.inference.served import Served
from aps.inference.serving import log_model, requirements, save_model, sync_models, track_model
from aps.settings.reading import load_study


def sent(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


@pytest.fixture(scope="module")
def photo(finished: Path) -> Path:
    return finished / "photos/green/003.jpg"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    store = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{store / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment("photos", artifact_location=(store / "artifacts").as_uri())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield client


def uri() -> str:
    return os.environ["MLFLOW_TRACKING_URI"]


def new_run(client: MlflowClient, results: Path | None = None) -> str:
    tags = {"results": str(results)} if results is not None else {}
    experiment = client.get_experiment_by_name("photos").experiment_id
    return str(client.create_run(experiment, tags=tags).info.run_id)


ENCODERS = {"linear_probe": "pretrain/encoder.safetensors"}


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "linear_probe"])
def test_a_logged_model_is_loaded_by_its_run_and_by_its_address(
    client: MlflowClient, stages: Path, photo: Path, stage: str
) -> None:
    run = new_run(client)
    encoder = stages / ENCODERS[stage] if stage in ENCODERS else None
    address = log_model(client, uri(), run, stages / stage, encoder)
    assert address is not None
    original = load(stages / stage)
    for name in (address, f"runs:/{run}"):
        model = load(name)
        assert torch.allclose(model.embed(photo), original.embed(photo)) and model.classes == original.classes
        assert model.provenance["experiment"] == "mine"


def test_a_model_is_logged_once_with_signature_example_and_pinned_requirements(
    client: MlflowClient, stages: Path
) -> None:
    run = new_run(client)
    address = log_model(client, uri(), run, stages / "finetune")
    assert log_model(client, uri(), run, stages / "finetune") == address
    found = client.search_logged_models([client.get_run(run).info.experiment_id], f"source_run_id = '{run}'")
    assert len(found) == 1
    info = mlflow.models.get_model_info(address)
    assert [c.name for c in info.signature.inputs] == ["image"]
    assert [c.name for c in info.signature.outputs] == ["class", "probability", "probabilities"]
    folder = Path(mlflow.artifacts.download_artifacts(address))
    pinned = (folder / "requirements.txt").read_text().split()
    assert pinned == requirements() and all("==" in line for line in pinned)
    assert any(line.startswith("torch==") for line in pinned)
    assert (folder / "input_example.json").exists() and (folder / "code/aps/inference/served.py").exists()
    assert not list(folder.rglob("*.pkl")) and not list(folder.rglob("__pycache__"))


def test_a_store_whose_artifacts_only_a_server_finds_is_written_and_read_beside_it(
    client: MlflowClient, stages: Path, photo: Path
) -> None:
    client.create_experiment("proxied", artifact_location="mlflow-artifacts:/proxied")
    run = str(client.create_run(client.get_experiment_by_name("proxied").experiment_id).info.run_id)
    address = log_model(client, uri(), run, stages / "finetune")
    assert address is not None
    store = Path(uri().removeprefix("sqlite:///")).parent
    assert list((store / "mlartifacts" / "proxied").rglob("MLmodel"))
    for name in (address, f"runs:/{run}"):
        assert load(name).predict(photo).classes == load(stages / "finetune").predict(photo).classes


@pytest.fixture
def default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """The store of the results folder in the working directory, which no environment variable names."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    store = tmp_path / serving.STORE
    store.parent.mkdir()
    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    client.create_experiment("photos", artifact_location="mlflow-artifacts:/photos")
    return client


def registered(client: MlflowClient, stage: Path) -> tuple[str, str]:
    """A run and the address of its model, which is `mine`, version 1, with the alias `best`."""
    run = new_run(client)
    address = log_model(client, str(client.tracking_uri), run, stage)
    assert address is not None
    location = client.get_logged_model(address.removeprefix("models:/")).artifact_location
    client.create_registered_model("mine")
    client.create_model_version("mine", location, run, model_id=address.removeprefix("models:/"))
    client.set_registered_model_alias("mine", "best", "1")
    return run, address


def test_a_model_of_the_default_store_is_loaded_by_every_address_again_and_again(
    default_store: MlflowClient, stages: Path, photo: Path
) -> None:
    """Nothing that MLflow, or another look-up, would read afterwards is changed."""
    run, address = registered(default_store, stages / "finetune")
    expected = load(stages / "finetune").predict(photo).probabilities

    def state() -> object:
        named = {name: value for name, value in os.environ.items() if "URI" in name}
        return mlflow.get_tracking_uri(), mlflow.get_registry_uri(), named, sorted(Path.cwd().iterdir())

    before = state()
    for _ in range(2):
        names = (address, f"{address}/", f"runs:/{run}", f"runs:/{run}/model")
        for name in (*names, "models:/mine/1", "models:/mine/latest", "models:/mine@best"):
            assert torch.allclose(load(name).predict(photo).probabilities, expected), name
            assert state() == before, name


def test_a_registered_model_is_the_same_files_as_its_logged_model(
    client: MlflowClient, stages: Path, photo: Path
) -> None:
    """Here MLflow finds them by itself; looking them up writes nothing among them."""
    _, address = registered(client, stages / "finetune")
    store = Path(uri().removeprefix("sqlite:///")).parent / "artifacts"
    before = sorted(store.rglob("*"))
    folder = serving.weights_of(address)
    for name in ("models:/mine/1", "models:/mine@best"):
        assert serving.weights_of(name) == folder
        assert load(name).predict(photo).classes == load(stages / "finetune").predict(photo).classes
    assert store in folder.parents and sorted(store.rglob("*")) == before


def test_files_that_only_a_server_finds_are_a_sentence_that_says_to_start_one(
    default_store: MlflowClient, stages: Path
) -> None:
    run, address = registered(default_store, stages / "finetune")
    (Path(serving.STORE).parent / "mlartifacts").rename("elsewhere")
    for name in (address, f"runs:/{run}", "models:/mine/1", "models:/mine@best", f"runs:/{run}/other"):
        with pytest.raises(
            UserError, match=f"^{name}: its files are at mlflow-artifacts:/.*start `aps ui` and set MLFL"
        ):
            load(name)
    for name in ("models:/mine/7", "models:/mine@worst", "models:/yours/1", "models:/mine/1/2/3"):
        with pytest.raises(UserError, match=f"^{name}: MLflow at sqlite.* does not give it") as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_others_can_read_a_logged_model(default_store: MlflowClient, stages: Path, tmp_path: Path) -> None:
    registered(default_store, stages / "finetune")
    files = [path for path in (tmp_path / "results/mlartifacts").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o044 for path in files} == {0o044}


def test_knn_leaves_no_model(client: MlflowClient, stages: Path) -> None:
    assert log_model(client, uri(), new_run(client), stages / "knn") is None


def test_a_run_without_a_model_gives_the_folder_it_wrote(client: MlflowClient, stages: Path, photo: Path) -> None:
    run = new_run(client, stages / "pretrain")
    assert torch.equal(load(f"runs:/{run}").embed(photo), load(stages / "pretrain").embed(photo))


def test_an_address_that_leads_nowhere_is_a_sentence(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for address in (f"runs:/{'0' * 32}", "models:/nothing/1", f"models:/m-{'0' * 32}"):
        with pytest.raises(UserError, match=f"{address}: MLflow at sqlite.* does not give it") as caught:
            load(address)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="this run logged no model, and its results are not at"):
        load(f"runs:/{new_run(client)}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        load(f"runs:/{'0' * 32}")


def test_every_kind_of_network_answers_as_it_is_asked_in_python(stages: Path, photo: Path) -> None:
    frame = pd.DataFrame({"image": [sent(photo), f"data:image/jpeg;base64,{sent(photo)}"]})
    classifier = load(stages / "finetune")
    answer = Served(classifier).predict(frame)
    expected = classifier.predict([photo])
    assert answer["class"].tolist() == 2 * expected.classes
    assert answer["probabilities"][0] == pytest.approx(
        dict(zip(expected.names, expected.probabilities[0].tolist(), strict=True)), abs=1e-2
    )  # two JPEG decoders
    encoder = load(stages / "pretrain")
    assert np.allclose(Served(encoder).predict(frame)["embedding"][0], encoder.embed(photo)[0], atol=5e-2)


def test_a_served_detector_gives_boxes_labels_scores_and_masks_of_each_image(
    stages: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given what it finds: so small a detector is sure of nothing."""
    detector = load(stages / "detection")
    masks = torch.zeros(2, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    given = Prediction(
        torch.tensor([[2.0, 1, 6, 3], [0, 0, 7, 5]]), torch.tensor([0.75, 0.25]), torch.tensor([3, 0]), masks
    )
    monkeypatch.setattr(detector.engine, "predict", lambda images: [given for _ in images])
    found = Served(detector).predict(pd.DataFrame({"image": [sent(photo)] * 2}))
    for row in found.to_dict("records"):
        assert row["boxes"] == [[2, 1, 6, 3]] and row["labels"] == ["3"] and row["scores"] == [0.75]
        assert np.array_equal(rle.decode(row["masks"]), masks[:1].permute(1, 2, 0))


@pytest.mark.parametrize("value", ["no base64!", "/etc/passwd", base64.b64encode(b"text").decode(), None, 7])
def test_a_request_without_an_image_is_a_sentence(stages: Path, photo: Path, value: Any) -> None:
    frame = pd.DataFrame({"image": [sent(photo), value]})
    with pytest.raises(UserError, match="row 1: no image"):
        Served(load(stages / "finetune")).predict(frame)
    with pytest.raises(UserError, match="the request has columns picture; send one named 'image'"):
        Served(load(stages / "finetune")).predict(pd.DataFrame({"picture": [sent(photo)]}))


def small_study(folder: Path, server: str) -> Path:
    study = {
        "study": "small",
        "results": str(folder / "results"),
        "tracking_uri": server,
        "defaults": {
            "dataset": {"name": "digits", "train_limit": 64},
            "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3},
            "pretrain": {"epochs": 1, "batch_size": 32, "projector": [8, 8, 8], "predictor": [8, 8, 8]},
            "linear_probe": {"epochs": 1, "batch_size": 32, "lrs": [0.1]},
        },
        "experiments": {"mine": {"stages": ["pretrain", "linear_probe"]}},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(study))
    return folder / "small.yaml"


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The address of a store, and a study that tracks there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    server = f"sqlite:///{tmp_path / 'results' / 'mlflow.db'}"
    return server, str(small_study(tmp_path, server))


def models_of(server: str) -> dict[str, int]:
    """How many models each stage has."""
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("small")
    found = client.search_logged_models([experiment.experiment_id]) if experiment is not None else []
    return {stage: sum(m.tags["stage"] == stage for m in found) for stage in {m.tags["stage"] for m in found}}


def finished_without_models(study: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the study's stages while no models are logged -> the folder of its stages."""
    monkeypatch.setenv("APS_LOG_MODELS", "0")
    for verb in (["data", "digits"], ["pretrain"], ["linear_probe"]):
        assert main([*verb, "--configfile", study]) == 0
    monkeypatch.delenv("APS_LOG_MODELS")
    return Path(study).parent / "results/small/mine/seed0"


def test_a_finished_stage_logs_its_model_and_sync_logs_what_is_missing_once(
    tracked: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, study = tracked
    assert main(["data", "digits", "--configfile", study]) == 0
    assert main(["pretrain", "--configfile", study]) == 0
    assert models_of(server) == {"pretrain": 1}
    monkeypatch.setenv("APS_LOG_MODELS", "0")
    assert main(["linear_probe", "--configfile", study]) == 0
    assert models_of(server) == {"pretrain": 1}
    monkeypatch.delenv("APS_LOG_MODELS")
    connections, connect = [], serving._client
    monkeypatch.setattr(serving, "_client", lambda address: connections.append(address) or connect(address))
    for _ in range(2):
        assert main(["sync", "--configfile", study]) == 0
    assert connections == [server, server], "one connection for all runs of a study"
    assert models_of(server) == {"pretrain": 1, "linear_probe": 1}
    assert "0 runs brought up to date, 1 model logged, 0 could not be sent" in capsys.readouterr().out
    folder = tmp_path / "results/small/mine/seed0/linear_probe"
    run = json.loads((folder / "metrics.json").read_text())["mlflow_run_id"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    image = torch.rand(3, 16, 16)
    assert torch.allclose(load(f"runs:/{run}").embed(image), load(folder).embed(image))


def test_results_whose_weights_are_gone_have_no_model_and_one_warning_says_so(
    tracked: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where results were brought home without them. Nothing half-made is left in MLflow, however often it is tried."""
    server, study = tracked
    stages = finished_without_models(study, monkeypatch)
    encoder = stages / "pretrain/encoder.safetensors"
    kept = encoder.rename(tmp_path / "kept")
    for saved in (tmp_path / "results/runs").rglob("encoder.safetensors"):
        saved.unlink()
    capsys.readouterr()
    for _ in range(2):
        assert main(["sync", "--configfile", study]) == 0
        said = capsys.readouterr()
        folders = f"{stages / 'pretrain'}, {stages / 'linear_probe'}"  # which needs the encoder too
        assert said.err == f"warning: MLflow gets no model of 2 results whose weights are gone here: {folders}\n"
        assert "0 models logged, 0 could not be sent" in said.out and models_of(server) == {}
    kept.rename(encoder)
    (stages / "linear_probe/heads.safetensors").unlink()
    assert sync_models(load_study([study]), server) == (1, 0) and models_of(server) == {"pretrain": 1}


def test_a_run_that_is_gone_from_mlflow_keeps_no_other_from_its_model_and_sync_sends_both_again(
    tracked: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, study = tracked
    stages = finished_without_models(study, monkeypatch)
    gone, there = (
        json.loads((stages / stage / "metrics.json").read_text())["mlflow_run_id"]
        for stage in ("pretrain", "linear_probe")
    )
    client = MlflowClient(tracking_uri=server)
    client.delete_run(gone)
    assert sync_models(load_study([study]), server) == (1, 0), "a deleted run gets none"
    assert models_of(server) == {"linear_probe": 1}
    client._tracking_client.store._hard_delete_run(gone)
    client.delete_logged_model(serving._logged(client, there).removeprefix("models:/"))
    capsys.readouterr()
    assert sync_models(load_study([study]), server) == (1, 1)
    assert f"{stages / 'pretrain'}: MLflow at {server} did not take its model: it is gone" in capsys.readouterr().err
    assert main(["sync", "--configfile", study]) == 0
    assert "1 model logged, 0 could not be sent" in capsys.readouterr().out
    assert models_of(server) == {"pretrain": 1, "linear_probe": 1}


def test_a_server_that_is_slow_or_fails_keeps_no_stage_waiting(
    finished: Path, stages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    wait = threading.Event()
    monkeypatch.setattr(serving, "_track", lambda folder, address, connect: wait.wait(60))
    track_model(stages / "finetune", "http://127.0.0.1:9", "finetune mine/seed0", seconds=0.1)
    wait.set()
    said = "finetune mine/seed0: MLflow did not take its model (it does not answer (timed out)); `python -m aps sync` sends"
    assert said in capsys.readouterr().err

    def fails(folder: Path, address: str, connect: object) -> bool:
        raise ConnectionError

    monkeypatch.setattr(serving, "_track", fails)
    track_model(stages / "finetune", "http://127.0.0.1:9", "finetune mine/seed0")
    assert "did not take its model" in capsys.readouterr().err
    assert sync_models(load_study(["study.yaml"]), "http://127.0.0.1:9") == (
        0,
        len(load_study(["study.yaml"]).jobs()),
    )  # asked once
    assert sync_models(load_study(["study.yaml"]), "none") == (0, 0)


@contextlib.contextmanager
def server(model: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # the model brings its code
    programs = Path(sys.executable).parent  # mlflow starts uvicorn by its name, as in an activated environment
    environment["PATH"] = os.pathsep.join([str(programs), environment.get("PATH", os.defpath)])
    command = ["models", "serve", "-m", str(model), "--env-manager", "local", "--port", str(port), "--workers", "1"]
    log = model.parent / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command], stdout=out, stderr=out, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(timeout=30)


def ask(address: str, request: dict[str, Any]) -> Any:
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=60) as answer:
        return json.loads(answer.read())["predictions"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "linear_probe", "pretrain", "detection"])
def test_mlflow_serves_an_image_over_http(stages: Path, photo: Path, tmp_path: Path, stage: str) -> None:
    encoder = stages / ENCODERS[stage] if stage in ENCODERS else None
    save_model(tmp_path / "model", stages / stage, encoder)
    model = load(stages / stage)
    with server(tmp_path / "model") as address:
        for request in (
            {"dataframe_split": {"columns": ["image"], "data": [[sent(photo)], [sent(photo)]]}},
            {"dataframe_records": [{"image": sent(photo)}, {"image": sent(photo)}]},
        ):
            first, second = ask(address, request)
            assert first == second
            if stage == "pretrain":
                assert np.allclose(first["embedding"], model.embed(photo)[0], atol=5e-2)
            elif stage == "detection":
                assert set(first) == {"boxes", "labels", "scores", "masks"}
            else:
                expected = model.predict(photo)
                assert first["class"] == expected.classes[0]
                assert first["probability"] == pytest.approx(float(expected.probabilities.max()), abs=1e-2)
                assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, {"dataframe_split": {"columns": ["image"], "data": [["no image"]]}})
        assert "row 0: no image" in refused.value.read().decode()


def test_a_saved_model_says_how_it_is_loaded(stages: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", stages / "finetune")
    stored = yaml.safe_load((tmp_path / "model/MLmodel").read_text())
    assert stored["flavors"]["python_function"]["loader_module"] == "aps.inference.served"


def test_an_address_where_tracking_is_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    with pytest.raises(UserError, match=r"runs:/abc: MLFLOW_TRACKING_URI is none, so no server is asked; set it to"):
        serving.weights_of("runs:/abc")
