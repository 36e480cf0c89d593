"""The logic behind the workflow's rules: paths, inputs, resources and options of every job.

Snakemake calls some methods for each job, and finds their arguments by name: `wildcards`, `resources`. If a method of
`params` takes `resources`, Snakemake does not see a changed value as a changed job. So such values may say how a job
runs, not what it computes.

It imports nothing heavy, so that a login node can plan.
"""

from __future__ import annotations

import fcntl
import gc
import inspect
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from snakemake.io import ancient

from aps.errors import UserError
from aps.findings import Findings
from aps.layout import (
    data_folder,
    encoder_file,
    encoder_job,
    find_old_layout,
    job_of,
    makers_of,
    manifest_of,
    report_folder,
    stage_folder,
    study_folder,
)
from aps.results import forget, saved_run
from aps.runtime import door
from aps.runtime.gpus import visible
from aps.runtime.launch import SHELL_PREFIX
from aps.runtime.slurm import job_id
from aps.settings.blocks import UserDataset
from aps.settings.reading import load_study, read_value
from aps.settings.study import StageSettings, Study
from aps.shortages import check_shortages
from aps.stages import STAGES
from aps.text import number_of
from aps.tracking.addresses import settled, shown, tracking_address
from aps.workflow.resources import (
    BY_ATTEMPT,
    NO_GROUPS,
    TOGETHER,
    TURN,
    Machine,
    attempt_number,
    check_resources,
    group,
    groups,
    rule_resources,
    rule_threads,
    runs_here,
    simplest,
)

DEFAULT_STUDY = Path("config/config.yaml")
DEFAULT_IMAGE = "aps.sif"
MOST_EXPLAINED = 20  # runs, in lines
PREPARE = "prepare_dataset"  # the rule of the target `data`


STAGE_OF_RULE = {row.rule: name for name, row in STAGES.items()}
RULE_OF_TARGET = {"data": PREPARE} | {name: row.rule for name, row in STAGES.items()}


def rule_function(method: Callable[..., Any]) -> cached_property[Callable[..., Any]]:
    """A method of `Plan` for rules to name, as a function that has its signature at hand.

    Snakemake asks each function of each job for it several times (docs/performance.md, Many jobs).
    """

    def bound(plan: Plan) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            return method(plan, *args, **kwargs)

        function.__signature__ = inspect.signature(method.__get__(plan))  # type: ignore[attr-defined]
        return function

    return cached_property(bound)


