"""Stages small enough for tests, run in this process, and what they leave."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aps.errors import Preempted
from aps.methods.aps import APS
from aps.models.encoder import Encoder, build_encoder
from aps.models.weights import save_encoder
from aps.registry import METHODS
from aps.results import StageJob, saved_run
from aps.runtime.processes import Distributed
from aps.settings.blocks import DatasetSettings, EncoderSettings, FinetuneSettings, KnnSettings, LinearProbeSettings
from aps.settings.study import StageSettings, stage_model
from aps.training import loop
from aps.training.pretrain import Forward

ONE = Distributed(0, 1, torch.device("cpu"))
ENCODER = EncoderSettings(arch="micro", dim=24, depth=2, image_size=16, patch_size=4)  # N = 16
OWN: dict[str, dict[str, Any]] = {  # of a method: heads that a test can afford
    "aps": {"projector": (16, 16, 8), "predictor": (16, 16, 8)},
    "byol": {"projector": (16, 8), "predictor": (16, 8)},
    "dino": {"head": (16, 16, 8), "prototypes": 24, "teacher_warmup_epochs": 1},
    "mae": {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    "mocov3": {"projector": (16, 16, 8), "predictor": (16, 8)},
    "simclr": {"projector": (16, 8)},
}
STAGES: dict[str, dict[str, Any]] = {  # 100 images: batches of 32 leave 4 over, and 90 leave 26
    "pretrain": {"pretrain": APS.Settings(epochs=2, batch_size=32, warmup_epochs=1, **OWN["aps"])},
    "finetune": {"finetune": FinetuneSettings(epochs=3, batch_size=32, warmup_epochs=1, ema=0.9, holdout=0.1)},
    "linear_probe": {"linear_probe": LinearProbeSettings(epochs=2, batch_size=32, lrs=(0.1, 2.0))},
    "knn": {"knn": KnnSettings(k=(1, 5, 200))},
}
CLOCK = {
    "time",
    "seconds",
    "step_ms",
    "input_share",
    "images_per_second",
    "reading_seconds",
}  # measured, hence never the same twice


def job(stage: str, manifest: Path, folder: Path, method: str = "", seed: int = 0, **changes: Any) -> StageJob:
    """`changes` go to the stage's own block, or replace a whole block (encoder, dataset, sampling, views, its own)."""
    blocks = {name: changes.pop(name) for name in ("dataset", "encoder", "sampling", "views") if name in changes}
    own, model = changes.pop(stage, None) or STAGES[stage][stage], StageSettings
    if method:
        shared = {"method": method, "epochs": 2, "batch_size": 32, "warmup_epochs": 1}
        own, model = METHODS.load(method).Settings(**shared, **OWN.get(method, {})), stage_model(method)
    settings = model(
        **{
            "stage": stage,
            "experiment": "small",
            "seed": seed,
            "dataset": DatasetSettings(name="digits", train_limit=100),
            "encoder": ENCODER,
            stage: own.model_copy(update=changes),
            **blocks,
        }
    )
    encoder = None
    if stage != "pretrain":
        encoder = folder / "encoder.safetensors"
        torch.manual_seed(7)
        save_encoder(build_encoder(settings.encoder), settings.encoder, encoder)
    checkpoints = saved_run(folder, settings, manifest, encoder)
    return StageJob(settings=settings, manifest=manifest, out=folder / "out", checkpoints=checkpoints, encoder=encoder)


def pretraining(encoder: Encoder, **own: Any) -> Forward:
    """APS on an encoder, as pretraining builds it; own: keys of its settings."""
    settings = StageSettings(stage="pretrain", experiment="small", seed=0, pretrain=APS.Settings(**own))
    method = APS(settings)
    return Forward(method, method.networks(encoder))


def module(stage: str) -> Any:
    return importlib.import_module(f"aps.training.{stage}")


def run(job: StageJob, stop_after: int | None = None) -> dict[str, Any]:
    """The stage in this process -> its metrics; `stop_after` batches it is asked to stop, and ends with what it saved."""
    calls = 0

    def asked(distributed: Distributed) -> bool:
        nonlocal calls
        calls += 1
        return calls == stop_after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stop_requested", asked)  # the real one takes over signals
        if stop_after is None:
            module(job.settings.stage).run(job)
            return metrics(job)
        with pytest.raises(Preempted):
            module(job.settings.stage).run(job)
    return {}


def metrics(job: StageJob) -> dict[str, Any]:
    found = json.loads((job.out / "metrics.json").read_text())["metrics"]
    return {key: value for key, value in found.items() if key not in CLOCK}


def history(job: StageJob) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (job.out / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
