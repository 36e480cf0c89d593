"""Finds out whether a dataset's source files changed since it was prepared, by their names, sizes and modification times.

The manifest holds one digest over all of them, which a walk through the folders computes again; `files.tsv` beside it
has one line a file, so that a message can count what changed.

Design: contents are not read, so a file that is replaced by another of the same size and time is not noticed (a digest
over contents is taken when a dataset is prepared). Nothing heavy is imported, because planning calls it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from aps.data.manifest import Fingerprint, Manifest
from aps.data.walk import File, Walk, printable, walk
from aps.files import write_bytes
from aps.settings.blocks import SourceSettings, UserDataset

RECORD = "files.tsv"  # a line a file: number of its root, slash, name below it, tab, bytes, tab, time of change in ns


def take(folder: Path, walks: Sequence[Walk], files: Iterable[Path] = ()) -> Fingerprint:
    """The fingerprint of walked folders and of single files; writes the record into `folder`.

    Args:
        folder: the dataset's folder, where its manifest is.
    """
    roots = [(_relative(tree.root, folder), tree.files) for tree in walks]
    roots += [(_relative(path, folder), _single(path)) for path in files]
    lines = [_lines(number, found) for number, (_, found) in enumerate(roots)]
    write_bytes(folder / RECORD, "".join(lines).encode("utf-8", errors="surrogateescape"))
    return Fingerprint(
        roots=tuple(root for root, _ in roots),
        count=sum(len(found) for _, found in roots),
        digest=_digest(lines),
    )


def outdated(path: Path, source: SourceSettings | UserDataset) -> str | None:
    """Why a prepared dataset has to be prepared again, as part of a sentence; None where it need not be.

    Args:
        path: its manifest.json.
        source: where the study says the dataset comes from.

    Raises:
        UserError: the manifest is broken or of another version.
    """
    manifest = Manifest.read(path)
    if source.identity is not None and source.identity != manifest.source:
        return f"its source is now {source.identity}"
    return changed(manifest, path.parent, source.trust)


def changed(manifest: Manifest, folder: Path, trust: bool = False) -> str | None:
    """What is new, gone or changed, as `folder photos: 3 images new, 1 gone`; None where nothing is.

    Args:
        folder: the folder of the manifest.
        trust: don't look, because the tree is too large or its file system too slow for a walk each time.
    """
    known = manifest.fingerprint
    if known is None or trust:
        return None
    found = [_files(folder / root, folder) for root in known.roots]
    if _digest([_lines(number, files) for number, files in enumerate(found)]) == known.digest:
        return None
    before = _recorded(folder / RECORD, len(known.roots))
    parts = []
    for name, then, now in zip(known.roots, before, found, strict=True):
        root = (folder / name).resolve()
        if not root.exists():
            parts.append(f"{_shown(root)} is gone")
        elif not root.is_dir():
            parts += [f"file {_shown(root)}: changed"] if then != _marks(now) else []
        elif difference := _difference(then, _marks(now)):
            parts.append(f"folder {_shown(root)}: {difference}")
    return "; ".join(parts) or "the files it was prepared from changed"


def is_there(manifest: Manifest, folder: Path) -> bool:
    """Whether the folders and files that a dataset was prepared from can be seen from here."""
    return all((folder / root).exists() for root in (manifest.fingerprint.roots if manifest.fingerprint else ()))


# --------------------------------------------------------------------------------------------------


def _relative(path: Path, folder: Path) -> str:
    """The path as a manifest names it: relative to its folder if it lies inside, else absolute."""
    resolved, base = path.resolve(), folder.resolve()
    return str(resolved.relative_to(base) if resolved.is_relative_to(base) else resolved)


def _single(path: Path) -> list[File]:
    stat = path.stat()
    return [File("", stat.st_size, stat.st_mtime_ns)]


def _files(root: Path, folder: Path) -> list[File]:
    """The images of a folder, or a single file; none where the root is gone."""
    if root.is_dir():
        return walk(root, folder).files
    return _single(root) if root.is_file() else []


def _lines(number: int, files: list[File]) -> str:
    return "".join([f"{number}/{name}\t{size}\t{mtime}\n" for name, size, mtime in files])


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in lines:
        digest.update(part.encode("utf-8", errors="surrogateescape"))
    return digest.hexdigest()


Marks = dict[str, tuple[int, int]]  # name: bytes, time


def _marks(files: list[File]) -> Marks:
    return {file.name: (file.size, file.mtime) for file in files}


def _recorded(path: Path, roots: int) -> list[Marks | None]:
    """The files of each root when the dataset was prepared; None where the record is lost."""
    found: list[Marks] = [{} for _ in range(roots)]
    try:
        for line in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
            entry, size, mtime = line.split("\t")
            number, _, name = entry.partition("/")
            found[int(number)][name] = (int(size), int(mtime))
    except (OSError, ValueError, IndexError):
        return [None] * roots
    return list(found)


def _difference(then: Marks | None, now: Marks) -> str | None:
    """`3 images new, 1 gone`; None where nothing differs."""
    if then is None:
        return "changed"
    counts = {
        "new": len(now.keys() - then.keys()),
        "gone": len(then.keys() - now.keys()),
        "changed": sum(now[name] != mark for name, mark in then.items() if name in now),
    }
    counted = [f"{count:,} {word}" for word, count in counts.items() if count]
    if not counted:
        return None
    count, word = counted[0].split()
    return ", ".join([f"{count} {'image' if count == '1' else 'images'} {word}", *counted[1:]])


def _shown(path: Path) -> str:
    """The path, relative to the working directory if it lies inside."""
    here = Path(os.getcwd())
    return printable(path.relative_to(here) if path.is_relative_to(here) else path)
