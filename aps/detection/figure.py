"""Draws detections below the ground truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools import mask as rle

from aps.data.load import spread_rows
from aps.detection.annotations import CocoSplit

SHOWN = 6  # images
ALPHA = 0.45  # of a mask's colour


def predictions_figure(path: Path, split: CocoSplit, results: list[dict[str, Any]]) -> None:
    """Write a PNG of images spread over the split: above the ground truth, below it as many of the best detections.

    Args:
        results: detections in COCO's result format.
    """
    indices = spread_rows(len(split), SHOWN)
    by_image: dict[int, list[dict[str, Any]]] = {split.ids[i]: [] for i in indices}
    for row in results:
        if row["image_id"] in by_image:
            by_image[row["image_id"]].append(row)
    figure = Figure(figsize=(2.6 * len(indices), 5.6), layout="constrained")
    axes = figure.subplots(2, len(indices), squeeze=False)
    for column, index in enumerate(indices):
        image = split.read(index).permute(1, 2, 0).numpy()
        truth = [a for a in split.coco.imgToAnns[split.ids[index]] if not a.get("iscrowd", 0)]
        draw_instances(axes[0, column], image, split, truth)
        found = sorted(by_image[split.ids[index]], key=lambda row: -row["score"])
        draw_instances(axes[1, column], image, split, found[: len(truth)])
        axes[0, column].set_title(f"image {split.ids[index]}", fontsize=9)
    axes[0, 0].set_ylabel("truth")
    axes[1, 0].set_ylabel("as many best detections")
    figure.savefig(path, dpi=110, format="png")


def draw_instances(axes: Axes, image: np.ndarray, split: CocoSplit, rows: list[dict[str, Any]]) -> None:
    """Draw boxes and masks on an image, one colour a class.

    Args:
        image: uint8 (H, W, 3).
        rows: annotations or results in COCO's format.
    """
    colours = matplotlib.colormaps["tab10" if len(split.classes) <= 10 else "hsv"].resampled(
        max(10, len(split.classes))
    )
    shown = image.astype(float) / 255
    for row in rows if split.masks else ():
        colour = np.array(colours(split.categories.index(row["category_id"]))[:3])
        mask = rle.decode(split.coco.annToRLE(row)).astype(bool)
        shown[mask] = (1 - ALPHA) * shown[mask] + ALPHA * colour
    axes.imshow(shown, interpolation="nearest")
    for row in rows:
        label = split.categories.index(row["category_id"])
        left, top, width, height = row["bbox"]
        axes.add_patch(
            matplotlib.patches.Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=colours(label))
        )
        text = split.classes[label] + (f" {row['score']:.2f}" if "score" in row else "")
        above = max(top - 1.5, 0.04 * len(image))  # does not cover the title
        axes.text(left, above, text, color="white", fontsize=6, bbox={"color": colours(label), "pad": 0.5, "lw": 0})
    axes.set_xticks([])
    axes.set_yticks([])
