"""The verbs on the command line: what they print and write, and one sentence where something is wrong."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as rle

from aps.cli import main, parser
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


def test_a_folder_that_is_named_twice_is_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tree").mkdir()
    (here / "tree/a").symlink_to(here / "photos/red")
    (here / "tree/b").symlink_to(here / "photos/red")
    given = ["tree", "photos/red/000.jpg"]
    aps("embed", "stages/pretrain", *given, "--out", "f.parquet")
    printed = capsys.readouterr()
    assert "f.parquet: 20 images" in printed.out and printed.err.count("left out: 2 names of folders and images") == 1
    aps("predict", "stages/finetune", *given, "--out", "p.csv")
    assert len(Path("p.csv").read_text().splitlines()) == 21 and "left out: 2 names" in capsys.readouterr().err


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


NUMBERS = {
    "neighbours stages/pretrain --index f.parquet photos/red/000.jpg": ["-k", "--batch-size"],
    "curate --index f.parquet": ["--similarity", "--outliers", "--batch-size"],
    "predict stages/finetune photos/red": ["--top", "--batch-size"],
    "detect stages/detection photos/red": ["--threshold", "--batch-size"],
    "attention stages/pretrain photos/red": ["--block", "--batch-size"],
    "embed stages/pretrain photos/red": ["--batch-size"],
}
RANGES = {
    "--similarity": ("a number above 0, up to 1", ["0", "-0.1", "1.01", "2", "nan", "inf", "much"]),
    "--threshold": ("a number from 0 to 1", ["-0.1", "1.01", "nan", "inf", "much"]),
    "--block": ("a whole number from -10000 to 10000", ["1.5", "nan", "last"]),
}
COUNTS = ("a whole number from 1 to 1000000", ["0", "-1", "1.5", "nan", "9" * 30, "many"])


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb, options in NUMBERS.items() for option in options]
)
def test_a_number_outside_its_range_is_one_sentence(capsys: pytest.CaptureFixture[str], verb: str, option: str) -> None:
    allowed, wrong = RANGES.get(option, COUNTS)
    for value in wrong:
        with pytest.raises(SystemExit) as caught:
            main([*verb.split(), f"{option}={value}" if option.startswith("--") else f"{option}{value}"])
        said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert caught.value.code == 2 and len(said) == 1
        assert said[0].endswith(f'argument {option}: "{value}" is not {allowed}; give one')


def test_every_numeric_option_of_these_verbs_is_held_above() -> None:
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    for verb, options in NUMBERS.items():
        numeric = {
            action.option_strings[0]
            for action in verbs[verb.split()[0]]._actions
            if action.option_strings and action.type is not None and action.type is not Path
        }
        assert set(options) <= numeric
        if verb.split()[0] != "embed":  # a stage too, with the options of stages
            assert numeric == set(options)


def test_a_similarity_decides_what_is_a_duplicate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aps("curate", "stages/pretrain", "photos/red", "--similarity", "0.000001")
    assert "20 images: 1 group of near duplicates" in capsys.readouterr().out
    aps("curate", "--index", "features.parquet", "--similarity", "1")
    assert "20 images: 0 groups of near duplicates" in capsys.readouterr().out


def test_a_picture_of_too_many_holds_the_first_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Matplotlib raises an error above 65,536 pixels."""
    rows = np.random.default_rng(0).integers(0, 255, (400, 8, 8, 3), dtype=np.uint8)
    (here / "many").mkdir()
    for number, pixels in enumerate(rows):
        PIL.Image.fromarray(pixels).save(here / f"many/{number}.png")
    aps("embed", "stages/pretrain", "many", "--out", "f.parquet")
    aps("neighbours", "stages/pretrain", "many/0.png", "--index", "f.parquet", "-k", "390", "--table", "t.csv")
    assert len(Path("t.csv").read_text().splitlines()) == 391 and is_picture(here / "neighbours.png")
    assert "neighbours.png (the first 40 of 390 neighbours)" in capsys.readouterr().out
    aps("curate", "--index", "f.parquet", "--outliers", "4000")
    assert "curate.png (the first 96 outliers)" in capsys.readouterr().out and is_picture(here / "curate.png")


OUTPUTS = [
    "embed stages/pretrain photos/red --out",
    "neighbours stages/pretrain photos/red/000.jpg --index f.parquet --table",
    "neighbours stages/pretrain photos/red/000.jpg --index f.parquet --picture",
    "neighbours stages/pretrain photos/red/000.jpg --index",
    "curate stages/pretrain photos/red --index",
    "curate --index",
    "curate --index f.parquet --out",
    "curate --index f.parquet --picture",
    "predict stages/finetune photos/red/000.jpg --out",
    "export stages/finetune --out",
    "export stages/finetune --to onnx --out",
    "export stages/pretrain --to vitdet --out",
]


