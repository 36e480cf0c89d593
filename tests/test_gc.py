"""What no study needs: listed with sizes, deleted only when told to."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny_study import fake_job

from aps.cli import main
from aps.errors import Preempted
from aps.results import StageRun
from aps.runtime import slurm


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


@pytest.mark.parametrize("content", ['{"host": "another"}', "", "[]", '{"host": "another", "slurm_job": "4711"}'])
def test_a_killed_run_is_deleted_when_its_mark_is_old(folder: Path, content: str) -> None:
    killed = play(7)
    (killed / "attempt.json").write_text(content)
    os.utime(killed / "attempt.json", (0, 0))
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert not killed.exists()


def test_a_process_that_was_killed_here_keeps_nothing_and_one_that_lives_does(folder: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    runs = {"dead": play(7), "alive": play(9)}
    for name, run in runs.items():
        pid = os.getpid() if name == "alive" else sleeper.pid
        mark = {"host": platform.node(), "pid": pid, **slurm._identity(pid)}
        (run / "attempt.json").write_text(json.dumps(mark))
        os.utime(run / "attempt.json", (0, 0))
    sleeper.kill()
    sleeper.wait()
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert not runs["dead"].exists() and runs["alive"].exists()


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "CANCELLED", ""])
def test_a_job_in_slurm_s_queue_keeps_its_run(folder: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = play(7)
    (waiting / "attempt.json").write_text(json.dumps({"host": "another", "slurm_job": "4711"}))
    os.utime(waiting / "attempt.json", (0, 0))
    monkeypatch.setattr(slurm, "job_fields", lambda job: {"JobState": state} if job == "4711" and state else {})
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert waiting.exists() == (state in ("PENDING", "RUNNING"))


@pytest.mark.parametrize("missing", ["gone", "truncated"])
def test_saved_runs_are_kept_while_the_images_they_were_made_from_are_missing(
    folder: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Snakemake deletes a manifest before its dataset is prepared again."""
    other, needed, begun = play(7), play(5), begin(5)
    manifest = Path("results/data/digits/manifest.json")
    content = manifest.read_text()
    manifest.unlink() if missing == "gone" else manifest.write_text(content[:20])
    assert main(["gc", "study.yaml", "--delete"]) == 0
    said = capsys.readouterr().out
    assert (
        "2 saved runs kept: nobody can tell whether a study needs them, since results/data/digits/manifest.json" in said
    )
    assert needed.exists() and begun.exists() and not other.exists()
    manifest.write_text(content)
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert "kept" not in capsys.readouterr().out and needed.exists() and not begun.exists()


def begin(k: int) -> Path:
    """A run with these settings on other images, which was stopped."""
    job = fake_job(Path("results"), "floor", k=k, weights="random")
    job = dataclasses.replace(job, checkpoints=job.checkpoints.with_name("0" * 16))
    with pytest.raises(Preempted), StageRun(job) as stage:
        stage.log(1, loss=1.0)
        raise Preempted("asked")
    return job.checkpoints


def test_an_experiment_that_one_of_two_files_of_a_study_has_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    play(5), play(9, "gone"), play(9, "other")
    study = yaml.safe_load(Path("study.yaml").read_text())
    study["experiments"]["other"] = study["experiments"].pop("floor")
    Path("other.yaml").write_text(yaml.safe_dump(study))
    assert main(["gc", "study.yaml", "other.yaml", "--delete"]) == 0
    assert {path.name for path in Path("results/tiny").iterdir()} == {"floor", "other"}
    assert capsys.readouterr().out.count("has no such experiment") == 1


def test_what_no_stage_made_and_links_are_no_results_of_an_experiment(folder: Path) -> None:
    play(5), play(9, "gone"), play(9, "mixed"), play(9, "moved")
    tiny = Path("results/tiny")
    (tiny / "exports").mkdir()
    (tiny / "exports/model.onnx").touch()
    (tiny / "mixed/notes.txt").touch()
    (tiny / "moved").rename("elsewhere")
    (tiny / "moved").symlink_to(Path("elsewhere").resolve())
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert {path.name for path in tiny.iterdir()} == {"floor", "exports", "mixed", "moved"}
    assert (tiny / "moved/seed0/knn/metrics.json").exists()


