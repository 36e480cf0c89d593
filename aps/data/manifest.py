"""The manifest: the one file that describes a prepared dataset, and the file from which loaders start.

Design: paths in it are relative to its folder, except those of files used in place, so a results folder can be moved.
Its digest covers contents, never paths, so the same images prepared elsewhere have the same digest.
It does not know how a dataset is obtained.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from aps.data.walk import printable
from aps.errors import UserError
from aps.files import sha256, write_bytes
from aps.layout import dataset_of
from aps.registry import DATASETS, DETECTION_DATASETS

COPY = "prepared.json"  # a copy of the manifest, beside it
LOCK = ".lock"  # held by the process that prepares the dataset
DECODED = "decoded.jsonl"  # what a preparation has found so far in images, until it ends (aps/data/decoded.py)
COPIES = "shrunk"  # how the names of folders of smaller copies begin, beside the manifest
UNFINISHED = ".unfinished"  # in such a folder, until a preparation has filled it: no study can read it yet
SPLITS = {"classification": ("train", "test"), "images": ("train",), "detection": ("train", "val")}  # that a kind needs
RGB = tuple[float, float, float]
ROUNDING = 1e-6  # of sums over many pixels
CONSTANT = 1e-4  # a channel with a smaller standard deviation (a fortieth of 1/255) is taken for constant


UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of control characters, half characters and line breaks


def wrong_name(names: Iterable[Any]) -> str | None:
    """What is wrong with the first class name that can't be shown or told apart, as the end of a sentence, else None."""
    seen: dict[str, int] = {}
    for number, name in enumerate(names):
        if not isinstance(name, str):
            return f"the name of class {number} is {name!r}; write it as text"
        if not name.strip():
            return f"class {number} has an empty name; give it one"
        if any(unicodedata.category(letter) in UNPRINTABLE for letter in name):
            return f"class {number} has name '{printable(name)}' with a line break or control character; rename it"
        if (first := seen.setdefault(unicodedata.normalize("NFC", name), number)) != number:
            return f"classes {first} and {number} have one name, '{name}'; rename one"
    return None


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChannelStatistics(_Block):
    """Mean and standard deviation of each channel, in [0, 1] units."""

    mean: RGB
    std: RGB
    over: str  # what was averaged, or who published the constants

    @model_validator(mode="after")
    def _check(self) -> ChannelStatistics:
        for key, values in (("mean", self.mean), ("std", self.std)):
            for value in values:
                if not -ROUNDING <= value <= 1 + ROUNDING:  # refuses NaN too
                    raise ValueError(f"{key} {value} is not between 0 and 1, where that of pixels in [0, 1] lies")
        return self


class Statistics(_Block):
    measured: ChannelStatistics | None  # over train; None where nothing normalizes with it (detection)
    published: ChannelStatistics | None = None


class Split(_Block):
    """The files of a split. Paths are relative to the manifest's folder, or absolute."""

    count: int
    tensors: str | None = None  # safetensors: images uint8 (M, C, H, W), labels int64 (M,)
    images: str | None = None  # folder of image files
    # Text file, a line an image: path under `images`, tab, label; of an image that we wrote, tab, bytes, tab, sha256.
    index: str | None = None
    annotations: str | None = None  # COCO json


class Fingerprint(_Block):
    """Names, sizes and modification times of the files that a dataset was prepared from (`aps.data.fingerprint`)."""

    roots: tuple[str, ...]  # folders of images, and single files; relative to the manifest's folder, or absolute
    count: int
    digest: str