@pytest.mark.parametrize("command", OUTPUTS)
def test_a_folder_in_place_of_a_file_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    aps("embed", "stages/pretrain", "photos/red", "--out", "f.parquet")
    suffix = {"timm": ".safetensors", "onnx": ".onnx", "vitdet": ".pth"}.get(command.split()[-2], ".png")
    suffix = ".safetensors" if command == "export stages/finetune --out" else suffix
    (here / f"folder{suffix}").mkdir()
    before = sorted(here.rglob("*"))
    for name in (".", "..", "/", f"folder{suffix}"):
        capsys.readouterr()
        aps(*command.split(), name, status=2)
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert [line for line in errors if line.startswith("error: ")] == errors[-1:] and str(Path(name)) in errors[-1]
        assert "Traceback" not in "".join(errors)
    made = {path.name for path in here.rglob("*")} - {path.name for path in before}
    assert not [name for name in made if name.startswith(".")], "no temporary file stays"


REFUSED = [
    *((command, name, "pictures are written as PNG") for command in OUTPUTS if command.endswith("--picture") for name in ("x.xyz", "c.tiff")),
    *((command, "photos.txt/x.png", "photos.txt is a file") for command in OUTPUTS if command.split()[-1] != "--index"),
    *((command, "stages/pretrain/views.png", "stages/pretrain is a stage's folder") for command in OUTPUTS if command.split()[-1] != "--index" and command[:6] != "export"),
    ("curate stages/pretrain photos/red --index", "stages/embed/features.parquet", "stages/embed is a stage's folder"),
    ("attention stages/pretrain photos/red --out", "stages/pretrain/views.png", "stages/pretrain is a stage's folder"),
    ("attention stages/pretrain photos/red --out", "stages/pretrain", "stages/pretrain is a stage's folder"),
    ("detect stages/detection photos/red --out", "stages/detection", "stages/detection is a stage's folder"),
    ("attention stages/pretrain photos/red --out", "att.jpg", "has a picture's name"),
    ("attention stages/pretrain photos/red --out", "att.PDF", "has a picture's name"),
    ("detect stages/detection photos/red --out", "found.png", "has a picture's name"),
    ("curate --index f.parquet --out", "f.parquet", "reads or writes it already"),
    ("curate --index f.parquet --out same.png --picture", "./same.png", "reads or writes it already"),
    ("neighbours stages/pretrain mine.png --index f.parquet --picture", "mine.png", "reads or writes it already"),
    ("attention stages/pretrain mine.png --out", "mine.png", "reads or writes it already"),
    ("predict stages/finetune mine.png --out", "mine.png", "reads or writes it already"),
    ("export mine.safetensors --out", "mine.safetensors", "reads or writes it already"),
]  # fmt: skip


