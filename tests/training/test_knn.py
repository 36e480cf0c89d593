"""kNN against a vote counted by hand, and where its images come from."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor

from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.models.encoder import Encoder, build_encoder
from aps.models.weights import check_finite
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed
from aps.settings.blocks import KnnSettings
from aps.training import knn
from aps.training.features import features, normalize, resized
from aps.training.knn import knn_accuracy, monitor


def test_features_let_the_tokens_of_earlier_batches_go(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class token is a view of all tokens, which at 1.28 million images would be hundreds of gigabytes."""
    monkeypatch.setattr("aps.training.features.BATCH", 64)
    batches: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Counting(Encoder):
        def forward(self, images: Tensor) -> Tensor:
            alive.append(sum(reference() is not None for reference in batches))
            tokens = self.tokens(images).numpy().copy()
            batches.append(weakref.ref(tokens))
            return torch.from_numpy(tokens)[:, 0]

    encoder, split = build_encoder(small.ENCODER), load_split(digits, "train")
    encoder.__class__ = Counting
    features(encoder, split, ((0.0,) * 3, (1.0,) * 3), small.ONE, Precision("fp32", small.ONE.device))
    assert len(batches) > 3 and max(alive) <= 1


def by_hand(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int, temperature: float) -> float:
    right = 0
    similarities = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    for row, label in zip(similarities.tolist(), labels.tolist(), strict=True):
        votes: dict[int, float] = {}
        for similarity, y in sorted(zip(row, bank_labels.tolist(), strict=True), reverse=True)[:k]:
            votes[y] = votes.get(y, 0.0) + math.exp(similarity / temperature)
        right += max(votes, key=lambda y: votes[y]) == label
    return 100 * right / len(labels)


def clouds(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clouds of three classes, of very unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    x = torch.eye(3, 8)[labels] + 0.6 * torch.randn(rows, 8, generator=generator)
    return x * torch.rand(rows, 1, generator=generator).mul(3).exp(), labels


@pytest.mark.parametrize("block", [37, 65_536])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 5.0])
def test_every_k_is_the_vote_counted_by_hand(temperature: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "BLOCK", block)  # 150 train images
    monkeypatch.setattr(knn, "CHUNK", 50)  # 120 queries: the last chunk is smaller
    (bank, bank_labels), (queries, labels) = clouds(150, 0), clouds(120, 1)
    found = knn_accuracy(bank, bank_labels, queries, labels, (1, 5, 40, 150, 999), temperature)
    for k, accuracy in found.items():
        assert accuracy == pytest.approx(by_hand(bank, bank_labels, queries, labels, k, temperature)), k
    assert found[150] == found[999]  # a k above the bank is all of it
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("temperature", [0.01, 0.005, 1e-4, 1e-30, 1e-300])
def test_at_a_low_temperature_the_nearest_neighbour_decides(temperature: float) -> None:
    (bank, bank_labels), (queries, labels) = clouds(150, 0), clouds(120, 1)
    alone = knn_accuracy(bank, bank_labels, queries, labels, (1,), 0.07)[1]
    found = knn_accuracy(bank, bank_labels, queries, labels, (20, 150), temperature)
    if temperature <= 1e-4:  # another vote is worth nothing
        assert found == {20: alone, 150: alone}
    assert min(found.values()) > 60 and alone > 60


