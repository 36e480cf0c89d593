"""Where the encoder of a finished stage lies now: results are moved, and trainings are repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from aps.files import sha256


def find_encoder(folder: Path, metrics: dict[str, Any]) -> Path | None:
    """The file a stage's encoder came from: beside it, at the noted path, or at that path's like in the moved results."""
    noted = metrics["encoder"]["source"]
    if noted == "random" or noted.startswith("timm:"):
        return None
    wanted = metrics["encoder"]["sha256"]
    return next((file for file in _candidates(folder, noted) if file.is_file() and sha256(file) == wanted), None)


def _candidates(folder: Path, noted: str) -> Iterator[Path]:
    yield folder / PurePosixPath(noted).name
    yield Path(noted)
    parts = PurePosixPath(noted).parts
    for above in folder.resolve().parents:
        for cut in range(1, len(parts)):
            yield above.joinpath(*parts[cut:])
