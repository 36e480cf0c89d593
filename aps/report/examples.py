"""Draws the report's figures of images: kept cells, class-token attention, nearest neighbours, detections.

They use the code that the stages use: the sampler, the encoder, the features, the annotations. Each shows a few images,
on the CPU, so that a report can be made on a login node. What can't be drawn, because its data are gone or its network
has no class token, is left out with a message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from aps import show_views
from aps.data.load import ArraySplit, FileSplit, load_split, spread_rows
from aps.data.manifest import Manifest
from aps.detection.annotations import CocoSplit
from aps.detection.figure import draw_instances
from aps.errors import UserError
from aps.findings import Finding
from aps.inference.figures import small
from aps.inference.load import load
from aps.inference.model import Model
from aps.inference.neighbours import Index
from aps.layout import manifest_of
from aps.report.drawing import INK, MOST_PANELS, WRONG, Panel, Picture, of_the_first
from aps.report.figures import IsIntact
from aps.report.table import Table
from aps.text import shorten

IMAGES = 3  # in each figure
HEADS = 2  # shown beside the mean of all heads
LONGEST_LABEL = 9  # letters
QUERIES, NEIGHBOURS = 4, 5


def examples(table: Table, is_intact: IsIntact) -> list[Picture]:
    """All figures of images for which there are results."""
    makers = (
        ("kept-cells", "What the encoder sees", "Training images with the boxes of both views (blue and orange), and the cells of each that are kept.", "pretrain", "encoder.safetensors", _kept),
        ("attention", "What the class token attends to", "Test images; the last block's attention, mean of all heads and the first heads.", "pretrain", "encoder.safetensors", _attention),
        ("neighbours", "Nearest neighbours", "Test images, left, and those most similar to each by cosine; red: of another class.", "embed", "features.parquet", _neighbours),
        ("detections", "Detections beside the truth", "As many of the best detections as there are instances.", "detection", "predictions.json", _detections),
    )  # fmt: skip
    pictures = []
    for name, title, caption, stage, file, make in makers:
        panels = list(islice(_panels(table, is_intact, stage, file, make), MOST_PANELS))
        if panels:
            pictures.append(Picture(name, "examples", title, of_the_first(caption, panels), panels))
    return pictures


def _panels(
    table: Table, is_intact: IsIntact, stage: str, file: str, make: Callable[[Table, Finding, Path], Panel | None]
) -> Iterator[Panel]:
    """A panel for each experiment, from its first seed that has run the stage, if the dataset is still the same."""
    for name, experiment in table.study.experiments.items():
        for seed in experiment.seeds:
            finding = table.findings.get((name, seed, stage))
            if finding is None or finding.metrics is None or not is_intact(finding, file):
                continue
            manifest = manifest_of(table.study, finding.metrics["dataset"]["name"])
            try:
                same_data = manifest.exists() and Manifest.read(manifest).digest == finding.metrics["dataset"]["digest"]
                panel = make(table, finding, manifest) if same_data else None
            except UserError as error:
                print(f"{finding.label}: not drawn in the report: {error}", file=sys.stderr)
                break
            if panel is not None:
                yield panel
            break


def _kept(table: Table, finding: Finding, manifest: Path) -> Panel | None:
    settings = table.study.experiments[finding.experiment]
    if not show_views.samples(settings):
        return None
    drawn = show_views.examples(_spread(load_split(manifest, "train"), IMAGES), settings, finding.seed)
    columns = (0, 2, 5)  # of show_views.COLUMNS

    def draw(axes: np.ndarray) -> None:
        for row, example in zip(axes, drawn, strict=True):
            show_views.draw_row(dict(zip(columns, row, strict=True)), example, settings.encoder.grid)
        for ax, column in zip(axes[0], columns, strict=True):
            colour = {2: show_views.COLORS[0], 5: show_views.COLORS[1]}.get(column, INK)
            ax.set_title(show_views.COLUMNS[column], fontsize=7.5, color=colour, loc="center")
        _heading(axes, finding.experiment)

    return Panel(f"Kept cells of {finding.experiment}", draw, 0.5 + 1.2 * len(drawn), (len(drawn), len(columns)))


def _attention(table: Table, finding: Finding, manifest: Path) -> Panel | None:
    model = load(finding.folder, "cpu")
    assert isinstance(model, Model)
    split_name = "test" if "test" in Manifest.read(manifest).splits else "train"
    split = _spread(load_split(manifest, split_name), IMAGES)
    pixels = [model.preprocessing.pixels(split.read(i), f"image {i}") for i in range(len(split))]
    maps = model.attention_of(pixels)  # (M, heads, G, G)
    heads = min(HEADS, maps.shape[1]) if maps.shape[1] > 1 else 0
    names = ["image", "mean of heads", *(f"head {i}" for i in range(heads))] if heads else ["image", "attention"]

    def draw(axes: np.ndarray) -> None:
        for row, image, attention in zip(axes, pixels, maps, strict=True):
            colours = image.permute(1, 2, 0).clamp(0, 1).numpy()
            _image(row[0], colours)
            for ax, weights in zip(row[1:], [attention.mean(0), *attention[:heads]], strict=True):
                _image(ax, colours.mean(-1, keepdims=True).repeat(3, -1))
                side = len(colours)
                ax.imshow(
                    weights.numpy(),
                    cmap="inferno",
                    alpha=0.65,
                    extent=(-0.5, side - 0.5, side - 0.5, -0.5),
                    interpolation="nearest",
                )
        for ax, name in zip(axes[0], names, strict=True):
            ax.set_title(name, fontsize=7.5, loc="center")
        _heading(axes, finding.experiment)

    return Panel(
        f"Class-token attention of {finding.experiment}",
        draw,
        0.5 + 3.4 / len(names) * len(pixels),
        (len(pixels), len(names)),
    )


def _neighbours(table: Table, finding: Finding, manifest: Path) -> Panel | None:
    index = Index(finding.folder / "features.parquet")
    split = load_split(manifest, "test" if "test" in Manifest.read(manifest).splits else "train")
    if len(split) != len(index) or len(index) < 2:
        return None
    rows = spread_rows(len(index), QUERIES)
    described = index.describe(rows)
    lines = []  # of (row, label, whether it is the query's; None for the query)
    for row, neighbours in zip(rows, index.neighbours(index.vectors(rows), NEIGHBOURS + 1), strict=True):
        label = described[row][1]
        others = [n for n in neighbours if n.row != row][:NEIGHBOURS]
        lines.append([(row, label, None), *((n.row, n.label, n.label == label) for n in others)])
    width = max(len(line) for line in lines)

    def draw(axes: np.ndarray) -> None:
        for line, axes_of_line in zip(lines, axes, strict=True):
            for ax in axes_of_line:
                ax.axis("off")
            for (row, label, same), ax in zip(line, axes_of_line, strict=False):
                ax.axis("on")
                _image(ax, small(split.read(row)))
                wrong = same is False and label is not None
                title = shorten((label or "").replace("$", r"\$"), LONGEST_LABEL)
                ax.set_title(title, fontsize=6.5, loc="center", pad=2, color=WRONG if wrong else INK)
                ax.spines[:].set(visible=same is None or wrong, color=WRONG if wrong else INK, linewidth=1.5)
        _heading(axes, finding.experiment)

    return Panel(f"Nearest neighbours by {finding.experiment}", draw, 0.4 + 0.7 * len(lines), (len(lines), width))


def _detections(table: Table, finding: Finding, manifest: Path) -> Panel | None:
    results = json.loads((finding.folder / "predictions.json").read_text(encoding="utf-8"))
    split = CocoSplit(manifest, "val", training=False)
    chosen = spread_rows(len(split), IMAGES)
    by_image: dict[int, list[dict[str, Any]]] = {split.ids[i]: [] for i in chosen}
    for result in results:
        if result["image_id"] in by_image:
            by_image[result["image_id"]].append(result)

    def draw(axes: np.ndarray) -> None:
        for row, index in zip(axes, chosen, strict=True):
            image = split.read(index).permute(1, 2, 0).numpy()
            truth = [a for a in split.coco.imgToAnns[split.ids[index]] if not a.get("iscrowd", 0)]
            best = sorted(by_image[split.ids[index]], key=lambda result: -result["score"])[: len(truth)]
            draw_instances(row[0], image, split, truth)
            draw_instances(row[1], image, split, best)
            for ax in row:
                ax.spines[:].set_visible(False)
        for ax, title in zip(axes[0], ("truth", "detections"), strict=True):
            ax.set_title(title, fontsize=7.5, loc="center")
        _heading(axes, finding.experiment)

    return Panel(
        f"Detections of {finding.experiment} beside the truth", draw, 0.5 + 1.75 * len(chosen), (len(chosen), 2)
    )


# --------------------------------------------------------------------------------------------------


def _spread(split: ArraySplit | FileSplit, shown: int) -> ArraySplit | FileSplit:
    return split.select(torch.tensor(spread_rows(len(split), shown)))


def _image(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest" if max(pixels.shape[:2]) <= 64 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _heading(axes: np.ndarray, name: str) -> None:
    axes[0, 0].figure.suptitle(name.replace("$", r"\$"), fontsize=9, x=0.02, ha="left")
