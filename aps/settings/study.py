"""Experiments, studies and one stage's settings, made of the blocks.

A study is a YAML file of named experiments. It tells the workflow which jobs there are, and what the result of each job
depends on.

Design: an experiment has a block for each row of `aps.stages`, under the stage's name, so no stage is named here. The
chosen method determines the block `pretrain` and the defaults of `views` (`experiment_model`, `stage_model`).

It does not know how a stage uses its settings, where data come from, or how YAML is read.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, create_model, field_validator, model_validator

from aps.errors import UserError
from aps.registry import DATASETS, DETECTION_DATASETS, METHODS, nearest
from aps.settings.base import NAME, Section, Seed, check_distinct
from aps.settings.blocks import (
    DatasetSettings,
    EncoderSettings,
    PretrainSettings,
    ResourceSettings,
    SamplingSettings,
    SourceSettings,
    UserDataset,
    ViewSettings,
    name_only,
)
from aps.settings.sentences import sentence
from aps.stages import ROWS, STAGES

if TYPE_CHECKING:
    Stage = str
    ResourceKey = str
else:
    Stage = Literal[tuple(STAGES)]
    ResourceKey = Literal["default", "data", *STAGES, "report"]  # keys of `resources`


class SharedBlocks(Section):
    """Blocks that several stages read."""

    encoder: EncoderSettings = EncoderSettings()
    views: SerializeAsAny[ViewSettings] = ViewSettings()
    sampling: SamplingSettings = SamplingSettings()

    if TYPE_CHECKING:

        def __getattr__(self, stage: str) -> Any:
            """The block of a stage."""


if TYPE_CHECKING:
    Blocks = SharedBlocks
else:
    Blocks = create_model(
        "Blocks",
        __base__=SharedBlocks,
        **{row.name: (SerializeAsAny[row.block()], row.block()()) for row in ROWS},
    )


class ExperimentSettings(Blocks):
    """One named experiment with every stage's settings."""

    inherits: str | None = Field(
        None, description="another experiment, whose keys are laid under this one's (but `description` and `published`)"
    )
    description: str = Field("", description="for the report")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field((0,), description="every stage runs once for each")
    stages: tuple[Stage, ...] = Field(("pretrain", "finetune", "linear_probe", "knn"), description="which stages run")
    published: str | None = Field(
        None, description="entry of `published.yaml` that this experiment repeats, shown beside it in the report"
    )
    dataset: DatasetSettings = Field(
        DatasetSettings(name=""), description="its images; needed by all stages but detection"
    )
    resources: dict[Stage, ResourceSettings] = Field({}, description="what its stages ask for, over the study's")

    @field_validator("dataset", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return name_only(value)

    @model_validator(mode="after")
    def _check(self) -> ExperimentSettings:
        check_distinct("seeds", self.seeds)
        check_distinct("stages", self.stages)
        if any(not STAGES[stage].detects and not self.dataset_settings(stage).name for stage in self.stages):
            raise ValueError("'dataset' is missing; add it")
        if "pretrain" in self.stages and self.encoder.weights != "pretrain":
            raise ValueError(
                f"encoder.weights is '{self.encoder.weights}' but stages lists pretrain; "
                "remove pretrain from stages or set encoder.weights: pretrain"
            )
        if "pretrain" in self.stages and self.dataset.statistics == "encoder":
            raise ValueError(
                "dataset.statistics is 'encoder' but stages lists pretrain, which starts from none; set measured or published"
            )
        return self

    def dataset_of(self, stage: str) -> str:
        """Name of the dataset whose images a stage reads."""
        return str(self.detection.dataset) if STAGES[stage].detects else self.dataset_settings(stage).name

    def dataset_settings(self, stage: str) -> DatasetSettings:
        """The images that a stage other than detection reads: the stage's dataset if it names one, else the
        experiment's."""
        override = getattr(getattr(self, stage), "dataset", None)
        return DatasetSettings(**override.model_dump()) if isinstance(override, DatasetSettings) else self.dataset

    def train_limit(self, stage: str) -> tuple[str, int | None]:
        """The key of the setting that limits the training images of a stage, and its value."""
        if STAGES[stage].detects:
            return f"{stage}.train_limit", self.detection.train_limit
        own = getattr(getattr(self, stage), "dataset", None) is not None
        key = f"{stage}.dataset.train_limit" if own else "dataset.train_limit"
        return key, self.dataset_settings(stage).train_limit


class StudySettings(Section):
    """A whole YAML file."""

    study: Annotated[str, Field(pattern=f"^{NAME}$")] = Field(
        "study", description="names the report's folder and MLflow's experiment"
    )
    question: str = Field("", description="what the study asks, in a sentence; the report opens with it")
    include: tuple[str, ...] = Field(
        (),
        description="studies laid under this one, paths relative to this file; their `defaults` reach their own experiments only",
    )
    results: Annotated[str, Field(pattern=r"^[^{}~\s\x00-\x1f]+$")] = Field(
        "results", description="folder of everything that is written"
    )
    tracking_uri: str | None = Field(
        None,
        description="MLflow's server or store; null: SQLite under `results`; `none`: no MLflow. The variable "
        "`MLFLOW_TRACKING_URI` wins",
    )
    container: str | None = Field(
        None, description="image of `--sdm apptainer`, a file or an address; null: `aps.sif` (docs/containers.md)"
    )
    sources: dict[str, SourceSettings] = Field({}, description="where a dataset comes from, by its name")
    datasets: dict[Annotated[str, Field(pattern=f"^{NAME}$")], UserDataset] = Field(
        {}, description="data of your own, by names that `dataset` and `detection.dataset` can use"
    )
    resources: dict[ResourceKey, ResourceSettings] = Field(
        {}, description="what stages ask the executor for, by stage, over those of `default`"
    )
    defaults: dict[str, Any] = Field({}, description="an experiment's keys, laid under every experiment")
    experiments: dict[str, ExperimentSettings] = Field(description="the experiments by name; a name becomes a folder")


class StageSettings(Blocks):
    """All settings that one run of one stage depends on. Other blocks have their defaults, and reading one is an error."""

    stage: Stage
    experiment: str
    seed: Seed
    upstream: str | None = None  # digest of the pretraining it starts from; a new pretraining reruns the stage
    dataset: DatasetSettings = DatasetSettings(name="")

    def __getattribute__(self, name: str) -> Any:
        """Raises UserError for a block on which the stage does not say to depend: the study's values are not in it."""
        if name in ALL_BLOCKS and name not in self._declared:
            raise UserError(undeclared(self, name))
        return super().__getattribute__(name)

    @cached_property
    def _declared(self) -> frozenset[str]:
        blocks = super().__getattribute__("__dict__")
        return frozenset(blocks_of(blocks["stage"], blocks["pretrain"].method))

    def dataset_settings(self, stage: str) -> DatasetSettings:
        """The images that the stage reads; the same call as on an experiment."""
        return self.dataset

    @property
    def dataset_name(self) -> str:
        return str(self.detection.dataset) if STAGES[self.stage].detects else self.dataset.name

    def relevant(self) -> dict[str, Any]:
        """The blocks that the stage reads, as plain data with every default filled in."""
        return self.model_dump(mode="json", include={"stage", "experiment", "seed", "upstream", *self._declared})

    def to_json(self) -> str:
        return json.dumps(self.relevant(), sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits over all settings that determine the result; the experiment's name does not."""
        content = {k: v for k, v in self.relevant().items() if k != "experiment"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> StageSettings:
        """Read what `to_json` wrote. Raises UserError for any other text."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"--settings: not valid JSON: {error}; give what a rule gives, or a study instead"
            ) from None
        try:
            return stage_model(method_of(raw)).model_validate_json(text)
        except ValidationError as error:
            raise UserError(sentence("--settings", "", error, cls)) from None


ALL_BLOCKS = frozenset((*SharedBlocks.model_fields, "dataset", *STAGES))


def undeclared(settings: StageSettings, block: str) -> str:
    """The sentence for a block that a stage, or the method that it trains, reads without saying so."""
    if settings.stage != "pretrain":
        return f"stage {settings.stage} reads the block '{block}', which its row of aps/stages.py does not name; add it to `uses`"
    return (
        f"{METHODS.described(settings.pretrain.method)} reads the block '{block}' of the settings, which its `blocks` does not name; "
        f"add '{block}' to `blocks`, so that the study's values reach it and a run depends on them"
    )


# --------------------------------------------------------------------------------------------------
# Methods: the block `pretrain` and the defaults of `views` are those of the method that `pretrain.method` names.


def method_of(raw: Any) -> str:
    """The method that the plain settings of an experiment or stage name; the default if they name no known method."""
    default = str(PretrainSettings.model_fields["method"].default)
    block = raw.get("pretrain") if isinstance(raw, dict) else None
    name = block.get("method", default) if isinstance(block, dict) else default
    return name if isinstance(name, str) and name in METHODS else default


def _of_method(base: Any, method: str) -> Any:
    method_class = METHODS.load(method)
    pretrain: Any = (method_class.Settings, method_class.Settings(method=method))
    views: Any = (method_class.Views, method_class.Views())
    return create_model(base.__name__, __base__=base, pretrain=pretrain, views=views)


@lru_cache
def experiment_model(method: str) -> type[ExperimentSettings]:
    """ExperimentSettings with the keys and defaults of a method."""
    model: type[ExperimentSettings] = _of_method(ExperimentSettings, method)
    return model


@lru_cache
def blocks_model(method: str) -> type[SharedBlocks]:
    """The blocks alone, with the keys and defaults of a method."""
    model: type[SharedBlocks] = _of_method(Blocks, method)
    return model


@lru_cache
def stage_model(method: str) -> type[StageSettings]:
    """StageSettings with the keys and defaults of a method."""
    model: type[StageSettings] = _of_method(StageSettings, method)
    return model


def blocks_of(stage: str, method: str) -> tuple[str, ...]:
    """Names of the blocks that a stage's result depends on."""
    more = METHODS.load(method).blocks if stage == "pretrain" else ()
    return (*STAGES[stage].uses, *more, stage)


# --------------------------------------------------------------------------------------------------
# A study, loaded and validated.


class Study(StudySettings):
    """A validated study, and its answers to the workflow."""

    def stage_settings(self, experiment: str, seed: int, stage: str) -> StageSettings:
        """The settings of one run of a stage; the same object at each call.

        Raises UserError where the study has no such experiment, seed or stage."""
        job = (experiment, seed, stage)
        if job not in self._resolved:
            self._resolved[job] = self._resolve(*job)
        return self._resolved[job]

    @cached_property
    def _resolved(self) -> dict[tuple[str, int, str], StageSettings]:
        """Cache of `stage_settings`, because planning asks for each job many times."""
        return {}

    def _resolve(self, experiment: str, seed: int, stage: str) -> StageSettings:
        chosen = self.experiment(experiment)
        if stage not in chosen.stages:
            raise UserError(
                f"experiment '{experiment}' has no stage {stage}; its stages are {', '.join(chosen.stages)}"
            )
        if seed not in chosen.seeds:
            raise UserError(f"experiment '{experiment}' has no seed {seed}; its seeds are {list(chosen.seeds)}")
        method = chosen.pretrain.method
        blocks = {name: getattr(chosen, name) for name in blocks_of(stage, method)}
        if "dataset" in blocks:
            blocks["dataset"] = chosen.dataset_settings(stage)
        source = self.pretrain_source(experiment) if STAGES[stage].encoder else None
        upstream = self.stage_settings(source, seed, "pretrain").digest if source else None
        given = {"stage": stage, "experiment": experiment, "seed": seed, "upstream": upstream}
        return stage_model(method)(**given, **blocks)  # type: ignore[arg-type]

    def experiment(self, name: str) -> ExperimentSettings:
        if name not in self.experiments:
            raise UserError(f"study '{self.study}' has no experiment '{name}'; {nearest(name, self.experiments)}")
        return self.experiments[name]

    def pretrain_source(self, experiment: str) -> str | None:
        """The experiment whose pretraining `experiment` starts from, if any."""
        weights = self.experiments[experiment].encoder.weights
        if weights == "pretrain":
            return experiment
        return weights.removeprefix("experiment:") if weights.startswith("experiment:") else None

    def source(self, dataset: str) -> SourceSettings | UserDataset:
        """Where a dataset comes from."""
        return self.datasets.get(dataset) or self.sources.get(dataset) or SourceSettings()

    def kind_of(self, dataset: str) -> str | None:
        """`classification`, `images` (without labels) or `detection`; None where no dataset has that name."""
        if dataset in self.datasets:
            return self.datasets[dataset].kind
        return "classification" if dataset in DATASETS else "detection" if dataset in DETECTION_DATASETS else None

    def jobs(self) -> list[tuple[str, int, str]]:
        """Every (experiment, seed, stage) of the study."""
        return [(name, seed, stage) for name, e in self.experiments.items() for seed in e.seeds for stage in e.stages]

    def dataset_names(self) -> list[str]:
        """Sorted names of the datasets that stages read."""
        return sorted({e.dataset_of(stage) for e in self.experiments.values() for stage in e.stages})

    def stage_resources(self, stage: str, experiment: str | None = None) -> ResourceSettings:
        """The resources of a stage: the study's defaults, then the study's for this stage, then the experiment's.

        The same object at each call."""
        override = self.experiments[experiment].resources.get(stage) if experiment is not None else None
        job = (stage, experiment if override is not None else None)
        if job not in self._stage_resources:
            layers = [self.resources.get("default"), self.resources.get(stage), override]
            self._stage_resources[job] = self._layered(layers)
        return self._stage_resources[job]

    @cached_property
    def _stage_resources(self) -> dict[tuple[str, str | None], ResourceSettings]:
        """Cache of `stage_resources`, by stage and by the experiment where it overrides the study's."""
        return {}

    @staticmethod
    def _layered(layers: list[ResourceSettings | None]) -> ResourceSettings:
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer.model_dump(exclude_none=True) if layer else {}
        return ResourceSettings(**merged)
