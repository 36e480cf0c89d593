"""Finetuning: its numbers recomputed, and each mistake of the authors' release (method.md, Traps) kept out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.models.encoder import Encoder, build_encoder
from aps.settings.blocks import DatasetSettings
from aps.training import features, finetune
from aps.training.augment import Mix, soft_targets
from aps.training.examples import Examples
from aps.training.finetune import Finetuner
from aps.training.order import Order, held_out

QUICK = {
    "lr": 0.15,
    "mixup": 0.0,
    "cutmix": 0.0,
    "rand_augment": None,
    "color_jitter": 0.0,
    "erasing": 0.0,
}  # learns in few steps


def tuner(digits: Path, folder: Path, **changes: Any) -> Finetuner:
    job = small.job("finetune", digits, folder, **changes)
    return Finetuner(job, 10, Manifest.read(digits).normalization("measured"), small.ONE)


def batch(images: int = 8, smoothing: float = 0.1, mix: Mix | None = None) -> Examples:
    labels = torch.arange(images) % 10
    return Examples(torch.randn(images, 3, 16, 16), soft_targets(labels, 10, smoothing, mix), labels)


def top1(model: nn.Module, digits: Path) -> float:
    """Accuracy on the test split, in percent, written out."""
    split = load_split(digits, "test")
    statistics = Manifest.read(digits).statistics.measured
    assert statistics is not None
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (statistics.mean, statistics.std))
    images = F.interpolate(split.images.float() / 255, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        guesses = model.eval()((images - mean) / std).argmax(1)
    return 100 * float((guesses == split.labels).double().mean())


def trained(job: Any, classes: int = 10) -> Encoder:
    model = build_encoder(job.settings.encoder)
    model.reset_classifier(classes)
    model.load_state_dict(load_file(job.out / "model.safetensors"))
    return model


def test_the_headline_is_the_test_accuracy_of_the_weights_left_behind(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BATCH", 50)  # 359 test images: the last batch has 9
    job = small.job("finetune", colours, tmp_path, dataset=DatasetSettings(name="colours"), epochs=12, **QUICK)
    found = small.run(job)
    assert found["test_top1"] == pytest.approx(top1(trained(job, 4), colours), abs=1e-9)
    assert 70 < found["test_top1"] < 100  # it learns; the Bayes rate is about 92


@pytest.mark.parametrize("most", [4, 3])
def test_what_the_model_takes_for_what_is_kept_where_classes_are_few(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(features, "BATCH", 50)
    monkeypatch.setattr(finetune, "MOST_CONFUSED", most)
    job = small.job("finetune", colours, tmp_path, dataset=DatasetSettings(name="colours"), **QUICK)
    found = small.run(job)
    kept = json.loads((job.out / "metrics.json").read_text()).get("confusion")
    if most < 4:
        assert kept is None
        return
    split, counts = load_split(colours, "test"), torch.tensor(kept["counts"])
    assert kept["classes"] == list("abcd")
    assert torch.equal(counts.sum(1), torch.bincount(split.labels)), "a row is a class"
    assert found["test_top1"] == 100 * int(counts.trace()) / len(split)


# ----------------------------------------------------------------------------------------------------------------------
# Traps


def test_drop_path_reaches_the_model_and_acts_in_training(digits: Path, tmp_path: Path) -> None:
    for rate in (0.0, 0.4):
        blocks = tuner(digits, tmp_path, drop_path=rate).model.blocks
        assert [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks] == pytest.approx([0.0, rate])
    losses = []
    for rate in (0.0, 0.4):
        job = small.job("finetune", digits, tmp_path / str(rate), drop_path=rate)
        small.run(job)
        losses.append([line["loss"] for line in small.history(job)])
    assert losses[0] != losses[1]


def test_bf16_on_a_cpu_uses_no_fused_attention(digits: Path, tmp_path: Path) -> None:
    for precision, fused in (("fp32", True), ("bf16", False)):
        t = tuner(digits, tmp_path, precision=precision, ema=0.8)
        assert t.ema is not None
        for model in (t.model, t.ema.module):
            assert [block.attn.fused_attn for block in model.blocks] == [fused] * len(t.model.blocks)


def test_the_ema_is_a_moving_average_of_the_weights(digits: Path, tmp_path: Path) -> None:
    t = tuner(digits, tmp_path, ema=0.8, mixup=0.0, cutmix=0.0)
    assert t.ema is not None
    expected = {name: value.clone() for name, value in t.model.state_dict().items()}
    for step in range(4):
        t.step(batch(), lr=0.01)
        for name, value in t.model.state_dict().items():
            expected[name] = 0.8 * expected[name] + 0.2 * value
        found = t.ema.module.state_dict()
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items()), step
    assert not torch.allclose(expected["head.weight"], t.model.head.weight)


def test_the_ema_is_what_its_metric_evaluates(digits: Path, tmp_path: Path) -> None:
    """An average that hardly moves is the model before training, one that forgets at once the model after it."""
    changes = {"epochs": 4, "holdout": 0.0, **QUICK}
    slow = small.job("finetune", digits, tmp_path / "slow", ema=1 - 1e-7, **changes)
    found = small.run(slow)
    before = top1(tuner(digits, tmp_path / "before", **changes).model, digits)
    assert found["test_top1_ema"] == pytest.approx(before, abs=1e-9)
    assert found["test_top1"] != pytest.approx(before, abs=1e-9)
    quick = small.run(small.job("finetune", digits, tmp_path / "quick", ema=1e-7, **changes))
    assert quick["test_top1_ema"] == quick["test_top1"] == found["test_top1"]
    assert "test_top1_ema" not in small.run(small.job("finetune", digits, tmp_path / "none", ema=0.0, **changes))


class Evaluations:
    """Stands in for the evaluation: gives what it is told to, and remembers which images and which weights it was asked about."""

    def __init__(self, answers: list[float]) -> None:
        self.answers: Iterator[float] = iter(answers)
        self.images: list[int] = []
        self.weights: list[Tensor] = []

    def __call__(self, classify: nn.Module, split: Any, *_: Any) -> Tensor:
        self.images.append(len(split))
        self.weights.append(classify.get_parameter("head.weight").detach().clone())
        return torch.tensor(next(self.answers))


def test_the_test_set_is_looked_at_once_after_the_last_epoch(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no epoch can have been chosen on it."""
    asked = Evaluations([11.0, 22.0])
    monkeypatch.setattr(finetune, "accuracy", asked)
    job = small.job("finetune", digits, tmp_path, holdout=0.0, epochs=5)
    found = small.run(job)
    assert asked.images == [359, 359]  # the model's and the EMA's
    assert (found["test_top1"], found["test_top1_ema"]) == (11.0, 22.0)
    assert torch.equal(asked.weights[0], trained(job).head.weight)
    assert not any("test" in key for line in small.history(job) for key in line)


