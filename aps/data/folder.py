"""A user's dataset as a tree of image files, used in place.

With labels, either `train/` and `test/` (or `val/`, taken as the test split; other usual names are known) with one
folder a class, or one tree of class folders, of which a fixed, stratified fifth is held out as the test split. Without
labels, every image of the tree is a training image. Every image is decoded once, so that none fails during training.

Design: a folder's layout is guessed from names alone, so most of this file tells similar layouts apart. Layouts that
would give meaningless results (a split folder or a whole dataset taken for a class) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aps.data import trees
from aps.data.manifest import Manifest
from aps.data.walk import Walk, check_source, printable
from aps.errors import UserError
from aps.files import expanded
from aps.settings.blocks import SourceSettings
from aps.text import number_of

HOLDOUT = 0.2  # of each class, rounded, at least one image
SPLIT_SEED = 0
# Names of split folders, in upper or lower case.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
# Names that only look like split folders: train_images, test2017.
LIKE_SPLITS = re.compile(r"(train|test|val)", re.IGNORECASE)


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """Raises UserError where the tree is missing, has neither layout, a class lacks images, or an image is unreadable."""
    key = f"sources.{name}.path"
    if source.path is None:
        raise UserError(f"dataset '{name}': {key} is not set; {_advice(key)}")
    return describe(folder, name, source.path, key, labels=True)


def describe(folder: Path, name: str, tree: str, key: str, labels: bool, shrink: int | None = None) -> Manifest:
    """The manifest of a tree of images.

    Args:
        folder, key, labels: as in `layout`.
        shrink: as in `trees.describe`.

    Raises:
        UserError: as in `prepare`.
    """
    found, classes, splits, notes = layout(folder, tree, key, labels)
    return trees.describe(
        folder, name, classes, splits, origin=str(found.root.resolve()), source=SourceSettings(path=tree), trees=[found],
        notes=notes, shrink=shrink,
    )  # fmt: skip


class Layout(NamedTuple):
    tree: Walk
    classes: list[str]  # none without labels
    splits: dict[str, trees.Listing]
    notes: list[str]


def layout(folder: Path, tree: str, key: str, labels: bool) -> Layout:
    """What the names in a tree of images say; no image is opened.

    Args:
        folder: the prepared dataset's folder; it need not exist.
        key: the setting that names the tree, for error messages.
        labels: whether its folders are classes; else every image is a training image.

    Raises:
        UserError: as in `prepare`, but for unreadable images.
    """
    advice = _advice(key) if labels else f"set {key} to a folder with images"
    path = expanded(tree, key)
    if not path.exists():
        raise UserError(f"{key}: {path} does not exist; {advice}")
    if not path.is_dir():
        raise UserError(f"{key}: {path} is not a folder; {advice}")
    check_source(path, folder, key)
    found = trees.survey(path, folder)
    notes = trees.passed_over(found)
    classes: list[str] = []
    if labels:
        classes, splits, more = _labelled(found)
        notes += more
    else:
        splits = {"train": trees.unlabelled(found)}
    return Layout(found, classes, splits, notes)


# --------------------------------------------------------------------------------------------------


def _advice(key: str) -> str:
    return f"set {key} to a folder with train/ and test/ (or val/), or with one folder a class"


def _role(name: str) -> str | None:
    """The split that a folder's name stands for, if any."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def _labelled(tree: Walk) -> tuple[list[str], dict[str, trees.Listing], list[str]]:
    """Class names, splits and notes."""
    root, inside = tree.root, tree.inside()
    roles: dict[str, str] = {}
    for name in inside:
        if role := _role(name):
            if role in roles:
                raise UserError(f"{root}: has both {roles[role]}/ and {name}/; keep one of them as the {role} split")
            roles[role] = name
    if not roles:
        classes = _classes(tree)
        return classes, _held_out(trees.listing(tree, classes), classes), _outside(tree, "")
    if "train" not in roles:
        raise UserError(
            f"{root}: has {_slashed(roles.values())} but no train/; put the training images, a folder a class, in {root / 'train'}"
        )
    train, test = roles["train"], roles.get("test", roles.get("val"))
    if test is None:
        raise UserError(f"{root}: has {train}/ but neither test/ nor val/; add one, or name {root / train} to split it")
    classes = _classes(tree, train)
    splits = {"train": trees.listing(tree, classes, train), "test": trees.listing(tree, classes, test)}
    notes = [note for split in (train, test) for note in _outside(tree, split)]
    for name in inside:
        if name not in (train, test) and (count := len(tree.below(name))):
            why = f"{test}/ is the test split" if _role(name) else f"it stands beside {train}/ and {test}/"
            notes.append(f"left out: {number_of(count, 'image')} of {printable(root / name)} ({why})")
    return classes, splits, notes


