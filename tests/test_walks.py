"""Pages walked as a newcomer would, in folders of their own: every line as it is printed, only the studies are small.

docs/own-images.md and docs/photographs.md on drawn shapes; README.md, docs/tutorial.md and docs/inference.md on a demo of
seconds. What is installed from the wheel is walked in tests/test_installed.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from aps import cli

ROOT = Path(__file__).parent.parent
SHAPES = ("cat", "dog", "owl")  # stand-ins: circles, squares, triangles
pytestmark = pytest.mark.end_to_end


def draw(folder: Path, each: int) -> None:
    """`each` images of every class, PNG and JPEG in turn, of different sizes: a shape of any colour on grey noise."""
    generator = np.random.default_rng(0)
    for kind in SHAPES:
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            width, height = (int(side) for side in generator.integers(80, 140, 2))
            image = Image.fromarray(generator.integers(90, 166, (height, width, 3)).astype(np.uint8))
            r = int(generator.integers(18, 36))
            x, y = int(generator.integers(r, width - r)), int(generator.integers(r, height - r))
            colour, pen = tuple(int(c) for c in generator.integers(0, 256, 3)), ImageDraw.Draw(image)
            if kind == "cat":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            elif kind == "dog":
                pen.rectangle((x - r, y - r, x + r, y + r), fill=colour)
            else:
                pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
            image.save(folder / kind / f"{number}.{'jpg' if number % 2 else 'png'}")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, title and text of each block of a page."""
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', (ROOT / page).read_text(), re.M | re.S)
    assert found, page
    return found


def given(command: str, folder: Path) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": "none",
    }
    run = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
    return run.stdout + run.stderr


def lines(text: str) -> list[str]:
    """Commands of a shell block, but for those that install."""
    joined = [re.sub(r"\s+#.*", "", line) for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in joined if line and not line.startswith("pip ")]


def checkout(folder: Path) -> Path:
    """The repository as links, with a folder config/ of its own."""
    for name in ("Snakefile", "workflow", "profiles", "aps"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "config").mkdir()
    return folder


@pytest.mark.slow
def test_three_hundred_images_of_ones_own_go_through(tmp_path: Path) -> None:
    """docs/own-images.md; the training itself, which takes minutes, is planned, and its two epochs are run."""
    draw(checkout(tmp_path) / "photos", 100)
    said: dict[str, str] = {}
    for language, title, text in blocks("docs/own-images.md"):
        if language == "yaml":
            (tmp_path / title).write_text(text)
        elif language == "sh":
            for command in lines(text):
                trained = command.startswith("snakemake --configfile")
                said[command] = given(f"{command} --dry-run" if trained else command, tmp_path)
    checked, prepared, _, estimated, _, table, planned, nothing = said.values()
    assert "nothing speaks against it" in checked and "error" not in checked
    assert "240 train, 60 test images of 3 classes" in prepared
    assert "core hours" in estimated and (tmp_path / "views.png").stat().st_size > 10_000
    figures = {
        line.split()[0]: line.split()[1:] for line in table.splitlines() if re.match(r"(aps|random|floor) ", line)
    }
    assert all(0 <= float(figures[name][-1]) <= 100 for name in ("aps", "random", "floor"))
    assert "pretrain aps/seed0: pretrain.epochs 2 -> 50" in planned
    assert "other settings: pretrain.epochs 2, now 50" in nothing


@pytest.mark.slow
def test_photographs_become_neighbours_predictions_and_an_onnx_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/photographs.md, in a folder with nothing but photographs."""
    monkeypatch.syspath_prepend(tmp_path)  # as in an interpreter that was started there
    pytest.importorskip("onnxruntime")
    draw(tmp_path / "photos", 40)
    for language, title, text in blocks("docs/photographs.md"):
        if language == "yaml":
            (tmp_path / title).write_text(text)
        elif language == "sh":
            for command in lines(text):
                given(command, tmp_path)
        elif language == "python":
            with contextlib.chdir(tmp_path):
                exec(compile(text, "docs/photographs.md", "exec"), {})
            assert re.search(r"'(cat|dog|owl)', 0\.\d+", capsys.readouterr().out)
    for name, least in (
        ("neighbours.png", 5000),
        ("curate.csv", 1000),
        ("predictions.csv", 50),
        ("photographs.onnx", 1000),
    ):
        assert (tmp_path / name).stat().st_size > least, name
    table = (tmp_path / "predictions.csv").read_text().splitlines()
    assert table[0] == "path,class,probability,cat,dog,owl" and len(table) == 3


# --------------------------------------------------------------------------------------------------
# Beside a demo.

TINY: dict[str, Any] = {
    "dataset": {"name": "digits", "train_limit": 128},
    "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 1, "heads": 3},
    "pretrain": {"epochs": 1, "batch_size": 64, "warmup_epochs": 0},
    "finetune": {"epochs": 1, "batch_size": 64, "warmup_epochs": 0},
    "knn": {"k": [20]},
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the demo has run: two of its experiments, by the verbs, in this process."""
    folder = checkout(tmp_path_factory.mktemp("demo"))
    study = {
        "study": "demo",
        "defaults": TINY,
        "experiments": {
            "aps": {"stages": ["pretrain", "finetune", "knn"]},
            "random": {"inherits": "aps", "sampling": {"strategy": "random"}, "stages": ["pretrain", "knn"]},
        },
    }
    (folder / "config/config.yaml").write_text(yaml.safe_dump(study))
    for split in ("train", "test"):
        draw(folder / "photos" / split, 3)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "none")
        assert cli.main(["data", "digits"]) == 0
        for name, stage in (
            ("aps", "pretrain"),
            ("aps", "finetune"),
            ("aps", "knn"),
            ("random", "pretrain"),
            ("random", "knn"),
        ):
            assert cli.main([stage, "--experiment", name]) == 0
    yield folder


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_the_lines_of_python_on_a_page_run(page: str, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README.md and inference.md, on the demo's finetuned encoder."""
    for language, _, text in blocks(page):
        if language == "python":
            names: dict[str, Any] = {}
            with contextlib.chdir(demo):
                exec(compile(text, page, "exec"), names)
            assert names["features"].shape[1] == 24
    assert re.search(r"\[\[\('\d', 0\.\d+\), ", capsys.readouterr().out)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.slow
def test_a_study_of_ones_own_beside_the_demo_touches_and_shows_nothing_of_it(demo: Path) -> None:
    """The tutorial's own study, which names its experiments as the demo does, after the demo, in one folder."""
    before, table = files(demo / "results/demo"), given("python -m aps results", demo)
    ((_, title, text),) = [block for block in blocks("docs/tutorial.md") if block[0] == "yaml"]
    mine = yaml.safe_load(text)
    mine["defaults"] |= TINY | {"finetune": {}, "seeds": [0], "knn": {"k": [5]}}
    (demo / title).write_text(yaml.safe_dump(mine))
    assert {"aps", "random"} <= set(mine["experiments"])
    *_, (_, _, commands) = [block for block in blocks("docs/tutorial.md") if block[0] == "sh"]
    for command in lines(commands):
        given(command, demo)
    assert files(demo / "results/demo") == before
    assert given("python -m aps results", demo) == table
    shown = given(f"python -m aps results --configfile {title}", demo)
    assert "kNN top-1, k = 5" in shown and "k = 20" not in shown and "kNN top-1, k = 20" in table
    digests = {
        json.loads((demo / f"results/{study}/aps/seed0/knn/metrics.json").read_text())["settings_digest"]
        for study in ("demo", "mine")
    }
    assert len(digests) == 2
    assert "Nothing to be done" in given("snakemake knn -n", demo)
