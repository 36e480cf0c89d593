"""The pretraining step and loop against the method written out: what is fed, how often, at what rate, to which weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from aps import sampling
from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.prepare import prepare
from aps.errors import UserError
from aps.models.encoder import build_encoder
from aps.sampling import Geometry
from aps.settings.blocks import SourceSettings, ViewSettings
from aps.training import batches, pretrain
from aps.training.batches import Batches
from aps.training.order import Order
from aps.training.pretrain import Trainer
from aps.views import View


def batch(rows: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    views = torch.randn(2, rows, 3, 16, 16, generator=generator)
    kept = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(2 * rows)]).view(2, rows, 4)
    return views[0], views[1], kept[0], kept[1]


def by_definition(model: Any, images: tuple[Tensor, Tensor, Tensor, Tensor], tau: float) -> Tensor:
    """Loss of one set of rows, each view on its own through everything."""
    view1, view2, kept1, kept2 = images
    z1, z2 = (model.projector(model.encoder(v, k)) for v, k in ((view1, kept1), (view2, kept2)))
    total = torch.zeros((), dtype=view1.dtype)
    for z, other in ((z1, z2), (z2, z1)):
        cosines = F.normalize(model.predictor(z), dim=1) @ F.normalize(other, dim=1).detach().T
        total = total - (cosines / tau).log_softmax(1).diagonal().mean()
    return total


def test_bf16_on_a_cpu_uses_no_fused_attention_and_finds_nearly_the_same_loss(digits: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(small.job("pretrain", digits, tmp_path, precision=precision), small.ONE)
        assert [block.attn.fused_attn for block in trainer.encoder.blocks] == [precision == "fp32"] * 2
        view1, view2, *kept = batch()
        losses[precision] = trainer.step((view1, view2), tuple(kept), 0.01)["loss"].item()
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_adamw_with_decay_on_every_parameter(accumulate: int, digits: Path, tmp_path: Path) -> None:
    job = small.job("pretrain", digits, tmp_path, weight_decay=0.4, betas=(0.8, 0.95), temperature=0.2, accumulate=accumulate)  # fmt: skip
    trainer = Trainer(job, small.ONE)
    trainer.networks.double()  # where a gradient is zero but for rounding, float32 would decide its sign by chance
    encoder = build_encoder(job.settings.encoder)
    reference = trainer.method.networks(encoder).double()
    reference.load_state_dict(trainer.networks.state_dict())
    state = {name: [p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)] for name, p in reference.named_parameters()}  # fmt: skip
    view1, view2, *kept = batch()
    images = (view1.double(), view2.double(), *kept)
    for step, lr in enumerate((0.01, 0.02), 1):
        found = trainer.step(images[:2], images[2:], lr)["loss"]
        reference.zero_grad()
        parts = list(zip(*(x.chunk(accumulate) for x in images), strict=True))
        loss = sum(by_definition(reference, part, 0.2) for part in parts) / accumulate  # type: ignore[arg-type]
        loss.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-9)
        with torch.no_grad():
            for name, p in reference.named_parameters():
                value, first, second = state[name]
                assert p.grad is not None
                value.mul_(1 - lr * 0.4)
                first.lerp_(p.grad, 1 - 0.8)
                second.lerp_(p.grad.square(), 1 - 0.95)
                value.sub_(lr * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8))
                p.copy_(value)
    ours = dict(trainer.networks.named_parameters())
    assert ours.keys() == state.keys()
    for name, (value, _, second) in state.items():
        told = second.sqrt() > 1e-9  # those of the last norm's bias vanish: the projector standardizes them away
        assert torch.allclose(ours[name][told], value[told], rtol=1e-6, atol=1e-8), name
        assert told.float().mean() > 0.5 or name == "encoder.norm.bias", name


class Steps:
    """Takes part in training as Trainer.step does, remembering what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor, Tensor, Tensor, float]] = []
        self.step = Trainer.step

    def __call__(self, trainer: Trainer, views: Any, kept: Any, lr: float, progress: float) -> dict[str, Tensor]:
        self.given.append((*views, *kept, lr))
        return self.step(trainer, views, kept, lr, progress)


