"""A user's COCO files: read in full, repaired where that is harmless, written again in one form.

The result (`instances_train.json`, `instances_val.json` beside the manifest) guarantees what detection and pycocotools
rely on: annotation ids from 1 (pycocotools takes an id of 0 as no match), boxes inside their images, masks that are
polygons of three or more points or valid run lengths, areas, distinct class names. Repairs are counted in notes;
anything ambiguous is refused, in a sentence that names the annotation.

Design: run lengths are checked here in Python, because pycocotools writes out of bounds on broken ones. Where a record
has the size of an image before its EXIF orientation, boxes and masks are turned with the image. Ids of images and
categories that are whole numbers are kept, so that predictions have the ids of the user's files.

It does not know detectors.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from aps.data import trees
from aps.data.fingerprint import take
from aps.data.images import orientation
from aps.data.manifest import Manifest, Split, Statistics, content_digest, with_sizes, wrong_name
from aps.data.walk import check_source, printable, walk
from aps.errors import UserError
from aps.files import write_bytes

OVERLAP = 0.75  # a box whose IoU with its mask's box is lower is computed again from the mask
ROUNDING = 1e-3  # pixels
INSIDE = 0.5  # a box with a smaller share of its area in the image is refused, not cut

Box = tuple[float, float, float, float]  # left, top, width, height
Point = tuple[float, float]


class Files(NamedTuple):
    """The user's files of one split."""

    images: Path  # folder
    annotations: Path  # COCO json


@dataclass
class Report:
    """How often each kind of repair was made in one file."""

    file: Path
    mended: Counter[str] = field(default_factory=Counter)

    def notes(self) -> list[str]:
        if not self.mended:
            return []
        return [f"{self.file} mended: " + "; ".join(f"{what}: {count:,}" for what, count in self.mended.items())]


def describe(folder: Path, name: str, files: dict[str, Files], key: str, masks: bool = True) -> Manifest:
    """The manifest of a detection dataset.

    Args:
        folder: the dataset's folder under results/data.
        files: the user's files, of train and val.
        key: the setting that names them, for error messages.
        masks: whether to use the masks; without them, boxes only.

    Raises:
        UserError: a file is missing or broken, or an annotation can't be repaired without guessing.
    """
    for split, paths in files.items():
        if not paths.annotations.is_file():
            raise UserError(f"{key}.{split}.annotations: {paths.annotations} is no file; set it to a COCO json file")
        if not paths.images.is_dir():
            raise UserError(f"{key}.{split}.images: {paths.images} is no folder; set it to the folder of the images")
        check_source(paths.images, folder, f"{key}.{split}.images")
    folders = list(dict.fromkeys(paths.images.resolve() for paths in files.values()))
    fingerprint = take(
        folder, [walk(path, folder) for path in folders], [paths.annotations for paths in files.values()]
    )
    reports = {split: Report(paths.annotations) for split, paths in files.items()}
    raw = {split: _Raw.read(paths.annotations) for split, paths in files.items()}
    classes = _categories(raw["train"], reports["train"])
    category_of = {split: _matched(raw[split], classes, reports[split]) for split in files}
    images = {split: _images(raw[split], paths.images, reports[split]) for split, paths in files.items()}
    listings = {
        split: trees.Listing(paths.images, [image.file for image in images[split].unique], None, [])
        for split, paths in files.items()
    }
    decoded = {split: trees.decode(folder, split, listing, fingerprint) for split, listing in listings.items()}
    masks = masks and _has_masks(raw)
    splits, contents, notes = {}, [], []
    for split, paths in files.items():
        content = _annotations(
            raw[split], images[split], decoded[split], paths, category_of[split], masks, reports[split]
        )
        if not any(not a["iscrowd"] for a in content["annotations"]):
            raise UserError(f"{paths.annotations}: has no instance; add annotations")
        content["categories"] = [{"id": number, "name": label} for number, label in classes.items()]
        written = f"instances_{split}.json"
        write_bytes(folder / written, json.dumps(content).encode())
        splits[split] = Split(count=len(content["images"]), images=str(paths.images.resolve()), annotations=written)
        contents += [split, decoded[split].sha256, content["images"], content["annotations"]]
        notes += reports[split].notes()
        notes += _without(classes, content["annotations"]) if split == "train" else []
    notes += trees.damaged(folder, listings, decoded) + trees.dark(decoded)
    notes += trees.duplicates(folder, listings, {split: images.sha256 for split, images in decoded.items()})
    if not masks:
        notes.append("instances have boxes and no masks: detection trains boxes only, and there is no mask AP")
    sizes = {size for images in decoded.values() for size in images.image_sizes}
    measured = decoded["train"].sums.result(f"every pixel of the {len(decoded['train'].sha256):,} train images, each image counting equally")  # fmt: skip
    manifest = Manifest(
        name=name,
        kind="detection",
        classes=tuple(classes.values()),
        image_size=sizes.pop() if len(sizes) == 1 else None,
        splits=splits,
        statistics=Statistics(measured=measured),
        digest=content_digest(list(classes.items()), *contents),
        digest_of="class names, contents of the images, annotations as mended",
        origin=", ".join(str(paths.annotations.resolve()) for paths in files.values()),
        fingerprint=fingerprint,
        masks=masks,
        notes=tuple(notes),
    )
    return with_sizes(manifest, folder)


