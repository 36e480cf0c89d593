"""Schedules against the formulas of the papers and against timm's scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from aps.methods.aps import APS as METHOD
from aps.settings.blocks import FinetuneSettings
from aps.training.schedule import cosine, finetuning_lr, pretraining_lr, scaled_lr


def test_learning_rates_scale_with_the_batch() -> None:
    assert scaled_lr(1e-3, 512, 256) == 2e-3  # pretraining: lr = base * B / 256
    assert scaled_lr(2e-3, 128, 512) == 5e-4  # finetuning: lr = base * B / 512


@pytest.mark.parametrize("epochs", [100, 1600, 3200])
def test_the_release_schedule_is_its_formula_and_constant_through_an_epoch(epochs: int) -> None:
    settings = METHOD.Settings(epochs=epochs, lr=1e-3, batch_size=512, warmup_epochs=20)
    steps = 97
    for e in range(epochs):
        expected = 2e-3 * min((e + 1) / 20, (1 + math.cos(math.pi * e / epochs)) / 2)
        assert pretraining_lr(settings, e * steps, steps) == pytest.approx(expected, rel=1e-12)
        assert pretraining_lr(settings, (e + 1) * steps - 1, steps) == pretraining_lr(settings, e * steps, steps)


def test_the_release_schedule_warms_up_from_a_twentieth() -> None:
    settings = METHOD.Settings(epochs=1600, lr=1e-3, batch_size=512)
    assert [pretraining_lr(settings, e, 1) / 2e-3 for e in (0, 9)] == pytest.approx([0.05, 0.5])
    # the cosine is already below 1 when the warmup ends: the largest factor is not 1
    assert max(pretraining_lr(settings, e, 1) for e in range(1600)) < 2e-3


def test_without_warmup_the_release_schedule_is_the_cosine() -> None:
    settings = METHOD.Settings(epochs=10, warmup_epochs=0)
    assert [pretraining_lr(settings, e, 1) / 2e-3 for e in range(10)] == pytest.approx(
        [cosine(e / 10) for e in range(10)]
    )


def test_the_cosine_schedule_moves_each_step_and_ends_near_zero() -> None:
    settings = METHOD.Settings(epochs=10, lr=1.5e-4, batch_size=4096, warmup_epochs=4, schedule="cosine")
    peak, steps = 1.5e-4 * 4096 / 256, 5
    rates = [pretraining_lr(settings, step, steps) for step in range(50)]
    assert rates[:20] == pytest.approx([peak * step / 20 for step in range(20)])
    assert rates[20:] == pytest.approx([peak * (1 + math.cos(math.pi * (s - 20) / 30)) / 2 for s in range(20, 50)])
    assert rates[20] == max(rates) == peak and rates[-1] < 0.01 * peak


@pytest.mark.parametrize("warmup", [0, 5])
def test_finetuning_follows_timms_cosine_scheduler(warmup: int) -> None:
    settings = FinetuneSettings(warmup_epochs=warmup)
    peak = 2e-3 * 128 / 512
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = CosineLRScheduler(optimizer, t_initial=100, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6)
    for epoch in range(100):
        scheduler.step(epoch)
        assert finetuning_lr(settings, epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), epoch


def test_finetuning_starts_at_the_warmup_rate_and_ends_near_the_least() -> None:
    settings = FinetuneSettings()
    assert finetuning_lr(settings, 0) == 1e-6
    assert 1e-5 < finetuning_lr(settings, 99) < 1.1e-5 + 2e-7
