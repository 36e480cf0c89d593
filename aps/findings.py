"""Which of a study's figures are its own: every metrics.json held against what the study resolves to now.

Wherever a result is read (planning, tables, report, sync, the stages that build on it), it is read through here. A figure
counts where its seal is whole, its settings, images and encoder are those of the study, and its files are there. Else
there is no figure, but a sentence why.

Design: nothing here depends on what Snakemake remembers or on times of files, so results can be copied, `.snakemake/`
deleted and stages run by hand. Planning asks this, hence it imports nothing heavy, and looks at sizes, not into files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from aps.data.fingerprint import changed, outdated
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.files import read_json, sha256, write_json
from aps.layout import encoder_file, manifest_of, stage_folder, study_folder
from aps.registry import USER_DATASETS
from aps.results import flatten
from aps.seals import contents, damage, read_metrics
from aps.settings.study import Study

SHOWN = 3  # differing settings in one sentence
NOT_RUN = "not run"
STAMP = "report.json"


@dataclass(frozen=True)
class Finding:
    """What is there of one run."""

    experiment: str
    seed: int
    stage: str
    folder: Path
    metrics: dict[str, Any] | None  # of metrics.json, only where the figures are the study's
    problem: str | None  # why there is no figure
    changes: tuple[tuple[str, Any, Any], ...] = ()  # settings that differ: key, theirs, the study's

    @property
    def label(self) -> str:
        return f"{self.stage} {self.experiment}/seed{self.seed}"

    @property
    def stale(self) -> bool:
        """Whether there is a result, but not the study's."""
        return self.problem not in (None, NOT_RUN)

    @property
    def reason(self) -> str:
        """Why it has to run, for the plan: `pretrain.epochs 16 -> 100`."""
        if self.changes:
            return _listed([f"{key} {_short(old)} -> {_short(new)}" for key, old, new in self.changes])
        return self.problem or ""


class Findings:
    """Of a whole study; each run is looked at once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._folder = study_folder(study)
        self.of = cache(self._find)
        self.of_data = cache(self._find_data)
        self._images = cache(self._digest_of_images)

    def __iter__(self) -> Iterator[Finding]:
        for job in self.study.jobs():
            yield self.of(*job)

    def runs(self) -> list[dict[str, Any]]:
        """metrics.json of every run whose figures are the study's."""
        return [finding.metrics for finding in self if finding.metrics is not None]

    def stale(self) -> list[Finding]:
        return [finding for finding in self if finding.stale]

    def digest(self) -> str:
        """Of all that a report shows: figures, why there are none, and the words about experiments."""
        runs = [
            [f.label, f.problem, {k: v for k, v in (f.metrics or {}).items() if not k.startswith(("mlflow", "sha256"))}]
            for f in self
        ]
        words = [self.study.question, *([n, e.description, e.published] for n, e in self.study.experiments.items())]
        return hashlib.sha256(json.dumps([runs, words], sort_keys=True).encode()).hexdigest()[:16]

    def report_is_theirs(self, folder: Path) -> bool:
        """Whether the report in `folder` shows what is there now, and its files are whole."""
        try:
            stamp = read_json(folder / STAMP)
            return bool(stamp["shows"] == self.digest() and damage(folder, stamp, whole=True) is None)
        except (UserError, KeyError, TypeError, AttributeError):
            return False

    def stamp_report(self, folder: Path) -> None:
        """Says beside the report what it shows."""
        (folder / STAMP).unlink(missing_ok=True)
        files = contents(folder)
        for inner in sorted({file.parent for file in folder.glob("figures/*/*")}):
            files |= {f"{inner.relative_to(folder)}/{name}": own for name, own in contents(inner).items()}
        write_json(folder / STAMP, {"shows": self.digest(), "files": files})

    def _find(self, experiment: str, seed: int, stage: str) -> Finding:
        folder = stage_folder(self._folder, experiment, seed, stage)
        job = (experiment, seed, stage, folder)
        file = folder / "metrics.json"
        if not file.exists():
            return Finding(*job, None, NOT_RUN)
        try:
            metrics = read_metrics(file)
            changes = self._changes(metrics, experiment, seed, stage)
            if changes:
                listed = _listed([f"{key} {_short(old)}, now {_short(new)}" for key, old, new in changes])
                return Finding(*job, None, f"other settings: {listed}", tuple(changes))
            problem = self._problem(metrics, experiment, seed, stage, folder)
        except UserError as error:
            return Finding(*job, None, f"damaged: {error}")
        except (KeyError, TypeError, AttributeError) as error:
            return Finding(*job, None, f"damaged: {file} lacks {error}")
        return Finding(*job, None if problem else metrics, problem)

    def _changes(self, metrics: dict[str, Any], experiment: str, seed: int, stage: str) -> list[tuple[str, Any, Any]]:
        """Settings of the stage itself that differ."""
        own = self.study.stage_settings(experiment, seed, stage).relevant()
        names = {"experiment": own["experiment"], "upstream": own["upstream"]}
        if metrics["settings"] | names == own:  # nearly always
            return []
        ours, theirs = flatten(own), flatten(metrics["settings"])
        keys = [key for key in {**theirs, **ours} if key not in ("experiment", "upstream")]
        missing = "absent"
        return [
            (key, theirs.get(key, missing), ours.get(key, missing))
            for key in keys
            if theirs.get(key, missing) != ours.get(key, missing)
        ]

    def _problem(self, metrics: dict[str, Any], experiment: str, seed: int, stage: str, folder: Path) -> str | None:
        settings = self.study.stage_settings(experiment, seed, stage)
        images = self._images(settings.dataset_name)
        if images is not None and metrics["dataset"]["digest"] != images:
            return f"other images: dataset {settings.dataset_name} has changed since"
        made_from, source_now = metrics["dataset"].get("source"), self.study.source(settings.dataset_name).identity
        if images is None and made_from not in (None, source_now):  # not prepared yet, so there is no digest to compare
            return f"other images: the source of dataset {settings.dataset_name} is now {source_now}"
        source = self.study.pretrain_source(experiment) if settings.upstream is not None else None
        if source is not None:
            upstream = self.of(source, seed, "pretrain")
            if upstream.metrics is not None:
                if metrics["encoder"]["sha256"] != upstream.metrics["files"]["encoder.safetensors"]["sha256"]:
                    return f"another encoder: {upstream.label} was trained again since"
            elif upstream.stale or metrics["settings"].get("upstream") != settings.upstream:
                return f"its encoder: {upstream.problem}"
        file = encoder_file(self.study, experiment, seed) if source is None and stage != "pretrain" else None
        if file is not None and file.exists() and metrics["encoder"]["sha256"] != sha256(file):
            return f"another encoder: {file} has changed since"
        wrong = damage(folder, metrics, whole=False)
        return f"damaged: {wrong}" if wrong else None

    def _find_data(self, dataset: str) -> str | None:
        """Why a prepared dataset has to be prepared again (`aps.data.fingerprint`); None where it has not to, or is not
        prepared yet. Where a published dataset lies changes no result."""
        path, source = manifest_of(self.study, dataset), self.study.source(dataset)
        if not path.exists():
            return None
        try:
            if dataset in self.study.datasets or dataset in USER_DATASETS:
                return outdated(path, source)
            return changed(Manifest.read(path), path.parent, source.trust)
        except UserError as error:
            return str(error)

    def _digest_of_images(self, dataset: str) -> str | None:
        """Of the prepared dataset; None where it is not prepared, which contradicts nothing."""
        path = manifest_of(self.study, dataset)
        return str(read_json(path)["digest"]) if path.exists() else None


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 30 else f"{text[:27]}..."
