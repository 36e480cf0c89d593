"""Prepare a dataset by name: get, verify, describe. The manifest is written last and atomically.

Design: a copy of the manifest, `prepared.json`, stays beside it. Snakemake deletes a rule's outputs before it reruns
the rule; with the copy, a rerun is a quick verification and not a second download or a second look at every image.
It deliberately does not know any dataset; they are found through `aps.registry`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from aps.data.fetch import DOWNLOADS
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.files import DISK_ERRORS
from aps.registry import DATASETS, DETECTION_DATASETS
from aps.settings.blocks import SourceSettings

COPY = "prepared.json"


def prepare(name: str, folder: Path, source: SourceSettings) -> Manifest:
    """Make `folder`/manifest.json true; safe to kill and to call again.

    Args:
        name: a dataset of `aps.registry`.
        folder: the dataset's own folder, results/data/NAME.
        source: where it comes from; `path` None means download (or no source needed).

    Raises:
        UserError: no such dataset, its source is missing, broken or incomplete, or the disk refuses.
    """
    registry = DATASETS if name in DATASETS else DETECTION_DATASETS
    if name not in registry:
        known = sorted([*DATASETS.names(), *DETECTION_DATASETS.names()])
        raise UserError(f"dataset '{name}' is unknown; known: {', '.join(known)}")
    try:
        manifest = _prepared(name, folder, source)
        if manifest is None:
            folder.mkdir(parents=True, exist_ok=True)
            manifest = registry.load(name)(folder, source, name)
            manifest.write(folder / COPY)
            manifest.write(folder / "manifest.json")
            shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)
            print(f"{name}: prepared: {summary(manifest)}", flush=True)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = error.filename or folder
        raise UserError(
            f"dataset '{name}': {where}: {error.strerror}; free the disk or make it accessible, then run again "
            "(what is done is kept)"
        ) from error
    return manifest


def _prepared(name: str, folder: Path, source: SourceSettings) -> Manifest | None:
    """The manifest of an earlier preparation that still holds."""
    path = folder / "manifest.json"
    known = path if path.exists() else folder / COPY
    if not known.exists():
        return None
    manifest = Manifest.read(known)
    moved = source.path is not None and source.path != manifest.source
    problem = f"its source is now {source.path}" if moved else manifest.problem(folder)
    if problem is not None:
        print(f"{name}: prepared before, but {problem}; preparing it again", flush=True)
        return None
    if known != path:
        manifest.write(path)
    print(f"{name}: already prepared and verified: {summary(manifest)}", flush=True)
    return manifest


def summary(manifest: Manifest) -> str:
    counts = ", ".join(f"{split.count:,} {name}" for name, split in manifest.splits.items())
    return f"{counts} images of {len(manifest.classes):,} classes, digest {manifest.digest[:12]}"
