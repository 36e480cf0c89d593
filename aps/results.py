"""What a stage leaves behind: metrics.json, history.jsonl, weights, and where they lie.

While a stage runs, everything it needs to go on after a kill lies in its checkpoint folder, which Snakemake does not
know. At the end the outputs are linked into the result folder and a copy stays in `finished/` until the report has read
them: if Snakemake itself was killed meanwhile it deletes the outputs of jobs it did not see end, and running the stage
again then only links them back.

It knows no stage and no torch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from aps import __version__
from aps.errors import UserError
from aps.files import read_json, write_json
from aps.journal import read_history
from aps.layout import checkpoint_folder, stage_folder
from aps.runtime.ranks import ranks
from aps.settings.study import StageSettings, Study
from aps.stages import STAGES
from aps.tracking import OFF, Tracker


@dataclass(frozen=True)
class StageJob:
    """One run of one stage: its settings, its inputs, where it writes, and how it is run."""

    settings: StageSettings
    manifest: Path
    out: Path
    checkpoints: Path
    encoder: Path | None = None
    study: str = "study"
    tracking: str = OFF  # address of MLflow's server or store
    workers: int = 0  # decoding processes of each training process
    checkpoint_minutes: float = 10.0
    profile: Path | None = None  # where to save a profiler trace of the first steps

    @property
    def label(self) -> str:
        return f"{self.settings.stage} {self.settings.experiment}/seed{self.settings.seed}"

    @property
    def encoder_spec(self) -> str | Path:
        """What `aps.models.weights.load_encoder` takes: a file, `random` or `timm:NAME`."""
        return self.encoder if self.encoder is not None else self.settings.encoder.weights


def restore_finished(job: StageJob) -> bool:
    """Link the outputs of an identical finished run back into place, if its checkpoint folder still has them.

    State that was computed from other images or another training of the encoder is dropped.
    """
    finished, begun, inputs = job.checkpoints / "finished", job.checkpoints / "run.json", _inputs(job)
    if begun.exists() and read_json(begun).get("inputs", inputs) != inputs:
        print(f"{job.label}: its dataset or encoder is another one than last time; starting afresh", file=sys.stderr)
        forget(job.checkpoints)
    if not (finished / "metrics.json").exists():
        return False
    for file in _metrics_last(finished):
        _link(file, job.out / file.name)
    return True


def forget(checkpoints: Path) -> None:
    """Drop a run's saved state, so that the same settings compute it again; a running attempt's mark stays."""
    for path in checkpoints.glob("*"):
        if path.name != "attempt.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def forget_finished(results: Path, metrics: dict[str, Any]) -> None:
    """Drop the saved state of a run whose results have been read."""
    settings = StageSettings.from_json(json.dumps(metrics["settings"]))
    shutil.rmtree(checkpoint_folder(results, settings), ignore_errors=True)


def _inputs(job: StageJob) -> dict[str, Any]:
    """What the results depend on beside the settings: the images and the pretraining that made the encoder."""
    upstream = _upstream(job)
    return {"dataset": read_json(job.manifest)["digest"], "encoder": upstream.get("finished")}


def _upstream(job: StageJob) -> dict[str, Any]:
    """metrics.json beside the encoder's file, where a stage of ours made it."""
    beside = job.encoder.parent / "metrics.json" if job.encoder is not None else None
    return dict(read_json(beside)) if beside is not None and beside.exists() else {}


