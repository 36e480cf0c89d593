"""Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grayscale images of 28x28, as four IDX files, gzipped or not."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from aps.data import arrays, fetch
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

# Where Debian's package dataset-fashion-mnist installs the files.
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
# The publisher's files and md5, as torchvision lists them.
FILES = [fetch.Published(file, FashionMNIST.mirrors[0] + file, md5) for file, md5 in FashionMNIST.resources]
PREFIX = {"train": "train", "test": "t10k"}
COUNTS = {"train": 60_000, "test": 10_000}
SIDE = 28


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """Raises UserError where a file is missing, truncated or not the publisher's format."""
    path = fetch.source_path(name, source, "set it to a folder with the four IDX files")
    if path is None and INSTALLED.is_dir():
        path = INSTALLED
    if path is None:
        path, origin = folder / fetch.DOWNLOADS, FashionMNIST.mirrors[0]
        for file in FILES:
            fetch.download(file, path)
    else:
        origin = str(path)
    return arrays.store(
        folder,
        name,
        {split: split_arrays(path, split) for split in PREFIX},
        classes=tuple(FashionMNIST.classes),
        origin=origin,
        source=source,
    )


def split_arrays(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """images uint8 (M, 1, 28, 28), labels uint8 (M,)."""
    images = read_idx(_file(path, f"{PREFIX[split]}-images-idx3-ubyte"), (COUNTS[split], SIDE, SIDE))
    file = _file(path, f"{PREFIX[split]}-labels-idx1-ubyte")
    labels = read_idx(file, (COUNTS[split],))
    if labels.max() >= len(FashionMNIST.classes):
        raise UserError(f"{file}: a label is {labels.max()}, above {len(FashionMNIST.classes) - 1}; get it again")
    return images[:, None], labels


def _file(path: Path, stem: str) -> Path:
    for candidate in (path / f"{stem}.gz", path / stem):
        if candidate.is_file():
            return candidate
    raise UserError(f"{path}: has neither {stem}.gz nor {stem}; set sources.fashion_mnist.path to the folder with both")


def read_idx(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An IDX file of unsigned bytes: two zero bytes, type 8, number of dimensions, each size in 4 bytes, the data.

    Args:
        shape: what the file must hold.

    Raises:
        UserError: it is damaged, or holds another shape.
    """
    with fetch.archive_errors(file):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if content[:4] != bytes([0, 0, 8, len(shape)]):
        raise UserError(f"{file}: not an IDX file of unsigned bytes in {len(shape)} dimensions; get it again")
    header = 4 + 4 * len(shape)
    found = tuple(np.frombuffer(content[4:header], dtype=">u4").tolist())
    if found != shape:
        raise UserError(
            f"{file}: holds {'x'.join(map(str, found))} bytes, not {'x'.join(map(str, shape))}; get it again"
        )
    if len(content) - header != math.prod(shape):
        raise UserError(f"{file}: truncated: {len(content) - header:,} of {math.prod(shape):,} bytes; get it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
