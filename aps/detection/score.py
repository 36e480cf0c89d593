"""Computes COCO's metrics of boxes and masks by pycocotools, in percent, as usual in the field.

| key            | meaning                                                        |
|----------------|----------------------------------------------------------------|
| box_AP         | mean over IoU 0.50:0.95 of average precision                   |
| box_AP50, AP75 | at one IoU                                                     |
| box_AP_small   | of instances under 32^2 pixels; medium under 96^2; large above |
| box_AR1, 10, 100 | recall with so many detections per image; also by size       |

and likewise mask_..., where instances have masks. A key without instances to average over (no large ones, say) is left out.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from aps.detection.annotations import CocoSplit

# pycocotools' summary, in its order.
STATS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
KINDS = {"bbox": "box", "segm": "mask"}


def coco_metrics(split: CocoSplit, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Score detections in COCO's result format (`predictions.json`) against a split.

    Returns:
        The keys above, and `per_class`: {"box_AP": {class: AP}, "mask_AP": {...}}.
    """
    metrics: dict[str, Any] = {}
    per_class: dict[str, dict[str, float]] = {}
    for kind, name in KINDS.items():
        if kind == "segm" and not split.masks:
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
            found = split.coco.loadRes([dict(row) for row in results]) if results else _nothing(split.coco)
            evaluation = COCOeval(split.coco, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        metrics |= metrics_by_key(name, evaluation.stats)
        per_class[f"{name}_AP"] = class_precision(split.classes, evaluation.eval["precision"])
    return {**metrics, "per_class": per_class}


def _nothing(truth: COCO) -> COCO:
    """No detections; pycocotools' `loadRes` refuses an empty list."""
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def metrics_by_key(name: str, stats: Sequence[float]) -> dict[str, float]:
    """pycocotools' twelve numbers in percent, by the keys of this module; undefined ones (-1) are left out."""
    return {f"{name}_{key}": 100 * float(value) for key, value in zip(STATS, stats, strict=True) if value >= 0}


def class_precision(classes: tuple[str, ...], precision: np.ndarray) -> dict[str, float]:
    """precision: (IoU, recall, class, size, detections), -1 where undefined -> AP of each class with instances, in percent."""
    by_class = {}
    for number, label in enumerate(classes):
        of_class = precision[:, :, number, 0, -1]
        value = float(np.mean(of_class[of_class > -1])) if (of_class > -1).any() else math.nan
        if not math.isnan(value):
            by_class[label] = 100 * value
    return by_class
