"""What a run cost: an operation count that fails is left out, and said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_study import fake_job

from aps import results
from aps import spent as module
from aps.cost import Counts
from aps.errors import UserError
from aps.files import read_json
from aps.results import StageRun
from aps.settings.reading import load_study
from aps.spent import larger, peaks, spent


@pytest.mark.parametrize(
    ("error", "flops", "said"),
    [
        (None, 7e9, ""),
        (UserError("the budget is in minutes"), 5e9, ""),
        (
            RuntimeError("DataLoader worker (pid 7)\nis killed"),
            None,
            "RuntimeError: DataLoader worker (pid 7) is killed",
        ),
    ],
)
def test_operations_are_those_of_the_settings_or_of_the_run_or_left_out_with_a_word(
    error: Exception | None,
    flops: float | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cost(settings: Any, counts: Any) -> Any:
        if error is not None:
            raise error
        return SimpleNamespace(flops=7e9)

    monkeypatch.setattr(module, "resolve", lambda path: cost)
    (tmp_path / "study.yaml").write_text("study: s\nexperiments: {e: {dataset: digits}}")
    settings = load_study([tmp_path / "study.yaml"]).stage_settings("e", 0, "pretrain")
    found = spent(settings, Counts(10, 10, 10, 0), 1.0, {"processes": 1}, {}, flops=5e9)
    assert found.get("flops") == flops
    assert said in capsys.readouterr().err


def test_memory_is_the_largest_of_all_attempts_and_of_the_pretraining(tmp_path: Path) -> None:
    assert larger({"peak_memory_gb": 2.0}, {"peak_memory_gb": 1.0, "peak_gpu_gb": 3.0}) == {
        "peak_gpu_gb": 3.0,
        "peak_memory_gb": 2.0,
    }
    job = fake_job(tmp_path / "results")
    with StageRun(job) as stage:
        stage.save_clock()
    state = json.loads((job.checkpoints / "run.json").read_text())
    assert state["peaks"]["peak_memory_gb"] == pytest.approx(peaks()["peak_memory_gb"])
    state["peaks"]["peak_memory_gb"] = 1e6  # an attempt before this one, with more images in memory
    (job.checkpoints / "run.json").write_text(json.dumps(state))
    with StageRun(job) as stage:
        stage.finish({"knn_top1": 50.0})
    assert read_json(job.out / "metrics.json")["cost"]["peak_memory_gb"] == 1e6


@pytest.mark.parametrize("before", [None, 8])
def test_gpu_hours_are_those_of_the_processes_that_each_attempt_had(
    before: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten hours on eight GPUs, then the rest on one."""
    monkeypatch.setattr(results, "hardware", lambda: {"gpu": "H100", "processes": 1})
    job, attempts = fake_job(tmp_path / "results"), [36_000.0 * world for world in (before or 1, 1)]
    with StageRun(job) as stage:
        stage.save_clock()
    file = job.checkpoints / "run.json"
    state = json.loads(file.read_text()) | {"seconds": 36_000.0, "process_seconds": attempts[0]}
    if before is None:
        del state["process_seconds"]  # as an earlier version wrote it
    file.write_text(json.dumps(state))
    with StageRun(job) as stage:
        stage._start -= 36_000.0
        stage.finish({"knn_top1": 50.0})
    cost = read_json(job.out / "metrics.json")["cost"]
    assert cost["seconds"] == pytest.approx(72_000, rel=1e-3)
    assert cost["gpu_hours"] == pytest.approx(sum(attempts) / 3600, rel=1e-3)
    assert json.loads(file.read_text())["process_seconds"] == pytest.approx(sum(attempts), rel=1e-3)