class Manifest(_Block):
    """A prepared dataset."""

    name: str
    kind: Literal["classification", "images", "detection"]  # images: without labels
    classes: tuple[str, ...]  # none where there are no labels
    image_size: tuple[int, int] | None  # height, width; None where images differ
    splits: dict[str, Split]  # classification: train, test; images: train; detection: train, val
    statistics: Statistics
    digest: str  # sha256 of what `digest_of` names
    digest_of: str
    origin: str  # where the images came from, for people
    source: str | None = None  # the sources.NAME.path it was prepared from
    sizes: dict[str, int] = {}  # bytes of the files it names, for quick verification
    checksums: dict[str, str] = {}  # sha256 of the same files, compared when a split is loaded
    fingerprint: Fingerprint | None = None  # None where nothing is used in place
    masks: bool = True  # detection: false where instances have boxes only
    notes: tuple[str, ...] = ()  # what the preparation skipped, repaired or found, for people

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises UserError where the manifest is missing, broken or of another version."""
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            name = dataset_of(path.parent)
            raise UserError(f"{path}: no manifest, so dataset '{name}' is not prepared; {prepare_it(name)}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"]) or "file"
            raise UserError(
                f"{path}: not a manifest of this version ({key}: {problem['msg']}); delete it and "
                f"{prepare_it(dataset_of(path.parent))}"
            ) from None

    def write(self, path: Path) -> None:
        """Write atomically: readers see the whole manifest or none."""
        write_bytes(path, (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode())

    def normalization(self, which: Literal["measured", "published"] = "measured") -> tuple[RGB, RGB]:
        """(mean, std) in [0, 1] units; a constant channel gets std 1, so that it can be divided by.

        Raises:
            UserError: the dataset has no such constants.
        """
        chosen = getattr(self.statistics, which)
        if chosen is None:
            raise UserError(
                f"dataset '{self.name}' has no {which} channel statistics; set dataset.statistics: "
                f"{'measured' if which == 'published' else 'published'}"
            )
        red, green, blue = (std if std > CONSTANT else 1.0 for std in chosen.std)
        return chosen.mean, (red, green, blue)

    @property
    def constant_channels(self) -> tuple[str, ...]:
        """Names of the channels that are the same in every pixel measured."""
        measured = self.statistics.measured
        deviations = measured.std if measured else (1.0,) * 3
        return tuple(name for name, std in zip(("red", "green", "blue"), deviations, strict=True) if std <= CONSTANT)

    def shortcoming(self) -> str | None:
        """Which split its kind needs and it lacks, as the end of a sentence, else None: some stage would miss it."""
        missing = [split for split in SPLITS[self.kind] if split not in self.splits]
        if not missing:
            return None
        advice = ", or leave classes and labels out" if self.kind == "classification" else ""
        return f"has {', '.join(self.splits) or 'no split'} and no {missing[0]}, which a dataset for {self.kind} needs; add it{advice}"

    def problem(self, folder: Path) -> str | None:
        """What is missing or changed among its files, as part of a sentence, else None.

        It checks the contents of the files it names, whether every image in its folder exists with the size in which it
        was written, and whether about 256 images of each split that is used in place exist."""
        if set(self.checksums) != set(self.sizes):
            return "it was prepared by an earlier version"
        for file, size in self.sizes.items():
            try:
                found = (folder / file).stat().st_size
            except OSError:
                return f"{folder / file} is missing"
            if found != size:
                return f"{folder / file} has {found} bytes instead of {size}"
            if sha256(folder / file) != self.checksums[file]:
                return f"{folder / file} was altered"
        for split in self.splits.values():
            if split.images is None:
                continue
            if not (folder / split.images).is_dir():
                return f"{folder / split.images} is missing"
            if split.index is not None and (problem := self._problem_of_images(folder, split.images, split.index)):
                return problem
        return None

    def altered_image(self, folder: Path) -> str | None:
        """Which image that the preparation wrote is gone or of another size, as part of a sentence, else None.

        Images that the fingerprint covers are left out: who asks this has compared it."""
        covered = self.fingerprint.roots if self.fingerprint is not None else ()
        for split in self.splits.values():
            if split.images is None or split.index is None or os.path.isabs(split.images) or split.images in covered:
                continue
            if problem := self._problem_of_images(folder, split.images, split.index):
                return problem
        return None

    def _problem_of_images(self, folder: Path, images: str, index: str) -> str | None:
        if not (folder / index).is_file():
            return f"{folder / index} is missing"
        rows, root = _rows(folder / index), str(folder / images)
        if os.path.isabs(images):
            every = list(rows)
            rows = iter(every[:: max(1, len(every) // 256)])
        for name, _, size, _ in rows:
            file = f"{root}/{name}"
            try:
                found = os.stat(file).st_size
            except OSError:
                return f"{printable(file)} is missing"
            if size and str(found) != size:
                return f"{printable(file)} has {found} bytes instead of {size}"
        return None


def prepare_it(name: str) -> str:
    """The end of an error message: the advice to prepare the dataset."""
    return f"prepare it by {preparing(name)}"


def preparing(name: str, again: bool = False) -> str:
    """The command that prepares a dataset. A user's dataset needs the study that names it."""
    known = name in DATASETS or name in DETECTION_DATASETS
    return f"`python -m aps data {name}{' --again' * again}{'' if known else ' --configfile STUDY.yaml'}`"


def mending(path: Path) -> str | None:
    """The advice on an image that can't be read, where the preparation of a dataset wrote it; None where the user did."""
    path = Path(os.path.abspath(path))
    for folder in path.parents:
        for file in ("manifest.json", COPY):
            with suppress(UserError):
                manifest = Manifest.read(folder / file)
                own = [split.images for split in manifest.splits.values() if split.images is not None]
                if any(not os.path.isabs(images) and path.is_relative_to(folder / images) for images in own):
                    return f"prepare dataset '{manifest.name}' again: {preparing(manifest.name, again=True)}"
    return None


def completing(root: Path, folder: Path, name: str, advice: str) -> str:
    """`advice` on a user's folder of images; where `root` was extracted into the dataset's `folder`, to do so again."""
    extracted = root.resolve().is_relative_to(folder.resolve())
    return f"prepare it again: {preparing(name, again=True)}" if extracted else advice


