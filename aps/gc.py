"""Finds and deletes what no study needs any more: saved runs, results of experiments that a study no longer has, and
what was prepared of users' datasets that no study names.

Saved runs are kept so that going back to earlier settings costs nothing. `unneeded` lists the saved runs that none of
the given studies shows or would continue, with their sizes. Only `delete` removes them. A published dataset stays,
because it may have been prepared by its name, without a study.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from aps.data.manifest import LOCK, earlier_copies
from aps.errors import UserError
from aps.findings import Findings
from aps.layout import dataset_of, encoder_file, manifest_of, study_folder
from aps.results import saved_run
from aps.runtime.slurm import ATTEMPT, FRESH_SECONDS, may_run
from aps.settings.study import Study
from aps.stages import STAGES

IN_USE = "at work or killed: not deleted"
NOT_EXPERIMENTS = ("report", "logs", "benchmarks")  # other folders in the folder of a study


class Unneeded(NamedTuple):
    folder: Path
    bytes: int  # on disk; a file with several hard links counts in part
    why: str
    marks: tuple[Path, ...]  # files of processes that may use the folder; a killed one leaves its own


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
            folders.append(_entry(run, "no study asks for it", (run / ATTEMPT,)))
    for study in studies:
        for folder in sorted(study_folder(study).glob("*")):
            if folder.is_dir() and folder.name not in (*study.experiments, *NOT_EXPERIMENTS):
                folders.append(_entry(folder, f"study '{study.study}' has no such experiment"))
    attempts = tuple(root.glob(f"runs/*/*/{ATTEMPT}"))  # any of them may read any dataset
    for folder, why in _data(root, studies):
        lock = root / "data" / folder.relative_to(root / "data").parts[0] / LOCK
        folders.append(_entry(folder, why, (lock, *attempts)))
    return sorted(folders, key=lambda entry: -entry.bytes)


def delete(folders: Sequence[Unneeded]) -> int:
    """Removes the folders that `unneeded` found, except those in use; returns the number of bytes freed."""
    freed = 0
    for entry in folders:
        if not any(map(_at_work, entry.marks)):
            shutil.rmtree(entry.folder)
            freed += entry.bytes
            link = entry.folder.with_name(dataset_of(entry.folder))
            if link.is_symlink() and not link.exists():  # the dataset's plain name, which led to this folder
                link.unlink()
    return freed


def _entry(folder: Path, why: str, marks: tuple[Path, ...] = ()) -> Unneeded:
    return Unneeded(folder, _size(folder), IN_USE if any(map(_at_work, marks)) else why, marks)


def _at_work(mark: Path) -> bool:
    """Whether a process works under a mark: that of a run, or the lock of a preparation."""
    if mark.name == ATTEMPT:
        return may_run(mark.parent)
    try:
        with mark.open("r+") as lock:  # NFS locks only what may be written
            if time.time() - mark.stat().st_mtime < FRESH_SECONDS:
                return True
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or a file system without locks
        return True
    return False


def _data(root: Path, studies: Sequence[Study]) -> Iterator[tuple[Path, str]]:
    """What was prepared of users' datasets and is not needed, with the reason."""
    needed = {
        manifest_of(study, name).parent for study in studies for name in (*study.dataset_names(), *study.datasets)
    }
    for folder in sorted(root.glob("data/*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        if folder not in needed and dataset_of(folder) != folder.name:
            yield folder, "no study has this dataset"
        else:
            yield from ((copies, "copies of earlier images") for copies in earlier_copies(folder))


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
