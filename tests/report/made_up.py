"""A small study with results that nobody computed, sealed like those of real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aps.files import sha256
from aps.findings import Findings
from aps.layout import stage_folder, study_folder
from aps.report.table import Table
from aps.seals import contents, seal
from aps.settings.study import Study
from aps.stages import STAGES

STUDY = """
study: small
results: {results}
tracking_uri: none
defaults:
  dataset: digits
  seeds: [0, 1]
  stages: [pretrain, finetune, knn]
  encoder: {{arch: micro, image_size: 16, patch_size: 4}}
experiments:
  aps: {{}}
  untrained: {{inherits: aps, encoder: {{weights: random}}, stages: [finetune, knn]}}
  longer: {{inherits: aps, finetune: {{epochs: 7}}, stages: [pretrain, finetune]}}
"""


def finish(study: Study, experiment: str, seed: int, stage: str, **metrics: Any) -> Path:
    """What a finished stage leaves, without running it."""
    settings, cost = study.stage_settings(experiment, seed, stage), metrics.pop("cost", None)
    encoder = metrics.pop("encoder", None)
    wall_seconds = metrics.pop("wall_seconds", _own_seconds(study, experiment, seed, stage, cost))
    folder = stage_folder(study_folder(study), experiment, seed, stage)
    folder.mkdir(parents=True)
    content = {
        "stage": stage,
        "experiment": experiment,
        "seed": seed,
        "metrics": metrics,
        "settings": settings.relevant(),
        "settings_digest": settings.digest,
        "dataset": {"name": "digits", "digest": "d" * 64},
        "finished": "2026-01-01T00:00:00+00:00",
        "wall_seconds": wall_seconds,
        "mlflow_run_id": f"{experiment}-{seed}-{stage}",
        "mlflow_complete": True,
        "version": "0.1.0",
        "commit": "abc",
        "hardware": {"cpu": "a <fast> CPU", "processes": 2},
    }
    if cost is not None:
        content["cost"] = cost
    lines = [{"step": step, "time": 0.0, "loss": 3.0 / step, "positive_cosine": step / 10} for step in (1, 2, 3)]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in STAGES[stage].outputs:
        (folder / name).write_text(f"{experiment} {seed}")
    pretrained = stage_folder(study_folder(study), experiment, seed, "pretrain") / "encoder.safetensors"
    content["encoder"] = encoder or {
        "sha256": sha256(pretrained) if pretrained.exists() and stage != "pretrain" else None
    }
    (folder / "metrics.json").write_text(json.dumps(seal(content | {"files": contents(folder)})))
    return folder


def _own_seconds(study: Study, experiment: str, seed: int, stage: str, cost: dict[str, float] | None) -> float:
    """What remains of the cost without its pretraining's."""
    if cost is None:
        return 12.5
    file = stage_folder(study_folder(study), experiment, seed, "pretrain") / "metrics.json"
    included = json.loads(file.read_text()).get("cost") if stage != "pretrain" and file.exists() else None
    return cost["seconds"] - (included or {"seconds": 0.0})["seconds"]


def table(study: Study) -> Table:
    return Table(study, Findings(study))