def check_unpacked(folder: Path, images: str, name: str) -> None:
    """Raises UserError where an image that an earlier preparation unpacked is gone or of another size.

    What is unpacked already is not unpacked again, so such an image would be taken for the publisher's.

    Args:
        images: the folder of a split's images, in the dataset's `folder`.
    """
    try:
        manifest = Manifest.read(folder / COPY)
    except UserError:  # nothing was prepared before
        return
    for split in manifest.splits.values():
        if split.images != images or split.index is None or not (folder / split.index).exists():
            continue
        if problem := manifest._problem_of_images(folder, images, split.index):
            raise UserError(f"{problem}; prepare it again: {preparing(name, again=True)}")


def earlier_copies(folder: Path) -> list[Path]:
    """Folders of smaller copies that the manifest of `folder` no longer names; none where it has no manifest."""
    try:
        manifest = Manifest.read(folder / ("manifest.json" if (folder / "manifest.json").exists() else COPY))
    except UserError:
        return []
    named = {Path(split.images).parts[0] for split in manifest.splits.values() if split.images}
    return sorted(path for path in folder.glob(f"{COPIES}*") if path.is_dir() and path.name not in named)


def with_sizes(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with the size in bytes and the checksum of every file it names."""
    files = [
        file
        for split in manifest.splits.values()
        for file in (split.tensors, split.index, split.annotations)
        if file is not None
    ]
    return manifest.model_copy(
        update={
            "sizes": {file: (folder / file).stat().st_size for file in files},
            "checksums": {file: sha256(folder / file) for file in files},
        }
    )


def verify(manifest: Manifest, folder: Path, file: str) -> None:
    """Compare a file that the manifest names with its checksum; the file is read once a process.

    Raises:
        UserError: it is gone, or its contents are not what was prepared.
    """
    expected = manifest.checksums.get(file)
    if expected is None:
        return
    if not (folder / file).is_file():
        problem = "it is missing"
    elif sha256(folder / file) == expected:
        return
    else:
        problem = f"damaged or altered since dataset '{manifest.name}' was prepared"
    raise UserError(f"{folder / file}: cannot be read ({problem}); {prepare_it(manifest.name)}")


IN_TRAIN = re.compile(r"([\d,]+) images? of (\w+) stands? in train too,")


def note_on_copies(count: int, split: str) -> str:
    """The note on images of a split that are in train too."""
    be = f"images of {split} stand" if count > 1 else f"image of {split} stands"
    return f"{count:,} {be} in train too, with the same content, which flatters {split} figures"


def copies_in_train(notes: Iterable[str]) -> dict[str, int]:
    """Split -> how many of its images are in train too, by a manifest's notes; empty where none was found."""
    found = filter(None, map(IN_TRAIN.match, notes))
    return {match[2]: int(match[1].replace(",", "")) for match in found}


NO_LABEL = -1  # the label of every image of a dataset without labels


def read_index(path: Path) -> tuple[list[str], list[int]]:
    """Names under the split's image folder, and labels; NO_LABEL where a line holds only a name."""
    names, labels = [], []
    for name, label, _, _ in _rows(path):
        names.append(name)
        labels.append(int(label) if label else NO_LABEL)
    return names, labels


def read_checksums(path: Path) -> list[bytes]:
    """SHA-256 of each image that the preparation wrote; empty: they are the user's, or an earlier version wrote them."""
    found = []
    for *_, checksum in _rows(path):
        if not checksum:
            return []
        found.append(bytes.fromhex(checksum))
    return found


def _rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Name, label, bytes and sha256 of each line of an index; empty where it has none."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:  # there may be a million
        for line in lines:
            name, label, size, checksum, *_ = (*line.rstrip("\n").split("\t"), "", "", "")
            yield name, label, size, checksum


def write_index(
    path: Path,
    names: list[str],
    labels: list[int] | None,
    sizes: list[int] | None = None,
    checksums: list[str] | None = None,
) -> None:
    """Write a split's index.

    Args:
        labels: None: there are none.
        sizes: bytes of the images, where they are ours; None: they are the user's.
        checksums: sha256 of them.

    Raises:
        UserError: a file name has a line break or tab, which the index can't hold.
    """
    if broken := next((name for name in names if "\n" in name or "\t" in name), None):
        raise UserError(f"image {broken!r}: its name holds a tab or line break; rename it")
    lines = names if labels is None else [f"{name}\t{label}" for name, label in zip(names, labels, strict=True)]
    if sizes is not None:
        tabs = "\t\t" if labels is None else "\t"
        lines = [f"{line}{tabs}{size}" for line, size in zip(lines, sizes, strict=True)]
    if checksums is not None:
        lines = [f"{line}\t{checksum}" for line, checksum in zip(lines, checksums, strict=True)]
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogateescape"))


def content_digest(*parts: Any) -> str:
    """sha256 over parts in order: bytes-like ones as they are, others as JSON, each preceded by its length in bytes."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes | memoryview) else json.dumps(part, sort_keys=True).encode()
        digest.update(
            len(content).to_bytes(8, "little") if isinstance(content, bytes) else content.nbytes.to_bytes(8, "little")
        )
        digest.update(content)
    return digest.hexdigest()
