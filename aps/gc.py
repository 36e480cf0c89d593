"""Finds and deletes what no study needs any more: saved runs, results of experiments that a study no longer has, and
what was prepared of users' datasets that no study names.

Saved runs are kept so that going back to earlier settings costs nothing. `survey` lists the saved runs that none of
the given studies shows or would continue, with their sizes. Only `delete` removes them. A published dataset stays,
because it may have been prepared by its name, without a study.

What can't be told is kept: while images or an encoder are missing, the runs with the settings that ask for them; folders
that no stage made; links.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from aps.data.manifest import LOCK, earlier_copies
from aps.errors import UserError
from aps.files import read_json
from aps.findings import Findings
from aps.layout import dataset_of, encoder_file, manifest_of, study_folder
from aps.results import saved_run
from aps.runtime.slurm import ATTEMPT, FRESH_SECONDS, may_run
from aps.settings.study import Study
from aps.stages import STAGES
from aps.text import number_of

IN_USE = "at work or killed: not deleted"


class Unneeded(NamedTuple):
    folder: Path
    bytes: int  # on disk; a file with several hard links counts in part
    why: str
    marks: tuple[Path, ...]  # files of processes that may use the folder; a killed one leaves its own


def survey(studies: Sequence[Study]) -> tuple[list[Unneeded], str | None]:
    """Folders under the studies' results folder that none of them needs, the largest first; and a sentence on saved runs
    that are kept because their inputs are missing, so that their studies can't be asked.

    Raises:
        UserError: the studies have different results folders.
    """
    roots = {Path(study.results) for study in studies}
    if len(roots) != 1:
        raise UserError(
            f"gc looks at one results folder, and these studies have {len(roots)}; name those of one folder"
        )
    (root,) = roots
    needed, unclear, kept = set[Path](), dict[tuple[str, str], str](), dict[Path, str]()
    for study in studies:
        runs, missing = _runs(study)
        needed |= runs
        unclear |= missing
    folders = []
    for run in sorted(root.glob("runs/*/*")):
        if run in needed or run.is_symlink():
            continue
        if (why := _why_unclear(run, unclear)) is not None:
            kept[run] = why
        else:
            folders.append(_entry(run, "no study asks for it", (run / ATTEMPT,)))
    experiments = defaultdict[Path, set[str]](set)
    for study in studies:
        experiments[study_folder(study)] |= set(study.experiments)
    for of_study, names in experiments.items():
        for folder in sorted(of_study.glob("*")):
            if folder.name not in names and _is_experiment(folder):
                folders.append(_entry(folder, f"study '{of_study.name}' has no such experiment"))
    attempts, at_work = tuple(root.glob(f"runs/*/*/{ATTEMPT}")), cache(_at_work)  # any may read any dataset
    for folder, why in _data(root, studies):
        lock = root / "data" / folder.relative_to(root / "data").parts[0] / LOCK
        folders.append(_entry(folder, why, (lock, *attempts), at_work))
    sentence = None
    if kept:
        sentence = f"{number_of(len(kept), 'saved run')} kept: nobody can tell whether a study needs them, since {next(iter(kept.values()))}"
    return sorted(folders, key=lambda entry: -entry.bytes), sentence


def delete(folders: Sequence[Unneeded]) -> int:
    """Removes the folders that `survey` found, except those in use; returns the number of bytes freed.

    One that can't be removed is named on stderr.
    """
    freed, at_work = 0, cache(_at_work)  # a mark may be that of many folders, and Slurm is asked about some
    for entry in folders:
        if not any(map(at_work, entry.marks)):
            try:
                shutil.rmtree(entry.folder)
            except OSError as error:
                print(
                    f"{entry.folder}: cannot be deleted ({error.strerror or error}); delete it yourself",
                    file=sys.stderr,
                )
                continue
            freed += entry.bytes
            link = entry.folder.with_name(dataset_of(entry.folder))
            if link.is_symlink() and not link.exists():  # the dataset's plain name, which led to this folder
                link.unlink()
    return freed


def _at_work(mark: Path) -> bool:
    """Whether a process works under a mark: that of a run, or the lock of a preparation."""
    if mark.name == ATTEMPT:
        return may_run(mark.parent)
    try:
        with mark.open("r+", encoding="utf-8") as lock:  # NFS locks only what may be written
            if time.time() - mark.stat().st_mtime < FRESH_SECONDS:
                return True
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or a file system without locks
        return True
    return False


def _entry(
    folder: Path, why: str, marks: tuple[Path, ...] = (), at_work: Callable[[Path], bool] = _at_work
) -> Unneeded:
    return Unneeded(folder, _size(folder), IN_USE if any(map(at_work, marks)) else why, marks)


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


def _is_experiment(folder: Path) -> bool:
    """Whether a folder holds what stages left of an experiment, and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    seeds = list(folder.glob("*"))
    return bool(seeds) and all(re.fullmatch(r"seed\d+", seed.name) for seed in seeds) and any(
        stage.name in STAGES for seed in seeds for stage in seed.glob("*")
    )  # fmt: skip


def _why_unclear(run: Path, unclear: dict[tuple[str, str], str]) -> str | None:
    """Why it can't be told whether a study asks for a saved run; None if it can.

    unclear: stage and digest of settings of the runs that studies ask for and whose inputs are missing, with the reason.
    """
    stage = run.parent.name
    if not any(stage == of for of, _ in unclear):
        return None
    for file in (run / "finished" / "metrics.json", run / "run.json"):
        try:
            digest = read_json(file)["settings_digest"]
        except (UserError, KeyError, TypeError):  # a run that an earlier version began does not have it
            continue
        return unclear.get((stage, digest))
    return next(why for (of, _), why in unclear.items() if of == stage)


def _runs(study: Study) -> tuple[set[Path], dict[tuple[str, str], str]]:
    """Folders of the runs that a study asks for, whether finished, begun or not there yet; and stage and digest of the
    settings of those whose inputs are missing, with the reason."""
    findings, runs, unclear = Findings(study), set[Path](), dict[tuple[str, str], str]()
    for finding in findings:
        settings = study.stage_settings(finding.experiment, finding.seed, finding.stage)
        manifest = manifest_of(study, settings.dataset_name)
        encoder = None
        if STAGES[finding.stage].encoder:
            encoder = encoder_file(study, finding.experiment, finding.seed)
        try:
            runs.add(saved_run(study.results, settings, manifest, encoder))
        except UserError as error:
            unclear[finding.stage, settings.digest] = str(error)
    return runs, unclear


def _size(folder: Path) -> int:
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(file.st_blocks * 512 // file.st_nlink for file in files)