def test_a_wrong_output_is_met_before_anything_is_read(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million images may be computed before it is written; and what is there stays."""
    for name in ("photos.txt", "f.parquet", "mine.png", "mine.safetensors"):
        (here / name).write_text("mine")
    monkeypatch.setattr("aps.inference.load.load", lambda *args, **more: pytest.fail("weights were loaded"))
    monkeypatch.setattr("aps.inference.neighbours.Index", lambda *args: pytest.fail("features were read"))
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for command, name, message in REFUSED:
        aps(*command.split(), name, status=2)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and message in said[0], command
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_neighbours_leaves_out_a_query_that_cannot_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aps("embed", "stages/pretrain", "photos/red", "--out", "f.parquet")
    (here / "broken.png").write_bytes(b"no")
    asked = ["photos/red/000.jpg", "broken.png", "photos/red/001.jpg"]
    aps(
        "neighbours",
        "stages/pretrain",
        "--index",
        "f.parquet",
        *asked,
        "-k",
        "2",
        "--batch-size",
        "1",
        "--table",
        "t.csv",
    )
    printed = capsys.readouterr()
    assert "left out: broken.png" in printed.err and "broken.png" not in printed.out
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert [row["query"] for row in rows] == [asked[0]] * 2 + [asked[2]] * 2
    aps("neighbours", "stages/pretrain", "--index", "f.parquet", "broken.png", status=2)
    assert "none of the images can be read" in capsys.readouterr().err


def test_features_of_files_that_have_changed_since_are_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(here / "photos/red", here / "mine")
    aps("embed", "stages/pretrain", "mine", "--out", "f.parquet")
    neighbours = ["neighbours", "stages/pretrain", "--index", "f.parquet", "mine/000.jpg", "-k", "19"]
    curate = ["curate", "--index", "f.parquet"]
    capsys.readouterr()
    aps(*neighbours)
    aps(*curate)
    assert "changed" not in capsys.readouterr().err
    shutil.copy(here / "photos/blue/000.jpg", here / "mine/001.jpg")
    (here / "mine/002.jpg").touch()
    (here / "mine/003.jpg").unlink()  # gone: the picture says so
    for command, among in ((neighbours, "images found"), (curate, "20 images")):
        aps(*command)
        said = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ") and "changed" in line
        ]
        assert len(said) == 1 and f"2 of the {among} have changed since f.parquet was made" in said[0]
        assert said[0].endswith("run `aps embed stages/pretrain IMAGES --out f.parquet`")
    aps("curate", "stages/pretrain", "mine", "--index", "f.parquet")
    assert "changed" not in capsys.readouterr().err


def test_every_verb_takes_names_that_are_no_text(
    here: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their file is found again by the name in the table, so that an image is not its own neighbour."""
    shutil.copytree(here / "photos/red", here / "odd")
    odd = os.fsdecode(b"odd/\xff\xfe$.jpg")
    try:
        shutil.copy(here / "photos/blue/000.jpg", odd)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    shown = "odd/\\xff\\xfe$.jpg"
    aps("embed", "stages/pretrain", "odd", "--out", "f.parquet")
    aps("neighbours", "stages/pretrain", odd, "--index", "f.parquet", "-k", "3", "--table", "n.csv")
    rows = list(csv.DictReader(Path("n.csv").read_text().splitlines()))
    assert [row["query"] for row in rows] == [shown] * 3 and shown not in {row["path"] for row in rows}
    aps("neighbours", "stages/pretrain", "odd/000.jpg", "--index", "f.parquet", "-k", "20", "--table", "n.csv")
    assert shown in {row["path"] for row in csv.DictReader(Path("n.csv").read_text().splitlines())}
    aps("curate", "--index", "f.parquet")
    assert shown in {row["path"] for row in csv.DictReader(Path("curate.csv").read_text().splitlines())}
    aps("predict", "stages/finetune", odd, "--out", "p.csv")
    assert [row["path"] for row in csv.DictReader(Path("p.csv").read_text().splitlines())] == [shown]
    aps("attention", "stages/pretrain", odd)
    aps("detect", "stages/detection", odd, "--out", "found")
    assert (
        is_picture(here / "neighbours.png") and is_picture(here / "attention.png") and is_picture(here / "curate.png")
    )
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [".", "..", "folder"])
def test_a_verb_that_writes_a_folder_takes_one_that_is_there(here: Path, name: str) -> None:
    (here / "inside/folder").mkdir(parents=True)
    for command in (
        "detect ../stages/detection ../photos/red/000.jpg --out",
        "attention ../stages/pretrain ../photos/red/000.jpg --out",
        "export ../stages/finetune --to hub-folder --out",
    ):
        with contextlib.chdir(here / "inside"):
            aps(*command.split(), name)
    folder = here / "inside" / name
    assert (folder / "detections.jsonl").exists() and (folder / "config.json").exists()
    title = (folder / "README.md").read_text()
    assert f"# {folder.resolve().name}" in title


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


@pytest.mark.parametrize(
    "command",
    [
        "predict stages/finetune photos/red/000.jpg --out mine/study.yaml",
        "predict stages/finetune photos/red/000.jpg --out mine/photo.png",
        "embed stages/pretrain photos/red --out mine/photo.jpg",
        "attention stages/pretrain photos/red/000.jpg --out mine/photo.png",
        "neighbours stages/pretrain photos/red/000.jpg --index f.parquet --picture mine/photo.png",
        "curate --index f.parquet --out f.parquet",
        "curate --index f.parquet --out mine/photo.jpg",
        "curate --index f.parquet --out c.csv --picture mine/photo.png",
    ],
)
def test_no_verb_replaces_a_file_of_another_kind(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine").mkdir()
    (here / "mine/study.yaml").write_text("study: mine\n")
    for name in ("photo.png", "photo.jpg"):
        PIL.Image.new("RGB", (30, 30), "red").save(here / "mine" / name)
    aps("embed", "stages/pretrain", "photos/red", "--out", "f.parquet")
    before = {path: path.read_bytes() for path in (*(here / "mine").iterdir(), here / "f.parquet")}
    aps(*command.split(), status=2)
    assert before == {path: path.read_bytes() for path in before}
    assert "name another" in capsys.readouterr().err


def test_what_a_verb_wrote_itself_is_replaced(here: Path) -> None:
    for _ in range(2):
        aps("embed", "stages/pretrain", "photos/red", "--out", "f.parquet")
        aps("curate", "--index", "f.parquet", "--out", "c.csv", "--picture", "c.png")
        aps("attention", "stages/pretrain", "photos/red/000.jpg", "--out", "a.png")


def test_a_pipe_is_left_out_like_any_file_that_is_no_image(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "messy").mkdir()
    shutil.copy(here / "photos/red/000.jpg", here / "messy/a.jpg")
    os.mkfifo(here / "messy/pipe.png")
    aps("embed", "stages/pretrain", "messy", "--out", "f.parquet")
    assert pq.read_table("f.parquet").num_rows == 1
    aps("predict", "stages/finetune", "messy", "--out", "p.csv")
    assert "messy/pipe.png: cannot be read as an image (a pipe or device)" in capsys.readouterr().err
