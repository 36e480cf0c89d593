"""The paths of all files under a results folder. Nothing is read or written here.

    results/STUDY/EXPERIMENT/seedN/STAGE/   a stage's outputs, as the study shows them
    results/STUDY/report/, logs/, benchmarks/
    results/runs/STAGE/KEY/                 a saved run: its checkpoints, and when it is finished its outputs
    results/data/DATASET/manifest.json      a prepared dataset
    results/data/DATASET-KEY/               one of the user's datasets; DATASET is a link to the one prepared last
    results/mlflow.db, mlartifacts/         MLflow, where no server is named
    results/.mlflow-name                    what MLflow calls this folder

A study never touches another study's folder. Studies that ask for the same run share one saved run: its KEY is a digest
of what determines its result (`aps.results.run_key`). The KEY of a user's dataset is a digest of its source, so that
two studies may give the same name to different folders.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from aps.files import expanded
from aps.registry import USER_DATASETS
from aps.settings.blocks import SourceSettings, UserDataset, differs
from aps.settings.study import Study
from aps.stages import STAGES

SHARE = Path(__file__).parent / "share"  # in the installed package: Snakefile, workflow, config


def study_folder(study: Study) -> Path:
    return Path(study.results) / study.study


def stage_folder(study_folder: str | Path, experiment: str, seed: int, stage: str) -> Path:
    return Path(study_folder) / experiment / f"seed{seed}" / stage


def log_file(study_folder: str | Path, experiment: str, seed: int, stage: str) -> Path:
    return Path(study_folder) / "logs" / experiment / f"seed{seed}" / f"{stage}.log"


def run_folder(results: str | Path, stage: str, key: str) -> Path:
    return Path(results) / "runs" / stage / key


def folder_of_runs(run: Path) -> Path:
    """The results folder of a saved run's folder: the inverse of `run_folder`."""
    return run.parent.parent.parent


def data_folder(dataset: str, source: SourceSettings | UserDataset | None = None) -> str:
    """Name of a prepared dataset's folder. `source` is where it comes from; it matters only for the user's datasets."""
    of_user = isinstance(source, UserDataset) or dataset in USER_DATASETS
    if source is None or not of_user or source.identity is None:
        return dataset
    return f"{dataset}-{hashlib.sha256(source.identity.encode()).hexdigest()[:8]}"


def manifest_path(results: str | Path, dataset: str, source: SourceSettings | UserDataset | None = None) -> Path:
    return Path(results) / "data" / data_folder(dataset, source) / "manifest.json"


def manifest_of(study: Study, dataset: str) -> Path:
    return manifest_path(study.results, dataset, study.source(dataset))


def dataset_of(folder: Path) -> str:
    """Name of the dataset that a prepared dataset's folder holds: the inverse of `data_folder`."""
    return re.sub(r"(?<=.)-[0-9a-f]{8}$", "", folder.name)


def results_of(folder: Path) -> Path:
    """The results folder in which a prepared dataset's folder lies; that folder itself where it lies in none."""
    return folder.parent.parent if folder.parent.name == "data" else folder


def report_folder(study: Study) -> Path:
    return study_folder(study) / "report"


def encoder_file(study: Study, experiment: str, seed: int) -> Path | None:
    """The file from which an experiment's stages load their encoder; None for random weights or timm's."""
    source = study.pretrain_source(experiment)
    if source is not None:
        return stage_folder(study_folder(study), source, seed, "pretrain") / "encoder.safetensors"
    weights = study.experiments[experiment].encoder.weights
    return (
        expanded(weights, f"experiment '{experiment}': encoder.weights") if weights.endswith(".safetensors") else None
    )


def encoder_job(study: Study, experiment: str, seed: int) -> tuple[str, int, str] | None:
    """The run (experiment, seed, stage) of this study that makes `encoder_file`; None where none does."""
    source = study.pretrain_source(experiment)
    if source is not None:
        return source, seed, "pretrain"
    file = encoder_file(study, experiment, seed)
    return job_of(study, file) if file is not None else None


def maker_of(study: Study, job: tuple[str, int, str]) -> tuple[str, int, str] | None:
    """The run of this study that makes the encoder of a run; None where it needs none, or none of this study makes it."""
    experiment, seed, stage = job
    return encoder_job(study, experiment, seed) if STAGES[stage].encoder else None


def makers_of(study: Study, job: tuple[str, int, str]) -> Iterator[tuple[str, int, str]]:
    """The runs of this study that make the encoder of a run, nearest first: a finetuning, say, then a pretraining."""
    maker = maker_of(study, job)
    while maker is not None:
        yield maker
        maker = maker_of(study, maker)


def job_of(study: Study, file: Path) -> tuple[str, int, str] | None:
    """The run (experiment, seed, stage) of this study that has `file` among its outputs; None where none has."""
    inside = os.path.relpath(file, study_folder(study))
    found = re.fullmatch(r"([^/]+)/seed(\d+)/([^/]+)/([^/]+)", inside)
    if found is None:
        return None
    name, number, stage, output = found[1], int(found[2]), found[3], found[4]
    experiment = study.experiments.get(name)
    if experiment is None or number not in experiment.seeds or stage not in experiment.stages:
        return None
    return (name, number, stage) if output in STAGES[stage].files else None


def check_encoders(study: Study) -> None:
    """Raises ValueError where an experiment's encoder is made from its own results, or is one of another shape."""
    for experiment, settings in study.experiments.items():
        for seed in settings.seeds:
            names, job = [experiment], encoder_job(study, experiment, seed)
            if job is not None and (key := differs(settings.encoder, study.experiments[job[0]].encoder)) is not None:
                raise ValueError(
                    f"experiment '{experiment}': encoder.{key} differs from that of '{job[0]}', whose weights it takes; set them "
                    "alike"
                )
            while job is not None and STAGES[job[2]].encoder:
                names.append(job[0])
                if job[0] in names[:-1]:
                    raise ValueError(
                        f"experiment '{experiment}': encoder.weights are made from themselves ({' from '.join(names)}); name "
                        "other weights"
                    )
                job = maker_of(study, job)


def find_old_layout(results: str | Path) -> Path | None:
    """A stage's folder in the layout of version 0.1, results/EXPERIMENT/seedN/STAGE, if there is one."""
    return next((file.parent for file in Path(results).glob("*/seed*/*/metrics.json")), None)
