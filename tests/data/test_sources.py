"""Whose data is whose: one name in two studies, a source that moves, a tree that changes. On real commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from aps import cli
from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.findings import Findings
from aps.layout import data_folder, manifest_of, manifest_path
from aps.settings.blocks import SourceSettings, UserDataset
from aps.settings.reading import load_study
from aps.status import status_of

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def tree(folder: Path, images: int, dark: bool = False) -> Path:
    """A folder a colour, with that many images each."""
    generator = np.random.default_rng(images)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            noise = generator.integers(-20, 20, (16, 16, 3))
            pixels = (np.array(colour) * (0.3 if dark else 1) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def study(name: str, folder: str, key: str = "datasets") -> dict[str, Any]:
    """kNN under random weights on a folder, as `photos` of the study's own or as the known dataset `folder`."""
    source = (
        {"datasets": {"photos": {"folder": folder}}} if key == "datasets" else {"sources": {"folder": {"path": folder}}}
    )
    experiment = {
        "dataset": "photos" if key == "datasets" else "folder",
        "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4, "weights": "random"},
        "stages": ["knn"],
        "knn": {"k": [1]},
    }
    return {"study": name, **source, "experiments": {"floor": experiment}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two studies, a.yaml and b.yaml, that call different folders `photos`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    for letter, images in (("a", 5), ("b", 10)):
        tree(tmp_path / f"images_{letter}", images, dark=letter == "b")
        (tmp_path / f"{letter}.yaml").write_text(yaml.safe_dump(study(letter, f"images_{letter}")))
    return tmp_path


@pytest.mark.parametrize("key", ["datasets", "sources"])
def test_one_name_for_different_folders_is_two_datasets(here: Path, key: str) -> None:
    name = "photos" if key == "datasets" else "folder"
    for letter in "ab":
        (here / f"{letter}.yaml").write_text(yaml.safe_dump(study(letter, f"images_{letter}", key)))
        assert cli.main(["data", name, "--configfile", f"{letter}.yaml"]) == 0
    found = {letter: Manifest.read(manifest_of(load_study([f"{letter}.yaml"]), name)) for letter in "ab"}
    assert [found[letter].splits["train"].count for letter in "ab"] == [8, 16]
    assert found["a"].digest != found["b"].digest
    for letter in "ab":  # neither has to be prepared again because of the other
        assert Findings(load_study([f"{letter}.yaml"])).why_outdated(name) is None


def test_the_plain_name_leads_to_what_was_prepared_last(here: Path) -> None:
    for letter, images in (("a", 8), ("b", 16), ("a", 8)):
        assert cli.main(["data", "photos", "--configfile", f"{letter}.yaml"]) == 0
        assert len(load_split(here / "results/data/photos/manifest.json", "train")) == images


def test_a_real_folder_of_the_plain_name_is_left_alone(here: Path) -> None:
    (here / "results/data/photos").mkdir(parents=True)
    (here / "results/data/photos/mine.txt").write_text("mine")
    assert cli.main(["data", "photos", "--configfile", "a.yaml"]) == 0
    assert [file.name for file in (here / "results/data/photos").iterdir()] == ["mine.txt"]


def test_only_what_people_bring_has_its_source_in_its_folders_name() -> None:
    assert data_folder("cifar10", SourceSettings(path="/data/cifar")) == data_folder("cifar10") == "cifar10"
    one, other = (data_folder("photos", UserDataset(folder=folder)) for folder in ("a", "b"))
    assert one != other and one.startswith("photos-")
    assert data_folder("photos", UserDataset(folder="a", trust=True)) == one  # how it is looked at is no part of it
    assert data_folder("photos", UserDataset(folder="a", labels=False)) != one
    assert manifest_path("r", "folder", SourceSettings(path="x")).parent.name.startswith("folder-")


def test_a_figure_of_another_source_is_not_shown_before_the_new_one_is_prepared(here: Path) -> None:
    for verb in (["data", "photos"], ["knn"]):
        assert cli.main([*verb, "--configfile", "a.yaml"]) == 0
    (before,) = Findings(load_study(["a.yaml"]))
    assert before.metrics is not None
    (here / "a.yaml").write_text(yaml.safe_dump(study("a", "images_b")))
    (after,) = Findings(load_study(["a.yaml"]))
    assert after.metrics is None and after.stale and "the source of dataset photos is now" in str(after.problem)


@pytest.mark.parametrize("damage", ["swapped", "gone"])
def test_a_copy_that_is_not_as_it_was_prepared_is_known_before_a_job(
    here: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = study("a", "images_a")
    small["datasets"]["photos"]["shrink"] = 16
    (here / "a.yaml").write_text(yaml.safe_dump(small))
    assert cli.main(["data", "photos", "--configfile", "a.yaml"]) == 0
    manifest = manifest_of(load_study(["a.yaml"]), "photos")
    assert Findings(load_study(["a.yaml"])).why_outdated("photos") is None
    files = sorted(manifest.parent.glob("shrunk-*/t*/*/*"), key=lambda file: file.stat().st_size)
    files[-1].unlink() if damage == "gone" else shutil.copy(files[0], files[-1])
    told = "is missing" if damage == "gone" else f"has {files[0].stat().st_size} bytes instead of"
    assert f"{files[-1].name} {told}" in str(Findings(load_study(["a.yaml"])).why_outdated("photos"))
    assert cli.main(["check", "--configfile", "a.yaml"]) == 0
    assert f"{files[-1].name} {told}" in capsys.readouterr().out
    assert cli.main(["knn", "--configfile", "a.yaml"]) == 2
    assert cli.main(["data", "photos", "--configfile", "a.yaml"]) == 0
    assert Findings(load_study(["a.yaml"])).why_outdated("photos") is None
    small["datasets"]["photos"]["trust"] = True  # then nothing is looked at
    (here / "a.yaml").write_text(yaml.safe_dump(small))
    files[-1].unlink()
    assert Findings(load_study(["a.yaml"])).why_outdated("photos") is None


def one_more(images: Path) -> None:
    (images / "red/new.png").write_bytes((images / "red/0.png").read_bytes())


def one_less(images: Path) -> None:
    (images / "red/0.png").unlink()


def exchanged(images: Path) -> None:
    """Two images change places, and so their labels."""
    red, blue, aside = images / "red/0.png", images / "blue/1.png", images / "aside.png"
    red.rename(aside)
    blue.rename(red)
    aside.rename(blue)


def another_class(images: Path) -> None:
    (images / "red").rename(images / "green")


def another_folder_in_its_place(images: Path) -> None:
    shutil.rmtree(images / "red")
    (images / "red").symlink_to("blue")


CHANGES = [one_more, one_less, exchanged, another_class, another_folder_in_its_place]


@pytest.mark.parametrize("change", [None, shutil.rmtree, *CHANGES])
def test_a_figure_of_images_that_have_changed_is_not_shown_as_the_studys(
    change: Callable[[Path], Any] | None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever shows figures looks at the images; where there are none to look at, the figures stand."""
    for verb in (["data", "photos"], ["knn"], ["report"]):
        assert cli.main([*verb, "--configfile", "a.yaml"]) == 0
    loaded = load_study(["a.yaml"])
    shown = f"{Findings(loaded).runs()[0]['metrics']['knn_top1_k1']:.1f}"
    if change is not None:
        change(here / "images_a")
    stands = change in (None, shutil.rmtree)
    capsys.readouterr()
    assert cli.main(["results", "--configfile", "a.yaml"]) == 0
    table = capsys.readouterr().out
    assert ("1 of 1 runs finished" in table and shown in table) == stands
    assert ("other images: folder images_a: " in table) != stands
    assert [one.state for one in status_of(loaded)] == ["done" if stands else "outdated"]
    assert cli.main(["report", "--configfile", "a.yaml"]) == 0
    csv = (here / "results/a/report/results.csv").read_text()
    assert (len(csv.splitlines()) == 2) == stands
    assert Findings(loaded).runs(), "planning prepares the images first, and then compares"


def test_a_tree_that_is_trusted_is_not_looked_at(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trusting = study("a", "images_a")
    trusting["datasets"]["photos"]["trust"] = True
    (here / "a.yaml").write_text(yaml.safe_dump(trusting))
    for verb in (["data", "photos"], ["knn"]):
        assert cli.main([*verb, "--configfile", "a.yaml"]) == 0
    one_less(here / "images_a")
    assert len(Findings(load_study(["a.yaml"]), sources=True).runs()) == 1


def snakemake(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def figure(folder: Path, letter: str) -> Any:
    found = json.loads((folder / f"results/{letter}/floor/seed0/knn/metrics.json").read_text())
    return found["dataset"]["digest"], found["metrics"]


@pytest.mark.slow
@pytest.mark.end_to_end
def test_two_studies_and_a_changed_tree_on_snakemake(here: Path) -> None:
    """The other study takes nothing away; a changed tree says what changed and runs what depends on it."""
    snakemake(here, "knn", "--configfile", "a.yaml")
    mine = figure(here, "a")
    snakemake(here, "knn", "--configfile", "b.yaml")
    assert figure(here, "a") == mine != figure(here, "b")
    assert "Nothing to be done" in snakemake(here, "knn", "--configfile", "a.yaml", "-n")
    tree(here / "images_a", 6)  # two images more, all of them new contents
    (here / "images_a/red/0.png").unlink()
    planned = snakemake(here, "knn", "--configfile", "a.yaml", "-n")
    assert "data photos: folder images_a: 2 images new, 1 gone, 9 changed" in planned
    assert "Nothing to be done" in snakemake(here, "knn", "--configfile", "b.yaml", "-n")
    snakemake(here, "knn", "--configfile", "a.yaml")
    assert figure(here, "a") != mine
