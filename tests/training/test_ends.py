"""Every number with a point has an end, and what lies within trains, or ends in a sentence that names it.

tests/detection/test_detection_ends.py does the same for detectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
from ends import extremes

from aps.errors import UserError
from aps.models import archs
from aps.registry import METHODS
from aps.results import StageJob
from aps.settings.blocks import (
    BudgetSettings,
    EncoderSettings,
    FinetuneSettings,
    KnnSettings,
    LinearProbeSettings,
    PretrainSettings,
    SamplingSettings,
    ViewSettings,
)
from aps.settings.reference import schema
from aps.training.finetune import Finetuning
from aps.training.linear_probe import Probing
from aps.training.pretrain import Pretraining

ENCODER = small.ENCODER.model_copy(update={"depth": 1})
# What has to be set beside a key, so that it is used.
BESIDES: dict[str, dict[str, Any]] = {
    "color_jitter": {"rand_augment": None},
    "mixup": {"cutmix": 0.0},
    "cutmix": {"mixup": 0.0},
    "mixup_switch": {"mixup": 0.8, "cutmix": 1.0},
}


def numbers(tree: Any) -> Iterator[dict[str, Any]]:
    """The schemas of numbers with a point."""
    if isinstance(tree, dict) and tree.get("type") == "number":
        yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from numbers(inner)


def test_every_number_of_every_block_has_both_ends() -> None:
    found = list(numbers(schema()))
    assert len(found) > 50
    for one in found:
        assert {"maximum", "exclusiveMaximum"} & one.keys() and {"minimum", "exclusiveMinimum"} & one.keys(), one


def one_step(job: StageJob) -> None:
    """One batch, whose weights have to be finite afterwards."""
    if job.settings.stage == "knn":
        small.run(job)
        return
    learner = {"pretrain": Pretraining, "finetune": Finetuning, "linear_probe": Probing}[job.settings.stage](
        job, small.ONE
    )
    batch = next(iter(learner.batches(0, 0)))
    learner.step(batch, 0)
    if isinstance(learner, Probing):  # its heads may diverge
        return
    learner.watch.check()
    if (clause := learner.defect(learner.state_dict())) is not None:
        raise UserError(clause)


def said(job: StageJob, method: str) -> str | None:
    """The sentence in which planning or a first step ends, if any."""
    try:
        for check in [archs.check, *([METHODS.load(method).check] if method else [])]:
            check(job.settings)
    except ValueError as error:
        return str(error)
    try:
        one_step(job)
    except UserError as error:
        return str(error)
    return None


def cases() -> Iterator[Any]:
    """(stage, method, block, key, value)."""
    shared = {"encoder": EncoderSettings, "views": ViewSettings, "sampling": SamplingSettings}
    blocks = [
        ("pretrain", "aps", block, model, None) for block, model in (*shared.items(), ("pretrain", PretrainSettings))
    ]
    blocks += [
        ("pretrain", "aps", "budget", BudgetSettings, None),
        ("finetune", "", "finetune", FinetuneSettings, None),
    ]
    blocks += [("linear_probe", "", "linear_probe", LinearProbeSettings, None), ("knn", "", "knn", KnnSettings, None)]
    for name in METHODS.names():
        method = METHODS.load(name)
        blocks += [("pretrain", name, "pretrain", method.Settings, PretrainSettings)]
        blocks += [("pretrain", name, "views", method.Views, ViewSettings)]
    for stage, method, block, model, besides in blocks:
        for key, value in extremes(model, besides):
            name = f"{method or stage}.{block}.{key} {value}"
            if block == "budget":
                key, value = "budget", BudgetSettings(**{key: value})
            yield pytest.param(stage, method, block, key, value, id=name)


@pytest.mark.parametrize(("stage", "method", "block", "key", "value"), cases())
def test_the_least_and_the_greatest_number_train_or_are_named(
    stage: str, method: str, block: str, key: str, value: Any, digits: Path, tmp_path: Path
) -> None:
    own = {key: value} | (BESIDES.get(key, {}) if stage == "finetune" else {})
    given: dict[str, Any] = {"encoder": ENCODER}
    if block in ("encoder", "sampling"):
        given[block] = {"encoder": ENCODER, "sampling": SamplingSettings()}[block].model_copy(update=own)
    elif block == "views":
        given["views"] = METHODS.load(method).Views(**{"color_jitter_prob": 1.0, **own})
    else:
        given |= own
    job = small.job(stage, digits, tmp_path, method=method, **given)
    text = said(job, method)
    if text is not None:
        assert "\n" not in text and ("budget" if block == "budget" else key) in text, text
