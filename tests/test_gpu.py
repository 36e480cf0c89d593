"""What only a GPU can show: `python -m pytest -m gpu` on a machine that has one; APS_TEST_DEVICE=cpu runs the lines on a CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aps.results import StageJob
from aps.runtime.precision import Precision
from aps.runtime.prefetch import prefetch, send
from aps.runtime.processes import Distributed
from aps.settings.blocks import DatasetSettings, EncoderSettings
from aps.settings.study import stage_model
from aps.training.knn import knn_accuracy
from aps.training.pretrain import Pretraining

DEVICE = torch.device(os.environ.get("APS_TEST_DEVICE", "cuda"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="torch sees no GPU here"),
]


def learner(manifest: Path, folder: Path, **pretrain: object) -> Pretraining:
    model = stage_model("aps")
    changes = {
        "batch_size": 32,
        "epochs": 2,
        "warmup_epochs": 1,
        "projector": (16, 16, 8),
        "predictor": (16, 16, 8),
        **pretrain,
    }
    settings = model(
        stage="pretrain", experiment="gpu", seed=0, dataset=DatasetSettings(name="digits", train_limit=100),
        encoder=EncoderSettings(arch="micro", dim=24, depth=2, image_size=16, patch_size=4),
        pretrain=model.model_fields["pretrain"].default.model_copy(update=changes),
    )  # type: ignore[call-arg]  # fmt: skip
    device = torch.device("cuda", DEVICE.index or 0) if DEVICE.type == "cuda" else DEVICE
    return Pretraining(StageJob(settings, manifest, folder / "out", folder / "saved"), Distributed(0, 1, device))


def train(one: Pretraining) -> list[float]:
    done, losses = 0, []
    for epoch in range(2):
        for batch in one.batches(epoch, 0):
            one.step(batch, done)
            done += 1
        losses.append(one.meter.read()["loss"])
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16", *(["fp16"] if DEVICE.type == "cuda" else [])])
def test_pretraining_ends_with_a_finite_loss_in_every_precision(precision: str, digits: Path, tmp_path: Path) -> None:
    losses = train(learner(digits, tmp_path, precision=precision))
    assert all(0 < loss < 20 for loss in losses), losses


def test_two_runs_of_a_seed_have_the_same_losses(digits: Path, tmp_path: Path) -> None:
    first, second = (train(learner(digits, tmp_path / name, precision="fp32")) for name in "ab")
    assert first == pytest.approx(second, rel=1e-3)


def test_a_state_that_was_saved_goes_on_where_it_was(digits: Path, tmp_path: Path) -> None:
    one = learner(digits, tmp_path, precision="fp32")
    train(one)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other = learner(digits, tmp_path, precision="fp32")
    other.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    ours, theirs = one.trainer.networks.state_dict(), other.trainer.networks.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_batches_made_ahead_are_the_ones_that_were_made() -> None:
    def make() -> list[tuple[Tensor, ...]]:
        return [
            (torch.full((1000, 100), float(i), device=DEVICE), send(torch.full((3,), i), DEVICE)) for i in range(20)
        ]

    for i, (large, small) in enumerate(prefetch(iter(make()), DEVICE)):
        assert bool((large * 2 == 2 * i).all()) and small.tolist() == [i] * 3


def test_loss_scaling_is_on_for_fp16_alone() -> None:
    scaled = {name: Precision(name, DEVICE).scaler.is_enabled() for name in ("fp32", "bf16")}
    assert scaled == {"fp32": False, "bf16": False}
    if DEVICE.type == "cuda":
        assert Precision("fp16", DEVICE).scaler.is_enabled()


def test_knn_is_that_of_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(3000, 16, generator=generator), torch.randn(200, 16, generator=generator)
    labels, right = (
        torch.randint(0, 10, (3000,), generator=generator),
        torch.randint(0, 10, (200,), generator=generator),
    )
    there = knn_accuracy(bank.to(DEVICE), labels, queries.to(DEVICE), right, (1, 20, 200), 0.07)
    here = knn_accuracy(bank, labels, queries, right, (1, 20, 200), 0.07)
    assert there == pytest.approx(here, abs=0.51)  # TF32 may change one neighbour
