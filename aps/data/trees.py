"""Datasets that are folders of image files: listed, checked and described, never copied.

The layout is torchvision's ImageFolder: one folder a class, images anywhere below it.
It deliberately does not know where a tree came from.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch

from aps.data.fetch import parallel
from aps.data.load import limited, read_image
from aps.data.manifest import (
    ChannelStatistics,
    Manifest,
    Split,
    Statistics,
    content_digest,
    with_sizes,
    write_atomic,
    write_index,
)
from aps.data.statistics import Accumulator
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

READABLE = (".jpg", ".jpeg", ".png", ".webp", ".gif")
UNREADABLE = (".bmp", ".ppm", ".pgm", ".tif", ".tiff")  # images that torchvision's decoder does not read


class Listing(NamedTuple):
    """The images of one split, sorted by class, then name."""

    root: Path
    names: list[str]  # paths under root
    labels: list[int]
    sizes: list[int]  # bytes

    def rows(self, chosen: list[int]) -> Listing:
        return Listing(
            self.root,
            [self.names[i] for i in chosen],
            [self.labels[i] for i in chosen],
            [self.sizes[i] for i in chosen],
        )


class Seen(NamedTuple):
    """Some images, decoded."""

    sha256: list[str]
    image_sizes: set[tuple[int, int]]
    sums: Accumulator
    broken: list[UserError]


def class_folders(root: Path) -> list[str]:
    """Names of a tree's class folders, sorted. Raises UserError where it has none."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{root}: has no class folders; put the images of each class in a folder of its name")
    return classes


def listing(root: Path, classes: list[str]) -> Listing:
    """Every image of `root`, whose class folders must be exactly `classes`.

    Raises:
        UserError: a class folder is missing, unknown or empty, or holds images of a format that can't be read.
    """
    found = class_folders(root)
    if missing := sorted(set(classes) - set(found)):
        raise UserError(f"{root}: class folder '{missing[0]}' is missing{_more(missing)}; add it")
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(
            f"{root}: class folder '{unknown[0]}' is in this split only{_more(unknown)}; add it to the other"
        )
    per_class = parallel(lambda name: _images(root, name), classes, f"list {root.name}")
    names = [name for images in per_class for name, _ in images]
    sizes = [size for images in per_class for _, size in images]
    labels = [label for label, images in enumerate(per_class) for _ in images]
    return Listing(root, names, labels, sizes)


def describe(
    folder: Path,
    name: str,
    classes: list[str],
    splits: dict[str, Listing],
    origin: str,
    source: SourceSettings,
    sample: int | None = None,
    published: ChannelStatistics | None = None,
) -> Manifest:
    """Write the index of each split, and the manifest's content.

    Args:
        splits: train and test.
        sample: decode this many train images, balanced over classes, for the statistics, and let the digest cover
            names, sizes and labels; None decodes every image of every split and covers their contents.

    Raises:
        UserError: an image that was decoded is unreadable; all of those are listed in `folder`/unreadable.txt.
    """
    train = splits["train"]
    looked = splits
    if sample is not None and sample < len(train.names):
        looked = {"train": train.rows(limited(torch.tensor(train.labels), sample, seed=0).tolist())}
    seen = {split: _look_at(folder, split, images) for split, images in looked.items()}
    every = looked is splits
    over = f"every pixel of {'the' if every else 'a seeded, class-balanced sample of'} {len(looked['train'].names):,}"
    contents = {
        split: [images.names, images.labels, seen[split].sha256 if every else images.sizes]
        for split, images in splits.items()
    }
    image_sizes = set().union(*(images.image_sizes for images in seen.values()))
    written = {}
    for split, images in splits.items():
        write_index(folder / f"{split}.tsv", images.names, images.labels)
        inside = images.root.resolve().is_relative_to(folder.resolve())
        where = images.root.resolve().relative_to(folder.resolve()) if inside else images.root.resolve()
        written[split] = Split(count=len(images.names), images=str(where), index=f"{split}.tsv")
    manifest = Manifest(
        name=name,
        kind="classification",
        classes=tuple(classes),
        image_size=image_sizes.pop() if every and len(image_sizes) == 1 else None,
        splits=written,
        statistics=Statistics(
            measured=seen["train"].sums.result(f"{over} train images, each image counting equally"), published=published
        ),
        digest=content_digest(classes, contents),
        digest_of=f"class names, file names, {'file contents' if every else 'file sizes'} and labels",
        origin=origin,
        source=source.path,
    )
    return with_sizes(manifest, folder)


# --------------------------------------------------------------------------------------------------


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _images(root: Path, name: str) -> list[tuple[str, int]]:
    """(path under root, bytes) of a class, sorted."""
    images = []
    folders = [name]
    while folders:
        inside = folders.pop()
        for entry in os.scandir(root / inside):
            path = f"{inside}/{entry.name}"
            if entry.is_dir():
                folders.append(path)
            elif entry.name.lower().endswith(UNREADABLE):
                raise UserError(f"{root / path}: images of this format can't be read; convert it to PNG or JPEG")
            elif entry.name.lower().endswith(READABLE):
                images.append((path, entry.stat().st_size))
    if not images:
        raise UserError(f"{root / name}: class folder has no images ({', '.join(READABLE)}); add some or remove it")
    return sorted(images)


def _look_at(folder: Path, split: str, images: Listing) -> Seen:
    chunks = [images.names[i : i + 64] for i in range(0, len(images.names), 64)]
    every = Seen([], set(), Accumulator(), [])
    for seen in parallel(lambda names: _look(images.root, names), chunks, f"decode {split}"):
        every.sha256.extend(seen.sha256)
        every.image_sizes.update(seen.image_sizes)
        every.sums.merge(seen.sums)
        every.broken.extend(seen.broken)
    if every.broken:
        listed = folder / "unreadable.txt"
        write_atomic(listed, "".join(f"{error}\n" for error in every.broken).encode())
        count = f"{len(every.broken)} such file{'s' * (len(every.broken) > 1)}"
        raise UserError(f"{every.broken[0]} ({count}, listed in {listed})")
    return every


def _look(root: Path, names: list[str]) -> Seen:
    seen = Seen([], set(), Accumulator(), [])
    for name in names:
        try:
            image = read_image(root / name)
        except UserError as error:
            seen.broken.append(error)
            continue
        seen.sha256.append(hashlib.sha256((root / name).read_bytes()).hexdigest())
        seen.image_sizes.add((image.shape[1], image.shape[2]))
        seen.sums.add(image[None])
    return seen
