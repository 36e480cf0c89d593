"""Catches what C libraries (libjpeg, libtiff) print on standard error while they decode, such as `Corrupt JPEG data: ...`.

Such a line names no file. The file is damaged, but its readable part can be decoded. While a dataset is prepared these
lines are captured, and the files that caused them are named once. Decoding workers read the same files every epoch, so
there the lines are dropped.

Design: the lines do not pass through Python, so file descriptor 2 is redirected; `sys.stderr` goes on as before.
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
    """While it is open, what is written to descriptor 2 is captured; Python's `sys.stderr` is not.

    Threads share the descriptor: where `size` differs before and after a file, that file or one of another thread is
    damaged. Decoding one file at a time tells which.
    """

    def __enter__(self) -> Complaints:
        self._captured = tempfile.TemporaryFile()
        self._python = sys.stderr
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._python.flush()
        self._before = os.dup(STANDARD_ERROR)
        if _number(self._python) == STANDARD_ERROR:
            sys.stderr = os.fdopen(os.dup(self._before), "w", buffering=1, errors="backslashreplace")
        os.dup2(self._captured.fileno(), STANDARD_ERROR)
        return self

    def __exit__(self, *error: object) -> None:
        os.dup2(self._before, STANDARD_ERROR)
        os.close(self._before)
        if sys.stderr is not self._python:
            copy, sys.stderr = sys.stderr, self._python
            copy.close()
        self._captured.close()

    @property
    def size(self) -> int:
        """Bytes captured so far."""
        return os.fstat(self._captured.fileno()).st_size

    def since(self, size: int) -> str:
        """The first line captured after the first `size` bytes; "" where there is none."""
        return next(iter(os.pread(self._captured.fileno(), 1000, size).decode(errors="replace").splitlines()), "")


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """Drop these lines in a decoding worker, where no other thread writes; elsewhere do nothing."""
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
