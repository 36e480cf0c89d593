"""The linear probe: each head against one trained alone, the encoder left as it was, the pick made on held-out images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.models.encoder import build_encoder
from aps.models.weights import load_encoder
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed
from aps.settings.blocks import DatasetSettings
from aps.training import linear_probe
from aps.training.classify import accuracy
from aps.training.linear_probe import Crops, Heads
from aps.training.order import Order, held_out


def frozen(job: Any) -> Any:
    torch.manual_seed(7)  # as small.job initializes it
    return build_encoder(job.settings.encoder).eval().requires_grad_(False)


def test_each_head_is_sgd_alone_at_its_own_rate(digits: Path, tmp_path: Path) -> None:
    job = small.job("linear_probe", digits, tmp_path, lrs=(0.1, 2.0), momentum=0.8)
    small.run(job)
    left, settings = load_file(job.out / "heads.safetensors"), job.settings.linear_probe
    train, encoder = load_split(digits, "train", 100), frozen(job)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in Manifest.read(digits).normalization("measured"))
    rows, _ = held_out(100, 0.1, 0)
    order = Order(rows, 32, 0, small.ONE, "linear_probe")
    crops = Crops(train, settings, 16, 0, 0, small.ONE)
    torch.manual_seed(0)
    build_encoder(job.settings.encoder)  # takes its share of the generator, as in the stage
    start = Heads(24, 10, 2, batch_norm=False)
    for i, lr in enumerate((0.1, 2.0)):
        head = start.heads[i]
        speed = [torch.zeros_like(p) for p in head.parameters()]
        for step in range(4):
            images, labels = next(crops.epoch(step // 2, order.epoch(step // 2), step % 2))
            head.zero_grad()
            F.cross_entropy(head(encoder((images - mean) / std)), labels).backward()
            rate = lr * 32 / 256 * (1 + math.cos(math.pi * step / 4)) / 2
            with torch.no_grad():
                for p, v in zip(head.parameters(), speed, strict=True):
                    p.sub_(rate * v.mul_(0.8).add_(p.grad))
        assert torch.allclose(left[f"heads.{i}.weight"], head.weight, atol=1e-5)
        assert torch.allclose(left[f"heads.{i}.bias"], head.bias, atol=1e-5)
    assert not torch.allclose(left["heads.0.weight"], left["heads.1.weight"], atol=1e-2)


class Answers:
    """Stands in for the evaluation: accuracies of every head, and what was asked about."""

    def __init__(self, *answers: list[float]) -> None:
        self.answers, self.splits = iter(answers), []  # type: ignore[var-annotated]

    def __call__(self, classify: Any, split: Any, *_: Any, **__: Any) -> Tensor:
        self.splits.append(split)
        return torch.tensor(next(self.answers), dtype=torch.float64)


def test_the_rate_is_picked_on_images_held_out_of_train_and_all_are_reported(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Answers([40.0, 80.0, 60.0], [90.0, 50.0, 70.0])
    monkeypatch.setattr(linear_probe, "accuracy", asked)
    found = small.run(small.job("linear_probe", digits, tmp_path, lrs=(0.1, 0.5, 2.0), holdout=0.2))
    assert (found["test_top1"], found["holdout_top1"], found["lr"]) == (50.0, 80.0, 0.5)  # not the best on test
    assert [found[f"test_top1_lr{lr}"] for lr in ("0.1", "0.5", "2")] == [90.0, 50.0, 70.0]
    assert [found[f"holdout_top1_lr{lr}"] for lr in ("0.1", "0.5", "2")] == [40.0, 80.0, 60.0]
    _, held = held_out(100, 0.2, 0)
    train = load_split(digits, "train", 100)
    assert [len(split) for split in asked.splits] == [20, 359]
    assert torch.equal(asked.splits[0].images, train.images[held])


def test_a_head_that_diverged_has_no_accuracy_and_is_not_chosen(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def huge(*args: Any) -> Any:
        """An encoder whose features are so large that a usual learning rate gives logits beyond float32."""
        encoder = load_encoder(*args)
        encoder.norm.weight.data.fill_(1e25)
        return encoder

    monkeypatch.setattr(linear_probe, "load_encoder", huge)
    job = small.job("linear_probe", digits, tmp_path, lrs=(1.0, 1e-30, 0.5), holdout=0.2)
    found = small.run(job)
    assert found["lr"] == 1e-30 and found["test_top1"] == found["test_top1_lr1e-30"]
    assert not [key for key in found if key.endswith(("lr1", "lr0.5"))]
    said = capsys.readouterr().err
    assert "its heads at 1, 0.5 of linear_probe.lrs diverged and have no accuracy; leave these out" in said
    with pytest.raises(UserError, match=r"every head of linear_probe\.lrs diverged; name lower learning rates"):
        small.run(small.job("linear_probe", digits, tmp_path / "none", lrs=(1.0,), holdout=0.2))


@pytest.mark.parametrize(
    "own, words",
    [
        ({"lrs": (1e5, 1e6)}, "every head's loss is above 2.3, that of guessing"),
        ({"lrs": (0.1, 1e6), "holdout": 0.01}, "its learning rate is chosen on 1 held-out image, too few to tell"),
        ({"lrs": (0.1, 1e6)}, ""),
    ],
)
def test_an_accuracy_that_says_nothing_is_warned_of(
    own: dict[str, Any], words: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.run(small.job("linear_probe", digits, tmp_path, **{"epochs": 10, "holdout": 0.2, "batch_norm": True, **own}))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert words in "".join(warnings) and len(warnings) == bool(words)


@pytest.mark.parametrize("block", ["finetune", "linear_probe"])
def test_a_part_that_cannot_be_held_out_is_named_with_its_key(block: str) -> None:
    for share, words in ((0.1, "keeps none aside; raise it"), (0.9, "leaves none to train on; lower it")):
        with pytest.raises(UserError, match=f"^a {block}.holdout of {share} of 2 training images {words}$"):
            held_out(2, share, 0, f"{block}.holdout")


def test_held_out_images_are_not_trained_on(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[int] = set()
    epoch = Crops.epoch
    monkeypatch.setattr(
        Crops,
        "epoch",
        lambda self, e, rows, first: (read.update(rows.flatten().tolist()), epoch(self, e, rows, first))[1],
    )
    small.run(small.job("linear_probe", digits, tmp_path, epochs=4))
    train, held = held_out(100, 0.1, 0)
    assert read <= set(train.tolist()) and not read & set(held.tolist()) and len(read) > 80


def test_the_headline_is_the_accuracy_of_the_heads_left_behind(colours: Path, tmp_path: Path) -> None:
    named = DatasetSettings(name="colours")
    job = small.job("linear_probe", colours, tmp_path, dataset=named, lrs=(1.0,), epochs=20, batch_norm=True)
    found = small.run(job)
    heads, encoder, test = Heads(24, 4, 1, batch_norm=True), frozen(job), load_split(colours, "test")
    heads.load_state_dict(load_file(job.out / "heads.safetensors"))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in Manifest.read(colours).normalization("measured"))
    images = F.interpolate(test.images.float() / 255, size=(16, 16), mode="bilinear", antialias=True)
    guesses = heads.eval()(encoder((images - mean) / std))[0].argmax(1)
    assert found["test_top1"] == pytest.approx(100 * (guesses == test.labels).double().mean().item(), abs=1e-9)
    assert 70 < found["test_top1"] < 100  # it learns


def test_a_norm_before_the_head_has_no_affine_and_its_running_statistics_in_evaluation() -> None:
    """MAE, appendix A.1."""
    torch.manual_seed(0)
    heads = Heads(6, 3, 2, batch_norm=True)
    assert not list(heads.norm.parameters())
    x = 5 + 3 * torch.randn(64, 6)
    trained = heads.train()(x)
    y = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    assert torch.allclose(trained[1], heads.heads[1](y), atol=1e-5)
    evaluated = heads.eval()(x)
    seen = (x - heads.norm.running_mean) / (heads.norm.running_var + 1e-6).sqrt()
    assert torch.allclose(evaluated[0], heads.heads[0](seen), atol=1e-5) and not torch.allclose(
        evaluated, trained, atol=0.1
    )
    assert trained.shape == (2, 64, 3)


def test_heads_are_scored_in_float32_as_they_are_trained(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 many of their logits would be equal, and the first of them the guess."""
    types = []

    def accuracy(classify: Any, *_: Any, classifiers: tuple[int, ...]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            types.append(classify(torch.rand(4, 3, 16, 16)).dtype)
        return torch.zeros(classifiers)

    monkeypatch.setattr(linear_probe, "accuracy", accuracy)
    small.run(small.job("linear_probe", digits, tmp_path, lrs=(0.1, 0.5), precision="bf16"))
    assert types == 2 * [torch.float32]


def test_a_process_without_an_image_adds_as_many_zeros_as_the_others_have_heads(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine images on four processes are three for each of the first three."""
    added: list[Tensor] = []
    monkeypatch.setattr("aps.training.classify.dist.all_reduce", added.append)
    split, cpu = load_split(digits, "test", 9), torch.device("cpu")
    assert len(split) == 9
    for rank in range(4):
        accuracy(
            lambda x: torch.zeros(3, len(x), 10), split, 16, ((0.0,) * 3, (1.0,) * 3), Distributed(rank, 4, cpu),
            Precision("fp32", cpu), classifiers=(3,),
        )  # fmt: skip
    assert [x.shape for x in added] == 4 * [torch.Size([3])] and not added[3].any()
