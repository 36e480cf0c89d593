"""The blocks of settings: every key with its type, range, default and description.

Most blocks determine results: a change of a key reruns the stages that depend on it. The blocks `resources` and `sources`
say how and from where stages run; a change there reruns nothing.

A pretraining method adds its own keys to the block `pretrain` (`aps.methods`).
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from aps.errors import UserError
from aps.registry import ARCHS, METHODS, STRATEGIES
from aps.settings.base import (
    Depth,
    Jitter,
    Natural,
    NonNegative,
    Positive,
    PositiveFloat,
    Precision,
    Probability,
    Rate,
    Section,
    Share,
    Side,
    Temperature,
    WeightDecay,
    check_crop,
    check_distinct,
    check_range,
    without_null,
)

MOST_CELLS = 65_536  # cells of an image; the cost of attention is quadratic in them
Aspect = Annotated[float, Field(ge=0.01, le=100)]  # width over height
Scale = Annotated[float, Field(ge=0.01, le=10)]  # of the side of an image, whose resized pixels have to fit into memory
RAND_AUGMENT = r"^rand(-n\d{1,2}|-(m|mmax|inc)\d{1,3}|-(mstd|p)\d{1,3}(\.\d{1,9})?)*$"


class DatasetSettings(Section):
    """Which images, and how they are normalized in every stage."""

    name: str = Field(description="classification dataset; `dataset: NAME` is short for `dataset: {name: NAME}`")
    train_limit: Positive | None = Field(
        None, description="use the first so many images of a seeded shuffle of train; null: all"
    )
    statistics: Literal["measured", "published", "encoder"] = Field(
        "measured",
        description="channel mean and deviation: measured on this train split, the published ones, or those the encoder "
        "was trained with (where its file says them, else measured)",
    )


class StageDatasetSettings(DatasetSettings):
    """The dataset of one stage, other than the one its encoder was pretrained on."""

    statistics: Literal["measured", "published", "encoder"] = Field("encoder", description="as dataset.statistics")


def name_only(value: Any) -> Any:
    """`dataset: NAME` is short for `dataset: {name: NAME}`."""
    return {"name": value} if isinstance(value, str) else value


StageDataset = Annotated[
    StageDatasetSettings | None,
    BeforeValidator(name_only),
    # Excluded from dumps, because the settings of one stage (StageSettings) have its dataset in the block `dataset`.
    Field(
        exclude=True,
        description="another dataset for this stage, by name or as a block like `dataset`; null: the experiment's",
        json_schema_extra=lambda schema: schema["anyOf"].insert(0, {"type": "string"}),
    ),
]


class EncoderSettings(Section):
    """The Vision Transformer (method.md, Model)."""

    arch: str = Field(
        "tiny", description="width, depth and heads by name (`aps/models/archs.py`): micro, tiny, small, base"
    )
    image_size: Side = Field(32, description="S, pixels")
    patch_size: Positive = Field(2, description="P, pixels; divides S")
    dim: Positive | None = Field(None, description="width, instead of the arch's; a million at most")
    depth: Depth | None = Field(None, description="blocks, instead of the arch's")
    heads: Positive | None = Field(None, description="attention heads, instead of the arch's; divides the width")
    mlp_ratio: Annotated[float, Field(gt=0, le=100)] = Field(4.0, description="hidden width of the MLP over the width")
    qkv_bias: bool = Field(False, description="bias of the query, key and value projection")
    layer_norm_eps: Annotated[float, Field(ge=1e-12, le=1)] = Field(1e-5, description="epsilon of every LayerNorm")
    init: Literal["torch", "timm"] = Field(
        "torch",
        description="of linear layers where no weights are loaded: `torch`, as the authors' release, uniform within 1/sqrt(inputs); `timm`, normal of deviation 0.02, biases 0",
    )
    weights: str = Field(
        "pretrain",
        description="`pretrain`: this experiment's own; `random`: none; `experiment:NAME`, `timm:NAME` or a .safetensors file, made first if a run of this study writes it",
    )

    @property
    def grid(self) -> int:
        """G, cells along a side."""
        return self.image_size // self.patch_size

    @model_validator(mode="after")
    def _check(self) -> EncoderSettings:
        if self.arch not in ARCHS:
            raise ValueError(f"arch '{self.arch}' is unknown; {ARCHS.unknown(self.arch)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; change either"
            )
        if self.grid**2 > MOST_CELLS:
            raise ValueError(
                f"image_size {self.image_size} and patch_size {self.patch_size} make {self.grid**2:,} cells of an image, above "
                f"{MOST_CELLS:,}; lower image_size or raise patch_size"
            )
        if not re.fullmatch(r"pretrain|random|experiment:[\w.-]+|timm:[\w.-]+|.*\.safetensors", self.weights):
            raise ValueError(
                f"weights '{self.weights}' is not one of pretrain, random, experiment:NAME, timm:NAME, FILE.safetensors"
            )
        return self


def differs(a: EncoderSettings, b: EncoderSettings) -> str | None:
    """The first key in which two encoders differ so that one can't have the other's weights; None without one."""
    shape = ("arch", "dim", "depth", "heads", "patch_size", "qkv_bias", "mlp_ratio")
    return next((key for key in shape if getattr(a, key) != getattr(b, key)), None)


class ViewSettings(Section):
    """Augmentation of one view (method.md, Views)."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.15, 1.0), description="[low, high] share of the image's area in a crop"
    )
    crop_ratio: tuple[Aspect, Aspect] = Field((3 / 4, 4 / 3), description="[low, high] width over height of a crop")
    flip: Probability = Field(0.5, description="probability")
    color_jitter: tuple[Jitter, Jitter, Jitter, Annotated[float, Field(ge=0, le=0.5)]] = Field(
        (
            0.4,
            0.4,
            0.4,
            0.1,
        ),
        description="strength for brightness, contrast, saturation, hue",
    )
    color_jitter_prob: Probability = Field(0.8, description="probability")
    grayscale: Probability = Field(0.2, description="probability")
    blur: tuple[Probability, Probability] = Field(
        (0.0, 0.0), description="probability in view 1 and view 2 (MoCo v3: 1.0, 0.1)"
    )
    solarize: tuple[Probability, Probability] = Field(
        (0.0, 0.0), description="probability in view 1 and view 2 (MoCo v3: 0.0, 0.2)"
    )

    @model_validator(mode="after")
    def _check(self) -> ViewSettings:
        check_crop(self.crop_scale)
        check_range("crop_ratio", self.crop_ratio)
        return self


