"""What the workflow's rules ask: paths, settings, resources, options. Rules hold no logic; it is here, and tested.

Functions that Snakemake calls for each job are closures with the argument names it knows. One that takes `resources`
gives values Snakemake does not count as a change: they say how a job runs, not what it computes.

Imports nothing heavy, for planning on a login node.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from snakemake.io import ancient

from aps.errors import UserError
from aps.findings import Findings
from aps.layout import (
    encoder_file,
    manifest_path,
    of_the_old_layout,
    report_folder,
    stage_folder,
    study_folder,
)
from aps.results import forget, saved_run
from aps.settings.blocks import OwnDataset
from aps.settings.reading import load_study, read_value
from aps.settings.study import StageSettings, Study
from aps.stages import STAGES
from aps.tracking.addresses import settled, tracking_address
from aps.workflow.resources import check_resources, rule_resources, rule_threads, runs_here

DEFAULT_STUDY = Path("config/config.yaml")
EXPLAINED = 20  # lines
PREPARE = "prepare_dataset"  # the rule of the target `data`


STAGE_OF_RULE = {row.rule: name for name, row in STAGES.items()}
RULE_OF_TARGET = {"data": PREPARE} | {name: row.rule for name, row in STAGES.items()}


class Plan:
    """A study as the rules see it."""

    def __init__(self, study: Study, files: list[Path], overrides: dict[str, Any]) -> None:
        self.study = study
        self._files, self._overrides = files, overrides
        self.findings = Findings(study)
        self.folder = study_folder(study)
        self.report = report_folder(study)
        self._tracking = tracking_address(study.tracking_uri, study.results)
        self._forced: frozenset[str] = frozenset()
        # Whatever has to be made again has this file among its inputs, which a job of its own makes first.
        self.outdated = str(self.folder / f".outdated-{uuid.uuid4().hex[:8]}")
        self.is_main = True  # of Snakemake's processes; the others run what it has planned
        self._first: dict[str, tuple[str, int, str]] = {}  # of the study's jobs, by the digest of their settings
        for job in study.jobs():
            self._first.setdefault(study.stage_settings(*job).digest, job)

    @classmethod
    def load(cls, configfiles: Iterable[str | Path], overrides: Mapping[str, Any]) -> Plan:
        """The study of `--configfile` (default: config/config.yaml) with `--config` laid over it.

        Raises:
            UserError: settings are wrong.
        """
        files = [_relative(Path(file)) for file in configfiles] or [DEFAULT_STUDY]
        plain = {key: _plain(value, f"--config {key}") for key, value in overrides.items()}
        study = load_study(files, plain)
        for stage in (*STAGES, "data", "report"):
            check_resources(study, stage)
        return cls(study, files, plain)

    def check_environment(self, jobs: Iterable[Any]) -> None:
        """Raises UserError where a package that one of Snakemake's `jobs` needs is not installed."""
        from aps.detection import check_engine

        for job in jobs:
            if job.rule.name == STAGES["detection"].rule:
                check_engine(self.study.experiments[job.wildcards.experiment].detection.engine)

    def hold_results(self) -> None:
        """Keeps another snakemake out of the results folder for as long as this process lives.

        In place of Snakemake's own lock, which stays behind when Snakemake is killed, so that the same command would not
        go on, and which belongs to the working directory.

        Raises:
            UserError: another one is at work there, or the folder cannot be written.
        """
        path = self.folder / ".lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("a+")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); set another `results` folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise UserError(
                f"{path.parent}: another snakemake ({self._lock.read().strip()}) works in it; wait for it or stop it, "
                "or set another `results` folder"
            ) from None
        except OSError as error:
            print(
                f"warning: {path}: this file system has no locks ({error.strerror}); start no second snakemake",
                file=sys.stderr,
            )
        self._lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=self._lock, flush=True)

    def sweep(self) -> None:
        """Remove the marks of what had to be made again, of this run and of killed ones."""
        for mark in self.folder.glob(".outdated-*"):
            mark.unlink(missing_ok=True)

    def warn_of_environment(self) -> None:
        """The same sentence about the whole study, on standard error: a study is planned where its packages are not."""
        from aps.detection import check_engine

        engines = {e.detection.engine for e in self.study.experiments.values() if "detection" in e.stages}
        for engine in sorted(engines):
            try:
                check_engine(engine)
            except UserError as error:
                print(f"warning: {error}", file=sys.stderr)

    # -- targets ----------------------------------------------------------------------------------

    def manifests(self) -> list[str]:
        return [str(manifest_path(self.study.results, name)) for name in self.study.dataset_names()]

    def everything(self) -> list[str]:
        """Every file of every run."""
        return [file for stage in STAGES for file in self.outputs(stage)]

    def outputs(self, stage: str) -> list[str]:
        """Every file of every run of a stage, and the mark where one of them has to be made again."""
        jobs = [job for job in self.study.jobs() if job[2] == stage]
        files = [str(stage_folder(self.folder, *job) / file) for job in jobs for file in STAGES[stage].files]
        return files + self._mark(any(self.findings.of(*job).stale for job in jobs))

    def pages(self) -> list[str]:
        """The report's files, and the mark where they have to be made again."""
        files = [str(self.report / name) for name in ("report.html", "results.csv")]
        return files + self._mark(self._report_is_old())

    def _mark(self, stale: bool) -> list[str]:
        """Snakemake makes a file that is missing between two others only if something at the end asks for it."""
        return [self.outdated] if stale and self.is_main else []

    def metrics(self) -> list[str]:
        return [str(stage_folder(self.folder, *job) / "metrics.json") for job in self.study.jobs()]

    # -- what the user forces ---------------------------------------------------------------------

    def force(self, names: Iterable[str]) -> frozenset[str]:
        """What Snakemake is to force where the user forces `names`: the jobs instead of their targets."""
        self._forced = frozenset(RULE_OF_TARGET.get(name, name) for name in names)
        return self._forced

    def forget_forced(self, workflow: Any) -> None:
        """Drop the saved state of what the user forces, so that it is computed and not found finished."""
        settings = workflow.dag_settings
        files = self._forced | (settings.targets if settings.forcetargets else frozenset())
        everything = settings.forceall
        for job in workflow.dag.needrun_jobs():
            forced = everything or job.rule.name in files or not files.isdisjoint(job.output)
            if forced and job.rule.name == PREPARE:
                forget(Path(job.output.manifest).parent)
            elif forced and job.rule.name in STAGE_OF_RULE:
                self._forget(job)

    def _forget(self, job: Any) -> None:
        settings = self._settings(job.wildcards)
        encoder = getattr(job.input, "encoder", None)
        try:
            forget(
                saved_run(self.study.results, settings, Path(job.input.manifest), Path(encoder) if encoder else None)
            )
        except UserError:  # an input is still to be made, so there is no run of it yet
            return

    def explain(self) -> list[str]:
        """Why results that are there have to be made again, a line each."""
        stale = self.findings.stale()
        lines = [f"{finding.label}: {finding.reason}" for finding in stale[:EXPLAINED]]
        lines += [f"and {len(stale) - EXPLAINED} runs more"] if len(stale) > EXPLAINED else []
        if (old := of_the_old_layout(self.study.results)) is not None:
            lines.append(
                f"{old}: a result of version 0.1, whose folders did not say which study they are of; it is not used, move it "
                "away or delete it"
            )
        return lines

    # -- one stage's rule -------------------------------------------------------------------------

    def output(self, stage: str) -> dict[str, str]:
        """The stage's files, by names that rules may use; `{stage}` is a wildcard that the rule binds to its own."""
        folder = f"{self.folder}/{{experiment}}/seed{{seed}}/{{stage}}"
        return {file.replace(".", "_"): f"{folder}/{file}" for file in STAGES[stage].files}

    def _settings(self, wildcards: Any) -> StageSettings:
        return self.study.stage_settings(wildcards.experiment, int(wildcards.seed), wildcards.stage)

    def inputs(self, wildcards: Any) -> dict[str, Any]:
        """The dataset's manifest and, where the stage starts from one, the encoder."""
        settings = self._settings(wildcards)
        files = {"manifest": manifest_path(self.study.results, settings.dataset_name)}
        if STAGES[settings.stage].encoder:
            encoder = encoder_file(self.study, settings.experiment, settings.seed)
            files |= {"encoder": encoder} if encoder else {}
        first = self._first[settings.digest]
        if first != (settings.experiment, settings.seed, settings.stage):  # the same run under another name: once
            files["after"] = stage_folder(self.folder, *first) / "metrics.json"
        found = self.findings.of(settings.experiment, settings.seed, settings.stage)
        return self._weighed({key: str(file) for key, file in files.items()}, found.metrics is not None, found.stale)

    def report_inputs(self, wildcards: Any) -> dict[str, Any]:
        """Every metrics.json; the report is made again where it shows something else than what is there."""
        shown, old = (self.report / "report.html").exists(), self._report_is_old()
        return self._weighed({"metrics": self.metrics()}, shown and not old, old)

    def _report_is_old(self) -> bool:
        return (self.report / "report.html").exists() and not self.findings.report_is_theirs(self.report)

    def _weighed(self, files: dict[str, Any], right: bool, stale: bool) -> dict[str, Any]:
        """Inputs such that Snakemake runs a job where its result is not `right`, and only there.

        Snakemake goes by times, which say nothing of results that were copied. Inputs of a right result are marked as
        ancient, so that their times do not count; a stale one gets an input that has to be made first.
        """
        if not self.is_main:
            return files
        if right and not self._forced:
            return {key: ancient(file) for key, file in files.items()}
        return files | ({"outdated": self.outdated} if stale else {})

    def options(self, wildcards: Any, resources: Any) -> str:
        """The way it runs; `resources` is among the arguments so that none of it counts as a change."""
        given = {
            "tracking": self._tracking,
            **{key: getattr(resources, key, None) for key in ("processes", "nodes", "workers", "checkpoint_minutes")},
        }
        return " ".join(f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in given.items() if v is not None)

    def threads(self, wildcards: Any) -> int:
        return rule_threads(self.study, wildcards.stage)(wildcards)

    def resources(self, stage: str) -> dict[str, Any]:
        return rule_resources(self.study, stage)

    # -- data and report --------------------------------------------------------------------------

    def runs_here(self, stage: str) -> bool:
        return runs_here(self.study, stage)

    def threads_of(self, stage: str) -> Callable[[Any], int]:
        return rule_threads(self.study, stage)

    def source_options(self, dataset: str) -> str:
        source = self.study.source(dataset)
        if isinstance(source, OwnDataset):
            return f"--entry {shlex.quote(source.model_dump_json(exclude_defaults=True))}"
        path = f"--source {shlex.quote(source.path)}" if source.path else ""
        return f"{path} {'' if source.download else '--no-download'}".strip()

    def config_options(self) -> str:
        files = " ".join(shlex.quote(str(file)) for file in self._files)
        address = self._overrides.get("tracking_uri")
        given = self._overrides | ({"tracking_uri": settled(address)} if isinstance(address, str) else {})
        pairs = [shlex.quote(f"{key}={json.dumps(value)}") for key, value in given.items()]
        return f"--configfile {files}" + (f" --set {' '.join(pairs)}" if pairs else "")


def _plain(value: Any, where: str) -> Any:
    """Snakemake's immutable maps as plain dictionaries, and what it leaves as text (`{epochs: 10}`) as YAML reads it."""
    if isinstance(value, Mapping):
        return {key: _plain(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, where) for inner in value]
    return read_value(value, where) if isinstance(value, str) else value


def _relative(path: Path) -> Path:
    """As people wrote it, for messages."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
