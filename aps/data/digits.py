"""scikit-learn's bundled scans of handwritten digits (1,797 real 8x8 images, UCI): nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from aps.data import arrays
from aps.data.manifest import Manifest
from aps.settings.blocks import SourceSettings

TEST_IMAGES = 359  # a fifth; the publisher gives no split
SPLIT_SEED = 0


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """images uint8 (1438 | 359, 1, 8, 8): ink levels 0..16 scaled to 0..255; split stratified by class."""
    images, labels = scans()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SPLIT_SEED
    )
    splits = {"train": np.sort(train), "test": np.sort(test)}
    return arrays.store(
        folder,
        name,
        {split: (images[rows], labels[rows]) for split, rows in splits.items()},
        classes=tuple("0123456789"),
        origin=f"bundled with scikit-learn {sklearn.__version__} (UCI optical recognition of handwritten digits)",
        source=source,
    )


def scans() -> tuple[np.ndarray, np.ndarray]:
    """images uint8 (1797, 1, 8, 8), labels int64 (1797,)."""
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return images, bunch.target.astype(np.int64)
