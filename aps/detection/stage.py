"""The detection stage: trains Mask R-CNN on an encoder and scores it by COCO's metrics (ViTDet, arXiv 2203.16527).

A run can be killed at any point: it resumes from its last checkpoint with the same iteration, optimizer, learning rates,
images and augmentations. It does not know engines: each is a file in `aps.detection.engines`.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from aps.data.manifest import RGB, Manifest
from aps.detection import check_engine, load_engine
from aps.detection.annotations import CocoSplit
from aps.detection.engine import Engine, Task, lr_factor
from aps.detection.figure import predictions_figure
from aps.detection.placement import Placement, backbone_tensors, load_backbone, table
from aps.errors import UserError
from aps.models.weights import INFO_KEY, load_encoder, save_tensors, trained_with
from aps.results import StageJob, StageRun
from aps.runtime.cores import decoding_workers
from aps.runtime.processes import Distributed, processes
from aps.training.loop import Line, Loop, finite, not_finite
from aps.training.schedule import oddities

NAME_LENGTH = 200  # characters of a class name in a metric's key; MLflow takes 250 in all
IMAGENET: tuple[RGB, RGB] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def run(job: StageJob) -> None:
    """Run the stage. It writes model.safetensors, predictions.json, predictions.png, history.jsonl and metrics.json.

    Raises:
        UserError: the engine's library is missing; settings, weights, data or processes do not fit; the loss is not
            finite.
        Preempted: the run was asked to stop; its state is saved.
    """
    check_engine(job.settings.detection.engine)
    with processes() as distributed, StageRun(job) as stage:
        _detect(job, stage, distributed)


def _detect(job: StageJob, stage: StageRun, distributed: Distributed) -> None:
    settings = job.settings.detection
    mean, std = normalization(job)
    task = Task(
        settings=settings,
        encoder=job.settings.encoder,
        seed=job.settings.seed,
        train=CocoSplit(job.manifest, "train", training=True, limit=settings.train_limit),
        val=CocoSplit(job.manifest, "val", training=False),
        mean=mean,
        std=std,
        workers=decoding_workers(job.workers),
        processes=distributed,
    )
    if not task.train.masks and distributed.main:
        print(
            f"{job.label}: instances have boxes only, so there is no mask head and no mask AP",
            file=sys.stderr,
            flush=True,
        )
    for clause in oddities("detection", settings) if distributed.main else ():
        print(f"warning: {job.label}: {clause}", file=sys.stderr)
    engine: Engine = load_engine(settings.engine)(task)
    placement, report = load_weights(engine, job)
    loop = Loop(
        job, stage, distributed, engine.state, engine.resume,
        total=settings.iterations, images=settings.batch_size, unit="iterations",
    )  # fmt: skip
    if not loop.resumed and distributed.main:
        print(report, file=sys.stderr, flush=True)

    def after(done: int, losses: dict[str, float] | None) -> None:
        def lines(_: int) -> Iterator[Line]:
            if losses is not None:
                finite(losses["loss"], "detection", "detection")
                yield {"lr": settings.lr * lr_factor(settings, done - 1), **losses}
            if settings.evaluate_every and done % settings.evaluate_every == 0 and done < settings.iterations:
                yield with_classes(engine.evaluate()[0])

        loop.advance(lines, f"loss {losses['loss']:.3f}" if losses else "")

    with loop.running():
        if loop.done < settings.iterations:
            try:
                engine.train(loop.done, after)
            except FloatingPointError as error:  # detectron2 raises it where the loss is not finite
                raise UserError(
                    not_finite(math.nan, "detection", "detection", " ".join(str(error).split())[:80])
                ) from None
    metrics, results = engine.evaluate()
    if distributed.main:
        _save(stage, engine, results)
        loop.log_end(**with_classes(metrics))
        stage.finish(
            {**metrics, "images_per_second": loop.rate},
            weights=placement.counts(),
            normalization={"mean": mean, "std": std},
            masks=task.train.masks,
        )


def normalization(job: StageJob) -> tuple[RGB, RGB]:
    """(mean, std) in [0, 1] units: those of the encoder's file or of timm, where known; else those measured on the
    dataset; else ImageNet's, as in ViTDet for COCO."""
    if (known := trained_with(job.encoder_spec)) is not None:
        return known
    manifest = Manifest.read(job.manifest)
    return manifest.normalization("measured") if manifest.statistics.measured else IMAGENET


def load_weights(engine: Engine, job: StageJob) -> tuple[Placement, str]:
    """Load the encoder's weights into the engine's model; returns the placement, and a table of it for the log.

    Raises:
        UserError: the weights are missing or differ from the settings.
    """
    torch.manual_seed(job.settings.seed)  # for an encoder with random weights
    encoder = load_encoder(job.encoder_spec, job.settings.encoder)
    backbone = backbone_tensors(encoder)
    placement = load_backbone(engine.model, backbone.tensors, job.settings.detection)
    return placement, table(placement, backbone.dropped, str(job.encoder_spec))


def with_classes(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics, with those of each class as `mask_AP/CLASS`, in characters that MLflow accepts."""
    numbers = {key: value for key, value in metrics.items() if key != "per_class"}
    for kind, values in metrics.get("per_class", {}).items():
        names = plain_names(list(values))
        numbers |= {f"{kind}/{names[label]}": value for label, value in values.items()}
    return numbers


def plain_names(labels: list[str]) -> dict[str, str]:
    """Label -> its name in a metric's key: letters and digits of any script, `_`, `.`, `-` and spaces. Equal names get
    a number."""
    names: dict[str, str] = {}
    for label in labels:
        plain = re.sub(r"[^\w. -]", "_", label)[:NAME_LENGTH]
        plain = plain if plain.strip(". ") else re.sub(r"[. ]", "_", plain) or "_"
        unique = (plain if number == 1 else f"{plain} {number}" for number in itertools.count(1))
        names[label] = next(name for name in unique if name not in names.values())
    return names


def _save(stage: StageRun, engine: Engine, results: list[dict[str, Any]]) -> None:
    """Write the detections, their figure and the detector to the stage's folder."""
    stage.staging("predictions.json").write_text(json.dumps(results), encoding="utf-8")
    figure = stage.staging("predictions.png")
    predictions_figure(figure, engine.task.val, results)
    info = {"settings": stage.job.settings.relevant(), "mean": engine.task.mean, "std": engine.task.std}
    information = {
        "engine": engine.task.settings.engine,
        "classes": json.dumps(engine.task.val.classes),
        INFO_KEY: json.dumps(info),
    }
    save_tensors(engine.model.state_dict(), stage.staging("model.safetensors"), information)
