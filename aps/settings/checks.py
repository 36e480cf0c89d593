"""Checks of a study that need more than one block: registered names, other experiments, and the components' checks."""

from __future__ import annotations

from aps.errors import UserError
from aps.registry import CHECKS, DATASETS, DETECTION_DATASETS, METHODS, STUDY_CHECKS, file_of, nearest, raised, resolve
from aps.settings.study import ALL_BLOCKS, ExperimentSettings, Study
from aps.stages import STAGES

MONITOR_LEAST = 10  # images of which kNN monitoring holds out a tenth


def check(study: Study, where: str) -> None:
    """Raises UserError where the study names something unknown, or a component can't be built with its settings."""
    known = {*DATASETS.names(), *DETECTION_DATASETS.names()}
    if unknown := sorted(set(study.sources) - known):
        if unknown[0] in study.datasets:
            raise UserError(
                f"{where}: sources names dataset '{unknown[0]}', which datasets.{unknown[0]} describes; remove one"
            )
        raise UserError(f"{where}: sources names dataset '{unknown[0]}'; {nearest(unknown[0], known)}")
    if taken := sorted(set(study.datasets) & known):
        raise UserError(f"{where}: datasets.{taken[0]} has the name of a known dataset; choose another name")
    for name, e in study.experiments.items():
        prefix = f"{where}: experiment '{name}':"
        for stage in e.stages:
            _check_dataset(study, e, stage, prefix)
            _check_limit(e, stage, prefix)
        components = [("", resolve(path)) for path in CHECKS]
        rows = [(STAGES[stage].described, STAGES[stage].check) for stage in e.stages]
        components += [(what, resolve(path, what)) for what, path in rows if path]
        if "pretrain" in e.stages:
            method = e.pretrain.method
            components += [("", _check_blocks), ("", _check_parts)]
            components += [(METHODS.described(method), METHODS.load(method).check)]
        for what, component in components:
            try:
                component(e)
            except ValueError as error:
                raise UserError(f"{prefix} {error}") from None
            except UserError:
                raise
            except Exception as error:
                if not what:
                    raise
                raise UserError(
                    f"{prefix} the check of {what} failed: {raised(error, file_of(component.__module__))}; correct it, or let it "
                    "raise ValueError with a sentence"
                ) from error
        source = study.pretrain_source(name)
        if source is None:
            continue
        if source not in study.experiments:
            raise UserError(
                f"{prefix} encoder.weights names experiment '{source}', which does not exist; {nearest(source, study.experiments)}"
            )
        other = study.experiments[source]
        if "pretrain" not in other.stages:
            raise UserError(
                f"{prefix} takes its encoder from '{source}', whose stages lack pretrain; add it, or set encoder.weights: random"
            )
        if missing := sorted(set(e.seeds) - set(other.seeds)):
            raise UserError(
                f"{prefix} seeds {missing} are not among the seeds {list(other.seeds)} of '{source}', whose encoder it takes"
            )
    for path in STUDY_CHECKS:
        try:
            resolve(path)(study)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


