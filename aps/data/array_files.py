"""A user's dataset as arrays: images and labels in one .npz file.

The arrays are found by name; the first pattern that fits is used: `images`, `labels` (a fixed, stratified fifth is held
out as the test split); `train_images`, `train_labels`, `test_images`, `test_labels` (as in MedMNIST); `x_train`,
`y_train`, `x_test`, `y_test` (as in Keras). A split `val` is used where `test` is missing. Labels are whole numbers or
names; without labels, all images are training images. An optional array `classes` names the labels 0, 1, ...

Floating-point pixels are refused, because their range could mean several things.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np

from aps.data import arrays
from aps.data.fingerprint import take
from aps.data.folder import SPLIT_SEED, held_out
from aps.data.images import note_on_levels
from aps.data.manifest import Manifest, note_on_copies, wrong_name
from aps.data.walk import printable
from aps.errors import UserError
from aps.files import expanded
from aps.settings.blocks import SourceSettings

# Names of a split's arrays: images, labels.
PATTERNS = (("{split}_images", "{split}_labels"), ("x_{split}", "y_{split}"), ("X_{split}", "y_{split}"))
CHANNELS = (1, 3)
KNOWN = "'images' and 'labels', or 'train_images', 'train_labels', 'test_images' and 'test_labels'"


def describe(folder: Path, name: str, file: str, key: str, labels: bool) -> Manifest:
    """The manifest of a .npz file.

    Args:
        key: the setting that names the file, for error messages.
        labels: whether to use the labels; without them all images are training images.

    Raises:
        UserError: the file is missing or damaged, or its arrays are not images and labels.
    """
    path, source = expanded(file, key), SourceSettings(path=file)
    if not path.is_file():
        raise UserError(f"{key}: {path} is no file; set it to a .npz file with arrays {KNOWN}")
    content = _read(path)
    fingerprint = take(folder, [], [path])
    keys = _array_names(path, content, labels)
    greatest: list[int] = []
    splits = {
        split: (_images(f"{path}: '{images_key}'", content[images_key], greatest), labels_key)
        for split, (images_key, labels_key) in keys.items()
    }
    notes = note_on_levels(greatest)
    if not labels:
        pixels = np.concatenate(_same_shape(path, [images for images, _ in splits.values()]))
        manifest = arrays.store(folder, name, {"train": (pixels, None)}, (), str(path.resolve()), source)
    else:
        pixels_and_labels, classes = _labelled(path, content, splits)
        manifest = arrays.store(folder, name, pixels_and_labels, classes, str(path.resolve()), source)
        notes += _duplicates(*(pixels_and_labels[split][0] for split in ("train", "test")))
    return manifest.model_copy(update={"fingerprint": fingerprint, "notes": tuple(notes)})


# --------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise UserError(f"{path}: holds one array without a name; save it by np.savez with the names {KNOWN}")
        with file:
            content = {name: file[name] for name in file.files}
        return {name: array for name, array in content.items() if isinstance(array, np.ndarray)}  # not a README beside
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(
            f"{path}: {error}; prepare it where there is as much memory, or save it again by np.savez if it is smaller"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: no readable .npz file of plain arrays ({reason}); save it again by np.savez"
        ) from None


def _array_names(path: Path, content: dict[str, np.ndarray], labels: bool) -> dict[str, tuple[str, str]]:
    """Split -> names of its image array and its label array; split "" where one pair holds all images."""
    if "images" in content:
        found = {"": ("images", "labels")}
    else:
        found = {}
        for images, targets in PATTERNS:
            for split in ("train", "test", "val"):
                names = (images.format(split=split), targets.format(split=split))
                if names[0] in content:
                    found.setdefault(split, names)
    if not found or ("" not in found and "train" not in found):
        raise UserError(f"{path}: holds arrays {_quoted(content)}; name them {KNOWN}")
    if labels:
        if missing := [names[1] for names in found.values() if names[1] not in content]:
            raise UserError(
                f"{path}: has no array '{missing[0]}'; add it, or use the images without labels (labels: false)"
            )
        if "test" in found:
            found.pop("val", None)
        elif "val" in found:
            found["test"] = found.pop("val")
    return found


def _quoted(names: object) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"  # type: ignore[attr-defined]


def _images(what: str, images: np.ndarray, greatest: list[int]) -> np.ndarray:
    """Images of shape (M, H, W), (M, H, W, C) or (M, C, H, W), as uint8 (M, C, H, W).

    Of 16 bits, the upper 8 are kept, and `greatest` gets the greatest value of each image.
    """
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in CHANNELS or 0 in images.shape:
        shape = "x".join(map(str, images.shape))
        raise UserError(f"{what} has shape {shape}; store images as (M, H, W), (M, H, W, 3) or (M, 3, H, W)")
    if images.dtype == np.uint16:
        greatest += images.max(axis=(1, 2, 3)).tolist()
        images = (images >> 8).astype(np.uint8)
    if images.dtype != np.uint8:
        raise UserError(f"{what} holds {images.dtype}; store pixels as uint8, 0 to 255")
    return images


def _same_shape(path: Path, images: list[np.ndarray]) -> list[np.ndarray]:
    if len({x.shape[1:] for x in images}) > 1:
        raise UserError(f"{path}: its splits have images of different shapes; store one size, or one split")
    return images


def _labelled(
    path: Path, content: dict[str, np.ndarray], splits: dict[str, tuple[np.ndarray, str]]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """{split: (images, labels counted from 0)} for train and test, and the class names."""
    found = {split: (images, _labels(path, key, content[key], len(images))) for split, (images, key) in splits.items()}
    _same_shape(path, [images for images, _ in found.values()])
    if len({labels.dtype.kind == "U" for _, labels in found.values()}) > 1:
        raise UserError(f"{path}: its splits have numbers and names for labels; store one or the other in both")
    first, key = next(iter(found.values()))[1], next(iter(splits.values()))[1]
    values = np.unique(first)
    if len(values) < 2:
        raise UserError(
            f"{path}: '{key}' holds one class; labelled use needs two or more, or use the images without labels (labels: false)"
        )
    classes = _classes(path, content, values)
    if "" in found:
        images, labels = found.pop("")
        targets = np.searchsorted(values, labels)
        train, test = held_out(targets, SPLIT_SEED, lambda label: f"{path}: class '{classes[label]}'")
        return {"train": (images[train], targets[train]), "test": (images[test], targets[test])}, classes
    if "test" not in found:
        raise UserError(
            f"{path}: has training images and no test images; add 'test_images' and 'test_labels', or name all 'images' and 'labels'"
        )
    strange = np.setdiff1d(found["test"][1], values)
    if len(strange):
        raise UserError(
            f"{path}: label {printable(str(strange[0]))} of test is none of the {len(values)} labels of train; correct it"
        )
    return {split: (images, np.searchsorted(values, labels)) for split, (images, labels) in found.items()}, classes


def _duplicates(train: np.ndarray, test: np.ndarray) -> list[str]:
    """The note on test images that are in train too."""
    known = {sha256(image.tobytes()).digest() for image in train}  # not the pixels: they would be held twice
    count = sum(sha256(image.tobytes()).digest() in known for image in test)
    return [note_on_copies(count, "test")] if count else []


def _labels(path: Path, key: str, labels: np.ndarray, images: int) -> np.ndarray:
    what = f"{path}: '{key}'"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != images:
        raise UserError(
            f"{what} has shape {'x'.join(map(str, labels.shape))} for {images:,} images; give each one label"
        )
    if labels.dtype.kind not in "iuUS":
        raise UserError(f"{what} holds {labels.dtype}; store labels as whole numbers or as names")
    labels = _text(what, labels)
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise UserError(f"{what} holds label {labels.min()}; labels start at 0 (labels: false uses the images without)")
    return labels


def _text(what: str, values: np.ndarray) -> np.ndarray:
    """`values` with text for bytes."""
    if values.dtype.kind != "S":
        return values
    try:
        return np.char.decode(values, "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} holds {error.object!r}, which is not UTF-8; store names as text") from None


def _classes(path: Path, content: dict[str, np.ndarray], values: np.ndarray) -> tuple[str, ...]:
    """The name of each of `values`, the labels of train (K,)."""
    what, names = f"{path}: its labels", [str(value) for value in values.tolist()]
    if "classes" in content and values.dtype.kind != "U":
        what, given = f"{path}: 'classes'", content["classes"]
        if given.ndim != 1 or given.dtype.kind not in "iuUS":
            shape = "x".join(map(str, given.shape)) or "of one value"
            raise UserError(f"{what} holds {given.dtype}, shape {shape}; store a list of names")
        if values.max() >= len(given):
            raise UserError(
                f"{path}: label {values.max()} is beyond the {len(given)} names in 'classes'; correct one of them"
            )
        names = [str(name) for name in _text(what, given)[values].tolist()]
    if (problem := wrong_name(names)) is not None:
        raise UserError(f"{what}: {problem}")
    return tuple(names)
