"""The picture of one run, which stands beside its outputs and in MLflow: views, confusion matrix, or nearest neighbours.

A row of `aps.stages` names the function. It gets the job, what metrics.json will say, and the PNG file to write; it writes
nothing where there is nothing to show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aps import show_views
from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.files import write_bytes
from aps.inference.figures import Cell, grid
from aps.registry import METHODS
from aps.report.drawing import Picture
from aps.report.figures import confusion_panel
from aps.results import StageJob

IMAGES = 6
RIGHT, WRONG = "#2f7d4f", "#d0453c"


def views(job: StageJob, metrics: dict[str, Any], file: Path) -> None:
    """Training images with both views and the cells that are kept; of methods that sample patches."""
    if "sampling" not in METHODS.load(job.settings.pretrain.method).blocks:
        return
    count = min(IMAGES, Manifest.read(job.manifest).splits["train"].count)
    show_views.write_picture(
        file, load_split(job.manifest, "train", count, job.settings.seed), job.settings, job.settings.seed
    )


def confusion(job: StageJob, metrics: dict[str, Any], file: Path) -> None:
    """Shares of the test images of each class that are taken for each class."""
    if counted := metrics.get("confusion"):
        panel = confusion_panel(job.label, np.array(counted["counts"]), counted["classes"])
        caption = "Rows are the truth, columns the guess; shares of a row, in percent."
        write_bytes(file, Picture("confusion", "examples", "Test images", caption, [panel]).png())


def neighbours(job: StageJob, metrics: dict[str, Any], file: Path) -> None:
    """Test images, each with the training images whose features are most similar to its own."""
    examples = metrics.get("examples")
    if not examples:
        return
    limit = job.settings.dataset.train_limit
    train, test = load_split(job.manifest, "train", limit, labelled=True), load_split(job.manifest, "test")
    classes, lines = train.classes, []
    for example in examples:
        query, label = example["test"], int(test.labels[example["test"]])
        cells = [Cell(test.read(query), classes[label], "black")]
        for row, similarity in zip(example["train"], example["similarity"], strict=True):
            found = int(train.labels[row])
            cells.append(
                Cell(train.read(row), f"{classes[found]} {similarity:.2f}", RIGHT if found == label else WRONG)
            )
        lines.append(("", cells))
    grid(file, lines, f"{job.label}: test images and the training images most similar to each (cosine)")
