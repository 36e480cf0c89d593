"""Resumable state on disk: written atomically, the last two kept, read back without unpickling code.

The folder belongs to one stage with one settings digest; Snakemake does not know it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from aps.files import atomic_path

KEPT = 2  # a machine that dies while writing may lose the newest


class Checkpoints:
    """`state-{step}.pt` files in a folder.

    Args:
        folder: `StageJob.checkpoints`.
        minutes: how often `due` says yes.
        writes: false on all ranks but the first.
    """

    def __init__(self, folder: Path, minutes: float = 10.0, writes: bool = True) -> None:
        self.folder, self.minutes, self.writes = folder, minutes, writes
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether rank 0's last checkpoint is old enough for another; other ranks never save."""
        return self.writes and time.monotonic() - self._last >= 60 * self.minutes

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Raises UserError where the disk is full or read-only; earlier checkpoints stay."""
        self._last = time.monotonic()
        if not self.writes:
            return
        with atomic_path(self.folder / f"state-{step:09d}.pt") as temporary:
            torch.save({"step": step, **state}, temporary)
        for old in self._files()[:-KEPT]:
            old.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The newest readable state on the CPU, or None; a damaged file is passed over with a warning."""
        for file in reversed(self._files()):
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                print(f"{file}: unreadable checkpoint ({error}); going back to the one before", file=sys.stderr)
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"))
