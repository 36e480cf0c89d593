"""Published results (config/published.yaml), and how an experiment that repeats one differs from it (docs/method.md).

It imports no torch, and does not know how results are stored or shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from aps.errors import UserError
from aps.layout import SHARE
from aps.registry import ARCHS, nearest
from aps.settings.study import ExperimentSettings
from aps.stages import STAGES

TABLE = Path("config/published.yaml")


class Entry(BaseModel):
    """One published result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    dataset: str
    arch: str
    patch_size: int
    pretrain_epochs: int | None  # None if not stated
    metrics: dict[str, float] = Field(min_length=1)  # STAGE.METRIC: percent, as in the stage's metrics.json
    source: str
    note: str = ""

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
        content: Any = yaml.safe_load(path.read_text())
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


def differences(experiment: ExperimentSettings, entry: Entry) -> list[str]:
    """How the experiment differs from the published one, as phrases; empty where they agree."""
    detects = all(name.startswith("detection.") for name in entry.metrics)
    dataset = experiment.dataset_of("detection") if detects else experiment.dataset.name
    pairs: list[tuple[str, Any, Any]] = [
        ("dataset", dataset, entry.dataset),
        ("arch", experiment.encoder.arch, entry.arch),
        ("patch_size", experiment.encoder.patch_size, entry.patch_size),
    ]
    if entry.pretrain_epochs is not None:
        pairs.append(("pretrain.epochs", experiment.pretrain.epochs, entry.pretrain_epochs))
    if experiment.dataset.train_limit is not None:
        pairs.append(("dataset.train_limit", experiment.dataset.train_limit, "all images"))
    return [f"{key} {ours} instead of {theirs}" for key, ours, theirs in pairs if ours != theirs]