class Plan:
    """A study, as the rules need it."""

    def __init__(self, study: Study, files: list[Path], overrides: dict[str, Any]) -> None:
        self.study = study
        self.written = study  # with the results folder as rules write it: Snakemake adds a module's `prefix`
        self._files, self._overrides = files, overrides
        self._elsewhere = False  # whether jobs run in an environment of their own
        self._apptainer_args: str | None = None  # None: jobs don't run in a container
        self._outer: Any = None  # the workflow of which this one is a module
        self._job: Any = None  # the workflow of a process that runs jobs
        self.is_module = False
        self.findings = Findings(study)
        self.folder = study_folder(study)
        self.report = report_folder(study)
        self.datasets = {data_folder(name, study.source(name)): name for name in study.dataset_names()}  # by folder
        self._tracking = tracking_address(study.tracking_uri, study.results)
        self._forced: frozenset[str] = frozenset()
        # Jobs that have to run again have this file among their inputs; the rule `outdated` makes it.
        self.mark = f".outdated-{uuid.uuid4().hex[:8]}"
        self.turns = False  # whether an encoder's small stages take turns in one job
        self.machine = Machine()
        self._groups = groups(study)
        self.is_main = True  # the process that plans; the others run its jobs
        self._first: dict[str, tuple[str, int, str]] = {}  # settings digest -> the first job with these settings
        for job in self._by_group():
            self._first.setdefault(study.stage_settings(*job).digest, job)

    def _by_group(self) -> list[tuple[str, int, str]]:
        """The study's jobs, each group's together. So of equal runs, the first is in the earliest group.

        In any other order, two groups could wait for each other's runs.
        """

        def place(job: tuple[str, int, str]) -> Any:
            name, seed, stage = job
            return self._groups.get((name, stage), (name, stage)), seed

        jobs = self.study.jobs()
        places = {found: number for number, found in enumerate(dict.fromkeys(map(place, jobs)))}
        return sorted(jobs, key=lambda job: places[place(job)])

    @classmethod
    def of(cls, workflow: Any, config: Mapping[str, Any]) -> Plan:
        """The plan of a Snakemake workflow. Its study is in `--configfile` and `--config`, or in a module's `config:`.

        Raises:
            UserError: settings are wrong, or don't fit the prepared images, or a module has no study.
        """
        if workflow.modifier.is_main_snakefile():
            settings = workflow.config_settings
            plan = cls.load(settings.configfiles, settings.config, Path(workflow.basedir))
        elif config:
            plan = cls._of_module(_as_in_a_file(config), workflow.modifier.path_modifier)
        else:
            raise UserError(
                "module: no study; give it one by `config:`, for example `config: config` after `configfile:`"
            )
        deployed = {method.name for method in workflow.deployment_settings.deployment_method}
        plan._elsewhere = bool(deployed & {"CONDA", "APPTAINER"})
        if "APPTAINER" in deployed:
            plan._apptainer_args = str(workflow.deployment_settings.apptainer_args)
        plan.is_main = workflow.is_main_process
        if plan.is_main:
            plan.check_images()
        plan._outer = workflow if plan.is_module else None
        plan._job = None if plan.is_main or plan.is_module else workflow
        plan.turns = TURN in workflow.global_resources
        if plan.turns:
            plan._register_groups(workflow)
        gc.set_threshold(
            100_000, 50, 100
        )  # a large DAG is millions of objects that stay; looking for garbage takes a fifth
        if plan.is_main and plan.is_module:
            plan.sweep()
        return plan

    @classmethod
    def load(cls, configfiles: Iterable[str | Path], overrides: Mapping[str, Any], beside: Path = Path()) -> Plan:
        """The plan of the study in `configfiles`, with the settings of `overrides` (`--config`) laid over it.

        Without files it is config/config.yaml in the working directory, or else in the repository that has the
        Snakefile in its folder `beside` or one level above.

        Raises:
            UserError: settings are wrong.
        """
        files = [_relative(Path(file)) for file in configfiles]
        if not files:
            candidates = [folder / DEFAULT_STUDY for folder in (Path(), beside, beside.parent)]
            files = [_relative(file) for file in candidates if file.exists()][:1] or [DEFAULT_STUDY]
        plain = {key: _plain(value, f"--config {key}") for key, value in overrides.items()}
        return cls(_checked(files, plain), files, plain)

    @classmethod
    def _of_module(cls, config: dict[str, Any], paths: Any) -> Plan:
        """The plan of a module. `paths` is Snakemake's modifier of its paths, which adds the `prefix`."""
        written = _checked([], config)
        results = paths.replace_prefix(f"{written.results}/.").removesuffix("/.")
        plan = cls(written.model_copy(update={"results": results}), [], config | {"results": results})
        plan.written, plan.is_module = written, True
        return plan

    def check_images(self) -> None:
        """Raises UserError where a run can't work on the images of a dataset that is prepared and stays as it is.

        The others are asked for when they have been prepared (`aps data`).
        """
        names = self.study.dataset_names()
        check_shortages(self.findings, {name for name in names if self.findings.why_outdated(name) is None})

    def check_environment(self, jobs: Iterable[Any]) -> None:
        """Raises UserError if a package that one of Snakemake's `jobs` needs is not installed here, where it runs."""
        from aps.detection import check_engine

        for job in () if self._elsewhere else jobs:
            if job.rule.name == STAGES["detection"].rule:
                check_engine(self.study.experiments[job.wildcards.experiment].detection.engine)

    def hold_results(self) -> None:
        """Lock the study's results folder against other Snakemake processes, until this process ends.

        Snakemake's lock is not used: it stays when Snakemake is killed, so that the same command could not go on, and
        it locks the working directory.

        Raises:
            UserError: another process works in it, or the folder cannot be written.
        """
        path = self.folder / ".lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("a+", encoding="utf-8")
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
        """Remove the marks of outdated results, of this process and of killed ones."""
        for mark in self.folder.glob(".outdated-*"):
            mark.unlink(missing_ok=True)

    def warn_of_environment(self) -> None:
        """Warn of secrets in `--config`, of missing packages, and of files that a container may lack.

        Planning goes on: jobs may run on other machines.
        """
        given = self._overrides.get("tracking_uri")
        if isinstance(given, str) and shown(given) != given.rstrip("/"):
            print(
                "warning: --config tracking_uri holds a password or a token, which Snakemake writes into its log; put it into "
                "MLFLOW_TRACKING_URI",
                file=sys.stderr,
            )
        apptainer = self._apptainer_args
        for file in map(Path.resolve, self._files):
            shown_to_jobs = apptainer is None or any(str(folder) in apptainer for folder in file.parents[:-1])
            if not shown_to_jobs and not file.is_relative_to(Path.cwd()):
                print(
                    f"warning: {file} lies outside the working directory, so it may be missing in the container; add "
                    f"--apptainer-args '--bind {file.parent}', or work in a folder above it",
                    file=sys.stderr,
                )
        from aps.detection import NEEDED, check_engine

        engines = {e.detection.engine for e in self.study.experiments.values() if "detection" in e.stages}
        for engine in sorted(engines):
            try:
                if self._elsewhere and engine in NEEDED:
                    raise UserError(
                        f"detection.engine '{engine}': the jobs' own environment needs {NEEDED[engine][0]} too"
                    )
                check_engine(engine)
            except UserError as error:
                print(f"warning: {error}", file=sys.stderr)

    def open_door(self) -> None:
        """Let stages in a container ask Slurm, through this process outside; without it a job could not be requeued."""
        if self._apptainer_args is not None and job_id() is not None:
            door.open_door()

    def warn_of_image(self, workflow: Any) -> None:
        """Warn where Slurm's signals, which reach every process of a job, end the one that shows the image's files.

        That is so for an image in one file where Apptainer was installed without setuid.
        """
        if self._apptainer_args is None or getattr(workflow.executor_plugin, "name", "") != "slurm":
            return
        if not Path(self.image()).is_file() or "--unsquash" in self._apptainer_args:
            return
        try:
            built = subprocess.run(["apptainer", "buildcfg"], capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            return
        if "_SUID_INSTALL=0" in built:
            print(
                f"warning: {self.image()} is one file, which this Apptainer mounts by a process; Slurm ends it with its warning "
                "before the time limit, at a preemption and at scancel, before the stage can save its state. Make it a folder: "
                "apptainer build --sandbox FOLDER IMAGE (docs/containers.md)",
                file=sys.stderr,
            )

    # -- targets ----------------------------------------------------------------------------------
    # Paths as rules write them.

    @property
    def outdated(self) -> str:
        return str(study_folder(self.written) / self.mark)

    def manifests(self) -> list[str]:
        names = self.study.dataset_names()
        files = [str(manifest_of(self.written, name)) for name in names]
        return files + self._mark(lambda: any(self.findings.why_outdated(name) for name in names))

    def everything(self) -> list[str]:
        """The targets of all stages."""
        return [file for stage in STAGES for file in self.outputs(stage)]

    def outputs(self, stage: str) -> list[str]:
        """metrics.json of every run of a stage, and the mark if one of the runs has to be repeated.

        Only metrics.json is named, because each file of a target takes Snakemake as long as half a job.
        """
        jobs = [job for job in self.study.jobs() if job[2] == stage]
        files = [str(self._stage(*job) / "metrics.json") for job in jobs]
        return files + self._mark(lambda: any(map(self._repeats, jobs)))

    def marks(self, targets: Iterable[str]) -> list[str]:
        """The mark, if one of these files, or the report, has to be made again; other targets that are rules have it already."""
        return self._mark(lambda: any(map(self._is_old, map(Path, targets))))

    def _is_old(self, file: Path) -> bool:
        if (job := job_of(self.study, file)) is not None:
            return self._repeats(job)
        if file.name == "manifest.json" and (dataset := self.datasets.get(file.parent.name)) is not None:
            return self.findings.why_outdated(dataset) is not None
        return (self.report in file.parents or str(file) == "report") and self._report_repeats()

    def _report_repeats(self) -> bool:
        """Whether the report, or a run that it shows, has to be made again."""
        return self._report_is_old() or any(map(self._repeats, self.study.jobs()))

    def _repeats(self, job: tuple[str, int, str]) -> bool:
        """Whether a run has to be repeated, or one that makes its encoder."""
        chain = (job, *makers_of(self.study, job))
        return any(self.findings.finding(*one).stale for one in chain) or self._other_images(*job)

    def pages(self) -> list[str]:
        """The report's files, and the mark if they have to be made again."""
        files = [str(report_folder(self.written) / name) for name in ("report.html", "results.csv")]
        return files + self._mark(self._report_repeats)

    def _mark(self, stale: Callable[[], bool]) -> list[str]:
        """The mark as a target: Snakemake makes a missing intermediate file again only if a target needs it.

        Only the process that plans looks at results and images: on a cluster each job reads the Snakefile again.
        """
        return [self.outdated] if self.is_main and stale() else []

    def metrics(self) -> list[str]:
        return [str(self._stage(*job) / "metrics.json") for job in self.study.jobs()]

    def _stage(self, experiment: str, seed: int, stage: str) -> Path:
        return stage_folder(study_folder(self.written), experiment, seed, stage)

    # -- what the user forces ---------------------------------------------------------------------

    def force(self, names: Iterable[str]) -> frozenset[str]:
        """The names that Snakemake has to force if the user forces `names`: rules instead of their targets."""
        self._forced = frozenset(RULE_OF_TARGET.get(name, name) for name in names)
        return self._forced

    def forget_forced(self, workflow: Any) -> None:
        """Delete the saved runs of the jobs that the user forces, so that they are computed again."""
        settings = workflow.dag_settings
        files = self._forced | frozenset(settings.targets if settings.forcetargets else ())
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
        except UserError:  # an input is not there yet, so there is no saved run
            return

    def explain(self) -> list[str]:
        """A line for each result that has to be made again, with the reason, and for each experiment made by other code."""
        stale = self.findings.stale()
        changes = {name: self.findings.why_outdated(name) for name in self.study.dataset_names()}
        lines = [f"data {name}: {reason}" for name, reason in changes.items() if reason is not None]
        lines += [f"{finding.label}: {finding.reason}" for finding in stale[:MOST_EXPLAINED]]
        lines += [f"and {number_of(len(stale) - MOST_EXPLAINED, 'run')} more"] if len(stale) > MOST_EXPLAINED else []
        other_code = self.findings.other_code(self.config_options)
        lines += other_code[:MOST_EXPLAINED]
        if len(other_code) > MOST_EXPLAINED:
            lines.append(f"and {number_of(len(other_code) - MOST_EXPLAINED, 'experiment')} more made by other code")
        if (old := find_old_layout(self.study.results)) is not None:
            lines.append(
                f"{old}: a result of version 0.1, whose folders did not say which study they are of; it is not used, move it "
                "away or delete it"
            )
        return lines

    # -- every job's command ----------------------------------------------------------------------
    # `resources` is an argument so that a changed value does not count as a changed job.

    @rule_function
    def start(self, wildcards: Any, resources: Any) -> str:
        """The start of a rule's shell command: a prefix for these rules alone, then Python.

        Python is the one that runs Snakemake, or that of the job's environment (`--sdm conda`, `--sdm apptainer`).
        """
        return f"{SHELL_PREFIX}{'python' if self._elsewhere else shlex.quote(sys.executable)}"

    def image(self) -> str:
        """The container of `--sdm apptainer`."""
        return self.study.container or DEFAULT_IMAGE

    def repository(self) -> str:
        """The folder with pyproject.toml and constraints.txt, if the package runs from a clone."""
        return str(Path(__file__).parents[2])

    # -- one stage's rule -------------------------------------------------------------------------

    def output(self, stage: str) -> dict[str, str]:
        """The stage's files, by names that rules may use. The rule restricts the wildcard `{stage}` to its stage."""
        folder = f"{study_folder(self.written)}/{{experiment}}/seed{{seed}}/{{stage}}"
        return {file.replace(".", "_"): f"{folder}/{file}" for file in STAGES[stage].files}

    def _settings(self, wildcards: Any) -> StageSettings:
        return self.study.stage_settings(wildcards.experiment, int(wildcards.seed), wildcards.stage)

    @rule_function
    def inputs(self, wildcards: Any) -> dict[str, Any]:
        """The dataset's manifest and, if the stage starts from one, the encoder."""
        self._keep_attempts()
        self._keep_going()
        settings = self._settings(wildcards)
        files = {"manifest": manifest_of(self.written, settings.dataset_name)}
        if STAGES[settings.stage].encoder:
            encoder = encoder_file(self.written, settings.experiment, settings.seed)
            maker = encoder_job(self.study, settings.experiment, settings.seed)
            if encoder and maker is not None:  # as its rule writes it, so that Snakemake sees that they are one file
                encoder = self._stage(*maker) / encoder.name
            elif encoder and self.is_module:
                encoder = encoder.absolute()  # the user's own file, to which Snakemake is not to add the `prefix`
            files |= {"encoder": encoder} if encoder else {}
        first = self._first[settings.digest]
        if first != (
            settings.experiment,
            settings.seed,
            settings.stage,
        ):  # the same run under another name: it is computed once
            files["after"] = self._stage(*first) / "metrics.json"
        job = (settings.experiment, settings.seed, settings.stage)
        finding = self.findings.finding(*job)
        current = finding.metrics is not None and not (self.is_main and self._other_images(*job))
        return self._inputs({key: str(file) for key, file in files.items()}, current, finding.stale)

    def _other_images(self, experiment: str, seed: int, stage: str) -> bool:
        """Whether a dataset of the run or of those that make its encoder is prepared again first, so that the run may change."""
        return any(
            self.findings.why_outdated(self.study.experiments[name].dataset_of(one)) is not None
            for name, _, one in ((experiment, seed, stage), *makers_of(self.study, (experiment, seed, stage)))
        )

    @rule_function
    def data_inputs(self, wildcards: Any) -> dict[str, str]:
        """The mark, if the files from which the dataset was prepared have changed."""
        self._keep_attempts()
        changed = self.is_main and self.findings.why_outdated(self.datasets[wildcards.dataset])
        return {"outdated": self.outdated} if changed else {}

    @rule_function
    def report_inputs(self, wildcards: Any) -> dict[str, Any]:
        """Every metrics.json. The report is made again if it does not show the results as they are now."""
        self._keep_attempts()
        exists, old = (self.report / "report.html").exists(), self._report_is_old()
        current = exists and not old
        if current and self.is_main:
            current = not any(self._other_images(*job) for job in self.study.jobs())
        return self._inputs({"metrics": self.metrics()}, current, old)

    def _report_is_old(self) -> bool:
        return (self.report / "report.html").exists() and not self.findings.report_is_current(self.report)

    def _keep_attempts(self) -> None:
        """Give rules the resource `attempt` back, which `use rule ... with: resources:` took away with all others.

        A value in `params` would not do: it stays that of the first attempt. Inputs are asked for before resources are.
        """
        outer, self._outer = self._outer, None
        for rule in outer.rules if outer is not None else ():
            if "{resources.attempt}" in (rule.shellcmd or "") and "attempt" not in rule.resources:
                rule.resources["attempt"] = attempt_number

    def _keep_going(self) -> None:
        """Let a failed stage not end the others of its job: a profile's `keep-going` does not reach a job's Snakemake.

        Its settings are not there before it asks for inputs.
        """
        job, self._job = self._job, None
        if job is not None and job.execution_settings is not None:
            job.execution_settings.keep_going = True

    def _inputs(self, files: dict[str, Any], current: bool, stale: bool) -> dict[str, Any]:
        """`files` as inputs by which Snakemake runs a job exactly if its result is not `current`.

        Snakemake compares times of files, which mean nothing after results were copied. The inputs of a current result
        are marked as ancient, so that their times do not count. A stale result gets an input that has to be made first.
        """
        if not self.is_main:
            return files
        if current and not self._forced:
            return {key: ancient(file) for key, file in files.items()}
        return files | ({"outdated": self.outdated} if stale else {})

    @rule_function
    def options(self, wildcards: Any, resources: Any) -> str:
        """Options of a stage's command: those that name its study, and those that say how it runs."""
        values = {
            "tracking": self._tracking,
            **{key: getattr(resources, key, None) for key in ("processes", "nodes", "workers", "checkpoint_minutes")},
        }
        options = [f"--{k.replace('_', '-')} {shlex.quote(str(v))}" for k, v in values.items() if v is not None]
        return " ".join([self.config_options, *options])

    def group(self, stage: str) -> Any:
        """The group of a stage, if the profile has the resource `turn`; otherwise each stage is a separate job."""
        return group(self.study, stage, self._groups) if self.turns else None

    def _register_groups(self, workflow: Any) -> None:
        """Let `group-components` find groups by TOGETHER. Snakemake does so only where a rule's group is that text."""
        seeds = {seed for e in self.study.experiments.values() for seed in e.seeds}
        for name in set(self._groups.values()):
            workflow.parent_groupids.update({name.format(seed=seed): TOGETHER for seed in seeds})

    def share(self, workflow: Any) -> None:
        """Let jobs share what `workflow` may use of this machine, if they run on it: without `--resources gpu=N`, its GPUs."""
        if workflow.resource_settings.nodes is None and not workflow.remote_exec:
            if workflow.is_main_process and "gpu" not in workflow.global_resources and (here := len(visible())):
                workflow.global_resources["gpu"] = here  # a job on more than there are is told of it by itself
            gpus = workflow.global_resources.get("gpu")
            # A number in Snakemake 9.12, an object that has one in 9.27
            self.machine = Machine(workflow.resource_settings.cores or 1, getattr(gpus, "value", gpus))

    def threads(self, stage: str) -> Any:
        return simplest(self.study, stage, rule_threads(self.study, stage, self.machine))

    def resources(self, stage: str) -> dict[str, Any]:
        """The resources of a stage's rule, without those that are None for all experiments."""
        values = {
            name: value if name in BY_ATTEMPT else simplest(self.study, stage, value)
            for name, value in rule_resources(self.study, stage, self._groups if self.turns else NO_GROUPS).items()
        }
        return {name: value for name, value in values.items() if value is not None}

    # -- data and report --------------------------------------------------------------------------

    @rule_function
    def dataset_name(self, wildcards: Any, resources: Any) -> str:
        """The name of the dataset in a folder under results/data."""
        return self.datasets[wildcards.dataset]

    def runs_here(self, stage: str) -> bool:
        return runs_here(self.study, stage)

    @rule_function
    def source_options(self, wildcards: Any, resources: Any) -> str:
        source = self.study.source(self.datasets[wildcards.dataset])
        if isinstance(source, UserDataset):
            return f"--entry {shlex.quote(source.model_dump_json(exclude_defaults=True))}"
        path = f"--source {shlex.quote(source.path)}" if source.path else ""
        return f"{path} {'' if source.download else '--no-download'}".strip()

    @cached_property
    def config_options(self) -> str:
        """Options by which a verb reads the same study. Those of a module have no file, but all settings in `--set`."""
        address = self._overrides.get("tracking_uri")
        overrides = self._overrides | ({"tracking_uri": settled(address)} if isinstance(address, str) else {})
        pairs = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items()]
        return shlex.join(["--configfile", *map(str, self._files), *(["--set", *pairs] if pairs else [])])