def test_a_best_epoch_is_chosen_on_a_part_of_train_held_out(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Evaluations([30.0, 70.0, 50.0, 10.0, 20.0, 60.0])  # three epochs, last, EMA, best epoch
    monkeypatch.setattr(finetune, "accuracy", asked)
    job = small.job("finetune", digits, tmp_path, holdout=0.1, epochs=3)
    found = small.run(job)
    assert asked.images == [10, 10, 10, 359, 359, 359]
    assert found["test_top1"] == 10.0  # the headline stays the last epoch's
    assert (found["holdout_epoch"], found["holdout_top1"], found["test_top1_holdout_epoch"]) == (2, 70.0, 60.0)
    assert torch.equal(asked.weights[5], asked.weights[1])  # the second epoch's weights
    assert torch.equal(asked.weights[3], asked.weights[2])  # the last epoch's
    assert torch.equal(trained(job).head.weight, asked.weights[2])


def test_images_held_out_are_not_trained_on(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    epoch = Order.epoch
    monkeypatch.setattr(
        Order,
        "epoch",
        lambda self, number: (
            read.update(rows := epoch(self, number).flatten().tolist()),
            torch.tensor(rows).view(-1, 32),
        )[1],
    )
    small.run(small.job("finetune", digits, tmp_path, holdout=0.1, epochs=6))
    train, held = held_out(100, 0.1, 0)
    assert read <= set(train.tolist()) and not read & set(held.tolist()) and len(read) > 80


# ----------------------------------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize("mix", [None, Mix(0.3, None)])
def test_the_loss_is_the_cross_entropy_with_smoothed_and_mixed_labels(
    digits: Path, tmp_path: Path, mix: Mix | None
) -> None:
    t, given = tuner(digits, tmp_path, drop_path=0.0), batch(smoothing=0.3, mix=mix)
    seen: list[Tensor] = []
    t.model.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    loss, right = t.step(given, lr=0.0)
    smoothed = 0.3 / 10 + 0.7 * F.one_hot(given.labels, 10)
    if mix is not None:
        smoothed = 0.3 * smoothed + 0.7 * smoothed[[1, 0, 3, 2, 5, 4, 7, 6]]  # neighbours
    expected = -(smoothed * seen[0].log_softmax(1)).sum(1).mean()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    assert right == pytest.approx(float((seen[0].argmax(1) == given.labels).float().mean()))


def test_layer_decay_slows_early_layers(digits: Path, tmp_path: Path) -> None:
    t = tuner(digits, tmp_path, layer_decay=0.5)
    t.step(batch(), lr=0.01)
    rates = {id(p): group["lr"] for group in t.optimizer.param_groups for p in group["params"]}
    places = (
        t.model.head.weight,
        t.model.blocks[1].mlp.fc1.weight,
        t.model.blocks[0].mlp.fc1.weight,
        t.model.patch_embed.proj.weight,
    )
    assert [rates[id(p)] for p in places] == pytest.approx([0.01, 0.005, 0.0025, 0.00125])


def test_mistakes_are_one_sentence(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size 33 is odd"):
        small.job("finetune", digits, tmp_path / "odd", batch_size=33)
    with pytest.raises(UserError, match=r"finetune.batch_size 92 exceeds the 90 training images"):
        small.run(small.job("finetune", digits, tmp_path / "large", batch_size=92))
    with pytest.raises(UserError, match=r"holdout of 0.001 of 100 training images keeps none"):
        small.run(small.job("finetune", digits, tmp_path / "none", holdout=0.001))
    with pytest.raises(UserError, match=r"the finetuning loss became nan; lower finetune.lr"):
        small.run(small.job("finetune", digits, tmp_path / "nan", warmup_lr=1e30, epochs=2))


@pytest.mark.parametrize(("key", "more"), [("warmup_lr", {}), ("min_lr", {"warmup_epochs": 0})])
def test_a_learning_rate_above_the_peak_is_warned_of_and_blamed(
    key: str, more: dict[str, int], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"; lower finetune.lr and finetune.{key}, or set"):
        small.run(small.job("finetune", digits, tmp_path, epochs=4, **{key: 1e6}, **more))
    assert f"finetune.{key} 1e+06 is above the peak finetune.lr 0.002 x 32/512 = 0.000125" in capsys.readouterr().err


def test_a_warmup_without_an_end_is_warned_of(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.run(small.job("finetune", digits, tmp_path / "short", epochs=2, warmup_epochs=1))
    assert "warning" not in capsys.readouterr().err
    small.run(small.job("finetune", digits, tmp_path / "long", epochs=1, warmup_epochs=1))
    assert "finetune.warmup_epochs 1 takes all of finetune.epochs 1" in capsys.readouterr().err


def test_an_odd_batch_trains_where_nothing_is_mixed(digits: Path, tmp_path: Path) -> None:
    small.run(small.job("finetune", digits, tmp_path, batch_size=33, mixup=0.0, cutmix=0.0, epochs=1))


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_gradients_are_no_longer_than_asked(
    clip: float, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = tuner(digits, tmp_path, clip_grad=clip), tuner(digits, tmp_path)
    seen: dict[str, list[Tensor]] = {}
    for name, one in (("ours", ours), ("plain", plain)):

        def step(*given: Any, name: str = name, one: Finetuner = one) -> None:
            seen[name] = [p.grad.clone() for p in one.model.parameters() if p.grad is not None]

        monkeypatch.setattr(one.optimizer, "step", step)
        torch.manual_seed(0)
        one.step(batch(), lr=0.0)
    length = torch.cat([grad.flatten() for grad in seen["plain"]]).norm().item()
    factor = min(1.0, clip / length) if clip else 1.0
    assert length > 0.1
    for found, whole in zip(seen["ours"], seen["plain"], strict=True):
        torch.testing.assert_close(found, whole * factor, rtol=1e-4, atol=1e-9)
