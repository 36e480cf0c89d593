"""One normalization from pretraining to the last evaluation. The release pretrains on CIFAR's and finetunes on ImageNet's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import Tensor

from aps.data import arrays
from aps.data.manifest import ChannelStatistics, Manifest
from aps.models.encoder import Encoder, build_encoder
from aps.models.weights import read_info, save_encoder
from aps.settings.blocks import DatasetSettings, SourceSettings, ViewSettings
from aps.training.features import normalization

COLOURS = ((204, 102, 51), (20, 60, 240))
PUBLISHED = ChannelStatistics(mean=(0.1, 0.3, 0.7), std=(0.5, 0.25, 0.2), over="this test")
# Nothing that changes a flat image's colour.
CHANGES: dict[str, dict[str, Any]] = {
    "pretrain": {"epochs": 1, "knn_every": 1, "views": ViewSettings(color_jitter_prob=0, grayscale=0)},
    "finetune": {"epochs": 1, "rand_augment": None, "color_jitter": 0.0, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "crop": "resized"},
    "linear_probe": {"epochs": 1},
    "knn": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images, each of one colour."""
    folder = tmp_path_factory.mktemp("flat")
    labels = np.arange(120) % 2
    images = np.array(COLOURS, dtype=np.uint8)[labels][:, :, None, None].repeat(12, 2).repeat(9, 3)
    splits = {"train": (images[:80], labels[:80]), "test": (images[80:], labels[80:])}
    manifest = arrays.store(folder, "flat", splits, ("a", "b"), "made up", SourceSettings(), PUBLISHED)
    manifest.write(folder / "manifest.json")
    return folder / "manifest.json"


@pytest.mark.parametrize("statistics", ["measured", "published"])
@pytest.mark.parametrize("stage", CHANGES)
def test_every_image_an_encoder_sees_is_normalized_by_the_datasets_constants(
    stage: str, statistics: Any, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    embed = Encoder.embed

    def spy(self: Encoder, images: Tensor, *rest: Any) -> Tensor:
        if type(images) is Tensor:  # and not one without data, on which operations are counted
            seen[self.training].append(images.detach().clone())
        return embed(self, images, *rest)

    monkeypatch.setattr(Encoder, "embed", spy)
    job = small.job(
        stage, flat, tmp_path, dataset=DatasetSettings(name="flat", statistics=statistics), **CHANGES[stage]
    )
    small.run(job)
    mean, std = (torch.tensor(x) for x in Manifest.read(flat).normalization(statistics))
    expected = (torch.tensor(COLOURS) / 255 - mean) / std  # (2, 3)
    assert bool(seen[True]) == (stage in ("pretrain", "finetune")) and seen[False]  # in training and in evaluation
    for images in (*seen[True], *seen[False]):
        distance = (images[:, None] - expected[None, :, :, None, None]).abs().amax((2, 3, 4)).amin(1)
        assert distance.max() < 1e-5
    if stage in ("pretrain", "finetune"):  # and the weights say so to whoever reads them
        info = read_info(job.out / {"pretrain": "encoder.safetensors", "finetune": "model.safetensors"}[stage])
        assert info["mean"] == pytest.approx(mean.tolist()) and info["std"] == pytest.approx(std.tolist())


def test_statistics_of_the_encoder_are_those_its_file_names_else_the_measured_ones(flat: Path, tmp_path: Path) -> None:
    """`dataset: {statistics: encoder}`: what evaluates on other images than it was trained on."""
    job = small.job("knn", flat, tmp_path, dataset=DatasetSettings(name="flat", statistics="encoder"))
    assert job.encoder is not None
    assert normalization(job) == Manifest.read(flat).normalization("measured")  # this file says nothing
    own = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
    save_encoder(build_encoder(small.ENCODER), small.ENCODER, job.encoder, own)
    assert normalization(job) == (own["mean"], own["std"])
    for stage in ("knn", "linear_probe", "finetune"):
        job = small.job(stage, flat, tmp_path / stage, dataset=DatasetSettings(name="flat", statistics="encoder"))
        assert job.encoder is not None
        save_encoder(build_encoder(small.ENCODER), small.ENCODER, job.encoder, own)
        small.run(job)
        if stage == "finetune":  # hands them on
            info = read_info(job.out / "model.safetensors")
            assert info["mean"] == pytest.approx(own["mean"]) and info["std"] == pytest.approx(own["std"])
