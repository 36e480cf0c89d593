"""The made-up study."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up import STUDY

from aps.settings.reading import load_study
from aps.settings.study import Study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(results=tmp_path / "results"))
    return load_study([file])