class SamplingSettings(Section):
    """Which patches of each view the encoder sees (method.md, Sampling)."""

    strategy: str = Field(
        "asymmetric", description="`asymmetric` (the method), `random` (both views sparse), `full` (all tokens)"
    )
    ratio: Annotated[float, Field(gt=0, le=1)] = Field(0.25, description="r, share of patches kept")
    samplings: Positive = Field(4, description="T, samplings and optimizer steps a batch; T r <= 1")
    gamma: Annotated[float, Field(ge=0, le=1000)] = Field(
        3.0, description="how sharply overlap is avoided; 0: not at all"
    )
    flip_aware: bool = Field(
        True, description="false: overlap of flipped views on mirrored cells, as in the authors' release"
    )

    @field_validator("strategy")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(f"strategy '{value}' is unknown; {STRATEGIES.unknown(value)}")
        return value

    @staticmethod
    def unread(strategy: str) -> frozenset[str]:
        """Keys that a strategy does not use."""
        return frozenset(
            {"random": ("gamma", "flip_aware"), "full": ("ratio", "gamma", "flip_aware")}.get(strategy, ())
        )


class BudgetSettings(Section):
    """The budget of a pretraining: operations or time."""

    alternatives = ("flops", "minutes")
    flops: Annotated[float, Field(gt=0, le=1e30)] | None = Field(
        None, description="operations of all steps, counted; a multiply-add is two"
    )
    minutes: Annotated[float, Field(gt=0, le=1e7)] | None = Field(
        None, description="of training; such a run does not repeat bit for bit"
    )

    @model_validator(mode="after")
    def _check(self) -> BudgetSettings:
        if (self.flops is None) == (self.minutes is None):
            raise ValueError("budget is {flops: ...} or {minutes: ...}, one of the two")
        return self