def test_a_batch_gives_t_steps_on_the_same_views_and_disjoint_cells_at_the_epochs_rate(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps()
    monkeypatch.setattr(Trainer, "step", lambda self, *given: steps(self, *given))
    job = small.job("pretrain", digits, tmp_path, epochs=3, lr=0.004, warmup_epochs=2)
    small.run(job)
    assert len(steps.given) == 3 * (100 // 32) * 4
    for number in range(0, len(steps.given), 4):
        group = steps.given[number : number + 4]
        for one in group:
            assert one[0] is group[0][0] and one[1] is group[0][1] and not torch.equal(one[0], one[1])
        cells = torch.cat([one[2] for one in group], 1).sort(1).values
        assert torch.equal(cells, torch.arange(16).expand(32, 16))  # T = 4, r = 1/4: each patch once
        assert any(not torch.equal(group[0][3], one[3]) for one in group[1:])
        epoch = number // 4 // 3
        factor = min((epoch + 1) / 2, (1 + np.cos(np.pi * epoch / 3)) / 2)
        assert [one[4] for one in group] == pytest.approx([0.004 * 32 / 256 * factor] * 4)
    firsts = [group[0] for group in steps.given[::4]]
    assert not any(torch.equal(firsts[0], other) for other in firsts[1:])  # each batch and epoch has its own views


def test_the_sampler_gets_the_geometry_of_the_views_that_are_trained_on(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not exchanged, nor another batch's."""
    asked: list[tuple[Geometry, Geometry]] = []
    pairs: list[Any] = []
    draw, epoch = sampling.draw, Batches.epoch
    monkeypatch.setattr(sampling, "draw", lambda *given: (asked.append(given[2:4]), draw(*given))[1])

    def seen(self: Batches, *given: int) -> Any:
        for pair in epoch(self, *given):
            pairs.append(pair)
            yield pair

    monkeypatch.setattr(Batches, "epoch", seen)
    small.run(small.job("pretrain", digits, tmp_path, epochs=1))
    # Operations are counted on few images, and the picture of views shows one at a time.
    trained_on = [pair for pair in asked if len(pair[0].boxes) == len(pairs[0].geometries[0].boxes)]
    assert len(trained_on) == len(pairs) == 3
    for (one, two), pair in zip(trained_on, pairs, strict=True):
        assert one is pair.geometries[0] and two is pair.geometries[1]


# ----------------------------------------------------------------------------------------------------------------------
# Batches of views


def coloured(kind: str, folder: Path) -> ArraySplit | FileSplit:
    """Six images whose colours say where a pixel is: red 6 * row, green 6 * column, blue which image."""
    y, x = torch.meshgrid(torch.arange(30), torch.arange(40), indexing="ij")
    images = torch.stack([torch.stack([6 * y, 6 * x, 40 * i + 0 * x]) for i in range(6)]).to(torch.uint8)
    if kind == "arrays":
        return ArraySplit(images, torch.zeros(6, dtype=torch.int64), ("a",))
    for split, chosen in (("train", images), ("test", images[:2])):
        for i, image in enumerate(chosen):
            file = folder / "tree" / split / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    prepare("folder", folder / "prepared", SourceSettings(path=str(folder / "tree")))
    return load_split(folder / "prepared" / "manifest.json", "train")


@pytest.mark.parametrize("kind", ["arrays", "files"])
def test_a_pairs_geometry_says_where_its_pixels_come_from(kind: str, tmp_path: Path) -> None:
    plain = ViewSettings(color_jitter_prob=0.0, grayscale=0.0)
    views = (View(32, plain, 1), View(32, plain, 2))
    pairs = Batches(coloured(kind, tmp_path), views, 6, ((0.0,) * 3, (1.0,) * 3), 3, small.ONE)
    flips = set()
    for pair in pairs.epoch(0):
        shown = [view[:, 2].mean((1, 2)).mul(255 / 40).round() for view in pair.views]
        assert torch.equal(shown[0], shown[1])  # both views of a pair are of one image
        assert sorted(shown[0].tolist()) == list(range(6))
        for view, (boxes, flipped) in zip(*pair, strict=True):
            flips |= set(flipped.tolist())
            for pixels, (top, left, height, width), flip in zip(view, boxes.tolist(), flipped.tolist(), strict=True):
                rows, columns = (pixels[c] * 255 / 6 + 0.5 for c in (0, 1))  # source pixels, of pixel centres
                centre = (torch.arange(32) + 0.5) / 32
                expected_x = left + width * (centre.flip(0) if flip else centre)
                inner = slice(4, 28)  # at the edges the kernel is cut
                assert (rows.mean(1) - (top + height * centre))[inner].abs().max() < 0.6
                assert (columns.mean(0) - expected_x)[inner].abs().max() < 0.6
    assert flips == {True, False}


@pytest.mark.parametrize("kind", ["arrays", "files"])
@pytest.mark.parametrize("limit", [3 * 6 * 16**2 * 2, 2**30])
def test_views_made_together_are_those_made_one_by_one(
    kind: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in the same bits, so that what is trained depends on no limit."""
    augmentation = ViewSettings(blur=(0.9, 0.5), solarize=(0.1, 0.5), color_jitter_prob=0.6)
    views = [View(32, augmentation, 1), View(32, augmentation, 2), *3 * [View(16, ViewSettings(crop_scale=(0.1, 0.4)))]]
    split, made, calls = coloured(kind, tmp_path), {}, []
    name = "apply_view" if kind == "arrays" else "apply_crops"
    function = getattr(batches, name)
    monkeypatch.setattr(batches, name, lambda *given: calls.append(len(given[0])) or function(*given))
    for most in (1, limit):
        calls.clear()
        monkeypatch.setitem(batches.JOINED, "cpu", most)
        (made[most],) = Batches(split, views, 6, ((0.4,) * 3, (0.3,) * 3), 3, small.ONE).epoch(0)
        assert calls == ([6] * 5 if most == 1 else [6, 6, 12, 6] if limit < 2**30 else [12, 18])
    for one, other in zip(made[1].views, made[limit].views, strict=True):
        assert one.std() > 0.1 and torch.equal(one, other)
    for one, other in zip(made[1].geometries, made[limit].geometries, strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.flips, other.flips)


def test_an_epoch_shuffles_all_images_and_drops_the_last_batch() -> None:
    order = Order(torch.arange(100, 120), 6, 0, small.ONE, "pretrain")
    epochs = [order.epoch(e) for e in range(3)]
    for rows in epochs:
        assert rows.shape == (3, 6) and len(set(rows.flatten().tolist())) == 18
        assert set(rows.flatten().tolist()) <= set(range(100, 120))
    assert not torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], order.epoch(0))
    assert not torch.equal(epochs[0], Order(torch.arange(100, 120), 6, 1, small.ONE, "pretrain").epoch(0))
    dropped = [set(range(100, 120)) - set(rows.flatten().tolist()) for rows in epochs]
    assert len({frozenset(d) for d in dropped}) == 3  # not always the same images


def test_mistakes_are_one_sentence(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretrain.batch_size 101 exceeds the 100 training images"):
        small.run(small.job("pretrain", digits, tmp_path / "large", batch_size=101))
    with pytest.raises(UserError, match=r"pretrain.accumulate 3 does not divide the 32 images of a process"):
        small.run(small.job("pretrain", digits, tmp_path / "parts", accumulate=3))
    with pytest.raises(UserError, match=r"the pretraining loss became nan; lower pretrain.lr"):
        small.run(small.job("pretrain", digits, tmp_path / "nan", lr=1e30, epochs=2))


def test_knn_during_training_starts_as_many_workers_as_are_asked_for(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    spread = {"effective_rank": 9.0, "dead_dimensions": 0.0, "knn_train_top1": 1.0}
    monkeypatch.setattr(pretrain, "monitor", lambda *arguments: asked.append(arguments[-1]) or spread)
    job = small.job("pretrain", digits, tmp_path, knn_every=1)
    small.run(replace(job, workers=0))
    assert asked == job.settings.pretrain.epochs * [0]
