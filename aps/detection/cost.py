"""Counts what a detection run costs, on engine torchvision's Mask R-CNN; other engines train the same network.

The number of regions an image trains on depends on its content, so each part with matrix products is run on the largest
number that the settings allow: backbone and pyramid, proposal head, box head, mask head. The parts left out (anchors,
suppression, pooling, matching) have no matrix products.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from aps.cost import Cost, Counts, half_precision
from aps.detection.engines.torchvision import build_model
from aps.runtime.counting import Counted, autocast, count
from aps.settings.blocks import DetectionSettings, EncoderSettings

DETECTIONS = 100  # detections of a test image at most, each with a mask
MASKED = 0.25  # share of an image's training regions that have a mask, at most
# Settings that do not change the network.
SCHEDULE = (
    "engine", "dataset", "iterations", "lr", "weight_decay", "layer_decay", "warmup_iterations", "lr_drops", "jitter_scale",
    "flip", "precision", "evaluate_every", "train_limit",
)  # fmt: skip


def detection(settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost:
    """Operations, memory and bytes of the stage, by the settings of an experiment."""
    s: DetectionSettings = settings.detection
    encoder = settings.encoder.model_copy(update={"weights": "random"})
    fields = DetectionSettings.model_fields
    network = s.model_copy(update={name: fields[name].default for name in SCHEDULE})  # so that the cache is hit
    half = half_precision(s.precision, gpu)
    trained, tested = (_count(encoder, network, counts.classes, counts.masks, half, train) for train in (True, False))
    flops = s.iterations * trained.flops + counts.test * tested.flops
    return Cost(flops, trained.training_memory(gpus), 4 * trained.parameters * (1 + 2 * 3))


@cache
def _count(
    encoder: EncoderSettings, settings: DetectionSettings, classes: int, has_masks: bool, half: bool, train: bool
) -> Counted:
    """The cost of one training batch, forward and backward, or of one test image."""
    B, S, C = settings.batch_size if train else 1, settings.image_size, settings.pyramid_dim
    boxes = B * (settings.rois if train else settings.proposals)
    masks = B * (int(settings.rois * MASKED) if train else DETECTIONS)
    task: Any = SimpleNamespace(
        settings=settings, encoder=encoder, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3,
        train=SimpleNamespace(classes=range(classes), masks=has_masks),
    )  # fmt: skip

    def forward(model: Any) -> list[Tensor]:
        heads = model.train(train).roi_heads
        features = list(model.backbone(torch.empty(B, 3, S, S)).values())

        def pooled(regions: int, side: int) -> Tensor:
            return features[0].new_empty(regions, C, side, side).requires_grad_(train)

        scores, deltas = model.rpn.head(features)
        outputs = heads.box_predictor(heads.box_head(pooled(boxes, 7)))
        if has_masks:
            outputs = (*outputs, heads.mask_predictor(heads.mask_head(pooled(masks, 14))))
        return [*scores, *deltas, *outputs]

    def run(model: Any) -> None:
        with torch.set_grad_enabled(train), autocast(half):
            outputs = forward(model)
        if train:
            torch.stack([x.float().sum() for x in outputs]).sum().backward()

    return count(lambda: build_model(task), run)
