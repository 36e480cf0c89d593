"""What the workflow's rules ask: paths, settings, resources, options. Rules hold no logic; it is here, and tested.

Functions that Snakemake calls for each job are closures with the argument names it knows. One that takes `resources`
gives values Snakemake does not count as a change: they say how a job runs, not what it computes.

Imports nothing heavy, for planning on a login node.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.results import OUTPUTS, checkpoint_folder, encoder_file, forget, manifest_path, stage_folder
from aps.runtime.launch import check_resources, rule_resources, rule_threads, runs_here
from aps.settings import STAGES, Study, load_study, read_value
from aps.tracking import tracking_uri

DEFAULT_STUDY = Path("config/config.yaml")

# The rule that does a target's jobs.
JOB_RULES = {
    "data": "prepare_dataset",
    "pretrain": "pretrain_encoder",
    "finetune": "finetune_encoder",
    "linear_probe": "probe_encoder",
    "knn": "knn_encoder",
    "detection": "detect_encoder",
}


class Plan:
    """A study as the rules see it."""

    def __init__(self, study: Study, files: list[Path], overrides: dict[str, Any]) -> None:
        self.study = study
        self._files, self._overrides = files, overrides
        self.tracking_uri = tracking_uri(study)

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
            if job.rule.name == JOB_RULES["detection"]:
                check_engine(self.study.experiments[job.wildcards.experiment].detection.engine)

    def hold_results(self) -> None:
        """Keeps another snakemake out of the results folder for as long as this process lives.

        In place of Snakemake's own lock, which stays behind when Snakemake is killed, so that the same command would not
        go on, and which belongs to the working directory.

        Raises:
            UserError: another one is at work there, or the folder cannot be written.
        """
        path = Path(self.study.results, ".lock")
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
            print(f"warning: {path}: no lock to be had ({error.strerror}); start no second snakemake", file=sys.stderr)
        self._lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=self._lock, flush=True)

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
        return [str(manifest_path(self.study.results, name)) for name in self.study.datasets()]

    def outputs(self, stage: str) -> list[str]:
        """Every file of every run of a stage."""
        return [
            str(stage_folder(self.study.results, name, seed, stage) / file)
            for name, seed, own in self.study.jobs()
            if own == stage
            for file in OUTPUTS[stage]
        ]

    def metrics(self) -> list[str]:
        return [str(stage_folder(self.study.results, *job) / "metrics.json") for job in self.study.jobs()]

    # -- what the user forces ---------------------------------------------------------------------

    def force_jobs_behind_targets(self, workflow: Any) -> None:
        """`--forcerun finetune` means the jobs of that target: Snakemake would force the target alone, which does nothing.

        Snakemake reads the rules first and learns what is forced afterwards, so this waits for it.
        """

        class Workflow(type(workflow)):  # type: ignore[misc]
            def __setattr__(self, name: str, value: Any) -> None:
                if name == "dag_settings" and value is not None:
                    value.forcerun = frozenset(JOB_RULES.get(forced, forced) for forced in value.forcerun)
                super().__setattr__(name, value)

        workflow.__class__ = Workflow

    def forget_forced(self, workflow: Any) -> None:
        """Drop the saved state of runs that the user forces, so that they are computed and not found finished."""
        settings = workflow.dag_settings
        files = settings.forcerun | (settings.targets if settings.forcetargets else frozenset())
        for job in workflow.dag.needrun_jobs():
            forced = job.rule in workflow.dag.forcerules or not files.isdisjoint(job.output)
            if forced and (stage := STAGE_OF.get(job.rule.name)):
                own = self.study.stage_settings(job.wildcards.experiment, int(job.wildcards.seed), stage)
                forget(checkpoint_folder(self.study.results, own))

    # -- one stage's rule -------------------------------------------------------------------------

    def output(self, stage: str) -> dict[str, str]:
        folder = f"{self.study.results}/{{experiment}}/seed{{seed}}/{stage}"
        return {file.replace(".", "_"): f"{folder}/{file}" for file in OUTPUTS[stage]}

    def inputs(self, stage: str) -> Callable[[Any], dict[str, str]]:
        def inputs(wildcards: Any) -> dict[str, str]:
            settings = self.study.stage_settings(wildcards.experiment, int(wildcards.seed), stage)
            files = {
                "manifest": str(manifest_path(self.study.results, settings.dataset_name)),
            }
            encoder = (
                encoder_file(self.study, wildcards.experiment, int(wildcards.seed)) if stage != "pretrain" else None
            )
            return files | ({"encoder": str(encoder)} if encoder else {})

        return inputs

    def settings(self, stage: str) -> Callable[[Any], str]:
        """All that the stage's result depends on, as JSON: Snakemake reruns the job when it changes."""

        def settings(wildcards: Any) -> str:
            return self.study.stage_settings(wildcards.experiment, int(wildcards.seed), stage).to_json()

        return settings

    def options(self, stage: str) -> Callable[[Any, Any, Any, Any], str]:
        """Paths and the way it runs; `resources` is among the arguments so that none of it counts as a change."""

        def options(wildcards: Any, input: Any, output: Any, resources: Any) -> str:
            given = {
                "study": self.study.study,
                "results": self.study.results,
                "manifest": input.manifest,
                "encoder": getattr(input, "encoder", None),
                "out": Path(output.metrics_json).parent,
                **{
                    key: getattr(resources, key, None)
                    for key in ("processes", "nodes", "workers", "checkpoint_minutes")
                },
            }
            return " ".join(f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in given.items() if v is not None)

        return options

    def runs_here(self, stage: str) -> bool:
        return runs_here(self.study, stage)

    def threads(self, stage: str) -> Callable[[Any], int]:
        return rule_threads(self.study, stage)

    def resources(self, stage: str) -> dict[str, Any]:
        return rule_resources(self.study, stage)

    def digest(self) -> str:
        """Of everything that the report shows but the figures: it is made again when a run of it is another one."""
        runs = [(*job, self.study.stage_settings(*job).digest) for job in self.study.jobs()]
        words = [(name, e.description, e.published) for name, e in self.study.experiments.items()]
        return hashlib.sha256(json.dumps([runs, words]).encode()).hexdigest()[:16]

    def source_options(self, dataset: str) -> str:
        source = self.study.sources.get(dataset)
        if source is None:
            return ""
        path = f"--source {shlex.quote(source.path)}" if source.path else ""
        return f"{path} {'' if source.download else '--no-download'}".strip()

    def config_options(self) -> str:
        files = " ".join(shlex.quote(str(file)) for file in self._files)
        pairs = [shlex.quote(f"{key}={json.dumps(value)}") for key, value in self._overrides.items()]
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


assert set(JOB_RULES) == {"data", *STAGES}
STAGE_OF = {rule: stage for stage, rule in JOB_RULES.items() if stage in STAGES}
