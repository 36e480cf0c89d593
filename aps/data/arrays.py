"""Datasets small enough for memory: one safetensors file a split.

Images are stored as published (grayscale with one channel); `load` repeats a single channel to three.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from aps.data.manifest import (
    ChannelStatistics,
    Manifest,
    Split,
    Statistics,
    content_digest,
    with_sizes,
)
from aps.data.statistics import Accumulator
from aps.files import write_bytes
from aps.settings.blocks import SourceSettings


def store(
    folder: Path,
    name: str,
    splits: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    classes: tuple[str, ...],
    origin: str,
    source: SourceSettings,
    published: ChannelStatistics | None = None,
) -> Manifest:
    """Write the splits and return the manifest that describes them.

    Args:
        folder: the dataset's folder under results/data.
        splits: train and test, each images uint8 (M, C, H, W) with C 1 or 3, and labels (M,) in [0, len(classes)); or
            train alone, with None for labels.
        published: the constants with which a published recipe normalizes, if any.

    Raises:
        ValueError: arrays of another shape or type.
    """
    written, contents = {}, []
    statistics = Accumulator()
    for split, (pixels, targets) in splits.items():
        images = torch.from_numpy(np.array(pixels, order="C"))
        labels = None if targets is None else torch.from_numpy(np.array(targets, dtype=np.int64))
        _check(name, split, images, labels, len(classes))
        if split == "train":
            for chunk in images.split(4096):
                statistics.add(chunk)
        file = f"{split}.safetensors"
        write_bytes(folder / file, save({"images": images} | ({} if labels is None else {"labels": labels})))
        written[split] = Split(count=len(images), tensors=file)
        contents += [split, list(images.shape), images.numpy().data.cast("B")]
        contents += [] if labels is None else [labels.numpy().data.cast("B")]
    manifest = Manifest(
        name=name,
        kind="classification" if classes else "images",
        classes=classes,
        image_size=(images.shape[2], images.shape[3]),
        splits=written,
        statistics=Statistics(
            measured=statistics.result(f"all pixels of the {statistics.images:,} train images"), published=published
        ),
        digest=content_digest(list(classes), *contents),
        digest_of="class names, pixels and labels" if classes else "pixels",
        origin=origin,
        source=source.path,
    )
    return with_sizes(manifest, folder)


def _check(name: str, split: str, images: Tensor, labels: Tensor | None, classes: int) -> None:
    """Raises ValueError, not UserError: other arrays come from a broken parser, not from the user."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"{name} {split}: images {images.dtype} {tuple(images.shape)}")
    if labels is None:
        return
    if len(images) != len(labels):
        raise ValueError(f"{name} {split}: {len(images)} images, {len(labels)} labels")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{name} {split}: labels outside 0..{classes - 1}")