# --------------------------------------------------------------------------------------------------
# The file


@dataclass
class _Raw:
    """A COCO file as the user wrote it."""

    file: Path
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]

    @classmethod
    def read(cls, file: Path) -> _Raw:
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}: no whole JSON file ({' '.join(str(error).split())}); export it again") from None
        for key in ("images", "annotations", "categories"):
            part = content.get(key) if isinstance(content, dict) else None
            if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
                raise UserError(
                    f"{file}: has no list of records '{key}', so it is no COCO instance file; export it as one"
                )
        if not content["categories"]:
            raise UserError(f"{file}: lists no categories; add them")
        return cls(file, content["images"], content["annotations"], content["categories"])


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kept_ids(ids: Iterable[Any]) -> dict[Any, int]:
    """The file's id -> ours: the same where all are whole numbers, else counted from 1."""
    given = list(ids)
    if all(isinstance(value, int) for value in given):
        return {value: value for value in given}
    return {value: number for number, value in enumerate(given, 1)}


# --------------------------------------------------------------------------------------------------
# Categories


def _names(raw: _Raw) -> dict[Any, str]:
    """Category id of the file -> name, as the file has it."""
    names: dict[Any, str] = {}
    for number, category in enumerate(raw.categories):
        identity, name = category.get("id"), category.get("name")
        if not _is_id(identity):
            raise UserError(f"{raw.file}: category {number} of the list has id {identity!r}; give it a whole number")
        name = name.strip() if isinstance(name, str) else name
        if not isinstance(name, str) or not name:
            raise UserError(f"{raw.file}: category {identity} has name {name!r}; give it one")
        if names.get(identity, name) != name:
            raise UserError(
                f"{raw.file}: category {identity} stands twice, as '{names[identity]}' and '{name}'; remove one"
            )
        names[identity] = name
    return names


def _categories(raw: _Raw, report: Report) -> dict[int, str]:
    """Our id -> name, by ascending id, every name once."""
    names = _names(raw)
    ids = _kept_ids(names)
    times = Counter(names.values())
    found = {}
    for identity, name in names.items():
        if times[name] > 1:
            report.mended["names that several categories share (told apart by id)"] += 1
            name = f"{name} ({identity})"
        found[ids[identity]] = name
    if (problem := wrong_name(found.values())) is not None:
        raise UserError(f"{raw.file}: of its categories, counted from 0, {problem}")
    return dict(sorted(found.items()))


