"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 + 10,000 images of 32x32, as the "python version" archives.

Design: the batches are pickles. An unpickler that allows numpy arrays and nothing else reads them straight from the
archive, so no code in them runs and no file is unpacked.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from aps.data import arrays, fetch
from aps.data.manifest import ChannelStatistics, Manifest
from aps.errors import UserError
from aps.settings.blocks import SourceSettings


class Release(NamedTuple):
    archive: fetch.Published
    base: str  # folder in the archive
    train: dict[str, str]  # batch: md5
    test: dict[str, str]
    meta: tuple[str, str]  # file, md5
    names: str  # key of the class names in meta
    labels: str  # key of the labels in a batch
    classes: int
    counts: dict[str, int]


# URLs and md5 are the publisher's, as torchvision lists them; the sha256 of the same archives are from Keras.
RELEASES = {
    name: Release(
        archive=fetch.Published(published.filename, published.url, published.tgz_md5, sha256),
        base=published.base_folder,
        train={file: md5 for file, md5 in published.train_list},
        test={file: md5 for file, md5 in published.test_list},
        meta=(published.meta["filename"], published.meta["md5"]),
        names=published.meta["key"],
        labels=labels,
        classes=classes,
        counts={"train": 50_000, "test": 10_000},
    )
    for name, published, sha256, labels, classes in (
        ("cifar10", CIFAR10, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce", "labels", 10),
        ("cifar100", CIFAR100, "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7", "fine_labels", 100),
    )
}

# method.md, Views: the constants of the paper's CIFAR recipe, for both datasets.
PUBLISHED = ChannelStatistics(
    mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), over="constants of the published CIFAR recipe"
)


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """Raises UserError where the archive or a batch is missing, altered, or holds anything but arrays."""
    release = RELEASES[name]
    file = release.archive.name
    path = fetch.source_path(name, source, f"set it to {file}, or to a folder with it or with its unpacked batches")
    archive = fetch.obtain(name, release.archive, path, folder)
    if archive is not None:
        batches = _from_archive(archive, release)
        origin = str(archive) if path else str(release.archive.url)
    else:
        assert path is not None
        batches, unpacked = _from_folder(path, release)
        origin = str(unpacked)
    return arrays.store(
        folder,
        name,
        {
            "train": _images(release, {batch: batches[batch] for batch in release.train}, "train"),
            "test": _images(release, {batch: batches[batch] for batch in release.test}, "test"),
        },
        classes=_class_names(release, batches[release.meta[0]]),
        origin=origin,
        source=source,
        published=PUBLISHED,
    )


# --------------------------------------------------------------------------------------------------


def _wanted(release: Release) -> dict[str, str]:
    return release.train | release.test | {release.meta[0]: release.meta[1]}


def _from_archive(archive: Path, release: Release) -> dict[str, tuple[str, bytes]]:
    """Batch name -> (its location for messages, its bytes). The archive's checksum was verified before."""
    found = {}
    with fetch.archive_errors(archive), tarfile.open(archive, "r:gz") as tar:
        for member in fetch.regular_members(archive, tar):
            stem = member.name.removeprefix(f"{release.base}/")
            if stem in _wanted(release):
                content = tar.extractfile(member)
                assert content is not None
                found[stem] = (f"{archive}: {member.name}", content.read())
    if missing := sorted(set(_wanted(release)) - set(found)):
        raise UserError(f"{archive}: has no {release.base}/{missing[0]}; get the publisher's {release.archive.name}")
    return found


def _from_folder(path: Path, release: Release) -> tuple[dict[str, tuple[str, bytes]], Path]:
    base = path / release.base if (path / release.base).is_dir() else path
    found = {}
    for batch, md5 in _wanted(release).items():
        file = base / batch
        if not file.is_file():
            raise UserError(
                f"{path}: has neither {release.archive.name} nor {file.relative_to(path)}; set the path to one"
            )
        content = file.read_bytes()
        if (digest := hashlib.md5(content).hexdigest()) != md5:
            raise UserError(f"{file}: its md5 is {digest} instead of the published {md5}; it is truncated or altered")
        found[batch] = (str(file), content)
    return found, base


def _images(release: Release, batches: dict[str, tuple[str, bytes]], split: str) -> tuple[np.ndarray, np.ndarray]:
    """images uint8 (M, 3, 32, 32), labels (M,)."""
    images, labels = [], []
    for where, content in batches.values():
        batch = read_pickle(where, content)
        data, targets = batch.get("data"), batch.get(release.labels)
        whole = (
            isinstance(data, np.ndarray)
            and data.dtype == np.uint8
            and data.ndim == 2
            and data.shape[1] == 3 * 32 * 32
            and isinstance(targets, list)
            and len(targets) == len(data)
            and all(isinstance(target, int) and 0 <= target < release.classes for target in targets)
        )
        if not whole:
            raise UserError(f"{where}: 'data' and '{release.labels}' are not images of 3x32x32 bytes and their labels")
        assert isinstance(data, np.ndarray)
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(np.array(targets))
    pixels = np.concatenate(images)
    if len(pixels) != release.counts[split]:
        raise UserError(f"{where}: {len(pixels):,} {split} images instead of {release.counts[split]:,}; get it again")
    return pixels, np.concatenate(labels)


def _class_names(release: Release, meta: tuple[str, bytes]) -> tuple[str, ...]:
    names = read_pickle(*meta).get(release.names)
    if not isinstance(names, list) or len(names) != release.classes:
        raise UserError(f"{meta[0]}: '{release.names}' does not list {release.classes} classes; get it again")
    return tuple(str(name) for name in names)


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0] for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers, text and numpy arrays; refuses any other name in the pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(f"it names {module}.{name}, which is code and not an array; refused")
        return _ALLOWED[module, name]

    def persistent_load(self, _: Any) -> Any:
        raise UserError("it refers to objects outside itself; refused")


def read_pickle(where: str, content: bytes) -> dict[str, Any]:
    """A batch's dictionary, without executing code.

    Raises:
        UserError: it is not such a pickle, or needs more than numpy's array reconstruction.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{where}: {error}, get the publisher's own file") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{where}: not a readable batch ({type(error).__name__}: {error}); get it again") from None
    if not isinstance(batch, dict):
        raise UserError(f"{where}: not a batch but a {type(batch).__name__}; get it again")
    return batch
