"""Lists, checks and describes datasets that are folders of image files, used in place or as copies of a smaller size.

The layout is torchvision's ImageFolder, one folder a class with images anywhere below it; or, without labels, images
anywhere. It does not know where a tree comes from.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from aps.data.complaints import Complaints
from aps.data.decoded import CHUNK, Decoded, Record
from aps.data.fetch import parallel
from aps.data.fingerprint import take
from aps.data.images import decode_image, note_on_levels, read_file, read_image, supported
from aps.data.load import limited
from aps.data.manifest import (
    COPIES,
    UNFINISHED,
    ChannelStatistics,
    Fingerprint,
    Manifest,
    Split,
    Statistics,
    content_digest,
    note_on_copies,
    with_sizes,
    write_index,
)
from aps.data.walk import Walk, counted, printable, walk
from aps.errors import UserError
from aps.files import sweep, write_bytes, write_unsynced
from aps.settings.blocks import SourceSettings

QUALITY = 90  # of copies, in JPEG's scale of 1 to 100
LARGE = 800  # pixels on the shorter side, from which images should be shrunk


class Listing(NamedTuple):
    """The images of one split, sorted by class, then name."""

    root: Path
    names: list[str]  # paths under root
    labels: list[int] | None  # None: without labels
    sizes: list[int]  # bytes

    def rows(self, chosen: list[int]) -> Listing:
        """The images at the positions `chosen`."""
        return Listing(
            self.root,
            [self.names[i] for i in chosen],
            None if self.labels is None else [self.labels[i] for i in chosen],
            [self.sizes[i] for i in chosen],
        )


def survey(root: Path, folder: Path | None = None) -> Walk:
    """Everything below `root`; `folder` as in `walk`. Raises UserError that lists what is wrong with it, if anything is."""
    tree = walk(root, folder)
    tree.check()
    return tree


def class_folders(tree: Walk, inside: str = "") -> list[str]:
    """Sorted names of the class folders in a folder of the tree. Raises UserError where it has none."""
    if not (classes := tree.inside(inside)):
        raise UserError(
            f"{printable(tree.root / inside)}: has no class folders; put the images of each class in a folder of its name"
        )
    return classes


def listing(tree: Walk, classes: list[str], inside: str = "") -> Listing:
    """Every image of a folder of the tree, whose class folders must be exactly `classes`.

    Raises:
        UserError: a class folder is missing, unknown or empty.
    """
    root = tree.root / inside
    found = class_folders(tree, inside)
    if missing := sorted(set(classes) - set(found)):
        twin = unicodedata.normalize("NFC", missing[0])
        if any(unicodedata.normalize("NFC", name) == twin for name in found):
            raise UserError(
                f"{printable(root)}: class folder '{missing[0]}'{_more(missing)} has its name in another Unicode form in "
                "this split; rename it like the other split's"
            )
        raise UserError(f"{printable(root)}: class folder '{missing[0]}' is missing{_more(missing)}; add it")
    if unknown := sorted(set(found) - set(classes)):
        raise UserError(
            f"{printable(root)}: class folder '{unknown[0]}' is in this split only{_more(unknown)}; add it to the other"
        )
    per_class: dict[str, list[tuple[str, int]]] = {name: [] for name in classes}
    for name, size in _readable(tree, inside):
        class_name, slash, _ = name.partition("/")
        if slash:
            per_class[class_name].append((name, size))
    if empty := [name for name, images in per_class.items() if not images]:
        raise UserError(
            f"{printable(root / empty[0])}: class folder has no images{_more(empty)}; add some or remove it"
        )
    images = [(name, size, label) for label, files in enumerate(per_class.values()) for name, size in sorted(files)]
    return Listing(root, [x[0] for x in images], [x[2] for x in images], [x[1] for x in images])


def unlabelled(tree: Walk) -> Listing:
    """Every image of the tree, at any depth. Raises UserError where there is none."""
    images = sorted(_readable(tree))
    if not images:
        passed = f" (passed over: {counted(tree.passed)})" if tree.passed else ""
        raise UserError(f"{printable(tree.root)}: holds no images{passed}; name a folder with images")
    return Listing(tree.root, [name for name, _ in images], None, [size for _, size in images])


def passed_over(tree: Walk) -> list[str]:
    """The note on files of the tree that are not read; none where all are."""
    kinds = tree.passed + Counter(f"{file.suffix}" for file in tree.files if not supported(file.suffix))
    return [f"passed over in {printable(tree.root)}: {counted(kinds)}"] if kinds else []


def describe(
    folder: Path,
    name: str,
    classes: list[str],
    splits: dict[str, Listing],
    origin: str,
    source: SourceSettings,
    trees: Sequence[Walk],
    sample: int | None = None,
    published: ChannelStatistics | None = None,
    notes: Sequence[str] = (),
    shrink: int | None = None,
) -> Manifest:
    """Write the index of each split, and return the manifest.

    Args:
        classes: empty for images without labels.
        splits: train and test; train alone for images without labels.
        trees: the walks that the splits were listed from, for the fingerprint.
        sample: decode this many train images, balanced over classes, for the statistics, and let the digest cover
            names, sizes and labels. None: decode every image of every split, and let the digest cover their contents.
        shrink: write a copy of every image into `folder`, under its own name, and use the copies: as JPEG with this many
            pixels on the shorter side, or as it is where it has no more. Copies of a tree that has changed since get a
            folder of their own, because a study may be reading the earlier ones. None: use the images in place.

    Raises:
        UserError: a decoded image is unreadable, or too long for a copy; `folder`/unreadable.txt lists all of them.
    """
    fingerprint = take(folder, trees)  # before any image is read, so that a change meanwhile is noticed next time
    train = splits["train"]
    to_decode = splits
    if sample is not None and train.labels is not None and sample < len(train.names):
        to_decode = {"train": train.rows(limited(torch.tensor(train.labels), sample, seed=0).tolist())}
    every = to_decode is splits
    assert every or shrink is None
    copies = folder / f"{COPIES}-{fingerprint.digest[:8]}"
    if shrink is not None and not copies.exists():
        copies.mkdir()
        (copies / UNFINISHED).touch()
    decoded = {
        split: decode(folder, split, images, fingerprint, shrink, copies / split if shrink is not None else None)
        for split, images in to_decode.items()
    }
    over = (
        f"every pixel of {'the' if every else 'a seeded, class-balanced sample of'} {len(to_decode['train'].names):,}"
    )
    notes = [*notes, *damaged(folder, to_decode, decoded), *dark(decoded)]
    if every:
        notes += duplicates(folder, splits, {split: images.sha256 for split, images in decoded.items()})
    contents: dict[str, list[Any]] = {
        split: [images.names, images.labels, decoded[split].sha256 if every else images.sizes]
        for split, images in splits.items()
    }
    if shrink is not None:
        splits = {split: images._replace(root=copies / split) for split, images in splits.items()}
        contents["shrink"] = [shrink]
    elif every:
        notes += _large(decoded["train"].image_sizes)
    image_sizes = {size for images in decoded.values() for size in images.image_sizes}
    written = {}
    for split, images in splits.items():
        inside = images.root.resolve().is_relative_to(folder.resolve())
        sizes = checksums = None
        if inside:  # they are ours: copies, or what was unpacked
            sizes = decoded[split].copied if shrink is not None else images.sizes
            checksums = checksums_of(images.root, images.names, split)
        write_index(folder / f"{split}.tsv", images.names, images.labels, sizes, checksums)
        where = images.root.resolve().relative_to(folder.resolve()) if inside else images.root.resolve()
        written[split] = Split(count=len(images.names), images=str(where), index=f"{split}.tsv")
    manifest = Manifest(
        name=name,
        kind="classification" if classes else "images",
        classes=tuple(classes),
        image_size=image_sizes.pop() if every and len(image_sizes) == 1 else None,
        splits=written,
        statistics=Statistics(
            measured=decoded["train"].sums.result(f"{over} train images, each image counting equally"),
            published=published,
        ),
        digest=content_digest(classes, contents),
        digest_of=f"{'class names, ' if classes else ''}file names, {'file contents' if every else 'file sizes'}"
        f"{' and labels' if classes else ''}{f', shrunk to {shrink} pixels' if shrink else ''}",
        origin=origin,
        source=source.path,
        fingerprint=fingerprint,
        notes=tuple(notes),
    )
    if shrink is not None:
        (copies / UNFINISHED).unlink(missing_ok=True)
    return with_sizes(manifest, folder)


def decode(
    folder: Path,
    split: str,
    images: Listing,
    fingerprint: Fingerprint,
    shrink: int | None = None,
    copies: Path | None = None,
) -> Decoded:
    """Decode images, in threads, but for those that an earlier call decoded before it was stopped.

    Args:
        fingerprint: of the tree, taken before.
        shrink: as in `describe`, its copies in the folder `copies`.

    Raises:
        UserError: an image is unreadable, or too long for a copy; `folder`/unreadable.txt lists all of them. Or one is
            gone, which ends it at once.
    """
    chunks = [images.names[i : i + CHUNK] for i in range(0, len(images.names), CHUNK)]
    record, total = Record(folder, fingerprint, split, images.names, shrink), Decoded.nothing()
    if copies is not None:
        sweep(copies)  # what a killed preparation left
    with Complaints() as complaints:

        def work(number: int) -> Decoded:
            chunk = record.known(number, chunks[number], copies)
            if chunk is None:
                chunk = _decode_chunk(images.root, chunks[number], complaints, shrink, copies)
                if not chunk.broken:
                    record.write(number, chunk)
            return chunk

        for chunk in parallel(work, range(len(chunks)), f"decode {split}"):
            total.add(chunk)
    if total.broken:
        listed = folder / "unreadable.txt"
        write_bytes(listed, "".join(f"{error}\n" for error in total.broken).encode())
        count = f"{len(total.broken)} such file{'s' * (len(total.broken) > 1)}"
        raise UserError(f"{total.broken[0]} ({count}, listed in {listed})")
    return total


def checksums_of(root: Path, names: list[str], split: str) -> list[str]:
    """SHA-256 of image files, read in threads. Raises UserError where one can't be read."""

    def of(chunk: list[str]) -> list[str]:
        return [hashlib.sha256(read_file(root / name)).hexdigest() for name in chunk]

    chunks = [names[i : i + CHUNK] for i in range(0, len(names), CHUNK)]
    return [checksum for found in parallel(of, chunks, f"checksums of {split}") for checksum in found]


