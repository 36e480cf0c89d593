"""The state of each run of a study: done, running, queued, failed or outdated. `python -m aps status`.

    done      its result counts for the study (`aps.findings`)
    running   a process is at work in the folder of its run; its journal says how far it is
    failed    it began, was not asked to stop, and no process is at work on it
    outdated  there is a result, but of other settings, images or another encoder
    queued    all others: not begun, waiting for their inputs, or stopped and to be continued

It reads only files, and asks neither Snakemake nor Slurm. So it works while the study runs, from any machine that sees
the results folder. It imports nothing heavy; `aps.report.states` draws the picture.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from aps.errors import UserError
from aps.files import read_json, sha256
from aps.findings import Finding, Findings
from aps.journal import read_history
from aps.layout import encoder_file, encoder_job, log_file, maker_of, manifest_of, run_folder, study_folder
from aps.progress import clock
from aps.results import run_key
from aps.runtime.slurm import ATTEMPT, running_attempt
from aps.settings.study import Study
from aps.stages import STAGES
from aps.text import number_of, shorten, table_lines

DONE, RUNNING, QUEUED, FAILED, OUTDATED = STATES = ("done", "running", "queued", "failed", "outdated")
LONGEST_LINE = 160  # letters of a log's line
TAIL = 20_000  # bytes read from the end of a log


Job = tuple[str, int, str]  # experiment, seed, stage


class Status(NamedTuple):
    """The state of one run."""

    experiment: str
    seed: int
    stage: str
    state: str  # one of STATES
    note: str = ""  # why it failed or is outdated, or what it waits for
    share: float | None = None  # of its work that is done, if it is running and its journal tells
    left: float | None = None  # seconds, if it is running and its journal tells

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


def status_of(study: Study, now: float | None = None, findings: Findings | None = None) -> list[Status]:
    """The state of every run, in the study's order. `now` is in seconds since 1970; `findings` are those of the study."""
    findings, statuses = findings or Findings(study, sources=True), dict[Job, Status]()
    now = time.time() if now is None else now
    for job in study.jobs():
        statuses[job] = _status(study, findings, findings.finding(*job), now)
    return [_with_failed_input(study, status, statuses) for status in statuses.values()]


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
    last = last_line(log)
    if log.exists() and not last.startswith("stopped") and (began or last.startswith("error:") or "Error" in last):
        killed = folder is not None and (folder / ATTEMPT).exists()
        return Status(*job, FAILED, f"{'killed; ' if killed else ''}{last or 'its log is empty'} ({log})")
    if began:
        share, _ = _progress(study, job, folder, now) if folder is not None else (None, None)
        return Status(
            *job, QUEUED, f"stopped{f' at {share:.0%}' if share is not None else ''}, goes on from its last checkpoint"
        )
    return Status(*job, QUEUED)


def _with_failed_input(study: Study, status: Status, statuses: dict[Job, Status]) -> Status:
    """The status of a queued run, with a note if the run that makes its encoder failed."""
    maker = maker_of(study, (status.experiment, status.seed, status.stage))
    upstream = statuses.get(maker) if maker is not None else None
    if status.state == QUEUED and not status.note and upstream is not None and upstream.state == FAILED:
        return status._replace(note=f"waits for {upstream.label}, which failed")
    return status


def _folder_of(study: Study, findings: Findings, experiment: str, seed: int, stage: str) -> Path | None:
    """The folder of a run; None if its inputs are not there yet, so that it can't have begun."""
    settings = study.stage_settings(experiment, seed, stage)
    try:
        images = str(read_json(manifest_of(study, settings.dataset_name))["digest"])
        encoder = None
        if STAGES[stage].encoder:
            file, maker = encoder_file(study, experiment, seed), encoder_job(study, experiment, seed)
            if file is not None and maker is not None:
                upstream = findings.finding(*maker).metrics
                if upstream is None:
                    return None
                encoder = str(upstream["files"][file.name]["sha256"])
            elif file is not None:
                encoder = sha256(file)
    except (UserError, OSError, KeyError, TypeError):
        return None
    return run_folder(study.results, stage, run_key(settings, images, encoder))


def _progress(study: Study, job: Job, folder: Path, now: float) -> tuple[float | None, float | None]:
    """The share that is done by the journal's last line, and the seconds that are left at the pace so far."""
    share, logged = None, 0.0
    for line in read_history(folder / "history.jsonl"):
        if (share_at_line := _share(study.stage_settings(*job), line)) is not None:
            share, logged = share_at_line, float(line.get("time", now))
    if not share:
        return None, None
    try:
        worked = float(read_json(folder / "run.json")["seconds"])  # over all attempts, when that line was written
    except (UserError, KeyError, TypeError, ValueError):
        return share, None
    return share, max(0.0, worked / share * (1 - share) - max(0.0, now - logged))


def _share(settings: Any, line: dict[str, Any]) -> float | None:
    """The share of the stage that is done at a line of the journal; None if the line does not tell."""
    block = getattr(settings, settings.stage)
    budget = getattr(block, "budget", None)
    for key, total in (
        ("flops", getattr(budget, "flops", None)),
        ("seconds", 60 * minutes if (minutes := getattr(budget, "minutes", None)) else None),
        ("epoch", getattr(block, "epochs", None) if budget is None else None),
        ("step", getattr(block, "iterations", None)),
    ):
        value = line.get(key)
        if total and isinstance(value, int | float):
            return min(1.0, float(value) / float(total))
    return None


def last_line(log: Path) -> str:
    """The last line of a log that starts with `error:`, or else its last line."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [" ".join(line.split()) for line in text.replace("\r", "\n").splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    return shorten(last, LONGEST_LINE)


# --------------------------------------------------------------------------------------------------


def counts(statuses: list[Status]) -> str:
    """`20 done, 1 running, 3 queued`."""
    count = Counter(status.state for status in statuses)
    return ", ".join(f"{count[state]} {state}" for state in STATES if count[state])


def text(study: Study, statuses: list[Status]) -> str:
    """A table for the terminal: a row for each experiment and seed, a column for each stage; then the notes on runs."""
    stages = [stage for stage in STAGES if any(status.stage == stage for status in statuses)]
    by_job = {(status.experiment, status.seed, status.stage): status for status in statuses}
    body = [
        [name, str(seed), *(_cell(by_job.get((name, seed, stage))) for stage in stages)]
        for name, experiment in study.experiments.items()
        for seed in experiment.seeds
    ]
    lines = [
        f"Study '{study.study}': {number_of(len(statuses), 'run')}: {counts(statuses)}",
        "",
        *table_lines(["experiment", "seed", *stages], body),
    ]
    for state in (RUNNING, FAILED, OUTDATED, QUEUED):
        notes = [(status.label, status.progress or status.note) for status in statuses if status.state == state]
        notes = [(label, note) for label, note in notes if note]
        lines += ["", state, *(f"  {label}: {note}" for label, note in notes)] if notes else []
    return "\n".join(lines)


def _cell(status: Status | None) -> str:
    if status is None:
        return ""
    return (
        f"{status.state} {status.share:.0%}" if status.state == RUNNING and status.share is not None else status.state
    )
