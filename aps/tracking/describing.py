"""Describes a run for MLflow: name, parameters, tags, description, datasets, cost. Plain data, made from metrics.json.

Design: an evaluation also has the settings and the cost of its pretraining. So a table, a search or a
parallel-coordinates plot over evaluations shows which pretraining is best. Internal tags start with `mlflow.`, which
MLflow's page hides.

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
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from aps.settings.blocks import SamplingSettings
from aps.tracking.addresses import page, run_page, scrubbed

KEY = "mlflow.aps.key"  # the tag that identifies a run
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
USER = "mlflow.user"
RESULTS = "results_folder"  # the tag with the name of the results folder: two people may run one study
SUPERSEDED = " (superseded)"  # behind the tag `stage` of a run whose results were replaced
SUPERSEDED_BY = "superseded_by"  # the tag with the id of the run in its place
EPOCH = "epoch"
INHERITED = ("finetune", "pretrain", "sampling", "views")  # blocks of those who made its encoder that a run also has
LONGEST_TAG, LONGEST_PARAM = 5000, 6000  # letters that MLflow takes
LONGEST_DIGEST = 36


class About(BaseModel):
    """The description of a run, without its metrics."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    study: str  # MLflow's experiment
    name: str
    stage: str
    key: str  # identifies the job: the same in every attempt
    started: int  # ms
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    note: str = ""
    datasets: list[dict[str, str]] = []


def prefix(stage: str) -> str:
    """The prefix of a stage's metrics in MLflow: the last word of its name (`linear_probe`: probe)."""
    return stage.rpartition("_")[2]


