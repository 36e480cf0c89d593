"""The stage from its command line: killed and run again, its outputs, its floors."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import ENCODER, stage_settings

from aps.detection.engine import Task
from aps.detection.stage import load_weights, normalization, run
from aps.errors import UserError
from aps.models.encoder import build_encoder
from aps.models.weights import save_encoder
from aps.results import StageJob, saved_run
from aps.settings.study import StageSettings
from aps.stages import STAGES

ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


def job(manifest: Path, folder: Path, settings: StageSettings, encoder: Path | None = None) -> StageJob:
    return StageJob(
        settings=settings,
        manifest=manifest,
        out=folder / "out",
        checkpoints=saved_run(folder, settings, manifest, encoder),
        encoder=encoder,
        checkpoint_minutes=1e-4,
    )


def start(manifest: Path, folder: Path, settings: StageSettings, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "aps", "detection", "--settings", settings.to_json(), *more]
    command += ["--manifest", str(manifest), "--results", str(folder), "--out", str(folder / "out")]
    command += ["--checkpoint-minutes", "0.0001"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def history(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "out" / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_run_again_it_ends_as_if_undisturbed(manifest: Path, tmp_path: Path, engine: str):
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    settings = stage_settings(engine=engine)
    undisturbed = start(manifest, tmp_path / "whole", settings)
    killed = start(manifest, tmp_path / "killed", settings)
    saved = saved_run(tmp_path / "killed", settings, manifest, None)
    while not any(int(file.stem.removeprefix("state-")) >= 23 for file in saved.glob("state-*.pt")):
        assert killed.poll() is None, killed.stderr and killed.stderr.read()
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "out" / "metrics.json").exists()

    again = start(manifest, tmp_path / "killed", settings)
    text = again.communicate()[1]
    assert again.returncode == 0, text
    assert undisturbed.communicate() and undisturbed.returncode == 0
    assert "weights of the detector" not in text  # it did not start anew
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert [line["step"] for line in history(tmp_path / "whole")] == [20, 40, 45]
    first, second = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    results = [json.loads((tmp_path / name / "out" / "metrics.json").read_text()) for name in ("whole", "killed")]
    for result in results:
        result["metrics"].pop("images_per_second")
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["settings_digest"] == settings.digest


def test_it_leaves_its_outputs_metrics_and_table_of_weights(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    encoder = tmp_path / "encoder.safetensors"
    save_encoder(build_encoder(ENCODER), ENCODER, encoder, {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    settings = stage_settings(iterations=20, evaluate_every=10)
    run(job(manifest, tmp_path, settings, encoder))
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} >= set(STAGES["detection"].files)
    result = json.loads((out / "metrics.json").read_text())
    for kind in ("box", "mask"):
        assert {
            f"{kind}_{key}" for key in ("AP", "AP50", "AP75", "AP_small", "AR1", "AR10", "AR100", "AR_small")
        } <= set(result["metrics"])
    assert result["weights"]["loaded"] == 24 and result["weights"]["interpolated"] == 1
    assert result["normalization"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert (out / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert all(
        set(row) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        for row in json.loads((out / "predictions.json").read_text())
    )
    scored = [line for line in history(tmp_path) if "mask_AP" in line]
    assert [line["step"] for line in scored] == [10, 20] and scored[1]["mask_AP"] == result["metrics"]["mask_AP"]
    assert all(
        scored[1][f"box_AP/{label}"] == value for label, value in result["metrics"]["per_class"]["box_AP"].items()
    )
    text = capsys.readouterr().err
    assert "24 loaded, 1 interpolated" in text and "left behind" in text
    weights = load_file(out / "model.safetensors")
    assert {name for name in weights if name.startswith("backbone.net.blocks.1.")} >= {
        "backbone.net.blocks.1.attn.qkv.weight"
    }


def test_normalization_is_that_of_the_encoder_else_of_the_dataset(manifest: Path, tmp_path: Path):
    encoder = tmp_path / "encoder.safetensors"
    save_encoder(build_encoder(ENCODER), ENCODER, encoder, {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    settings = stage_settings()
    assert normalization(job(manifest, tmp_path, settings, encoder)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    measured = json.loads(manifest.read_text())["statistics"]["measured"]
    assert normalization(job(manifest, tmp_path, settings))[0] == tuple(measured["mean"])
    named = settings.model_copy(
        update={"encoder": ENCODER.model_copy(update={"weights": "timm:deit_small_patch16_224"})}
    )
    assert normalization(job(manifest, tmp_path, named)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_an_encoder_that_does_not_fit_is_refused_before_training(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    wide = ENCODER.model_copy(update={"dim": 192})
    save_encoder(build_encoder(wide), wide, tmp_path / "wide.safetensors")
    with pytest.raises(
        UserError, match=r"wide\.safetensors: its encoder has dim 192, the settings ask for encoder\.dim 96"
    ):
        run(job(manifest, tmp_path, stage_settings(), tmp_path / "wide.safetensors"))


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by file"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_timm_checkpoint_starts_the_backbone(
    task: Task, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, named: bool
):
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    size = {"embed_dim": 96, "depth": 2, "num_heads": 3, "img_size": 16, "patch_size": 4}
    theirs = timm.create_model("vit_tiny_patch16_224", **size)
    file = tmp_path / "theirs.safetensors"
    save_file(theirs.state_dict(), file)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: theirs)
    weights = "timm:vit_x" if named else str(file)
    encoder = ENCODER.model_copy(update={"weights": weights, "qkv_bias": True, "layer_norm_eps": 1e-6})
    settings = stage_settings(engine=engine).model_copy(update={"encoder": encoder})
    built = importlib.import_module(f"aps.detection.engines.{engine}").Engine(
        dataclasses.replace(task, encoder=encoder)
    )
    placed, report = load_weights(built, job(manifest, tmp_path, settings, None if named else file))
    assert placed.counts()["loaded"] == 26 and placed.counts()["interpolated"] == 1 and weights in report
    own, expected = built.model.state_dict(), theirs.state_dict()
    assert torch.equal(own["backbone.net.pos_embed"], expected["pos_embed"][:, 1:])  # less the class token's row
    for name in (name for name in expected if name.startswith("blocks.")):
        assert torch.equal(own[f"backbone.net.{name}"], expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_and_score_the_whole_of_val(manifest: Path, tmp_path: Path, engine: str):
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    settings = stage_settings(engine=engine, iterations=20, lr=1e-5)  # hardly trained, so it finds something anywhere
    process = start(manifest, tmp_path / "two", settings, "--processes", "2")
    text = process.communicate()[1]
    assert process.returncode == 0, text
    rows = json.loads((tmp_path / "two" / "out" / "predictions.json").read_text())
    assert {row["image_id"] for row in rows} == set(range(1, 9))
    assert history(tmp_path / "two")[0]["loss"] > 0
