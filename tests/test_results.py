"""What a stage leaves: complete or not at all, found again after a kill, and dropped when it is of other inputs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_study import fake_job

from aps import __version__, results
from aps.cli import main
from aps.errors import UserError
from aps.files import read_json, sha256
from aps.journal import read_history
from aps.results import StageJob, StageRun, flatten, forget, provenance, restore_finished
from aps.seals import read_metrics, seal
from aps.stages import STAGES


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")


def play(job: StageJob, steps: int = 3, top1: float = 50.0) -> dict[str, Any]:
    """The whole stage -> metrics.json."""
    with StageRun(job) as stage:
        for step in range(1, steps + 1):
            stage.log(step, loss=1.0 / step)
        stage.finish({"top1": top1, "per_class": {"0": 1.0}}, precision="fp32")
    return metrics(job)


def metrics(job: StageJob) -> dict[str, Any]:
    return dict(read_json(job.out / "metrics.json"))


def begin(job: StageJob, steps: int) -> None:
    """The stage, killed after `steps` lines."""
    with pytest.raises(KeyboardInterrupt), StageRun(job) as stage:
        for step in range(1, steps + 1):
            stage.log(step, loss=1.0)
        raise KeyboardInterrupt


# --------------------------------------------------------------------------------------------------
# finish.


def test_metrics_say_what_was_computed_from_what_by_whom(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    found = play(job)
    assert found["metrics"] == {"top1": 50.0, "per_class": {"0": 1.0}} and found["precision"] == "fp32"
    assert (found["stage"], found["experiment"], found["seed"]) == ("knn", "aps", 0)
    assert found["settings"] == job.settings.relevant() and found["settings_digest"] == job.settings.digest
    assert found["dataset"] == {"name": "digits", "digest": "0123"}
    assert found["version"] == __version__ and found["command"].startswith("python -m aps")
    assert {"host", "cpu", "cores", "processes"} <= set(found["hardware"]) and "torch" in found["packages"]
    assert found["started"] <= found["finished"] and found["wall_seconds"] >= 0
    assert found["mlflow_complete"] is True and found["mlflow_run_id"] is None


def test_the_commit_is_named_in_a_clone_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(results.__file__).parent.parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode == 0 and (root / ".git").exists():
        assert head.stdout.startswith(str(provenance()["commit"]).removesuffix("-dirty"))
    monkeypatch.setattr(results, "__file__", str(tmp_path / "site-packages" / "aps" / "results.py"))
    (tmp_path / "site-packages").mkdir()
    assert provenance()["commit"] is None


def test_every_declared_output_must_be_there(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    play(job)
    assert {file.name for file in job.out.iterdir()} == {*STAGES["knn"].files, "tracking.json"}
    other = replace(job, settings=job.settings.model_copy(update={"stage": "finetune"}))
    with pytest.raises(UserError, match=r"finished without model.safetensors"):
        play(replace(other, checkpoints=tmp_path / "other"))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "50 %", None, True, torch.tensor(5.0), np.float32(5.0)])
def test_a_score_that_is_no_finite_number_is_one_sentence_and_no_result(tmp_path: Path, score: Any) -> None:
    job = fake_job(tmp_path)
    sentence = r"knn aps/seed0: (its score )?'knn_top1_k5' is .* stage 'knn' \(aps/training/knn\.py\) has to"
    with pytest.raises(UserError, match=sentence), StageRun(job) as stage:
        stage.finish({"knn_top1_k5": score})
    assert not job.out.exists() or not (job.out / "metrics.json").exists()


def test_a_figure_that_no_json_holds_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"'confusion' is a list .* plain numbers"),
        StageRun(fake_job(tmp_path)) as stage,
    ):
        stage.finish({"knn_top1_k5": 5.0}, confusion=[torch.zeros(2)])


def test_a_declared_score_that_is_missing_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, warned in (({"knn_top1_k5": 5}, False), ({"top1": 5.0}, True)):
        forget(fake_job(tmp_path).checkpoints)
        with StageRun(fake_job(tmp_path)) as stage:
            stage.finish(given)
        said = capsys.readouterr().err
        assert ("finished without its score 'knn_top1_k5'" in said) == warned, said


@pytest.mark.parametrize("run", [lambda job: None, lambda job: StageRun(job).__enter__().__exit__(None, None, None)])
def test_a_stage_that_returns_without_finishing_is_one_sentence(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_job(tmp_path)
    monkeypatch.setattr("aps.cli.stage.stage_job", lambda *_: job)
    monkeypatch.setattr("aps.training.knn.run", run)
    assert main(["knn", "--configfile", "none.yaml"]) == 2
    assert (
        "knn aps/seed0 returned without a result; the function `run` of stage 'knn' (aps/training/knn.py) has"
        in capsys.readouterr().err
    )


def test_metrics_come_last_so_that_they_mean_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    link, write = results._link, results.write_json
    monkeypatch.setattr(results, "_link", lambda source, target: (written.append(target.name), link(source, target)))
    monkeypatch.setattr(results, "write_json", lambda path, content: (written.append(path.name), write(path, content)))
    play(fake_job(tmp_path))
    assert written[-1] == "metrics.json" and set(written) > set(STAGES["knn"].files)


def test_a_downstream_run_names_the_run_it_came_from(tmp_path: Path) -> None:
    upstream = fake_job(tmp_path, "pretrained")
    run = play(upstream)
    encoder = upstream.out / "encoder.safetensors"
    encoder.write_text("weights")
    described = {
        "files": run["files"] | {encoder.name: {"bytes": 7, "sha256": sha256(encoder)}},
        "mlflow_run_id": "abc",
    }
    (upstream.out / "metrics.json").write_text(json.dumps(seal(run | described)))
    job = fake_job(tmp_path, encoder=encoder)
    found = play(job)["encoder"]
    assert found["source"] == str(job.encoder) and found["settings_digest"] == upstream.settings.digest
    assert found["mlflow_run_id"] == "abc" and found["finished"] == run["finished"]
    assert read_json(job.checkpoints / "tracking.json")["about"]["tags"]["encoder_run_id"] == "abc"


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = fake_job(tmp_path)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    with StageRun(job) as stage:
        stage.log(1, loss=1.0)
        stage.resume(1)
        stage.finish({"top1": 1.0})
    assert not job.checkpoints.exists() and not job.out.exists()


# --------------------------------------------------------------------------------------------------
# The journal.


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    begin(job, 5)
    with StageRun(job) as stage:
        stage.resume(3)
        for step in (4, 5, 6):
            stage.log(step, loss=0.0)
        stage.finish({"top1": 1.0})
    lines = read_history(job.out / "history.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    begin(job, 2)
    journal = job.checkpoints / "history.jsonl"
    journal.write_text(journal.read_text() + '{"step": 3, "lo')
    assert [line["step"] for line in read_history(journal)] == [1, 2]
    with StageRun(job) as stage:
        stage.resume(3)
        stage.log(3, loss=9.0)
    assert [line["step"] for line in read_history(journal)] == [1, 2, 3]


def test_wall_time_counts_all_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(results.time, "monotonic", lambda: now[0])
    job = fake_job(tmp_path)
    for seconds in (10, 20):
        with pytest.raises(KeyboardInterrupt), StageRun(job):
            now[0] += seconds
            raise KeyboardInterrupt
    assert play(job)["wall_seconds"] == 30


# --------------------------------------------------------------------------------------------------
# Finished, and found again.


def test_outputs_that_snakemake_deleted_come_back_without_computing(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    before = play(job)
    shutil.rmtree(job.out)
    os.utime(job.manifest)
    assert restore_finished(job) and metrics(job) == before
    for name in STAGES["knn"].files:  # outputs must be newer than inputs
        assert (job.out / name).stat().st_mtime >= job.manifest.stat().st_mtime


def test_nothing_comes_back_of_an_unfinished_run_or_of_other_settings(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    begin(job, 2)
    assert not restore_finished(job) and not job.out.exists()
    play(job)
    assert not restore_finished(fake_job(tmp_path, k=7)) and not restore_finished(fake_job(tmp_path, seed=1))


def test_checkpoints_stay_when_outputs_are_deleted_and_go_when_the_run_finished(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    begin(job, 2)
    state = job.checkpoints / "state-000000002.pt"
    state.write_text("")
    shutil.rmtree(job.out, ignore_errors=True)
    assert not restore_finished(job) and state.exists()
    play(job)
    assert not state.exists()


def test_a_run_of_other_images_or_another_encoder_is_another_run(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder.safetensors"
    encoder.write_text("weights")
    job = fake_job(tmp_path, encoder=encoder)
    play(job)
    encoder.write_text("other weights")
    assert not restore_finished(fake_job(tmp_path, encoder=encoder))
    encoder.write_text("weights")
    assert restore_finished(fake_job(tmp_path, encoder=encoder))
    job.manifest.write_text(json.dumps({"name": "digits", "digest": "another"}))
    assert not restore_finished(fake_job(tmp_path, encoder=encoder))


def test_a_run_appears_under_each_name_that_asks_for_it_and_is_computed_once(tmp_path: Path) -> None:
    first, second = fake_job(tmp_path), fake_job(tmp_path, "other", study="second")
    found = play(first)
    assert first.checkpoints == second.checkpoints and restore_finished(second)
    assert metrics(second)["metrics"] == found["metrics"] and metrics(second)["experiment"] == "other"
    assert read_metrics(second.out / "metrics.json")["settings"]["experiment"] == "other"


@pytest.mark.parametrize("file", ["metrics.json", "history.jsonl"])
def test_a_damaged_saved_run_is_recognized_and_computed_again(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_job(tmp_path)
    play(job)
    saved = job.checkpoints / "finished" / file
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    assert not restore_finished(job)
    assert "its saved run is damaged" in capsys.readouterr().err


def test_an_encoder_that_is_not_the_one_described_beside_it_is_refused(tmp_path: Path) -> None:
    upstream = fake_job(tmp_path, "pretrained")
    run = play(upstream)
    encoder = upstream.out / "encoder.safetensors"
    encoder.write_text("weights")
    described = {"files": run["files"] | {encoder.name: {"bytes": 7, "sha256": "0" * 64}}}
    (upstream.out / "metrics.json").write_text(json.dumps(seal(run | described)))
    with pytest.raises(
        UserError, match=r"encoder.safetensors: it is not the file that metrics.json beside it describes"
    ):
        play(fake_job(tmp_path, encoder=encoder))


def test_forgetting_leaves_the_mark_of_a_running_attempt(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    play(job)
    (job.checkpoints / "attempt.json").write_text("{}")
    forget(job.checkpoints)
    assert {file.name for file in job.checkpoints.iterdir()} == {"attempt.json", ".writer"}
    forget(tmp_path / "gone")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from aps import results
from tiny_study import fake_job
count = 0
def kill_after(name, module=os):
    real = getattr(module, name)
    def call(*a, **k):
        global count
        count += 1
        if count > int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(module, name, call)
kill_after("replace"), kill_after("link"), kill_after("unlink"), kill_after("utime")
with results.StageRun(fake_job(Path(sys.argv[1]))) as stage:
    stage.log(1, loss=1.0)
    stage.finish({{"top1": 50.0}})
"""


