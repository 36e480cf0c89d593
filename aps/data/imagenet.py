"""ImageNet-1K (ILSVRC 2012): from its tar files, or an ImageFolder tree (train/, val/) used in place.

Design: the train archive is a tar of 1,000 tars. Classes are extracted in parallel, straight from their position in it.
Each gets its final name only when complete, so a killed extraction continues where it stopped. The archives are not
deleted; extracted images take about as much space again.
The test split is the official validation set, because the labels of the test set are not public.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import scipy.io

from aps.data import fetch, trees
from aps.data.manifest import ChannelStatistics, Manifest, check_unpacked, completing
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

# The publisher's files (behind a login) and md5, as torchvision lists them.
TRAIN = fetch.Published("ILSVRC2012_img_train.tar", None, "1d675b47d978889d74fa0da5fadfb00e")
VAL = fetch.Published("ILSVRC2012_img_val.tar", None, "29b22e2961454d5413ddabcf34fc5622")
DEVKIT = fetch.Published("ILSVRC2012_devkit_t12.tar.gz", None, "fa75699e90414af021442c21a62c3abf")
CLASSES = 1_000
COUNTS = {"train": 1_281_167, "val": 50_000}
STATISTICS_IMAGES = 10_000  # train images decoded for the statistics; all of them would take hours
WRITERS = 16  # threads that extract; more than cores, because they mostly wait for the disk

PUBLISHED = ChannelStatistics(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), over="the usual ImageNet constants (torchvision)"
)


def prepare(folder: Path, source: SourceSettings, name: str) -> Manifest:
    """Raises UserError where an archive, a class or an image is missing or altered, or their number is wrong."""
    advice = f"set it to a folder with {TRAIN.name}, {VAL.name} and {DEVKIT.name}, or with train/ and val/"
    if source.path is None:
        raise UserError(
            f"dataset '{name}' can't be downloaded without a login: sources.{name}.path is not set; {advice}"
        )
    path = fetch.source_path(name, source, advice)
    assert path is not None
    if not path.is_dir():
        raise UserError(f"sources.{name}.path: {path} is not a folder; {advice}")
    if (path / "train").is_dir():
        root = path
        if not (path / "val").is_dir():
            raise UserError(f"{path}: has train/ but no val/; add the validation images in class folders")
    else:
        extract(path, folder, name)
        root = folder
    advice = completing(root, folder, name, "complete it")
    found = {part: trees.survey(root / part, folder) for part in COUNTS}
    classes = trees.class_folders(found["train"])
    if len(classes) != CLASSES:
        raise UserError(f"{root / 'train'}: has {len(classes):,} class folders instead of {CLASSES:,}; {advice}")
    splits = {}
    for split, part in (("train", "train"), ("test", "val")):
        splits[split] = trees.listing(found[part], classes)
        if (count := len(splits[split].names)) != COUNTS[part]:
            raise UserError(f"{root / part}: has {count:,} images instead of {COUNTS[part]:,}; {advice}")
        if root == folder:
            check_unpacked(folder, part, name)
    return trees.describe(
        folder,
        name,
        classes,
        splits,
        origin=str(path.resolve()),
        source=source,
        trees=list(found.values()),
        sample=STATISTICS_IMAGES,
        published=PUBLISHED,
        notes=[note for part in found.values() for note in trees.passed_over(part)],
    )


def extract(path: Path, folder: Path, name: str) -> None:
    """Extract the tar files in `path` as `folder`/train and `folder`/val, continuing where an earlier attempt stopped."""
    archives = []
    for file in (DEVKIT, VAL, TRAIN):
        archive = fetch.obtain(name, file, path, folder)
        if archive is None:
            raise UserError(f"{path}: has neither train/ nor {file.name}; put the publisher's file there")
        archives.append(archive)
    devkit, val, train = archives
    wnids = validation_classes(devkit)
    _extract_val(val, wnids, folder / "val")
    _extract_train(train, sorted(set(wnids)), folder / "train")


def validation_classes(devkit: Path) -> list[str]:
    """WordNet ID of each validation image, in the order of the images' numbers.

    meta.mat numbers the synsets (ILSVRC2012_ID); the synsets without children are the classes.

    Raises:
        UserError: the devkit is damaged or not the publisher's.
    """
    base = "ILSVRC2012_devkit_t12/data/"
    with fetch.archive_errors(devkit), tarfile.open(devkit, "r:gz") as tar:
        members = {member.name.removeprefix("./"): member for member in fetch.regular_members(devkit, tar)}
        for file in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            if base + file not in members:
                raise UserError(f"{devkit}: has no {base}{file}; get the publisher's {DEVKIT.name}")
        meta: Any = tar.extractfile(members[base + "meta.mat"])
        truth: Any = tar.extractfile(members[base + "ILSVRC2012_validation_ground_truth.txt"])
        try:
            synsets = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
            wnid = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
            labels = [wnid[int(line)] for line in truth.read().split()]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"{devkit}: its class table or ground truth can't be read ({error!r}); get it again"
            ) from None
    if len(set(labels)) != CLASSES or len(labels) != COUNTS["val"]:
        raise UserError(
            f"{devkit}: ground truth of {len(labels):,} images in {len(set(labels)):,} classes instead of "
            f"{COUNTS['val']:,} in {CLASSES:,}; get it again"
        )
    return labels


def _extract_train(archive: Path, wnids: list[str], target: Path) -> None:
    with fetch.archive_errors(archive), tarfile.open(archive, "r:") as tar:
        classes = {Path(member.name).stem: member for member in fetch.regular_members(archive, tar)}
    if missing := sorted(set(wnids) - set(classes)):
        raise UserError(f"{archive}: has no {missing[0]}.tar (of {len(missing)} missing classes); get it again")
    target.mkdir(parents=True, exist_ok=True)
    todo = [wnid for wnid in wnids if not (target / wnid).is_dir()]
    if len(todo) < len(wnids):
        print(f"{archive.name}: {len(wnids) - len(todo):,} classes are extracted already", flush=True)
    fetch.parallel(lambda wnid: _extract_class(archive, classes[wnid], target / wnid), todo, "extract train", WRITERS)


def _extract_class(archive: Path, member: tarfile.TarInfo, target: Path) -> None:
    """Extract one nested tar, under a hidden name until it is complete."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    where = f"{archive}: {member.name}"
    with open(archive, "rb") as file, fetch.archive_errors(Path(where)):
        window: Any = fetch.Window(file, member.offset_data, member.size)
        with tarfile.open(fileobj=window, mode="r:") as tar:
            for image in fetch.regular_members(Path(where), tar):
                content = tar.extractfile(image)
                assert content is not None
                fetch.copy_file(content, part / Path(image.name).name, image.size, Path(where))
    os.replace(part, target)