def metric_name(stage: str, key: str) -> str:
    """The name in MLflow of a key of history.jsonl or metrics.json: `finetune/test_top1`, `knn/top1_k20`.

    The epoch has no prefix, so that it can be the axis of every curve.
    """
    if key == EPOCH:
        return EPOCH
    name = key.removeprefix(f"{prefix(stage)}_")
    return f"{prefix(stage)}/{re.sub(r'[^A-Za-z0-9_. /-]', '_', name)}"


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are finite numbers."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def finals(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The final metrics and the cost, by their names in MLflow. Settings among them are left out: they are parameters.

    metrics: the content of metrics.json.
    """
    stage, settings = str(metrics["stage"]), metrics["settings"].get(metrics["stage"], {})
    scores = {
        metric_name(stage, key): value for key, value in numbers(metrics["metrics"]).items() if key not in settings
    }
    return scores | {f"cost/{key}": value for key, value in numbers(metrics.get("cost") or {}).items()}


def describe(
    metrics: Mapping[str, Any],
    study: str,
    pretraining: Mapping[str, Any] | None = None,
    description: str = "",
    manifest: Mapping[str, Any] | None = None,
    results: str | None = None,
    before: Sequence[Mapping[str, Any]] = (),
) -> About:
    """The description of a run.

    Args:
        metrics: the content of metrics.json, or the entries that are known when the stage starts: stage, experiment,
            seed, settings, settings_digest, started, dataset, encoder, commit, hardware.
        study: MLflow's experiment.
        pretraining: metrics.json of the run that made its encoder, a pretraining mostly.
        description: description of the experiment.
        manifest: content of its dataset's manifest.
        results: name of the results folder (`aps.tracking.state.results_name`).
        before: metrics.json of the runs that made that one's encoder, nearest first.
    """
    stage, experiment, seed = str(metrics["stage"]), str(metrics["experiment"]), metrics["seed"]
    name = f"{experiment}/seed{seed}/{stage}"
    return About(
        study=study,
        name=name,
        stage=stage,
        key=_digest(study, name, metrics["settings_digest"], metrics["started"]),
        started=milliseconds(metrics["started"]),
        params=parameters(metrics["settings"], *(made["settings"] for made in (pretraining, *before) if made)),
        tags=_tags(metrics, pretraining) | ({RESULTS: results} if results else {}),
        note=description,
        datasets=[_dataset(metrics, manifest or {})] if metrics.get("dataset") else [],
    )


def renewed(sent: About, now: About) -> About:
    """The description of a run that was sent before, with what has changed since. It is equal to `sent` if nothing has.

    What is known no longer stays, such as a pretraining that was replaced, and so does who made the run, whoever sends
    it now. A parameter of MLflow's cannot change.
    """
    tags = sent.tags | now.tags
    if USER in sent.tags:
        tags[USER] = sent.tags[USER]
    return sent.model_copy(update={"params": now.params | sent.params, "tags": tags, "note": now.note})


def inherit(settings: Mapping[str, Any], *makers: Mapping[str, Any] | None) -> dict[str, Any]:
    """A run's settings, with those blocks of its makers' settings that the run does not have.

    makers: settings of the runs that made its encoder, nearest first: of a finetuning, say, and of the pretraining before
    it. Another dataset than the run's stands in the maker's own block, as `pretrain.dataset`.
    """
    tree = dict(settings)
    for maker in filter(None, makers):
        blocks = {name: maker[name] for name in INHERITED if name in maker and name not in tree}
        stage = maker.get("stage")
        if stage in blocks and maker.get("dataset") != settings.get("dataset"):
            blocks[stage] = {**blocks[stage], "dataset": maker.get("dataset")}
        tree |= blocks
    return tree


def parameters(settings: Mapping[str, Any], *makers: Mapping[str, Any] | None) -> dict[str, str]:
    """The settings of a run and of its makers as MLflow's parameters, named `block.key`; also `method`.

    Args:
        settings: of the run.
        makers: settings of the runs that made its encoder, nearest first.
    """
    stage = settings["stage"]
    tree = inherit({key: value for key, value in settings.items() if key not in ("stage", "upstream")}, *makers)
    if isinstance(tree.get("sampling"), Mapping):
        unread = SamplingSettings.unread(tree["sampling"].get("strategy", ""))
        tree["sampling"] = {key: value for key, value in tree["sampling"].items() if key not in unread}
    flat = {key: value for key, value in _flat(tree) if value is not None}
    # `pretrain.dataset` is the name; what else differs has names of its own.
    flat = {re.sub(r"(?<=.\.)dataset\.name$", "dataset", key): value for key, value in flat.items()}
    if "pretrain.method" in flat:
        flat["method"] = flat["pretrain.method"]
    elif stage != "pretrain" and "encoder.weights" in flat:
        flat["method"] = "none" if flat["encoder.weights"] == "random" else flat["encoder.weights"]
    return {key: str(value)[:LONGEST_PARAM] for key, value in flat.items()}


def _tags(metrics: Mapping[str, Any], pretraining: Mapping[str, Any] | None) -> dict[str, str]:
    hardware, encoder = metrics.get("hardware") or {}, metrics.get("encoder") or {}
    commit, _, dirty = str(metrics.get("commit") or "").partition("-dirty")
    tags = {
        "stage": metrics["stage"],
        "experiment": metrics["experiment"],
        "seed": metrics["seed"],
        "dataset": (metrics.get("dataset") or {}).get("name"),
        "slurm_job": hardware.get("slurm_job"),
        "machine": hardware.get("gpu") or hardware.get("cpu"),
        USER: _user(),
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
        "pretraining": "{experiment}/seed{seed}/{stage}".format_map(pretraining) if pretraining else None,
        "encoder_run_id": pretraining.get("mlflow_run_id") if pretraining else None,
        PARENT: pretraining.get("mlflow_run_id") if pretraining else None,  # MLflow's page links both ways
    }
    return {key: scrubbed(str(value))[:LONGEST_TAG] for key, value in tags.items() if value not in (None, "")}


def note(about: About, experiment_id: str, run_id: str) -> str:
    """The text on the run's page: the description, with a link to its encoder's run, or to the runs that use it."""
    parts = [about.note]
    if PARENT in about.tags:
        parts.append(f"Its encoder: [{about.tags['pretraining']}]({run_page(experiment_id, about.tags[PARENT])})")
    if about.stage == "pretrain":
        evaluations = page(experiment_id, search=f"tags.`{PARENT}` = '{run_id}'")
        parts.append(f"[What was made of its encoder]({evaluations})")
    return "\n\n".join(part for part in parts if part)


def command() -> str:
    """The command line of this process, without secrets."""
    return scrubbed(shlex.join(["python -m aps", *sys.argv[1:]]).replace("'python -m aps'", "python -m aps", 1))


def _dataset(metrics: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, str]:
    """The fields of MLflow's dataset: name, digest, source, and a profile with the sizes from its manifest."""
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


def milliseconds(moment: str) -> int:
    """MLflow's clock for a moment of metrics.json."""
    return int(datetime.fromisoformat(moment).timestamp() * 1000)


def _user() -> str | None:
    """The name of the user; None if the machine does not know it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return os.environ.get("USER")
