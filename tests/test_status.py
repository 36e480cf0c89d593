"""`aps status`: which state a run is in, how far it is, what its log said last; and the picture of it."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from made_up import STUDY, finish
from PIL import Image
from test_startup import HEAVY, imported
from tiny_study import pretend_prepared

from aps.cli import main
from aps.errors import UserError
from aps.files import sha256
from aps.layout import encoder_file, log_file, manifest_path, run_folder, study_folder
from aps.report.states import draw_status
from aps.results import run_key
from aps.runtime import slurm
from aps.settings.reading import load_study
from aps.settings.study import Study
from aps.status import STATES, Status, counts, last_line, status_of, text

NOW = 1_800_000_000.0


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "study.yaml").write_text(STUDY.format(results=tmp_path / "results"))
    study = load_study([tmp_path / "study.yaml"])
    manifest_path(study.results, "digits").parent.mkdir(parents=True)
    pretend_prepared(manifest_path(study.results, "digits"), "d" * 64)
    return study


def begin(study: Study, experiment: str, seed: int, stage: str, *lines: dict[str, Any], seconds: float = 60.0) -> Path:
    """What a run that has begun leaves in its folder, without a mark of being at work."""
    source = encoder_file(study, experiment, seed) if stage != "pretrain" else None
    key = run_key(study.stage_settings(experiment, seed, stage), "d" * 64, sha256(source) if source else None)
    folder = run_folder(study.results, stage, key)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"started": "2026-01-01T00:00:00+00:00", "seconds": seconds}))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def at_work(folder: Path, **other: Any) -> None:
    """A mark as of this process."""
    mark = {"slurm_job": None, "host": slurm._host(), "pid": os.getpid(), **slurm._identity(os.getpid()), **other}
    (folder / "attempt.json").write_text(json.dumps(mark))


def log(study: Study, experiment: str, seed: int, stage: str, *lines: str) -> Path:
    file = log_file(study_folder(study), experiment, seed, stage)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def state(study: Study, experiment: str, seed: int, stage: str) -> Status:
    found = {(one.experiment, one.seed, one.stage): one for one in status_of(study, NOW)}
    return found[experiment, seed, stage]


def test_what_has_not_begun_is_queued(study: Study) -> None:
    assert {one.state for one in status_of(study)} == {"queued"}
    assert counts(status_of(study)) == "14 queued"


def test_a_finished_run_is_done_and_one_of_other_settings_outdated(study: Study, tmp_path: Path) -> None:
    finish(study, "aps", 0, "pretrain", loss=1.0)
    assert state(study, "aps", 0, "pretrain").state == "done"
    changed = load_study([tmp_path / "study.yaml"], {"experiments": {"aps": {"pretrain": {"epochs": 7}}}})
    assert state(changed, "aps", 0, "pretrain")[3:5] == ("outdated", "pretrain.epochs 1600 -> 7")


def test_a_running_stage_says_how_far_it_is_and_how_long_it_will_take(study: Study) -> None:
    folder = begin(study, "aps", 0, "pretrain", {"step": 9, "time": NOW - 10, "epoch": 400.0}, seconds=300.0)
    at_work(folder)
    found = state(study, "aps", 0, "pretrain")
    assert (found.state, found.share) == ("running", 0.25)
    assert found.left == pytest.approx(300 / 0.25 * 0.75 - 10)  # ten seconds have passed since that line
    assert found.progress == "25%, 14:50 left"


@pytest.mark.parametrize(
    ("pretrain", "line", "share"),
    [
        ({"budget": {"minutes": 2}}, {"epoch": 3.0, "seconds": 30.0, "flops": 1e9}, 0.25),
        ({"budget": {"flops": 4e9}}, {"epoch": 3.0, "seconds": 30.0, "flops": 1e9}, 0.25),
        ({"epochs": 100}, {"epoch": 101.0}, 1.0),
        ({"epochs": 100}, {"loss": 1.0}, None),
    ],
)
def test_progress_is_in_the_units_that_end_the_run(
    study: Study, tmp_path: Path, pretrain: dict[str, Any], line: dict[str, float], share: float | None
) -> None:
    changed = load_study([tmp_path / "study.yaml"], {"experiments": {"aps": {"pretrain": pretrain}}})
    at_work(begin(changed, "aps", 0, "pretrain", {"step": 1, "time": NOW, **line}))
    assert state(changed, "aps", 0, "pretrain").share == share


def test_a_stage_without_a_journal_shows_the_last_line_of_its_log(study: Study) -> None:
    at_work(begin(study, "untrained", 0, "knn"))
    log(study, "untrained", 0, "knn", "train features  40%  1/2 images")
    found = state(study, "untrained", 0, "knn")
    assert (found.state, found.note) == ("running", "train features 40% 1/2 images")


@pytest.mark.parametrize("mark", [{"pid": 2**22 + 1}, {"born": 1}, {"boot": "another"}])
def test_a_mark_of_a_process_that_is_gone_is_no_running_stage_but_a_killed_one(
    study: Study, mark: dict[str, Any]
) -> None:
    at_work(begin(study, "aps", 0, "pretrain", {"step": 1, "time": NOW, "epoch": 400.0}), **mark)
    log(study, "aps", 0, "pretrain", "loading", "pretrain  25%  loss 3")
    found = state(study, "aps", 0, "pretrain")
    assert found.state == "failed" and found.note.startswith("killed; pretrain 25% loss 3 (")


@pytest.mark.parametrize(("age", "running"), [(5.0, True), (600.0, False)])
def test_another_machines_mark_counts_while_it_is_touched(study: Study, age: float, running: bool) -> None:
    folder = begin(study, "aps", 0, "pretrain", {"step": 1, "time": NOW, "epoch": 1.0})
    at_work(folder, host="elsewhere")
    os.utime(folder / "attempt.json", (time.time() - age,) * 2)
    assert (state(study, "aps", 0, "pretrain").state == "running") == running


def test_a_failed_stage_shows_the_sentence_of_its_error_and_its_log(study: Study) -> None:
    file = log(study, "aps", 1, "pretrain", "started", "error: results: disk full; free space", "srun: task 0 exited")
    found = state(study, "aps", 1, "pretrain")
    assert (found.state, found.note) == ("failed", f"error: results: disk full; free space ({file})")
    waiting = state(study, "aps", 1, "finetune")
    assert (waiting.state, waiting.note) == ("queued", "waits for pretrain aps/seed1, which failed")


def test_a_traceback_is_a_failure_too(study: Study) -> None:
    log(study, "aps", 1, "pretrain", "Traceback (most recent call last):", '  File "x"', "ZeroDivisionError: by zero")
    assert state(study, "aps", 1, "pretrain").note.startswith("ZeroDivisionError: by zero (")


def test_a_stopped_stage_is_queued_and_says_where_it_goes_on(study: Study) -> None:
    begin(study, "aps", 0, "pretrain", {"step": 1, "time": NOW, "epoch": 400.0})
    log(study, "aps", 0, "pretrain", "stopped: pretrain aps/seed0 after 400 of 1600 epochs; run it again to go on")
    assert state(study, "aps", 0, "pretrain")[3:5] == ("queued", "stopped at 25%, goes on from its last checkpoint")


def test_a_log_of_a_run_whose_result_was_removed_is_no_failure(study: Study) -> None:
    log(study, "aps", 0, "pretrain", "pretrain 100%  0:10 in all")
    assert state(study, "aps", 0, "pretrain").state == "queued"
    folder = begin(study, "aps", 0, "pretrain")
    (folder / "finished").mkdir()
    (folder / "finished" / "metrics.json").write_text("{}")
    assert state(study, "aps", 0, "pretrain")[3:5] == ("queued", "its saved run is finished and comes back at once")


def test_an_evaluation_that_runs_is_found_by_the_encoder_it_started_from(study: Study) -> None:
    finish(study, "aps", 0, "pretrain", loss=1.0)
    at_work(begin(study, "aps", 0, "finetune", {"step": 1, "time": NOW, "epoch": 50}))
    assert state(study, "aps", 0, "finetune").share == 0.5
    assert state(study, "aps", 1, "finetune").state == "queued"


@pytest.mark.parametrize(
    ("content", "said"),
    [("", ""), ("a\rb\r", "b"), ("error: x\nmore\n", "error: x"), ("y" * 300, "y" * 159 + "…"), ("\xff\n", "ÿ")],
)
def test_the_last_line_of_any_log_is_a_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "log").write_text(content)
    assert last_line(tmp_path / "log") == said


def every_state(study: Study) -> list[Status]:
    return [
        one._replace(state=STATES[number % 5], share=0.4 if STATES[number % 5] == "running" else None)
        for number, one in enumerate(status_of(study))
    ]


def test_the_text_has_a_line_for_each_seed_and_a_column_for_each_stage(study: Study) -> None:
    shown = text(study, every_state(study)).splitlines()
    assert shown[0] == "Study 'small': 14 runs: 3 done, 3 running, 3 queued, 3 failed, 2 outdated"
    assert shown[2].split() == ["experiment", "seed", "pretrain", "finetune", "knn"]
    assert shown[4].split() == ["aps", "0", "done", "running", "40%", "queued"]


def test_the_verb_prints_it_and_draws_it(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(study, "aps", 0, "pretrain", loss=1.0)
    options = ["--configfile", str(tmp_path / "study.yaml"), "--picture", str(tmp_path / "it.svg")]
    assert main(["status", *options]) == 0
    assert "14 runs: 1 done, 13 queued" in capsys.readouterr().out and (tmp_path / "it.svg").exists()


def test_the_picture_follows_dark_mode_as_svg_and_is_white_as_png(study: Study, tmp_path: Path) -> None:
    draw_status(study, every_state(study), tmp_path / "it.svg")
    svg = (tmp_path / "it.svg").read_text()
    assert "prefers-color-scheme:dark" in svg and "currentColor" in svg and "#010203" not in svg
    draw_status(study, every_state(study), tmp_path / "it.png")
    with Image.open(tmp_path / "it.png") as picture:
        assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or ()}
    for colour in ("#1a8a5c", "#2a7fd4", "#87939a", "#c8382f", "#b3650b"):
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours, colour


def test_a_picture_of_another_kind_is_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("name a .svg or .png file")):
        draw_status(study, status_of(study), tmp_path / "it.jpg")


@pytest.mark.parametrize("module", ["aps.status", "aps.compare", "aps.report.terminal"])
def test_what_is_asked_on_a_login_node_imports_nothing_heavy(module: str) -> None:
    assert not imported(f"import {module}") & HEAVY