def _check_dataset(study: Study, e: ExperimentSettings, stage: str, prefix: str) -> None:
    """Raises UserError where a stage's dataset is unknown, or not of the kind that the stage needs."""
    row, name = STAGES[stage], e.dataset_of(stage)
    overridden = getattr(getattr(e, stage), "dataset", None) is not None
    key = f"{stage}.dataset" if row.detects or overridden else "dataset"
    kind = study.kind_of(name)
    wanted = ("detection",) if row.detects else ("classification",) if row.labels else ("classification", "images")
    if kind is None or (kind not in wanted and name not in study.datasets):
        registry = DETECTION_DATASETS if row.detects else DATASETS
        users = [other for other in study.datasets if study.datasets[other].kind in wanted]
        raise UserError(f"{prefix} {key} '{name}' is unknown; {nearest(name, [*registry.names(), *users])}")
    if kind not in wanted:
        if kind == "images":
            raise UserError(
                f"{prefix} {stage} needs labels and {key} '{name}' has none (datasets.{name}.labels: false); give the stage a "
                f"labelled dataset by {stage}.dataset, or remove it from stages"
            )
        needs = (
            "images with boxes"
            if row.detects
            else "images of classes"
            if row.labels
            else "images of classes or without labels"
        )
        raise UserError(f"{prefix} {stage} needs {needs}, and {key} '{name}' is for {kind}; name another dataset")
    own = study.datasets.get(name)
    if own is not None and own.shrink is not None and own.shrink < e.encoder.image_size:
        raise UserError(
            f"{prefix} {key} '{name}' keeps {own.shrink} pixels on the shorter side (datasets.{name}.shrink), fewer than "
            f"encoder.image_size {e.encoder.image_size}; raise shrink"
        )
    if not row.detects and own is not None and e.dataset_settings(stage).statistics == "published":
        raise UserError(
            f"{prefix} {key} '{name}' is your own, so it has no published statistics; set {key}.statistics: measured"
        )


def _check_blocks(e: ExperimentSettings) -> None:
    """Raises ValueError where a method names blocks of settings that there are not."""
    name, blocks = e.pretrain.method, METHODS.load(e.pretrain.method).blocks
    if not isinstance(blocks, tuple | list):
        raise ValueError(f"{METHODS.described(name)}: `blocks` is {blocks!r}; write a tuple of names of blocks")
    if unknown := [block for block in blocks if block not in ALL_BLOCKS]:
        raise ValueError(
            f"{METHODS.described(name)}: `blocks` names {unknown[0]!r}; {nearest(str(unknown[0]), ALL_BLOCKS)}"
        )


def _check_parts(e: ExperimentSettings) -> None:
    """Raises ValueError where a part of a pretraining batch is too small for its method, for any number of processes."""
    batch, parts, least = e.pretrain.batch_size, e.pretrain.accumulate, METHODS.load(e.pretrain.method).least_images
    if batch % parts:
        raise ValueError(f"pretrain.accumulate {parts} does not divide pretrain.batch_size {batch}; change either")
    if batch // parts < least:
        cut = f" cut by pretrain.accumulate {parts}" if parts > 1 else ""
        raise ValueError(
            f"pretrain.batch_size {batch}{cut} leaves a step {batch // parts} image, and {e.pretrain.method} needs at least "
            f"{least} (it compares images, or takes their statistics); raise pretrain.batch_size"
            + (" or lower pretrain.accumulate" if parts > 1 else "")
        )


def _check_limit(e: ExperimentSettings, stage: str, prefix: str) -> None:
    """Raises UserError where a stage's `train_limit` leaves too few images for its batch, holdout or monitoring."""
    key, limit = e.train_limit(stage)
    if limit is None or STAGES[stage].detects:  # a detector's batches go on from one epoch to the next
        return
    block = getattr(e, stage)
    share, batch = getattr(block, "holdout", 0.0), getattr(block, "batch_size", None)
    held = round(limit * share)
    if share and not held:
        raise UserError(f"{prefix} {stage}.holdout {share} of {key} {limit} keeps no image aside; raise either")
    if share and held == limit:
        raise UserError(f"{prefix} {stage}.holdout {share} of {key} {limit} leaves no image to train on; lower it")
    if batch is not None and batch > limit - held:
        less = f" less the {held} held out" if held else ""
        raise UserError(
            f"{prefix} {stage}.batch_size {batch} exceeds {key} {limit}{less}; lower the batch or raise the limit"
        )
    if stage == "pretrain" and (reads := e.pretrain.reads) and limit < MONITOR_LEAST:
        never = "0" if reads == "knn_every" else "null"
        raise UserError(
            f"{prefix} {key} {limit} leaves pretrain.{reads} none to hold out; raise it to {MONITOR_LEAST} at least, or set "
            f"pretrain.{reads}: {never}"
        )
