"""Settings: the only place that knows keys, types, ranges and defaults.

A study is a YAML file. `load_study` merges it, lets experiments inherit, validates everything at once
and returns typed objects; nothing else in the project reads YAML settings. It imports neither torch nor
any other heavy package, because planning the DAG on a login node calls it.

What it deliberately does not know: how a stage uses its settings, and where data comes from.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from aps.errors import UserError
from aps.models.archs import ARCHS, dimensions

PACKAGE = Path(__file__).parent.parent
STAGES = ("pretrain", "finetune", "linear_probe", "knn", "detection")
Stage = Literal["pretrain", "finetune", "linear_probe", "knn", "detection"]

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
RAND_AUGMENT = r"^rand(-(m|n|mmax|inc)\d+|-(mstd|p)\d+(\.\d+)?)*$"


# --------------------------------------------------------------------------------------------------
# Names registered elsewhere, read without importing anything heavy.


def arch_names() -> list[str]:
    return sorted(ARCHS)


def strategy_names() -> list[str]:
    """Strategies registered in aps/sampling.py, read as text because importing it would import torch."""
    source = (PACKAGE / "sampling.py").read_text()
    return sorted(re.findall(r'^@strategy\("(\w+)"\)', source, re.MULTILINE))


def engine_names() -> list[str]:
    """Detection engines: the files of aps/detection/engines."""
    return sorted(p.stem for p in (PACKAGE / "detection" / "engines").glob("[a-z]*.py"))


def dataset_names(kind: Literal["classification", "detection"]) -> list[str]:
    from aps.data import REGISTRY

    return sorted(name for name, entry in REGISTRY.items() if entry.kind == kind)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


NAME = r"[A-Za-z0-9][\w.-]*"  # of what becomes a folder


class Section(BaseModel):
    """Base of every block of settings: unknown keys are errors, values are not silently converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """YAML has lists where settings have tuples, and null where a block's keys are all commented out."""
        if not isinstance(value, dict):
            return value
        blocks = {name for name, field in cls.model_fields.items() if isinstance(field.default, dict | BaseModel)}
        return {
            key: tuple(inner) if isinstance(inner, list) else inner
            for key, inner in value.items()
            if inner is not None or key not in blocks
        }


def _check_range(key: str, pair: tuple[float, float]) -> None:
    if pair[0] > pair[1]:
        raise ValueError(f"{key} must be [low, high] with low <= high, not {list(pair)}")


def _check_crop(pair: tuple[float, float]) -> None:
    _check_range("crop_scale", pair)
    if pair[1] > 1:
        raise ValueError(f"crop_scale is a share of the image's area: {pair[1]} is above 1")


# --------------------------------------------------------------------------------------------------
# What an experiment computes. A change here changes results, so it reruns the stages that depend on it.


class DatasetSettings(Section):
    """Which images, and how they are normalized in every stage."""

    name: str
    train_limit: Positive | None = None  # first n images of a seeded shuffle of train; None: all
    statistics: Literal["measured", "published"] = "measured"  # both are in the manifest


