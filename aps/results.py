"""The results of a stage, metrics.json, history.jsonl and weights: how they are written, saved and restored.

While a stage runs, its checkpoints are in the folder of its run, which Snakemake does not know. At the end the outputs
stay there, in `finished/`, and are linked into the study's folder. When the same run is asked for again, by another
study or after Snakemake has deleted the outputs, the links are made again.

Design: the key of a run is a digest of what determines its result (`run_key`): its settings, the images and the encoder
it starts from. metrics.json is sealed (`aps.seals`), so a file that was changed, damaged or replaced is recognized.

It knows no stage and imports no torch. Whether a result belongs to a study as it is now is decided by `aps.findings`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from aps import __version__
from aps.code import changed_code, code_of, known_code
from aps.cost import Counts
from aps.errors import Preempted, UserError
from aps.files import append, atomic_path, make_folder, read_json, remove, sha256, sweep, write_json
from aps.journal import read_history
from aps.layout import folder_of_runs, run_folder
from aps.registry import resolve
from aps.runtime.ranks import ranks
from aps.runtime.slurm import MARKS, hold, job_id
from aps.seals import contents, damage, makers_of_run, read_metrics, seal
from aps.settings.study import StageSettings
from aps.spent import PEAKS, Memory, larger, spent
from aps.stages import STAGES
from aps.tracking.addresses import OFF, settled
from aps.tracking.describing import About, command, describe, finals
from aps.tracking.sending import pictures
from aps.tracking.state import FAILED, KILLED, adopt, results_name
from aps.tracking.tracker import Tracker, say_missing


@dataclass(frozen=True)
class StageJob:
    """One run of one stage: its settings, its inputs, where it writes and how it is run."""

    settings: StageSettings
    manifest: Path
    out: Path
    checkpoints: Path
    encoder: Path | None = None
    study: str = "study"
    description: str = ""  # of the experiment
    tracking: str = OFF  # address of MLflow's server or store
    workers: int | None = None  # decoding processes of each training process; None: as many as it has cores
    checkpoint_minutes: float = 10.0
    profile: Path | None = None  # where to save a profiler trace of the first steps

    @property
    def label(self) -> str:
        return f"{self.settings.stage} {self.settings.experiment}/seed{self.settings.seed}"

    @property
    def encoder_spec(self) -> str | Path:
        """The argument of `aps.models.weights.load_encoder`: a file, `random` or `timm:NAME`."""
        return self.encoder if self.encoder is not None else self.settings.encoder.weights


# --------------------------------------------------------------------------------------------------
# The key of a run.


def run_key(settings: StageSettings, dataset: str, encoder: str | None) -> str:
    """16 hexadecimal digits over all that determines a run's result, which the names of study and experiment do not.

    Args:
        dataset: digest of the images, from the manifest.
        encoder: SHA-256 of the file it starts from; None where the settings determine the weights (random, timm).
    """
    return hashlib.sha256(json.dumps([settings.digest, dataset, encoder]).encode()).hexdigest()[:16]


def saved_run(results: str | Path, settings: StageSettings, manifest: Path, encoder: Path | None) -> Path:
    """The folder of the run with these settings, images and encoder.

    Raises:
        UserError: the manifest or the encoder's file is missing or broken.
    """
    key = run_key(settings, images_digest(manifest), sha256(encoder) if encoder else None)
    return run_folder(results, settings.stage, key)


def images_digest(manifest: Path) -> str:
    """The digest of a prepared dataset's images.

    Raises:
        UserError: the manifest is missing or broken.
    """
    found = read_json(manifest)
    if not isinstance(found, dict) or not isinstance(found.get("digest"), str):
        raise UserError(
            f"{manifest}: damaged, without the digest of its images; delete it, and its dataset is prepared again"
        )
    return str(found["digest"])


def upstream_of(encoder: Path | None) -> dict[str, Any]:
    """The content of metrics.json beside an encoder's file; empty if no stage of this project made the file.

    Raises:
        UserError: metrics.json is damaged, or the file is not the one that it describes.
    """
    beside = encoder.parent / "metrics.json" if encoder is not None else None
    if encoder is None or beside is None or not beside.exists():
        return {}
    metrics = read_metrics(beside)
    if metrics["files"].get(encoder.name, {}).get("sha256") != sha256(encoder):
        raise UserError(
            f"{encoder}: it is not the file that metrics.json beside it describes, so it was changed or damaged; "
            f"run the stage that makes it (`snakemake {encoder} --force`)"
        )
    return metrics


# --------------------------------------------------------------------------------------------------
# Saved runs.


def restore_finished(job: StageJob) -> bool:
    """Link a finished run's outputs into the study's folder. Returns whether there was one, undamaged.

    A damaged run is deleted, with a message, and has to be computed again.
    """
    finished = job.checkpoints / "finished"
    if not (finished / "metrics.json").exists():
        return False
    try:
        metrics = read_metrics(finished / "metrics.json")
        problem = damage(finished, metrics, whole=True)
    except UserError as error:
        problem = str(error)
    if problem is not None:
        print(f"{job.label}: its saved run is damaged ({problem}); computing it again", file=sys.stderr)
        shutil.rmtree(finished)
        return False
    _publish(job, finished, metrics)
    _warn_of_code(job, metrics, upstream_of(job.encoder))
    return True


def _warn_of_code(job: StageJob, *reused: dict[str, Any]) -> None:
    """Say which of the results that are used again, the run's or its encoder's, were made by other code."""
    for metrics in reused:
        for clause in changed_code(metrics.get("code"), metrics.get("settings", {})):
            what = "its result" if metrics["stage"] == job.settings.stage else "its encoder"
            print(
                f"warning: {job.label}: {what} was made by {clause}; --again of {metrics['stage']} makes it anew",
                file=sys.stderr,
            )


def forget(checkpoints: Path) -> None:
    """Delete a saved run, so that it is computed again. The marks of the attempt that is running stay."""
    for path in checkpoints.glob("*"):
        if path.name not in MARKS:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _publish(job: StageJob, finished: Path, metrics: dict[str, Any], restored: bool = True) -> None:
    """Link a finished run's files into the study's folder; metrics.json comes last: if it exists, all are complete.

    restored: whether the run was finished before.
    """
    remove(job.out / "metrics.json")
    for name in metrics["files"]:
        _link(finished / name, job.out / name)
    name = job.settings.experiment
    names = {"experiment": name, "settings": metrics["settings"] | {"experiment": name}}
    write_json(job.out / "metrics.json", seal(metrics | names | _track(job, finished, metrics, restored)))


def _track(job: StageJob, finished: Path, metrics: dict[str, Any], restored: bool) -> dict[str, Any]:
    """Write tracking.json, the run's state in MLflow, beside its outputs. Returns the entries of metrics.json about it.

    If another study or experiment made the run, this study gets a separate run in MLflow, which `sync` sends.
    """
    about = about_run(job, metrics, upstream_of(job.encoder))
    state = adopt(job.out / "tracking.json", finished / "tracking.json", about, job.tracking, restored)
    return {"mlflow_run_id": state.run_id, "mlflow_complete": state.complete or settled(job.tracking) == OFF}


def about_run(job: StageJob, metrics: dict[str, Any], upstream: dict[str, Any]) -> About:
    """What MLflow is told about a run. `upstream` is metrics.json of the run that made its encoder, or empty."""
    name = results_name(folder_of_runs(job.checkpoints)) if settled(job.tracking) != OFF else None
    before = makers_of_run(upstream, job.encoder.parent) if job.encoder is not None else []
    return describe(metrics, job.study, upstream or None, job.description, read_json(job.manifest), name, before)


@dataclass
class StageRun:
    """Journal, tracking and final results of one run. Only rank 0 writes; on other ranks the methods do nothing."""

    job: StageJob
    memory: Memory = field(default_factory=Memory)
    _state: dict[str, Any] = field(default_factory=dict)
    _begun: bool = False  # whether lines that the checkpoint does not hold were dropped from the journal

    def __enter__(self) -> StageRun:
        self.writes = ranks().rank == 0
        self._start = time.monotonic()
        if not self.writes:
            return self
        make_folder(self.job.checkpoints)
        self._lock = hold(self.job.checkpoints, self.job.label)
        self._state_file = self.job.checkpoints / "run.json"
        self.journal = self.job.checkpoints / "history.jsonl"
        fresh: dict[str, Any] = {"started": _now(), "seconds": 0.0, "process_seconds": 0.0, "peaks": {}}
        for folder, seconds in (
            (self.job.checkpoints, 0.0),
            (self.job.checkpoints / "outputs", 0.0),
            (self.job.out, 3600.0),
        ):
            sweep(folder, seconds)  # another process, such as sync, may be writing in the last one
        self._state = _read_clock(self._state_file) or fresh
        self._before = {key: float(self._state[key]) for key in ("seconds", "process_seconds")}
        self._note_code()
        self._state["settings_digest"] = self.job.settings.digest  # for `aps.gc`
        write_json(
            self._state_file, self._state
        )  # before the run is sent to MLflow, where its start time is part of its key
        self._upstream = upstream_of(self.job.encoder)
        _warn_of_code(self.job, self._upstream)
        about = about_run(self.job, self._known(), self._upstream)
        self.tracker = Tracker(self.job.tracking, self.job.checkpoints, about, self.job.out / "tracking.json")
        self.tracker.start()
        return self

    def _note_code(self) -> None:
        """Note the code that does the run's work, and warn where it is not the one that began it."""
        now, goes_on = code_of(self.job.settings.relevant()), any(self.job.checkpoints.glob("state-*.pt"))
        begun = self._state.get("code") if goes_on else now
        if not begun:  # by an earlier version, which did not note it
            return
        for clause in changed_code(begun, self.job.settings.relevant()):
            print(
                f"warning: {self.job.label}: it was begun by {clause} and goes on with the code as it is now; --again trains "
                "it with one code",
                file=sys.stderr,
            )
        self._state["code"] = {
            kind: known + [digest for digest in now.get(kind, []) if digest != known[-1]]
            for kind, known in begun.items()
        }

    def resume(self, step: int) -> None:
        """Drop journal lines after `step`: the checkpoint does not hold their work, so it is done again.

        A stage without checkpoints need not call it: its first `log` drops the lines of earlier attempts.
        """
        self._begun = True
        if not self.writes or not self.journal.exists():
            return
        lines = [line for line in read_history(self.journal) if line["step"] <= step]
        self.tracker.rewind(len(lines))
        with atomic_path(self.journal) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def log(self, step: int, **values: float) -> None:
        """Write one line of history.jsonl. `step` counts optimizer steps, unless the stage counts something else."""
        if not self.writes:
            return
        if not self._begun:
            self.resume(-1)
        line = {"step": step, "time": round(time.time(), 3), **values}
        append(self.journal, json.dumps(line) + "\n")
        self.save_clock()

    def save_clock(self) -> None:
        if self.writes:
            seconds = time.monotonic() - self._start
            self._state["seconds"] = self._before["seconds"] + seconds
            self._state["process_seconds"] = self._before["process_seconds"] + seconds * ranks().world
            self._state["peaks"] = larger(self._state["peaks"], self.memory.peaks())
            write_json(self._state_file, self._state)

    def staging(self, name: str) -> Path:
        """Where to write the output `name`; `finish` moves it to the result folder."""
        folder = self.job.checkpoints / "outputs"
        make_folder(folder)
        return folder / name

    def finish(self, metrics: dict[str, Any], **extra: Any) -> None:
        """Write metrics.json, and put all outputs into the result folder, each of them complete.

        Raises:
            UserError: an output or a score is not what the stage's row declares.
        """
        if not self.writes:
            return
        self._check(metrics, extra)
        self.journal.touch()
        self.save_clock()
        shutil.copyfile(self.journal, self.staging("history.jsonl"))
        report = self._report(metrics, extra)
        staged = self.staging("metrics.json").parent
        self._draw(report)
        tracked = self.tracker.finish(finals(report), pictures(staged))
        report |= {"mlflow_run_id": self.tracker.run_id, "mlflow_complete": tracked}
        metrics_file = report | {"files": contents(staged)}
        write_json(staged / "metrics.json", seal(metrics_file))
        shutil.copyfile(self.tracker.state_file, staged / "tracking.json")
        finished = self.job.checkpoints / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        staged.replace(finished)
        _publish(self.job, finished, metrics_file, restored=False)
        for state in self.job.checkpoints.glob("state-*"):
            state.unlink()
        if not tracked:
            say_missing(self.job.label, self.tracker.reason)

    def _check(self, metrics: dict[str, Any], extra: dict[str, Any]) -> None:
        """Raises UserError where a stage does not finish with what its row declares: tables and reports rely on it."""
        stage, label = STAGES[self.job.settings.stage], self.job.label
        if missing := [name for name in stage.outputs if not self.staging(name).exists()]:
            raise UserError(
                f"{label} finished without {', '.join(missing)}: {stage.described} has to write to StageRun.staging(NAME) what "
                "its row of aps/stages.py declares; mend either"
            )
        for key, value in {**metrics, **extra}.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise UserError(
                    f"{label}: '{key}' is a {type(value).__name__} (or holds what JSON can't); {stage.described} has to give "
                    "StageRun.finish plain numbers and text"
                ) from None
        for score in stage.scores:
            key = score.keys(getattr(self.job.settings, stage.name))[0]
            value = metrics.get(key)
            if key not in metrics:
                if not score.optional:
                    print(
                        f"warning: {label} finished without its score '{key}', so it has none in tables: {stage.described} has "
                        f"to give it to StageRun.finish, or its row of aps/stages.py not to declare it",
                        file=sys.stderr,
                    )
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(
                    f"{label}: its score '{key}' is {str(value)[:40]!r} of type {type(value).__name__}; {stage.described} has to "
                    "give StageRun.finish a finite number"
                )

    def _draw(self, report: dict[str, Any]) -> None:
        """Draw the stage's picture, if it has one. A failure is only a warning: the run is worth more."""
        picture = STAGES[self.job.settings.stage].picture
        if picture is None:
            return
        try:
            resolve(picture.function)(self.job, report, self.staging(picture.file))
        except Exception as error:  # anything that a drawing library may raise
            print(f"warning: {self.job.label}: {picture.file} is not drawn: {error}", file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            if kind is not None:
                with contextlib.suppress(UserError):  # a full disk was reported already
                    self.save_clock()
            stopped = kind is not None and issubclass(kind, Preempted | KeyboardInterrupt)
            self.tracker.stop(None if kind is None else KILLED if stopped else FAILED)
            self._lock.close()

    def _known(self) -> dict[str, Any]:
        """The entries of metrics.json that are known when the run starts."""
        settings, manifest = self.job.settings, read_json(self.job.manifest)
        return {
            "stage": settings.stage,
            "experiment": settings.experiment,
            "seed": settings.seed,
            "settings": settings.relevant(),
            "settings_digest": settings.digest,
            "key": self.job.checkpoints.name,
            "dataset": {
                "name": manifest["name"],
                "digest": manifest["digest"],
                **({"source": manifest["source"]} if manifest.get("source") else {}),
            },
            "encoder": {
                "source": str(self.job.encoder_spec),
                "sha256": sha256(self.job.encoder) if self.job.encoder else None,
                "settings_digest": self._upstream.get("settings_digest"),
                "finished": self._upstream.get("finished"),
                "mlflow_run_id": self._upstream.get("mlflow_run_id"),
            },
            "started": self._state["started"],
            **({"code": self._state["code"]} if self._state.get("code") else {}),
            **provenance(),
        }  # fmt: skip

    def _report(self, metrics: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        known, seconds = self._known(), round(self._state["seconds"], 2)
        upstream_cost = self._upstream.get("cost")
        cost = spent(
            self.job.settings, self._counts(), seconds, known["hardware"], self._state["peaks"], upstream_cost,
            metrics.get("flops"), self._state["process_seconds"], metrics.get("reading_seconds", 0.0),
        )  # fmt: skip
        return {
            "stage": known.pop("stage"),
            "experiment": known.pop("experiment"),
            "seed": known.pop("seed"),
            "metrics": metrics,
            **extra,
            **known,
            "finished": _now(),
            "wall_seconds": seconds,
            "cost": cost,
        }

    def _counts(self) -> Counts | None:
        """The size of its dataset; None if the manifest does not tell."""
        manifest = read_json(self.job.manifest)
        splits = manifest.get("splits", {})
        test = splits.get("test") or splits.get("val")
        if "train" not in splits or test is None:
            return None
        return Counts(splits["train"]["count"], test["count"], len(manifest["classes"]), 0.0)


def _read_clock(path: Path) -> dict[str, Any] | None:
    """run.json: when the run started, how long it and its processes have worked, and its peaks of memory.

    None if it is missing or, with a warning, damaged.
    """
    if not path.exists():
        return None
    try:
        state = read_json(path)
        seconds = state["seconds"]
        of_processes = state.get("process_seconds", seconds * ranks().world)  # version 0.2 has no such entry
        numbers = all(type(x) in (int, float) and 0 <= x < math.inf for x in (seconds, of_processes))
        if isinstance(state["started"], str) and numbers:
            highest = {
                key: float(value)
                for key, value in state.get("peaks", {}).items()
                if key in PEAKS and 0 <= value < math.inf
            }
            return {
                "started": state["started"],
                "seconds": float(seconds),
                "process_seconds": float(of_processes),
                "peaks": highest,
                **({"code": code} if (code := known_code(state.get("code"))) else {}),
            }
    except (UserError, AttributeError, KeyError, TypeError, RecursionError):
        pass
    print(f"warning: {path}: damaged and replaced; the time that the run took so far is lost", file=sys.stderr)
    return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested blocks as `a.b` keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def provenance() -> dict[str, Any]:
    """Version, commit, command, hardware and packages, for metrics.json."""
    packages = {}
    for name in ("torch", "torchvision", "timm", "numpy", "mlflow", "detectron2"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "version": __version__,
        "commit": _commit(),
        "command": command(),
        "hardware": hardware(),
        "packages": {"python": platform.python_version(), **packages},
    }


def hardware() -> dict[str, Any]:
    """The machine, the processes and, where torch uses one, the GPU."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    info: dict[str, Any] = {
        "host": platform.node(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processes": ranks().world,
        "slurm_job": job_id(),
    }
    torch = sys.modules.get("torch")  # only if the stage has imported it: importing it takes seconds
    if torch is not None and torch.cuda.is_initialized():  # not where APS_DEVICE=cpu leaves it alone
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _commit() -> str | None:
    root = Path(__file__).parent.parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if (root / ".git").exists() else None


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system has no links; never a half-written file."""
    temporary = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # where both were links to one file, `replace` did nothing
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); free space or choose another `results` folder"
        ) from None
    os.utime(target)  # outputs must be newer than their inputs


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
