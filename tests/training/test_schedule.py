"""Schedules against the formulas of the papers and against timm's scheduler."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from aps.detection.engine import lr_factor
from aps.methods.aps import APS as METHOD
from aps.settings.blocks import DetectionSettings, FinetuneSettings
from aps.training.schedule import above_peak, cosine, finetuning_lr, oddities, pretraining_lr, scaled_lr


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


RATES = st.floats(1e-9, 10)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    epochs=st.integers(1, 12),
    batch_size=st.sampled_from([2, 32, 512, 4096]),
    warmup_epochs=st.integers(0, 14),
    lr=RATES,
    min_lr=st.just(0.0) | RATES,
    warmup_lr=st.just(0.0) | RATES,
)
def test_finetunings_rate_rises_to_its_peak_and_falls_from_it_where_nothing_else_is_said(**keys: Any) -> None:
    chosen = FinetuneSettings(**keys)
    peak, warmup = scaled_lr(chosen.lr, chosen.batch_size, 512), chosen.warmup_epochs
    rates = [finetuning_lr(chosen, epoch) for epoch in range(chosen.epochs)]
    said = " ".join(oddities("finetune", chosen))
    least = 1 - 1e-9  # of a rounding error
    assert ("finetune.warmup_lr" in said) == (warmup > 0 and rates[0] > peak)
    assert ("finetune.min_lr" in said) == (len(rates) > max(1, warmup) and chosen.min_lr > peak)
    if "is above the peak" not in said:
        assert max(rates) * least <= peak
        assert all(later * least <= rate for rate, later in pairwise(rates[warmup:]))
        assert all(later >= rate * least for rate, later in pairwise(rates[:warmup]))
    if "so the learning rate rises" in said:
        assert rates[-1] > peak * least and rates[warmup:] == sorted(rates[warmup:])
    if "so the warmup lowers" in said:
        assert rates[:warmup] == sorted(rates[:warmup], reverse=True)
    if found := list(above_peak(chosen)):  # the last is to blame where training diverges
        assert getattr(chosen, found[-1]) == max(getattr(chosen, key) for key in found)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    epochs=st.integers(1, 12),
    warmup_epochs=st.integers(0, 14),
    lr=RATES,
    batch_size=st.sampled_from([2, 256, 4096]),
    schedule=st.sampled_from(["release", "cosine"]),
)
def test_pretrainings_rate_is_never_above_its_peak_and_falls_once_it_has_fallen(**keys: Any) -> None:
    chosen = METHOD.Settings(**keys)
    rates = [pretraining_lr(chosen, step, 4) for step in range(4 * chosen.epochs)]
    assert max(rates) <= scaled_lr(chosen.lr, chosen.batch_size, 256)
    highest = rates.index(max(rates))
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    iterations=st.integers(1, 40),
    warmup_iterations=st.integers(0, 50),
    lr_drops=st.lists(st.floats(0, 1), max_size=3).map(tuple),
)
def test_detections_rate_is_never_above_its_peak_and_falls_after_the_warmup(**keys: Any) -> None:
    chosen = DetectionSettings(**keys)
    rates = [lr_factor(chosen, iteration) for iteration in range(chosen.iterations)]
    assert max(rates) <= 1
    assert rates[chosen.warmup_iterations :] == sorted(rates[chosen.warmup_iterations :], reverse=True)
