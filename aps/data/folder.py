"""The user's own images: any ImageFolder tree, used in place.

Either `train/` and `test/` (or `val/`, taken as the test split) with a folder a class, or one tree of class folders, of
which a fixed, stratified fifth is held out as the test split. Every image is decoded once, so none fails in training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aps.data import fetch, trees
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

HOLDOUT = 0.2  # of each class, rounded, at least one image
SPLIT_SEED = 0


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """Raises UserError where there is no such tree, a class lacks images, or an image is unreadable."""
    advice = f"set sources.{name}.path to a folder with train/ and test/ (or val/), or with one folder a class"
    if source.path is None:
        raise UserError(f"dataset '{name}': sources.{name}.path is not set; {advice}")
    path = fetch.source_path(name, source, advice)
    assert path is not None
    if not path.is_dir():
        raise UserError(f"sources.{name}.path: {path} is not a folder; {advice}")
    split = next((path / test for test in ("test", "val") if (path / test).is_dir()), None)
    if (path / "train").is_dir():
        if split is None:
            raise UserError(
                f"{path}: has train/ but neither test/ nor val/; add one, or name {path / 'train'} to split it"
            )
        classes = trees.class_folders(path / "train")
        splits = {"train": trees.listing(path / "train", classes), "test": trees.listing(split, classes)}
    else:
        classes = trees.class_folders(path)
        splits = _held_out(trees.listing(path, classes), classes)
    return trees.describe(folder, name, classes, splits, origin=str(path.resolve()), source=source)


def _held_out(images: trees.Listing, classes: list[str]) -> dict[str, trees.Listing]:
    """Raises UserError where a class has fewer than two images."""
    generator = np.random.default_rng(SPLIT_SEED)
    labels = np.array(images.labels)
    test: list[int] = []
    for label, name in enumerate(classes):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise UserError(f"{images.root / name}: one image can't be split into train and test; add more")
        test += generator.permutation(rows)[: max(1, round(HOLDOUT * len(rows)))].tolist()
    held = set(test)
    return {
        "train": images.rows([i for i in range(len(labels)) if i not in held]),
        "test": images.rows(sorted(test)),
    }
