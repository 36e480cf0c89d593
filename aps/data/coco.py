"""COCO 2017 (arXiv 1405.0312): 118,287 + 5,000 images with instance masks, from its zip files or an unpacked tree.

A tree has train2017/, val2017/ and annotations/instances_{train,val}2017.json, and is used in place. Zip files are
extracted beside the manifest; downloaded ones are then deleted, the user's stay.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
from pathlib import Path

from aps.data import fetch, trees
from aps.data.manifest import (
    Manifest,
    Split,
    Statistics,
    check_unpacked,
    completing,
    content_digest,
    with_sizes,
    write_index,
)
from aps.errors import UserError
from aps.files import sha256
from aps.settings.blocks import SourceSettings

HOST = "http://images.cocodataset.org"
# The publisher lists no checksums; these md5 are the ones in common use (PaddleDetection, FiftyOne and others).
ANNOTATIONS = fetch.Published(
    "annotations_trainval2017.zip",
    f"{HOST}/annotations/annotations_trainval2017.zip",
    "f4bbac642086de4f52a3fdda2de5fa2c",
)
IMAGES = {
    "train": fetch.Published("train2017.zip", f"{HOST}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
    "val": fetch.Published("val2017.zip", f"{HOST}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
}
COUNTS = {"train": 118_287, "val": 5_000}
INSTANCES = {"train": 860_001, "val": 36_781}
CLASSES = 80
WRITERS = 16  # threads that extract; more than cores, because they mostly wait for the disk


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """Raises UserError where a zip, an image or an annotation is missing or altered, or their number is wrong."""
    advice = "set it to a folder with train2017, val2017 and annotations, unpacked or as the publisher's zip files"
    path = fetch.source_path(name, source, advice)
    if path is not None and not path.is_dir():
        raise UserError(f"sources.{name}.path: {path} is not a folder; {advice}")
    roots = {split: _obtain_folder(name, IMAGES[split], f"{split}2017", path, folder) for split in IMAGES}
    annotations = _obtain_folder(name, ANNOTATIONS, "annotations", path, folder)
    splits, contents, classes = {}, [], None
    for split, root in roots.items():
        file = annotations / f"instances_{split}2017.json"
        images, instances, names = read_annotations(file)
        for what, found, expected in (
            ("images", len(images), COUNTS[split]),
            ("instances", instances, INSTANCES[split]),
            ("classes", len(names), CLASSES),
        ):
            if found != expected:
                raise UserError(f"{file}: lists {found:,} {what} instead of {expected:,}; get it again")
        if classes is not None and names != classes:
            raise UserError(f"{file}: its classes are not those of the train annotations; get it again")
        classes = names
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(root) if entry.is_file()}
        if missing := sorted(set(images) - set(sizes)):
            raise UserError(
                f"{root / missing[0]} is missing (of {len(missing):,} missing images); {completing(root, folder, name, 'complete the folder')}"
            )
        if empty := sorted(image for image in images if not sizes[image]):
            raise UserError(
                f"{root / empty[0]} is empty (of {len(empty):,} empty images); {completing(root, folder, name, 'get it again')}"
            )
        contents.append([split, sha256(file), sorted((image, sizes[image]) for image in images)])
        where, index = _inside(root, folder), None
        if not os.path.isabs(where):  # unpacked by us, so alterations are ours to notice
            check_unpacked(folder, where, name)
            index = f"{split}.tsv"
            checksums = trees.checksums_of(root, images, split)
            write_index(folder / index, images, None, [sizes[image] for image in images], checksums)
        splits[split] = Split(count=len(images), images=where, index=index, annotations=_inside(file, folder))
    assert classes is not None
    manifest = Manifest(
        name=name,
        kind="detection",
        classes=tuple(classes),
        image_size=None,
        splits=splits,
        statistics=Statistics(measured=None),
        digest=content_digest(contents),
        digest_of="contents of the annotation files, names and sizes of the images",
        origin=str(path.resolve()) if path else HOST,
        source=source.path,
    )
    return with_sizes(manifest, folder)


def read_annotations(file: Path) -> tuple[list[str], int, list[str]]:
    """Image names, number of instances and class names (by category id) of a COCO file.

    Raises:
        UserError: it is missing, damaged, or an instance refers to an image or class that it does not list.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing; add the publisher's annotations")
    try:
        content = json.loads(file.read_bytes())
        images = {image["id"]: str(image["file_name"]) for image in content["images"]}
        classes = {c["id"]: str(c["name"]) for c in sorted(content["categories"], key=lambda c: int(c["id"]))}
        instances = [(a["id"], a["image_id"], a["category_id"]) for a in content["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: truncated or not a COCO instance file ({error!r}); get it again") from None
    for number, image, category in instances:
        if image not in images or category not in classes:
            what = f"image {image}" if image not in images else f"category {category}"
            raise UserError(f"{file}: annotation {number} refers to {what}, which is not listed; get it again")
    return list(images.values()), len(instances), list(classes.values())


def _inside(path: Path, folder: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(folder.resolve()) if resolved.is_relative_to(folder.resolve()) else resolved)


def _obtain_folder(name: str, file: fetch.Published, inside: str, path: Path | None, folder: Path) -> Path:
    """The folder `inside`: in the user's tree, extracted earlier, or extracted now from the zip file."""
    for candidate in (path / inside if path else None, folder / inside):
        if candidate is not None and candidate.is_dir():
            return candidate
    archive = fetch.obtain(name, file, path, folder)
    if archive is None:
        raise UserError(f"{path}: has neither {inside}/ nor {file.name}; put one of them there")
    extract(archive, inside, folder)
    if path is None:
        archive.unlink()
    return folder / inside


def extract(archive: Path, inside: str, folder: Path) -> None:
    """Extract `inside`/ of the zip as `folder`/`inside`, which appears only when complete.

    Complete files of an earlier attempt are kept; zipfile checks the CRC of each file.
    """
    part = folder / f".{inside}.part"
    with fetch.archive_errors(archive), zipfile.ZipFile(archive) as file:
        names = {member: fetch.safe_name(archive, member.filename) for member in file.infolist()}
    # the annotations zip also holds captions and keypoints, which are not needed
    wanted = f"{inside}/instances_" if inside == "annotations" else f"{inside}/"
    members = [m for m, path in names.items() if str(path).startswith(wanted) and not m.is_dir()]
    if not members:
        raise UserError(f"{archive}: holds no {wanted}*; get the publisher's own archive")
    for parent in {names[member].parent for member in members}:
        (part / parent).mkdir(parents=True, exist_ok=True)
    opened = threading.local()

    def write(member: zipfile.ZipInfo) -> None:
        target = part / names[member]
        if target.exists() and target.stat().st_size == member.file_size:
            return
        if not hasattr(opened, "zip"):  # a ZipFile has one file position, so each thread opens one
            opened.zip = zipfile.ZipFile(archive)
        with fetch.archive_errors(archive), opened.zip.open(member) as content:
            fetch.copy_file(content, target, member.file_size, archive)

    fetch.parallel(write, members, f"extract {archive.name}", WRITERS)
    os.replace(part / inside, folder / inside)
    part.rmdir()
