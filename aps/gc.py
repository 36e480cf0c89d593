"""What no study needs any more: saved runs, and results of experiments that a study no longer has.

Saved runs are kept so that going back to earlier settings costs nothing. This lists those that no result of the given
studies came from and that none of them would take up again, with sizes; they are deleted only when told to.
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

OWN_FOLDERS = ("report", "logs", "benchmarks")  # of a study, beside its experiments'


class Unneeded(NamedTuple):
    folder: Path
    bytes: int  # on disk, without what other names still hold
    why: str


def unneeded(studies: Sequence[Study]) -> list[Unneeded]:
    """Folders under the studies' results folder that none of them needs, the largest first.

    Raises:
        UserError: the studies have different results folders, or a stage is at work.
    """
    roots = {Path(study.results) for study in studies}
    if len(roots) != 1:
        raise UserError(
            f"gc looks at one results folder, and these studies have {len(roots)}; name those of one folder"
        )
    (root,) = roots
    needed = {run for study in studies for run in _runs(study)}
    found = []
    for run in sorted(root.glob("runs/*/*")):
        if run not in needed:
            working = (run / "attempt.json").exists()
            found.append(
                Unneeded(run, _size(run), "at work or killed: not deleted" if working else "no study asks for it")
            )
    for study in studies:
        for folder in sorted(study_folder(study).glob("*")):
            if folder.is_dir() and folder.name not in (*study.experiments, *OWN_FOLDERS):
                found.append(Unneeded(folder, _size(folder), f"study '{study.study}' has no such experiment"))
    return sorted(found, key=lambda one: -one.bytes)


def delete(found: Sequence[Unneeded]) -> int:
    """Removes what `unneeded` found, but for what is at work; returns the bytes that this frees."""
    freed = 0
    for one in found:
        if not (one.folder / "attempt.json").exists():
            shutil.rmtree(one.folder)
            freed += one.bytes
    return freed


def _runs(study: Study) -> list[Path]:
    """Folders of the runs that a study has results of, or has begun, or would find finished."""
    findings, runs = Findings(study), []
    for finding in findings:
        settings = study.stage_settings(finding.experiment, finding.seed, finding.stage)
        manifest = manifest_of(study, settings.dataset_name)
        encoder = None
        if STAGES[finding.stage].encoder:
            encoder = encoder_file(study, finding.experiment, finding.seed)
        try:
            runs.append(saved_run(study.results, settings, manifest, encoder))
        except UserError:  # what it starts from is not there yet, so no run of it is
            continue
    return runs


def _size(folder: Path) -> int:
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(file.st_blocks * 512 // file.st_nlink for file in files)
