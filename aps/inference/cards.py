"""Writes model cards: how weights were made, their scores, and how to load them; Markdown with the Hub's header.

A card says only what is known. Scores are those of the stage, and of neighbouring stages that evaluated the same encoder.
"""

from __future__ import annotations

from typing import Any

import yaml

from aps import __version__
from aps.errors import UserError
from aps.inference.model import Loaded
from aps.results import flatten
from aps.seals import read_metrics

PAPER = "https://arxiv.org/abs/2306.02854"


def model_card(model: Loaded, loading: str, licence: str | None, name: str) -> str:
    """The card as Markdown.

    Args:
        loading: Python that loads the weights, as `export` prints it.
        licence: the weights' licence by the Hub's name; None: not stated.
        name: the card's title.
    """
    made, stage = model.provenance, model.source.stage
    licence = licence or made.get("license")
    task = {"detection": "object-detection"}.get(
        str(stage), "image-classification" if model.classes else "image-feature-extraction"
    )
    dataset = made.get("dataset", {}).get("name")
    header: dict[str, Any] = {"library_name": "timm", "pipeline_tag": task, "tags": ["vision", task]}
    if licence:
        header = {"license": licence} | header
    if stage is not None:
        header["tags"].append("asymmetric-patch-sampling")
    if dataset:
        header["datasets"] = [dataset]
    parts = ["---\n" + yaml.safe_dump(header, sort_keys=False).strip() + "\n---", f"# {name}"]
    parts.append(_what(model))
    parts.append("## Loading\n\n```python\n" + loading.strip() + "\n```")
    if scores := _scores(model):
        rows = "\n".join(f"| {where} | {metric} | {value} |" for where, metric, value in scores)
        parts.append(f"## Scores\n\n| stage | metric | value |\n|---|---|---|\n{rows}")
    if model.classes:
        shown = ", ".join(model.classes[:50]) + (", ..." if len(model.classes) > 50 else "")
        parts.append(f"## Classes\n\n{len(model.classes)}: {shown}")
    if facts := _facts(made):
        parts.append("## Provenance\n\n" + "\n".join(f"- {key}: {value}" for key, value in facts))
    if settings := made.get("settings"):
        rows = "\n".join(f"| `{key}` | {value} |" for key, value in flatten(settings).items())
        parts.append(f"## Settings\n\n| key | value |\n|---|---|\n{rows}")
    parts.append("## Licence\n\n" + (f"{licence}" if licence else "Not stated: `--licence` of `aps export` states it."))
    return "\n\n".join(parts) + "\n"


def _what(model: Loaded) -> str:
    made, stage = model.provenance, model.source.stage
    if stage is None:
        return f"Weights of {model.source.address}."
    doing = {
        "pretrain": f"Vision Transformer pretrained by [Asymmetric Patch Sampling]({PAPER}), without labels",
        "finetune": "Vision Transformer finetuned as a classifier",
        "linear_probe": "frozen Vision Transformer with the linear classifier of a probe",
        "detection": "Mask R-CNN on a Vision Transformer (ViTDet)",
    }.get(stage, f"Vision Transformer, as stage {stage} used it")
    dataset = made.get("dataset")
    on = f" on `{dataset['name']}` (digest {dataset['digest'][:16]})" if dataset else ""
    encoder = made.get("encoder", {}).get("source")
    start = f" It starts from the encoder {encoder}." if encoder and stage != "pretrain" else ""
    return f"{doing}{on}.{start}"


def _scores(model: Loaded) -> list[tuple[str, str, str]]:
    """(stage, metric, value) of the stage, and of neighbouring stages that used its encoder."""
    found = [(str(model.source.stage), model.provenance.get("metrics", {}))]
    folder, digest = model.source.folder, model.provenance.get("sha256")
    if model.source.stage == "pretrain" and folder is not None and digest is not None:
        for file in sorted(folder.parent.glob("*/metrics.json")):
            try:
                other = read_metrics(file)
            except UserError:
                continue
            if other["encoder"]["sha256"] == digest:
                found.append((other["stage"], other["metrics"]))
    return [
        (stage, key, f"{value:.4g}")
        for stage, metrics in found
        for key, value in metrics.items()
        if isinstance(value, int | float) and key != "images_per_second"
    ]


def _facts(made: dict[str, Any]) -> list[tuple[str, str]]:
    hardware = made.get("hardware", {})
    facts = {
        "experiment": f"{made['experiment']}, seed {made['seed']}" if "seed" in made else made.get("experiment"),
        "origin": made.get("origin") or made.get("origin_url"),
        "finished": made.get("finished"),
        "seconds of training": made.get("wall_seconds"),
        "hardware": hardware.get("gpu") or hardware.get("cpu"),
        "software": f"aps {made['version']}, commit {made.get('commit')}"
        if "version" in made
        else f"aps {__version__}",
        "digest of the settings": made.get("settings_digest"),
        "MLflow run": made.get("mlflow_run_id"),
    }
    return [(key, str(value)) for key, value in facts.items() if value is not None]
