from __future__ import annotations

from pathlib import Path

import pytest

from aps.config import SourceSettings
from aps.data.prepare import prepare


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """manifest.json of the digits: 1,438 train and 359 test images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder, SourceSettings())
    return folder / "manifest.json"
