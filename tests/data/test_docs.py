import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from aps.data import coco, imagenet
from aps.data.load import load_split
from aps.data.prepare import prepare
from aps.registry import DATASETS, DETECTION_DATASETS
from aps.settings.blocks import SourceSettings

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()


def test_the_documented_example_adds_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, row = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in module.splitlines() if line]) <= 10
    pneumonia = ModuleType("aps.data.pneumonia")
    exec(module, pneumonia.__dict__)
    monkeypatch.setitem(sys.modules, "aps.data.pneumonia", pneumonia)
    monkeypatch.setattr(DATASETS, "_rows", DATASETS._rows | eval(f"{{{row}}}"))
    assert "pneumonia" in DATASETS

    generator = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": generator.integers(0, high, size).astype(np.uint8)
        for split, count in (("train", 20), ("test", 6))
        for what, high, size in (("images", 256, (count, 28, 28)), ("labels", 2, (count, 1)))
    }
    np.savez(tmp_path / "pneumoniamnist.npz", **arrays)
    source = SourceSettings(path=str(tmp_path / "pneumoniamnist.npz"))
    manifest = prepare("pneumonia", tmp_path / "out", source)
    assert manifest.splits["test"].count == 6
    assert load_split(tmp_path / "out" / "manifest.json", "train").images.shape == (20, 3, 28, 28)


def test_the_table_names_every_dataset() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {
        *DATASETS.names(),
        *DETECTION_DATASETS.names(),
    }


def test_the_figures_of_the_page_are_those_of_the_code() -> None:
    for count in (*imagenet.COUNTS.values(), imagenet.CLASSES, imagenet.STATISTICS_IMAGES, *coco.COUNTS.values()):
        assert f"{count:,}" in PAGE
