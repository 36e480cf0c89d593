"""Writing and reading files: a kill at any moment leaves the old or the new content, never a part; digests of files."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from aps.errors import UserError

# Errors of the user's disk and folders, not of this code.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}")  # .NAME.PID-RANDOM


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    Raises:
        UserError: `path` is a folder, its folder can't be written or the disk is full.
    """
    check_is_no_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the user's umask gives
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        yield temporary
        with temporary.open("rb+") as file:
            if os.fstat(file.fileno()).st_mode != mode:  # some libraries put a private file in its place
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in {*DISK_ERRORS, None}:  # libraries in Rust and C++ leave the number out
            raise
        raise _unwritable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def safetensors_path(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for safetensors' `save_file`, which reports a full disk by an error of its own."""
    from safetensors import SafetensorError

    with atomic_path(path) as temporary:
        try:
            yield temporary
        except SafetensorError as error:
            raise _unwritable(path, error) from None


def check_is_no_folder(path: Path) -> None:
    """Raises UserError where a file can't be written at `path` because it names a folder."""
    try:
        folder = path.name in ("", "..") or path.is_dir()
    except OSError as error:
        raise _unwritable(path, error) from None
    if folder:
        raise UserError(f"{path}: cannot be written, because it is a folder; name a file")


def check_writable(path: Path) -> None:
    """Raises UserError where a file can't be written at `path`: a folder, or one in a place that is closed or a file."""
    check_is_no_folder(path)
    try:
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is a file")
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no permission in {above}")
    except OSError as error:
        raise _unwritable(path, error) from None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there. Raises UserError where that fails, for whatever reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); free space or choose another folder (`results` of a study)"
        ) from None


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot be written ({reason}); free space or choose another folder")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_unsynced(path: Path, content: bytes, folder: Path) -> None:
    """As `write_bytes` against a kill, but not against a power cut: for many files that can be written again.

    Args:
        folder: where the temporary file stands, which `sweep` finds after a kill.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (
        folder / f".new.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )  # not of `path`, whose name may be as long as names get
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def csv_rows(path: Path, header: list[str]) -> Iterator[Callable[[list[Any]], Any]]:
    """A function that writes a row of a CSV file, which appears when the block ends without an error.

    Raises:
        UserError: as `atomic_path`.
    """
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        write = csv.writer(file, lineterminator="\n").writerow
        write(header)
        yield write


def write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage that makes it") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; delete it and run the stage that makes it") from None


def append(path: Path, text: str) -> None:
    """Add text to the end of a file. If that fails, the file stays as it was.

    Raises:
        UserError: the file can't be written or the disk is full.
    """
    before = None
    try:
        with path.open("ab", buffering=0) as file:
            before, content = file.tell(), text.encode()
            while content:
                content = content[file.write(content) :]
    except OSError as error:
        if before is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
        raise _unwritable(path, error) from None


def sweep(folder: Path, seconds: float = 0.0) -> None:
    """Remove temporary files of `atomic_path` that killed writers left and that have not changed for `seconds`."""
    for file in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if TEMPORARY.fullmatch(file.name) and time.time() - file.stat().st_mtime >= seconds:
                file.unlink()


def remove(path: Path) -> None:
    """Delete a file, if there is one. Raises UserError if it can't be deleted, or its parent is no folder."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def expanded(path: str | Path, setting: str = "") -> Path:
    """The path with a home folder in place of its `~` or `~USER`.

    setting: what names the path, for the error message; empty where the path says enough.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0].removeprefix("~")
        reason = f"there is no user '{user}' on this machine" if user else "HOME is not set"
        where = f"{setting}: {path}" if setting else f"{path}"
        raise UserError(f"{where}: {reason}; write the path in full") from None


def check_weights(path: Path) -> None:
    """Raises UserError if a file of weights, which may be the user's, is missing, a folder or unreadable."""
    try:
        if path.is_dir():
            raise UserError(f"weights file {path} is a folder; give the path of a .safetensors file")
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist; give the path of a .safetensors file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"weights file {path} cannot be read ({reason}); give the path of a .safetensors file that you can read"
        ) from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits. A process reads the file again only if it has changed.

    Raises:
        UserError: the file can't be read.
    """
    try:
        state = path.stat()
        return _sha256(str(path.resolve()), state.st_ino, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage that makes it") from None


@lru_cache(maxsize=1024)
def _sha256(path: str, inode: int, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
