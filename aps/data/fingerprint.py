"""Have the files that a dataset was prepared from changed since? Answered from names, sizes and times, without opening one.

The manifest holds a digest over all of them, which a walk through the folders computes again; `files.tsv` beside it has
a line a file, so that a difference can be told in numbers.

Peculiar: contents are not read, so a file that is replaced by another of the same size and time is not noticed (a digest
over contents is taken when a dataset is prepared). It imports nothing heavy: planning asks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from aps.data.manifest import Fingerprint, Manifest
from aps.data.walk import File, Walk, printable, walk
from aps.files import write_bytes
from aps.settings.blocks import OwnDataset, SourceSettings

RECORD = "files.tsv"  # a line a file: number of its root, slash, name below it, tab, bytes, tab, time of change in ns


def take(folder: Path, walks: Sequence[Walk], files: Iterable[Path] = ()) -> Fingerprint:
    """The fingerprint of folders as they were just found, and of single files; writes the record into `folder`.

    Args:
        folder: the dataset's own, beside its manifest.
    """
    seen = [(_place(found.root, folder), found.files) for found in walks]
    seen += [(_place(path, folder), _single(path)) for path in files]
    lines = [_lines(number, found) for number, (_, found) in enumerate(seen)]
    write_bytes(folder / RECORD, "".join(lines).encode("utf-8", errors="surrogateescape"))
    return Fingerprint(
        roots=tuple(place for place, _ in seen),
        count=sum(len(found) for _, found in seen),
        digest=_digest(lines),
    )


def outdated(path: Path, source: SourceSettings | OwnDataset) -> str | None:
    """Why a prepared dataset has to be prepared again, in a sentence's part; None where nothing speaks for it.

    Args:
        path: its manifest.json.
        source: where the study says it comes from.

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
        folder: the manifest's.
        trust: don't look (a tree too large, or a file system too slow, to be walked through each time).
    """
    known = manifest.fingerprint
    if known is None or trust:
        return None
    found = [_look(folder / place) for place in known.roots]
    if _digest([_lines(number, files) for number, files in enumerate(found)]) == known.digest:
        return None
    before = _recorded(folder / RECORD, len(known.roots))
    parts = []
    for place, then, now in zip(known.roots, before, found, strict=True):
        root = (folder / place).resolve()
        if not root.exists():
            parts.append(f"{_shown(root)} is gone")
        elif not root.is_dir():
            parts += [f"file {_shown(root)}: changed"] if then != _marks(now) else []
        elif difference := _difference(then, _marks(now)):
            parts.append(f"folder {_shown(root)}: {difference}")
    return "; ".join(parts) or "the files it was prepared from changed"


# --------------------------------------------------------------------------------------------------


def _place(path: Path, folder: Path) -> str:
    """As a manifest has it: relative to its folder where it lies in there, else absolute."""
    resolved, own = path.resolve(), folder.resolve()
    return str(resolved.relative_to(own) if resolved.is_relative_to(own) else resolved)


def _single(path: Path) -> list[File]:
    stat = path.stat()
    return [File("", stat.st_size, stat.st_mtime_ns)]


def _look(root: Path) -> list[File]:
    if root.is_dir():
        return walk(root).files
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
    """Each root's files as they were; None where the record is lost."""
    found: list[Marks] = [{} for _ in range(roots)]
    try:
        for line in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
            place, size, mtime = line.split("\t")
            number, _, name = place.partition("/")
            found[int(number)][name] = (int(size), int(mtime))
    except (OSError, ValueError, IndexError):
        return [None] * roots
    return list(found)


def _difference(then: Marks | None, now: Marks) -> str | None:
    """`3 images new, 1 gone`; None where there is none."""
    if then is None:
        return "changed"
    counts = {
        "new": len(now.keys() - then.keys()),
        "gone": len(then.keys() - now.keys()),
        "changed": sum(now[name] != mark for name, mark in then.items() if name in now),
    }
    told = [f"{count:,} {word}" for word, count in counts.items() if count]
    if not told:
        return None
    count, word = told[0].split()
    return ", ".join([f"{count} {'image' if count == '1' else 'images'} {word}", *told[1:]])


def _shown(path: Path) -> str:
    """Relative to the working directory where it lies in there."""
    here = Path(os.getcwd())
    return printable(path.relative_to(here) if path.is_relative_to(here) else path)
