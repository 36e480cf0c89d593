"""What has become of each run of a study: done, running, queued, failed or outdated. `python -m aps status`.

    done      its figures are the study's (`aps.findings`)
    running   a process is at work in the folder of its run; how far it is says its journal
    failed    it began and was not asked to stop, and nobody is at work on it
    outdated  there is a result, but of other settings, images or another encoder
    queued    all the others: not begun, waiting for what they need, or stopped and to be gone on with

Nothing is asked of Snakemake or of Slurm, only files are read, so it works from any machine that sees the results folder,
while the study runs. It imports nothing heavy; `aps.report.states` draws the picture.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from aps.columns import columns_of
from aps.errors import UserError
from aps.files import read_json, sha256
from aps.findings import Finding, Findings
from aps.journal import read_history
from aps.layout import encoder_file, log_file, manifest_of, run_folder, study_folder
from aps.progress import clock
from aps.results import run_key
from aps.runtime.slurm import running_attempt
from aps.settings.study import Study
from aps.stages import STAGES

DONE, RUNNING, QUEUED, FAILED, OUTDATED = STATES = ("done", "running", "queued", "failed", "outdated")
LETTERS = 160  # of a line of a log
TAIL = 20_000  # bytes of a log's end


class Status(NamedTuple):
    """Of one run."""

    experiment: str
    seed: int
    stage: str
    state: str  # one of STATES
    note: str = ""  # why it failed or is outdated, what it waits for
    share: float | None = None  # of a running or stopped run that is done, where its journal says it
    left: float | None = None  # seconds, of a running one

    @property
    def label(self) -> str:
        return f"{self.stage} {self.experiment}/seed{self.seed}"

    @property
    def progress(self) -> str:
        parts = [
            f"{self.share:.0%}" if self.share is not None else "",
            f"{clock(self.left)} left" if self.left is not None else "",
        ]
        return ", ".join(part for part in parts if part)


def status_of(study: Study, now: float | None = None) -> list[Status]:
    """Of every run, in the study's order. now: seconds since 1970."""
    findings, found = Findings(study), dict[tuple[str, int, str], Status]()
    now = time.time() if now is None else now
    for experiment, seed, stage in study.jobs():
        found[experiment, seed, stage] = _status(study, findings, findings.of(experiment, seed, stage), now)
    return [_waiting(study, one, found) for one in found.values()]


def _status(study: Study, findings: Findings, finding: Finding, now: float) -> Status:
    job = (finding.experiment, finding.seed, finding.stage)
    if finding.metrics is not None:
        return Status(*job, DONE)
    folder = _folder_of(study, findings, *job)
    log = log_file(study_folder(study), *job)
    if folder is not None and running_attempt(folder) is not None:
        share, left = _progress(study, job, folder, now)
        return Status(*job, RUNNING, "" if share is not None else last_line(log), share, left)
    if finding.stale:
        return Status(*job, OUTDATED, finding.reason)
    if folder is not None and (folder / "finished" / "metrics.json").exists():
        return Status(*job, QUEUED, "its saved run is finished and comes back at once")
    began = folder is not None and (folder / "run.json").exists()
    said = last_line(log)
    if log.exists() and not said.startswith("stopped") and (began or said.startswith("error:") or "Error" in said):
        killed = folder is not None and (folder / "attempt.json").exists()
        return Status(*job, FAILED, f"{'killed; ' if killed else ''}{said or 'its log is empty'} ({log})")
    if began:
        share, _ = _progress(study, job, folder, now) if folder is not None else (None, None)
        return Status(
            *job, QUEUED, f"stopped{f' at {share:.0%}' if share is not None else ''}, goes on from its last checkpoint"
        )
    return Status(*job, QUEUED)


def _waiting(study: Study, one: Status, found: dict[tuple[str, int, str], Status]) -> Status:
    """A queued run whose encoder can't be made says so."""
    source = study.pretrain_source(one.experiment) if STAGES[one.stage].encoder else None
    made = found.get((source, one.seed, "pretrain")) if source is not None else None
    if one.state == QUEUED and not one.note and made is not None and made.state == FAILED:
        return one._replace(note=f"waits for {made.label}, which failed")
    return one


