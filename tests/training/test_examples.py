"""Batches of finetuning: what they are made of, and that neither processes nor interruptions change them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from PIL import Image
from torch import Tensor

from aps.data.load import ArraySplit, FileSplit
from aps.errors import UserError
from aps.runtime.processes import Distributed
from aps.settings.blocks import FinetuneSettings
from aps.training import augment
from aps.training import examples as module
from aps.training.examples import AugmentedExamples, Examples

NORMALIZATION = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
PLAIN = {
    "rand_augment": None,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "flip": 0.0,
    "label_smoothing": 0.0,
}


def arrays(count: int = 50, side: int = 16) -> ArraySplit:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return ArraySplit(images, torch.arange(count) % 5, tuple("abcde"))


def files(folder: Path, count: int = 24) -> FileSplit:
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / f"{i}.png")
    return FileSplit(
        folder, np.array([f"{i}.png".encode() for i in range(count)]), torch.arange(count) % 5, tuple("abcde")
    )


def examples(
    split: ArraySplit | FileSplit, distributed: Distributed = small.ONE, seed: int = 0, workers: int = 0, **changes: Any
) -> AugmentedExamples:
    settings = FinetuneSettings(**{"batch_size": 8, **changes})
    return AugmentedExamples(
        split, torch.arange(len(split)), settings, 16, 5, NORMALIZATION, seed, distributed, workers
    )


def same(one: Examples, other: Examples) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_epoch_brings_every_image_once_with_its_label_in_another_order_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = arrays(48)
    found = examples(split, crop="pad", **PLAIN)
    everything = torch.tensor([[2, 2, 16, 16]])  # of 16 pixels padded by 2
    monkeypatch.setattr(augment.Draw, "boxes", lambda self, heights, *_: everything.expand(len(heights), -1))
    orders = []
    for epoch in range(2):
        seen = []
        for batch in found.epoch(epoch):
            mean, std = (torch.tensor(x).view(3, 1, 1) for x in NORMALIZATION)
            pixels = ((batch.images * std + mean) * 255).round().to(torch.uint8)
            for pixel, target, label in zip(pixels, batch.targets, batch.labels, strict=True):
                (match,) = (split.images == pixel).flatten(1).all(1).nonzero()[:, 0]
                seen.append(int(match))
                assert label == split.labels[match] and torch.equal(target, torch.eye(5)[label])
        assert sorted(seen) == list(range(48))
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_any_number_of_processes_sees_the_same_batches(crop: str) -> None:
    split = arrays()
    whole = list(examples(split, crop=crop, erasing=0.8).epoch(3))
    assert len(whole) == 6
    for world in (2, 4):
        shares = [
            list(examples(split, Distributed(rank, world, torch.device("cpu")), crop=crop, erasing=0.8).epoch(3))
            for rank in range(world)
        ]
        for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
            together = Examples(*(torch.cat(field) for field in zip(*parts, strict=True)))
            assert same(batch, together)


def test_an_epoch_goes_on_from_its_middle_with_the_same_batches(tmp_path: Path) -> None:
    for split in (arrays(), files(tmp_path)):
        found = examples(split)
        whole = list(found.epoch(2))
        assert all(same(a, b) for a, b in zip(whole[1:], found.epoch(2, first=1), strict=True))
        other, again = list(found.epoch(1)), list(examples(split, seed=1).epoch(2))
        assert not any(torch.equal(a.images, b.images) for a, b in zip(whole, other, strict=True))
        assert not any(torch.equal(a.images, b.images) for a, b in zip(whole, again, strict=True))


def test_how_many_batches_are_made_at_once_changes_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for split in (arrays(), files(tmp_path)):
        at_once = list(examples(split).epoch(0))
        for pixels in (2 * 8 * 16**2, 1):
            monkeypatch.setattr(module, "PIXELS_AT_ONCE", pixels)
            assert all(same(a, b) for a, b in zip(at_once, examples(split).epoch(0), strict=True))
        monkeypatch.undo()


def test_batches_do_not_depend_on_the_global_generators() -> None:
    found = examples(arrays(), erasing=1.0)
    torch.manual_seed(1)
    one = list(found.epoch(0))
    torch.manual_seed(2)
    np.random.seed(2)
    assert all(same(a, b) for a, b in zip(one, found.epoch(0), strict=True))


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_files_are_cut_by_workers_and_the_rest_is_as_for_arrays(crop: str, tmp_path: Path) -> None:
    split = files(tmp_path)
    alone, helped = (list(examples(split, workers=workers, crop=crop).epoch(0)) for workers in (0, 2))
    assert len(alone) == 3 and all(same(a, b) for a, b in zip(alone, helped, strict=True))
    shares = [list(examples(split, Distributed(rank, 2, torch.device("cpu")), crop=crop).epoch(0)) for rank in range(2)]
    for batch, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert same(batch, Examples(*(torch.cat(field) for field in zip(*parts, strict=True))))


def test_moves_let_the_mean_colour_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that after normalization it is no edge: about 0."""
    seen: list[Tensor] = []
    run = augment.run_program
    monkeypatch.setattr(
        augment, "run_program", lambda images, program, fill: (seen.append(fill), run(images, program, fill))[1]
    )
    next(iter(examples(arrays()).epoch(0)))
    assert seen[0].tolist() == [128.0, 102.0, 76.0]


def test_mistakes_are_one_sentence() -> None:
    two = Distributed(0, 2, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"batch_size 6 gives each of the 2 processes an odd number of images, and mixup pairs"
    ):
        examples(arrays(), two, batch_size=6)
    with pytest.raises(UserError, match=r"finetune.batch_size 60 exceeds the 50 training images"):
        examples(arrays(), batch_size=60)
    assert examples(arrays(), two, batch_size=6, mixup=0.0, cutmix=0.0).batches == 8


def test_no_decoding_worker_is_left_after_training(tmp_path: Path) -> None:
    """One that is killed later would raise an error wherever the stage is."""
    found = examples(files(tmp_path), workers=1)
    batches = found.epoch(0)
    next(batches)
    assert multiprocessing.active_children()
    del batches
    found.close()
    assert not multiprocessing.active_children()