@dataclass
class StageRun:
    """Journal, tracking and final results of one run. Rank 0 writes; on other ranks every method does nothing."""

    job: StageJob
    _state: dict[str, Any] = field(default_factory=dict)
    _figures: list[Path] = field(default_factory=list)

    def __enter__(self) -> StageRun:
        self.writes = ranks().rank == 0
        self._start = time.monotonic()
        if not self.writes:
            return self
        self.job.checkpoints.mkdir(parents=True, exist_ok=True)
        self._state_file = self.job.checkpoints / "run.json"
        self.journal = self.job.checkpoints / "history.jsonl"
        fresh: dict[str, Any] = {"started": _now(), "seconds": 0.0, "inputs": _inputs(self.job)}
        self._state = read_json(self._state_file) if self._state_file.exists() else fresh
        self._before = float(self._state["seconds"])
        upstream = _upstream(self.job)
        self.tracker = Tracker(
            address=self.job.tracking,
            folder=self.job.checkpoints,
            study=self.job.study,
            name=f"{self.job.settings.experiment}/seed{self.job.settings.seed}/{self.job.settings.stage}",
            params=flatten(self.job.settings.relevant()),
            tags={
                "stage": self.job.settings.stage,
                "experiment": self.job.settings.experiment,
                "seed": str(self.job.settings.seed),
                "dataset": self.job.settings.dataset_name,
                "settings_digest": self.job.settings.digest,
                "encoder": str(self.job.encoder_spec),
                "results": str(self.job.out),
            }
            | ({"encoder_run_id": upstream["mlflow_run_id"]} if upstream.get("mlflow_run_id") else {}),
        )
        self.tracker.start()
        return self

    def resume(self, step: int) -> None:
        """Drop journal lines after `step`: they belong to work that the checkpoint does not hold."""
        if not self.writes or not self.journal.exists():
            return
        lines = [line for line in read_history(self.journal) if line["step"] <= step]
        self.tracker.rewind(len(lines))
        temporary = self.journal.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.journal)

    def log(self, step: int, **values: float) -> None:
        """One line of history.jsonl at `step` (optimizer steps so far unless the stage says otherwise)."""
        if not self.writes:
            return
        line = {"step": step, "time": round(time.time(), 3), **values}
        with self.journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.save_clock()

    def save_clock(self) -> None:
        if self.writes:
            self._state["seconds"] = self._before + time.monotonic() - self._start
            write_json(self._state_file, self._state)

    def figure(self, path: Path) -> None:
        """A picture among the stage's outputs that MLflow should show too."""
        self._figures.append(path)

    def staging(self, name: str) -> Path:
        """Where to write the output `name` before `finish` puts it into the result folder."""
        folder = self.job.checkpoints / "outputs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def finish(self, metrics: dict[str, Any], **extra: Any) -> None:
        """Write metrics.json and put every staged output into the result folder, all files complete."""
        if not self.writes:
            return
        self.journal.touch()
        self.save_clock()
        shutil.copyfile(self.journal, self.staging("history.jsonl"))
        tracked = self.tracker.finish({k: v for k, v in metrics.items() if isinstance(v, int | float)}, self._figures)
        write_json(self.staging("metrics.json"), self._report(metrics, extra, tracked))
        shutil.copyfile(self.tracker.state_file, self.staging("tracking.json"))
        finished = self.job.checkpoints / "finished"
        shutil.rmtree(finished, ignore_errors=True)
        self.staging("metrics.json").parent.replace(finished)
        for file in _metrics_last(finished):
            _link(file, self.job.out / file.name)
        for state in self.job.checkpoints.glob("state-*.pt"):
            state.unlink()
        missing = [name for name in STAGES[self.job.settings.stage].files if not (self.job.out / name).exists()]
        if missing:
            raise RuntimeError(f"{self.job.label} finished without {', '.join(missing)}")
        if not tracked:
            print(
                f"{self.job.label}: MLflow did not take everything; `python -m aps sync` sends it later",
                file=sys.stderr,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writes:
            self.save_clock() if kind is not None else None
            self.tracker.stop(failed=kind is not None)

    def _report(self, metrics: dict[str, Any], extra: dict[str, Any], tracked: bool) -> dict[str, Any]:
        settings = self.job.settings
        manifest = read_json(self.job.manifest)
        upstream = _upstream(self.job)
        return {
            "stage": settings.stage,
            "experiment": settings.experiment,
            "seed": settings.seed,
            "metrics": metrics,
            **extra,
            "settings": settings.relevant(),
            "settings_digest": settings.digest,
            "dataset": {"name": manifest["name"], "digest": manifest["digest"]},
            "encoder": {
                "source": str(self.job.encoder_spec),
                "settings_digest": upstream.get("settings_digest"),
                "finished": upstream.get("finished"),
                "mlflow_run_id": upstream.get("mlflow_run_id"),
            },
            "started": self._state["started"],
            "finished": _now(),
            "wall_seconds": round(self._state["seconds"], 2),
            "mlflow_run_id": self.tracker.run_id,
            "mlflow_complete": tracked,
            **provenance(),
        }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested blocks as `a.b` keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_results(study: Study) -> Iterator[dict[str, Any]]:
    """metrics.json of every finished stage of the study."""
    for experiment, seed, stage in study.jobs():
        path = stage_folder(study.results, experiment, seed, stage) / "metrics.json"
        if path.exists():
            yield read_json(path)


def provenance() -> dict[str, Any]:
    """Version, commit, command and hardware that made a number."""
    packages = {}
    for name in ("torch", "torchvision", "timm", "numpy", "mlflow", "detectron2"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "version": __version__,
        "commit": _commit(),
        "command": " ".join(["python -m aps", *sys.argv[1:2]]),
        "hardware": hardware(),
        "packages": {"python": platform.python_version(), **packages},
    }


def hardware() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    info: dict[str, Any] = {
        "host": platform.node(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processes": ranks().world,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    torch = sys.modules.get("torch")  # only where the stage uses it: the report should not pay for the import
    if torch is not None and torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
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


def _metrics_last(folder: Path) -> list[Path]:
    """metrics.json comes last: where it exists, the stage is complete."""
    return sorted(folder.iterdir(), key=lambda file: file.name == "metrics.json")


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy; never a half-written file."""
    temporary = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); free space or choose another `results` folder"
        ) from None
    os.utime(target)  # outputs must be newer than their inputs


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
