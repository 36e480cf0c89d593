"""Order of training images, targets, results."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aps.data.manifest import Manifest, with_sizes
from aps.detection.annotations import CocoSplit, Positions, image_at, result_rows, seed_of
from aps.errors import UserError


def shown(count: int, seed: int, batch: int, iterations: range, world: int) -> list[list[int]]:
    """Images of each iteration's batch, in order, as `world` processes see them together."""
    streams = [iter(Positions(batch, iterations.start, rank, world)) for rank in range(world)]
    own = batch // world
    return [[image_at(p, count, seed) for stream in streams for p in itertools.islice(stream, own)] for _ in iterations]


def test_resuming_at_an_iteration_shows_the_images_an_undisturbed_run_would():
    whole = shown(10, 7, 4, range(0, 12), 1)
    assert shown(10, 7, 4, range(5, 12), 1) == whole[5:]
    assert shown(10, 7, 4, range(0, 12), 2) == whole == shown(10, 7, 4, range(0, 12), 4)


def test_every_image_comes_once_before_any_comes_again_and_shuffles_differ():
    order = [image_at(p, 10, 7) for p in range(30)]
    turns = [order[:10], order[10:20], order[20:]]
    assert all(sorted(turn) == list(range(10)) for turn in turns)
    assert turns[0] != turns[1] != turns[2] and order != [image_at(p, 10, 8) for p in range(30)]


def test_seeds_of_neighbouring_positions_and_ranks_are_unlike():
    seeds = {seed_of(s, i, r) for s in range(3) for i in range(50) for r in range(4)}
    assert len(seeds) == 600


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match=r"batch_size 6 is not a multiple of the 4 processes"):
        Positions(6, 0, 0, 4)


def test_targets_are_the_annotations(val: CocoSplit):
    for index in range(len(val)):
        target, records = val.target(index), val.coco.imgToAnns[val.ids[index]]
        assert [val.classes[i] for i in target.labels] == [val.coco.cats[a["category_id"]]["name"] for a in records]
        for box, mask in zip(target.boxes, target.masks, strict=True):
            ys, xs = np.nonzero(mask.numpy())
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_training_leaves_out_images_without_instances_and_crowds(manifest: Path, tmp_path: Path):
    coco = json.loads((manifest.parent / "instances_train.json").read_text())
    bare, crowded = coco["images"][0]["id"], coco["images"][1]["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != bare]
    for annotation in coco["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == crowded)
    (tmp_path / "instances_val.json").write_bytes((manifest.parent / "instances_val.json").read_bytes())
    (tmp_path / "instances_train.json").write_text(json.dumps(coco))
    with_sizes(Manifest.read(manifest), tmp_path).write(tmp_path / "manifest.json")
    training = CocoSplit(tmp_path / "manifest.json", "train", training=True)
    everything = CocoSplit(tmp_path / "manifest.json", "train", training=False)
    assert set(everything.ids) - set(training.ids) == {bare, crowded}
    assert len(everything.target(everything.ids.index(crowded)).labels) == 0


def test_broken_annotations_are_named(manifest: Path, tmp_path: Path):
    (tmp_path / "manifest.json").write_bytes(manifest.read_bytes())
    (tmp_path / "instances_val.json").write_text("{")
    with pytest.raises(UserError, match=r"instances_val\.json: cannot be read \(damaged or altered .*prepare it by"):
        CocoSplit(tmp_path / "manifest.json", "val", training=False)
    (tmp_path / "instances_train.json").write_text("{")
    with_sizes(Manifest.read(manifest), tmp_path).write(tmp_path / "manifest.json")
    with pytest.raises(UserError, match=r"instances_val\.json: not COCO annotations .*prepare it by"):
        CocoSplit(tmp_path / "manifest.json", "val", training=False)


def test_result_rows_give_back_boxes_and_masks(val: CocoSplit):
    target = val.target(0)
    rows = result_rows(
        val, val.ids[0], target.boxes, torch.ones(len(target.labels)), target.labels, target.masks.bool()
    )
    for row, annotation in zip(rows, val.coco.imgToAnns[val.ids[0]], strict=True):
        assert row["bbox"] == annotation["bbox"] and row["category_id"] == annotation["category_id"]
        assert row["segmentation"] == annotation["segmentation"]
