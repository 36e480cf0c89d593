"""Prepare a dataset by name: get, verify, describe. The manifest is written last and atomically.

Design: a copy of the manifest, `prepared.json`, stays beside it. Snakemake deletes a rule's outputs before it reruns
the rule; with the copy, a rerun is a quick verification and not a second download or a second look at every image.
It deliberately does not know any dataset; they are found through `aps.registry`.
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
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.files import DISK_ERRORS
from aps.layout import data_folder
from aps.registry import DATASETS, DETECTION_DATASETS, resolve
from aps.settings.blocks import OwnDataset, SourceSettings

COPY = "prepared.json"
LOCK = ".lock"


def prepare(name: str, folder: Path, source: SourceSettings | OwnDataset, force: bool = False) -> Manifest:
    """Make `folder`/manifest.json true; safe to kill and to call again, and for several processes at once: one works,
    the others wait for it.

    Args:
        name: a dataset of `aps.registry`; any, where `source` is the user's own.
        folder: the dataset's own folder, results/data/NAME; of people's own data results/data/NAME-KEY, to which NAME then
            becomes a link, unless it is something else.
        source: where it comes from; `path` None means download (or no source needed).
        force: delete what was prepared before and do it again; downloads that are under way go on.

    Raises:
        UserError: no such dataset, its source is missing, broken or incomplete, or the disk refuses.
    """
    if isinstance(source, SourceSettings) and name not in DATASETS and name not in DETECTION_DATASETS:
        known = sorted([*DATASETS.names(), *DETECTION_DATASETS.names()])
        raise UserError(
            f"dataset '{name}' is unknown; known: {', '.join(known)}; one of your own is named in a study's `datasets` "
            "(--configfile)"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(name, folder):
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
        _name(folder, name)
    for note in manifest.notes:
        print(f"{name}: {note}", flush=True)
    return manifest


def summary(manifest: Manifest) -> str:
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    labels = f"of {len(manifest.classes):,} classes" if manifest.classes else "without labels"
    return f"{counts} images {labels}, digest {manifest.digest[:12]}"


# --------------------------------------------------------------------------------------------------


def _prepare(name: str, folder: Path, source: SourceSettings | OwnDataset) -> Manifest:
    if isinstance(source, OwnDataset):
        manifest: Manifest = resolve("aps.data.own:prepare")(folder, source, name)
    else:
        registry = DATASETS if name in DATASETS else DETECTION_DATASETS
        manifest = registry.load(name)(folder, source, name)
    if constant := manifest.constant_channels:
        note = f"{' and '.join(constant)}: the same in every pixel of train, so normalized by 1 instead of a deviation of 0"
        manifest = manifest.model_copy(update={"notes": (*manifest.notes, note)})
    manifest.write(folder / COPY)
    manifest.write(folder / "manifest.json")
    shutil.rmtree(folder / fetch.DOWNLOADS, ignore_errors=True)
    print(f"{name}: prepared: {summary(manifest)}", flush=True)
    return manifest


def _name(folder: Path, name: str) -> None:
    """A link beside the folder by the dataset's plain name, for people; nothing here follows it."""
    link = folder.with_name(name)
    with suppress(OSError):  # no links here
        if link.is_symlink() or not link.exists():
            new = folder.with_name(f".{folder.name}.link")
            new.unlink(missing_ok=True)
            new.symlink_to(folder.name)
            new.replace(link)


def _prepared(name: str, folder: Path, source: SourceSettings | OwnDataset) -> Manifest | None:
    """The manifest of an earlier preparation that still holds."""
    path = folder / "manifest.json"
    known = path if path.exists() else folder / COPY
    if not known.exists():
        return None
    try:
        manifest = Manifest.read(known)
    except UserError as error:
        print(f"{name}: {error}; preparing it again", flush=True)
        return None
    problem = outdated(known, source) or manifest.problem(folder)
    if problem is not None:
        print(f"{name}: prepared before, but {problem}; preparing it again", flush=True)
        return None
    if known != path:
        manifest.write(path)
    print(f"{name}: already prepared and verified: {summary(manifest)}", flush=True)
    return manifest


def _forget(folder: Path) -> None:
    """Delete what was prepared: the manifest, and what of the files and folders it names lies in here."""
    own = {COPY, "manifest.json", fetch.VERIFIED}
    for known in (folder / COPY, folder / "manifest.json"):
        with suppress(UserError):
            manifest = Manifest.read(known)
            named = [*manifest.sizes, *(split.images or "" for split in manifest.splits.values())]
            own |= {Path(name).parts[0] for name in named if name and not Path(name).is_absolute()}
    for path in (folder / name for name in own - {"..", "."}):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _alone(name: str, folder: Path) -> Iterator[None]:
    """Holds the dataset's folder against other processes, waiting for one that has it."""
    lock = _hold(name, folder / LOCK)
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)
            lock.close()


def _hold(name: str, path: Path) -> IO[str] | None:
    """The locked file; None in a folder that can't be written, where a dataset can still be found prepared."""
    while True:
        try:
            lock = open(path, "a")  # noqa: SIM115 - it stays open for the caller
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
        lock.close()  # of a file that its holder took away when it was done
