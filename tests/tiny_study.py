"""A study with every stage, of seconds each, a folder to run it in, and results that nobody computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from aps.files import sha256
from aps.findings import Findings
from aps.layout import encoder_file, manifest_path, report_folder, stage_folder, study_folder
from aps.results import StageJob, saved_run
from aps.seals import contents, seal
from aps.settings.blocks import DatasetSettings, EncoderSettings, KnnSettings
from aps.settings.study import StageSettings, Study
from aps.stages import STAGES

ROOT = Path(__file__).parent.parent
STUDY: dict[str, Any] = {
    "study": "tiny",
    "defaults": {
        "dataset": {"name": "digits", "train_limit": 128},
        "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3},
        "pretrain": {
            "epochs": 2,
            "batch_size": 64,
            "warmup_epochs": 1,
            "projector": [16, 16, 8],
            "predictor": [16, 16, 8],
        },
        "finetune": {"epochs": 1, "batch_size": 64, "warmup_epochs": 0},
        "linear_probe": {"epochs": 1, "batch_size": 64, "lrs": [0.1, 1.0]},
        "knn": {"k": [1, 5]},
        "detection": {
            "image_size": 32,
            "iterations": 3,
            "batch_size": 1,
            "warmup_iterations": 1,
            "lr_drops": [],
            "window": 4,
            "global_blocks": [0],
            "pyramid_scales": [2.0, 1.0],
            "pyramid_dim": 16,
            "head_convs": 1,
            "head_dim": 16,
            "proposals": 10,
            "rois": 8,
        },
    },
    "experiments": {
        "aps": {"stages": ["pretrain", "finetune", "linear_probe", "knn", "embed", "detection"]},
        "floor": {"inherits": "aps", "encoder": {"weights": "random"}, "stages": ["finetune", "knn"]},
    },
}


def checkout(folder: Path, study: dict[str, Any] = STUDY) -> Path:
    """Put links to the repository and `study.yaml` into `folder`, so that the repository stays clean."""
    for name in ("Snakefile", "workflow", "profiles", "slurm", "config", "aps"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder


def working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the working directory, with the study in config/config.yaml, a Snakefile and MLflow off."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "Snakefile").touch()  # messages name `snakemake` where it has one
    return folder


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `tree` with `value` at `path`. Missing keys are added."""
    if not path:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = put(copy.get(path[0], {}) if isinstance(copy, dict) else copy[path[0]], path[1:], value)
    return copy


def fake_job(
    results: Path, experiment: str = "aps", seed: int = 0, k: int = 5, weights: str = "pretrain", **changes: Any
) -> StageJob:
    """A job of kNN, whose stage the test plays: it has only the outputs that every stage has."""
    manifest = results / "data" / "digits" / "manifest.json"
    if not manifest.exists():
        manifest.parent.mkdir(parents=True)
        pretend_prepared(manifest, "0123")
    settings = StageSettings(
        stage="knn",
        experiment=experiment,
        seed=seed,
        dataset=DatasetSettings(name="digits"),
        knn=KnnSettings(k=(k,)),
        encoder=EncoderSettings(weights=weights),
    )
    return StageJob(
        settings=settings,
        manifest=manifest,
        out=stage_folder(results / "tiny", experiment, seed, "knn"),
        checkpoints=saved_run(results, settings, manifest, changes.get("encoder")),
        **{"study": "tiny", **changes},
    )


def pretend_prepared(manifest: Path, digest: str) -> None:
    """Write a manifest without files and with this digest."""
    name = manifest.parent.name
    content = {
        "name": name, "kind": "detection" if "coco" in name else "classification", "classes": ["a", "b"],
        "image_size": None, "splits": {}, "statistics": {"measured": None}, "digest": digest, "digest_of": "nothing",
        "origin": "a test",
    }  # fmt: skip
    manifest.write_text(json.dumps(content))


def pretend_finished(study: Study) -> list[Path]:
    """Write every result of a study without computing it: sealed, with text for weights -> the files."""
    for dataset in study.dataset_names():
        manifest = manifest_path(study.results, dataset)
        manifest.parent.mkdir(parents=True, exist_ok=True)
        pretend_prepared(manifest, f"images of {dataset}")
    files = [manifest_path(study.results, dataset) for dataset in study.dataset_names()]
    for experiment, seed, stage in study.jobs():
        folder = stage_folder(study_folder(study), experiment, seed, stage)
        folder.mkdir(parents=True, exist_ok=True)
        settings = study.stage_settings(experiment, seed, stage)
        for name in (*STAGES[stage].outputs, "history.jsonl"):
            (folder / name).write_text(f"{settings.digest} {name}" if name != "history.jsonl" else "")
        encoder = encoder_file(study, experiment, seed) if STAGES[stage].encoder else None
        metrics = {
            "stage": stage, "experiment": experiment, "seed": seed, "metrics": {}, "settings": settings.relevant(),
            "settings_digest": settings.digest, "files": contents(folder),
            "dataset": {"name": settings.dataset_name, "digest": f"images of {settings.dataset_name}"},
            "encoder": {"sha256": sha256(encoder) if encoder else None},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(seal(metrics)))
        files += [folder / name for name in STAGES[stage].files]
    (report_folder(study) / "figures").mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "results.csv"):
        (report_folder(study) / name).write_text("")
        files.append(report_folder(study) / name)
    Findings(study).stamp_report(report_folder(study))
    return files
