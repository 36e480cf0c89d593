"""Exit statuses: 2 is a mistake that is not tried again, 75 a run that goes on, anything else a crash that is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_study import STUDY, checkout

from aps import cli
from aps.cli import table
from aps.errors import Preempted, UserError
from aps.runtime.launch import SHELL_PREFIX

ROOT = Path(__file__).parent.parent


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return tmp_path / "knn.log.mistake"


def attempt(number: int, note: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> tuple[int, bool]:
    """The report verb, which meets an error, as Snakemake's n-th attempt -> exit status, whether it was begun."""
    begun: list[Any] = []

    def run(args: Any) -> None:
        begun.append(args)
        if error is not None:
            raise error

    rows = [row._replace(run=run) if row.name == "report" else row for row in table.MORE_VERBS]
    monkeypatch.setattr(table, "MORE_VERBS", rows)
    command = ["report", "--configfile", "study.yaml", "--attempt", str(number), "--mistake", str(note)]
    return cli.main(command), bool(begun)


def test_a_mistake_is_met_once_and_further_attempts_say_the_same_sentence_at_once(
    note: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attempt(1, note, monkeypatch, UserError("lr is 7; lower it")) == (2, True)
    capsys.readouterr()
    for number in (2, 3):
        assert attempt(number, note, monkeypatch, UserError("another")) == (2, False)
        assert capsys.readouterr().err.splitlines()[0] == "error: lr is 7; lower it"


def test_the_same_command_given_again_tries_again(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(1, note, monkeypatch, UserError("lr is 7; lower it"))
    assert attempt(1, note, monkeypatch, None) == (0, True)
    assert not note.exists()


@pytest.mark.parametrize(
    "error", [Preempted("after 3 of 9 batches"), MemoryError("Unable to allocate 8 GiB"), KeyboardInterrupt()]
)
def test_what_may_end_otherwise_is_tried_again(
    error: BaseException, note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _ = attempt(1, note, monkeypatch, error)
    assert status == {"Preempted": 75, "MemoryError": 2, "KeyboardInterrupt": 130}[type(error).__name__]
    assert attempt(2, note, monkeypatch, None) == (0, True)


def test_a_worker_that_was_killed_is_no_mistake(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert attempt(1, note, monkeypatch, killed) == (1, True)
    assert attempt(2, note, monkeypatch, None) == (0, True)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_does_not_answer_is_one_sentence_and_tried_again(
    number: int, note: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(number, os.strerror(number), "results/state-000000002.pt")
    assert attempt(1, note, monkeypatch, error) == (1, True)
    assert capsys.readouterr().err == (
        f"error: results/state-000000002.pt: {os.strerror(number)}; the disk did not answer, run the same command again\n"
    )
    assert attempt(2, note, monkeypatch, None) == (0, True)


def test_a_kernel_that_does_not_fit_on_the_gpu_is_a_sentence_though_its_error_is_of_no_usual_kind(
    note: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Exception("out of resource: shared memory, Required: 147456, Hardware limit: 101376.")
    assert attempt(1, note, monkeypatch, told) == (2, True)
    assert "a compiled kernel does not fit on this GPU" in capsys.readouterr().err


def test_a_crash_is_tried_again(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        attempt(1, note, monkeypatch, RuntimeError("a fault of ours"))
    assert attempt(2, note, monkeypatch, None) == (0, True)


@pytest.mark.parametrize("status", [0, 1, 2, 75, 130, 137])
def test_the_shell_of_a_rule_passes_the_status_on(status: int, tmp_path: Path) -> None:
    command = f"{SHELL_PREFIX}sh -c 'exit {status}' 2>&1 | tee {tmp_path}/log"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == status


def test_every_rule_that_runs_a_verb_notes_a_mistake() -> None:
    for file in (ROOT / "workflow/rules").glob("*.smk"):
        text = file.read_text()
        if "-m aps " in text:
            assert "--attempt {resources.attempt} --mistake {log:q}.mistake" in text, file


BROKEN = "not weights"


@pytest.mark.slow
@pytest.mark.end_to_end
def test_snakemakes_retries_do_not_run_a_mistake_again_and_a_mended_one_runs(tmp_path: Path) -> None:
    study = {
        **STUDY,
        "experiments": {"floor": {"stages": ["knn"], "encoder": {"weights": "mine.safetensors"}}},
    }
    folder = checkout(tmp_path, study)
    (folder / "mine.safetensors").write_text(BROKEN)
    environment = os.environ | {"MLFLOW_TRACKING_URI": "none", "APS_DEVICE": "cpu"}
    command = [sys.executable, "-m", "snakemake", "knn", "--cores", "1", "--retries", "2", "--configfile", "study.yaml"]

    def snakemake() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    done = snakemake()
    assert done.returncode != 0
    assert done.stdout.count("weights file mine.safetensors is not a whole safetensors file") >= 3, done.stdout
    assert done.stdout.count("not tried again") >= 2, done.stdout
    log = (folder / "results/tiny/logs/floor/seed0/knn.log").read_text()
    assert "not tried again" in log and "Traceback" not in log
    from aps.models.encoder import build_encoder
    from aps.models.weights import save_encoder
    from aps.settings.blocks import EncoderSettings

    settings = EncoderSettings(**STUDY["defaults"]["encoder"])
    save_encoder(build_encoder(settings), settings, folder / "mine.safetensors")
    done = snakemake()
    assert done.returncode == 0, done.stdout