def duplicates(folder: Path, splits: dict[str, Listing], contents: dict[str, list[str]]) -> list[str]:
    """The note on images of train that are in another split too; `folder`/duplicates.txt lists them.

    Args:
        contents: sha256 of each image, by split.
    """
    train = dict(zip(contents["train"], splits["train"].names, strict=True))
    pairs = [
        f"train/{train[digest]} = {split}/{name}"
        for split in splits
        if split != "train"
        for name, digest in zip(splits[split].names, contents[split], strict=True)
        if digest in train
    ]
    if not pairs:
        return []
    listed = folder / "duplicates.txt"
    write_bytes(listed, "".join(f"{printable(pair)}\n" for pair in pairs).encode())
    held = " and ".join(split for split in splits if split != "train")
    return [f"{note_on_copies(len(pairs), held)}; {listed} lists them"]


# --------------------------------------------------------------------------------------------------


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _large(sizes: list[tuple[int, int]]) -> list[str]:
    """The note on images that take long to decode; none where most are small."""
    if (half := int(median(min(size) for size in sizes))) < LARGE:
        return []
    return [
        f"half of the train images have {half:,} pixels or more on the shorter side, and every epoch decodes them whole; "
        "`shrink: 512` beside datasets.NAME.folder keeps small copies, which are read many times faster"
    ]


