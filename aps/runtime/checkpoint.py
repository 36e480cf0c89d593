"""Writes and reads checkpoints: atomic, with checksums, the last two kept, loaded without unpickling code.

The folder belongs to one stage with one settings digest; Snakemake does not know it.
"""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path
from typing import Any

import torch

from aps.files import atomic_path, read_json, sha256, write_json

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

    def load(self) -> dict[str, Any] | None:
        """The newest readable state, on the CPU; None where there is none. Damaged files are skipped with a warning."""
        for file in reversed(self._files()):
            try:
                if read_json(_seal(file))["sha256"] != sha256(file):
                    raise ValueError("its content is not what was written")
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                return state
            except Exception as error:
                print(f"{file}: unreadable checkpoint ({error}); going back to the one before", file=sys.stderr)
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


def _seal(file: Path) -> Path:
    return file.with_suffix(".json")


def remove(file: Path) -> None:
    """Delete a state and its seal."""
    for part in (file, _seal(file)):
        part.unlink(missing_ok=True)
