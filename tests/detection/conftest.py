"""A detection dataset small enough for tests: the real generator with fewer, smaller canvases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aps.config import DatasetSettings, DetectionSettings, EncoderSettings, SourceSettings, StageSettings
from aps.data.composites import RECIPES, Recipe
from aps.data.prepare import prepare
from aps.detection.coco import CocoSplit
from aps.detection.engine import Task
from aps.training.distributed import Distributed

ENCODER = EncoderSettings(arch="micro", depth=2, image_size=16, patch_size=4, weights="random")
SETTINGS = DetectionSettings(
    image_size=32,
    iterations=45,
    batch_size=2,
    lr=1e-3,
    warmup_iterations=5,
    lr_drops=(0.8,),
    window=4,
    global_blocks=(1,),
    pyramid_scales=(2.0, 1.0),
    pyramid_dim=16,
    head_convs=1,
    head_dim=32,
    proposals=20,
    rois=16,
    jitter_scale=(0.7, 1.4),
)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """manifest.json of 24 + 8 canvases of 32x32 pixels."""
    folder = tmp_path_factory.mktemp("data") / "digits_coco"
    recipe = Recipe("digits", 32, 24, 8, (1, 3), (12, 18), 80, 0.6, (0, 1), (0, 40), 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits_coco", recipe)
        prepare("digits_coco", folder, SourceSettings())
    return folder / "manifest.json"


@pytest.fixture
def val(manifest: Path) -> CocoSplit:
    return CocoSplit(manifest, "val", training=False)


@pytest.fixture
def task(manifest: Path) -> Task:
    return Task(
        settings=SETTINGS,
        encoder=ENCODER,
        seed=3,
        train=CocoSplit(manifest, "train", training=True),
        val=CocoSplit(manifest, "val", training=False),
        mean=(0.2, 0.2, 0.2),
        std=(0.3, 0.3, 0.3),
        workers=0,
        processes=Distributed(0, 1, torch.device("cpu")),
    )


def stage_settings(**detection: object) -> StageSettings:
    return StageSettings(
        stage="detection",
        experiment="tiny",
        seed=3,
        dataset=DatasetSettings(name="digits_coco"),
        encoder=ENCODER,
        detection=SETTINGS.model_copy(update=detection),
    )
