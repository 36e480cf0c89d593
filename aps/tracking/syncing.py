"""What MLflow missed of finished runs, and the report.

Design: the first sign that the server is away ends the waiting; what it refuses of one run does not keep it from the others.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aps.tracking.addresses import OFF, settled
from aps.tracking.describing import describe, finals
from aps.tracking.reasons import in_vain, why
from aps.tracking.sending import Sender
from aps.tracking.server import Server
from aps.tracking.state import State, read_state


@dataclass
class Synced:
    """Of a study's finished runs."""

    sent: int = 0
    missing: int = 0
    reason: str = ""  # why the last of the missing is
    away: bool = False  # whether it is in vain to ask the server more


def sync(runs: Sequence[tuple[Path, Mapping[str, Any]]], address: str, study: str) -> Synced:
    """Send what MLflow misses of finished runs.

    Args:
        runs: the folder of each, with its history.jsonl, and the content of its metrics.json.
        address: of the server or store.
        study: MLflow's experiment, for runs of which nothing is known any more.
    """
    address, found = settled(address), Synced()
    for folder, metrics in runs if address != OFF else ():
        file = folder / "tracking.json"
        state = read_state(file) or State(address=address, about=describe(metrics, study))
        if state.complete and state.address == address:
            continue
        if found.away:
            found.missing += 1
            continue
        if state.address != address:  # it ran without tracking, its results went to another server or were moved
            state.moved(address)
        state.finals = finals(metrics)
        try:
            sender = Sender(state, folder)
            sender.files = sorted(folder.glob("*.png"))
            sender.send()
            found.sent += 1
        except Exception as error:  # whatever a server or a locked database answers
            found.missing += 1
            found.reason, found.away = why(error), in_vain(error)
            label = f"{metrics['stage']} {metrics['experiment']}/seed{metrics['seed']}"
            print(f"{label}: MLflow at {address} did not take it: {found.reason}", file=sys.stderr)
        finally:
            state.write(file)
    return found


def log_report(address: str, study: str, files: Sequence[Path]) -> None:
    """One MLflow run with the study's table and figures; a sentence where the server does not take it."""
    address = settled(address)
    if address == OFF:
        return
    try:
        server = Server(address)
        experiment = server.experiment(study, make=False)
        if experiment is None:
            return
        old = server.client.search_runs([experiment], "tags.stage = 'report'", max_results=1)
        tags = {"stage": "report"}
        run = old[0] if old else server.client.create_run(experiment, run_name="report", tags=tags)
        for file in files:
            server.add_artifact(run, file)
        server.client.set_terminated(run.info.run_id, "FINISHED")
    except Exception as error:
        print(f"MLflow at {address} did not take the report: {why(error)}", file=sys.stderr)