def _matched(raw: _Raw, classes: dict[int, str], report: Report) -> dict[Any, int]:
    """The file's category ids -> ids of `classes`. A category that train lacks is left out if no annotation uses it."""
    names = _names(raw)
    ids = _kept_ids(names)
    by_name = {name: number for number, name in classes.items()}
    found, used = {}, {a.get("category_id") for a in raw.annotations if _is_id(a.get("category_id"))}
    for identity, name in names.items():
        number = ids[identity]
        if classes.get(number) in (name, f"{name} ({identity})"):
            found[identity] = number
        elif name in by_name:
            found[identity] = by_name[name]
            report.mended["categories with other ids than in train (matched by name)"] += 1
        elif identity in used:
            raise UserError(
                f"{raw.file}: category {identity} '{name}' is none of train's ({', '.join(list(classes.values())[:5])}); "
                "give both files the same categories"
            )
        else:
            report.mended["categories without an instance that train lacks (left out)"] += 1
    return found


def _without(classes: dict[int, str], annotations: list[dict[str, Any]]) -> list[str]:
    used = {a["category_id"] for a in annotations}
    bare = [f"'{name}'" for number, name in classes.items() if number not in used]
    if not bare:
        return []
    more = f" and {len(bare) - 3:,} more" if len(bare) > 3 else ""
    return [f"no training instance of {', '.join(bare[:3])}{more}"]


# --------------------------------------------------------------------------------------------------
# Images


class _Image(NamedTuple):
    id: int
    file: str  # path under the split's folder, or absolute
    record: dict[str, Any]


class _Images(NamedTuple):
    unique: list[_Image]  # each image file once
    position: dict[Any, int]  # the file's id of an image -> its position in `unique`
    missing: dict[Any, str]  # the file's id of an image whose file is missing -> its name


def _images(raw: _Raw, folder: Path, report: Report) -> _Images:
    ids = _kept_ids(record["id"] for record in raw.images if _is_id(record.get("id")))
    unique: list[_Image] = []
    position: dict[Any, int] = {}
    position_of_file: dict[str, int] = {}
    missing: dict[Any, str] = {}
    for number, record in enumerate(raw.images):
        identity, name = record.get("id"), record.get("file_name")
        if not _is_id(identity):
            raise UserError(f"{raw.file}: image {number} of the list has id {identity!r}; give it a whole number")
        if not isinstance(name, str) or not name:
            raise UserError(f"{raw.file}: image {identity} has file_name {name!r}; give it the name of its file")
        if (file := _find_file(folder, name, report)) is None:
            missing[identity] = name
            continue
        if identity in position and (before := unique[position[identity]].file) != file:
            raise UserError(f"{raw.file}: image {identity} stands twice, as {before} and {file}; give one another id")
        if file in position_of_file:
            report.mended["images listed twice (joined)"] += 1
        else:
            position_of_file[file] = len(unique)
            unique.append(_Image(ids[identity], file, record))
        position[identity] = position_of_file[file]
    return _Images(unique, position, missing)


def _find_file(folder: Path, name: str, report: Report) -> str | None:
    """The path of an image under its folder: as given, or without the folders that an exporter put before it."""
    if (folder / name).is_file():
        return name
    short = name.replace("\\", "/")
    for candidate in (short, short.rsplit("/", 1)[-1]):
        if candidate != name and (folder / candidate).is_file():
            report.mended["file names with another path (found in the folder)"] += 1
            return candidate
    return None


# --------------------------------------------------------------------------------------------------
# Annotations


def _has_masks(raw: dict[str, _Raw]) -> bool:
    """Whether instances have masks. Raises UserError where only some have one."""
    without: tuple[_Raw, int] | None = None  # the first instance without a mask
    with_masks = 0
    for content in raw.values():
        for number, annotation in enumerate(content.annotations):
            if annotation.get("segmentation"):
                with_masks += not annotation.get("iscrowd")
            elif not annotation.get("iscrowd") and without is None:
                without = (content, number)
    if without is not None and with_masks:
        content, number = without
        raise UserError(
            f"{content.file}: {_called(content.annotations[number], number)} has no segmentation while {with_masks:,} "
            "others have; add it, or train boxes only (masks: false)"
        )
    return with_masks > 0


def _called(annotation: dict[str, Any], number: int) -> str:
    identity = annotation.get("id")
    return f"annotation {identity}" if _is_id(identity) else f"annotation without an id, number {number} of the list,"


class _Unclear(Exception):
    """What is wrong with an annotation, and what to do."""


