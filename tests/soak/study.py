"""The study whose stages are killed: on images in memory, on image files with workers, on two processes."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torchvision.io import write_png

from aps.files import TEMPORARY
from aps.tracking.server import Server

DETECTION = {
    "dataset": "digits_coco", "image_size": 32, "iterations": 12, "batch_size": 1, "warmup_iterations": 1, "lr_drops": [],
    "window": 4, "global_blocks": [0], "pyramid_scales": [2.0, 1.0], "pyramid_dim": 16, "head_convs": 1, "head_dim": 16,
    "proposals": 10, "rois": 8,
}  # fmt: skip
STUDY: dict[str, Any] = {
    "study": "soak-reference",
    "datasets": {"photos": {"folder": "photos"}},
    "defaults": {
        "dataset": {"name": "digits", "train_limit": 128},
        "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3},
        "pretrain": {
            "epochs": 8, "batch_size": 32, "warmup_epochs": 1, "projector": [16, 16, 8], "predictor": [16, 16, 8], "knn_every": 4,
        },
        "finetune": {"epochs": 16, "batch_size": 32, "warmup_epochs": 0, "ema": 0.9, "holdout": 0.1},
        "linear_probe": {"epochs": 24, "batch_size": 32, "lrs": [0.1, 1.0]},
        "knn": {"k": [1, 5]},
        "embed": {"queries": 3, "neighbours": 2},
        "detection": DETECTION,
    },
    "experiments": {
        "aps": {"stages": ["pretrain", "finetune", "linear_probe", "knn", "embed", "detection"]},
        "files": {"dataset": {"name": "photos", "train_limit": 96}, "stages": ["pretrain"]},
        "pair": {"inherits": "aps", "stages": ["pretrain"]},
    },
}  # fmt: skip
CLOCK = re.compile(
    r"(^|/)(time|seconds|reading_seconds|step_ms|input_share|images_per_second|gpu_hours|peak_\w+|wall_seconds)$|^system/"
)


@dataclass(frozen=True)
class Job:
    """A stage of the study, and how it is run."""

    experiment: str
    stage: str
    weight: int  # how often it is chosen, relative to the others
    options: tuple[str, ...] = ()
    real: bool = False  # whether it has to be a real command, not a fork

    @property
    def name(self) -> str:
        return f"{self.stage} {self.experiment}"

    def result(self, results: Path, study: str) -> Path:
        return results / study / self.experiment / "seed0" / self.stage


JOBS = (
    Job("aps", "pretrain", 6),
    Job("aps", "finetune", 4),
    Job("aps", "linear_probe", 4),
    Job("aps", "knn", 4),
    Job("aps", "embed", 2),
    Job("aps", "detection", 2),
    Job("files", "pretrain", 4, ("--workers", "1")),
    Job("pair", "pretrain", 1, ("--processes", "2"), real=True),
)


def lay_out(folder: Path) -> None:
    """Write the study's file and its image files."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in range(10):
            target = folder / "photos" / split / str(label)
            target.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                write_png(
                    torch.randint(0, 256, (3, 24, 24), generator=generator, dtype=torch.uint8),
                    str(target / f"{number}.png"),
                )
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))


@dataclass
class Result:
    """What has to be the same in every finished run of a job, however often it was killed."""

    tensors: dict[str, torch.Tensor]
    figures: dict[str, Any]
    journal: list[dict[str, Any]]
    points: dict[str, dict[int, float]]  # in MLflow: metric -> step -> value; 0 for measured times
    problems: list[str]  # what is wrong in itself


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not CLOCK.search(key)}


def read_result(results: Path, study: str, job: Job, address: str) -> Result:
    folder, problems = job.result(results, study), []
    tensors = {
        f"{file.name} {name}": value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    journal = [without_times(json.loads(line)) for line in (folder / "history.jsonl").read_text().splitlines()]
    if predictions := folder / "predictions.json" if (folder / "predictions.json").exists() else None:
        metrics["metrics"] |= {"predictions": predictions.read_text()}
    points = _points(study, job, address, problems)
    problems += [f"left behind: {path.relative_to(results)}" for path in _leftovers(results)]
    return Result(tensors, without_times(metrics["metrics"]), journal, points, problems)


def _points(study: str, job: Job, address: str, problems: list[str]) -> dict[str, dict[int, float]]:
    client = Server(address).client
    experiment = client.get_experiment_by_name(study)
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    runs = [run for run in runs if run.info.run_name == f"{job.experiment}/seed0/{job.stage}"]
    if len(runs) != 1 or runs[0].info.status != "FINISHED":
        problems.append(f"MLflow has {[run.info.status for run in runs]} instead of one FINISHED run")
    points: dict[str, dict[int, float]] = {}
    for run in runs[:1]:
        for key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            counts = Counter(point.step for point in history)
            if twice := [step for step, count in counts.items() if count > 1]:
                problems.append(f"MLflow has {key} more than once at steps {twice[:5]}")
            clock = CLOCK.search(key) is not None
            if not key.startswith("system/"):
                points[key] = {point.step: 0.0 if clock else point.value for point in history}
    return points


def _leftovers(results: Path) -> list[Path]:
    # `sync` may be writing tracking.json in the study's folder, so a temporary file of it there is removed only after an hour.
    paths = [
        path
        for path in results.rglob(".*")
        if TEMPORARY.fullmatch(path.name)
        and ((results / "runs") in path.parents or not path.name.startswith(".tracking.json."))
    ]
    for pattern in ("attempt.json", "state-*", "outputs"):
        paths += (results / "runs").rglob(pattern)
    return paths


def differences(result: Result, expected: Result) -> list[str]:
    """One sentence for each thing that was lost, doubled or changed."""
    sentences = list(result.problems)
    if result.tensors.keys() != expected.tensors.keys():
        sentences.append(f"other weights: {sorted(result.tensors.keys() ^ expected.tensors.keys())[:5]}")
    other = [
        name
        for name, x in expected.tensors.items()
        if name in result.tensors and not torch.equal(result.tensors[name], x)
    ]
    if other:
        sentences.append(f"{len(other)} of {len(expected.tensors)} tensors differ: {other[:3]}")
    if result.figures != expected.figures:
        pairs = [key for key in expected.figures if result.figures.get(key) != expected.figures[key]]
        sentences.append(f"figures differ: {pairs[:5] or sorted(result.figures.keys() ^ expected.figures.keys())[:5]}")
    if result.journal != expected.journal:
        first = next(
            (i for i, (a, b) in enumerate(zip(result.journal, expected.journal, strict=False)) if a != b), "the end"
        )
        sentences.append(
            f"journal: {len(result.journal)} lines for {len(expected.journal)}, the first difference at {first}"
        )
    for key in sorted(result.points.keys() | expected.points.keys()):
        has, should = result.points.get(key, {}), expected.points.get(key, {})
        if has != should:
            different = sorted(has.items() ^ should.items())[:3]
            sentences.append(f"MLflow: {key} has {len(has)} points for {len(should)}, e.g. {different}")
    return sentences
