"""Draws the picture among a run's outputs, which MLflow shows too: views, confusion matrix or nearest neighbours.

A row of `aps.stages` names the function. It gets the job, the content of metrics.json, and the PNG file to write. If
there is nothing to show, it writes no file.
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
from aps.report.drawing import WRONG, Picture
from aps.report.figures import confusion_panel
from aps.results import StageJob

IMAGES = 6
RIGHT = "#2f7d4f"


def views(job: StageJob, metrics: dict[str, Any], file: Path) -> None:
    """Training images with both views and the cells that are kept, for methods that sample patches."""
    if not show_views.samples(job.settings):
        return
    count = min(IMAGES, Manifest.read(job.manifest).splits["train"].count)
    show_views.write_picture(
        file, load_split(job.manifest, "train", count, job.settings.seed), job.settings, job.settings.seed
    )


def confusion(job: StageJob, metrics: dict[str, Any], file: Path) -> None:
    """The confusion matrix of the test images, if the stage counted it."""
    if matrix := metrics.get("confusion"):
        panel = confusion_panel(job.label, np.array(matrix["counts"]), matrix["classes"])
        caption = "Rows are the truth, columns the guess; shares of a row, in percent."
        write_bytes(file, Picture("confusion", "examples", "Test images", caption, [panel]).png())


def neighbours(job: StageJob, metrics: dict[str, Any], file: Path) -> None:
    """Test images, each with the training images that have the most similar features."""
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
            neighbour = int(train.labels[row])
            colour = RIGHT if neighbour == label else WRONG
            cells.append(Cell(train.read(row), f"{classes[neighbour]} {similarity:.2f}", colour))
        lines.append(("", cells))
    grid(file, lines, f"{job.label}: test images and the training images most similar to each (cosine)")
