"""Prepare a dataset by name: get, verify, describe. The manifest is written last and atomically.

It deliberately does not know any dataset; their modules are found through REGISTRY.
"""

from __future__ import annotations

import errno
import importlib
from pathlib import Path

from aps.config import SourceSettings
from aps.data import REGISTRY
from aps.data.manifest import Manifest
from aps.errors import UserError

# What the user's disk can do to us, as opposed to our own bugs.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EFBIG,
}


def prepare(name: str, folder: Path, source: SourceSettings) -> Manifest:
    """Make `folder`/manifest.json true; safe to kill and to call again.

    Args:
        name: a row of REGISTRY.
        folder: the dataset's own folder, results/data/NAME.
        source: where it comes from; `path` None means download (or no source needed).

    Raises:
        UserError: no such dataset, its source is missing, broken or incomplete, or the disk refuses.
    """
    if name not in REGISTRY:
        raise UserError(f"dataset '{name}' is unknown; known: {', '.join(sorted(REGISTRY))}")
    path = folder / "manifest.json"
    if path.exists():
        manifest = Manifest.read(path)
        moved = source.path is not None and source.path != manifest.source
        problem = f"its source is now {source.path}" if moved else manifest.problem(folder)
        if problem is None:
            print(f"{name}: already prepared and verified: {summary(manifest)}", flush=True)
            return manifest
        print(f"{name}: prepared before, but {problem}; preparing it again", flush=True)
    module = importlib.import_module(f"aps.data.{REGISTRY[name].module}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        manifest = module.prepare(folder, source, name)
        manifest.write(path)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or folder
        raise UserError(
            f"dataset '{name}': {where}: {error.strerror}; free the disk or make it accessible, then run again "
            "(what is done is kept)"
        ) from error
    print(f"{name}: prepared: {summary(manifest)}", flush=True)
    return manifest


def summary(manifest: Manifest) -> str:
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    return f"{counts} images of {len(manifest.classes):,} classes, digest {manifest.digest[:12]}"
