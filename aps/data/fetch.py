"""Getting a publisher's files: downloads that resume, checksums, archives read without trusting them.

Design: `extractall` is never called. Members are listed first; one that points outside its folder is refused before
anything is written; each file is written under a name that we choose. This file does not know datasets.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar, cast

from tqdm import tqdm

from aps.errors import UserError
from aps.files import expanded, write_bytes
from aps.runtime.cores import granted
from aps.settings.blocks import SourceSettings

VERIFIED = "verified.json"  # in a dataset's folder: archives whose checksums were right
DOWNLOADS = "download"  # a dataset's subfolder, removed once it is prepared
ATTEMPTS = 5
RETRY_SECONDS = 2.0  # doubled at each attempt
CHUNK = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


class Published(NamedTuple):
    """A file that a publisher offers, with its checksums."""

    name: str
    url: str | None  # None: a login is needed
    md5: str
    sha256: str | None = None


# --------------------------------------------------------------------------------------------------
# Sources


def source_path(name: str, source: SourceSettings, advice: str) -> Path | None:
    """The file or folder in `sources.NAME.path`, or None to download.

    Raises:
        UserError: it does not exist, or there is no path and downloads are off.
    """
    if source.path is not None:
        path = expanded(source.path, f"sources.{name}.path")
        if not path.exists():
            raise UserError(f"sources.{name}.path: {path} does not exist; {advice}")
        return path
    if not source.download:
        raise UserError(
            f"dataset '{name}': sources.{name}.download is false and sources.{name}.path is not set; {advice}"
        )
    return None


def obtain(name: str, file: Published, path: Path | None, folder: Path) -> Path | None:
    """The verified archive: `path` itself, a file in the folder `path`, or downloaded where `path` is None.

    None where the folder `path` has no such archive.

    Raises:
        UserError: the archive can't be downloaded, or its checksum is wrong.
    """
    if path is None:
        if file.url is None:
            raise UserError(f"dataset '{name}': {file.name} can't be downloaded; set sources.{name}.path to its folder")
        return download(file, folder / DOWNLOADS)
    archive = path if path.is_file() else path / file.name
    if not archive.is_file():
        return None
    verify(archive, file, folder)
    return archive


def verify(archive: Path, file: Published, folder: Path) -> None:
    """Check the published checksum once: `folder` records the size and modification time of verified archives.

    Raises:
        UserError: the checksum is wrong.
    """
    note = folder / VERIFIED
    verified = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    stat = archive.stat()
    mark = [stat.st_size, stat.st_mtime_ns, file.md5]
    if verified.get(str(archive.resolve())) == mark:
        return
    found = _checksum(archive, "md5")
    if found != file.md5:
        raise UserError(
            f"{archive}: its md5 is {found}, but the publisher's {file.name} has {file.md5}; it is truncated or altered, "
            "get it again"
        )
    write_bytes(note, json.dumps(verified | {str(archive.resolve()): mark}, indent=1).encode())


def _checksum(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file, _bar(path.stat().st_size, f"verify {path.name}") as bar:
        while block := file.read(8 * CHUNK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _bar(total: int | None, description: str, start: int = 0) -> tqdm[Any]:
    return tqdm(total=total, initial=start, desc=description, unit="B", unit_scale=True, mininterval=1, delay=1)


# --------------------------------------------------------------------------------------------------
# Downloads


def download(file: Published, folder: Path) -> Path:
    """Download `file` into `folder`, continuing where an earlier attempt stopped.

    Raises:
        UserError: the server can't be reached, or the checksum of the download is wrong.
    """
    assert file.url is not None
    target = folder / file.name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.part"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(file.url, part)
            break
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if refused or attempt == ATTEMPTS:
                done = part.stat().st_size if part.exists() else 0
                raise UserError(
                    f"{file.url}: download failed after {done:,} bytes ({getattr(error, 'reason', error)}); run again to "
                    f"go on from there, or put {file.name} in a folder and name it in the dataset's sources path"
                ) from None
            time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
    for algorithm, expected in (("md5", file.md5), ("sha256", file.sha256)):
        if expected is not None and (found := _checksum(part, algorithm)) != expected:
            part.unlink()
            raise UserError(
                f"{file.url}: the download's {algorithm} is {found} instead of the published {expected}; it was "
                "discarded, run again"
            )
    os.replace(part, target)
    return target


def _transfer(url: str, part: Path) -> None:
    """Append to `part` the bytes it lacks. Raises ConnectionError where the server stopped early."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(
        url, headers={"User-Agent": "aps-vit"} | ({"Range": f"bytes={done}-"} if done else {})
    )
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing left to send: complete, or another file; the checksum tells
            return
        raise
    with response:
        if done and response.status != 206:  # the server can't resume
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with open(part, "ab" if done else "wb") as out, _bar(total, f"download {part.stem}", done) as bar:
            while block := response.read(CHUNK):
                out.write(block)
                bar.update(len(block))
                done += len(block)
    if total is not None and done < total:
        raise ConnectionError(f"the server closed after {done:,} of {total:,} bytes")


# --------------------------------------------------------------------------------------------------
# Archives


@contextmanager
def archive_errors(archive: Path) -> Iterator[None]:
    """Turn the exceptions of a truncated or altered archive into a UserError."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive}: truncated or damaged archive ({error}); get it again") from None


def safe_name(archive: Path, member: str) -> PurePosixPath:
    """A member's name as a path inside the archive's folder.

    Raises:
        UserError: it points outside (absolute, with .., a drive or a backslash).
    """
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member or "\0" in member or not path.parts:
        raise UserError(
            f"{archive}: member {member!r} points outside its folder; refused, get the publisher's own archive"
        )
    return path


def regular_members(archive: Path, tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Regular files of a tar. Raises UserError for a member that is a link or device, or points outside."""
    members = []
    for member in tar.getmembers():
        safe_name(archive, member.name)
        if member.isdir():
            continue
        if not member.isreg():
            raise UserError(f"{archive}: member {member.name!r} is a link or device, not a file; refused")
        members.append(member)
    return members


class Window:
    """Bytes [start, start + size) of a file as a read-only file: the tar of a class inside ImageNet's tar of tars."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        self.file.seek(self.start + self.position)
        block = self.file.read(left if size < 0 else min(size, left))
        self.position += len(block)
        return block

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position


def copy_file(source: IO[bytes], target: Path, size: int, archive: Path) -> None:
    """Write `size` bytes of an archive's member to `target`. Raises UserError where the archive ends too early."""
    with open(target, "wb") as out:
        left = size
        while left and (block := source.read(min(left, CHUNK))):
            out.write(block)
            left -= len(block)
    if left:
        raise UserError(f"{archive}: truncated archive: {target.name} lacks {left:,} of {size:,} bytes; get it again")


def parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item] | Iterable[Item],
    description: str,
    workers: int | None = None,
) -> list[Result]:
    """`function` of every item, in order, with a progress bar; the first error stops the rest.

    It uses threads, because reading, writing and decoding images release the interpreter's lock.
    """
    failed = threading.Event()

    def unless_failed(item: Item) -> Result | None:
        # An error reaches the loop below only in its turn; the items after it must not wait for that.
        if failed.is_set():
            return None
        try:
            return function(item)
        except BaseException:
            failed.set()
            raise

    items = list(items)
    pool = ThreadPoolExecutor(workers or granted())
    try:
        results = pool.map(unless_failed, items)
        return cast(list[Result], list(tqdm(results, total=len(items), desc=description, mininterval=1, delay=1)))
    finally:
        pool.shutdown(cancel_futures=True)
