"""A study that asks for detectron2 where it is missing: on real Snakemake, with detectron2 hidden from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HIDDEN = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "detectron2" else find_spec(name, package)
from snakemake.cli import main
main()
"""
SENTENCE = (
    "detection.engine 'detectron2': detectron2 is not installed; install it by "
    "`pip install --no-build-isolation '.[detectron2]'` in the repository"
)
STUDY = """
study: transfer
defaults: {dataset: digits, encoder: {arch: micro, image_size: 16, patch_size: 2, weights: random}}
experiments:
  small: {stages: [detection], detection: {engine: ENGINE, image_size: 48, global_blocks: [1, 3], pyramid_scales: [1.0]}}
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The repository as a folder of links."""
    for name in ("Snakefile", "workflow", "profiles", "config", "aps"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def snakemake(folder: Path, engine: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "study.yaml").write_text(STUDY.replace("ENGINE", engine))
    command = [sys.executable, "-c", HIDDEN, "--configfile", "study.yaml", "--cores", "1", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_real_run_is_refused_before_its_first_job_with_the_install_line(checkout: Path) -> None:
    done = snakemake(checkout, "detectron2", "detection")
    assert done.returncode == 1
    assert f'WorkflowError in file "{checkout}/workflow/rules/common.smk"' in done.stderr
    assert f"\n{SENTENCE}" in done.stderr.partition("WorkflowError")[2]
    files = [path for path in (checkout / "results").rglob("*") if path.is_file()]
    assert [path.name for path in files] == [".lock"], "a job ran"


def test_a_dry_run_says_the_same_as_a_warning_and_plans_on(checkout: Path) -> None:
    done = snakemake(checkout, "detectron2", "detection", "-n")
    assert done.returncode == 0, done.stderr
    assert f"warning: {SENTENCE}" in done.stderr
    assert "detection_encoder" in done.stdout


def test_what_needs_no_detectron2_runs_in_the_same_study(checkout: Path) -> None:
    done = snakemake(checkout, "detectron2", "results/data/digits_coco/manifest.json")
    assert done.returncode == 0, done.stderr


def test_engine_torchvision_is_planned_without_a_word(checkout: Path) -> None:
    done = snakemake(checkout, "torchvision", "detection", "-n")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
