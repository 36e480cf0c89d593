"""Datasets that many tests share, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from aps.data import arrays
from aps.data.prepare import prepare
from aps.settings.blocks import SourceSettings


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """manifest.json of the digits: 1,438 train and 359 test images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder, SourceSettings())
    return folder / "manifest.json"


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of overlapping colours, which a few steps learn: 100 train, 359 test images."""
    folder, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    labels = np.arange(459) % 4
    means = np.array([[60, 60, 60], [190, 80, 70], [80, 190, 70], [80, 90, 200]])[labels]
    flat = (means + generator.normal(0, 40, means.shape)).clip(0, 255).astype(np.uint8)
    images = flat[:, :, None, None].repeat(12, 2).repeat(12, 3)
    splits = {"train": (images[:100], labels[:100]), "test": (images[100:], labels[100:])}
    manifest = arrays.store(folder, "colours", splits, tuple("abcd"), "made up", SourceSettings())
    manifest.write(folder / "manifest.json")
    return folder / "manifest.json"


# Tests that run whole studies and take minutes: `make test-slow`.
SLOW = ("tests/test_end_to_end.py", "tests/test_interruption.py", "tests/workflow/test_plan.py", "tests/inference/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent.parent
    for item in items:
        path = str(item.path.relative_to(root))
        if path.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_sessionstart() -> None:
    """What says only `cuda` runs on the GPU that APS_TEST_DEVICE names."""
    device = os.environ.get("APS_TEST_DEVICE", "")
    if device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.set_device(torch.device(device).index or 0)
