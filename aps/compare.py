"""What finished runs differ in: settings, data, what made them, cost and scores. `python -m aps compare RUN RUN ...`.

A run is given by its folder, results/STUDY/EXPERIMENT/seedN/STAGE; the runs may be of different studies. The settings
of an evaluation include those of the runs that made its encoder, where they are found. It imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.report.differences import NOT_COMPARED, shown
from aps.report.table import machine
from aps.results import flatten
from aps.seals import damage, makers_of_run, read_metrics
from aps.text import shorten, table_lines
from aps.tracking.describing import inherit

ABSENT = "-"
LONGEST_VALUE = 40  # letters


def compare(folders: Sequence[Path]) -> str:
    """One table for each kind of difference, with a column for each run. Rows that are alike are left out.

    Raises:
        UserError: there are fewer than two runs, a folder has no finished run, or its files were changed. Files that are gone change no figure.
    """
    if len(folders) < 2:
        raise UserError("compare: one run has nothing to differ from; name two folders of stages or more")
    runs = [_read(folder) for folder in folders]
    names = _short_names(folders)
    lines = []
    if names != [str(folder) for folder in folders]:
        lines = [f"{name}  {Path(folder)}" for name, folder in zip(names, folders, strict=True)]
    for title, columns in (
        ("settings", [_settings(run, folder) for run, folder in zip(runs, folders, strict=True)]),
        ("data", [_data(run) for run in runs]),
        ("made by", [_provenance(run) for run in runs]),
        ("cost", [_numbers(run.get("cost") or {}) for run in runs]),
        ("scores", [_numbers(run["metrics"]) for run in runs]),
    ):
        lines += ["", *_table(title, names, columns)]
    return "\n".join(lines).lstrip("\n")


def _read(folder: Path) -> dict[str, Any]:
    folder = folder.parent if folder.name == "metrics.json" else folder
    if not (folder / "metrics.json").exists():
        raise UserError(
            f"{folder}: no finished run (it has no metrics.json); name a folder results/STUDY/EXPERIMENT/seedN/STAGE"
        )
    metrics = read_metrics(folder / "metrics.json")
    if (problem := damage(folder, metrics, whole=False, gone=True)) is not None:
        raise UserError(f"{folder}: {problem}; run the stage again")
    return metrics


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell all paths apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}" for number, _ in enumerate(folders, 1)]


def _settings(run: dict[str, Any], folder: Path) -> dict[str, str]:
    tree = {key: value for key, value in run["settings"].items() if key not in (*NOT_COMPARED, "stage")}
    tree = inherit(tree, *(made["settings"] for made in makers_of_run(run, folder)))
    return {
        "stage": run["stage"],
        "seed": str(run["seed"]),
        **{key: shown(value) for key, value in flatten(tree).items()},
    }


def _data(run: dict[str, Any]) -> dict[str, str]:
    encoder = run.get("encoder") or {}
    return {
        "dataset": run["dataset"]["name"],
        "images": run["dataset"]["digest"][:12],
        "encoder": (encoder.get("sha256") or ABSENT)[:12],
    }


def _provenance(run: dict[str, Any]) -> dict[str, str]:
    return {
        "version": str(run.get("version", ABSENT)),
        "commit": str(run.get("commit", ABSENT)),
        "machine": machine(run) if "processes" in run["hardware"] else ABSENT,
        **{f"package {name}": str(number) for name, number in (run.get("packages") or {}).items()},
    }


def _numbers(values: dict[str, Any]) -> dict[str, str]:
    return {key: f"{value:.6g}" for key, value in flatten(values).items() if isinstance(value, int | float)}


def _table(title: str, names: Sequence[str], columns: Sequence[dict[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for column in columns for key in column)
    body = [[key, *(shorten(column.get(key, ABSENT), LONGEST_VALUE) for column in columns)] for key in keys]
    differing = [row for row in body if len(set(row[1:])) > 1]
    return table_lines([title, *names], differing) if differing else [f"{title}: alike"]
