"""One machine, real Snakemake: interrupted in every way there is, the same command goes on and ends as if undisturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from aps.errors import UserError
from aps.workflow.plan import Plan

pytestmark = [pytest.mark.end_to_end]

ROOT = Path(__file__).parent.parent
BATCHES = 80
PATIENCE = 600  # seconds, on a busy machine
STUDY = """
study: interrupted
resources:
  pretrain: {threads: 1, checkpoint_minutes: 0.0005}
defaults:
  dataset: {name: digits, train_limit: 128}
  stages: [pretrain]
  encoder: {arch: micro, image_size: 16, patch_size: 4, dim: 24, depth: 1, heads: 3}
  pretrain: {epochs: 20, batch_size: 32, warmup_epochs: 1, projector: [16, 16, 8], predictor: [16, 16, 8]}
experiments: {one: {}}
"""


def checkout(folder: Path) -> Path:
    """The repository as a folder of links, with a study of one pretraining."""
    for name in ("Snakefile", "workflow", "profiles", "config", "aps"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "interrupted.yaml").write_text(STUDY)
    return folder


@contextmanager
def snakemake(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`snakemake pretrain`, as it is typed; whatever it started is gone at the end of the block."""
    command = [sys.executable, "-m", "snakemake", "pretrain", "--cores", "1", "--configfile", "interrupted.yaml"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": "none", "APS_DEVICE": "cpu"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for child in psutil.process_iter():
            try:
                if os.getsid(child.pid) == process.pid:
                    child.kill()
            except (psutil.Error, ProcessLookupError, PermissionError):
                continue
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def saved(folder: Path) -> int:
    """Batches that the newest checkpoint holds."""
    files = (folder / "results/runs/pretrain").glob("*/state-*.pt")
    return max((int(file.stem.removeprefix("state-")) for file in files), default=0)


def wait_for_progress(folder: Path, process: subprocess.Popen[str]) -> int:
    """Waits for a checkpoint newer than the ones that were there -> the stage's process."""
    before, until = saved(folder), time.monotonic() + PATIENCE
    while saved(folder) <= before:
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"no checkpoint after {before} batches: {process.communicate()[0]}")
        time.sleep(0.02)
    (mark,) = (folder / "results/runs/pretrain").glob("*/attempt.json")
    return int(json.loads(mark.read_text())["pid"])


def finish(folder: Path) -> str:
    """The same command to its end -> its output."""
    with snakemake(folder) as process:
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output
    return output


def encoder(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "results/interrupted/one/seed0/pretrain/encoder.safetensors")


def first_batch(output: str) -> int:
    found = re.search(rf"(\d+)/{BATCHES} batches", output)
    assert found is not None, output
    return int(found.group(1))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = checkout(tmp_path_factory.mktemp("undisturbed"))
    finish(folder)
    return encoder(folder)


def test_ctrl_c_and_kills_of_the_stage_and_of_snakemake_lose_nothing_but_time(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    folder = checkout(tmp_path)

    with snakemake(folder) as process:  # Ctrl-C: the terminal sends it to the whole group
        wait_for_progress(folder, process)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode != 0
        assert f"of {BATCHES} batches; run it again to go on" in output

    with snakemake(folder) as process:  # SIGTERM to the group, as a service manager does
        wait_for_progress(folder, process)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode != 0
        assert f"of {BATCHES} batches; run it again to go on" in output

    with snakemake(folder) as process:  # the stage alone, as the kernel does when memory is short
        os.kill(wait_for_progress(folder, process), signal.SIGKILL)
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode != 0
        assert "killed by SIGKILL, most often for its memory" in output
        assert "results/interrupted/logs/one/seed0/pretrain.log" in output

    with snakemake(folder) as process:  # everything at once, as a power cut does
        wait_for_progress(folder, process)
        os.killpg(process.pid, signal.SIGKILL)

    done = saved(folder)
    assert 0 < done < BATCHES
    output = finish(folder)
    assert first_batch(output) >= done
    assert "was ended from outside; going on from its last checkpoint" in output
    resumed = encoder(folder)
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


def test_a_stage_that_outlived_its_snakemake_is_not_started_twice(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    with snakemake(folder) as first:
        stage = wait_for_progress(folder, first)
        os.kill(stage, signal.SIGSTOP)  # so that it does not end meanwhile
        first.kill()
        with snakemake(folder) as second:
            output = second.communicate(timeout=PATIENCE)[0]
            assert second.returncode != 0
        assert f"process {stage} is already at work in" in output
        assert psutil.pid_exists(stage)


HOLD = """
import sys
from aps.workflow.plan import Plan
plan = Plan.load(["interrupted.yaml"], {})
plan.hold_results()
print("held", flush=True)
sys.stdin.read()
"""


def test_two_snakemakes_do_not_share_a_results_folder_and_a_kill_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkout(tmp_path)
    monkeypatch.chdir(folder)
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(
            UserError, match=rf"results/interrupted: another snakemake \(process {other.pid} on .*\) works in it"
        ):
            Plan.load(["interrupted.yaml"], {}).hold_results()
        other.kill()
    Plan.load(["interrupted.yaml"], {}).hold_results()


def test_results_that_cannot_be_written_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout(tmp_path))
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(
        UserError,
        match=r"results/interrupted/.lock: cannot be written \((File exists|Not a directory)\); set another `results` folder",
    ):
        Plan.load(["interrupted.yaml"], {}).hold_results()


def workers(folder: Path) -> list[psutil.Process]:
    """The processes that torchrun started in a folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) and "TORCHELASTIC_RUN_ID" in process.environ():
                found.append(process)
    return found


def test_a_killed_run_of_two_processes_leaves_none_behind_and_goes_on_alone(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    (folder / "interrupted.yaml").write_text(STUDY.replace("{threads: 1,", "{threads: 1, processes: 2,"))
    with snakemake(folder) as process:
        wait_for_progress(folder, process)
        alive = workers(folder)
        assert len(alive) == 2 and not any(os.getsid(x.pid) == process.pid for x in alive), (
            "no kill of the group reaches them"
        )
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert psutil.wait_procs(alive, timeout=30)[1] == []
    output = finish(folder)
    assert first_batch(output) > 1
    lines = (folder / "results/interrupted/one/seed0/pretrain/history.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 4 * BATCHES
