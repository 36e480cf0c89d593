"""Which results belong to a study as it is now: every metrics.json is compared with the study's settings and inputs.

Whoever reads results (planning, tables, report, sync, stages that build on others) reads them through `Findings`. A
result counts if its seal is whole, if its settings, images and encoder are those of the study, and if its files are
there. Otherwise there are no figures, but a sentence that says why.

Design: nothing here depends on Snakemake's records or on times of files. So results can be copied, `.snakemake/` can be
deleted, and stages can be run by hand. Planning uses this, so it imports nothing heavy, and compares the sizes of
files, not their content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from aps.code import changed_code, source_now
from aps.data.fingerprint import changed, is_there, outdated
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.files import read_json, sha256, write_json
from aps.layout import encoder_file, maker_of, manifest_of, stage_folder, study_folder
from aps.registry import USER_DATASETS
from aps.results import flatten, images_digest
from aps.seals import contents, damage, files_gone, read_metrics
from aps.settings.study import Study
from aps.stages import STAGES
from aps.text import listed, shorten

MOST_CHANGES = 3  # settings that one sentence names
MOST_FILES = 3  # and runs whose files are gone
LONGEST_VALUE = 30  # letters
NOT_RUN = "not run"
STAMP = "report.json"


class OtherCode(NamedTuple):
    """Code that has changed since it made a result."""

    experiment: str  # with `stage`, what it made
    stage: str
    clause: str


@dataclass(frozen=True)
class Finding:
    """What was found of one run's result."""

    experiment: str
    seed: int
    stage: str
    folder: Path
    metrics: dict[str, Any] | None  # content of metrics.json; None if it is not the study's
    problem: str | None  # why there are no figures
    changes: tuple[tuple[str, Any, Any], ...] = ()  # settings that differ: (key, result's, study's)
    other_code: tuple[OtherCode, ...] = ()  # by which it or its encoder was made; such a result counts
    gone: tuple[str, ...] = ()  # its files that are not there, if it counts without them

    @property
    def label(self) -> str:
        return f"{self.stage} {self.experiment}/seed{self.seed}"

    @property
    def stale(self) -> bool:
        """Whether there is a result, but not of this study as it is now."""
        return self.problem not in (None, NOT_RUN)

    @property
    def reason(self) -> str:
        """Why the run has to be repeated, for the plan: `pretrain.epochs 16 -> 100`."""
        if self.changes:
            return listed([f"{key} {_shown(old)} -> {_shown(new)}" for key, old, new in self.changes], MOST_CHANGES)
        return self.problem or ""


