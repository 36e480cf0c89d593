"""history.jsonl, the journal of a stage: a line of JSON for each logged step, and the source of every curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_history(path: Path, skip: int = 0) -> list[dict[str, Any]]:
    """The lines after the first `skip`; none where there is no file. A last line cut off by a kill is left out."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text().splitlines()[skip:]:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
