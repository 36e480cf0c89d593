"""Lists what is below a folder: images, files that are skipped, and problems.

One pass with `os.scandir` serves to list a dataset and to take its fingerprint. Links to files and folders are followed.

Design: a walk raises nothing. It collects all problems, so that one message can list them; `Walk.check` raises.
It imports nothing heavy, because planning walks too, and does not know classes or splits.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from aps.errors import UserError
from aps.layout import results_of

# Suffix of an image file -> Pillow's name of its format.
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".gif": "GIF",
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".pbm", ".pgm", ".ppm", ".pnm"), "PPM"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx"), "JPEG2000"),
    ".tga": "TGA",
    ".pcx": "PCX",
    ".qoi": "QOI",
}
# Files and folders that operating systems and tools create. Names that begin with a dot are hidden anyway.
HOUSEKEEPING = {
    "@eadir",
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "#recycle",
    "#snapshot",
    "icon\r",
}
LISTED = 3  # of each kind of problem, in a message

DANGLING = "a link that leads nowhere"
LOOP = "a link to a folder that holds it"
CLOSED = "a folder that can't be opened"
NOT_UTF8 = "a name that is not UTF-8"
TWO_FORMS = "a name that stands there in two Unicode forms"
BROKEN_NAME = "a name with a tab or line break"


class File(NamedTuple):
    name: str  # path under the root
    size: int  # bytes
    mtime: int  # nanoseconds

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1].lower()


@dataclass
class Walk:
    """What a walk found below a folder."""

    root: Path
    files: list[File] = field(default_factory=list)  # images, by suffix; sorted within each folder
    folders: list[str] = field(default_factory=list)  # paths under root, hidden ones left out
    passed: Counter[str] = field(default_factory=Counter)  # kind of file that was skipped -> how many
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind, path under root
    own: frozenset[tuple[int, int]] = frozenset()  # device and inode of folders to which this software writes

    def below(self, folder: str) -> list[File]:
        """The images below one of its folders, at any depth."""
        return [file for file in self.files if file.name.startswith(folder + "/")]

    def inside(self, folder: str = "") -> list[str]:
        """Sorted names of the folders directly inside one of its folders."""
        start = f"{folder}/" if folder else ""
        below = (name[len(start) :] for name in self.folders if name.startswith(start))
        return sorted(name for name in below if name and "/" not in name)

    def folders_inside(self, names: list[str], inside: str = "") -> dict[str, list[str]]:
        """`inside` of each of `names`, folders inside one of its folders, in one pass: there may be 20,000 classes."""
        start = f"{inside}/" if inside else ""
        found: dict[str, list[str]] = {name: [] for name in names}
        for folder in self.folders:
            if folder.startswith(start):
                parts = folder[len(start) :].split("/")
                if len(parts) == 2 and parts[0] in found:
                    found[parts[0]].append(parts[1])
        return {name: sorted(folders) for name, folders in found.items()}

    def check(self) -> None:
        """Raises UserError where there are problems; it lists every kind, with some names."""
        if not self.problems:
            return
        kinds: dict[str, list[str]] = {}
        for kind, name in self.problems:
            kinds.setdefault(kind, []).append(name)
        parts = []
        for kind, names in kinds.items():
            shown = ", ".join(printable(name) for name in names[:LISTED])
            parts.append(f"{kind}: {shown}" + (f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""))
        raise UserError(f"{printable(self.root)}: holds {'; '.join(parts)}; rename, mend or remove these")


HIDDEN_FILE, HIDDEN_FOLDER, NO_SUFFIX, SPECIAL = "hidden file", "hidden folder", "without suffix", "pipe or device"
RESULTS = "results folder"
PLURAL = (HIDDEN_FILE, HIDDEN_FOLDER, SPECIAL, RESULTS)


def walk(root: Path, folder: Path | None = None) -> Walk:
    """Everything below an existing folder.

    Args:
        folder: the prepared dataset's folder. It and the results folder in which it lies are passed over, by whatever
            links they are reached: a dataset must not grow by what is made of it.
    """
    own = set()
    for path in {folder, results_of(folder)} if folder is not None else ():
        with suppress(OSError):
            stat = os.stat(path)
            own.add((stat.st_dev, stat.st_ino))
    found = Walk(Path(root), own=frozenset(own))
    _enter(found, str(root), "", ())
    return found


def check_source(path: Path, folder: Path, key: str) -> None:
    """Raises UserError where `path`, which the setting `key` names, is a folder to which this software writes.

    Args:
        folder: the prepared dataset's folder.
    """
    results = results_of(folder)
    own = {folder, folder.parent, results} if results != folder else {folder}
    if path.resolve() in {folder.resolve() for folder in own}:
        raise UserError(
            f"{key}: {printable(path)} is where results and prepared data are kept; name your images' folder"
        )


def counted(kinds: Counter[str]) -> str:
    """`40 .heic, 3 .npy, 2 hidden folders`, most frequent first."""
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {kind}{'s' * (count > 1 and kind in PLURAL)}" for kind, count in ordered)


def printable(path: Path | str) -> str:
    """A path for messages: control characters and bytes that are not UTF-8 are escaped."""
    text = str(path).encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --------------------------------------------------------------------------------------------------


def _enter(found: Walk, path: str, inside: str, above: tuple[tuple[int, int], ...]) -> None:
    """Walk the folder `path`.

    Args:
        inside: `path` under the root, "" or ending in a slash.
        above: device and inode of the folders that hold it.
    """
    try:
        stat = os.stat(path)
        if inside and (stat.st_dev, stat.st_ino) in found.own:
            found.passed[RESULTS] += 1
            return
        with os.scandir(path) as entries:
            here = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        found.problems.append((CLOSED, inside.rstrip("/") or "."))
        return
    if inside:
        found.folders.append(inside.rstrip("/"))
    above = (*above, (stat.st_dev, stat.st_ino))
    seen: dict[str, str] = {}
    images, results = len(found.files), found.passed[RESULTS]
    for entry in here:
        name = entry.name
        if name.startswith(".") or name.lower() in HOUSEKEEPING:
            found.passed[HIDDEN_FOLDER if is_folder(entry) else HIDDEN_FILE] += 1
            continue
        if not (name.isascii() and name.isprintable()) and (problem := _problem(name, seen)):
            found.problems.append((problem, inside + name))
            continue
        if is_folder(entry):
            if entry.is_symlink() and _identity(entry) in above:
                found.problems.append((LOOP, inside + name))
                continue
            _enter(found, f"{path}/{name}", f"{inside}{name}/", above)
            continue
        dot = name.rfind(".")
        suffix = name[dot:].lower() if dot > 0 else ""
        try:
            stat = entry.stat()
        except OSError:
            found.problems.append((DANGLING, inside + name))
            continue
        if not entry.is_file():
            found.passed[SPECIAL] += 1
        elif suffix in SUFFIXES:
            found.files.append(File(inside + name, stat.st_size, stat.st_mtime_ns))
        else:
            found.passed[suffix or NO_SUFFIX] += 1
    only_results = found.passed[RESULTS] > results and len(found.files) == images
    if inside and only_results and found.folders[-1] == inside.rstrip("/"):
        found.folders.pop()  # it holds nothing but the results folder, so it is no class either


def _problem(name: str, seen: dict[str, str]) -> str | None:
    """What is wrong with a file's name, if anything; `seen` maps composed (NFC) forms to the folder's earlier names."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return NOT_UTF8
    if "\t" in name or "\n" in name or "\r" in name:
        return BROKEN_NAME
    composed = unicodedata.normalize("NFC", name)
    if composed in seen:
        return TWO_FORMS
    seen[composed] = name
    return None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """False, too, for a link to itself and for one into a folder that is closed: reading it says what is wrong."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(entry: os.DirEntry[str]) -> tuple[int, int]:
    stat = entry.stat()
    return stat.st_dev, stat.st_ino