class PretrainSettings(Section):
    """Keys of every pretraining method; a method adds more (method.md, Pretraining recipe)."""

    alternatives = ("knn_every", "knn_readings")
    method: str = Field("aps", description="a file of `aps/methods`; its own keys stand in a table below")
    epochs: Positive = Field(1600, description="E")
    budget: BudgetSettings | None = Field(
        None,
        description="`{flops: 1e15}` or `{minutes: 30}`: the schedule of `epochs`, stretched or shrunk to so many operations of training, or to so long",
    )
    batch_size: Positive = Field(512, description="B, over all processes")
    lr: Rate = Field(1e-3, description="of a batch of 256; the optimizer gets lr B / 256")
    warmup_epochs: Natural = Field(20, description="of the learning rate")
    schedule: Literal["release", "cosine"] = Field(
        "release",
        description="`release`: min((e+1)/warmup, (1+cos(pi e/E))/2) by epoch; `cosine`: linear warmup, then cosine, by step",
    )
    weight_decay: WeightDecay = Field(0.05, description="AdamW's, on all parameters")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="AdamW's")
    precision: Precision = Field("auto", description="`auto`: bf16 where the GPU has it, else fp16 on a GPU, else fp32")
    accumulate: Positive = Field(
        1, description="parts into which a process's batch is cut, each with its own negatives; one optimizer step"
    )
    activation_checkpointing: bool = Field(False, description="less memory for more time")
    compile: bool = Field(False, description="torch.compile")
    knn_every: Natural = Field(0, description="epochs between kNN readings on held-out train images; 0: never")
    knn_readings: Positive | None = Field(
        None,
        description="so many readings at equal shares of the run instead, the last at its end: methods of one budget are read at the same operations",
    )

    @property
    def reads(self) -> str:
        """The key by which kNN is read during the run; empty where it is not read."""
        return "knn_readings" if self.knn_readings else "knn_every" if self.knn_every else ""

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"method '{value}' is unknown; {METHODS.unknown(value)}")
        return value

    @model_validator(mode="after")
    def _check_readings(self) -> PretrainSettings:
        if self.knn_every and self.knn_readings:
            raise ValueError("knn_every and knn_readings are both set; give one of them")
        return self

    @model_serializer(mode="wrap")
    def _without_null(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_null(serialize(self), "knn_readings")


class FinetuneSettings(Section):
    """Finetuning (method.md, Finetuning recipe)."""

    epochs: Positive = Field(100, description="over train")
    batch_size: Positive = Field(128, description="over all processes")
    lr: Rate = Field(2e-3, description="of a batch of 512; the optimizer gets lr B / 512")
    min_lr: NonNegative = Field(1e-5, description="where the cosine ends")
    warmup_epochs: Natural = Field(5, description="linear from warmup_lr")
    warmup_lr: NonNegative = Field(1e-6, description="where the warmup starts")
    weight_decay: WeightDecay = Field(0.05, description="AdamW's")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="learning rate of a block over that of the next; 1: the same for all"
    )
    clip_grad: NonNegative = Field(0.0, description="largest norm of the gradient of all weights together; 0: any")
    drop_path: Share = Field(0.1, description="stochastic depth of the last block, linear from 0")
    rand_augment: Annotated[str, Field(pattern=RAND_AUGMENT)] | None = Field(
        "rand-m9-mstd0.5-inc1", description="RandAugment in timm's notation; null: none"
    )
    crop: Literal["pad", "resized"] = Field(
        "pad", description="`pad`: pad by 4 and crop; `resized`: random resized crop"
    )
    flip: Probability = Field(0.5, description="probability")
    color_jitter: Jitter = Field(0.4, description="used where rand_augment is null, as in timm")
    erasing: Probability = Field(0.25, description="probability")
    mixup: NonNegative = Field(0.8, description="alpha; 0: none")
    cutmix: NonNegative = Field(1.0, description="alpha; 0: none")
    mixup_switch: Probability = Field(0.5, description="probability of cutmix where both are on")
    label_smoothing: Share = Field(0.1, description="of the cross-entropy")
    ema: Share = Field(0.99996, description="decay of the averaged model, which is evaluated too; 0: none")
    holdout: Share = Field(0.0, description="share of train held out to pick a best epoch; 0: the last epoch")
    precision: Precision = Field("auto", description="as in pretrain")
    compile: bool = Field(False, description="torch.compile")
    dataset: StageDataset = None

    @model_validator(mode="after")
    def _check(self) -> FinetuneSettings:
        if (self.mixup > 0 or self.cutmix > 0) and self.batch_size % 2:
            raise ValueError(
                f"batch_size {self.batch_size} is odd, and mixup pairs the images; make it even, or set mixup and cutmix to 0"
            )
        return self


