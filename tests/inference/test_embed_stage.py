"""The embed stage: features of the test split, a page of neighbours, a map, and the figure that goes with them."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from aps.cli import main
from aps.data.load import ArraySplit, FileSplit, load_split
from aps.errors import UserError
from aps.inference import features
from aps.inference.load import load
from aps.inference.model import Model
from aps.inference.neighbours import Index
from aps.inference.stage import _items


def test_features_are_those_of_the_test_split_under_the_encoder(finished: Path, stages: Path) -> None:
    split = load_split(finished / "results/data/folder/manifest.json", "test")
    assert isinstance(split, FileSplit)
    found = pq.read_table(stages / "embed/features.parquet")
    paths = [split.path(i) for i in range(len(split))]
    assert found["path"].to_pylist() == [str(path) for path in paths]
    assert found["label"].to_pylist() == [split.classes[i] for i in split.labels]
    vectors = np.array(found["embedding"].to_pylist())
    assert np.abs(vectors - load(stages / "pretrain").embed(paths).numpy()).max() < 1e-5
    Index(stages / "embed/features.parquet").check(load(stages / "pretrain"))  # so that the verbs can use them


def test_images_in_memory_are_embedded_as_they_are_evaluated(finished: Path) -> None:
    folder = finished / "results/photos/digits/seed0"
    split = load_split(finished / "results/data/digits/manifest.json", "test")
    assert isinstance(split, ArraySplit)
    found = pq.read_table(folder / "embed/features.parquet")
    assert found["path"].to_pylist()[:2] == ["digits/test/000000", "digits/test/000001"]
    model = load(folder / "embed")  # of random weights: by its seed
    assert isinstance(model, Model) and model.preprocessing.resize is None
    assert np.abs(np.array(found["embedding"].to_pylist()[:5]) - model.embed(split.images[:5]).numpy()).max() < 1e-5


@pytest.mark.parametrize("experiment", ["mine", "digits"])
def test_the_figure_is_how_often_the_nearest_other_image_is_of_the_class(finished: Path, experiment: str) -> None:
    folder = finished / "results/photos" / experiment / "seed0/embed"
    table = pq.read_table(folder / "features.parquet")
    x = F.normalize(torch.tensor(table["embedding"].to_pylist()), dim=1)
    similar = (x @ x.T).fill_diagonal_(-2)
    labels = np.array(table["label"].to_pylist())
    expected = 100 * (labels[similar.argmax(1).numpy()] == labels).mean()
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["neighbour_top1"] == pytest.approx(expected)


@pytest.mark.parametrize("experiment", ["mine", "digits"])
def test_the_page_is_self_contained_and_shows_each_query_with_its_neighbours(finished: Path, experiment: str) -> None:
    page = (finished / "results/photos" / experiment / "seed0/embed/neighbours.html").read_text()
    assert page.count('class="query"') == 4 and page.count("<figure") == 4 * (1 + 3)
    assert set(re.findall(r'src="([^"]{5})', page)) == {"data:"} and "http" not in page


def test_the_map_is_a_picture(stages: Path) -> None:
    image = PIL.Image.open(stages / "embed/map.png")
    assert min(image.size) > 300 and len(np.unique(np.asarray(image))) > 50


def test_a_stopped_stage_goes_on_behind_its_last_part(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setattr(features, "PART", 4)
    asked = 0

    def stop(distributed: object) -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    study = ["--configfile", "study.yaml", "--set", "results=again"]
    mine = [*study, "--experiment", "mine"]
    assert main(["data", "folder", *study]) == 0 and main(["pretrain", *mine]) == 0
    monkeypatch.setattr("aps.inference.stage.stop_requested", stop)
    assert main(["embed", *mine]) == 75
    assert "8 images are done; run it again to go on" in capsys.readouterr().err
    assert main(["embed", *mine]) == 0
    again, whole = (
        pq.read_table(finished / results / "photos/mine/seed0/embed/features.parquet")
        for results in ("again", "results")
    )
    assert again["path"] == whole["path"]


def test_the_report_shows_the_map_and_links_to_the_page(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    assert main(["report", "--configfile", "study.yaml"]) == 0
    report = finished / "results/photos/report/report.html"
    page = report.read_text()
    assert "Map of the test images" in page
    (link,) = {href for href in re.findall(r'href="([^"]*neighbours.html)"', page) if "mine" in href}
    assert (report.parent / link).resolve() == finished / "results/photos/mine/seed0/embed/neighbours.html"


def test_an_image_that_is_not_as_it_was_prepared_ends_the_stage(finished: Path) -> None:
    """It is not left out, as one that a user names is."""
    file = next((finished / "photos").rglob("*.jpg"))
    names = np.array([str(file.relative_to(finished)).encode()])
    whole = np.frombuffer(sha256(file.read_bytes()).digest(), dtype=np.uint8)[None]
    for checksums, error in (
        (whole, nullcontext()),
        (whole + 1, pytest.raises(UserError, match="not what was prepared")),
    ):
        split = FileSplit(finished, names, torch.zeros(1, dtype=torch.int64), ("red",), checksums)
        with error:
            assert len(list(_items(split, "photos"))) == 1


def test_paths_of_images_are_made_one_by_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of a million of them takes 0.4 GB."""
    file = next((finished / "photos").rglob("*.jpg"))
    names = np.array([str(file.relative_to(finished)).encode()] * 100)
    split, made = FileSplit(finished, names, torch.zeros(100, dtype=torch.int64), ("red",)), list[int]()
    path = FileSplit.path
    monkeypatch.setattr(FileSplit, "path", lambda self, i: made.append(i) or path(self, i))
    items = _items(split, "photos")
    assert next(items).path == str(file) and made == [0]
    assert len(list(items)) == 99 and made == list(range(100))