class Findings:
    """The findings of a whole study. Each run is read once, when it is first asked for.

    Args:
        sources: whether results also stop to count when the images in their source folders are no longer those that were
            prepared. Whoever shows figures asks for it. Planning does not: it prepares the images again first, and if
            they are the same, no result is lost. Images that are gone, or on another machine, change nothing.
        gone: whether a result counts without its files beside metrics.json, as in a copy without weights, which are large.
            Its figures are no others for that. Whoever shows them asks for it; the run itself has to be repeated.

    Attributes:
        finding: (experiment, seed, stage) -> Finding.
        why_outdated: dataset -> why it has to be prepared again; None where it need not be, or is not prepared yet.
        train_images: dataset -> how many training images it has; None where it is not prepared, or will be again. Raises
            UserError where its manifest is damaged.
    """

    def __init__(self, study: Study, sources: bool = False, gone: bool = False) -> None:
        self.study, self._sources, self._gone = study, sources, gone
        self._folder = study_folder(study)
        self.finding = cache(self._find)
        self.why_outdated = cache(self._why_outdated)
        self.train_images = cache(self._train_images)
        self._images = cache(self._digest_of_images)
        self._changed_since = cache(self._source_changed)
        self._code_now = cache(source_now)

    def __iter__(self) -> Iterator[Finding]:
        for job in self.study.jobs():
            yield self.finding(*job)

    def runs(self) -> list[dict[str, Any]]:
        """The content of metrics.json of every run that counts."""
        return [finding.metrics for finding in self if finding.metrics is not None]

    def stale(self) -> list[Finding]:
        return [finding for finding in self if finding.stale]

    def other_code(self, options: str = "") -> list[str]:
        """For each experiment with results that count, but were made by code that has changed since: a line with the
        command that makes them anew. `options` name the study in it."""
        seeds: dict[tuple[str, OtherCode], list[int]] = {}
        for finding in self:
            for other in finding.other_code:
                of_seeds = seeds.setdefault((finding.experiment, other), [])
                of_seeds += [finding.seed] if finding.seed not in of_seeds else []
        lines = []
        for (experiment, other), (first, *more) in seeds.items():
            command = f"python -m aps {other.stage} --experiment {other.experiment} --seed {first} --again {options}"
            also = f", and so for seed {', '.join(map(str, more))}" if more else ""
            lines.append(f"{experiment}: made by {other.clause}: `{command.strip()}`{also}")
        return lines

    def without_files(self) -> str | None:
        """A sentence on results that count although files of theirs are gone; None where there are none."""
        gone = [f"{finding.label} ({listed(list(finding.gone), MOST_FILES)})" for finding in self if finding.gone]
        if not gone:
            return None
        return (
            f"shown without files that are gone: {listed(gone, MOST_FILES)}; copy them here, else "
            "Snakemake makes these runs again, and what starts from them"
        )

    def digest(self) -> str:
        """A digest of all that a report shows: figures, why there are none, and the descriptions of experiments."""
        runs = [
            [
                f.label,
                f.problem,
                {k: v for k, v in (f.metrics or {}).items() if not k.startswith(("mlflow", "sha256"))},
                *f.other_code,
                *f.gone,
            ]
            for f in self
        ]
        texts = [self.study.question, *([n, e.description, e.published] for n, e in self.study.experiments.items())]
        return hashlib.sha256(json.dumps([runs, texts], sort_keys=True).encode()).hexdigest()[:16]

    def report_is_current(self, folder: Path) -> bool:
        """Whether the report in `folder` shows these findings, and its files are whole."""
        try:
            stamp = read_json(folder / STAMP)
            return bool(stamp["shows"] == self.digest() and damage(folder, stamp, whole=True) is None)
        except (UserError, KeyError, TypeError, AttributeError):
            return False

    def stamp_report(self, folder: Path) -> None:
        """Writes beside the report which findings it shows."""
        (folder / STAMP).unlink(missing_ok=True)
        files = contents(folder)
        for inner in sorted({file.parent for file in folder.glob("figures/*/*")}):
            files |= {f"{inner.relative_to(folder)}/{name}": record for name, record in contents(inner).items()}
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
                texts = [f"{key} {_shown(old)}, now {_shown(new)}" for key, old, new in changes]
                return Finding(*job, None, f"other settings: {listed(texts, MOST_CHANGES)}", tuple(changes))
            problem = self._problem(metrics, experiment, seed, stage, folder)
        except UserError as error:
            return Finding(*job, None, f"damaged: {error}")
        except (KeyError, TypeError, AttributeError) as error:
            return Finding(*job, None, f"damaged: {file} lacks {error}")
        if problem is not None:
            return Finding(*job, None, problem)
        gone = files_gone(folder, metrics) if self._gone else ()
        return Finding(*job, metrics, None, other_code=self._other_code(metrics, experiment, seed, stage), gone=gone)

    def _other_code(self, metrics: dict[str, Any], experiment: str, seed: int, stage: str) -> tuple[OtherCode, ...]:
        clauses = changed_code(metrics.get("code"), metrics["settings"], self._code_now)
        maker = maker_of(self.study, (experiment, seed, stage))
        of_encoder = self.finding(*maker).other_code if maker is not None else ()
        return (*of_encoder, *(OtherCode(experiment, stage, clause) for clause in clauses))

    def _changes(self, metrics: dict[str, Any], experiment: str, seed: int, stage: str) -> list[tuple[str, Any, Any]]:
        """The stage's settings that differ: (key, result's, study's). Its upstream's are not among them."""
        wanted = self.study.stage_settings(experiment, seed, stage).relevant()
        not_compared = {"experiment": wanted["experiment"], "upstream": wanted["upstream"]}
        if metrics["settings"] | not_compared == wanted:  # nearly always
            return []
        old, new = flatten(metrics["settings"]), flatten(wanted)
        keys = [key for key in {**old, **new} if key not in not_compared]
        absent = "absent"
        return [
            (key, old.get(key, absent), new.get(key, absent))
            for key in keys
            if old.get(key, absent) != new.get(key, absent)
        ]

    def _problem(self, metrics: dict[str, Any], experiment: str, seed: int, stage: str, folder: Path) -> str | None:
        settings = self.study.stage_settings(experiment, seed, stage)
        images = self._images(settings.dataset_name)
        if images is not None and metrics["dataset"]["digest"] != images:
            return f"other images: dataset {settings.dataset_name} has changed since"
        made_from, source_now = metrics["dataset"].get("source"), self.study.source(settings.dataset_name).identity
        if images is None and made_from not in (None, source_now):  # not prepared yet, so there is no digest to compare
            return f"other images: the source of dataset {settings.dataset_name} is now {source_now}"
        if self._sources and (change := self._changed_since(settings.dataset_name)) is not None:
            return f"other images: {change}"
        file = encoder_file(self.study, experiment, seed) if STAGES[stage].encoder else None
        maker = maker_of(self.study, (experiment, seed, stage))
        if file is not None and maker is not None:
            upstream, made = self.finding(*maker), metrics["encoder"].get("settings_digest")
            if upstream.metrics is not None:
                if metrics["encoder"]["sha256"] != upstream.metrics["files"][file.name]["sha256"]:
                    return f"another encoder: {upstream.label} was trained again since"
            elif upstream.stale or metrics["settings"].get("upstream") != settings.upstream:
                return f"its encoder: {upstream.problem}"
            elif made and made != self.study.stage_settings(*maker).digest:
                return f"its encoder: {upstream.label} had other settings"
        elif file is not None and file.exists() and metrics["encoder"]["sha256"] != sha256(file):
            return f"another encoder: {file} has changed since"
        problem = damage(folder, metrics, whole=False, gone=self._gone)
        return f"damaged: {problem}" if problem else None

    def _why_outdated(self, dataset: str) -> str | None:
        """See `why_outdated`. Moving a published dataset to another folder changes no result."""
        path, source = manifest_of(self.study, dataset), self.study.source(dataset)
        if not path.exists():
            return None
        try:
            manifest = Manifest.read(path)
            if dataset in self.study.datasets or dataset in USER_DATASETS:
                reason = outdated(path, source)
            else:
                reason = changed(manifest, path.parent, source.trust)
            return reason or (None if source.trust else manifest.altered_image(path.parent))
        except UserError as error:
            return str(error)

    def _train_images(self, dataset: str) -> int | None:
        """See `train_images`."""
        path = manifest_of(self.study, dataset)
        if not path.exists():
            return None
        train = Manifest.read(path).splits.get("train")
        return train.count if train is not None and self.why_outdated(dataset) is None else None

    def _source_changed(self, dataset: str) -> str | None:
        """What has changed in the source of a prepared dataset; None where nothing has, or where it is not there."""
        path = manifest_of(self.study, dataset)
        try:
            manifest = Manifest.read(path)
        except UserError:
            return None
        return changed(manifest, path.parent, self.study.source(dataset).trust or not is_there(manifest, path.parent))

    def _digest_of_images(self, dataset: str) -> str | None:
        """The digest of the prepared dataset; None if it is not prepared."""
        path = manifest_of(self.study, dataset)
        return images_digest(path) if path.exists() else None


def _shown(value: Any) -> str:
    return shorten(f"{value:g}" if isinstance(value, float) else str(value), LONGEST_VALUE, "...")