def _folder_of(study: Study, findings: Findings, experiment: str, seed: int, stage: str) -> Path | None:
    """Where a run keeps its state; None where what it starts from is still to be made, so that it can't have begun."""
    settings = study.stage_settings(experiment, seed, stage)
    try:
        images = str(read_json(manifest_of(study, settings.dataset_name))["digest"])
        encoder = None
        if STAGES[stage].encoder:
            source = study.pretrain_source(experiment)
            if source is not None:
                made = findings.of(source, seed, "pretrain").metrics
                if made is None:
                    return None
                encoder = str(made["files"]["encoder.safetensors"]["sha256"])
            elif (file := encoder_file(study, experiment, seed)) is not None:
                encoder = sha256(file)
    except (UserError, OSError, KeyError, TypeError):
        return None
    return run_folder(study.results, stage, run_key(settings, images, encoder))


def _progress(study: Study, job: tuple[str, int, str], folder: Path, now: float) -> tuple[float | None, float | None]:
    """Share that is done by the journal's last line, and seconds that are left at the pace so far."""
    share, logged = None, 0.0
    for line in read_history(folder / "history.jsonl"):
        if (found := _share(study.stage_settings(*job), line)) is not None:
            share, logged = found, float(line.get("time", now))
    if not share:
        return None, None
    try:
        worked = float(read_json(folder / "run.json")["seconds"])  # over all attempts, when that line was written
    except (UserError, KeyError, TypeError, ValueError):
        return share, None
    return share, max(0.0, worked / share * (1 - share) - max(0.0, now - logged))


def _share(settings: Any, line: dict[str, Any]) -> float | None:
    """Of the stage that is done at a line of the journal; None where the line does not say it."""
    block = getattr(settings, settings.stage)
    budget = getattr(block, "budget", None)
    for key, whole in (
        ("flops", getattr(budget, "flops", None)),
        ("seconds", 60 * minutes if (minutes := getattr(budget, "minutes", None)) else None),
        ("epoch", getattr(block, "epochs", None) if budget is None else None),
        ("step", getattr(block, "iterations", None)),
    ):
        value = line.get(key)
        if whole and isinstance(value, int | float):
            return min(1.0, float(value) / float(whole))
    return None


def last_line(log: Path) -> str:
    """What a log says last: its last sentence of an error, else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [" ".join(line.split()) for line in text.replace("\r", "\n").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    return said if len(said) <= LETTERS else f"{said[: LETTERS - 1]}…"


# --------------------------------------------------------------------------------------------------


def counts(found: list[Status]) -> str:
    """`20 done, 1 running, 3 queued`."""
    count = Counter(one.state for one in found)
    return ", ".join(f"{count[state]} {state}" for state in STATES if count[state])


def text(study: Study, found: list[Status]) -> str:
    """For the terminal: a line for each experiment and seed, a column for each stage, then what is to be said of runs."""
    stages = [stage for stage in STAGES if any(one.stage == stage for one in found)]
    by = {(one.experiment, one.seed, one.stage): one for one in found}
    body = [
        [name, str(seed), *(_cell(by.get((name, seed, stage))) for stage in stages)]
        for name, experiment in study.experiments.items()
        for seed in experiment.seeds
    ]
    lines = [
        f"Study '{study.study}': {len(found)} runs: {counts(found)}",
        "",
        *columns_of(["experiment", "seed", *stages], body),
    ]
    for state in (RUNNING, FAILED, OUTDATED, QUEUED):
        said = [(one.label, one.progress or one.note) for one in found if one.state == state]
        said = [(label, note) for label, note in said if note]
        lines += ["", state, *(f"  {label}: {note}" for label, note in said)] if said else []
    return "\n".join(lines)


def _cell(one: Status | None) -> str:
    if one is None:
        return ""
    return f"{one.state} {one.share:.0%}" if one.state == RUNNING and one.share is not None else one.state