def _classes(tree: Walk, inside: str = "") -> list[str]:
    """Names of the class folders in a folder of the tree. Raises UserError where its folders are not classes."""
    where = tree.root / inside
    found = tree.inside(inside)
    below = tree.folders_inside(found, inside)
    if not found and (images := len(tree.below(inside)) if inside else len(tree.files)):
        raise UserError(
            f"{where}: holds {number_of(images, 'image')} and no class folders; put the images of each class in a folder of its "
            "name, or use them without labels (labels: false)"
        )
    trees.class_folders(tree, inside)
    if splits := [name for name in found if _role(name)]:
        raise UserError(f"{where}: its folders {_slashed(splits)} are splits, not classes; name {where} as the dataset")
    for name, folders in below.items():
        if splits := [folder for folder in folders if _role(folder)]:
            what = f"{where}: its folder {name}/ holds {_slashed(splits)}, so it is a dataset, not a class"
            raise UserError(f"{what}; name {where / name}, or put the splits above the classes")
    if len(found) == 1:
        (only,) = found
        inner = below[only]
        what = f"{where}: has one class folder, {only}/" + (f", which holds {_slashed(inner)}" if inner else "")
        deeper = f"name {where / only}" if len(inner) > 1 else "add the folder of another class"
        raise UserError(
            f"{what}; with one class every score is 100, so {deeper}, or use the images without labels (labels: false)"
        )
    if all(LIKE_SPLITS.match(name) for name in found) and any(name.lower().startswith("train") for name in found):
        raise UserError(
            f"{where}: its folders {_slashed(found)} look like splits, not classes; rename them to train and test"
        )
    return found


def _slashed(names: object, shown: int = 4) -> str:
    """`cat/, dog/ and 3 more`."""
    folders = [f"{printable(name)}/" for name in names]  # type: ignore[attr-defined]
    return ", ".join(folders[:shown]) + (f" and {len(folders) - shown:,} more" if len(folders) > shown else "")


def _outside(tree: Walk, inside: str) -> list[str]:
    """The note on images that lie beside the class folders."""
    start = f"{inside}/" if inside else ""
    count = sum(file.name.startswith(start) and "/" not in file.name[len(start) :] for file in tree.files)
    return (
        [f"left out: {number_of(count, 'image')} of {printable(tree.root / inside)}, outside its class folders"]
        if count
        else []
    )


def _held_out(images: trees.Listing, classes: list[str]) -> dict[str, trees.Listing]:
    train, test = held_out(np.array(images.labels), SPLIT_SEED, lambda label: str(images.root / classes[label]))
    return {"train": images.rows(train.tolist()), "test": images.rows(test.tolist())}


def held_out(labels: np.ndarray, seed: int, called: Callable[[int], str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of train and of test, ascending: a fifth of each class is held out.

    Args:
        labels: (M,), from 0.
        called: what to call a class in error messages.

    Raises:
        UserError: a class has fewer than two images.
    """
    generator = np.random.default_rng(seed)
    test: list[int] = []
    ends = np.cumsum(np.bincount(labels))
    for label, rows in enumerate(np.split(np.argsort(labels, kind="stable"), ends[:-1])):
        if len(rows) < 2:
            raise UserError(f"{called(label)}: one image can't be split into train and test; add more")
        test += generator.permutation(rows)[: max(1, round(HOLDOUT * len(rows)))].tolist()
    held = np.sort(np.array(test))
    return np.setdiff1d(np.arange(len(labels)), held), held