def _annotations(
    raw: _Raw,
    images: _Images,
    decoded: trees.Decoded,
    files: Files,
    category_of: dict[Any, int],
    masks: bool,
    report: Report,
) -> dict[str, Any]:
    """The split's images and repaired annotations, in COCO's format."""
    by_image: dict[int, list[tuple[int, dict[str, Any]]]] = {}  # position of an image -> number, annotation
    for number, annotation in enumerate(raw.annotations):
        identity, category = annotation.get("image_id"), annotation.get("category_id")
        what = f"{raw.file}: {_called(annotation, number)}"
        if _is_id(identity) and identity in images.missing:
            raise UserError(
                f"{what} belongs to image {identity}, whose file {printable(images.missing[identity])} is missing in "
                f"{printable(files.images)} (of {len(images.missing):,} missing files); add it or remove its records"
            )
        if not _is_id(identity) or identity not in images.position:
            raise UserError(f"{what} refers to image {identity!r}, which is not listed; correct or remove it")
        if not _is_id(category) or category not in category_of:
            raise UserError(f"{what} refers to category {category!r}, which is not listed; correct or remove it")
        by_image.setdefault(images.position[identity], []).append((number, annotation))
    if images.missing:
        report.mended["images without a file and without annotations (left out)"] += len(images.missing)
    identities = [a.get("id") for a in raw.annotations]
    if (known := len({repr(i) for i in identities if _is_id(i)})) < len(identities):
        report.mended["annotations with a missing or repeated id (numbered anew)"] += len(identities) - known
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for position, image in enumerate(images.unique):
        height, width = decoded.image_sizes[position]
        numbered = by_image.get(position, [])
        turn = _turn(raw, files.images / image.file, image.record, (height, width), numbered, report)
        records.append({"id": image.id, "file_name": image.file, "height": height, "width": width})
        for number, annotation in numbered:
            try:
                mended = _mended(annotation, height, width, turn, masks, report)
            except _Unclear as unclear:
                raise UserError(f"{raw.file}: {_called(annotation, number)} {unclear}") from None
            if mended is None:
                report.mended["instances smaller than a pixel (left out)"] += 1
                continue
            numbers = {
                "id": len(annotations) + 1,
                "image_id": image.id,
                "category_id": category_of[annotation["category_id"]],
            }
            annotations.append({**numbers, **mended})
    return {"info": {"description": str(raw.file)}, "images": records, "annotations": annotations}


@dataclass(frozen=True)
class _Turn:
    """Maps coordinates of an image as stored to the image as displayed; height and width are as stored."""

    orientation: int
    height: int
    width: int

    def point(self, x: float, y: float) -> Point:
        return {
            1: (x, y),
            5: (y, x),
            6: (self.height - y, x),
            7: (self.height - y, self.width - x),
            8: (y, self.width - x),
        }[self.orientation]

    def box(self, box: Box) -> Box:
        (x1, y1), (x2, y2) = self.point(box[0], box[1]), self.point(box[0] + box[2], box[1] + box[3])
        return min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """(height, width) as stored -> as displayed."""
        turned = {
            1: lambda: mask,
            5: lambda: mask.T,
            6: lambda: np.rot90(mask, -1),
            7: lambda: np.rot90(mask, 2).T,
            8: lambda: np.rot90(mask, 1),
        }[self.orientation]()
        return np.asfortranarray(turned)


def _turn(
    raw: _Raw,
    path: Path,
    record: dict[str, Any],
    size: tuple[int, int],
    annotations: list[tuple[int, dict[str, Any]]],
    report: Report,
) -> _Turn:
    """How to turn annotations so that they fit the image as it is decoded.

    Args:
        size: height, width of the image as it is decoded.

    Raises:
        UserError: the record has another size than the image, and there are annotations that depend on it.
    """
    recorded = (record.get("height"), record.get("width"))
    if recorded == size:
        return _Turn(1, *size)
    exif = orientation(path)
    if recorded == (size[1], size[0]) and exif in (5, 6, 7, 8):
        report.mended["images recorded before their EXIF orientation (annotations turned with them)"] += 1
        return _Turn(exif, *recorded)
    if recorded == (None, None) or not annotations:
        report.mended["images recorded without their size or with another (corrected)"] += 1
        return _Turn(1, *size)
    number, first = annotations[0]
    raise UserError(
        f"{raw.file}: {_called(first, number)} belongs to image {record['id']}, recorded as {recorded[1]}x{recorded[0]} "
        f"pixels, but {printable(path)} has {size[1]}x{size[0]}; correct the record and its annotations, or put the right "
        "image there"
    )


