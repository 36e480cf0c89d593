"""Datasets small enough for memory: one safetensors file a split.

Images are stored as published (grayscale with one channel); `load` repeats a single channel to three.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from aps.data.manifest import (
    ChannelStatistics,
    Manifest,
    Split,
    Statistics,
    content_digest,
    with_sizes,
    wrong_name,
)
from aps.data.statistics import Accumulator
from aps.errors import UserError
from aps.files import safetensors_path
from aps.registry import DATASETS
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
        UserError: arrays of another shape or type, or labels that do not fit the classes, or classes without names of their own.
    """
    if "train" not in splits:
        raise UserError(f"{DATASETS.described(name)}: has {', '.join(splits) or 'no split'} and no train; add it")
    if (problem := wrong_name(classes)) is not None:
        raise UserError(f"{DATASETS.described(name)}: {problem}")
    written, contents = {}, []
    statistics = Accumulator()
    for split, (pixels, targets) in splits.items():
        _check(name, split, np.asarray(pixels), None if targets is None else np.asarray(targets), len(classes))
        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))  # a copy only where it is needed
        labels = None if targets is None else torch.from_numpy(np.array(targets, dtype=np.int64))
        if split == "train":
            for chunk in images.split(4096):
                statistics.add(chunk)
        file = f"{split}.safetensors"
        with safetensors_path(folder / file) as temporary:
            save_file({"images": images} | ({} if labels is None else {"labels": labels}), temporary)
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


def _check(name: str, split: str, images: np.ndarray, labels: np.ndarray | None, classes: int) -> None:
    """Raises UserError, which names the dataset's file: its function `prepare` gave other arrays than it has to."""
    where = f"{DATASETS.described(name)}, split '{split}'"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise UserError(
            f"{where}: its images are {images.dtype} of shape {images.shape}; give uint8, 0 to 255, of shape (images, 1 or 3 "
            "channels, height, width)"
        )
    if (labels is None) != (classes == 0):
        has, lacks = ("classes", "labels") if labels is None else ("labels", "classes")
        raise UserError(f"{where}: it has {has} but no {lacks}; give both, or neither and the split train alone")
    if labels is None:
        return
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: its labels are {labels.dtype} of shape {labels.shape} for {len(images)} images; give each one a whole "
            "number"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise UserError(
            f"{where}: its labels go from {labels.min()} to {labels.max()}; give 0 to {classes - 1}, for its {classes} classes"
        )