def test_votes_take_no_memory_for_each_neighbour_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tensor of (queries, k, classes) this would take 16 GB."""
    bank, queries = torch.randn(5000, 4), torch.randn(200, 4)
    labels = torch.arange(5000) * 20
    assert 0 <= knn_accuracy(bank, labels, queries, labels[:200], (200,), 0.07)[200] <= 100


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["train", "test"])
def test_features_that_are_not_finite_are_an_error_that_names_them(where: str, value: float) -> None:
    (bank, bank_labels), (queries, labels) = clouds(30, 0), clouds(20, 1)
    (bank if where == "train" else queries)[3, 2] = value
    with pytest.raises(
        UserError, match=rf"features of the {where} images: 1 of .* numbers are NaN or infinite; the encoder"
    ):
        knn_accuracy(bank, bank_labels, queries, labels, (5,), 0.07)


def test_the_temperature_weighs_near_neighbours() -> None:
    bank, bank_labels = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.5]]), torch.tensor([0, 1, 1])
    query, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(bank, bank_labels, query, label, (3,), 0.07) == {3: 100.0}
    assert knn_accuracy(bank, bank_labels, query, label, (3,), 10.0) == {3: 0.0}


def test_the_stage_classifies_the_test_split_by_the_train_split(digits: Path, tmp_path: Path) -> None:
    job = small.job("knn", digits, tmp_path)
    found = small.run(job)
    torch.manual_seed(7)  # as small.job initializes the encoder
    encoder = build_encoder(job.settings.encoder).eval()
    normalization = Manifest.read(digits).normalization("measured")
    train, test = load_split(digits, "train", 100), load_split(digits, "test")
    with torch.no_grad():
        bank, queries = (encoder(normalize(resized(s.images, 16), normalization)) for s in (train, test))
    for k in (1, 5, 200):
        expected = by_hand(bank, train.labels, queries, test.labels, k, 0.07)
        assert found[f"knn_top1_k{k}"] == pytest.approx(expected, abs=0.6), k  # a near tie may fall either way
    assert found["knn_top1_k5"] > 20
    assert (found["temperature"], found["train_images"], found["test_images"]) == (0.07, 100, 359)


def test_another_temperature_and_k_are_used_and_stand_with_the_numbers(digits: Path, tmp_path: Path) -> None:
    assert KnnSettings().k == (10, 20, 100, 200) and KnnSettings().temperature == 0.07
    found = small.run(small.job("knn", digits, tmp_path, temperature=0.5, k=(3,)))
    assert found["temperature"] == 0.5 and [key for key in found if key.startswith("knn_top1")] == ["knn_top1_k3"]


def test_the_monitor_holds_out_a_tenth_of_train_and_never_opens_test(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(knn, "knn_accuracy", lambda *given: (asked.append(given), {20: 50.0})[1])
    monkeypatch.setattr(knn, "features", lambda encoder, split, *_, **__: split.images.flatten(1).float())
    train = load_split(digits, "train", 300)
    found = monitor(build_encoder(small.ENCODER), train, ((0.0,) * 3, (1.0,) * 3), small.ONE)
    assert found["knn_train_top1"] == 50.0
    bank, bank_labels, queries, labels, ks, temperature = asked[0]
    assert (len(bank), len(queries), ks, temperature) == (270, 30, (20,), 0.07)
    rows = {tuple(x.tolist()): int(y) for x, y in zip(train.images.flatten(1).float(), train.labels, strict=True)}
    mine = [(tuple(x.tolist()), int(y)) for x, y in (*zip(bank, bank_labels, strict=True), *zip(queries, labels, strict=True))]  # fmt: skip
    assert len(set(mine)) == len(rows) and all(rows[x] == y for x, y in mine)


def test_features_are_the_encoders_in_eval_mode_which_is_then_undone(digits: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(small.ENCODER, drop_path=0.9).train()
    split, normalization = load_split(digits, "train", 40), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    found = features(encoder, split, normalization, small.ONE, Precision("fp32", small.ONE.device))
    assert encoder.training and not found.requires_grad
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in normalization)
    with torch.no_grad():
        expected = encoder.eval()((resized(split.images, 16) - mean) / std)
    assert torch.allclose(found, expected, atol=1e-5)


def test_features_of_other_processes_are_gathered_into_their_place(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held beside the whole, the parts of 1.28 million images are gigabytes."""
    places: list[Tensor] = []

    def all_gather(parts: list[Tensor], local: Tensor) -> None:
        places.extend(parts)
        for part in parts:
            part.copy_(local)

    monkeypatch.setattr("aps.training.features.dist.all_gather", all_gather)
    encoder, split = build_encoder(small.ENCODER), load_split(digits, "test")
    two = Distributed(0, 2, small.ONE.device)
    found = features(encoder, split, ((0.0,) * 3, (1.0,) * 3), two, Precision("fp32", two.device))
    part = len(places[0])
    assert found.shape == (len(split), encoder.embed_dim) and part == -(-len(split) // 2)
    assert found.data_ptr() == places[0].data_ptr() and torch.equal(found[part:], found[: len(split) - part])


def test_numbers_are_checked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once would take twice the memory of the features beside them."""
    monkeypatch.setattr("aps.models.weights.AT_ONCE", 4)
    checked: list[int] = []
    isfinite = Tensor.isfinite
    monkeypatch.setattr(Tensor, "isfinite", lambda x: checked.append(len(x)) or isfinite(x))
    x = torch.zeros(10, 3)
    check_finite(x, "features")
    x[9, 0] = x[0, 1] = math.nan
    with pytest.raises(UserError, match="2 of 30 numbers"):
        check_finite(x, "features")
    assert max(checked) == 4


def test_more_neighbours_than_there_are_images_are_said(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = small.run(small.job("knn", digits, tmp_path, k=(100, 101)))  # of 100 train images
    assert found["knn_top1_k100"] == found["knn_top1_k101"]
    assert (
        "warning: knn small/seed0: knn.k 101 is more than the 100 train images, all of which vote then"
        in capsys.readouterr().err
    )


def test_similarities_are_full_float32_on_a_gpu_too_and_training_keeps_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "BLOCK", 4)
    precisions = []

    class Watched(Tensor):
        def __matmul__(self, other: Tensor) -> Tensor:
            precisions.append(torch.get_float32_matmul_precision())
            return self.as_subclass(Tensor) @ other

    torch.set_float32_matmul_precision("high")
    try:
        knn.neighbours(torch.rand(3, 8).as_subclass(Watched), torch.rand(10, 8), 2)
        assert precisions == 3 * ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
