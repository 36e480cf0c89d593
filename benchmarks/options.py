"""The type of `--out`. It imports neither torch nor the package, because gpu.py starts with plain Python."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def folder(text: str) -> Path:
    """The type of `--out`: a folder that is there, or can be made. It is looked at before anything is measured."""
    path = Path(text)
    try:
        there = next(part for part in (path.absolute(), *path.absolute().parents) if os.path.lexists(part))
        if not there.is_dir():
            raise argparse.ArgumentTypeError(f"{there} is no folder; name another")
        if not os.access(there, os.W_OK | os.X_OK):
            raise argparse.ArgumentTypeError(f"nothing may be written in {there}; name another folder")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:60]}: {error.strerror}; name another folder") from None
    return path
