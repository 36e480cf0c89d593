"""What no study needs: listed with sizes, deleted only when told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_study import fake_job

from aps.cli import main
from aps.results import StageRun


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study whose kNN has run with its settings, and with others before."""
    monkeypatch.chdir(tmp_path)
    floor = {"dataset": "digits", "stages": ["knn"], "encoder": {"weights": "random"}, "knn": {"k": [5]}}
    study = {"study": "tiny", "experiments": {"floor": floor}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    return tmp_path


def play(k: int, experiment: str = "floor") -> Path:
    job = fake_job(Path("results"), experiment, k=k, weights="random")
    with StageRun(job) as stage:
        stage.finish({"top1": 1.0})
    return job.checkpoints


def test_what_a_study_still_asks_for_stays_and_the_rest_is_listed_and_deleted_when_told_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, needed = play(7), play(5)
    play(9, "gone")
    assert main(["gc", "study.yaml"]) == 0
    shown = capsys.readouterr().out
    assert str(earlier) in shown and str(needed) not in shown and "results/tiny/gone" in shown
    assert "nothing was deleted" in shown and earlier.exists()
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert not earlier.exists() and needed.exists() and not Path("results/tiny/gone").exists()
    assert Path("results/tiny/floor/seed0/knn/metrics.json").exists()


def test_a_run_at_work_is_not_deleted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    working = play(7)
    (working / "attempt.json").write_text("{}")
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert "at work or killed: not deleted" in capsys.readouterr().out and working.exists()
