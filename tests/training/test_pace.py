"""How long a run is, by epochs, operations or the clock, and that its schedule takes the same way whatever its length."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import ValidationError

from aps.cost import Counts
from aps.errors import UserError
from aps.runtime.processes import Distributed
from aps.seals import read_metrics
from aps.settings.blocks import BudgetSettings, SamplingSettings
from aps.settings.reading import load_study
from aps.training import meter as meter_module
from aps.training import pace as pace_module
from aps.training import pretrain
from aps.training.cost import pretrain as pretrain_cost
from aps.training.cost import step_flops
from aps.training.meter import Meter
from aps.training.pace import Pace
from aps.training.pretrain import Trainer
from aps.training.schedule import pretraining_lr

# 100 images in batches of 32 are 3 batches an epoch, of T = 4 steps each.


def settings(digits: Path, tmp_path: Path, **own: Any) -> Any:
    return small.job("pretrain", digits, tmp_path, **own).settings


def test_without_a_budget_it_is_so_many_epochs(digits: Path, tmp_path: Path) -> None:
    run = settings(digits, tmp_path, epochs=7)
    pace = Pace(run, 3, 4, small.ONE)
    assert pace.total == 21
    for step in range(84):
        assert pretraining_lr(run.pretrain, pace.epoch(step), 1) == pretraining_lr(run.pretrain, step, 12)
        assert pace.progress(step) == step / 84


@pytest.mark.parametrize("batches", [1, 5, 50])
@pytest.mark.parametrize("schedule", ["cosine", "release"])
def test_operations_are_whole_batches_on_the_same_way(
    batches: int, schedule: str, digits: Path, tmp_path: Path
) -> None:
    """E = 10 epochs, 4 of them warmup: whatever the budget, the rate has its peak after 40 % of the run."""
    own = {"epochs": 10, "warmup_epochs": 4, "schedule": schedule}
    flops = (batches + 0.9) * 4 * step_flops(settings(digits, tmp_path))
    run = settings(digits, tmp_path, budget=BudgetSettings(flops=flops), **own)
    pace = Pace(run, 3, 4, small.ONE)
    assert pace.total == batches
    for step in range(4 * batches):
        share = step / (4 * batches)
        expected = pretraining_lr(run.pretrain, share * 10, 1)
        assert pretraining_lr(run.pretrain, pace.epoch(step), 1) == expected
        assert pace.progress(step) == share
    assert pace.so_far(batches)["flops"] <= flops < pace.so_far(batches + 1)["flops"]


def test_a_run_of_operations_ends_in_mid_epoch_and_says_what_it_was(digits: Path, tmp_path: Path) -> None:
    step = step_flops(settings(digits, tmp_path))
    job = small.job("pretrain", digits, tmp_path, budget=BudgetSettings(flops=4 * 5 * step), knn_every=1)
    metrics, history = small.run(job), small.history(job)
    assert metrics["steps"] == 20 and metrics["epochs"] == 5 / 3 and metrics["flops"] == 20 * step
    assert [(line["step"], "loss" in line) for line in history] == [(12, True), (12, False), (20, True), (20, False)]
    assert all(line["flops"] == line["step"] * step for line in history)
    assert "knn_train_top1" in history[1] and "knn_train_top1" in history[3]
    times = [line["seconds"] for line in read(job)]
    assert times == sorted(times) and times[0] > 0


def test_the_time_of_knn_readings_is_no_step_s_and_no_cost(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, monitor = [], pretrain.monitor
    monkeypatch.setattr(pretrain, "monitor", lambda *a: (time.sleep(1), seen.append(1), monitor(*a))[2])
    job = small.job("pretrain", digits, tmp_path, epochs=3, knn_every=1)
    small.run(job)
    result, lines = read_metrics(job.out / "metrics.json"), [line for line in read(job) if "step_ms" in line]
    metrics = result["metrics"]
    assert len(seen) == 3 and metrics["reading_seconds"] > 3
    assert metrics["images_per_second"] == pytest.approx(3 * 96 / metrics["seconds"])
    assert result["cost"]["seconds"] == pytest.approx(result["wall_seconds"] - metrics["reading_seconds"], abs=0.02)
    assert sum(12 * line["step_ms"] / 1000 for line in lines) <= metrics["seconds"] + 0.5


RUN = """
import json, sys
sys.path[:0] = {path!r}
from pathlib import Path
import aps.spent, small
if not {anew}:
    aps.spent.RESET = Path({folder!r}) / "none"
