"""A detection dataset small enough for tests: the real generator with fewer, smaller canvases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ENCODER, SETTINGS

from aps.data.composites import RECIPES, Recipe
from aps.data.prepare import prepare
from aps.detection.annotations import CocoSplit
from aps.detection.engine import Task
from aps.runtime.processes import Distributed
from aps.settings.blocks import SourceSettings


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """These networks are too small to share, and threads that wait for each other on a busy machine are slow."""
    torch.set_num_threads(1)


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
