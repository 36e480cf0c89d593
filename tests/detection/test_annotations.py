"""Order of training images, targets, results."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from aps.data.manifest import Manifest, with_sizes
from aps.detection import engine
from aps.detection.annotations import CocoSplit, Positions, _mask, image_at, result_rows, seed_of
from aps.detection.engine import Task
from aps.detection.engines.torchvision import Engine
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


def copy(folder: Path, to: Path, file: str) -> None:
    """Copy a file of a prepared dataset, and the lists of its images."""
    for name in (file, "train.tsv", "val.tsv"):
        shutil.copy(folder / name, to)


def test_training_leaves_out_images_without_instances_and_crowds(manifest: Path, tmp_path: Path):
    coco = json.loads((manifest.parent / "instances_train.json").read_text())
    bare, crowded = coco["images"][0]["id"], coco["images"][1]["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != bare]
    for annotation in coco["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == crowded)
    copy(manifest.parent, tmp_path, "instances_val.json")
    (tmp_path / "instances_train.json").write_text(json.dumps(coco))
    with_sizes(Manifest.read(manifest), tmp_path).write(tmp_path / "manifest.json")
    training = CocoSplit(tmp_path / "manifest.json", "train", training=True)
    everything = CocoSplit(tmp_path / "manifest.json", "train", training=False)
    assert set(everything.ids) - set(training.ids) == {bare, crowded}
    assert len(everything.target(everything.ids.index(crowded)).labels) == 0


def test_a_limit_takes_images_with_instances_and_a_larger_one_takes_these_too(manifest: Path, tmp_path: Path):
    coco = json.loads((manifest.parent / "instances_train.json").read_text())
    bare = {image["id"] for image in coco["images"][::2]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] not in bare]
    copy(manifest.parent, tmp_path, "instances_val.json")
    (tmp_path / "instances_train.json").write_text(json.dumps(coco))
    with_sizes(Manifest.read(manifest), tmp_path).write(tmp_path / "manifest.json")
    whole = CocoSplit(tmp_path / "manifest.json", "train", training=True)
    chosen = [set(CocoSplit(tmp_path / "manifest.json", "train", training=True, limit=n).ids) for n in range(1, 13)]
    assert [len(ids) for ids in chosen] == list(range(1, 13)) and chosen[-1] == set(whole.ids)
    assert all(fewer < more for fewer, more in itertools.pairwise(chosen))
    assert chosen[5] != set(whole.ids[:6])  # not the first of the file, which may be alike
    few = CocoSplit(tmp_path / "manifest.json", "train", training=True, limit=3)
    for index, image in enumerate(few.ids):
        assert few.path(index) == whole.path(whole.ids.index(image))
        assert torch.equal(few.target(index).boxes, whole.target(whole.ids.index(image)).boxes)
    with pytest.raises(UserError, match=r"detection\.train_limit 13 exceeds the 12 train images with an instance of"):
        CocoSplit(tmp_path / "manifest.json", "train", training=True, limit=13)


def test_broken_annotations_are_named(manifest: Path, tmp_path: Path):
    copy(manifest.parent, tmp_path, "manifest.json")
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


def test_training_holds_annotations_in_one_array_that_workers_share(manifest: Path):
    """Objects would be copied into each worker that reads them: 1.3 GB a worker for COCO."""
    train = CocoSplit(manifest, "train", training=True)
    objects: list[object] = [train]
    for one in objects:  # all that it holds, and what that holds
        held = vars(one).values() if hasattr(one, "__dict__") else one if isinstance(one, list | tuple | dict) else ()
        objects += held
    assert not any(isinstance(one, dict) for one in objects)
    whole = CocoSplit(manifest, "train", training=False)
    assert train.path(0) == whole.path(whole.ids.index(train.ids[0]))
    for number in range(len(train)):
        annotations = whole.coco.imgToAnns[train.ids[number]]
        masks = [whole.coco.annToMask(a) for a in annotations]
        assert torch.equal(train.target(number).masks, torch.from_numpy(np.stack(masks)))


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1.0, 1.0, 6.0, 1.0, 6.0, 5.0], [8.0, 2.0, 11.0, 2.0, 11.0, 7.0, 8.0, 7.0]],
        {"size": [8, 12], "counts": [10, 20, 66]},
        {
            "size": [8, 12],
            "counts": rle.frPyObjects({"size": [8, 12], "counts": [10, 20, 66]}, 8, 12)["counts"].decode(),
        },
    ],
)
def test_a_mask_of_any_form_is_that_of_pycocotools(segmentation: Any):
    coco = COCO()
    coco.imgs = {1: {"height": 8, "width": 12}}
    expected = coco.annToMask({"image_id": 1, "segmentation": segmentation})
    assert expected.any() and np.array_equal(_mask(segmentation, 8, 12), expected)


def test_evaluation_reads_image_by_image(task: Task, monkeypatch: pytest.MonkeyPatch):
    """Batches read ahead by each worker would be thousands of images in shared memory, each with an open file."""
    found = []
    monkeypatch.setattr(engine, "DataLoader", lambda *args, **more: found.append(more) or DataLoader(*args, **more))
    tiny = Engine(task)
    sizes: list[int] = []
    predict = tiny.predict
    monkeypatch.setattr(tiny, "predict", lambda images: sizes.append(len(images)) or predict(images))
    tiny.evaluate()
    assert [more["batch_size"] for more in found] == [None]
    assert sizes == [task.settings.batch_size] * (len(task.val) // task.settings.batch_size)
