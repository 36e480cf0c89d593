"""A study of three gammas and three seeds with made-up results: gamma 3 is best on kNN, gamma 0 is cheapest."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from aps.layout import stage_folder, study_folder
from aps.seals import contents, seal
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.tracking.addresses import OFF
from aps.tracking.describing import describe
from aps.tracking.state import State
from aps.tracking.syncing import log_report, sync

GAMMAS, SEEDS = (0.0, 3.0, 9.0), (0, 1, 2)
STARTED = 1795600000.0
QUESTION = "How sharply should overlap be avoided?"


def write_study(folder: Path) -> Path:
    base: dict[str, Any] = {
        "dataset": "digits", "seeds": list(SEEDS), "stages": ["pretrain", "finetune", "knn"], "pretrain": {"epochs": 16},
        "description": "How sharply overlap is avoided.", "sampling": {"gamma": GAMMAS[0]},
    }  # fmt: skip
    others = {
        f"gamma{gamma:g}": {"inherits": "gamma0", "description": base["description"], "sampling": {"gamma": gamma}}
        for gamma in GAMMAS[1:]
    }
    study = {
        "study": "gammas",
        "question": QUESTION,
        "results": str(folder / "results"),
        "experiments": {"gamma0": base, **others},
    }
    file = folder / "gammas.yaml"
    file.write_text(json.dumps(study))
    return file


def figures(gamma: float, seed: int) -> dict[str, float]:
    """The scores of one seed in percent, and the seconds of its pretraining."""
    chance = random.Random(f"{gamma} {seed}")
    knn = 60 + 8 * math.exp(-abs(gamma - 3) / 3) + 2 * chance.random()
    return {"knn": round(knn, 2), "finetune": round(knn + 15 + chance.random(), 2), "seconds": round(300 + 20 * gamma + 9 * chance.random(), 1)}  # fmt: skip


def finish(study: Study) -> None:
    """Write the study's results, without MLflow."""
    for name, experiment in study.experiments.items():
        for seed in experiment.seeds:
            pretraining = None
            for stage in experiment.stages:
                metrics = _finish(study, name, seed, stage, pretraining)
                pretraining = pretraining or metrics


def _finish(study: Study, name: str, seed: int, stage: str, pretraining: dict[str, Any] | None) -> dict[str, Any]:
    scores = figures(study.experiments[name].sampling.gamma, seed)
    seconds = {"pretrain": scores["seconds"], "finetune": 60.0, "knn": 3.0}[stage]
    total = round(seconds + (scores["seconds"] if pretraining else 0), 1)
    folder = stage_folder(study_folder(study), name, seed, stage)
    folder.mkdir(parents=True)
    (folder / "encoder.safetensors").write_text(f"{name} {seed}")
    with (folder / "history.jsonl").open("w") as file:
        for step, line in _lines(stage, random.Random(f"{name} {seed} {stage}"), scores["knn"]):
            file.write(json.dumps({"step": step, "time": STARTED + step, **line}) + "\n")
    if stage == "pretrain":
        Image.new("RGB", (64, 32), (90, 120, 200)).save(folder / "views.png")
    settings = study.stage_settings(name, seed, stage)
    final = {
        "pretrain": {"loss": 3.5}, "finetune": {"test_top1": scores["finetune"]},
        "knn": {"knn_top1_k10": scores["knn"] - 1, "knn_top1_k20": scores["knn"]},
    }[stage]  # fmt: skip
    metrics = {
        "stage": stage, "experiment": name, "seed": seed, "metrics": final, "settings": settings.relevant(),
        "settings_digest": settings.digest, "started": "2026-11-25T12:00:00+00:00", "wall_seconds": seconds,
        "dataset": {"name": "digits", "digest": "01" * 32}, "files": contents(folder), "commit": "0123456789ab",
        "finished": "2026-11-25T13:00:00+00:00", "version": "0.2.0", "mlflow_run_id": None,
        "command": f"python -m aps {stage} --experiment {name} --seed {seed}", "hardware": {"cpu": "two cores", "host": "n1", "processes": 1},
        "encoder": {"source": str(folder.parent / "pretrain" / "encoder.safetensors") if pretraining else None,
                    "sha256": pretraining["files"]["encoder.safetensors"]["sha256"] if pretraining else None},
        "cost": {"seconds": total, "gpu_hours": round(total / 3600, 4), "peak_gpu_gb": 1.2, "flops": 1e9 * total},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(seal(metrics)))
    State(address=OFF, about=describe(metrics, study.study)).write(folder / "tracking.json")
    return metrics


def _lines(stage: str, chance: random.Random, knn: float) -> Iterator[tuple[int, dict[str, float]]]:
    if stage == "knn":
        yield from ((k, {"knn_top1": knn - 1 + (k == 20)}) for k in (10, 20))
        return
    for epoch in range(1, 17):
        loss = 8 * math.exp(-epoch / 6) + 3 + 0.2 * chance.random()
        figure = (
            {"positive_cosine": 1 - math.exp(-epoch / 5)}
            if stage == "pretrain"
            else {"train_top1_augmented": 6.0 * epoch}
        )
        yield 20 * epoch, {"epoch": epoch, "loss": loss, "lr": 1e-3 * (1 - epoch / 16), **figure}


def send(file: Path, address: str) -> Study:
    """Send everything to MLflow, as `sync` and `report` do."""
    study = load_study([file])
    synced = sync(study, address)
    assert synced.missing == 0, synced.reason
    log_report(study, address, [])
    return study