class EncoderSettings(Section):
    """The Vision Transformer (method.md, Model). `arch` names a row of `aps.models.archs.ARCHS`."""

    arch: str = "tiny"
    image_size: Positive = 32
    patch_size: Positive = 2
    dim: Positive | None = None  # override the width, depth, heads of `arch`
    depth: Positive | None = None
    heads: Positive | None = None
    mlp_ratio: PositiveFloat = 4.0
    qkv_bias: bool = False
    layer_norm_eps: PositiveFloat = 1e-5
    # pretrain: this experiment's own; random: the floor; experiment:NAME, timm:NAME or a .safetensors file
    weights: str = "pretrain"

    @property
    def grid(self) -> int:
        """G, cells along a side."""
        return self.image_size // self.patch_size

    @model_validator(mode="after")
    def _check(self) -> EncoderSettings:
        archs = arch_names()
        if self.arch not in archs:
            raise ValueError(f"arch '{self.arch}' is unknown; {_nearest(self.arch, archs)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        dim, _, heads = dimensions(self)
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads; change dim or heads")
        if not re.fullmatch(r"pretrain|random|experiment:[\w.-]+|timm:[\w.-]+|.*\.safetensors", self.weights):
            raise ValueError(
                f"weights '{self.weights}' is not one of pretrain, random, experiment:NAME, timm:NAME, FILE.safetensors"
            )
        return self


class ViewSettings(Section):
    """Augmentation of one view (method.md, Views)."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.15, 1.0)
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    color_jitter: tuple[NonNegative, NonNegative, NonNegative, Annotated[float, Field(ge=0, le=0.5)]] = (
        0.4,
        0.4,
        0.4,
        0.1,
    )
    color_jitter_prob: Probability = 0.8
    grayscale: Probability = 0.2
    blur: tuple[Probability, Probability] = (0.0, 0.0)  # probability for view 1 and view 2 (MoCo v3: 1.0, 0.1)
    solarize: tuple[Probability, Probability] = (0.0, 0.0)  # likewise (MoCo v3: 0.0, 0.2)

    @model_validator(mode="after")
    def _check(self) -> ViewSettings:
        _check_crop(self.crop_scale)
        _check_range("crop_ratio", self.crop_ratio)
        return self


class SamplingSettings(Section):
    """Which patches of each view the encoder sees (method.md, Sampling)."""

    strategy: str = "asymmetric"
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.25  # r
    samplings: Positive = 4  # T
    gamma: NonNegative = 3.0
    flip_aware: bool = True

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (names := strategy_names()):
            raise ValueError(f"strategy '{value}' is unknown; {_nearest(value, names)}")
        return value


class PretrainSettings(Section):
    epochs: Positive = 1600
    batch_size: Positive = 512  # B, over all processes
    lr: PositiveFloat = 1e-3  # of a batch of 256; the optimizer gets lr * B / 256
    warmup_epochs: Natural = 20
    schedule: Literal["release", "cosine"] = "release"  # release: min((e+1)/warmup, (1+cos(pi*e/E))/2), per epoch
    weight_decay: NonNegative = 0.05
    betas: tuple[Share, Share] = (0.9, 0.999)
    temperature: PositiveFloat = 0.1  # tau
    projector: tuple[Positive, Positive, Positive] = (512, 512, 128)
    predictor: tuple[Positive, Positive, Positive] = (512, 512, 128)
    precision: Precision = "auto"
    accumulate: Positive = 1  # micro-batches an optimizer step
    activation_checkpointing: bool = False
    compile: bool = False
    knn_every: Natural = 0  # epochs between kNN readings on held-out train images; 0: never

    @model_validator(mode="after")
    def _check(self) -> PretrainSettings:
        if self.projector[-1] != self.predictor[-1]:
            raise ValueError(
                f"predictor ends in width {self.predictor[-1]}, the projector in {self.projector[-1]}; make them equal"
            )
        return self


class FinetuneSettings(Section):
    """Finetuning (method.md, Finetuning recipe)."""

    epochs: Positive = 100
    batch_size: Positive = 128
    lr: PositiveFloat = 2e-3  # of a batch of 512; the optimizer gets lr * B / 512
    min_lr: NonNegative = 1e-5
    warmup_epochs: Natural = 5
    warmup_lr: NonNegative = 1e-6
    weight_decay: NonNegative = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    drop_path: Probability = 0.1
    rand_augment: Annotated[str, Field(pattern=RAND_AUGMENT)] | None = "rand-m9-mstd0.5-inc1"  # timm's notation
    crop: Literal["pad", "resized"] = "pad"  # pad 4 and crop, or random resized crop
    flip: Probability = 0.5
    color_jitter: NonNegative = 0.4  # used where rand_augment is null, as in timm
    erasing: Probability = 0.25
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    mixup_switch: Probability = 0.5
    label_smoothing: Share = 0.1
    ema: Share = 0.99996  # 0: no EMA model
    holdout: Share = 0.0  # share of train kept to pick a best epoch; 0: the last epoch
    precision: Precision = "auto"
    compile: bool = False


class LinearProbeSettings(Section):
    """Linear probing (method.md, Linear probe and kNN): all learning rates are heads trained in one pass."""

    epochs: Positive = 100
    batch_size: Positive = 256
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    momentum: Probability = 0.9
    batch_norm: bool = False  # MAE's BatchNorm without affine before the head
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    flip: Probability = 0.5
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of train on which the learning rate is picked
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _check(self) -> LinearProbeSettings:
        _check_crop(self.crop_scale)
        return self


class KnnSettings(Section):
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] = (10, 20, 100, 200)
    temperature: PositiveFloat = 0.07
    precision: Precision = "auto"


class DetectionSettings(Section):
    """COCO transfer: Mask R-CNN on the encoder with a simple feature pyramid.

    Defaults are ViTDet's for ViT-B/16 (arXiv 2203.16527, its appendix and detectron2's release of it).
    """

    engine: str = "torchvision"  # a file of aps/detection/engines
    dataset: str = "digits_coco"
    image_size: Positive = 1024  # S: longest side of a test image, side of a training crop, square padding
    iterations: Positive = 184375
    batch_size: Positive = 64  # over all processes
    lr: PositiveFloat = 1e-4  # as given, whatever the batch
    weight_decay: NonNegative = 0.1  # none for the encoder's norms and position embeddings
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    warmup_iterations: Natural = 250  # linear from 0.001 of lr
    lr_drops: tuple[Probability, ...] = (163889 / 184375, 177546 / 184375)  # by 10, as shares of the schedule
    drop_path: Probability = 0.1
    window: Natural = 14  # cells; 0: global attention in every block
    global_blocks: tuple[Natural, ...] = (2, 5, 8, 11)
    # The pretraining grid's position embedding: stretched over the image as in ViTDet, or repeated in every window, as
    # "Window Attention is Bugged" (arXiv 2311.05613) has it.
    positions: Literal["interpolate", "repeat"] = "interpolate"
    relative_position: bool = True
    pyramid_scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (4.0, 2.0, 1.0, 0.5)
    pyramid_dim: Positive = 256  # channels of the pyramid and of the heads' convolutions
    head_convs: Natural = 4  # 3x3 convolutions of the box and of the mask head
    head_dim: Positive = 1024  # hidden layer of the box head
    proposals: Positive = 1000  # an image, after suppression
    rois: Positive = 512  # regions an image trains the heads with
    jitter_scale: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)  # large-scale jitter
    flip: Probability = 0.5
    precision: Precision = "auto"
    evaluate_every: Natural = 0  # iterations; 0: only at the end

    def strides(self, patch_size: int) -> tuple[int, ...]:
        """Pixels a cell of each pyramid level, finest first. Raises ValueError where a scale does not fit the patch."""
        if not set(self.pyramid_scales) <= {4.0, 2.0, 1.0, 0.5}:
            raise ValueError(f"detection.pyramid_scales {list(self.pyramid_scales)} may hold 4.0, 2.0, 1.0 and 0.5")
        strides = [patch_size / scale for scale in self.pyramid_scales]
        if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(
                f"detection.pyramid_scales {list(self.pyramid_scales)} must halve from one level to the next"
            )
        if not all(stride.is_integer() and stride >= 2 and int(stride).bit_count() == 1 for stride in strides):
            raise ValueError(
                f"detection.pyramid_scales {list(self.pyramid_scales)} on patch_size {patch_size} gives levels of "
                f"{', '.join(f'{s:g}' for s in strides)} pixels a cell; these must be powers of two from 2 on"
            )
        return tuple(int(stride) for stride in strides)

    def positions_grid(self, encoder: EncoderSettings) -> int:
        """Cells along a side of the grid that the backbone has position embeddings for."""
        return encoder.grid if self.positions == "interpolate" else self.image_size // encoder.patch_size

    def check(self, encoder: EncoderSettings) -> None:
        """Raises ValueError where the stage can't be built on this encoder."""
        coarsest = self.strides(encoder.patch_size)[-1]
        step = max(coarsest, encoder.patch_size)
        if self.image_size % step:
            raise ValueError(
                f"detection.image_size {self.image_size} is not a multiple of {step} pixels, a cell of the coarsest pyramid level"
            )
        depth = dimensions(encoder).depth
        if self.window and (beyond := [block for block in self.global_blocks if block >= depth]):
            raise ValueError(
                f"detection.global_blocks names block {beyond[0]} of an encoder of {depth} blocks (from 0); list existing ones"
            )
        if self.positions == "repeat" and self.window != encoder.grid:
            raise ValueError(
                f"detection.positions: repeat repeats the pretraining grid of {encoder.grid} x {encoder.grid} cells in every "
                f"window, and detection.window is {self.window}; set detection.window to {encoder.grid}"
            )
        _check_range("detection.jitter_scale", self.jitter_scale)
        if self.warmup_iterations > self.iterations:
            raise ValueError(
                f"detection.warmup_iterations {self.warmup_iterations} exceeds detection.iterations {self.iterations}"
            )
        if list(self.lr_drops) != sorted(self.lr_drops):
            raise ValueError(f"detection.lr_drops {list(self.lr_drops)} must ascend")