def one_of(names: Iterable[str]) -> str:
    """A regular expression that matches the names and nothing else.

    Common beginnings are written once. A plain a|b|c would be tried name by name, for each file of each job.
    """
    rests: dict[str, list[str]] = {}  # first letter -> rests of the names
    for name in names:
        rests.setdefault(name[:1], []).append(name[1:])
    optional = rests.pop("", None) is not None  # a name ends here
    branches = [re.escape(first) + one_of(rest) for first, rest in sorted(rests.items())]
    if not branches or (len(branches) == 1 and not optional):
        return "".join(branches)
    return f"(?:{'|'.join(branches)})" + "?" * optional


def _checked(files: list[Path], overrides: dict[str, Any]) -> Study:
    study = load_study(files, overrides)
    for stage in (*STAGES, "data", "report"):
        check_resources(study, stage)
    return study


def _as_in_a_file(value: Any) -> Any:
    """A module's settings as a study's file has them. Snakemake's YAML takes numbers such as 1e-3 for text, and a study
    made in Python may have paths."""
    if isinstance(value, Mapping):
        return {key: _as_in_a_file(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_as_in_a_file(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if number else value


def _plain(value: Any, where: str) -> Any:
    """Settings of `--config` as plain types: dictionaries for Snakemake's immutable maps, and text read as YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, where) for inner in value]
    return read_value(value, where) if isinstance(value, str) else value


def _relative(path: Path) -> Path:
    """The path relative to the working directory, if it lies in it, for messages."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