def _readable(tree: Walk, inside: str = "") -> list[tuple[str, int]]:
    """(path below a folder of the tree, bytes) of the images that this installation of Pillow reads."""
    start = f"{inside}/" if inside else ""
    return [
        (file.name[len(start) :], file.size)
        for file in tree.files
        if file.name.startswith(start) and supported(file.suffix)
    ]


def damaged(folder: Path, splits: dict[str, Listing], decoded: dict[str, Decoded]) -> list[str]:
    """The note on damaged images, of which only a part was decoded; `folder`/damaged.txt lists them."""
    found = []
    with Complaints() as complaints:
        for split, images in decoded.items():
            for name in images.suspects:  # one at a time, so that a warning belongs to this image
                before = complaints.size
                with suppress(UserError):
                    read_image(splits[split].root / name)
                    if complaints.size > before:
                        found.append(f"{printable(splits[split].root / name)}: {complaints.since(before)}")
    if not found:
        return []
    write_bytes(folder / "damaged.txt", "".join(f"{line}\n" for line in found).encode())
    be = "images are" if len(found) > 1 else "image is"
    return [
        f"{len(found):,} {be} damaged and used as far as it can be decoded ({found[0]}); {folder / 'damaged.txt'} lists "
        "them: replace or remove them"
    ]


def dark(decoded: dict[str, Decoded]) -> list[str]:
    """The note on images of 16 bits that become nearly black; none where there are none."""
    return note_on_levels([value for images in decoded.values() for value in images.greatest])


def _decode_chunk(
    root: Path, names: list[str], complaints: Complaints, shrink: int | None, copies: Path | None
) -> Decoded:
    decoded = Decoded.nothing()
    for name in names:
        before = complaints.size
        try:
            content = read_file(root / name)
            image = decode_image(content, root / name, None, decoded.greatest)
            copy = None
            if shrink is not None and min(image.shape[1:]) > shrink:
                image = functional.resize(image, [shrink], InterpolationMode.BICUBIC, antialias=True)
                copy = _jpeg(image, root / name)
        except UserError as error:
            if _is_gone(root / name):  # with others, most likely: a folder was moved
                raise UserError(
                    f"{printable(root / name)} is gone: the folder has changed since it was listed; run the same command again"
                ) from None
            decoded.broken.append(error)
            continue
        if complaints.size != before:
            decoded.suspects.append(name)
        decoded.sha256.append(hashlib.sha256(content).hexdigest())
        if copies is not None:
            write_unsynced(copies / name, copy or content, copies)
            decoded.copied.append(len(copy or content))
        decoded.image_sizes.append((image.shape[1], image.shape[2]))
        decoded.sums.add(image[None])
    return decoded


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _jpeg(image: Tensor, path: Path) -> bytes:
    """A JPEG file of (3, H, W) uint8, by Pillow: torchvision's encoder crashes where a side is too long for the format."""
    file = io.BytesIO()
    try:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=QUALITY)
    except OSError:
        height, width = image.shape[1:]
        raise UserError(
            f"{printable(path)}: would be {width:,}x{height:,} pixels once shrunk, more than a JPEG file holds; crop or remove it"
        ) from None
    return file.getvalue()
