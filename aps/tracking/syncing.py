"""Sends what MLflow lacks of a study's finished runs, the study's report, and the views of its page.

Design: if the server can't be reached, no further run is tried. If it refuses one run, the others are still sent.
That a run was sent once does not say that MLflow still has it: a database may be lost, or brought back from a copy. So
MLflow is asked, once for all runs of an experiment. What is gone is sent again; what a person deleted stays deleted.
And what is known of a run may change: an evaluation is linked to its pretraining once MLflow has that, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from aps.errors import UserError
from aps.files import read_json, write_json
from aps.layout import makers_of, manifest_of, stage_folder, study_folder
from aps.seals import found_metrics, makers_of_run, seal
from aps.settings.study import Study
from aps.text import listed, number_of
from aps.tracking.addresses import OFF, settled
from aps.tracking.describing import RESULTS, About, describe, finals, milliseconds, renewed
from aps.tracking.reasons import why, will_last
from aps.tracking.sending import Sender, pictures
from aps.tracking.server import Server
from aps.tracking.state import State, read_state, results_name
from aps.tracking.views import View, tags, views_of

MOST_NAMES = 3  # of deleted runs, in a sentence


@dataclass
class Synced:
    """What was sent of a study's finished runs."""

    sent: int = 0
    missing: int = 0
    reason: str = ""  # why the last of the missing runs was not sent
    away: bool = False  # whether the server can't be used, so that further requests are useless
    unasked: bool = False  # whether MLflow did not say which runs it has, for the reason above
    deleted: list[str] = field(default_factory=list)  # names of runs that somebody deleted in MLflow


def sync(study: Study, address: str) -> Synced:
    """Send what MLflow lacks of a study's finished runs.

    Prints a sentence for each run that could not be sent, and one about those that were deleted in MLflow.
    """
    address, synced = settled(address), Synced()
    held = cache(lambda experiment: _held(study, address, experiment))
    makers_first = sorted(study.jobs(), key=lambda job: len(list(makers_of(study, job))))
    for experiment, seed, stage in makers_first if address != OFF else ():
        folder = stage_folder(study_folder(study), experiment, seed, stage)
        if metrics := found_metrics(folder):
            description = study.experiments[experiment].description
            makers = makers_of_run(metrics, folder)
            about = describe(
                metrics,
                study.study,
                makers[0] if makers else None,
                description,
                _manifest(study, metrics),
                results_name(study.results),
                makers[1:],
            )
            _sync_run(about, address, folder, metrics, synced, held)
    if synced.deleted:
        print(
            f"MLflow at {address}: {number_of(len(synced.deleted), 'run')} of study '{study.study}' had been deleted there "
            f"and stay so ({listed(synced.deleted, MOST_NAMES)}); to have them back, restore them on its page (State: Deleted)",
            file=sys.stderr,
        )
    return synced


def _held(study: Study, address: str, experiment: str) -> dict[str, Any]:
    """MLflow's runs of an experiment, deleted ones too, by their ids. Empty if there is no such experiment.

    Raises:
        Exception: any of mlflow's, if a request fails.
    """
    server = Server(address)
    server.experiment(study.study, make=False)  # one that was deleted is restored, and its runs with it
    return {run.info.run_id: run for run in server.runs(experiment, deleted=True)}


