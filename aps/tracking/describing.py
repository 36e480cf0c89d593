"""What MLflow is told about a run: its name, parameters, tags, description, datasets, cost. Plain data from metrics.json.

Design: an evaluation carries what made it. Beside its own settings stand those of its pretraining and the cost so far, so
that a table, a search or a parallel-coordinates plot over evaluations answers by itself which pretraining is best. Internals
are tags that start with `mlflow.`, which MLflow's page keeps out of sight.

It knows no server and imports no mlflow.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from aps.settings.blocks import SamplingSettings
from aps.tracking.addresses import page, run_page, scrubbed

KEY = "mlflow.aps.key"  # tag by which a run is found again
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
EPOCH = "epoch"
INHERITED = ("pretrain", "sampling", "views")  # blocks of the pretraining that an evaluation's run carries too
LONGEST_TAG, LONGEST_PARAM = 5000, 6000  # letters that MLflow takes
LONGEST_DIGEST = 36


class About(BaseModel):
    """A run before anything is known of its figures."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    study: str  # MLflow's experiment
    name: str
    stage: str
    key: str  # the same for the same job, whatever was lost
    started: int  # ms
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    note: str = ""
    datasets: list[dict[str, str]] = []


def prefix(stage: str) -> str:
    """Of a stage's metrics: the last word of its name (`linear_probe`: probe)."""
    return stage.rpartition("_")[2]


def metric_name(stage: str, key: str) -> str:
    """What a key of history.jsonl or of metrics.json is called in MLflow: `finetune/test_top1`, `knn/top1_k20`.

    The epoch has no stage, so that it can be the axis of every curve.
    """
    if key == EPOCH:
        return EPOCH
    name = key.removeprefix(f"{prefix(stage)}_")
    return f"{prefix(stage)}/{re.sub(r'[^A-Za-z0-9_. /-]', '_', name)}"


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among them."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def finals(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Final figures of metrics.json by MLflow's names, with the cost so far; a setting among them is a parameter already.

    metrics: the content of metrics.json.
    """
    stage, settings = str(metrics["stage"]), metrics["settings"].get(metrics["stage"], {})
    figures = {
        metric_name(stage, key): value for key, value in numbers(metrics["metrics"]).items() if key not in settings
    }
    return figures | {f"cost/{key}": value for key, value in numbers(metrics.get("cost") or {}).items()}


def describe(
    metrics: Mapping[str, Any],
    study: str,
    made: Mapping[str, Any] | None = None,
    description: str = "",
    manifest: Mapping[str, Any] | None = None,
) -> About:
    """What MLflow is told of a run.

    Args:
        metrics: the content of metrics.json, or the part of it that is known when the stage starts: stage, experiment,
            seed, settings, settings_digest, started, dataset, encoder, commit, hardware.
        study: MLflow's experiment.
        made: metrics.json of the pretraining that made its encoder.
        description: of the experiment.
        manifest: of its dataset.
    """
    stage, experiment, seed = str(metrics["stage"]), str(metrics["experiment"]), metrics["seed"]
    name = f"{experiment}/seed{seed}/{stage}"
    return About(
        study=study,
        name=name,
        stage=stage,
        key=_digest(study, name, metrics["settings_digest"], metrics["started"]),
        started=_milliseconds(metrics["started"]),
        params=parameters(metrics["settings"], made["settings"] if made else None),
        tags=_tags(metrics, made),
        note=description,
        datasets=[_dataset(metrics, manifest or {})] if metrics.get("dataset") else [],
    )


def inherit(settings: Mapping[str, Any], made: Mapping[str, Any] | None) -> dict[str, Any]:
    """Blocks of a run's settings and, where it has none of its own, those of the pretraining that made its encoder."""
    theirs = made or {}
    return {**settings, **{block: theirs[block] for block in INHERITED if block in theirs and block not in settings}}


