"""Composited detection datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from aps.data import composites
from aps.data.composites import RECIPES, Recipe, compose, resize
from aps.data.images import read_image
from aps.data.load import ArraySplit
from aps.data.manifest import Manifest
from aps.data.prepare import prepare
from aps.detection.annotations import CocoSplit
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

SMALL = Recipe("digits", 40, 12, 6, (2, 4), (14, 22), 80, 0.5, (1, 3), (0, 60), 16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Manifest]:
    monkeypatch.setitem(RECIPES, "digits_coco", SMALL)
    folder = tmp_path / "digits_coco"
    return folder, prepare("digits_coco", folder, SourceSettings())


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_canvas_is_mended_by_the_command_that_is_named(small: tuple[Path, Manifest], damage: str) -> None:
    folder, manifest = small
    canvas = folder / "train/000003.png"
    whole = canvas.read_bytes()
    canvas.unlink() if damage == "gone" else canvas.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"again: `python -m aps data digits_coco --again`$"):
        read_image(canvas)
    assert prepare("digits_coco", folder, SourceSettings(), force=True) == manifest and canvas.read_bytes() == whole


def test_another_canvas_in_its_place_is_noticed(small: tuple[Path, Manifest]) -> None:
    folder, manifest = small
    split = CocoSplit(folder / "manifest.json", "train", training=False)
    (folder / "train/000003.png").write_bytes((folder / "train/000004.png").read_bytes())
    assert "000003.png has" in str(manifest.altered_image(folder))
    with pytest.raises(UserError, match=r"000003\.png: .*its content is not what was prepared"):
        split.read(3)
    assert prepare("digits_coco", folder, SourceSettings()) == manifest and split.read(3).shape == (3, 40, 40)


def blocks(count: int = 5) -> ArraySplit:
    """Scans that are full squares of one level each, so that a pixel tells whose it is."""
    images = torch.stack([torch.full((3, 8, 8), 100 + 30 * i, dtype=torch.uint8) for i in range(count)])
    return ArraySplit(images, torch.arange(count), tuple("abcde"))


def test_a_mask_is_exactly_what_is_seen_of_an_object():
    recipe = Recipe("digits", 40, 1, 1, (6, 6), (12, 20), 90, 0.2)
    for seed in range(20):
        canvas, annotations = compose(recipe, blocks(), np.random.default_rng(seed))
        masks = np.stack([rle.decode(a["segmentation"]) for a in annotations]).astype(bool)
        assert canvas.shape == (1, 40, 40)
        assert (masks.sum(axis=0) <= 1).all()  # nothing is in two places, nothing behind is kept
        assert np.array_equal(masks.any(axis=0), canvas[0] > 0)  # everything painted is annotated
        for mask, annotation in zip(masks, annotations, strict=True):
            assert len(np.unique(canvas[0, mask])) == 1 and annotation["area"] == mask.sum()
            ys, xs = np.nonzero(mask)
            assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert mask.sum() >= 0.2 * 12 * 12  # `visible`


def test_fragments_hide_objects_but_are_no_instances():
    recipe = Recipe("digits", 40, 1, 1, (1, 1), (30, 30), 90, 0.1, fragments=(8, 8))
    canvas, annotations = compose(recipe, blocks(), np.random.default_rng(0))
    mask = rle.decode(annotations[0]["segmentation"]).astype(bool)
    assert len(annotations) == 1
    assert (canvas > 0).sum() > mask.sum() and mask.sum() < 30 * 30


def test_photographs_keep_their_colours_and_are_cut_to_ovals():
    recipe = Recipe("cifar10", 40, 1, 1, (1, 1), (20, 20), None, 0.1)
    scans = blocks()
    scans.images[:, 1] //= 2  # red and blue as they are, green half
    degrees = set()
    for seed in range(20):
        canvas, (annotation,) = compose(recipe, scans, np.random.default_rng(seed))
        mask = rle.decode(annotation["segmentation"]).astype(bool)
        red, green, blue = canvas[:, mask]
        assert canvas.shape == (3, 40, 40) and (canvas[:, ~mask] == 0).all()
        assert np.array_equal(red, blue) and len(np.unique(red)) == 1 and 0 <= red[0] - 2 * green[0] <= 2
        left, top, width, height = annotation["bbox"]
        assert 14 <= width <= 20 and 14 <= height <= 20  # three quarters and more of the square
        cut = mask[top : top + height, left : left + width]
        assert not cut[0, 0] and cut[height // 2].all() and cut[:, width // 2].all()
        assert np.array_equal(cut, cut[::-1, ::-1])
        degrees.add(round(4 * cut.sum() / (width * height)))  # pi for an ellipse, 3.7 for degree 4
    assert degrees == {3, 4}


def test_a_dataset_of_photographs_is_written_in_colour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(
        RECIPES, "digits_coco", Recipe("digits", 40, 3, 2, (2, 3), (14, 22), None, 0.5, (1, 2), (0, 255))
    )
    manifest = prepare("digits_coco", tmp_path, SourceSettings())
    pixels = [np.array(Image.open(file)) for file in sorted((tmp_path / "train").iterdir())]
    assert all(image.shape == (40, 40, 3) for image in pixels) and (pixels[0][..., 0] != pixels[0][..., 1]).any()
    expected = np.stack(pixels).reshape(-1, 3).mean(0) / 255
    assert manifest.normalization()[0] == pytest.approx(tuple(expected), abs=1e-9)


def test_the_files_are_coco_and_agree_with_the_images(small: tuple[Path, Manifest]):
    folder, manifest = small
    assert manifest.kind == "detection" and manifest.classes == tuple("0123456789")
    for split, count in (("train", 12), ("val", 6)):
        where = manifest.splits[split]
        coco = COCO(str(folder / where.annotations))
        assert len(coco.imgs) == where.count == count
        assert [c["name"] for c in coco.cats.values()] == list(manifest.classes)
        for image in coco.imgs.values():
            pixels = np.array(Image.open(folder / where.images / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"]) == (40, 40)
            for annotation in coco.imgToAnns[image["id"]]:
                mask = coco.annToMask(annotation).astype(bool)
                assert pixels[mask].min() >= (80 * 160) >> 8  # inked, at the weakest gain


def test_preparing_again_gives_the_same_pixels_and_digest(small: tuple[Path, Manifest], tmp_path: Path):
    folder, manifest = small
    again = prepare("digits_coco", tmp_path / "again", SourceSettings())
    assert again.digest == manifest.digest
    for file in sorted(folder.glob("*/*.png")):
        other = tmp_path / "again" / file.relative_to(folder)
        assert np.array_equal(np.array(Image.open(file)), np.array(Image.open(other)))


def test_the_digest_follows_an_annotation_and_a_pixel(
    small: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    _, manifest = small
    monkeypatch.setattr(composites, "SEED", composites.SEED + 1)
    assert prepare("digits_coco", tmp_path / "other", SourceSettings()).digest != manifest.digest


def test_val_canvases_hold_test_scans_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen: dict[int, list[ArraySplit]] = {}
    original = compose

    def spy(recipe: Recipe, scans: ArraySplit, generator: np.random.Generator):
        seen.setdefault(len(scans), []).append(scans)
        return original(recipe, scans, generator)

    monkeypatch.setitem(RECIPES, "digits_coco", SMALL)
    monkeypatch.setattr(composites, "compose", spy)
    prepare("digits_coco", tmp_path / "d", SourceSettings())
    assert {size: len(calls) for size, calls in seen.items()} == {1438: 12, 359: 6}  # digits' train and test


def test_enlarging_keeps_levels_and_orientation():
    image = np.zeros((8, 8), dtype=np.uint8)
    image[0, 7] = 255
    large = resize(image, 24)
    assert large.shape == (24, 24) and large[0, 23] == 255 and large[23, 0] == 0 and large[0, 0] == 0
    flat = np.full((8, 8), 77, dtype=np.uint8)
    assert (resize(flat, 19) == 77).all()


def test_the_prepared_folder_keeps_no_scans_and_its_statistics_are_those_of_train(small: tuple[Path, Manifest]):
    folder, manifest = small
    left = {p.name for p in folder.iterdir()}
    assert {"instances_train.json", "instances_val.json", "manifest.json", "train", "val"} <= left
    assert not any(name.startswith("source-") for name in left)
    assert json.loads((folder / "instances_val.json").read_text())["info"]["description"] == "digits_coco"
    assert manifest.normalization()[0][0] == pytest.approx(
        np.mean([np.array(Image.open(f)).mean() / 255 for f in (folder / "train").iterdir()]), abs=1e-9
    )
