"""Reads history.jsonl, the journal of a stage: one line of JSON for each logged step. Every curve comes from it."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any


def read_history(path: Path, skip: int = 0) -> list[dict[str, Any]]:
    """The valid lines, without the first `skip` of them; an empty list where there is no file.

    Invalid lines are skipped with a warning. A last line that a kill cut off is skipped without one.
    """
    if not path.exists():
        return []
    texts = path.read_bytes().splitlines(keepends=True)
    lines = [_line(text) for text in texts]
    if damaged := [
        number for number, line in enumerate(lines, 1) if line is None and texts[number - 1].endswith(b"\n")
    ]:
        _warn(path, damaged[0], len(damaged))
    return [line for line in lines if line is not None][skip:]


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


@lru_cache  # a running stage reads its journal often: warn once
def _warn(path: Path, first: int, count: int) -> None:
    more = f" and {count - 1} more" if count > 1 else ""
    print(f"warning: {path}: line {first}{more} damaged and passed over; the others are kept", file=sys.stderr)
