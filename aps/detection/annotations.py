"""Reads splits in COCO's format: the images of a detector, their order, boxes and masks.

Design: the order of training images is a pure function of seed and iteration, for any number of processes, and so is
each image's augmentation. So a resumed run sees the same images as an uninterrupted one, and so do both engines.
It does not know detectors.

Letters: K instances of an image; M images of a split; H, W rows and columns of an image.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterable, Iterator, Sequence
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
from aps.data.manifest import Manifest, prepare_it, read_checksums, read_index, verify
from aps.errors import UserError


@dataclass(frozen=True)
class Target:
    """Instances of an image, crowds left out."""

    boxes: Tensor  # float (K, 4): left, top, right, bottom in pixels; right and bottom are outside
    labels: Tensor  # int64 (K,), in [0, classes)
    masks: Tensor | None  # uint8 (K, H, W); None where the dataset has boxes only


class Packed(Sequence[Any]):
    """A list of plain data in one array, made again when it is read.

    Reading a Python object writes to it, because it counts its references. So each decoding worker would in time get a
    copy of all annotations of its own, 1.3 GB for COCO's train split.
    """

    def __init__(self, records: Iterable[Any]) -> None:
        pieces = [pickle.dumps(record, pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([0, *map(len, pieces)])
        self._bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]].data)


class CocoSplit:
    """One split of a detection dataset.

    Attributes:
        manifest: the file manifest.json of the dataset.
        annotations: the COCO json file.
        folder: the folder of its images.
        ids: ids of its images, ascending; for training only those with an instance that is not a crowd, and of these as
            many as `limit` says.
        categories: the category ids of the json file, ascending; a label is a position in this list.
        classes: the names of the categories, in the same order.
        masks: whether instances have masks; else they have boxes only.
        run_lengths: whether instances that are not crowds have run-length masks, not polygons.
        coco: the whole file, for scoring; not there for training.
    """

    def __init__(self, manifest_path: Path, split: str, training: bool, limit: int | None = None) -> None:
        """limit: of the images to train on, those that come first in a fixed shuffle, the same whatever the run's seed.

        Raises UserError where the dataset is not prepared, its annotations are altered, broken or empty, or `limit`
        exceeds its images with an instance."""
        manifest = Manifest.read(manifest_path)
        if manifest.kind != "detection":
            raise UserError(f"{manifest_path}: dataset '{manifest.name}' has no boxes; name a detection dataset")
        self.manifest = manifest_path
        files = manifest.splits[split]
        self.annotations = manifest_path.parent / str(files.annotations)
        self.folder = manifest_path.parent / str(files.images)
        self.masks = manifest.masks
        verify(manifest, manifest_path.parent, str(files.annotations))
        written: dict[str, bytes] = {}  # images that the preparation wrote: their SHA-256
        if files.index is not None:
            verify(manifest, manifest_path.parent, files.index)
            index = manifest_path.parent / files.index
            written = dict(zip(read_index(index)[0], read_checksums(index), strict=False))
        self.name = f"{manifest.name}_{split}_{manifest.digest[:12]}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress by print
                coco = COCO(str(self.annotations))
            self.categories = sorted(coco.cats)
            self.classes = tuple(coco.cats[i]["name"] for i in self.categories)
            self.ids = sorted(coco.imgs)
            if training:
                self.ids = [i for i in self.ids if any(not a.get("iscrowd", 0) for a in coco.imgToAnns[i])]
                with_instance = len(self.ids)
                if limit is not None:
                    self.ids = sorted(np.random.default_rng(0).permutation(self.ids)[:limit].tolist())
            else:
                self.coco = coco
            instances = [a for a in coco.anns.values() if not a.get("iscrowd", 0)]
            self.run_lengths = any(isinstance(a.get("segmentation"), dict) for a in instances)
            self._records = Packed(
                (
                    coco.imgs[i],
                    [a for a in coco.imgToAnns[i] if not a.get("iscrowd", 0)],
                    written.get(coco.imgs[i]["file_name"]),
                )
                for i in self.ids
            )
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(
                f"{self.annotations}: not COCO annotations ({error}); {prepare_it(manifest.name)}"
            ) from None
        if not self.ids:
            raise UserError(f"{self.annotations}: no image has an instance; {prepare_it(manifest.name)}")
        if training and limit is not None and limit > with_instance:
            raise UserError(
                f"detection.train_limit {limit} exceeds the {with_instance} {split} images with an instance of dataset "
                f"'{manifest.name}'; lower it"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        return self.folder / self._records[index][0]["file_name"]

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W). Raises UserError where the file is not a readable image, or not what the preparation wrote."""
        return read_image(self.path(index), checksum=self._records[index][2])

    def target(self, index: int) -> Target:
        """The instances of an image, without crowds."""
        image, instances, _ = self._records[index]
        height, width = image["height"], image["width"]
        corner = torch.tensor([a["bbox"] for a in instances], dtype=torch.float32).reshape(-1, 4)
        masks = None
        if self.masks:
            planes = [torch.from_numpy(_mask(a["segmentation"], height, width)) for a in instances]
            empty = torch.zeros(0, height, width, dtype=torch.uint8)
            masks = torch.stack(planes) if planes else empty
        return Target(
            boxes=torch.cat([corner[:, :2], corner[:, :2] + corner[:, 2:]], dim=1),
            labels=torch.tensor([self.categories.index(a["category_id"]) for a in instances], dtype=torch.int64),
            masks=masks,
        )


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) of polygons or run lengths, as pycocotools' `annToMask`."""
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return rle.decode(rle.merge(segmentation) if isinstance(segmentation, list) else segmentation)  # type: ignore[no-any-return]


def result_rows(
    split: CocoSplit, image_id: int, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor | None
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's result format.

    Args:
        boxes: (K, 4), left, top, right, bottom in pixels.
        scores: (K,).
        labels: (K,), in [0, classes).
        masks: bool (K, H, W); None of a detector without masks.
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
# The order of training images: an endless sequence of positions, one shuffle of the split after another.


@lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def image_at(position: int, count: int, seed: int) -> int:
    """Index of the training image at a position of the sequence."""
    epoch, offset = divmod(position, count)
    return int(_shuffle(count, seed, epoch)[offset])


def seed_of(*parts: int) -> int:
    """A 32-bit seed from whole numbers: (seed, position) for an image, (seed, iteration, rank) for a step."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Positions(Sampler[int]):
    """Endless positions of this process, from iteration `start` on: its share of each batch."""

    def __init__(self, batch_size: int, start: int, rank: int, world: int) -> None:
        """Raises UserError where the batch can't be divided evenly among the processes."""
        if batch_size % world:
            raise UserError(
                f"detection.batch_size {batch_size} is not a multiple of the {world} processes; change one of them"
            )
        self.batch_size, self.start, self.rank = batch_size, start, rank
        self.local_batch = batch_size // world  # images a process

    def __iter__(self) -> Iterator[int]:
        iteration = self.start
        while True:
            first = iteration * self.batch_size + self.rank * self.local_batch
            yield from range(first, first + self.local_batch)
            iteration += 1