def parameters(settings: Mapping[str, Any], made: Mapping[str, Any] | None) -> dict[str, str]:
    """Settings that the run depends on, as `block.key`, with those of its pretraining, and `method` for short."""
    stage = settings["stage"]
    tree = inherit({key: value for key, value in settings.items() if key not in ("stage", "upstream")}, made)
    if isinstance(tree.get("sampling"), Mapping):
        unread = SamplingSettings.unread(tree["sampling"].get("strategy", ""))
        tree["sampling"] = {key: value for key, value in tree["sampling"].items() if key not in unread}
    flat = {key: value for key, value in _flat(tree) if value is not None}
    if made and made.get("dataset") != settings.get("dataset") and made.get("dataset"):
        flat["pretrain.dataset"] = made["dataset"]["name"]
    if "pretrain.method" in flat:
        flat["method"] = flat["pretrain.method"]
    elif stage != "pretrain" and "encoder.weights" in flat:
        flat["method"] = "none" if flat["encoder.weights"] == "random" else flat["encoder.weights"]
    return {key: str(value)[:LONGEST_PARAM] for key, value in flat.items()}


def _tags(metrics: Mapping[str, Any], made: Mapping[str, Any] | None) -> dict[str, str]:
    hardware, encoder = metrics.get("hardware") or {}, metrics.get("encoder") or {}
    commit, _, dirty = str(metrics.get("commit") or "").partition("-dirty")
    tags = {
        "stage": metrics["stage"],
        "experiment": metrics["experiment"],
        "seed": metrics["seed"],
        "dataset": (metrics.get("dataset") or {}).get("name"),
        "slurm_job": hardware.get("slurm_job"),
        "machine": hardware.get("gpu") or hardware.get("cpu"),
        "mlflow.user": _user(),
        "mlflow.source.name": metrics.get("command"),
        "mlflow.source.type": "JOB" if hardware.get("slurm_job") else "LOCAL",
        "mlflow.source.git.commit": commit or None,
        "mlflow.source.git.dirty": "true"
        if commit and dirty is not None and "-dirty" in str(metrics["commit"])
        else None,
        "mlflow.aps.settings_digest": metrics["settings_digest"],
        "mlflow.aps.dataset_digest": (metrics.get("dataset") or {}).get("digest"),
        "mlflow.aps.encoder": encoder.get("source"),
        "mlflow.aps.encoder_digest": encoder.get("sha256"),
        "mlflow.aps.host": hardware.get("host"),
        "mlflow.aps.version": metrics.get("version"),
        "pretraining": f"{made['experiment']}/seed{made['seed']}/{made['stage']}" if made else None,
        "encoder_run_id": made.get("mlflow_run_id") if made else None,
        PARENT: made.get("mlflow_run_id") if made else None,  # MLflow's page links both ways
    }
    return {key: scrubbed(str(value))[:LONGEST_TAG] for key, value in tags.items() if value not in (None, "")}


def note(about: About, experiment_id: str, run_id: str) -> str:
    """The description on the run's page: the experiment's, with links to what it was made from and what was made of it."""
    parts = [about.note]
    if PARENT in about.tags:
        parts.append(f"Its encoder: [{about.tags['pretraining']}]({run_page(experiment_id, about.tags[PARENT])})")
    if about.stage == "pretrain":
        made_of_it = page(experiment_id, search=f"tags.`{PARENT}` = '{run_id}'")
        parts.append(f"[What was made of its encoder]({made_of_it})")
    return "\n\n".join(part for part in parts if part)


def command() -> str:
    """The command line of this process, without secrets."""
    return scrubbed(shlex.join(["python -m aps", *sys.argv[1:]]).replace("'python -m aps'", "python -m aps", 1))


def _dataset(metrics: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """Of MLflow's kind: name, digest, source, and a profile of what its manifest says."""
    dataset = metrics["dataset"]
    source = manifest.get("source") or manifest.get("origin") or dataset["name"]
    profile = {split: content.get("count") for split, content in (manifest.get("splits") or {}).items()}
    profile |= {"classes": len(manifest["classes"])} if manifest.get("classes") else {}
    return {
        "name": str(dataset["name"]),
        "digest": str(dataset["digest"])[:LONGEST_DIGEST],
        "source_type": "local" if manifest.get("source") else "external",
        "source": scrubbed(json.dumps({"uri": str(source)})),
        "profile": json.dumps(profile),
        "context": "train" if metrics["stage"] == "pretrain" else "train and test",
    }


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]


def _milliseconds(started: str) -> int:
    return int(datetime.fromisoformat(started).timestamp() * 1000)


def _user() -> str | None:
    """None where the machine has no name for it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return os.environ.get("USER")
