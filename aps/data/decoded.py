"""What decoding images of a tree found, chunk by chunk, and the record of it by which a stopped preparation goes on.

Each chunk that is done is a line of the record, in the dataset's folder, until the dataset is prepared. A line counts only
for the same images: its key covers their names and the sizes and times of all files of the tree. Sums are added up chunk by
chunk in any case, so the result is the same to the last bit, whichever chunks were decoded before.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from aps import __version__
from aps.data.manifest import DECODED, Fingerprint, content_digest
from aps.data.statistics import Accumulator
from aps.errors import UserError
from aps.files import append

CHUNK = 64  # images


class Decoded(NamedTuple):
    """What decoding some images found."""

    sha256: list[str]  # of the files as they were found
    image_sizes: list[tuple[int, int]]  # height, width, after shrinking
    sums: Accumulator
    broken: list[UserError]
    suspects: list[str]  # images about which a C library may have printed a warning
    copied: list[int]  # bytes of the copies; none where there are none
    greatest: list[int]  # value of each image of 16 bits

    @classmethod
    def nothing(cls) -> Decoded:
        return cls([], [], Accumulator(), [], [], [], [])

    def add(self, other: Decoded) -> None:
        self.sums.merge(other.sums)
        self.sha256.extend(other.sha256)
        self.image_sizes.extend(other.image_sizes)
        self.broken.extend(other.broken)
        self.suspects.extend(other.suspects)
        self.copied.extend(other.copied)
        self.greatest.extend(other.greatest)


class Record:
    """The chunks of one split that were decoded before, and a line for each that is decoded now."""

    def __init__(
        self, folder: Path, fingerprint: Fingerprint, split: str, names: list[str], shrink: int | None
    ) -> None:
        self._file, self._lock = folder / DECODED, threading.Lock()
        self._key = content_digest(fingerprint.digest, __version__, split, names, shrink)
        self._known = dict(filter(None, map(self._read, self._lines())))
        if count := sum(len(chunk.sha256) for chunk in self._known.values()):
            print(
                f"decode {split}: goes on from {count:,} of {len(names):,} images, decoded before it was stopped",
                flush=True,
            )

    def _lines(self) -> list[bytes]:
        return self._file.read_bytes().splitlines() if self._file.exists() else []

    def _read(self, line: bytes) -> tuple[int, Decoded] | None:
        """Number and content of a chunk; None for a line of other images, and for one that a kill cut off."""
        try:
            key, number, sha256, sizes, (images, first, second), suspects, copied, greatest = json.loads(line)
        except (ValueError, TypeError):
            return None
        if key != self._key:
            return None
        sums = Accumulator()
        sums.images, sums.first, sums.second = images, *(torch.tensor(x, dtype=torch.float64) for x in (first, second))
        return number, Decoded(sha256, [(h, w) for h, w in sizes], sums, [], suspects, copied, greatest)

    def known(self, number: int, names: list[str], copies: Path | None) -> Decoded | None:
        """What was found in a chunk; None where it was not decoded, or its copies are not whole, as after a power cut."""
        chunk = self._known.get(number)
        if chunk is not None and copies is not None and chunk.copied != [_size(copies / name) for name in names]:
            return None
        return chunk

    def write(self, number: int, chunk: Decoded) -> None:
        """Raises UserError where the file can't be written."""
        sums = [chunk.sums.images, chunk.sums.first.tolist(), chunk.sums.second.tolist()]  # JSON keeps every bit
        line = [self._key, number, chunk.sha256, chunk.image_sizes, sums, chunk.suspects, chunk.copied, chunk.greatest]
        with self._lock:  # the line break comes first, so that a line that was cut off spoils no other
            append(self._file, f"\n{json.dumps(line)}")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
