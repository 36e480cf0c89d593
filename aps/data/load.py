"""Loading a split by its manifest: images in memory for small datasets, a reader of files for large ones.

It deliberately does not know datasets by name, augmentation or normalization.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

from aps.data.manifest import Manifest, prepare_it, read_index
from aps.errors import UserError


@dataclass(frozen=True)
class ArraySplit:
    """A split in memory."""

    images: Tensor  # uint8 (M, 3, H, W); a grayscale image's three channels share memory
    labels: Tensor  # int64 (M,)
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
    labels: Tensor  # int64 (M,)
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> Path:
        return self.root / self.names[i].decode("utf-8", errors="surrogateescape")

    def select(self, rows: Tensor) -> FileSplit:
        """The images of `rows`, int64 (m,)."""
        return FileSplit(self.root, self.names[rows.numpy()], self.labels[rows], self.classes)

    @property
    def paths(self) -> list[Path]:
        return [self.path(i) for i in range(len(self))]

    def read(self, i: int) -> Tensor:
        """uint8 (3, H, W) in the image's own size. Raises UserError where the file is no readable image."""
        return read_image(self.path(i))


def read_image(path: Path) -> Tensor:
    """uint8 RGB (3, H, W) of a JPEG, PNG, WebP or GIF file (its first frame).

    Raises:
        UserError: the file is missing, truncated or no image.
    """
    try:
        image = decode_image(read_file(str(path)), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from None
    if image.ndim == 4:  # an animation
        image = image[0]
    if image.dtype == torch.uint16:  # 16-bit PNG
        image = (image.to(torch.int32) >> 8).to(torch.uint8)
    return image


def load_split(manifest_path: Path, split: str, limit: int | None = None, seed: int = 0) -> ArraySplit | FileSplit:
    """One split of a prepared dataset.

    Args:
        manifest_path: results/data/NAME/manifest.json.
        split: train or test.
        limit: keep this many images, chosen by `limited`; None keeps all.
        seed: of that choice.

    Raises:
        UserError: not prepared, no such split, its files are gone, or `limit` exceeds it.
    """
    manifest_path = Path(manifest_path)
    manifest, folder = Manifest.read(manifest_path), manifest_path.parent
    if split not in manifest.splits:
        raise UserError(
            f"{manifest_path}: dataset '{manifest.name}' has no split '{split}'; it has {', '.join(manifest.splits)}"
        )
    where = manifest.splits[split]
    file = where.tensors or where.index
    if file is None or manifest.kind != "classification":
        raise UserError(f"{manifest_path}: dataset '{manifest.name}' is for detection; name a classification dataset")
    if limit is not None and limit > where.count:
        raise UserError(
            f"limit {limit} exceeds the {where.count} {split} images of dataset '{manifest.name}'; lower dataset.train_limit"
        )
    try:
        if where.tensors is not None:
            tensors = load_file(folder / file)
            images, labels = tensors["images"], tensors["labels"]
        else:
            listed, targets = read_index(folder / file)
            labels = torch.tensor(targets, dtype=torch.int64)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{folder / file}: cannot be read ({error}); {prepare_it(manifest.name)}") from None
    if len(labels) != where.count:
        raise UserError(
            f"{folder / file}: holds {len(labels)} images instead of {where.count}; {prepare_it(manifest.name)}"
        )
    chosen = limited(labels, limit, seed) if limit is not None else None
    if where.tensors is not None:
        if chosen is not None:
            images, labels = images[chosen], labels[chosen]
        return ArraySplit(images.expand(-1, 3, -1, -1), labels, manifest.classes)
    names = np.array([name.encode("utf-8", errors="surrogateescape") for name in listed])
    if chosen is not None:
        names, labels = names[chosen.numpy()], labels[chosen]
    return FileSplit(folder / (where.images or "."), names, labels, manifest.classes)


def limited(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Rows of a class-balanced choice of `limit` images, ascending.

    Each class is shuffled, then classes deal one image each in turn (in an order shuffled anew each turn) until `limit`
    are dealt, a class that has run out being passed over. So classes differ by at most one image while none has run
    out, a smaller limit is a subset of a larger one with the same seed, and the largest is the whole split.

    Args:
        labels: int64 (M,).
    """
    generator = np.random.default_rng(seed)
    targets = labels.numpy()
    tie = generator.permutation(len(targets))
    turn = np.empty(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        rows = np.flatnonzero(targets == label)
        turn[rows[np.argsort(tie[rows])]] = np.arange(len(rows))
    return torch.from_numpy(np.sort(np.lexsort((generator.permutation(len(targets)), turn))[:limit]))
