"""What a study asks of its datasets and processes beyond what they have: batches, parts held out, limits.

The number of images is known once a dataset is prepared. So planning asks, for the datasets that are prepared, and the
preparation of the others, before anything trains; `python -m aps check` asks too. It imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from aps.errors import UserError
from aps.findings import Findings
from aps.stages import STAGES


def check_shortages(findings: Findings, datasets: Container[str]) -> None:
    """Raises UserError where a run that is still to be made, of a stage that reads one of these datasets, lacks images.

    What its processes can't share ends that job at its start and no other, because resources differ from machine to machine.
    """
    for experiment, e in findings.study.experiments.items():
        for stage in e.stages:
            if e.dataset_of(stage) not in datasets:
                continue
            for sentence in _of_images(findings, experiment, stage):
                if any(findings.finding(experiment, seed, stage).metrics is None for seed in e.seeds):
                    raise UserError(sentence)


def shortages(findings: Findings, experiment: str, stage: str) -> Iterator[str]:
    """Batch sizes that the processes can't share evenly, and what exceeds the images of a prepared dataset."""
    block, prefix = getattr(findings.study.experiments[experiment], stage), f"experiment '{experiment}': "
    batch = getattr(block, "batch_size", None)
    resources = findings.study.stage_resources(stage, experiment)
    processes = resources.gpus or resources.processes or resources.nodes or 1
    parts, pairs = getattr(block, "accumulate", 1), getattr(block, "mixup", 0) or getattr(block, "cutmix", 0)
    if batch is not None and batch % processes:
        yield f"{prefix}{stage}.batch_size {batch} is not a multiple of the {processes} processes; change either"
    elif batch is not None and (batch // processes) % parts:
        yield (
            f"{prefix}{stage}.accumulate {parts} does not divide the {batch // processes} images of a process; change either"
        )
    elif batch is not None and pairs and (batch // processes) % 2:
        yield (
            f"{prefix}{stage}.batch_size {batch} gives each of the {processes} processes an odd number of images, and mixup "
            f"pairs them; make it even, or set {stage}.mixup and {stage}.cutmix to 0"
        )
    yield from _of_images(findings, experiment, stage)


def _of_images(findings: Findings, experiment: str, stage: str) -> Iterator[str]:
    """What exceeds the images of a prepared dataset."""
    e, block = findings.study.experiments[experiment], getattr(findings.study.experiments[experiment], stage)
    prefix, batch = f"experiment '{experiment}': ", getattr(block, "batch_size", None)
    dataset = e.dataset_of(stage)
    try:
        images = findings.train_images(dataset)
    except UserError as error:
        yield str(error)
        return
    if images is None:
        return
    key, limit = e.train_limit(stage)
    if limit is not None and limit > images:
        yield f"{prefix}{key} {limit} exceeds the {images} training images of dataset '{dataset}'; lower it"
        return
    if STAGES[stage].detects:
        return
    images = min(images, limit or images)
    share = getattr(block, "holdout", 0.0)
    held = round(images * share)
    if share and not held:
        yield f"{prefix}{stage}.holdout {share} of {images} training images keeps none aside; raise it"
    elif share and held == images:
        yield f"{prefix}{stage}.holdout {share} of {images} training images leaves none to train on; lower it"
    elif batch is not None and batch > images - held:
        reason = f" ({held} of {images} are held out)" if held else ""
        yield f"{prefix}{stage}.batch_size {batch} exceeds the {images - held} training images{reason}; lower it"