from aps.seals import read_metrics
from aps.settings.blocks import DatasetSettings, SamplingSettings
images, encoder = DatasetSettings(name="digits", train_limit=256), small.ENCODER
encoder = encoder.model_copy(update={{"dim": 96, "depth": 1, "image_size": 32, "patch_size": 2}})  # N = 256, of which 64 are kept
job = small.job("pretrain", Path({digits!r}), Path({folder!r}), dataset=images, encoder=encoder,
    sampling=SamplingSettings(samplings=1), batch_size=16, knn_every={every})
small.run(job)
print(json.dumps([read_metrics(job.out / "metrics.json")["cost"]["peak_memory_gb"], aps.spent.high_water() / 1e9]))
"""


def test_the_memory_of_knn_readings_is_no_step_s_and_no_cost(digits: Path, tmp_path: Path) -> None:
    """A reading has all tokens of 256 images, a step a quarter of those of 16. Each run is a process, whose peak only rises."""

    def peaks(every: int, anew: bool) -> tuple[float, float]:
        folder = str(tmp_path / f"every{every}{anew}")
        code = RUN.format(path=sys.path, digits=str(digits), folder=folder, every=every, anew=anew)
        run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        cost, process = json.loads(run.stdout.splitlines()[-1])
        return cost, process

    without, _ = peaks(0, anew=False)
    often, process = peaks(1, anew=False)
    assert process > without + 0.15  # the reading did need more
    assert often == pytest.approx(without, abs=0.04)
    assert peaks(1, anew=True)[0] == pytest.approx(without, abs=0.04)  # where the system can start the peak anew


def test_the_clock_of_the_steps_goes_on_after_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    figures = {"loss": torch.ones(())}

    def work(meter: Meter, start: float) -> None:
        """Four steps of 2 seconds each, a quarter of them waiting."""
        now[0] = start
        for _ in range(4):
            meter.fetch(iter(Slow(now, 0.5)))
            now[0] += 1.5
            meter.add(figures)

    first, second = Meter(small.ONE, "it"), Meter(small.ONE, "it")
    now[0] = 50.0  # between making it and the first batch
    work(first, 100.0)
    state = first.state_dict()
    now[0] = 900.0
    second.load_state_dict(state)
    work(second, 900.0)
    with second.stopped():
        now[0] += 70
    assert second.read() == {"loss": 1.0, "step_ms": 2000.0, "input_share": 0.25}


class Slow:
    """Batches that take `seconds` of the clock `now`."""

    def __init__(self, now: list[float], seconds: float) -> None:
        self.now, self.seconds = now, seconds

    def __iter__(self) -> Any:
        self.now[0] += self.seconds
        yield None


def read(job: Any) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "CLOCK", set())
        return small.history(job)


def test_equal_operations_are_more_steps_of_a_cheaper_method(digits: Path, tmp_path: Path) -> None:
    found = {}
    for method in ("mae", "simclr", "dino"):
        job = small.job("pretrain", digits, tmp_path, method, budget=BudgetSettings(flops=3e9))
        pace = Pace(job.settings, 3, 1, small.ONE)
        found[method] = pace.total
        assert 3e9 - pace.so_far(1)["flops"] < pace.so_far(pace.total)["flops"] <= 3e9
    assert found["mae"] > found["simclr"] > found["dino"] > 1


def test_a_stopped_run_of_operations_ends_as_if_undisturbed(digits: Path, tmp_path: Path) -> None:
    budget = BudgetSettings(flops=4 * 5 * step_flops(settings(digits, tmp_path)))
    whole, stopped = (small.job("pretrain", digits, tmp_path / n, budget=budget, knn_every=1) for n in "ab")
    small.run(stopped, stop_after=4)
    assert small.run(stopped) == small.run(whole)
    assert small.history(stopped) == small.history(whole)


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Each optimizer step takes a second, each kNN reading 1,000."""
    clock, step, monitor = Clock(), Trainer.step, pretrain.monitor

    def later(seconds: float, result: Any) -> Any:
        clock.now += seconds
        return result

    monkeypatch.setattr(pace_module, "time", clock)
    monkeypatch.setattr(Trainer, "step", lambda self, *given: later(1, step(self, *given)))
    monkeypatch.setattr(pretrain, "monitor", lambda *given: later(1000, monitor(*given)))
    return clock


