"""The seal of a result: metrics.json holds the SHA-256 of every file beside it, and of its content.

So a file that was changed, damaged or replaced is recognized, whatever its time and size.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.files import read_json, sha256


def seal(metrics: dict[str, Any]) -> dict[str, Any]:
    """`metrics` with the SHA-256 of its content added."""
    return {key: value for key, value in metrics.items() if key != "sha256"} | {"sha256": _content_digest(metrics)}


def _content_digest(metrics: dict[str, Any]) -> str:
    content = {key: value for key, value in metrics.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of a sealed metrics.json. Raises UserError if it is missing, damaged or of another version."""
    metrics = read_json(path)
    advice = "delete it and run the stage that makes it"
    if not isinstance(metrics, dict) or "sha256" not in metrics:
        raise UserError(f"{path}: not a result of this version (it has no seal); {advice}")
    if metrics["sha256"] != _content_digest(metrics):
        raise UserError(f"{path}: its content is not what was written, so it was changed or damaged; {advice}")
    return metrics


def found_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a finished run; empty if there is none or it is damaged, which the report tells."""
    try:
        return read_metrics(folder / "metrics.json")
    except UserError:
        return {}


def makers_of_run(metrics: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """metrics.json of the runs that made a run's encoder, nearest first: of a finetuning, say, then of the pretraining before it.

    It ends where one is gone or has another encoder now. metrics: of the run; folder: where it lies.
    """
    encoder = metrics.get("encoder") or {}
    source = Path(encoder.get("source") or "")
    candidates = (source.parent, folder.parent / "pretrain")  # results may have been moved
    for candidate in candidates if encoder.get("sha256") else ():
        made = found_metrics(candidate)
        if made and made["files"].get(source.name, {}).get("sha256") == encoder["sha256"]:
            return [made, *makers_of_run(made, candidate)]
    return []


def check_no_stage(folder: Path) -> None:
    """Raises UserError where a stage's result lies in `folder`, in which nothing else is to be written."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(metrics, dict) and {"stage", "sha256"} <= set(metrics):
        raise UserError(f"{folder} is a stage's folder, whose files are sealed; name another")


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the outputs in a folder, by file name, as metrics.json holds them."""
    not_sealed = ("metrics.json", "tracking.json")
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in not_sealed)
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


def files_gone(folder: Path, metrics: dict[str, Any]) -> tuple[str, ...]:
    """The files that metrics.json lists and that are not there, as in a copy that leaves out weights, which are large."""
    return tuple(name for name in metrics["files"] if not (folder / name).exists())


def damage(folder: Path, metrics: dict[str, Any], whole: bool, gone: bool = False) -> str | None:
    """What is wrong with the files that metrics.json lists; None if nothing is.

    whole: compare their content, not only their sizes. gone: pass over those that are not there.
    """
    for name, expected in metrics["files"].items():
        try:
            size = os.stat(f"{folder}/{name}").st_size
        except OSError:
            if gone:
                continue
            return f"{name} is missing"
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if whole and sha256(folder / name) != expected["sha256"]:
            return f"{name} is not the file that was written"
    return None
