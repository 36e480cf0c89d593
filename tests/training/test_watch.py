"""A loss that is no number, and a representation in which images are all alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor

from aps.errors import UserError
from aps.journal import read_history
from aps.runtime.checkpoint import Checkpoints
from aps.runtime.processes import Distributed
from aps.training import pretrain
from aps.training.watch import Watch, collapsed, spread


def watch(device: str = "cpu", rank: int = 0) -> Watch:
    return Watch("pretraining", "pretrain", Distributed(rank, 2, torch.device(device)), Path("data/manifest.json"))


GOOD = (torch.ones(2, 3),)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_the_sentence_says_step_setting_and_the_last_finite_loss(loss: float) -> None:
    own = watch()
    own.add(torch.tensor(4.5), 6, GOOD)
    with pytest.raises(
        UserError,
        match=rf"^the pretraining loss became {loss}; lower pretrain.lr, or set pretrain.precision: fp32 \(step 8; it was 4.5 at "
        r"step 7\)$",
    ):
        own.add(torch.tensor(loss), 7, GOOD)


def test_images_that_are_no_numbers_are_blamed_instead_of_the_learning_rate() -> None:
    with pytest.raises(UserError, match=r"because images of its batch are not finite .*data/manifest.json") as error:
        watch().add(torch.tensor(math.nan), 0, (*GOOD, torch.tensor([1.0, math.nan])))
    assert "lr" not in str(error.value)


def test_images_whose_mean_and_std_are_numbers_were_broken_by_what_augments_them() -> None:
    """Pixels are bytes, so nothing else is left."""
    broken = (torch.tensor([1.0, math.inf]),)
    for block, mean, says in (
        ("pretrain", 0.5, "look at the settings `views`"),
        ("finetune", 0.5, "look at the settings `finetune`"),
        ("pretrain", math.nan, "look at the mean and std in data/manifest.json"),
    ):
        constants = (3 * (mean,), 3 * (0.2,))
        own = Watch("x", block, Distributed(0, 1, torch.device("cpu")), Path("data/manifest.json"), constants)
        with pytest.raises(UserError, match=says) as error:
            own.add(torch.tensor(math.nan), 0, broken)
        assert ("prepare the dataset" in str(error.value)) == math.isnan(mean)


def test_only_the_process_that_speaks_watches() -> None:
    watch(rank=1).add(torch.tensor(math.nan), 0, GOOD)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bad", [0, 5, 70, 200])
def test_on_a_gpu_the_step_is_told_some_steps_later_without_waiting(bad: int) -> None:
    own, step = watch("cuda"), 0
    with pytest.raises(UserError, match=rf"\(step {bad + 1}; "):
        for step in range(bad + 60):
            if step == 16:
                torch.cuda.synchronize()  # else the copies may lag behind for as long as the device does
            own.add(torch.full((), math.nan if step >= bad else 1.0, device="cuda"), step, ())
        own.check()
    assert step <= bad + 59


def stop_at(number: int, monkeypatch: pytest.MonkeyPatch, weights: bool = False) -> list[int]:
    """Pretraining whose loss, or one of its weights, becomes NaN at a step, counted from 1 -> the steps that were made."""
    steps: list[int] = []
    step = pretrain.Trainer.step

    def spoiled(self: pretrain.Trainer, *given: Any) -> dict[str, Tensor]:
        figures = step(self, *given)
        steps.append(len(steps) + 1)
        if len(steps) == number:
            if weights:
                with torch.no_grad():
                    next(self.networks.parameters()).view(-1)[0] = math.nan
            else:
                figures["loss"] = torch.tensor(math.nan)
        return figures

    monkeypatch.setattr(pretrain.Trainer, "step", spoiled)
    return steps


def test_pretraining_ends_at_the_step_whose_loss_is_no_number_and_keeps_the_state_before(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small.job("pretrain", digits, tmp_path)
    object.__setattr__(job, "checkpoint_minutes", 0.0)
    steps = stop_at(7, monkeypatch)
    with pytest.raises(UserError, match=r"became nan; lower pretrain.lr, .* \(step 7; it was [\d.]+ at step 6\)"):
        small.run(job)
    assert len(steps) == 7
    saved = Checkpoints(job.checkpoints).load()
    assert saved is not None and saved["step"] == 1  # batches of four steps
    assert all(math.isfinite(line.get("loss", 0.0)) for line in read_history(job.checkpoints / "history.jsonl"))


def test_weights_that_are_no_numbers_are_never_saved(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small.job("pretrain", digits, tmp_path)
    object.__setattr__(job, "checkpoint_minutes", 0.0)
    stop_at(8, monkeypatch, weights=True)
    with pytest.raises(UserError, match=r"after 2 batches its weights are no finite numbers; lower pretrain.lr"):
        small.run(job)
    saved = Checkpoints(job.checkpoints).load()
    assert saved is not None and saved["step"] == 1


def test_the_spread_of_features_is_that_of_matrices_whose_rank_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    even = spread(torch.eye(8).repeat(4, 1))
    assert even["effective_rank"] == pytest.approx(7) and even["dead_dimensions"] == 0  # one of 8 is their mean's
    shifted = spread(torch.eye(8).repeat(4, 1) + 100)
    assert shifted["effective_rank"] == pytest.approx(7)  # what all images share does not count
    flat = spread(torch.randn(50, 2, generator=generator) @ torch.randn(2, 16, generator=generator))
    assert 1 < flat["effective_rank"] <= 2.001
    constant = spread(torch.ones(50, 16) + 1e-6 * torch.randn(50, 16, generator=generator))
    assert constant["dead_dimensions"] == 1
    half = torch.cat([torch.randn(500, 8, generator=generator), torch.zeros(500, 8)], 1)
    assert spread(half)["dead_dimensions"] == 0.5
    assert spread(torch.zeros(5, 4))["dead_dimensions"] == 1


def test_a_collapse_is_told_and_a_good_representation_is_not() -> None:
    assert collapsed({"effective_rank": 40.0, "dead_dimensions": 0.1}) is None
    clause = collapsed({"effective_rank": 1.02, "dead_dimensions": 0.99}, 0.9999)
    assert clause == "effective rank 1.02, 99 % of the dimensions dead, positive cosine 1.000"
    assert collapsed({"effective_rank": 40.0, "dead_dimensions": 0.95}) is not None


def test_pretraining_logs_the_spread_and_warns_of_a_collapse_in_one_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = small.job("pretrain", digits, tmp_path / "good", knn_every=1)
    small.run(job)
    lines = [line for line in small.history(job) if "effective_rank" in line]
    assert len(lines) == 2 and all(2 < line["effective_rank"] <= 24 for line in lines)
    assert {"knn_train_top1", "dead_dimensions"} <= lines[0].keys()
    assert "collapsed" not in capsys.readouterr().err
    monkeypatch.setattr(pretrain, "monitor", lambda *_: spread(torch.ones(9, 24)))
    small.run(small.job("pretrain", digits, tmp_path / "bad", knn_every=2))
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert (
        len(warned) == 1 and "after 6 batches its representation has collapsed (effective rank 1.00, 100 %" in warned[0]
    )
    assert "positive cosine" in warned[0] and "lower pretrain.lr" in warned[0]


def test_a_schedule_that_is_all_warmup_is_told_before_it_trains(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a method whose default warmup is longer than a short run."""
    for warmup, count in ((1, 0), (2, 1)):
        small.run(small.job("pretrain", digits, tmp_path / str(warmup), schedule="cosine", warmup_epochs=warmup))
        told = [line for line in capsys.readouterr().err.splitlines() if "takes all of pretrain.epochs 2" in line]
        assert len(told) == count and all("lower pretrain.warmup_epochs" in line for line in told)