def _mended(
    annotation: dict[str, Any], height: int, width: int, turn: _Turn, masks: bool, report: Report
) -> dict[str, Any] | None:
    """bbox, area, iscrowd and segmentation of an annotation; None for an instance smaller than a pixel.

    Raises:
        _Unclear: the annotation is ambiguous.
    """
    crowd = annotation.get("iscrowd", 0)
    if "iscrowd" not in annotation:
        report.mended["annotations without iscrowd (taken as 0)"] += 1
    if crowd not in (0, 1):
        raise _Unclear(f"has iscrowd {crowd!r}; set it to 0 or 1")
    box = _box(annotation, turn)
    result: dict[str, Any] = {"iscrowd": int(crowd)}
    area = None
    if masks:
        given = annotation.get("segmentation")
        if crowd and not given and box is not None:
            x, y, w, h = box
            given, turn = [[x, y, x + w, y, x + w, y + h, x, y + h]], _Turn(1, height, width)
            report.mended["crowds without a mask (taken as their boxes)"] += 1
        segmentation = _segmentation(given, height, width, turn, report)
        encoded = _encoded(segmentation, height, width)
        area = float(rle.area(encoded))
        if not area:
            if isinstance(segmentation, list) and _extent(segmentation) < 2:
                return None
            raise _Unclear("has a segmentation that covers no pixel; draw it again or remove the annotation")
        x, y, w, h = (float(value) for value in rle.toBbox(encoded))
        mask_box = (x, y, w, h)
        if box is None:
            report.mended["boxes missing (computed from masks)"] += 1
            box = mask_box
        elif _iou(_cut(box, height, width), mask_box) < OVERLAP:
            report.mended["boxes that don't fit their masks (computed from those)"] += 1
            box = mask_box
        result["segmentation"] = segmentation
    if box is None:
        raise _Unclear(f"has bbox {annotation.get('bbox')!r}; give it left, top, width and height in pixels, above 0")
    inside = _cut(box, height, width)
    if not masks and inside[2] * inside[3] < INSIDE * box[2] * box[3]:
        shown = ", ".join(f"{value:g}" for value in box)
        raise _Unclear(
            f"has bbox [{shown}] of which most lies outside its image of {width}x{height} pixels; boxes are left, top, "
            "width and height: correct it"
        )
    if any(abs(a - b) > ROUNDING for a, b in zip(inside, box, strict=True)):
        report.mended["boxes that reach beyond their images (cut)"] += 1
        box = inside
    if _is_number(annotation.get("area")) and annotation["area"] > 0:
        area = float(annotation["area"])
    else:
        report.mended["areas missing (computed)"] += 1
    result["bbox"] = list(box)
    result["area"] = area if area is not None else box[2] * box[3]
    return result


def _box(annotation: dict[str, Any], turn: _Turn) -> Box | None:
    """The annotation's box, turned; None where it is missing, malformed or empty."""
    given = annotation.get("bbox")
    if not isinstance(given, list) or len(given) != 4 or not all(_is_number(value) for value in given):
        return None
    left, top, width, height = (float(value) for value in given)
    return turn.box((left, top, width, height)) if width > 0 and height > 0 else None


def _cut(box: Box, height: int, width: int) -> Box:
    """The part of a box inside its image; width or height is 0 where there is none."""
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(float(width), box[0] + box[2]), min(float(height), box[1] + box[3])
    return left, top, max(0.0, right - left), max(0.0, bottom - top)


def _iou(one: Box, other: Box) -> float:
    wide = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    tall = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    shared = max(0.0, wide) * max(0.0, tall)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


# --------------------------------------------------------------------------------------------------
# Masks


