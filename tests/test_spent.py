"""What a run cost: an operation count that fails is left out, and said."""

from __future__ import annotations

import json
import subprocess
import sys
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
from aps.spent import Memory, larger, peaks, spent


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


class Machine:
    """A process whose memory's peak only rises, and a GPU's allocator, which can start its peak anew; gigabytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.highest, self.allocated = 0.0, 0.0
        cuda = SimpleNamespace(
            is_initialized=lambda: True,
            max_memory_allocated=lambda: self.allocated * 1e9,
            reset_peak_memory_stats=lambda: setattr(self, "allocated", 0.0),
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(module, "high_water", lambda: self.highest * 1e9)

    def work(self, process: float, gpu: float) -> None:
        self.highest, self.allocated = max(self.highest, process), max(self.allocated, gpu)


def test_a_peak_is_not_that_of_the_process_that_started_it() -> None:
    """The system's own record of a new process begins with the memory of the one that starts it."""
    large = b"x" * 600_000_000
    code = "from aps.spent import peaks; print(peaks()['peak_memory_gb'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(run.stdout) < 0.3 and len(large) / 1e9 == 0.6


def test_what_is_done_aside_is_in_no_peak_of_the_process_or_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, memory = Machine(monkeypatch), Memory()

    def found() -> list[float]:
        return [pytest.approx(memory.peaks()[key]) for key in ("peak_memory_gb", "peak_gpu_gb")]

    machine.work(1.0, 2.0)
    with memory.aside():
        machine.work(1.5, 5.0)
    assert found() == [1.0, 2.0]
    machine.work(1.4, 1.9)  # in what the reading left to the process
    assert found() == [1.0, 2.0]
    machine.work(1.7, 3.0)
    assert found() == [1.2, 3.0]
    with pytest.raises(KeyError), memory.aside():
        machine.work(2.7, 9.0)
        raise KeyError
    assert found() == [1.2, 3.0]
    with memory.aside():
        machine.work(2.0, 4.0)
    machine.work(2.8, 3.5)
    assert found() == [1.3, 3.5]


def test_where_the_peak_starts_anew_growth_within_what_was_done_aside_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a reading went back to the system, and training took as much later."""
    machine, memory = Machine(monkeypatch), Memory()

    def reset(text: str) -> None:
        assert text == "5"
        machine.highest = 1.0

    monkeypatch.setattr(module, "RESET", SimpleNamespace(write_text=reset))
    machine.work(1.0, 0.0)
    with memory.aside():
        machine.work(3.0, 0.0)
    assert memory.peaks()["peak_memory_gb"] == pytest.approx(1.0)
    machine.work(2.9, 0.0)
    assert memory.peaks()["peak_memory_gb"] == pytest.approx(2.9)


def test_a_run_keeps_the_larger_peak_of_its_attempts_whatever_was_done_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, job = Machine(monkeypatch), fake_job(tmp_path / "results")
    monkeypatch.setattr(results, "hardware", lambda: {"cpu": "a CPU", "processes": 1})
    for steps in (1.0, 0.8):
        machine.highest = machine.allocated = 0.0  # a process of its own
        with StageRun(job) as stage:
            machine.work(steps, steps)
            with stage.memory.aside():
                machine.work(3.0, 3.0)
            stage.save_clock()
            if steps == 0.8:
                stage.finish({"knn_top1": 50.0})
    cost = read_json(job.out / "metrics.json")["cost"]
    assert (cost["peak_memory_gb"], cost["peak_gpu_gb"]) == (1.0, 1.0)


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