@pytest.mark.parametrize("kill", [None, 3, 4])
def test_readings_at_equal_shares_are_at_the_same_operations_for_every_method(
    kill: int | None, digits: Path, tmp_path: Path
) -> None:
    """MAE has 20 batches in this budget, the others 5, of three an epoch."""
    read_at, flops = {}, 6e8
    for method in ("mae", "aps", "simclr"):
        own = {"budget": BudgetSettings(flops=flops), "knn_readings": 3}
        job = small.job("pretrain", digits, tmp_path / method, method, **own)
        if kill:
            small.run(
                job, stop_after=min(kill, Pace(job.settings, 3, METHOD_STEPS.get(method, 1), small.ONE).total - 1)
            )
        small.run(job)
        lines = small.history(job)
        read_at[method] = [line["flops"] for line in lines if "knn_train_top1" in line]
        batch = lines[0]["flops"] / lines[0]["step"] * METHOD_STEPS.get(method, 1)
        for part, done in enumerate(read_at[method], 1):
            assert -1 <= done - part / 3 * lines[-1]["flops"] < batch, method
    assert {len(readings) for readings in read_at.values()} == {3}, read_at


METHOD_STEPS = {"aps": 4}  # optimizer steps of a batch
MINUTES = {"budget": BudgetSettings(minutes=0.5), "epochs": 10, "warmup_epochs": 0, "schedule": "cosine"}


def test_minutes_end_by_the_clock_which_the_schedule_follows(digits: Path, tmp_path: Path, clock: Clock) -> None:
    """30 s of batches of 4 s: the eighth ends after 32 s. kNN readings are not training."""
    job = small.job("pretrain", digits, tmp_path, knn_every=1, **MINUTES)
    metrics = small.run(job)
    assert metrics["steps"] == 32 and metrics["epochs"] == 8 / 3
    lines = [line for line in read(job) if "loss" in line]
    assert [line["seconds"] for line in lines] == [12, 24, 32]
    began = [8, 20, 28]  # a batch has the rate of the moment at which it began
    peak = job.settings.pretrain.lr * 32 / 256
    expected = [pretraining_lr(job.settings.pretrain, 10 * second / 30, 1) for second in began]
    assert [line["lr"] for line in lines] == pytest.approx(expected) and expected[2] < 0.05 * peak
    assert metrics["flops"] == 32 * step_flops(job.settings)


def test_the_clock_of_a_stopped_run_goes_on(digits: Path, tmp_path: Path, clock: Clock) -> None:
    job = small.job("pretrain", digits, tmp_path, knn_every=1, **MINUTES)
    small.run(job, stop_after=5)
    clock.now += 5000
    assert small.run(job)["steps"] == 32
    assert [line["seconds"] for line in read(job) if "loss" in line] == [12, 24, 32]


@pytest.mark.parametrize("kill", [None, 3, 4])
def test_readings_at_equal_shares_of_the_minutes(kill: int | None, digits: Path, tmp_path: Path, clock: Clock) -> None:
    """Batches of 4 s, thirds of 10 s: the first to end in each is the third, the fifth and the eighth."""
    job = small.job("pretrain", digits, tmp_path, knn_readings=3, **MINUTES)
    if kill:
        small.run(job, stop_after=kill)
    small.run(job)
    assert [line["seconds"] for line in read(job) if "knn_train_top1" in line] == [12, 20, 32]


def test_a_run_of_minutes_may_be_a_single_batch(digits: Path, tmp_path: Path, clock: Clock) -> None:
    own = {**MINUTES, "budget": BudgetSettings(minutes=0.01)}
    assert small.run(small.job("pretrain", digits, tmp_path, **own))["steps"] == 4


