"""`snakemake --report` holds the page, the table and every figure, with captions and categories."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from tiny_study import checkout, pretend_finished

from aps.findings import Findings
from aps.layout import report_folder
from aps.settings.reading import load_study


def test_what_it_needs_is_declared(request: pytest.FixtureRequest) -> None:
    project = tomllib.loads((Path(request.config.rootpath) / "pyproject.toml").read_text())["project"]
    assert any(line.startswith("pygments") for line in project["dependencies"])


@pytest.mark.slow
def test_the_figures_have_captions_and_categories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkout(tmp_path)
    monkeypatch.chdir(folder)
    study = load_study(["study.yaml"])
    pretend_finished(study)
    figures = report_folder(study) / "figures"
    for name in ("scores/scores", "sweeps/sweep-sampling.gamma", "examples/attention"):
        (figures / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(figures / f"{name}.png")
    Findings(study).stamp_report(report_folder(study))
    command = [sys.executable, "-m", "snakemake", "--report", "all.html", "--configfile", "study.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (folder / "all.html").read_text()
    for said in (
        "scores.png", "sweep-sampling.gamma.png", "attention.png", "report.html", "results.csv",
        '"scores"', '"sweeps"', '"examples"', '"Results"',
        "dots are seeds", "Scores for each value of one setting", "What the class token attends to in the last block",
    ):  # fmt: skip
        assert said in page, said


def test_every_figure_has_a_caption(request: pytest.FixtureRequest) -> None:
    root = Path(request.config.rootpath)
    captions = (root / "workflow/report/figure.rst").read_text()
    known = {line.split('"')[1] for line in captions.splitlines() if line.startswith('  "')}
    drawn = set()
    for file in ("figures.py", "examples.py"):
        text = (root / "aps/report" / file).read_text()
        drawn |= {name for name in known if f'"{name}"' in text}
    assert drawn == known and len(known) == 10
