"""Prepares a dataset by name: get, verify, describe. The manifest is written last and atomically.

Design: a copy of the manifest, `prepared.json`, stays beside it. Snakemake deletes a rule's outputs before it reruns
the rule; with the copy, a rerun only verifies the files, and neither downloads nor decodes the images again.
It does not know any dataset; they are found through `aps.registry`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from aps.data import fetch
from aps.data.fingerprint import outdated
from aps.data.manifest import COPIES, COPY, DECODED, LOCK, UNFINISHED, Manifest, earlier_copies
from aps.errors import UserError
from aps.files import DISK_ERRORS, make_folder
from aps.layout import data_folder
from aps.registry import DATASETS, DETECTION_DATASETS, resolve
from aps.settings.blocks import SourceSettings, UserDataset


def prepare(name: str, folder: Path, source: SourceSettings | UserDataset, force: bool = False) -> Manifest:
    """Prepare a dataset, or verify that it is prepared, and return its manifest.

    It is safe to kill and to call again. Of several processes that call it at once, one works and the others wait.

    Args:
        name: a dataset of `aps.registry`; any name, where `source` is a UserDataset.
        folder: the dataset's folder, results/data/NAME; for users' datasets results/data/NAME-KEY, to which
            results/data/NAME becomes a link unless something else has that name.
        source: where it comes from; `path` None means download (or no source needed).
        force: delete what was prepared before and prepare again; interrupted downloads are continued, and smaller
            copies of images are replaced one by one, because a study may be reading them.

    Raises:
        UserError: there is no such dataset, its source is missing, broken or incomplete, or the disk can't be written.
    """
    if isinstance(source, SourceSettings) and name not in DATASETS and name not in DETECTION_DATASETS:
        known = sorted([*DATASETS.names(), *DETECTION_DATASETS.names()])
        raise UserError(
            f"dataset '{name}' is unknown; known: {', '.join(known)}; one of your own is named in a study's `datasets` "
            "(--configfile)"
        )
    make_folder(folder)
    try:
        with _locked(name, folder):
            manifest = None if force else _prepared(name, folder, source)
            if manifest is None:
                if force:
                    _forget(folder)
                manifest = _prepare(name, folder, source)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or folder
        raise UserError(
            f"dataset '{name}': {where}: {error.strerror}; free the disk or make it accessible, then run again "
            "(what is done is kept)"
        ) from error
    if folder.name != name and folder.name == data_folder(name, source):
        _link(folder, name)
    for note in manifest.notes:
        print(f"{name}: {note}", flush=True)
    return manifest


def summary(manifest: Manifest) -> str:
    """`1,438 train, 359 test images of 10 classes, digest 0123456789ab`."""
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    labels = f"of {len(manifest.classes):,} classes" if manifest.classes else "without labels"
    return f"{counts} images {labels}, digest {manifest.digest[:12]}"


# --------------------------------------------------------------------------------------------------


def _prepare(name: str, folder: Path, source: SourceSettings | UserDataset) -> Manifest:
    if isinstance(source, UserDataset):
        manifest: Manifest = resolve("aps.data.user_datasets:prepare")(folder, source, name)
    else:
        registry = DATASETS if name in DATASETS else DETECTION_DATASETS
        manifest = registry.load(name)(folder, source, name)
        if not isinstance(manifest, Manifest):
            raise UserError(
                f"{registry.described(name)}: its function returned {type(manifest).__name__}; return the Manifest that "
                "arrays.store or trees.describe gives"
            )
        if (problem := manifest.shortcoming()) is not None:
            raise UserError(f"{registry.described(name)}: {problem}")
    if manifest.kind == "classification" and len(manifest.classes) == 1:
        note = f"warning: it has one class, '{manifest.classes[0]}', so kNN, linear_probe and finetune score 100 % whatever was learned"
        manifest = manifest.model_copy(update={"notes": (*manifest.notes, note)})
    if constant := manifest.constant_channels:
        note = f"{' and '.join(constant)}: the same in every pixel of train, so normalized by 1 instead of a deviation of 0"
        manifest = manifest.model_copy(update={"notes": (*manifest.notes, note)})
    manifest.write(folder / COPY)
    manifest.write(folder / "manifest.json")
    shutil.rmtree(folder / fetch.DOWNLOADS, ignore_errors=True)
    (folder / DECODED).unlink(missing_ok=True)
    print(f"{name}: prepared: {summary(manifest)}", flush=True)
    for copies in earlier_copies(folder):
        if (copies / UNFINISHED).exists():
            shutil.rmtree(copies, ignore_errors=True)
            continue
        print(
            f"{name}: {copies} stays, because a study may be reading these earlier copies; `python -m aps gc STUDY.yaml ...`, "
            "which takes every study that is still needed, lists it",
            flush=True,
        )
    return manifest


def _link(folder: Path, name: str) -> None:
    """Link the dataset's plain name to its folder, for people; no code follows the link."""
    link = folder.with_name(name)
    with suppress(OSError):  # this file system has no links
        if link.is_symlink() or not link.exists():
            new = folder.with_name(f".{folder.name}.link")
            new.unlink(missing_ok=True)
            new.symlink_to(folder.name)
            new.replace(link)


def _prepared(name: str, folder: Path, source: SourceSettings | UserDataset) -> Manifest | None:
    """The manifest of an earlier preparation that is still valid, else None."""
    path = folder / "manifest.json"
    known = path if path.exists() else folder / COPY
    if not known.exists():
        return None
    try:
        manifest = Manifest.read(known)
    except UserError as error:
        print(f"{name}: {error}; preparing it again", flush=True)
        return None
    problem = outdated(known, source) or manifest.shortcoming() or manifest.problem(folder)
    if problem is not None:
        print(f"{name}: prepared before, but {problem}; preparing it again", flush=True)
        return None
    if known != path:
        manifest.write(path)
    print(f"{name}: already prepared and verified: {summary(manifest)}", flush=True)
    return manifest


def _forget(folder: Path) -> None:
    """Delete what was prepared: the manifest, and the files and folders it names inside `folder`, except copies."""
    prepared = {COPY, "manifest.json", DECODED, fetch.VERIFIED}
    for known in (folder / COPY, folder / "manifest.json"):
        with suppress(UserError):
            manifest = Manifest.read(known)
            named = [*manifest.sizes, *(split.images or "" for split in manifest.splits.values())]
            prepared |= {Path(name).parts[0] for name in named if name and not Path(name).is_absolute()}
    for path in (folder / name for name in prepared - {"..", "."} if not name.startswith(COPIES)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(name: str, folder: Path) -> Iterator[None]:
    """Lock the dataset's folder against other processes; wait while another holds the lock."""
    lock = _acquire(name, folder / LOCK)
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)
            lock.close()


def _acquire(name: str, path: Path) -> IO[str] | None:
    """The locked file; None in a folder that can't be written, where the dataset may be prepared already."""
    while True:
        try:
            lock = open(path, "a", encoding="utf-8")  # noqa: SIM115 - it stays open for the caller
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: waiting for another process that prepares it in {path.parent}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"{name}: {path}: this file system has no locks ({error.strerror}), so let only one process prepare it at a time",
                flush=True,
            )
            return lock
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()  # its holder has deleted this file since, so lock the new one
