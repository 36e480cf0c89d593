"""A folder that holds the study's results is a dataset without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from miniatures import image, png

from aps import cli
from aps.data.manifest import Manifest
from aps.findings import Findings
from aps.layout import manifest_of
from aps.settings.reading import load_study


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the class folders a and b of five images each."""
    monkeypatch.chdir(tmp_path)
    for kind in range(2):
        (tmp_path / "ab"[kind]).mkdir()
        for number in range(5):
            (tmp_path / "ab"[kind] / f"{number}.png").write_bytes(png(image(10 * kind + number, 40, 60)))
    return tmp_path


def prepare(results: str = "results", **entry: Any) -> Manifest:
    """As `aps data photos` does; reports and pictures of the study stand in its results folder meanwhile."""
    experiment = {
        "dataset": "digits", "stages": ["pretrain"], "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4},
    }  # fmt: skip
    study = {"study": "s", "results": results, "datasets": {"photos": entry}, "experiments": {"e": experiment}}
    Path("s.yaml").write_text(yaml.safe_dump(study))
    assert cli.main(["data", "photos", "--configfile", "s.yaml"]) == 0
    (Path(results) / "s/report").mkdir(parents=True, exist_ok=True)
    (Path(results) / "s/report/views.png").write_bytes(png(image(1)))
    loaded = load_study(["s.yaml"])
    assert Findings(loaded).why_outdated("photos") is None
    return Manifest.read(manifest_of(loaded, "photos"))


@pytest.mark.parametrize("results", ["results", "out/deeper/mine", "link"])
@pytest.mark.parametrize("labels", [False, True])
def test_results_in_the_folder_are_no_images_of_it(here: Path, results: str, labels: bool) -> None:
    if results == "link":
        elsewhere = here.with_name(f"{here.name}-elsewhere")
        elsewhere.mkdir()
        (here / "link").symlink_to(elsewhere)
    before = prepare(results, folder=".", labels=labels, shrink=32)
    assert before.splits["train"].count == (8 if labels else 10)
    assert before.classes == (("a", "b") if labels else ())
    assert "1 results folder" in before.notes[0]
    (here / "a/new.png").write_bytes(png(image(77, 40, 60)))
    after = prepare(results, folder=".", labels=labels, shrink=32)
    assert sum(split.count for split in after.splits.values()) == 11


def test_results_in_a_folder_of_coco_images_do_not_change_the_dataset(here: Path) -> None:
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a/0.png", "height": 40, "width": 60}], "annotations": [box],
        "categories": [{"id": 1, "name": "cell"}],
    }  # fmt: skip
    (here / "c.json").write_text(json.dumps(content))
    splits = {split: {"images": ".", "annotations": "c.json"} for split in ("train", "val")}
    assert prepare(coco=splits) == prepare(coco=splits)


@pytest.mark.parametrize("folder", ["results", "results/data", "link"])
def test_the_results_folder_itself_is_refused(here: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "results/data").mkdir(parents=True)
    (here / "results/1.png").write_bytes(png(image(1)))
    (here / "link").symlink_to(here / "results")
    with pytest.raises(AssertionError):
        prepare(folder=folder, labels=False)
    said = capsys.readouterr().err
    assert f"datasets.photos.folder: {folder} is where results and prepared data are kept" in said
