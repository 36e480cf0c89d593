"""Figures of images, of a study that really ran: each is there, and none whose run or data are gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made_up import table
from tiny_study import STUDY

from aps.cli import main
from aps.layout import manifest_path, stage_folder, study_folder
from aps.report.examples import examples
from aps.report.page import is_intact, write_report
from aps.settings.reading import load_study
from aps.settings.study import Study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study's first experiment: pretrained, embedded, and a detector of a few steps."""
    folder = tmp_path_factory.mktemp("ran")
    study = {**STUDY, "results": str(folder / "results"), "tracking_uri": "none"}
    study["experiments"] = {
        "aps": {"stages": ["pretrain", "embed", "finetune", "detection"], "embed": {"queries": 2, "neighbours": 2}}
    }
    (folder / "study.yaml").write_text(json.dumps(study))
    options = ["--configfile", str(folder / "study.yaml")]
    for verb in (["data", "digits"], ["data", "digits_coco"], ["pretrain"], ["embed"], ["finetune"], ["detection"]):
        assert main([*verb, *options]) == 0
    return load_study([folder / "study.yaml"])


def names(study: Study) -> list[str]:
    return [picture.name for picture in examples(table(study), is_intact)]


def test_every_figure_of_images_is_in_the_report(ran: Study, tmp_path: Path) -> None:
    assert names(ran) == ["kept-cells", "attention", "neighbours", "detections"]
    write_report(ran, tmp_path / "report", "none")
    made = {file.stem for file in (tmp_path / "report/figures/examples").iterdir()}
    assert made == {"kept-cells", "attention", "neighbours", "detections", "confusion", "map"}
    page = (tmp_path / "report/report.html").read_text()
    for said in ("Kept cells of aps", "Class-token attention of aps", "Nearest neighbours by aps", "Detections of aps"):
        assert f'aria-label="{said}' in page, said
    assert "neighbours.html" in page


def test_what_is_gone_or_other_data_by_now_is_left_out(ran: Study, tmp_path: Path) -> None:
    shutil.copytree(ran.results, tmp_path / "results")
    moved = ran.model_copy(update={"results": str(tmp_path / "results")})
    shutil.rmtree(stage_folder(study_folder(moved), "aps", 0, "embed"))
    assert names(moved) == ["kept-cells", "attention", "detections"]
    shutil.rmtree(manifest_path(moved.results, "digits").parent)
    assert names(moved) == ["detections"]


def with_a_damaged_encoder(ran: Study, tmp_path: Path) -> Study:
    """A copy of the study in which a bit of the pretrained encoder has changed."""
    shutil.copytree(ran.results, tmp_path / "results")
    moved = ran.model_copy(update={"results": str(tmp_path / "results")})
    file = stage_folder(study_folder(moved), "aps", 0, "pretrain") / "encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    file.write_bytes(content)
    return moved


def test_a_damaged_encoder_is_drawn_by_nobody(ran: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = with_a_damaged_encoder(ran, tmp_path)
    assert "attention" not in names(moved)
    assert "encoder.safetensors is not the file that was written" in capsys.readouterr().err


def test_a_damaged_file_is_told_once_with_the_command_that_makes_it_again(
    ran: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept cells and attention are both drawn by the encoder."""
    moved = with_a_damaged_encoder(ran, tmp_path)
    folder = stage_folder(study_folder(moved), "aps", 0, "pretrain")
    _, runs = write_report(moved, tmp_path / "report", "none", "--configfile s.yaml")
    assert len(runs) == len(moved.jobs())  # the run is in the report
    assert capsys.readouterr().err.splitlines() == [
        f"pretrain aps/seed0: left out of the report: pictures of it, not its scores, since in {folder} encoder.safetensors is not "
        "the file that was written; `python -m aps pretrain --experiment aps --seed 0 --again --configfile s.yaml` makes it again"
    ]
