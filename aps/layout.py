"""Where things lie under a results folder. Paths only: nothing is read or written here.

results/EXPERIMENT/seedN/STAGE/         a stage's outputs
results/checkpoints/.../DIGEST/         what a stage needs to go on after a kill; Snakemake does not know it
results/data/DATASET/manifest.json      a prepared dataset
results/report/STUDY/                   a study's report
"""

from __future__ import annotations

from pathlib import Path

from aps.settings.study import StageSettings, Study


def stage_folder(results: str | Path, experiment: str, seed: int, stage: str) -> Path:
    return Path(results) / experiment / f"seed{seed}" / stage


def checkpoint_folder(results: str | Path, settings: StageSettings) -> Path:
    """Keyed by the settings' digest: the same settings resume, others start afresh."""
    stage = stage_folder(Path(results) / "checkpoints", settings.experiment, settings.seed, settings.stage)
    return stage / settings.digest


def manifest_path(results: str | Path, dataset: str) -> Path:
    return Path(results) / "data" / dataset / "manifest.json"


def report_folder(study: Study) -> Path:
    return Path(study.results) / "report" / study.study


def encoder_file(study: Study, experiment: str, seed: int) -> Path | None:
    """The file an experiment's stages take their encoder from; None: random weights or timm's."""
    source = study.pretrain_source(experiment)
    if source is not None:
        return stage_folder(study.results, source, seed, "pretrain") / "encoder.safetensors"
    weights = study.experiments[experiment].encoder.weights
    return Path(weights) if weights.endswith(".safetensors") else None
