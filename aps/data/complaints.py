"""What libraries in C (libjpeg, libtiff) print on standard error while they decode: `Corrupt JPEG data: ...`, without a name.

Such a file is damaged, but it can be decoded as far as it goes. When a dataset is prepared these lines are kept back, and the
files that they are about are named once; in decoding workers, which meet the same files every epoch, they are dropped.

Design: the lines come from below Python, so descriptor 2 itself is led elsewhere, and Python's own standard error around it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator

from torch.utils.data import get_worker_info

STANDARD_ERROR = 2


class Complaints:
    """While it is open, what is written to descriptor 2 is kept; Python's `sys.stderr` goes where it went.

    Threads share a descriptor, so `size`, compared before and after a file, only tells which may be meant; one file at a
    time tells which is.
    """

    def __enter__(self) -> Complaints:
        self._kept = tempfile.TemporaryFile()
        self._python = sys.stderr
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._python.flush()
        self._before = os.dup(STANDARD_ERROR)
        if _number(self._python) == STANDARD_ERROR:
            sys.stderr = os.fdopen(os.dup(self._before), "w", buffering=1, errors="backslashreplace")
        os.dup2(self._kept.fileno(), STANDARD_ERROR)
        return self

    def __exit__(self, *error: object) -> None:
        os.dup2(self._before, STANDARD_ERROR)
        os.close(self._before)
        if sys.stderr is not self._python:
            own, sys.stderr = sys.stderr, self._python
            own.close()
        self._kept.close()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._kept.fileno()).st_size

    def since(self, size: int) -> str:
        """The first line written after the first `size` bytes, "" where there is none."""
        return next(iter(os.pread(self._kept.fileno(), 1000, size).decode(errors="replace").splitlines()), "")


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """Drops such lines in a decoding worker, where no other thread writes; elsewhere it changes nothing."""
    if get_worker_info() is None:
        yield
        return
    before, nothing = os.dup(STANDARD_ERROR), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, STANDARD_ERROR)
    try:
        yield
    finally:
        os.dup2(before, STANDARD_ERROR)
        os.close(before)
        os.close(nothing)


def _number(stream: object) -> int | None:
    try:
        return stream.fileno()  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, OSError, ValueError, io.UnsupportedOperation):
        return None
