"""What a detection run costs, counted on engine torchvision's Mask R-CNN; other engines train the same network.

Which anchors and regions an image trains on depends on what is in it, so the parts with products are run one after the
other, on as many regions as the settings allow: backbone and pyramid, proposal head, box head, mask head. What is left out
(anchors, suppression, pooling, matching) has no products.
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

DETECTIONS = 100  # with a mask, on an image of a test at most
MASKED = 0.25  # share of the regions that an image trains on which have a mask, at most
# Settings that change no network.
SCHEDULE = (
    "engine", "dataset", "iterations", "lr", "weight_decay", "layer_decay", "warmup_iterations", "lr_drops", "jitter_scale",
    "flip", "precision", "evaluate_every",
)  # fmt: skip


def detection(settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost:
    s: DetectionSettings = settings.detection
    encoder = settings.encoder.model_copy(update={"weights": "random"})
    fields = DetectionSettings.model_fields
    alike = s.model_copy(update={name: fields[name].default for name in SCHEDULE})
    half = half_precision(s.precision, gpu)
    trained, tested = (_count(encoder, alike, counts.classes, counts.masks, half, train) for train in (True, False))
    flops = s.iterations * trained.flops + counts.test * tested.flops
    return Cost(flops, trained.training_memory(gpus), 4 * trained.parameters * (1 + 2 * 3))


@cache
def _count(
    encoder: EncoderSettings, settings: DetectionSettings, classes: int, has_masks: bool, half: bool, train: bool
) -> Counted:
    """A batch forward and backward, or one image of a test."""
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
        found = heads.box_predictor(heads.box_head(pooled(boxes, 7)))
        if has_masks:
            found = (*found, heads.mask_predictor(heads.mask_head(pooled(masks, 14))))
        return [*scores, *deltas, *found]

    def run(model: Any) -> None:
        with torch.set_grad_enabled(train), autocast(half):
            outputs = forward(model)
        if train:
            torch.stack([x.float().sum() for x in outputs]).sum().backward()

    return count(lambda: build_model(task), run)