class ExperimentSettings(Section):
    """One named experiment with every stage's settings."""

    inherits: str | None = None
    description: str = ""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0,)
    stages: tuple[Stage, ...] = ("pretrain", "finetune", "linear_probe", "knn")
    published: str | None = None  # an entry of config/published.yaml that this experiment repeats
    dataset: DatasetSettings
    encoder: EncoderSettings = EncoderSettings()
    views: ViewSettings = ViewSettings()
    sampling: SamplingSettings = SamplingSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    linear_probe: LinearProbeSettings = LinearProbeSettings()
    knn: KnnSettings = KnnSettings()
    detection: DetectionSettings = DetectionSettings()
    resources: dict[Stage, ResourceSettings] = {}

    @field_validator("dataset", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return _name_only(value)

    @model_validator(mode="after")
    def _check(self) -> ExperimentSettings:
        for key in ("seeds", "stages"):
            given = getattr(self, key)
            if twice := [value for value in given if given.count(value) > 1]:
                raise ValueError(f"{key} lists {twice[0]} twice; remove one")
        cells = self.encoder.grid**2
        kept = int(cells * self.sampling.ratio)
        if kept < 1:
            raise ValueError(f"sampling.ratio {self.sampling.ratio} of {cells} cells keeps none; raise it")
        if self.sampling.strategy != "full" and self.sampling.samplings * kept > cells:
            raise ValueError(
                f"sampling.samplings {self.sampling.samplings} x {kept} kept cells exceed the {cells} cells of a view; "
                "lower sampling.samplings or sampling.ratio"
            )
        if "pretrain" in self.stages and self.encoder.weights != "pretrain":
            raise ValueError(
                f"encoder.weights is '{self.encoder.weights}' but stages lists pretrain; "
                "remove pretrain from stages or set encoder.weights: pretrain"
            )
        if "detection" in self.stages:
            self.detection.check(self.encoder)
        return self


# --------------------------------------------------------------------------------------------------
# How it is run. A change here never reruns anything.


class ResourceSettings(Section):
    """What a stage asks the cluster for; keys of Snakemake's resources. None: the executor's default."""

    local: bool | None = None  # data and report: where snakemake runs (the default), or false: a job like the others
    gpus: Natural | None = None  # over all nodes; one process a GPU
    nodes: Positive | None = None
    processes: Positive | None = None  # processes without GPUs (gloo)
    gpu_model: str | None = None
    cpus_per_gpu: Positive | None = None
    threads: Positive | None = None
    mem_mb: Positive | None = None
    runtime: Positive | None = None  # minutes
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    workers: Natural | None = None  # decoding workers a process
    checkpoint_minutes: PositiveFloat | None = None


class SourceSettings(Section):
    """Where a dataset comes from: a folder with its archives or unpacked files; None: download."""

    path: str | None = None
    download: bool = True  # false: fail rather than download


class StudySettings(Section):
    """A whole YAML file."""

    study: Annotated[str, Field(pattern=f"^{NAME}$")] = "study"  # names the report's folder and MLflow's experiment
    include: tuple[str, ...] = ()  # studies laid under this one, relative to its file
    results: Annotated[str, Field(pattern=r"^[^{}~\s]+$")] = "results"  # folder of everything that is written
    tracking_uri: str | None = None  # None: MLFLOW_TRACKING_URI, else sqlite under results/
    sources: dict[str, SourceSettings] = {}
    resources: dict[
        Literal["default", "data", "pretrain", "finetune", "linear_probe", "knn", "detection", "report"],
        ResourceSettings,
    ] = {}
    defaults: dict[str, Any] = {}  # laid under every experiment
    experiments: dict[str, ExperimentSettings]


ExperimentSettings.model_rebuild()


# --------------------------------------------------------------------------------------------------
# One stage's settings: what a rule passes to a verb.

# The blocks a stage's result depends on; Snakemake reruns a stage when one of them changes.
STAGE_SECTIONS: dict[str, tuple[str, ...]] = {
    "pretrain": ("dataset", "encoder", "views", "sampling", "pretrain"),
    "finetune": ("dataset", "encoder", "finetune"),
    "linear_probe": ("dataset", "encoder", "linear_probe"),
    "knn": ("dataset", "encoder", "knn"),
    "detection": ("encoder", "detection"),
}


class StageSettings(Section):
    """Everything one run of one stage depends on. Blocks outside STAGE_SECTIONS[stage] keep their defaults."""

    stage: Stage
    experiment: str
    seed: Natural
    upstream: str | None = None  # digest of the pretraining it starts from, so that it reruns with it
    dataset: DatasetSettings = DatasetSettings(name="")
    encoder: EncoderSettings = EncoderSettings()
    views: ViewSettings = ViewSettings()
    sampling: SamplingSettings = SamplingSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    linear_probe: LinearProbeSettings = LinearProbeSettings()
    knn: KnnSettings = KnnSettings()
    detection: DetectionSettings = DetectionSettings()

    @property
    def dataset_name(self) -> str:
        return self.detection.dataset if self.stage == "detection" else self.dataset.name

    def relevant(self) -> dict[str, Any]:
        """The blocks that count, as plain data with every default filled in."""
        keep = {"stage", "experiment", "seed", "upstream", *STAGE_SECTIONS[self.stage]}
        return self.model_dump(mode="json", include=keep)

    def to_json(self) -> str:
        return json.dumps(self.relevant(), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits over all that determines the result; the experiment's name does not."""
        content = {k: v for k, v in self.relevant().items() if k != "experiment"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str) -> StageSettings:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(_sentence("--settings", "", error, cls)) from None


# --------------------------------------------------------------------------------------------------
# A study, loaded and validated.


class Study(StudySettings):
    """A validated study and the answers the workflow asks of it."""

    def stage_settings(self, experiment: str, seed: int, stage: str) -> StageSettings:
        """Raises UserError where the study has no such experiment, seed or stage."""
        chosen = self.experiment(experiment)
        if stage not in chosen.stages:
            raise UserError(
                f"experiment '{experiment}' has no stage {stage}; its stages are {', '.join(chosen.stages)}"
            )
        if seed not in chosen.seeds:
            raise UserError(f"experiment '{experiment}' has no seed {seed}; its seeds are {list(chosen.seeds)}")
        sections = {name: getattr(chosen, name) for name in STAGE_SECTIONS[stage]}
        source = self.pretrain_source(experiment) if stage != "pretrain" else None
        upstream = self.stage_settings(source, seed, "pretrain").digest if source else None
        return StageSettings(stage=stage, experiment=experiment, seed=seed, upstream=upstream, **sections)  # type: ignore[arg-type]

    def experiment(self, name: str) -> ExperimentSettings:
        if name not in self.experiments:
            raise UserError(
                f"study '{self.study}' has no experiment '{name}'; {_nearest(name, sorted(self.experiments))}"
            )
        return self.experiments[name]

    def pretrain_source(self, experiment: str) -> str | None:
        """The experiment whose pretraining `experiment` starts from, if any."""
        weights = self.experiments[experiment].encoder.weights
        if weights == "pretrain":
            return experiment
        return weights.removeprefix("experiment:") if weights.startswith("experiment:") else None

    def jobs(self) -> list[tuple[str, int, str]]:
        """Every (experiment, seed, stage) of the study."""
        return [(name, seed, stage) for name, e in self.experiments.items() for seed in e.seeds for stage in e.stages]

    def datasets(self) -> list[str]:
        """Every dataset that some stage reads."""
        names = {e.dataset.name for e in self.experiments.values() if set(e.stages) - {"detection"}}
        names |= {e.detection.dataset for e in self.experiments.values() if "detection" in e.stages}
        return sorted(names)

    def stage_resources(self, stage: str, experiment: str | None = None) -> ResourceSettings:
        """Defaults, then the study's for this stage, then the experiment's."""
        layers = [self.resources.get("default"), self.resources.get(stage)]  # type: ignore[call-overload]
        if experiment is not None:
            layers.append(self.experiments[experiment].resources.get(stage))  # type: ignore[call-overload]
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer.model_dump(exclude_none=True) if layer else {}
        return ResourceSettings(**merged)


RESERVED_NAMES = ("data", "report", "mlflow.db", "mlartifacts", "checkpoints", "logs", "benchmarks")


def load_study(files: Sequence[str | Path], overrides: dict[str, Any] | None = None) -> Study:
    """Read, merge and validate a study.

    Args:
        files: YAML files, later ones laid over earlier ones.
        overrides: settings laid over all of them (`--set`, or what Snakemake was given by `--config`).

    Raises:
        UserError: a file is missing or not YAML, a key is unknown, a value has the wrong type or range.
    """
    raw: dict[str, Any] = {}
    for file in files:
        raw = _merge(raw, _read(Path(file)))
    raw = _merge(raw, overrides or {})
    return _validate(raw, ", ".join(str(f) for f in files) or "settings")


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`a.b=value` pairs as nested settings; values are read as YAML."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: write KEY=VALUE, for example --set defaults.pretrain.epochs=10")
        nested = read_value(text, f"--set {pair}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        result = _merge(result, nested)
    return result


def read_value(text: str, where: str) -> Any:
    """One value as a study's file would have it. Raises UserError where it is not YAML."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML, but a key given twice in one block is an error instead of a silent override."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`, which flatten_mapping resolves
            continue
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key, str):
            problem = f"key {key!r} is not text; quote it if it is a name"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
# YAML 1.1 reads 1e-3 as text; researchers write it, so read it as the number it is.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(file: Path, parents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file with its includes (relative to it) laid under it."""
    if file.resolve() in parents:
        raise UserError(f"{file}: includes itself through {' -> '.join(str(p) for p in parents)}; remove one include")
    try:
        text = file.read_text()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give an existing YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not valid YAML: {error.reason} at byte {error.start}; save it as UTF-8") from None
    content = read_value(text, str(file))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(
            f"{file}: a study is a block of keys (study, defaults, experiments), not a {type(content).__name__}"
        )
    merged: dict[str, Any] = {}
    includes = content.pop("include", None) or []
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{file}: include = {_shown(includes)}: should be a list of files, for example [cifar.yaml]")
    for name in includes:
        merged = _merge(merged, _own_defaults(_read(file.parent / name, (*parents, file.resolve()))))
    return _merge(merged, content)


def _own_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Lay an included study's defaults under its own experiments, so that they don't reach its neighbours."""
    defaults = raw.pop("defaults", None) or {}
    experiments = raw.get("experiments")
    if isinstance(experiments, dict) and isinstance(defaults, dict):
        for name, own in experiments.items():
            own = {} if own is None else own
            if isinstance(own, dict) and "inherits" not in own:
                experiments[name] = _merge(defaults, own)
    raw.pop("study", None)
    return raw


def _merge(below: Any, above: Any) -> Any:
    """Blocks merge key by key, an empty one changes nothing; everything else is replaced.

    `dataset: NAME` stands for `dataset: {name: NAME}`.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        for key, value in above.items():
            if key == "dataset" and {type(value), type(below.get(key))} == {str, dict}:
                merged[key] = _merge(_name_only(below[key]), _name_only(value))
            else:
                merged[key] = _merge(below[key], value) if key in below else value
        return merged
    return below if isinstance(below, dict) and above is None else above


def _name_only(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _inherit(
    name: str, experiments: dict[str, Any], defaults: dict[str, Any], where: str, chain: tuple[str, ...] = ()
) -> Any:
    own = experiments[name] if experiments[name] is not None else {}
    if not isinstance(own, dict):
        raise UserError(f"{where}: experiment '{name}': must be a block of settings, not {own!r}")
    parent = own.get("inherits")
    if parent is None:
        return _merge(defaults, own)
    if not isinstance(parent, str) or parent not in experiments:
        raise UserError(
            f"{where}: experiment '{name}': inherits '{parent}', which does not exist; {_nearest(str(parent), list(experiments))}"
        )
    if parent in (*chain, name):
        raise UserError(f"{where}: experiment '{name}': inherits itself through {' -> '.join((*chain, name, parent))}")
    base = _inherit(parent, experiments, defaults, where, (*chain, name))
    base = {key: value for key, value in base.items() if key not in ("inherits", "description", "published")}
    return _merge(base, own)


def _validate(raw: dict[str, Any], where: str) -> Study:
    experiments = raw.get("experiments")
    if not isinstance(experiments, dict) or not experiments:
        raise UserError(f"{where}: no experiments; add an 'experiments:' block with at least one")
    for name in experiments:
        if not re.fullmatch(NAME, name, re.ASCII) or name in RESERVED_NAMES:
            raise UserError(
                f"{where}: experiment name '{name}' can't be used as a folder; use letters, digits, _ . - and none of {', '.join(RESERVED_NAMES)}"
            )
    defaults = raw.get("defaults") or {}
    resolved = {}
    for name in experiments:
        merged = _inherit(name, experiments, defaults, where)
        try:
            resolved[name] = ExperimentSettings.model_validate(merged)
        except ValidationError as error:
            raise UserError(_sentence(where, f"experiment '{name}': ", error, ExperimentSettings)) from None
    try:
        study = Study.model_validate({**raw, "experiments": resolved})
    except ValidationError as error:
        raise UserError(_sentence(where, "", error, StudySettings)) from None
    _check_references(study, where)
    return study


def _check_references(study: Study, where: str) -> None:
    """What one experiment alone can't know: datasets, engines and other experiments it names."""
    from aps.data import REGISTRY
    from aps.published import load as published

    if unknown := sorted(set(study.sources) - set(REGISTRY)):
        raise UserError(f"{where}: sources names dataset '{unknown[0]}'; {_nearest(unknown[0], sorted(REGISTRY))}")
    for name, e in study.experiments.items():
        prefix = f"{where}: experiment '{name}':"
        if e.published is not None and e.published not in (entries := sorted(published())):
            raise UserError(f"{prefix} published '{e.published}' is no entry; {_nearest(e.published, entries)}")
        if set(e.stages) - {"detection"} and e.dataset.name not in (known := dataset_names("classification")):
            raise UserError(f"{prefix} dataset '{e.dataset.name}' is unknown; {_nearest(e.dataset.name, known)}")
        if "detection" in e.stages:
            if e.detection.dataset not in (known := dataset_names("detection")):
                raise UserError(
                    f"{prefix} detection.dataset '{e.detection.dataset}' is unknown; {_nearest(e.detection.dataset, known)}"
                )
            if e.detection.engine not in (known := engine_names()):
                raise UserError(
                    f"{prefix} detection.engine '{e.detection.engine}' is unknown; {_nearest(e.detection.engine, known)}"
                )
        source = study.pretrain_source(name)
        if source is None:
            continue
        if source not in study.experiments:
            raise UserError(
                f"{prefix} encoder.weights names experiment '{source}', which does not exist; {_nearest(source, sorted(study.experiments))}"
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
        shape = ("arch", "dim", "depth", "heads", "patch_size", "qkv_bias", "mlp_ratio")
        if different := [key for key in shape if getattr(e.encoder, key) != getattr(other.encoder, key)]:
            raise UserError(
                f"{prefix} encoder.{different[0]} differs from that of '{source}', whose weights it takes; set them alike"
            )


def _sentence(where: str, prefix: str, error: ValidationError, model: type[BaseModel]) -> str:
    """One error of a validation as one sentence: where, key, value, what is allowed.

    An unknown key comes first, because a misspelt one is often the reason for the others.
    """
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden" and e["loc"][-1:] != ("[key]",))
    path = [str(part) for part in first["loc"] if part != "[key]"]
    key = ".".join(path)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: {prefix}unknown key '{key}'; {_nearest_key(path, model)}{more}"
    if first["loc"] and first["loc"][-1] == "[key]":  # of a block whose keys are names, such as resources
        known = re.findall(r"'(\w+)'", str(first["msg"]))
        return f"{where}: {prefix}unknown key '{key}'; {_nearest(path[-1], known)}{more}"
    if first["type"] == "missing":
        return f"{where}: {prefix}'{key}' is missing; add it{more}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {prefix}{key + ': ' if key else ''}{message}{more}"
    for pydantic, ours in WORDS:
        message = re.sub(pydantic, ours, message)
    return f"{where}: {prefix}{key + ' = ' if key else ''}{_shown(first['input'])}: {message}{more}"


WORDS = (
    (r"^(Input|String|Tuple|List) should", "should"),
    (r"valid dictionary or instance of \w+", "block of settings"),
    (r"valid dictionary", "block of settings"),
    (r"valid tuple", "list"),
    (r"a valid string", "text"),
    (r"a valid boolean", "true or false"),
    (r"a valid integer", "a whole number"),
    (r"should match pattern '\^\[A-Za-z0-9\].*", "should be letters, digits, _ . and -, because it becomes a folder"),
    (r" after validation", ""),
)


def _shown(value: Any) -> str:
    """A value as YAML on one line, cut where it is long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, TypeError):  # it holds itself
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest_key(path: list[str], model: type[BaseModel]) -> str:
    """Nearest known key at the same place, else the same key in another block."""
    fields = _fields_at(path[:-1], model)
    if close := difflib.get_close_matches(path[-1], fields, n=1, cutoff=0.6):
        return f"did you mean '{'.'.join([*path[:-1], close[0]])}'?"
    for name, block in _blocks(model).items():
        if path[-1] in block.model_fields:
            place = "defaults" if name == "experiments" else name  # where a setting of every experiment belongs
            return f"did you mean '{place}.{path[-1]}'?"
    return f"known keys: {', '.join(fields)}"


def _fields_at(path: list[str], model: type[BaseModel]) -> list[str]:
    for part in path:
        if part in model.model_fields:
            model = _blocks(model).get(part, model)
    return list(model.model_fields)


def _blocks(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    blocks = {}
    for name, field in model.model_fields.items():
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                blocks[name] = candidate
    return blocks