def test_a_kill_between_two_writes_leaves_no_half_result_and_the_next_attempt_finishes(tmp_path: Path) -> None:
    """The process dies before its n-th rename, link or removal, for every third n until it gets through."""
    code = KILLED.format(tests=str(Path(__file__).parent))
    for n in range(0, 60, 3):
        folder = tmp_path / str(n)
        job = fake_job(folder)
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(n)], env=os.environ, capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        if (job.out / "metrics.json").exists():  # then it is complete
            assert metrics(job)["metrics"] == {"top1": 50.0}
            assert all((job.out / name).exists() for name in STAGES["knn"].files)
        if not restore_finished(job):
            play(job)
        assert metrics(job)["metrics"]["top1"] == 50.0
        if done.returncode == 0:
            return
    pytest.fail("it never got through")


# --------------------------------------------------------------------------------------------------


def test_a_results_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    job = fake_job(tmp_path)
    job.out.parent.mkdir(parents=True)
    job.out.write_text("in the way")
    with pytest.raises(UserError, match=r"knn/metrics.json: cannot be written \(.*\); free space or choose another"):
        play(job)


def test_outputs_are_copied_where_the_file_system_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(results.os, "link", refuse)
    job = fake_job(tmp_path)
    play(job)
    assert (job.out / "metrics.json").stat().st_nlink == 1
    assert {file.name for file in job.out.iterdir()} == {*STAGES["knn"].files, "tracking.json"}