def _sync_run(
    about: About,
    address: str,
    folder: Path,
    metrics: dict[str, Any],
    synced: Synced,
    held: Callable[[str], dict[str, Any]],
) -> None:
    """Send what MLflow lacks of a run. held: gives MLflow's runs of an experiment, by their ids."""
    file = folder / "tracking.json"
    state = read_state(file)
    if state is None or state.about.key != about.key:
        state = State(address=address, about=about)
    run = None  # MLflow's, if it has the run whole
    if state.complete and state.address == address:
        if synced.unasked:
            return
        try:
            run = held(str(state.experiment_id)).get(str(state.run_id))
        except Exception as error:  # anything that a server or a locked database may raise
            synced.reason, synced.away, synced.unasked = why(error), will_last(error), True
            print(f"MLflow at {address} does not say which runs it has: {synced.reason}", file=sys.stderr)
            return
        if run is not None:
            if run.info.lifecycle_stage == "deleted":
                synced.deleted.append(about.name)
                return
            about = renewed(state.about, about)
            if about == state.about:
                return
    if synced.away:
        synced.missing += 1
        return
    sender = Sender(state, folder)
    try:
        if run is not None:
            sender.renew(run, about)
        else:
            state.moved(address)  # the run had no tracking or another server, or its results were moved
            state.about, state.finals = about, finals(metrics)
            # Else MLflow shows the time until now as its duration. metrics.json has whole seconds; its last lines came later.
            state.ended = state.ended or milliseconds(metrics["finished"]) + 999
            sender.files = pictures(folder)
            sender.send()
        synced.sent += 1
    except Exception as error:  # anything that a server or a locked database may raise
        synced.missing += 1
        synced.reason, synced.away = why(error), will_last(error)
        print(f"{about.name}: MLflow at {address} did not take it: {synced.reason}", file=sys.stderr)
    finally:
        state.write(file)
    entries = {"mlflow_run_id": state.run_id, "mlflow_complete": state.complete}
    if entries.items() - {key: metrics.get(key) for key in entries}.items():
        write_json(folder / "metrics.json", seal(metrics | entries))


def _manifest(study: Study, metrics: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run's dataset; empty if it is gone or has changed since."""
    try:
        manifest = read_json(manifest_of(study, metrics["dataset"]["name"]))
        return dict(manifest) if manifest["digest"] == metrics["dataset"]["digest"] else {}
    except (UserError, KeyError, TypeError, ValueError):
        return {}


def log_report(study: Study, address: str, files: Sequence[Path]) -> None:
    """Send the report's files as one run, and the study's views. If that fails, print a sentence."""
    address = settled(address)
    if address == OFF:
        return
    try:
        server = Server(address)
        experiment = server.experiment(study.study, make=False)
        if experiment is None:
            return
        run = _report_run(server, experiment, results_name(study.results))
        for file in files:
            server.add_artifact(run, file)
        server.client.set_terminated(run.info.run_id, "FINISHED")
        show_views(study, server, experiment)
    except Exception as error:
        print(f"MLflow at {address} did not take the report: {why(error)}", file=sys.stderr)


def _report_run(server: Server, experiment: str, results: str) -> Any:
    """The run of a results folder's report: its own, else one of an earlier version, which is of no folder, or a new one."""
    found = {run.data.tags.get(RESULTS): run for run in server.runs(experiment, "tags.stage = 'report'")}
    run = found.get(results) or found.get(None)
    if run is None:
        return server.client.create_run(experiment, run_name="report", tags={"stage": "report", RESULTS: results})
    if RESULTS not in run.data.tags:
        server.client.set_tag(run.info.run_id, RESULTS, results)
    return run


def show_views(study: Study, server: Server, experiment: str) -> None:
    """Write the views of the study's page to MLflow. A sentence says whether runs of other results folders are there.

    A view then has a row for each folder: an average over both would count each seed twice.
    """
    results, views, others = results_name(study.results), list[View](), set[str]()
    for view in views_of(study):
        found = server.client.search_runs(
            [experiment], f"{view.search} and tags.{RESULTS} != '{results}'", max_results=1
        )
        others |= {run.data.tags[RESULTS] for run in found}
        views.append(replace(view, apart=bool(found)))
    if others:
        print(
            f"MLflow at {server.address}: study '{study.study}' has runs of other results there too "
            f"({listed(sorted(others), MOST_NAMES)}), which its tables show apart; search for tags.{RESULTS} = '{results}' "
            "to see these alone",
            file=sys.stderr,
        )
    existing = server.client.get_experiment(experiment).tags
    for key, value in tags(views, experiment).items():
        if existing.get(key) != value:
            server.client.set_experiment_tag(experiment, key, value)