def test_a_folder_that_cannot_be_deleted_is_named_and_the_rest_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, rmtree = [play(7), play(9)], shutil.rmtree

    def refuse(path: Path) -> None:
        if path == runs[0]:
            raise PermissionError(errno.EACCES, "Permission denied")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert f"{runs[0]}: cannot be deleted (Permission denied); delete it yourself" in capsys.readouterr().err
    assert runs[0].exists() and not runs[1].exists()


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study that keeps small copies; first of 16 pixels, then of 20, then with another image too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(tmp_path / f"photos/{number}.png")
    for shrink in (16, 20):
        write_study(shrink)
        assert main(["data", "mine", "--configfile", "study.yaml"]) == 0
    Image.new("RGB", (40, 30)).save(tmp_path / "photos/4.png")
    assert main(["data", "mine", "--configfile", "study.yaml"]) == 0
    return tmp_path


def write_study(shrink: int, name: str = "study.yaml") -> None:
    entry = {"folder": "photos", "labels": False, "shrink": shrink}
    experiment = {
        "dataset": "mine", "stages": ["pretrain"], "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4},
        "pretrain": {"batch_size": 2},
    }  # fmt: skip
    study = {"study": "tiny", "datasets": {"mine": entry}, "experiments": {"e": experiment}}
    Path(name).write_text(yaml.safe_dump(study))


def test_copies_that_no_study_reads_are_listed_and_deleted(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path("results/data")
    (data / "digits").mkdir()  # published: may have been prepared without a study
    needed = (data / "mine").resolve().name
    (other,) = (folder.name for folder in data.glob("mine-*") if folder.name != needed)
    named = json.loads((data / needed / "manifest.json").read_text())["splits"]["train"]["images"].split("/")[0]
    (earlier,) = (folder for folder in (data / needed).glob("shrunk-*") if folder.name != named)
    assert main(["gc", "study.yaml"]) == 0
    shown = capsys.readouterr().out
    assert f"{data / other}  (no study has this dataset)" in shown and f"{earlier}  (copies of earlier images)" in shown
    assert "in 2 folders" in shown and earlier.exists()
    write_study(16, "other.yaml")
    assert main(["gc", "study.yaml", "other.yaml"]) == 0
    assert str(data / other) not in capsys.readouterr().out
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert {folder.name for folder in data.iterdir()} == {needed, "mine", "digits"}
    assert [folder.name for folder in (data / needed).glob("shrunk-*")] == [named]


@pytest.mark.parametrize("mark", ["results/runs/pretrain/0123/attempt.json", "results/data/{needed}/.lock"])
def test_copies_are_not_deleted_while_a_run_or_a_preparation_is_at_work(
    photos: Path, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = Path("results/data/mine").resolve()
    file = Path(mark.format(needed=needed.name))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    before = sorted(needed.glob("shrunk-*"))
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert "at work or killed: not deleted" in capsys.readouterr().out
    assert sorted(needed.glob("shrunk-*")) == before and len(before) == 2


def test_killed_runs_and_preparations_do_not_keep_copies(photos: Path) -> None:
    """Only a lock that is held does."""
    needed = Path("results/data/mine").resolve()
    run, lock = Path("results/runs/pretrain/0123/attempt.json"), needed / ".lock"
    run.parent.mkdir(parents=True)
    for file in (run, lock):
        file.touch()
        os.utime(file, (0, 0))
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["gc", "study.yaml", "--delete"]) == 0
        assert len(list(needed.glob("shrunk-*"))) == 2
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert len(list(needed.glob("shrunk-*"))) == 1


def test_a_plain_name_that_leads_nowhere_goes_with_its_folder(photos: Path) -> None:
    write_study(24)
    assert main(["gc", "study.yaml", "--delete"]) == 0
    assert list(Path("results/data").iterdir()) == []
