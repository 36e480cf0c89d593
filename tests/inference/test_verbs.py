"""The verbs on the command line: what they print and write, and one sentence where something is wrong."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as rle

from aps.cli import main
from aps.inference.load import load
from aps.inference.verbs import picture_of


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with links to the photographs and the stages."""
    (tmp_path / "photos").symlink_to(finished / "photos")
    (tmp_path / "stages").symlink_to(finished / "results/photos/mine/seed0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def aps(*arguments: str, status: int = 0) -> None:
    assert main(list(arguments)) == status


def is_picture(path: Path) -> bool:
    image = PIL.Image.open(path)
    return min(image.size) > 100 and len(np.unique(np.asarray(image))) > 50


def test_embed_then_neighbours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aps("embed", "stages/pretrain", "photos", "--out", "f.parquet")
    assert "f.parquet: 60 images" in capsys.readouterr().out
    assert pq.read_table("f.parquet").num_rows == 60
    query = ["photos/red/000.jpg", "photos/blue/003.jpg"]
    aps("neighbours", "stages/pretrain", "--index", "f.parquet", *query, "-k", "3", "--table", "t.csv")
    out = capsys.readouterr().out
    assert out.splitlines()[0] == query[0] and "photos/red/000.jpg" not in out.split("\n", 1)[1]
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert [row["query"] for row in rows] == [query[0]] * 3 + [query[1]] * 3
    assert not {row["path"] for row in rows} & set(query) and is_picture(here / "neighbours.png")


def test_neighbours_refuses_features_of_other_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aps("embed", "stages/pretrain", "photos/red", "--out", "f.parquet")
    aps("neighbours", "stages/finetune", "--index", "f.parquet", "photos/red/000.jpg", status=2)
    assert (
        "error: f.parquet was made by stages/pretrain, not by the weights of stages/finetune" in capsys.readouterr().err
    )


def test_predict_prints_and_writes_every_probability(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(here / "photos/red/001.jpg", here / "mine.jpg")
    (here / "broken.jpg").write_bytes(b"no")
    aps(
        "predict",
        "stages/finetune",
        "photos/green",
        "broken.jpg",
        "mine.jpg",
        "--out",
        "p.csv",
        "--top",
        "2",
        "--batch-size",
        "7",
    )
    printed = capsys.readouterr()
    assert "left out: broken.jpg" in printed.err
    rows = {row["path"]: row for row in csv.DictReader(Path("p.csv").read_text().splitlines())}
    assert len(rows) == 21 == len(printed.out.strip().splitlines())
    found = load("stages/finetune").predict("mine.jpg")
    assert rows["mine.jpg"]["class"] == found.classes[0]
    assert [float(rows["mine.jpg"][name]) for name in found.names] == pytest.approx(
        found.probabilities[0].tolist(), abs=1e-5
    )


def test_predict_without_a_classifier_is_a_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aps("predict", "stages/pretrain", "photos/red", "--out", "p.csv", status=2)
    assert "error: stages/pretrain has no classifier, so it can't predict classes; load" in capsys.readouterr().err
    assert not Path("p.csv").exists()


def test_detect_draws_each_image_and_writes_cocos_results(
    here: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((finished / "results/data/digits_coco/val").glob("*.png"))[:6]
    aps("detect", "stages/detection", *map(str, images), "--threshold", "0.0", "--out", "found")
    lines = [json.loads(line) for line in (here / "found/detections.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in images]
    assert all(is_picture(picture_of(here / "found", path)) for path in images)
    assert all(line["detections"] for line in lines)
    for found in (x for line in lines for x in line["detections"]):
        assert (
            found["label"] in "0123456789" and rle.decode(found["segmentation"]).ndim == 2 and len(found["bbox"]) == 4
        )
    assert f"objects in {len(images)} images" in capsys.readouterr().out


def test_attention_is_one_picture_or_a_folder_of_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aps("attention", "stages/pretrain", "photos/red/000.jpg", "photos/blue/001.jpg", "--batch-size", "1")
    assert is_picture(here / "attention.png")
    aps("attention", "stages/finetune", "photos/red", "--block", "0", "--out", "maps")
    assert len(list((here / "maps").rglob("*.png"))) == 20
    aps("attention", "stages/pretrain", "photos/red", "--out", "few.png")
    assert "only the first 12 images are drawn" in capsys.readouterr().err


def test_curate_makes_the_features_and_finds_the_copies(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine").mkdir()
    for file in (here / "photos").glob("*/00[0-4].jpg"):
        shutil.copy(file, here / "mine" / f"{file.parent.name}{file.name}")
    shutil.copy(here / "photos/red/001.jpg", here / "mine/zzz.jpg")
    aps("curate", "stages/pretrain", "mine")
    out = capsys.readouterr().out
    assert "16 images: 1 group of near duplicates, 1 image could go" in out
    assert is_picture(here / "curate.png")
    rows = {Path(row["path"]).name: row for row in csv.DictReader(Path("curate.csv").read_text().splitlines())}
    assert rows["zzz.jpg"]["keep"] == "no" and rows["red001.jpg"]["keep"] == "yes"
    aps("curate", "--index", "features.parquet", "--out", "again.csv")
    assert Path("again.csv").read_text() == Path("curate.csv").read_text()


def test_export_prints_what_loads_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aps("export", "stages/linear_probe", "--out", "w.safetensors", "--licence", "mit")
    printed = capsys.readouterr().out
    names: dict[str, object] = {}
    exec(printed, names)
    assert names["classes"] == ["blue", "green", "red"]
    assert "license: mit" in Path("w.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "stages/pretrain", "nowhere"], "nowhere does not exist; give image files"),
        (["embed", "stages/detection", "photos"], "is a detector, so it can't embed images"),
        (["embed", "nowhere", "photos"], "nowhere does not exist; give a stage's folder"),
        (["neighbours", "stages/pretrain", "--index", "no.parquet", "photos/red/000.jpg"], "no.parquet does not exist; `aps embed"),
        (["curate", "stages/pretrain"], "name images after the weights"),
        (["attention", "stages/pretrain", "photos/red", "--block", "9"], "block 9: the network has blocks 0 to 1"),
        (["export", "stages/pretrain", "--to", "onx", "--out", "w"], "--to onx: choose timm, onnx, hub-folder, vitdet"),
        (["predict", "stages/finetune", "empty"], "empty: no images in this folder"),
        (["predict", "stages/finetune", "broken.jpg"], "none of the images can be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (here / "empty").mkdir()
    (here / "broken.jpg").write_bytes(b"no")
    aps(*arguments, status=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_no_two_images_share_a_picture(here: Path) -> None:
    found = {picture_of(Path("out"), Path(name)) for name in ("a.jpg", "a.png", "b/a.jpg", "/tmp/a.jpg", "../a.jpg")}
    assert len(found) == 5 and all(path.parts[0] == "out" and ".." not in path.parts for path in found)


def test_help_of_these_verbs_imports_nothing_heavy() -> None:
    code = """
import contextlib, io, sys
from aps.cli import main
for verb in ("embed", "neighbours", "predict", "detect", "attention", "curate", "export"):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([verb, "--help"])
assert not {"torch", "timm", "mlflow", "matplotlib", "pandas", "pyarrow", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "order",
    [
        ["stages/pretrain", "photos/red", "photos/blue", "--out", "f.parquet"],
        ["--out", "f.parquet", "stages/pretrain", "photos/red", "photos/blue"],
        ["stages/pretrain", "--out", "f.parquet", "photos/red", "photos/blue"],
        ["stages/pretrain", "photos/red", "--out", "f.parquet", "photos/blue"],
    ],
)
def test_options_stand_anywhere_among_the_images(here: Path, order: list[str]) -> None:
    aps("embed", *order)
    assert pq.read_table("f.parquet").num_rows == 40


def test_what_no_verb_takes_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["embed", "stages/pretrain", "photos/red", "--nonsense"], ["results", "too", "much"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err