def _extract_val(archive: Path, wnids: list[str], target: Path) -> None:
    """Extract each image into the folder of its class, under a hidden name until all are complete."""
    if target.is_dir():
        return
    part = target.with_name(f".{target.name}.part")
    with fetch.archive_errors(archive), tarfile.open(archive, "r:") as tar:
        members = fetch.regular_members(archive, tar)
    if len(members) != len(wnids):
        raise UserError(f"{archive}: has {len(members):,} images instead of {len(wnids):,}; get it again")
    for wnid in set(wnids):
        (part / wnid).mkdir(parents=True, exist_ok=True)

    def write(members: list[tarfile.TarInfo]) -> None:
        with open(archive, "rb") as file:
            for member in members:
                number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", Path(member.name).name)
                if number is None or not 1 <= int(number[1]) <= len(wnids):
                    raise UserError(f"{archive}: member {member.name!r} is no validation image; get it again")
                image = part / wnids[int(number[1]) - 1] / number[0]
                if not image.exists() or image.stat().st_size != member.size:
                    content: Any = fetch.Window(file, member.offset_data, member.size)
                    fetch.copy_file(content, image, member.size, archive)

    fetch.parallel(write, [members[i : i + 100] for i in range(0, len(members), 100)], "extract val", WRITERS)
    os.replace(part, target)
