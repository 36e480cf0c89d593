"""Loads a split by its manifest: images in memory for small datasets, a reader of files for large ones.

Files that the preparation wrote are compared with their checksums: arrays and lists once a process, an image each time
that it is read, which takes 4 % of the time of decoding it.

It does not know datasets by name, augmentation or normalization.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aps.data.images import read_file, read_image
from aps.data.manifest import NO_LABEL, Manifest, prepare_it, read_checksums, read_index, verify
from aps.errors import UserError


@dataclass(frozen=True)
class ArraySplit:
    """A split in memory."""

    images: Tensor  # uint8 (M, 3, H, W); a grayscale image's three channels share memory
    labels: Tensor  # int64 (M,); NO_LABEL where the dataset has none
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Tensor:
        """uint8 (3, H, W)."""
        return self.images[i]

    def select(self, rows: Tensor) -> ArraySplit:
        """The images of `rows`, int64 (m,)."""
        return ArraySplit(self.images[rows], self.labels[rows], self.classes)


@dataclass(frozen=True)
class FileSplit:
    """A split on disk. Names are one numpy array, so that forked workers share its memory."""

    root: Path
    names: np.ndarray  # bytes (M,): paths under root
    labels: Tensor  # int64 (M,); NO_LABEL where the dataset has none
    classes: tuple[str, ...]
    checksums: np.ndarray | None = None  # uint8 (M, 32): SHA-256, of images that the preparation wrote

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> Path:
        return self.root / self.names[i].decode("utf-8", errors="surrogateescape")

    def select(self, rows: Tensor) -> FileSplit:
        """The images of `rows`, int64 (m,)."""
        checksums = None if self.checksums is None else self.checksums[rows.numpy()]
        return FileSplit(self.root, self.names[rows.numpy()], self.labels[rows], self.classes, checksums)

    def compare(self, i: int) -> None:
        """Raises UserError where the preparation wrote an image and its file is gone or another; for readers of paths."""
        if self.checksums is not None:
            read_file(self.path(i), self._checksum(i))

    def read(self, i: int, at_least: int | None = None) -> Tensor:
        """uint8 (3, H, W), in full size or reduced as by `read_image`.

        Raises:
            UserError: the file is not a readable image, or not what the preparation wrote.
        """
        return read_image(self.path(i), at_least, self._checksum(i))

    def _checksum(self, i: int) -> bytes | None:
        return None if self.checksums is None else self.checksums[i].tobytes()


def spread_rows(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, evenly spread and ascending."""
    return list(np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist())


def load_split(
    manifest_path: Path, split: str, limit: int | None = None, seed: int = 0, labelled: bool = False
) -> ArraySplit | FileSplit:
    """One split of a prepared dataset.

    Args:
        manifest_path: results/data/NAME/manifest.json.
        split: train or test.
        limit: keep this many images, chosen by `limited`; None keeps all.
        seed: the seed of that choice.
        labelled: whether labels are needed.

    Raises:
        UserError: the dataset is not prepared or has no labels that are needed, there is no such split, its files are
            gone or altered, or `limit` exceeds its images.
    """
    manifest_path = Path(manifest_path)
    manifest, folder = Manifest.read(manifest_path), manifest_path.parent
    if labelled and manifest.kind == "images":
        raise UserError(
            f"{manifest_path}: dataset '{manifest.name}' has no labels; name a labelled dataset for this stage"
        )
    if split not in manifest.splits:
        raise UserError(
            f"{manifest_path}: dataset '{manifest.name}' has no split '{split}'; it has {', '.join(manifest.splits)}"
        )
    files = manifest.splits[split]
    file = files.tensors or files.index
    if file is None or manifest.kind == "detection":
        raise UserError(f"{manifest_path}: dataset '{manifest.name}' is for detection; name a classification dataset")
    if limit is not None and limit > files.count:
        raise UserError(
            f"limit {limit} exceeds the {files.count} {split} images of dataset '{manifest.name}'; lower dataset.train_limit"
        )
    verify(manifest, folder, file)
    try:
        if files.tensors is not None:
            tensors = load_file(folder / file)
            images = tensors["images"]
            labels = tensors.get("labels", torch.full((len(images),), NO_LABEL))
        else:
            listed, targets = read_index(folder / file)
            labels = torch.tensor(targets, dtype=torch.int64)
            written = b"".join(read_checksums(folder / file))
            checksums = np.frombuffer(written, dtype=np.uint8).reshape(len(listed), -1) if written else None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{folder / file}: cannot be read ({error}); {prepare_it(manifest.name)}") from None
    if len(labels) != files.count:
        raise UserError(
            f"{folder / file}: holds {len(labels)} images instead of {files.count}; {prepare_it(manifest.name)}"
        )
    _check_labels(folder / file, labels, manifest)
    chosen = limited(labels, limit, seed) if limit is not None else None
    if files.tensors is not None:
        if chosen is not None:
            images, labels = images[chosen], labels[chosen]
        return ArraySplit(images.expand(-1, 3, -1, -1), labels, manifest.classes)
    names = np.array([name.encode("utf-8", errors="surrogateescape") for name in listed])
    images_and_labels = FileSplit(folder / (files.images or "."), names, labels, manifest.classes, checksums)
    return images_and_labels if chosen is None else images_and_labels.select(chosen)


def _check_labels(file: Path, labels: Tensor, manifest: Manifest) -> None:
    low, high = (0, len(manifest.classes) - 1) if manifest.classes else (NO_LABEL, NO_LABEL)
    if len(labels) and not (low <= int(labels.min()) and int(labels.max()) <= high):
        if manifest.classes and int(labels.max()) == NO_LABEL:  # prepared by a version that did not refuse it
            raise UserError(
                f"{file}: dataset '{manifest.name}' has classes and no labels; give it both or neither in its file, then "
                f"{prepare_it(manifest.name)}"
            )
        wrong = int(labels.max()) if int(labels.max()) > high else int(labels.min())
        raise UserError(
            f"{file}: holds label {wrong}, but dataset '{manifest.name}' has classes {low} to {high}; "
            f"{prepare_it(manifest.name)}"
            if manifest.classes
            else f"{file}: holds label {wrong}, but dataset '{manifest.name}' has no labels; {prepare_it(manifest.name)}"
        )


def limited(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Rows of a class-balanced choice of `limit` images, int64 (limit,), ascending.

    Each class is shuffled. Then, round by round, every class that has images left gives one, in an order shuffled anew
    each round, until there are `limit`. So classes differ by at most one image while none has run out, a smaller limit
    is a subset of a larger one with the same seed, and the largest is the whole split.

    Args:
        labels: int64 (M,).
    """
    generator = np.random.default_rng(seed)
    targets = labels.numpy()
    by_class = np.lexsort((generator.permutation(len(targets)), targets))  # all classes at once: there may be 20,000
    _, sizes = np.unique(targets, return_counts=True)
    round_of_row = np.empty(len(targets), dtype=np.int64)
    round_of_row[by_class] = np.arange(len(targets)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return torch.from_numpy(np.sort(np.lexsort((generator.permutation(len(targets)), round_of_row))[:limit]))
