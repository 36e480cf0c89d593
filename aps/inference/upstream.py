"""Finds the encoder of a finished stage, also after results were moved; a repeated training does not count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from aps.files import sha256


def find_encoder(folder: Path, metrics: dict[str, Any]) -> Path | None:
    """The file of a stage's encoder, with the recorded checksum; None where it is not found.

    It is searched beside the stage's results, at the recorded path, and at the end of that path under each parent folder.
    """
    recorded = metrics["encoder"]["source"]
    if recorded == "random" or recorded.startswith("timm:"):
        return None
    wanted = metrics["encoder"]["sha256"]
    return next((file for file in _candidates(folder, recorded) if file.is_file() and sha256(file) == wanted), None)


def _candidates(folder: Path, recorded: str) -> Iterator[Path]:
    yield folder / PurePosixPath(recorded).name
    yield Path(recorded)
    parts = PurePosixPath(recorded).parts
    for above in folder.resolve().parents:
        for cut in range(1, len(parts)):
            yield above.joinpath(*parts[cut:])
