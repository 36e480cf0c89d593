"""A stage that is stopped or killed anywhere ends with the weights, metrics and journal of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small
from safetensors.torch import load_file

from aps.registry import METHODS
from aps.results import StageJob
from aps.stages import STAGES

# 100 images in batches of 32 are 3 batches an epoch; 90 are 2.
# Stops in an epoch, at an epoch's end, after the last batch.
PRETRAINING = {f"pretrain {method}": (1, 3, 6) for method in METHODS.names()}
STOPS = {**PRETRAINING, "finetune": (1, 2, 6), "linear_probe": (1, 2, 4)}


def few(name: str, digits: Path, folder: Path) -> StageJob:
    """name: of a stage, or `pretrain METHOD`."""
    stage, _, method = name.partition(" ")
    return small.job(stage, digits, folder, method, **({"knn_every": 1} if method else {}))


def left(job: StageJob) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    weights = [name for name in STAGES[job.settings.stage].files if name.endswith(".safetensors")]
    tensors = {f"{file}: {name}": t for file in weights for name, t in load_file(job.out / file).items()}
    return small.history(job), small.metrics(job), tensors


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Any] = {}

    def result(name: str) -> Any:
        if name not in found:
            job = few(name, digits, tmp_path_factory.mktemp("undisturbed"))
            small.run(job)
            found[name] = left(job)
        return found[name]

    return result


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in STOPS.items() for place in places])
def test_stopped_after_any_batch_it_ends_as_if_undisturbed(
    name: str, place: int, digits: Path, tmp_path: Path, undisturbed: Any
) -> None:
    job = few(name, digits, tmp_path)
    small.run(job, stop_after=place)
    assert not job.out.exists()
    small.run(job)
    history, metrics, tensors = undisturbed(name)
    resumed = left(job)
    assert resumed[0] == history and len(history) > 1
    assert resumed[1] == metrics
    assert small.same(resumed[2], tensors)


@pytest.mark.parametrize("stage", ["finetune", "linear_probe"])
def test_killed_while_it_evaluates_it_only_evaluates_again(
    stage: str, digits: Path, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = few(stage, digits, tmp_path)
    load = small.module(stage).load_split

    def killed(manifest: Path, split: str, *limit: int | None, **more: Any) -> Any:
        if split == "test":
            raise SystemExit("killed")
        return load(manifest, split, *limit, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(small.module(stage), "load_split", killed)
        small.run(job)
    small.run(job)
    history, metrics, tensors = undisturbed(stage)
    resumed = left(job)
    assert resumed[:2] == (history, metrics) and small.same(resumed[2], tensors)


def start(job: StageJob) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "aps", "pretrain", "--settings", job.settings.to_json()]
    command += ["--manifest", str(job.manifest), "--results", str(job.out.parent), "--out", str(job.out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--checkpoint-minutes", "0.00001"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_killed_in_mid_epoch_pretraining_ends_as_if_undisturbed(digits: Path, tmp_path: Path) -> None:
    """Real processes and SIGKILL; the journal already holds lines that the last checkpoint does not."""
    whole, killed = (
        small.job("pretrain", digits, tmp_path / name, epochs=30, knn_every=10) for name in ("whole", "killed")
    )
    undisturbed, process = start(whole), start(killed)
    while not any(int(file.stem.removeprefix("state-")) >= 13 for file in killed.checkpoints.glob("state-*.pt")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed.out / "metrics.json").exists()
    newest = max(killed.checkpoints.glob("state-*.pt"))
    assert 13 <= int(newest.stem.removeprefix("state-")) < 90
    again = start(killed)
    text = again.communicate()[1]
    assert again.returncode == 0, text
    assert undisturbed.communicate() and undisturbed.returncode == 0
    one, other = left(whole), left(killed)
    assert one[0] == other[0] and [line["step"] for line in one[0] if "loss" in line] == [12 * e for e in range(1, 31)]
    assert one[1] == other[1] and small.same(one[2], other[2])