class LinearProbeSettings(Section):
    """Linear probing (method.md, Linear probe and kNN): all learning rates are heads trained in one pass."""

    epochs: Positive = Field(100, description="over train")
    batch_size: Positive = Field(256, description="over all processes")
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = Field(
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), description="learning rates as given, trained as parallel heads in one pass"
    )
    momentum: Probability = Field(0.9, description="SGD's")
    batch_norm: bool = Field(False, description="BatchNorm without affine before the head (MAE)")
    crop_scale: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.08, 1.0), description="[low, high] share of the image's area in a crop"
    )
    flip: Probability = Field(0.5, description="probability")
    holdout: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of train on which the learning rate is picked"
    )
    precision: Precision = Field("auto", description="as in pretrain")
    dataset: StageDataset = None

    @model_validator(mode="after")
    def _check(self) -> LinearProbeSettings:
        check_crop(self.crop_scale)
        check_distinct("lrs", tuple(f"{lr:g}" for lr in self.lrs))  # as figures are named
        if self.batch_norm and self.batch_size < 2:
            raise ValueError(
                "batch_size 1 has no statistics for batch_norm; raise batch_size, or set batch_norm: false"
            )
        return self


class KnnSettings(Section):
    k: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (10, 20, 100, 200), description="numbers of neighbours; each gives a figure"
    )
    temperature: Temperature = Field(0.07, description="of the votes")
    precision: Precision = Field("auto", description="as in pretrain")
    dataset: StageDataset = None

    @model_validator(mode="after")
    def _check(self) -> KnnSettings:
        check_distinct("k", self.k)
        return self


class EmbedSettings(Section):
    queries: Positive = Field(12, description="test images whose neighbours are shown")
    neighbours: Positive = Field(8, description="shown of each")
    dataset: StageDataset = None


