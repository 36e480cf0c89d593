"""What MLflow missed of a study's finished runs, its report, and what its page opens with.

Design: the first sign that the server is away ends the waiting; what it refuses of one run does not keep it from the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.files import read_json, write_json
from aps.layout import manifest_of, stage_folder, study_folder
from aps.seals import read_metrics, seal
from aps.settings.study import Study
from aps.tracking.addresses import OFF, settled
from aps.tracking.describing import About, describe, finals
from aps.tracking.reasons import in_vain, why
from aps.tracking.sending import Sender, pictures
from aps.tracking.server import Server
from aps.tracking.state import State, read_state
from aps.tracking.views import tags, views_of


@dataclass
class Synced:
    """Of a study's finished runs."""

    sent: int = 0
    missing: int = 0
    reason: str = ""  # why the last of the missing is
    away: bool = False  # whether it is in vain to ask the server more


def sync(study: Study, address: str) -> Synced:
    """Send what MLflow misses of a study's finished runs, a sentence on standard error for each that it does not take."""
    address, found = settled(address), Synced()
    pretrained_first = sorted(study.jobs(), key=lambda job: job[2] != "pretrain")
    for experiment, seed, stage in pretrained_first if address != OFF else ():
        folder = stage_folder(study_folder(study), experiment, seed, stage)
        if metrics := _metrics(folder):
            description = study.experiments[experiment].description
            about = describe(metrics, study.study, maker(metrics, folder), description, _manifest(study, metrics))
            _sync_run(about, address, folder, metrics, found)
    return found


def _metrics(folder: Path) -> dict[str, Any]:
    """Of a finished run; empty where there is none, or a damaged one, which the report speaks of."""
    try:
        return read_metrics(folder / "metrics.json")
    except UserError:
        return {}


def _sync_run(about: About, address: str, folder: Path, metrics: dict[str, Any], found: Synced) -> None:
    file = folder / "tracking.json"
    state = read_state(file)
    if state is None or state.about.key != about.key:
        state = State(address=address, about=about)
    if state.complete and state.address == address:
        return
    if found.away:
        found.missing += 1
        return
    state.moved(address)  # it ran without tracking, its results went to another server, or were moved
    state.about, state.finals = about, finals(metrics)
    try:
        sender = Sender(state, folder)
        sender.files = pictures(folder)
        sender.send()
        found.sent += 1
    except Exception as error:  # whatever a server or a locked database answers
        found.missing += 1
        found.reason, found.away = why(error), in_vain(error)
        print(f"{about.name}: MLflow at {address} did not take it: {found.reason}", file=sys.stderr)
    finally:
        state.write(file)
    said = {"mlflow_run_id": state.run_id, "mlflow_complete": state.complete}
    if said.items() - {key: metrics.get(key) for key in said}.items():
        write_json(folder / "metrics.json", seal(metrics | said))


def maker(metrics: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """metrics.json of the pretraining that made a run's encoder, where it is still the same one."""
    encoder = metrics.get("encoder") or {}
    source = Path(encoder.get("source") or "")
    candidates = (source.parent, folder.parent / "pretrain")  # results may have been moved
    for candidate in candidates if encoder.get("sha256") else ():
        made = _metrics(candidate)
        if made and made["files"].get(source.name, {}).get("sha256") == encoder["sha256"]:
            return made
    return None


def _manifest(study: Study, metrics: dict[str, Any]) -> dict[str, Any]:
    """Of a run's dataset, where it is there still; empty where it is another one now."""
    try:
        manifest = read_json(manifest_of(study, metrics["dataset"]["name"]))
        return dict(manifest) if manifest["digest"] == metrics["dataset"]["digest"] else {}
    except (UserError, KeyError, TypeError, ValueError):
        return {}


def log_report(study: Study, address: str, files: Sequence[Path]) -> None:
    """The study's table and figures as one run, and its views; a sentence where the server does not take it."""
    address = settled(address)
    if address == OFF:
        return
    try:
        server = Server(address)
        experiment = server.experiment(study.study, make=False)
        if experiment is None:
            return
        old = server.client.search_runs([experiment], "tags.stage = 'report'", max_results=1)
        mark = {"stage": "report"}
        run = old[0] if old else server.client.create_run(experiment, run_name="report", tags=mark)
        for file in files:
            server.add_artifact(run, file)
        server.client.set_terminated(run.info.run_id, "FINISHED")
        show_views(study, server, experiment)
    except Exception as error:
        print(f"MLflow at {address} did not take the report: {why(error)}", file=sys.stderr)


def show_views(study: Study, server: Server, experiment: str) -> None:
    """Tell MLflow what its page of the study opens with."""
    has = server.client.get_experiment(experiment).tags
    for key, value in tags(views_of(study), experiment).items():
        if has.get(key) != value:
            server.client.set_experiment_tag(experiment, key, value)
