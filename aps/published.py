"""Published results (config/published.yaml), and how an experiment that repeats one differs from it (docs/method.md).

It imports no torch, and does not know how results are stored or shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from aps.errors import UserError
from aps.layout import SHARE
from aps.models.archs import dimensions
from aps.registry import ARCHS, nearest
from aps.settings.blocks import EncoderSettings
from aps.settings.study import ExperimentSettings, SharedBlocks, blocks_model
from aps.stages import STAGES

TABLE = Path("config/published.yaml")
OURS = "APS"  # the method that this project implements, by the name that entries have
METHOD = "aps"  # and by that of `pretrain.method`
MLP_RATIO = 4.0  # of every arch (method.md, Model)

Pair = tuple[str, Any, Any]  # a setting's key, the experiment's value, the published one


class Entry(BaseModel):
    """One published result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    dataset: str
    arch: str
    patch_size: int
    image_size: int | None = None  # of pretraining, pixels; None if not stated
    pretrain_epochs: int | None  # None if not stated
    metrics: dict[str, float] = Field(min_length=1)  # STAGE.METRIC: percent, as in the stage's metrics.json
    source: str
    note: str = ""
    # The constants that are stated, as blocks of a study. Only keys that are given are compared.
    settings: Annotated[SharedBlocks, BeforeValidator(lambda raw: blocks_model(METHOD).model_validate(raw))] = (
        SharedBlocks()
    )

    @field_validator("arch")
    @classmethod
    def _arch(cls, value: str) -> str:
        if value not in ARCHS:
            raise ValueError(f"'{value}' is unknown; known: {', '.join(ARCHS.names())}")
        return value

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: dict[str, float]) -> dict[str, float]:
        for name, percent in value.items():
            stage, dot, metric = name.partition(".")
            if stage not in STAGES or not dot or not metric:
                raise ValueError(f"'{name}' is not STAGE.METRIC with a stage of {', '.join(STAGES)}")
            if not 0 < percent < 100:
                raise ValueError(f"{name} = {percent} is not a percentage")
        return value


def load(path: Path | None = None) -> dict[str, Entry]:
    """Every entry by key, from the working directory's table, or else from the one in the package.

    Raises:
        UserError: the file is missing, or a key or value is wrong.
    """
    path = path or (TABLE if TABLE.exists() else SHARE / TABLE)
    try:
        with path.open(encoding="utf-8") as file:  # not its text alone: PyYAML's messages name the file
            content: Any = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); it comes with the project") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a block of entries, KEY: {{method, dataset, ...}}")
    entries = {}
    for key, fields in content.items():
        try:
            entries[str(key)] = Entry.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([str(key), *(str(part) for part in first["loc"])])
            raise UserError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}") from None
    return entries


def check(experiment: ExperimentSettings) -> None:
    """Raises ValueError if the experiment names an unknown entry, UserError if the table is broken."""
    if experiment.published is not None and experiment.published not in (entries := load()):
        raise ValueError(f"published '{experiment.published}' is no entry; {nearest(experiment.published, entries)}")


def differences(
    experiment: ExperimentSettings,
    entry: Entry,
    pretraining: ExperimentSettings | None = None,
    stage: str | None = None,
) -> list[str]:
    """How the experiment differs from the published one, as phrases; empty where they agree.

    Args:
        pretraining: the experiment that makes its encoder (`Study.pretrain_source`), where that is another; without it,
            nothing is said of the pretraining of `experiment:NAME`.
        stage: the evaluation whose numbers are compared; None: all of the entry that the experiment runs.
    """
    weights = experiment.encoder.weights
    evaluations = dict.fromkeys(name.partition(".")[0] for name in entry.metrics)
    detects = all(STAGES[name].detects for name in evaluations)
    found = _of_encoder(experiment, entry)
    if weights == "pretrain" or pretraining is not None:
        other = f"experiments.{weights.removeprefix('experiment:')}." if weights != "pretrain" else ""
        found += [
            (f"{other}{key}", *values) for key, *values in _of_pretraining(pretraining or experiment, entry, detects)
        ]
    elif not weights.startswith("experiment:"):  # nothing can be compared of an unknown pretraining
        unknown = "" if weights == "random" else ", of unknown pretraining,"
        found.append(("encoder.weights", f"{weights}{unknown}", "pretrain"))
    for name in evaluations:
        if name in experiment.stages and stage in (None, name):
            found += _of_evaluation(experiment, entry, name)
    return list(dict.fromkeys(f"{key} {ours} instead of {theirs}" for key, ours, theirs in found if ours != theirs))


def _of_encoder(experiment: ExperimentSettings, entry: Entry) -> list[Pair]:
    ours, theirs = experiment.encoder, dimensions(EncoderSettings(arch=entry.arch))
    pairs: list[Pair] = [
        ("encoder.arch", ours.arch, entry.arch),
        ("encoder.patch_size", ours.patch_size, entry.patch_size),
        ("encoder.mlp_ratio", ours.mlp_ratio, MLP_RATIO),
    ]
    if ours.arch == entry.arch:  # else its other dimensions go without saying
        own = dimensions(ours)
        pairs += [(f"encoder.{key}", getattr(own, key), getattr(theirs, key)) for key in own._fields]
    if entry.image_size is not None:
        pairs.append(("encoder.image_size", ours.image_size, entry.image_size))
    return pairs


def _of_pretraining(experiment: ExperimentSettings, entry: Entry, detects: bool) -> list[Pair]:
    """detects: whether the entry's dataset is that of detection, and not that of pretraining."""
    pretrain, limit = experiment.pretrain, experiment.dataset.train_limit
    pairs: list[Pair] = [("dataset.train_limit", limit, None if limit is None else "all images")]
    if not detects:
        pairs.append(("dataset", experiment.dataset.name, entry.dataset))
    if entry.method == OURS:  # a sibling's numbers are a neighbour's, and named as its
        pairs.append(("pretrain.method", pretrain.method, METHOD))
        pairs.append(("sampling.strategy", experiment.sampling.strategy, "asymmetric"))
    epochs = entry.pretrain_epochs
    if pretrain.budget is not None:
        ((unit, budget),) = pretrain.budget.model_dump(exclude_none=True).items()
        pairs.append((f"pretrain.budget.{unit}", f"{budget:g}", "epochs" if epochs is None else f"{epochs} epochs"))
    elif epochs is not None:
        pairs.append(("pretrain.epochs", pretrain.epochs, epochs))
    if pretrain.method == METHOD:  # else the constants go without saying
        pairs += _of_constants(experiment, entry, {*SharedBlocks.model_fields, "pretrain"})
    return pairs


def _of_evaluation(experiment: ExperimentSettings, entry: Entry, stage: str) -> list[Pair]:
    own = getattr(getattr(experiment, stage), "dataset", None)
    key = "dataset" if own is None else f"{stage}.dataset"
    pairs: list[Pair] = [(key, experiment.dataset_of(stage), entry.dataset)]
    limited, limit = experiment.train_limit(stage)
    if limit is not None:
        pairs.append((limited, limit, "all images"))
    return pairs + _of_constants(experiment, entry, {stage})


def _of_constants(experiment: ExperimentSettings, entry: Entry, blocks: set[str]) -> list[Pair]:
    """Every constant of these blocks that the entry states."""
    ours, stated = experiment.model_dump(mode="json"), entry.settings.model_dump(mode="json", exclude_unset=True)
    return [
        (f"{block}.{key}", ours[block][key], value)
        for block, values in stated.items()
        if block in blocks
        for key, value in values.items()
    ]
