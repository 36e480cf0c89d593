"""Finds and deletes what no study needs any more: saved runs, and results of experiments that a study no longer has.

Saved runs are kept so that going back to earlier settings costs nothing. `unneeded` lists the saved runs that none of
the given studies shows or would continue, with their sizes. Only `delete` removes them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aps.errors import UserError
from aps.findings import Findings
from aps.layout import encoder_file, manifest_of, study_folder
from aps.results import saved_run
from aps.settings.study import Study
from aps.stages import STAGES

NOT_EXPERIMENTS = ("report", "logs", "benchmarks")  # other folders in the folder of a study


class Unneeded(NamedTuple):
    folder: Path
    bytes: int  # on disk; a file with several hard links counts in part
    why: str


def unneeded(studies: Sequence[Study]) -> list[Unneeded]:
    """Folders under the studies' results folder that none of them needs, the largest first.

    Raises:
        UserError: the studies have different results folders.
    """
    roots = {Path(study.results) for study in studies}
    if len(roots) != 1:
        raise UserError(
            f"gc looks at one results folder, and these studies have {len(roots)}; name those of one folder"
        )
    (root,) = roots
    needed = {run for study in studies for run in _runs(study)}
    folders = []
    for run in sorted(root.glob("runs/*/*")):
        if run not in needed:
            working = (run / "attempt.json").exists()
            folders.append(
                Unneeded(run, _size(run), "at work or killed: not deleted" if working else "no study asks for it")
            )
    for study in studies:
        for folder in sorted(study_folder(study).glob("*")):
            if folder.is_dir() and folder.name not in (*study.experiments, *NOT_EXPERIMENTS):
                folders.append(Unneeded(folder, _size(folder), f"study '{study.study}' has no such experiment"))
    return sorted(folders, key=lambda entry: -entry.bytes)


def delete(folders: Sequence[Unneeded]) -> int:
    """Removes the folders that `unneeded` found, except runs at work; returns the number of bytes freed."""
    freed = 0
    for entry in folders:
        if not (entry.folder / "attempt.json").exists():
            shutil.rmtree(entry.folder)
            freed += entry.bytes
    return freed


def _runs(study: Study) -> list[Path]:
    """Folders of the runs that a study asks for, whether finished, begun or not there yet."""
    findings, runs = Findings(study), []
    for finding in findings:
        settings = study.stage_settings(finding.experiment, finding.seed, finding.stage)
        manifest = manifest_of(study, settings.dataset_name)
        encoder = None
        if STAGES[finding.stage].encoder:
            encoder = encoder_file(study, finding.experiment, finding.seed)
        try:
            runs.append(saved_run(study.results, settings, manifest, encoder))
        except UserError:  # its inputs are not there yet, so there is no run of it
            continue
    return runs


def _size(folder: Path) -> int:
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(file.st_blocks * 512 // file.st_nlink for file in files)
