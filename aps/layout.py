"""Where things lie under a results folder. Paths only: nothing is read or written here.

    results/STUDY/EXPERIMENT/seedN/STAGE/   a stage's outputs, as the study shows them
    results/STUDY/report/, logs/, benchmarks/
    results/runs/STAGE/KEY/                 a saved run: what it needs to go on after a kill, then its outputs
    results/data/DATASET/manifest.json      a prepared dataset
    results/data/DATASET-KEY/               one of people's own, where DATASET links to the one that was prepared last
    results/mlflow.db, mlartifacts/         MLflow, where no server is named

A study never touches another study's folder. What several of them ask for alike is one saved run: its KEY is a digest
of what made it (`aps.results.run_key`). People's own data have a KEY over their source in the same way, so that two studies
may give one name to different folders.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from aps.registry import USER_DATASETS
from aps.settings.blocks import SourceSettings, UserDataset
from aps.settings.study import Study

SHARE = Path(__file__).parent / "share"  # what the installed package carries: Snakefile, workflow, config


def study_folder(study: Study) -> Path:
    return Path(study.results) / study.study


def stage_folder(study_folder: str | Path, experiment: str, seed: int, stage: str) -> Path:
    return Path(study_folder) / experiment / f"seed{seed}" / stage


def log_file(study_folder: str | Path, experiment: str, seed: int, stage: str) -> Path:
    return Path(study_folder) / "logs" / experiment / f"seed{seed}" / f"{stage}.log"


def run_folder(results: str | Path, stage: str, key: str) -> Path:
    return Path(results) / "runs" / stage / key


def data_folder(dataset: str, source: SourceSettings | UserDataset | None = None) -> str:
    """Name of a prepared dataset's folder. source: where it comes from, which counts for people's own data only."""
    own = source is not None and (isinstance(source, UserDataset) or dataset in USER_DATASETS)
    if source is None or not own or source.identity is None:
        return dataset
    return f"{dataset}-{hashlib.sha256(source.identity.encode()).hexdigest()[:8]}"


def manifest_path(results: str | Path, dataset: str, source: SourceSettings | UserDataset | None = None) -> Path:
    return Path(results) / "data" / data_folder(dataset, source) / "manifest.json"


def manifest_of(study: Study, dataset: str) -> Path:
    return manifest_path(study.results, dataset, study.source(dataset))


def report_folder(study: Study) -> Path:
    return study_folder(study) / "report"


def encoder_file(study: Study, experiment: str, seed: int) -> Path | None:
    """The file an experiment's stages take their encoder from; None: random weights or timm's."""
    source = study.pretrain_source(experiment)
    if source is not None:
        return stage_folder(study_folder(study), source, seed, "pretrain") / "encoder.safetensors"
    weights = study.experiments[experiment].encoder.weights
    return Path(weights).expanduser() if weights.endswith(".safetensors") else None


def of_the_old_layout(results: str | Path) -> Path | None:
    """A stage's folder as version 0.1 had it, results/EXPERIMENT/seedN/STAGE, if there is one."""
    return next((file.parent for file in Path(results).glob("*/seed*/*/metrics.json")), None)
