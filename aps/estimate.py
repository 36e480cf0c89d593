"""What a study costs before it runs: operations, GPU hours, memory and disk of every stage.

Peculiar: it needs neither data nor torch. Operations are those of matrix products and convolutions, a multiply-add
counting as two, and agree with torch's counter on a real step (tests/test_estimate.py). Hours follow from them by one
assumption, the share of the GPU's peak that a stage reaches, which is printed with them.

It does not know input pipelines: decoding ImageNet on too few cores takes longer than the GPU does.

Letters as in the method: B batch, N cells, n kept cells, T samplings, D width, P patch side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aps.errors import UserError
from aps.models.archs import dimensions
from aps.settings.blocks import DetectionSettings, EncoderSettings
from aps.settings.study import ExperimentSettings, Stage, Study


class Gpu(NamedTuple):
    name: str
    tflops: (
        float  # dense peak in TFLOP/s: bf16 with float32 sums, fp16 where there is no bf16 (the vendor's data sheets)
    )
    gigabytes: float


GPUS = {
    "v100": Gpu("V100 SXM2 32 GB (fp16)", 125, 32),
    "a40": Gpu("A40", 149.7, 48),
    "a100": Gpu("A100 SXM 80 GB", 312, 80),
    "l40s": Gpu("L40S", 362, 48),
    "rtx4090": Gpu("GeForce RTX 4090", 165.2, 24),
    "h100": Gpu("H100 SXM", 989, 80),
    "h200": Gpu("H200 SXM", 989, 141),
}


def utilization(dim: int) -> float:
    """Share of the peak that a Transformer of width D is assumed to reach: narrow ones are bound by memory traffic."""
    return 0.15 if dim <= 192 else 0.25 if dim <= 384 else 0.40


class Counts(NamedTuple):
    train: int
    test: int  # val of detection datasets
    classes: int
    gigabytes: float  # of the prepared dataset and, where it is downloaded, its archives


# Sizes the publishers state (digits and composites: this project's recipes). `folder` is the user's: its manifest says.
DATASETS = {
    "digits": Counts(1438, 359, 10, 0.0002),
    "fashion_mnist": Counts(60_000, 10_000, 10, 0.09),
    "cifar10": Counts(50_000, 10_000, 10, 0.36),
    "cifar100": Counts(50_000, 10_000, 100, 0.36),
    "imagenet1k": Counts(1_281_167, 50_000, 1000, 155),
    "digits_coco": Counts(1200, 200, 10, 0.01),
    "fashion_coco": Counts(4000, 500, 10, 0.1),
    "cifar_coco": Counts(4000, 500, 10, 0.27),
    "coco2017": Counts(118_287, 5_000, 80, 41),
}


class Flops(NamedTuple):
    """Operations of a forward pass, by what the backward pass makes of them."""

    linear: float = 0  # products with weights: backward costs twice
    attention: float = (
        0  # queries with keys, weights with values: fused kernels recompute them, backward costs 2.5 times
    )
    first: float = 0  # products of inputs that need no gradient: backward costs once

    def __add__(self, other: Flops) -> Flops:  # type: ignore[override]
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: float) -> Flops:
        return Flops(*(n * x for x in self))

    @property
    def forward(self) -> float:
        return sum(self)

    @property
    def training(self) -> float:
        return 3 * self.linear + 3.5 * self.attention + 2 * self.first


# ----------------------------------------------------------------------------------------------------------------------
# Operations


def encoder_flops(settings: EncoderSettings, cells: int | None = None) -> Flops:
    """One image of which the encoder sees `cells` cells (default: all N)."""
    D, depth, _ = dimensions(settings)
    n = settings.grid**2 if cells is None else cells
    return Flops(first=2 * n * 3 * settings.patch_size**2 * D) + block_flops(settings, n + 1).times(depth)


def block_flops(settings: EncoderSettings, tokens: int) -> Flops:
    """One transformer block on one image."""
    D = dimensions(settings).dim
    hidden = int(D * settings.mlp_ratio)
    return Flops(linear=2 * tokens * (4 * D * D + 2 * D * hidden), attention=4 * tokens * tokens * D)


def head_flops(*widths: int) -> Flops:
    """One row through linear layers of these widths."""
    return Flops(linear=2 * sum(a * b for a, b in itertools.pairwise(widths)))


def kept(e: ExperimentSettings) -> int:
    """n, the cells of a view that the encoder sees."""
    cells = e.encoder.grid**2
    return cells if e.sampling.strategy == "full" else int(cells * e.sampling.ratio)


def pretraining_step_flops(e: ExperimentSettings) -> float:
    """One optimizer step on the whole batch: both views, heads, the loss in both directions."""
    s, D = e.pretrain, dimensions(e.encoder).dim
    view = encoder_flops(e.encoder, kept(e)) + head_flops(D, *s.projector) + head_flops(s.projector[-1], *s.predictor)
    step = 2 * s.batch_size * view.training
    if s.activation_checkpointing:  # blocks again, up to the last product: its result is not needed
        tokens, (_, depth, _) = kept(e) + 1, dimensions(e.encoder)
        again = block_flops(e.encoder, tokens).forward - 2 * tokens * D * int(D * e.encoder.mlp_ratio)
        step += 2 * s.batch_size * depth * again
    logits = Flops(first=2 * s.batch_size * (s.batch_size / s.accumulate) * s.predictor[-1])  # keys need no gradient
    return step + 2 * logits.training


def finetuning_image_flops(e: ExperimentSettings, classes: int) -> Flops:
    """One image through encoder and classifier."""
    return encoder_flops(e.encoder) + head_flops(dimensions(e.encoder).dim, classes)


def detection_image_flops(
    encoder: EncoderSettings, s: DetectionSettings, classes: int, rois: float, masks: float
) -> Flops:
    """One image of S x S pixels through ViTDet's Mask R-CNN, `rois` regions through its box and `masks` through its mask head."""
    D, depth, _ = dimensions(encoder)
    H = s.image_size // encoder.patch_size
    C, K = s.pyramid_dim, classes + 1  # and background
    total = Flops(first=2 * H * H * 3 * encoder.patch_size**2 * D)
    for block in range(depth):
        w = s.window if s.window and block not in s.global_blocks else H
        tokens = (-(-H // w) * w) ** 2  # windows are padded
        total += Flops(
            linear=2 * tokens * 4 * D * D + 2 * H * H * 2 * D * int(D * encoder.mlp_ratio),
            attention=4 * tokens * w * w * D,
        )
        if s.relative_position:
            total += Flops(linear=2 * 2 * tokens * w * D)
    maps = 0.0  # cells of all levels
    for scale in s.pyramid_scales:
        cells, width = H * H * scale**2, D
        if scale == 4.0:
            total += Flops(linear=2 * H * H * 4 * D * (D // 2) + 2 * 4 * H * H * 4 * (D // 2) * (D // 4))
            width = D // 4
        elif scale == 2.0:
            total += Flops(linear=2 * H * H * 4 * D * (D // 2))
            width = D // 2
        total += Flops(linear=2 * cells * (width * C + 9 * C * C))
        maps += cells
    maps += cells / 4
    proposal = 2 * maps * (2 * 9 * C * C + C * 3 * (1 + 4))  # 3 anchors a cell
    box = 2 * (s.head_convs * 49 * 9 * C * C + 49 * C * s.head_dim + s.head_dim * 5 * K)
    mask = 2 * (s.head_convs * 196 * 9 * C * C + 196 * 4 * C * C + 784 * C * K)
    return total + Flops(linear=proposal + rois * box + masks * mask)


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def parameters(settings: EncoderSettings) -> int:
    """Of the encoder."""
    D, depth, _ = dimensions(settings)
    hidden = int(D * settings.mlp_ratio)
    block = 4 * D * D + D + 2 * D * hidden + hidden + D + 4 * D + (3 * D if settings.qkv_bias else 0)
    return D * (2 + settings.grid**2) + 3 * settings.patch_size**2 * D + depth * block + 2 * D


def activation_bytes(settings: EncoderSettings, tokens: int, width: int = 2) -> float:
    """What a training forward of one image keeps for the backward pass, `width` bytes a number (2: bf16 autocast).

    Of each token and block: the float32 residual stream twice (the norms' input), both norms' outputs, queries, keys,
    values and their mixture, the hidden layer before and after GELU; the norms' and softmax's statistics.
    """
    D, depth, heads = dimensions(settings)
    hidden = int(D * settings.mlp_ratio)
    return tokens * (depth * (8 * D + width * (6 * D + 2 * hidden) + 16 + 4 * heads) + 4 * D)


def training_bytes(count: float, ema: bool = False) -> float:
    """Of `count` parameters: float32 weights, gradients and AdamW's two moments, the bf16 copy; an average if kept."""
    return count * (4 + 4 + 8 + 2 + (4 if ema else 0))


# ----------------------------------------------------------------------------------------------------------------------
# Stages


@dataclass(frozen=True)
class Cost:
    """Of one run of a stage."""

    flops: float
    memory: float  # bytes on each GPU
    disk: float  # bytes of results and of the two checkpoints kept while it runs
    hours: float = 0.0  # of one GPU


def stage_cost(e: ExperimentSettings, stage: Stage, counts: Counts, gpus: int) -> Cost:
    """One run, shared by `gpus` GPUs. counts: of the stage's dataset."""
    D, depth, _ = dimensions(e.encoder)
    N, weights = e.encoder.grid**2, parameters(e.encoder)
    train = min(counts.train, e.dataset.train_limit or counts.train)
    seen = encoder_flops(e.encoder).forward
    if stage == "pretrain":
        s = e.pretrain
        steps = s.epochs * (train // s.batch_size) * e.sampling.samplings
        flops = steps * pretraining_step_flops(e)
        if s.knn_every:
            flops += s.epochs // s.knn_every * min(10_000, train) * seen  # aps.training.knn.monitor
        heads = sum(a * b for a, b in itertools.pairwise((D, *s.projector, *s.predictor)))
        views = 2 * s.batch_size / s.accumulate / gpus
        blocks = activation_bytes(e.encoder, kept(e) + 1)
        if s.activation_checkpointing:  # the input of each block, and one block at a time
            blocks = 4 * (kept(e) + 1) * D * depth + blocks / depth
        pixels = 4 * 3 * e.encoder.image_size**2 * (2 * s.batch_size / gpus + views)
        memory = training_bytes(weights + heads) + views * blocks + pixels
        return Cost(flops, memory, 4 * (weights + heads) * (1 + 2 * 3))
    if stage == "finetune":
        f = e.finetune
        image = finetuning_image_flops(e, counts.classes)
        chosen, held = train * (1 - f.holdout), train * f.holdout
        tests = 1 + (f.ema > 0) + (f.holdout > 0)  # last epoch, its average, best epoch on what was held out
        flops = f.epochs * (chosen * image.training + held * image.forward) + tests * counts.test * image.forward
        memory = training_bytes(weights, f.ema > 0) + f.batch_size / gpus * activation_bytes(e.encoder, N + 1)
        return Cost(flops, memory, 4 * weights * (1 + 2 * (4 if f.ema else 3)))
    forward_memory = 6 * weights + 256 * (N + 1) * D * (8 + 2 * 2 * e.encoder.mlp_ratio)
    if stage == "linear_probe":
        p = e.linear_probe
        step = seen + Flops(first=head_flops(D, counts.classes).forward * len(p.lrs)).training
        flops = p.epochs * train * (1 - p.holdout) * step + (train * p.holdout + counts.test) * seen
        heads = len(p.lrs) * (D + 1) * counts.classes
        return Cost(flops, forward_memory + 16 * heads, 4 * heads * (1 + 2 * 2))
    if stage == "knn":
        flops = (train + counts.test) * seen + 2.0 * train * counts.test * D
        return Cost(flops, forward_memory + 4.0 * D * (train + counts.test), 1e5)
    d = e.detection
    image = detection_image_flops(e.encoder, d, counts.classes, d.rois, d.rois / 4)
    tested = detection_image_flops(e.encoder, d, counts.classes, d.proposals, 100).forward
    flops = d.iterations * d.batch_size * image.training + counts.test * tested
    count = weights + _detector_parameters(e.encoder, d, counts.classes)
    memory = training_bytes(count) + max(1, d.batch_size / gpus) * _detection_activation_bytes(e.encoder, d)
    return Cost(flops, memory, 4 * count * (1 + 2 * 3))


def _detector_parameters(encoder: EncoderSettings, s: DetectionSettings, classes: int) -> float:
    """Of pyramid and heads, by their large layers."""
    D, C, convs = dimensions(encoder).dim, s.pyramid_dim, 9 * s.pyramid_dim**2
    pyramid = len(s.pyramid_scales) * (convs + D * C) + 4 * D * D * 5 / 4
    return pyramid + convs * (2 + 2 * s.head_convs) + 49 * C * s.head_dim + 5 * s.head_dim * (classes + 1) + 4 * C * C


def _detection_activation_bytes(encoder: EncoderSettings, s: DetectionSettings) -> float:
    """Of one image. The relative positions' bias is the largest: a row of keys for each query and head, saved a block."""
    H, (_, depth, heads) = s.image_size // encoder.patch_size, dimensions(encoder)
    total = activation_bytes(encoder, H * H)
    for block in range(depth if s.relative_position else 0):
        w = s.window if s.window and block not in s.global_blocks else H
        total += 2 * heads * (-(-H // w) * w) ** 2 * w * w
    maps = sum(H * H * scale**2 for scale in s.pyramid_scales)
    regions = s.rois * 49 + s.rois / 4 * 196
    return total + s.pyramid_dim * (8 * 6 * maps + (2 + 6) * s.head_convs * regions)


# ----------------------------------------------------------------------------------------------------------------------
# Report


def dataset_counts(study: Study, name: str) -> Counts:
    """Of a dataset: what its manifest says if it is prepared, else what its publisher states.

    Raises:
        UserError: neither is there.
    """
    manifest = Path(study.results) / "data" / name / "manifest.json"
    if manifest.exists():
        from aps.data.manifest import Manifest

        found = Manifest.read(manifest)
        test = found.splits["val" if found.kind == "detection" else "test"]
        size = DATASETS[name].gigabytes if name in DATASETS else sum(found.sizes.values()) / 1e9
        return Counts(found.splits["train"].count, test.count, len(found.classes), size)
    if name not in DATASETS:
        raise UserError(f"the size of dataset '{name}' is known once it is prepared; run `python -m aps data {name}`")
    return DATASETS[name]


def estimate(study: Study, gpu: str = "a100", share: float | None = None) -> str:
    """The table of a study.

    Args:
        study: validated.
        gpu: a name of GPUS.
        share: of the GPU's peak that is reached; None: `utilization` of the encoder's width.

    Raises:
        UserError: an unknown GPU, a share outside (0, 1], a dataset of unknown size.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu} is unknown; known: {', '.join(GPUS)}")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"--utilization {share} is not in (0, 1]; give a share of the peak")
    card = GPUS[gpu]
    rows = [("experiment", "stage", "runs", "PFLOP a run", "GPU h a run", "GPUs", "GB a GPU", "disk GB a run")]
    hours = disk = 0.0
    tight = []
    for name, e in study.experiments.items():
        for stage in e.stages:
            asked = study.stage_resources(stage, name)
            gpus = asked.gpus or asked.processes or 1
            dataset = e.detection.dataset if stage == "detection" else e.dataset.name
            cost = stage_cost(e, stage, dataset_counts(study, dataset), gpus)
            reached = share or utilization(dimensions(e.encoder).dim)
            run = cost.flops / (card.tflops * 1e12 * reached) / 3600
            hours += run * len(e.seeds)
            disk += cost.disk * len(e.seeds)
            if cost.memory > 0.9e9 * card.gigabytes:
                tight.append(f"{name} {stage}")
            figures = (
                _short(cost.flops / 1e15),
                _short(run),
                str(gpus),
                _short(cost.memory / 1e9),
                _short(cost.disk / 1e9),
            )
            rows.append((name, stage, str(len(e.seeds)), *figures))
    stored = {name: dataset_counts(study, name).gigabytes for name in study.datasets()}
    reached_text = f"{share:.0%}" if share else "15% (width to 192), 25% (to 384), 40% (wider)"
    lines = [
        f"study '{study.study}' on {card.name}: {card.tflops:g} TFLOP/s dense peak, of which {reached_text} is assumed to be reached",
        "",
        *_aligned(rows),
        "",
        f"all runs: {_short(hours)} GPU hours, {_short(disk / 1e9)} GB of results and checkpoints; "
        f"datasets: {', '.join(f'{name} {_short(size)} GB' for name, size in stored.items())}",
        "PFLOP: 10^15 operations, a multiply-add is two. Memory: weights, optimizer, activations in bf16; leave a tenth free.",
    ]
    if tight:
        lines.append(
            f"more than a {card.name} has: {', '.join(tight)}; ask for more GPUs, or set pretrain.accumulate or "
            "pretrain.activation_checkpointing"
        )
    return "\n".join(lines)


def _short(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.001 else f"{x:.1g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