class DetectionSettings(Section):
    """COCO transfer: Mask R-CNN on the encoder with a simple feature pyramid.

    Defaults are ViTDet's for ViT-B/16 (arXiv 2203.16527, its appendix and detectron2's release of it).
    """

    engine: str = Field("torchvision", description="a file of `aps/detection/engines`: torchvision, detectron2")
    dataset: str = Field("digits_coco", description="detection dataset")
    train_limit: Positive | None = Field(
        None,
        description="use the first so many images of a fixed shuffle of those with an instance, for training; null: all",
    )
    image_size: Side = Field(1024, description="longest side of a test image, side of a training crop, pixels")
    iterations: Positive = Field(184375, description="optimizer steps")
    batch_size: Positive = Field(64, description="over all processes")
    lr: Rate = Field(1e-4, description="as given, whatever the batch")
    weight_decay: WeightDecay = Field(0.1, description="none for the encoder's norms and position embeddings")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="learning rate of a block over that of the next"
    )
    warmup_iterations: Natural = Field(250, description="linear from 0.001 of lr")
    lr_drops: tuple[Probability, ...] = Field(
        (163889 / 184375, 177546 / 184375), description="by 10, as shares of the schedule"
    )
    drop_path: Share = Field(0.1, description="stochastic depth of the last block, linear from 0")
    window: Natural = Field(
        14, description="side of the attention windows in cells; 0: global attention in every block"
    )
    global_blocks: tuple[Natural, ...] = Field((2, 5, 8, 11), description="blocks with global attention, from 0")
    positions: Literal["interpolate", "repeat"] = Field(
        "interpolate",
        description="the pretraining grid's position embedding: stretched over the image, or repeated in every window (arXiv 2311.05613)",
    )
    relative_position: bool = Field(True, description="relative position bias in attention")
    pyramid_scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = Field(
        (4.0, 2.0, 1.0, 0.5), description="levels of the pyramid over the encoder's grid, finest first"
    )
    pyramid_dim: Positive = Field(256, description="channels of the pyramid and of the heads' convolutions")
    head_convs: Natural = Field(4, description="convolutions of the box and of the mask head")
    head_dim: Positive = Field(1024, description="hidden layer of the box head")
    proposals: Positive = Field(1000, description="an image, after suppression")
    rois: Positive = Field(512, description="regions an image trains the heads with")
    jitter_scale: tuple[Scale, Scale] = Field((0.1, 2.0), description="[low, high] of large-scale jitter")
    flip: Probability = Field(0.5, description="probability")
    precision: Precision = Field("auto", description="as in pretrain")
    evaluate_every: Natural = Field(0, description="iterations; 0: only at the end")

    @model_validator(mode="after")
    def _check(self) -> DetectionSettings:
        check_distinct("global_blocks", self.global_blocks)
        check_distinct("pyramid_scales", self.pyramid_scales)
        return self

    @model_serializer(mode="wrap")
    def _without_null(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_null(serialize(self), "train_limit")


def minutes(value: Any) -> Any:
    """A time limit in minutes, from text as Slurm or people write it: minutes, 36h, 90m, 2d, 1h30m, H:M:S, M:S, D-H,
    D-H:M, D-H:M:S. Values that are not text are returned as they are.

    Raises:
        ValueError: the text has none of these forms.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text):  # Slurm's
        days, *parts = (int(part) if part else None for part in found.groups())
        if days is None and parts[2] is None:  # minutes, minutes:seconds
            parts = [0, *parts[:2]]
        hours, mins, seconds = (part or 0 for part in parts)
        return (days or 0) * 1440 + hours * 60 + mins + -(-seconds // 60)
    number = r"(?:(\d+(?:\.\d+)?)"
    if text and (found := re.fullmatch(rf"{number}d)?\s*{number}h)?\s*{number}m(?:in)?)?", text)):
        d, h, m = (float(part or 0) for part in found.groups())
        return math.ceil(d * 1440 + h * 60 + m)
    raise ValueError(f"'{value}' is no time limit; write minutes, or 36h, 90m, 12:00:00, 1-12:00:00")


Runtime = Annotated[
    Positive,
    BeforeValidator(minutes),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]}),
]


class ResourceSettings(Section):
    """The resources that a stage requests, by Snakemake's keys. None: the executor's default."""

    local: bool | None = Field(
        None,
        description="of data and report: true, where Snakemake runs (the default), or false, a job like the others",
    )
    gpus: Natural | None = Field(None, description="over all nodes; one process a GPU")
    nodes: Positive | None = Field(None, description="machines; gpus or processes spread evenly over them")
    processes: Positive | None = Field(None, description="processes without GPUs")
    gpu_model: str | None = Field(None, description="as the cluster names it")
    cpus_per_gpu: Positive | None = Field(
        None,
        description="CPU cores for each GPU; null: 1 on a cluster; on one machine `--cores`, shared with the jobs that run beside it",
    )
    threads: Positive | None = Field(None, description="CPU cores a node; null: those of its GPUs, or 1")
    mem_mb: Positive | None = Field(None, description="memory; each further attempt gets half as much again")
    runtime: Runtime | None = Field(None, description="minutes, or text such as 36h, 90m, 12:00:00 or 1-12:00:00")
    partition: str | None = Field(None, description="queue of the cluster")
    account: str | None = Field(None, description="whom the cluster charges")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="node features")
    workers: Natural | None = Field(
        None, description="image-decoding processes of each process, for image files; null: as many as its cores"
    )
    checkpoint_minutes: PositiveFloat | None = Field(None, description="between checkpoints")


class SourceSettings(Section):
    """Where a dataset comes from: a folder with its archives or unpacked files; None: download."""

    path: str | None = Field(
        None, min_length=1, description="folder with the dataset's archives or unpacked files; null: download"
    )
    download: bool = Field(True, description="false: fail rather than download")
    trust: bool = Field(
        False,
        description="true: don't look for changed files in a tree each time the DAG is planned or results are shown",
    )

    @property
    def identity(self) -> str | None:
        """The value of `source` in the manifest of a dataset prepared from this source."""
        return self.path


class CocoFiles(Section):
    """One split of a detection dataset."""

    images: str = Field(min_length=1, description="folder of the images")
    annotations: str = Field(min_length=1, description="COCO json file")


class CocoSplits(Section):
    """The splits of a detection dataset."""

    train: CocoFiles
    val: CocoFiles


class UserDataset(Section):
    """A user's dataset: a `folder` of images, `arrays` in a file, or `coco` files."""

    alternatives = ("folder", "arrays", "coco")
    folder: str | None = Field(None, min_length=1, description="tree of image files, one folder a class")
    arrays: str | None = Field(None, min_length=1, description=".npz file with images and labels")
    coco: CocoSplits | None = Field(None, description="images and annotations of train and val, for detection")
    labels: bool = Field(True, description="false: use the images without labels, for pretraining; a tree of any depth")
    masks: bool = Field(True, description="false: detection trains boxes only")
    shrink: int | None = Field(
        None,
        ge=16,
        description="keep a copy of every larger image of a folder with this many pixels on the shorter side",
    )
    trust: bool = Field(
        False,
        description="true: don't look for changed files in a tree each time the DAG is planned or results are shown",
    )

    @property
    def kind(self) -> Literal["classification", "images", "detection"]:
        if self.coco is not None:
            return "detection"
        return "classification" if self.labels else "images"

    @property
    def paths(self) -> dict[str, str]:
        """Every path that the entry names, by its key."""
        if self.coco is None:
            return {key: path for key in ("folder", "arrays") if (path := getattr(self, key)) is not None}
        splits = {"train": self.coco.train, "val": self.coco.val}
        return {
            f"coco.{split}.{key}": getattr(files, key)
            for split, files in splits.items()
            for key in CocoFiles.model_fields
        }

    @property
    def identity(self) -> str:
        """The value of `source` in the manifest of a dataset prepared from this entry."""
        return json.dumps(self.model_dump(mode="json", exclude_defaults=True, exclude={"trust"}), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> UserDataset:
        """The entry that `text` holds as JSON. Raises UserError where it holds none."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(
                f"--entry: not an entry of `datasets`: {error.errors()[0]['msg']}; give one as JSON"
            ) from None

    @model_validator(mode="after")
    def _check(self) -> UserDataset:
        given = [key for key in self.alternatives if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"names {' and '.join(given) or 'no source'}; give one of folder (a tree of images), arrays (a .npz file) and "
                "coco (images and annotations)"
            )
        if self.coco is not None and not self.labels:
            raise ValueError(
                "labels: false is for folder and arrays; name the images of a detection dataset as a folder"
            )
        if self.coco is None and not self.masks:
            raise ValueError("masks: false is for coco; remove it")
        if self.folder is None and self.shrink is not None:
            raise ValueError("shrink is for folder; remove it")
        return self