def test_minutes_leave_a_gpu_its_last_batch_in_the_queue(
    digits: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for each batch only after the next one was queued, and never for the whole device."""
    waited, made = [], []

    class Event:
        def record(self) -> None:
            made.append(self)

        def synchronize(self) -> None:
            waited.append(made.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = Pace(settings(digits, tmp_path, **MINUTES), 3, 4, Distributed(0, 1, torch.device("cuda", 0)))
    pace.start()
    for done in range(1, 4):
        clock.now += 5
        pace.batch_done(done)
        assert len(made) == done and waited == list(range(done - 1))
    assert pace.progress(12) == 0.5 and pace.total == 6


def agree(rank: int, folder: Path, run: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    clock = Clock()
    pace_module.time = clock  # type: ignore[assignment]
    pace = Pace(run, 3, 4, Distributed(rank, 2, torch.device("cpu")))
    pace.start()
    found = []
    for done in range(1, 4):
        clock.now += 5 + 3 * rank  # another clock in each process
        pace.batch_done(done)
        found.append((pace.progress(4 * done), pace.total))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_go_by_one_clock(digits: Path, tmp_path: Path) -> None:
    run = settings(digits, tmp_path, **MINUTES)
    mp.spawn(agree, (tmp_path, run), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one == other == [(5 / 30, 6), (10 / 30, 6), (15 / 30, 6)]


def test_mistakes_are_one_sentence(digits: Path, tmp_path: Path) -> None:
    job = small.job("pretrain", digits, tmp_path, budget=BudgetSettings(flops=1000))
    for refused in (lambda: small.run(job), lambda: pretrain_cost(job.settings, Counts(100, 10, 10, 0.0))):
        with pytest.raises(
            UserError, match=r"pretrain.budget.flops 1000 is less than the 1.174e\+08 operations of one batch"
        ):
            refused()
    for both in ({}, {"flops": 1.0, "minutes": 1.0}):
        with pytest.raises(ValidationError, match=r"budget is \{flops: ...\} or \{minutes: ...\}, one of the two"):
            BudgetSettings(**both)
    with pytest.raises(UserError, match=r"experiment 'e': pretrain.budget(.flops)? = ") as error:
        load_study([], {"experiments": {"e": {"dataset": "digits", "pretrain": {"budget": {"flops": -1}}}}})
    assert len(str(error.value).splitlines()) == 1


def test_a_step_that_cannot_be_counted_is_trained_and_said(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(settings: Any) -> float:
        raise UserError("the step of method x can't be counted")

    monkeypatch.setattr(pace_module, "step_flops", unknown)
    job = small.job("pretrain", digits, tmp_path)
    assert "flops" not in small.run(job) and all("flops" not in line for line in small.history(job))
    assert re.search(
        "no operations in this run's journal: the step of method x can't be counted", capsys.readouterr().err
    )
    with pytest.raises(UserError, match="can't be counted"):
        small.run(small.job("pretrain", digits, tmp_path / "b", budget=BudgetSettings(flops=1e9)))


@pytest.mark.parametrize("budget", [{"flops": 6e7}, {"minutes": 1e-9}, None])
def test_a_run_of_one_step_at_a_learning_rate_of_0_ends_in_a_sentence(
    budget: dict[str, float] | None, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: dict[str, Any] = {"schedule": "cosine", "epochs": 10 if budget else 1, "batch_size": 64}
    own |= {"sampling": SamplingSettings(samplings=1), "budget": BudgetSettings(**budget) if budget else None}
    job = small.job("pretrain", digits, tmp_path, **own)
    words = "leaves only the start of pretrain.warmup_epochs 1, where the learning rate is 0 instead of 0.00025; raise"
    with pytest.raises(UserError, match=rf"pretrain.{'budget' if budget else 'epochs'} {words}"):
        small.run(job)
    assert not (job.out / "metrics.json").exists()
    low = own | {"schedule": "release", "warmup_epochs": 11}
    assert small.run(small.job("pretrain", digits, tmp_path / "low", **low))["steps"] == 1
    assert "where the learning rate is 2.27e-05 instead of 0.00025" in capsys.readouterr().err


def test_the_estimate_knows_budgets(digits: Path, tmp_path: Path) -> None:
    counts, step = Counts(100, 10, 10, 0.0), step_flops(settings(digits, tmp_path))
    assert pretrain_cost(settings(digits, tmp_path, epochs=7), counts).flops == 7 * 3 * 4 * step
    budget = BudgetSettings(flops=4 * 5.5 * step)
    assert pretrain_cost(settings(digits, tmp_path, budget=budget), counts).flops == 4 * 5 * step
    with pytest.raises(UserError, match=r"pretrain.budget.minutes 0.5 is as many operations as the machine makes"):
        pretrain_cost(settings(digits, tmp_path, **MINUTES), counts)
