"""config/cifar.yaml is the published recipe: every value in it is checked against docs/method.md's, written out here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from aps.models.archs import dimensions
from aps.settings.reading import load_study
from aps.settings.study import ExperimentSettings, Study
from aps.training.schedule import finetuning_lr, pretraining_lr

CONFIG = Path(__file__).parents[1] / "config"
SETTINGS = [(d, a, e) for d in ("cifar10", "cifar100") for a in ("tiny", "small", "base") for e in (1600, 3200)]

DIMENSIONS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
PRETRAINING_LR = {"tiny": 1e-3, "small": 5e-4, "base": 5e-4}  # of a batch of 256
FINETUNING_LR = {"tiny": 2e-3, "small": 1e-3, "base": 5e-4}  # of a batch of 512
PROBE_LR = {"tiny": 0.05, "small": 0.02, "base": 0.01}

# What all twelve share. A value that the file sets and this lacks fails the last test below.
SHARED: dict[str, dict[str, Any]] = {
    "dataset": {"statistics": "published"},
    "encoder": {
        "image_size": 32,
        "patch_size": 2,
        "mlp_ratio": 4.0,
        "qkv_bias": False,
        "layer_norm_eps": 1e-5,
        "init": "torch",
    },
    "views": {
        "crop_scale": (0.15, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": 0.5,
        "color_jitter": (0.4, 0.4, 0.4, 0.1),
        "color_jitter_prob": 0.8,
        "grayscale": 0.2,
        "blur": (0.0, 0.0),
        "solarize": (0.0, 0.0),
    },
    "sampling": {"strategy": "asymmetric", "ratio": 0.25, "samplings": 4, "gamma": 3.0, "flip_aware": True},
    "pretrain": {
        "batch_size": 512,
        "warmup_epochs": 20,
        "schedule": "release",
        "weight_decay": 0.05,
        "betas": (0.9, 0.999),
        "temperature": 0.1,
        "projector": (512, 512, 128),
        "predictor": (512, 512, 128),
        "precision": "auto",
    },
    "finetune": {
        "epochs": 100,
        "batch_size": 128,
        "min_lr": 1e-5,
        "warmup_epochs": 5,
        "warmup_lr": 1e-6,
        "weight_decay": 0.05,
        "layer_decay": 1.0,
        "clip_grad": 0.0,
        "drop_path": 0.1,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "crop": "pad",
        "flip": 0.5,
        "color_jitter": 0.4,
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_switch": 0.5,
        "label_smoothing": 0.1,
        "ema": 0.99996,
        "holdout": 0.0,
    },
    "linear_probe": {
        "epochs": 100,
        "batch_size": 256,
        "momentum": 0.9,
        "batch_norm": False,
        "crop_scale": (0.08, 1.0),
        "flip": 0.5,
    },
    "knn": {"k": (10, 20, 100, 200), "temperature": 0.07},
}
OWN = {
    ("encoder", "arch"),
    ("pretrain", "epochs"),
    ("pretrain", "lr"),
    ("finetune", "lr"),
    ("dataset", "name"),
    ("linear_probe", "lrs"),
}


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study([CONFIG / "cifar.yaml"])


def chosen(study: Study, dataset: str, arch: str, epochs: int) -> ExperimentSettings:
    return study.experiment(f"{dataset}-{arch}-{epochs}")


def test_the_twelve_published_settings_are_there_and_no_others(study: Study) -> None:
    assert set(study.experiments) == {f"{d}-{a}-{e}" for d, a, e in SETTINGS}
    published = yaml.safe_load((CONFIG / "published.yaml").read_text())
    for name, e in study.experiments.items():
        assert e.published == name and name in str(published)
        assert e.stages == ("pretrain", "finetune", "linear_probe", "knn")


@pytest.mark.parametrize(("dataset", "arch", "epochs"), SETTINGS)
def test_values_are_those_of_the_method(study: Study, dataset: str, arch: str, epochs: int) -> None:
    e = chosen(study, dataset, arch, epochs)
    for block, values in SHARED.items():
        found = {key: getattr(getattr(e, block), key) for key in values}
        assert found == values, block
    assert dimensions(e.encoder) == DIMENSIONS[arch]
    assert (e.dataset.name, e.pretrain.epochs) == (dataset, epochs)
    assert (e.pretrain.lr, e.finetune.lr) == (PRETRAINING_LR[arch], FINETUNING_LR[arch])
    assert PROBE_LR[arch] in e.linear_probe.lrs and len(e.linear_probe.lrs) > 1
    assert int(e.encoder.grid**2 * e.sampling.ratio) * e.sampling.samplings == 256  # each patch exactly once
    assert e.dataset.train_limit is None and e.encoder.weights == "pretrain"


@pytest.mark.parametrize(("dataset", "arch", "epochs"), SETTINGS)
def test_rates_over_a_run_follow_the_formulas(study: Study, dataset: str, arch: str, epochs: int) -> None:
    e, steps = chosen(study, dataset, arch, epochs), 97 * 4  # 50,000 images in batches of 512, T steps each
    for epoch in range(epochs):
        expected = (
            PRETRAINING_LR[arch] * 512 / 256 * min((epoch + 1) / 20, (1 + math.cos(math.pi * epoch / epochs)) / 2)
        )
        assert pretraining_lr(e.pretrain, epoch * steps, steps) == pytest.approx(expected, rel=1e-12)
    peak = FINETUNING_LR[arch] * 128 / 512
    for epoch in range(100):
        if epoch < 5:
            expected = 1e-6 + (peak - 1e-6) * epoch / 5
        else:
            expected = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert finetuning_lr(e.finetune, epoch) == pytest.approx(expected, rel=1e-12)


def test_pretraining_and_finetuning_normalize_alike(study: Study) -> None:
    """The release finetunes on ImageNet's statistics; here one setting serves every stage of an experiment."""
    for name, e in study.experiments.items():
        statistics = {study.stage_settings(name, 0, stage).dataset.statistics for stage in e.stages}
        assert statistics == {"published"}
    from aps.data.cifar import PUBLISHED

    assert (PUBLISHED.mean, PUBLISHED.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def test_no_value_of_the_file_goes_unchecked() -> None:
    raw = yaml.safe_load((CONFIG / "cifar.yaml").read_text())
    for block in (raw["defaults"], *raw["experiments"].values()):
        for section, values in block.items():
            if section in ("inherits", "published"):
                continue
            assert set(values) <= set(SHARED[section]) | {key for s, key in OWN if s == section}, section
    assert set(raw) == {"study", "question", "resources", "defaults", "experiments"}