def test_publishing_again_leaves_no_file_but_the_outputs(tmp_path: Path) -> None:
    """Renaming one of two links to a file onto the other does nothing, so the first would stay."""
    job = fake_job(tmp_path)
    play(job)
    outputs = sorted(file.name for file in job.out.iterdir())
    for _ in range(2):
        assert restore_finished(job)
        assert sorted(file.name for file in job.out.iterdir()) == outputs
    assert not [name for name in outputs if name.startswith(".")]


def test_nested_blocks_flatten_to_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"started": 1, "seconds": 1}', '{"started": "x", "seconds": NaN}',
                                     '{"started": "x"}', '{"started": "x", "seconds": -1}', "[" * 5000, '"x"'])  # fmt: skip
def test_a_damaged_clock_is_replaced_with_a_warning(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_job(tmp_path)
    job.checkpoints.mkdir(parents=True)
    file, left = job.checkpoints / "run.json", job.checkpoints / ".run.json.1-0a1b2c3d"
    file.write_text(content)
    left.touch()
    with StageRun(job) as stage:
        stage.log(1, loss=1.0)
    assert json.loads(file.read_text())["seconds"] >= 0 and not left.exists()
    assert f"warning: {file}: damaged and replaced" in capsys.readouterr().err


def test_a_stage_without_checkpoints_that_was_killed_after_it_logged_has_each_line_once(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "results")
    for _ in range(2):  # the first attempt writes no last word
        killed = StageRun(job).__enter__()
        killed.log(1, knn_top1=40.0)
        killed.log(5, knn_top1=50.0)
    with StageRun(job) as stage:
        stage.log(1, knn_top1=40.0)
        stage.log(5, knn_top1=50.0)
        stage.finish({"knn_top1_k5": 50.0})
    assert [line["step"] for line in read_history(job.out / "history.jsonl")] == [1, 5]


def test_when_a_run_started_is_on_disk_before_mlflow_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fake_job(tmp_path / "results")
    first = StageRun(job).__enter__()  # and killed before its first line
    monkeypatch.setattr(results, "_now", lambda: "2030-01-01T00:00:00+00:00")
    again = StageRun(job).__enter__()
    assert again.tracker.state.about.key == first.tracker.state.about.key


def test_a_picture_that_cannot_be_drawn_costs_a_warning_and_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = fake_job(tmp_path)
    with StageRun(job) as stage:  # its examples name images of a dataset whose files are gone
        stage.finish({"knn_top1_k5": 50.0}, examples=[{"test": 0, "train": [1], "similarity": [0.5]}])
    assert "warning: knn aps/seed0: neighbours.png is not drawn: " in capsys.readouterr().err
    assert read_json(job.out / "metrics.json")["metrics"] == {"knn_top1_k5": 50.0}
    assert not (job.out / "neighbours.png").exists()
