"""COCO-format splits: which images a detector sees, in which order, with which boxes and masks.

Design: the order of training images is a pure function of seed and iteration, for any number of processes, and so is
each image's augmentation. A resumed run therefore sees what an undisturbed one would have, and both engines see the
same. It deliberately does not know detectors.

Letters: K instances of an image; M images of a split; H, W rows and columns of an image.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Sampler

from aps.data.images import read_image
from aps.data.manifest import Manifest, prepare_it, verify
from aps.errors import UserError


@dataclass(frozen=True)
class Target:
    """Instances of an image, crowds left out."""

    boxes: Tensor  # float (K, 4): left, top, right, bottom in pixels; right and bottom are outside
    labels: Tensor  # int64 (K,), in [0, classes)
    masks: Tensor | None  # uint8 (K, H, W); None where the dataset has boxes only


class CocoSplit:
    """One split of a detection dataset.

    Attributes:
        manifest: of the dataset.
        annotations: the COCO json file.
        folder: where its images lie.
        ids: ids of its images, ascending; for training only those with an instance that is no crowd.
        categories: the json's category ids, ascending; a label is a position in this list.
        classes: their names.
        masks: whether instances have masks; else they have boxes only.
    """

    def __init__(self, manifest_path: Path, split: str, training: bool) -> None:
        """Raises UserError where the dataset is not prepared or its annotations are altered, broken or without
        instances."""
        manifest = Manifest.read(manifest_path)
        if manifest.kind != "detection":
            raise UserError(f"{manifest_path}: dataset '{manifest.name}' has no boxes; name a detection dataset")
        self.manifest = manifest_path
        where = manifest.splits[split]
        self.annotations = manifest_path.parent / str(where.annotations)
        self.folder = manifest_path.parent / str(where.images)
        self.masks = manifest.masks
        verify(manifest, manifest_path.parent, str(where.annotations))
        self.name = f"{manifest.name}_{split}_{manifest.digest[:12]}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress by print
                self.coco = COCO(str(self.annotations))
            self.categories = sorted(self.coco.cats)
            self.classes = tuple(self.coco.cats[i]["name"] for i in self.categories)
            self.ids = sorted(self.coco.imgs)
            if training:
                self.ids = [i for i in self.ids if any(not a.get("iscrowd", 0) for a in self.coco.imgToAnns[i])]
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(
                f"{self.annotations}: not COCO annotations ({error}); {prepare_it(manifest.name)}"
            ) from None
        if not self.ids:
            raise UserError(f"{self.annotations}: no image has an instance; {prepare_it(manifest.name)}")

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        return self.folder / self.coco.imgs[self.ids[index]]["file_name"]

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W). Raises UserError where the file is no readable image."""
        return read_image(self.path(index))

    def target(self, index: int) -> Target:
        record = self.coco.imgs[self.ids[index]]
        instances = [a for a in self.coco.imgToAnns[self.ids[index]] if not a.get("iscrowd", 0)]
        corner = torch.tensor([a["bbox"] for a in instances], dtype=torch.float32).reshape(-1, 4)
        masks = None
        if self.masks:
            each = [torch.from_numpy(self.coco.annToMask(a)) for a in instances]
            masks = torch.stack(each) if each else torch.zeros(0, record["height"], record["width"], dtype=torch.uint8)
        return Target(
            boxes=torch.cat([corner[:, :2], corner[:, :2] + corner[:, 2:]], dim=1),
            labels=torch.tensor([self.categories.index(a["category_id"]) for a in instances], dtype=torch.int64),
            masks=masks,
        )

    @property
    def run_lengths(self) -> bool:
        """Whether instances (not crowds) come as run-length masks rather than polygons."""
        return any(isinstance(a.get("segmentation"), dict) for a in self.coco.anns.values() if not a.get("iscrowd", 0))


def result_rows(
    split: CocoSplit, image_id: int, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor | None
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's result format.

    Args:
        boxes: (K, 4) left, top, right, bottom; scores: (K,); labels: (K,); masks: bool (K, H, W), or
            None of a detector without.
    """
    rows: list[dict[str, Any]] = []
    for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
        left, top, right, bottom = box
        rows.append(
            {
                "image_id": image_id,
                "category_id": split.categories[label],
                "bbox": [left, top, right - left, bottom - top],
                "score": score,
            }
        )
    for row, mask in zip(rows, masks if masks is not None else (), strict=masks is not None):
        encoded = rle.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
        row["segmentation"] = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
    return rows


# --------------------------------------------------------------------------------------------------
# The order of training images: an endless sequence of positions, each shuffle of the split following the last.


@lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, turn: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(count)


def image_at(position: int, count: int, seed: int) -> int:
    """Index of the training image at a position of the sequence."""
    turn, place = divmod(position, count)
    return int(_shuffle(count, seed, turn)[place])


def seed_of(*parts: int) -> int:
    """A seed of 32 bits from whole numbers: (seed, position) for an image, (seed, iteration, rank) for a step."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Positions(Sampler[int]):
    """Positions of this process from an iteration on: its share of each batch, without end."""

    def __init__(self, batch_size: int, start: int, rank: int, world: int) -> None:
        """Raises UserError where the batch can't be shared out evenly."""
        if batch_size % world:
            raise UserError(
                f"detection.batch_size {batch_size} is not a multiple of the {world} processes; change one of them"
            )
        self.batch_size, self.start, self.rank, self.own = batch_size, start, rank, batch_size // world

    def __iter__(self) -> Iterator[int]:
        iteration = self.start
        while True:
            first = iteration * self.batch_size + self.rank * self.own
            yield from range(first, first + self.own)
            iteration += 1
