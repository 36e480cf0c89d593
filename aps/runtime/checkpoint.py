"""Writes and reads checkpoints: atomic, with checksums, the last two kept, loaded without unpickling code.

The folder belongs to one stage with one settings digest; Snakemake does not know it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aps.files import atomic_path, sha256, write_json

KEPT = 2  # the newest may be lost if the machine fails while it is written


class Checkpoints:
    """`state-{step}.pt` files in a folder, each with its SHA-256 beside it.

    Args:
        folder: `StageJob.checkpoints`.
        minutes: between two checkpoints.
        writes: false on all ranks but the first.
    """

    def __init__(self, folder: Path, minutes: float = 10.0, writes: bool = True) -> None:
        self.folder, self.minutes, self.writes = folder, minutes, writes
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another checkpoint; never on ranks other than 0."""
        return self.writes and time.monotonic() - self._last >= 60 * self.minutes

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint. Raises UserError where the disk is full or read-only; earlier checkpoints stay."""
        self._last = time.monotonic()
        if not self.writes:
            return
        file = self.folder / f"state-{step:09d}.pt"
        with atomic_path(file) as temporary:
            _write({"step": step, **state}, temporary)
            # The seal comes first, so that every state on disk has one: torch.load does not verify what it reads.
            write_json(_seal(file), {"sha256": sha256(temporary)})
        for old in self._files()[:-KEPT]:
            remove(old)

    def load(self, same_as_first: Callable[[Any], Any] = lambda value: value) -> dict[str, Any] | None:
        """The newest undamaged state, on the CPU; None where there is none. Damaged files are skipped with a warning.

        same_as_first: returns the first process's argument on every process. The first one chooses, so that all go on from
            one state: what only another one can't read ends the run.

        Raises:
            OSError: the disk does not answer, or another process sees another file than the first one. Trying again may help.
        """
        name, digest = same_as_first(self._newest() if self.writes else None) or (None, None)
        if name is None:
            return None
        file = self.folder / name
        if not self.writes and _digest(file) != digest:
            raise OSError(errno.ESTALE, "not the state that the first process goes on from", str(file))
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state

    def _newest(self) -> tuple[str, str] | None:
        """Name and SHA-256 of the newest undamaged state."""
        for file in reversed(self._files()):
            try:
                digest = json.loads(_seal(file).read_text(encoding="utf-8"))["sha256"]
                if digest == _digest(file):
                    return file.name, digest
                problem = "its content is not what was written"
            except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                problem = f"its seal: {error}"
            print(f"{file}: unreadable checkpoint ({problem}); going back to the one before", file=sys.stderr)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"))


def _write(state: dict[str, Any], path: Path) -> None:
    """Raises OSError where the disk is full, because torch raises a RuntimeError that does not say so."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "file write")):
            raise
        raise OSError(errno.ENOSPC, "the disk is full, or the size of files limited") from None


def _digest(file: Path) -> str:
    """Its SHA-256. Raises OSError, which names the file, unlike that of a read that fails."""
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def _seal(file: Path) -> Path:
    return file.with_suffix(".json")


def remove(file: Path) -> None:
    """Delete a state and its seal."""
    for part in (file, _seal(file)):
        part.unlink(missing_ok=True)