def _segmentation(given: Any, height: int, width: int, turn: _Turn, report: Report) -> Any:
    """Polygons inside the image, as lists x, y, x, y, ...; or compressed run lengths. Raises _Unclear."""
    if isinstance(given, dict):
        return _run_lengths(given, turn)
    if not isinstance(given, list) or not given:
        raise _Unclear("has an empty segmentation; draw it again or remove the annotation")
    if all(_is_number(value) for value in given):
        report.mended["polygons outside a list (put into one)"] += 1
        given = [given]
    polygons = []
    for part in given:
        if not isinstance(part, list) or not all(_is_number(value) for value in part) or len(part) % 2:
            raise _Unclear("has a polygon that is no list of x, y, x, y, ...; draw it again or remove the annotation")
        points = [turn.point(float(x), float(y)) for x, y in zip(part[::2], part[1::2], strict=True)]
        if len(points) < 3:  # pycocotools would read four numbers as a box
            report.mended["polygons of fewer than three points (left out)"] += 1
            continue
        if all(0 <= x <= width and 0 <= y <= height for x, y in points):
            polygons.append([value for point in points for value in point])
            continue
        report.mended["polygons that reach beyond their images (cut)"] += 1
        if len(cut := _clipped(points, height, width)) >= 3:
            polygons.append([value for point in cut for value in point])
    if not polygons:
        raise _Unclear(
            "has no polygon of three points or more inside its image; draw it again or remove the annotation"
        )
    return polygons


def _clipped(points: list[Point], height: int, width: int) -> list[Point]:
    """The part of a polygon inside the image, cut at one image edge after another (Sutherland and Hodgman, 1974)."""
    for axis, bound, sign in ((0, 0.0, 1), (0, float(width), -1), (1, 0.0, 1), (1, float(height), -1)):

        def within(p: Point, axis: int = axis, bound: float = bound, sign: int = sign) -> bool:
            return sign * (p[axis] - bound) >= 0

        def crossing(p: Point, q: Point, axis: int = axis, bound: float = bound) -> Point:
            share = (bound - p[axis]) / (q[axis] - p[axis])
            other = p[1 - axis] + share * (q[1 - axis] - p[1 - axis])
            return (bound, other) if axis == 0 else (other, bound)

        kept: list[Point] = []
        for p, q in zip(points[-1:] + points[:-1], points, strict=True):
            if within(p) != within(q):
                kept.append(crossing(p, q))
            if within(q):
                kept.append(q)
        points = kept
        if not points:
            return []
    return points


def _extent(polygons: list[list[float]]) -> float:
    """The longer side of the polygons' bounding box."""
    points = np.array([point for part in polygons for point in zip(part[::2], part[1::2], strict=True)])
    return float((points.max(0) - points.min(0)).max())


def _run_lengths(given: dict[str, Any], turn: _Turn) -> dict[str, Any]:
    size, counts = given.get("size"), given.get("counts")
    if size != [turn.height, turn.width]:
        raise _Unclear(
            f"has a mask of size {size!r} (height, width), but its image is recorded as [{turn.height}, {turn.width}]; "
            "draw it again or remove the annotation"
        )
    lengths = _decoded(counts) if isinstance(counts, str) else counts
    whole = (
        isinstance(lengths, list)
        and all(isinstance(n, int) and n >= 0 for n in lengths)
        and sum(lengths) == turn.height * turn.width
    )
    if not whole:
        raise _Unclear("has a mask whose run lengths are broken; draw it again or remove the annotation")
    encoded = rle.frPyObjects({"size": size, "counts": lengths}, turn.height, turn.width)
    if turn.orientation != 1:
        encoded = rle.encode(turn.mask(rle.decode(encoded)))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def _decoded(text: str) -> list[int] | None:
    """Decode COCO's compressed run lengths; None where the text is broken.

    A character holds 5 bits of a number; from the fourth number on, the difference to the last but one is stored."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths if not shift else None


def _encoded(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    if isinstance(segmentation, dict):
        return {"size": segmentation["size"], "counts": segmentation["counts"].encode("ascii")}
    return rle.merge(rle.frPyObjects(segmentation, height, width))  # type: ignore[no-any-return]
