"""The loop by itself: its order, what a killed run's journal holds, and who may stop it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small

from aps.errors import Preempted, UserError
from aps.results import StageJob, StageRun, read_history
from aps.training import loop as loop_module
from aps.training.loop import Loop, finite


class Counter:
    """Learns nothing; says what was asked of it. An epoch has three batches."""

    note = ""

    def __init__(self, killed_at: int | None = None) -> None:
        self.killed_at, self.asked, self.sum = killed_at, [], 0  # type: ignore[var-annotated]

    def batches(self, epoch: int, first: int) -> Iterator[int]:
        self.asked.append(f"epoch {epoch} from {first}")
        return iter(range(3 * epoch + first, 3 * epoch + 3))

    def close(self) -> None:
        self.asked.append("closed")

    def step(self, batch: int, done: int) -> None:
        assert batch == done
        if done == self.killed_at:
            raise SystemExit("killed")
        self.sum += batch
        self.asked.append(f"step {batch}")

    def lines(self, done: int) -> Iterator[dict[str, float]]:
        yield {"sum": self.sum}
        self.asked.append(f"logged {done}")
        if done % 3 == 0:
            yield {"epoch": done // 3}

    def state_dict(self) -> dict[str, Any]:
        self.asked.append("saved")
        return {"sum": self.sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum = state["sum"]


def go(job: StageJob, learner: Counter) -> Loop:
    with StageRun(job) as stage:
        loop = Loop(job, stage, small.ONE, learner.state_dict, learner.load_state_dict, total=6, images=1, steps=2)
        loop.train(learner, 3)
        loop.log_end(score=1.0)
        loop.log_end(score=1.0)
        return loop


@pytest.fixture
def job(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageJob:
    monkeypatch.setattr(loop_module, "stop_requested", lambda distributed: False)
    return small.job("finetune", digits, tmp_path)


def lines(job: StageJob) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_history(job.checkpoints / "history.jsonl")]


WHOLE = [
    {"step": 2, "sum": 0},
    {"step": 4, "sum": 1},
    {"step": 6, "sum": 3},
    {"step": 6, "epoch": 1},
    {"step": 8, "sum": 6},
    {"step": 10, "sum": 10},
    {"step": 12, "sum": 15},
    {"step": 12, "epoch": 2},
    {"step": 12, "score": 1.0},
]


def test_a_batch_is_trained_then_logged_then_saved_and_the_last_is_always_saved(job: StageJob) -> None:
    learner = Counter()
    go(job, learner)
    assert lines(job) == WHOLE
    steps = [entry for i in range(6) for entry in (f"step {i}", f"logged {i + 1}")]
    expected = ["epoch 0 from 0", *steps[:6], "epoch 1 from 0", *steps[6:], "saved", "closed"]
    assert learner.asked == expected


def test_a_run_killed_without_a_checkpoint_starts_over_and_leaves_no_line_twice(job: StageJob) -> None:
    with pytest.raises(SystemExit):
        go(job, Counter(killed_at=4))
    assert len(lines(job)) == 5
    assert not go(job, Counter()).resumed
    assert lines(job) == WHOLE


def test_a_run_killed_after_a_checkpoint_goes_on_from_it(job: StageJob, monkeypatch: pytest.MonkeyPatch) -> None:
    dues = iter([False, True, *[False] * 20])
    monkeypatch.setattr(loop_module.Checkpoints, "due", lambda self: next(dues))
    with pytest.raises(SystemExit):
        go(job, Counter(killed_at=4))
    learner = Counter()
    assert go(job, learner).resumed
    assert learner.asked[:2] == ["epoch 0 from 2", "step 2"]
    assert lines(job) == WHOLE


def test_a_run_killed_while_it_finishes_trains_no_more_and_logs_its_end_once(job: StageJob) -> None:
    go(job, Counter())
    learner = Counter()
    go(job, learner)
    assert learner.asked == ["closed"] and learner.sum == 15
    assert lines(job) == WHOLE


def test_asked_to_stop_it_logs_then_saves_then_says_where_it_stands(
    job: StageJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(loop_module, "stop_requested", lambda distributed: next(answers))
    learner = Counter()
    with pytest.raises(Preempted, match="after 3 of 6 batches; run it again to go on"):
        go(job, learner)
    assert learner.asked[-3:] == ["logged 3", "saved", "closed"] and lines(job) == WHOLE[:4]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_ends_in_one_sentence(loss: float) -> None:
    assert finite(0.5, "detection", "detection") == 0.5
    with pytest.raises(
        UserError, match=f"^the pretraining loss became {loss}; lower pretrain.lr, or set pretrain.precision: fp32$"
    ):
        finite(loss, "pretraining", "pretrain")
