"""Settings, trainers and inputs for several benchmarks: the CIFAR recipe with another architecture, ratio or batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from aps.methods.aps import APS
from aps.results import StageJob
from aps.runtime.processes import Distributed
from aps.settings.blocks import DatasetSettings, EncoderSettings, SamplingSettings
from aps.settings.study import ExperimentSettings, StageSettings
from aps.training.pretrain import Trainer


def experiment(
    encoder: EncoderSettings, ratio: float, batch: int, samplings: int = 1, **pretrain: object
) -> ExperimentSettings:
    """Settings of pretraining that keep the share `ratio` of the cells. 1 is the strategy `full`, all cells."""
    sampling = SamplingSettings(strategy="full" if ratio == 1 else "asymmetric", ratio=ratio, samplings=samplings)
    return ExperimentSettings(
        dataset=DatasetSettings(name="cifar10"), encoder=encoder, sampling=sampling,
        pretrain=APS.Settings(batch_size=batch, **pretrain),  # type: ignore[arg-type]
    )  # fmt: skip


def make_trainer(chosen: ExperimentSettings, distributed: Distributed) -> Trainer:
    """The trainer of the stage: model, optimizer, precision."""
    settings = StageSettings(
        stage="pretrain", experiment="benchmark", seed=0, dataset=chosen.dataset, encoder=chosen.encoder,
        sampling=chosen.sampling, pretrain=chosen.pretrain,
    )  # fmt: skip
    return Trainer(StageJob(settings, Path(), Path(), Path()), distributed)


def inputs(chosen: ExperimentSettings, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Random views (B, 3, S, S) and kept cells (B, n) for `Trainer.step`. Their content does not change the time."""
    batch, side, cells = chosen.pretrain.batch_size, chosen.encoder.image_size, chosen.encoder.grid**2
    kept = int(cells * chosen.sampling.ratio)
    views = [torch.randn(batch, 3, side, side, device=device) for _ in range(2)]
    order = [torch.rand(batch, cells, device=device).argsort(1)[:, :kept] for _ in range(2)]
    return (views[0], views[1]), (order[0], order[1])
