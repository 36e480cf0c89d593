"""Draws neighbours, attention, detections, duplicates and outliers, and a map of features.

Pictures are drawn from plain data, without a display. It does not know models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.v2 import functional

from aps.data.images import read_image
from aps.data.walk import SUFFIXES, printable
from aps.errors import UserError
from aps.files import atomic_path
from aps.inference.images import ImageLike, read

SIDE = 1.5  # inches of a thumbnail
PIXELS = 320  # longest side of a thumbnail, before it is drawn
DPI = 120
ALPHA = 0.45  # of a mask's or a heat map's colour
LETTERS = 22  # longest caption


@dataclass(frozen=True)
class Cell:
    """A thumbnail: an image, or None where its file is gone, with a caption above."""

    image: ImageLike | None
    caption: str = ""
    frame: str | None = None  # colour


def check_picture(path: Path) -> None:
    """Raises UserError where a name is that of another kind of file than PNG, or of a picture that was not drawn here."""
    _check_suffix(path)
    if path.exists() and not _is_drawing(path):
        raise UserError(f"{path}: is there, and is no picture that this package drew; name another")


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in (".png", ""):
        raise UserError(f"{path}: pictures are written as PNG; name a .png file")


def _is_drawing(path: Path) -> bool:
    try:
        with PIL.Image.open(path) as picture:
            return str(picture.info.get("Software", "")).startswith("Matplotlib")
    except (OSError, ValueError):
        return False


def check_folder(path: Path) -> None:
    """Raises UserError where the name of a folder for pictures is that of a picture."""
    if path.suffix.lower() in {*SUFFIXES, ".svg", ".pdf", ".eps", ".ps"}:
        raise UserError(f"{path}: is to be a folder for pictures, but has a picture's name; name a folder")


def grid(path: Path, rows: Sequence[tuple[str, Sequence[Cell]]], title: str = "") -> None:
    """Write a PNG with rows of thumbnails, (name, thumbnails) each; the longest row determines the width."""
    columns = max(len(cells) for _, cells in rows)
    figure = Figure(figsize=(SIDE * columns, (SIDE + 0.25) * len(rows) + 0.35 * bool(title)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, cells), line in zip(rows, axes, strict=True):
        for number, cell_axes in enumerate(line):
            _remove_ticks(cell_axes)
            if number >= len(cells):
                cell_axes.axis("off")
                continue
            _thumbnail(cell_axes, cells[number])
        if name:
            line[0].set_ylabel(_short(name), fontsize=7)
    if title:
        figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _thumbnail(axes: Axes, cell: Cell) -> None:
    try:
        pixels = None if cell.image is None else small(cell.image)
    except UserError:
        pixels = None
    if pixels is None:
        axes.text(0.5, 0.5, "image not found", ha="center", va="center", fontsize=6, transform=axes.transAxes)
    else:
        axes.imshow(pixels, interpolation="nearest" if max(pixels.shape[:2]) <= 64 else "antialiased")
    axes.set_title(_short(cell.caption), fontsize=7, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(cell.frame is not None)
        spine.set_color(cell.frame or "black")
        spine.set_linewidth(2)


def attention(path: Path, images: Sequence[tuple[str, np.ndarray, Tensor]]) -> None:
    """Write a PNG: for each (name, pixels (S, S, 3), maps (heads, G, G)) the image, then the image with each head's heat map.

    The colours of a map span its lowest to its highest attention; the highest is written above it, in percent.
    """
    heads = max(len(maps) for _, _, maps in images)
    figure = Figure(figsize=(SIDE * (heads + 1), (SIDE + 0.22) * len(images)), layout="constrained")
    axes = figure.subplots(len(images), heads + 1, squeeze=False)
    for (name, pixels, maps), line in zip(images, axes, strict=True):
        for cell_axes in line:
            _remove_ticks(cell_axes)
            cell_axes.axis("off")
        line[0].imshow(pixels)
        line[0].set_title(_short(name), fontsize=7, pad=2)
        for head, (cell_axes, weights) in enumerate(zip(line[1:], maps, strict=False)):
            cell_axes.imshow(pixels.mean(-1), cmap="gray")
            side = pixels.shape[0]
            smooth = functional.resize(weights[None].float(), [side, side]).squeeze(0).clamp(min=0)
            cell_axes.imshow(smooth.numpy(), cmap="inferno", alpha=0.65)
            cell_axes.set_title(f"head {head}, max {100 * float(weights.max()):.1f} %", fontsize=7, pad=2)
    _save(figure, path)


def detections(path: Path, image: ImageLike, found: Any, classes: Sequence[str], title: str = "") -> None:
    """Write a PNG of an image with boxes, masks, labels and scores; `found` is an `aps.inference.model.Detections`."""
    pixels = _hwc(read(image))
    H, W = pixels.shape[:2]
    width = 6.0 if W >= H else 6.0 * W / H
    figure = Figure(figsize=(max(2.5, width), max(2.5, width * H / W) + 0.3), layout="constrained")
    axes = figure.subplots()
    _remove_ticks(axes)
    palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "hsv"].resampled(max(10, len(classes)))
    shown = pixels.astype(float) / 255 if pixels.dtype == np.uint8 else pixels.astype(float)
    order = list(range(len(found)))[::-1]  # the best is drawn last, on top
    for i in order if found.masks is not None else ():
        mask = found.masks[i].numpy()
        shown[mask] = (1 - ALPHA) * shown[mask] + ALPHA * np.array(palette(classes.index(found.labels[i]))[:3])
    axes.imshow(shown, interpolation="nearest" if max(H, W) <= 256 else "antialiased")
    for i in order:
        colour = palette(classes.index(found.labels[i]))
        left, top, right, bottom = found.boxes[i].tolist()
        axes.add_patch(
            Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.5)
        )
        text = f"{found.labels[i]} {float(found.scores[i]):.2f}"
        align: Any = "bottom" if top > 0.08 * H else "top"  # inside the box, where there is no space above it
        style = {"color": colour, "pad": 0.8, "lw": 0}
        axes.text(left - 0.5, top - 0.5, text, color="white", fontsize=9, bbox=style, va=align)
    axes.set_title(printable(title).replace("$", r"\$") or f"{len(found)} found", fontsize=9)
    _save(figure, path)


def feature_map(path: Path, xy: np.ndarray, labels: Sequence[str | None], title: str) -> None:
    """Write a PNG with a dot for every image at its point xy, (M, 2), in the colour of its label."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    names = sorted({label for label in labels if label is not None})
    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "hsv"].resampled(max(10, len(names)))
    size = float(np.clip(4000 / max(1, len(xy)), 2, 25))
    label_of_row = np.array([label or "" for label in labels])
    if not names:
        axes.scatter(xy[:, 0], xy[:, 1], s=size, alpha=0.7, linewidths=0)
    for number, name in enumerate(names):
        rows = label_of_row == name
        axes.scatter(
            xy[rows, 0], xy[rows, 1], s=size, alpha=0.7, linewidths=0, color=colours(number), label=_short(name)
        )
    if 0 < len(names) <= 20:
        axes.legend(fontsize=7, markerscale=2, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_xlabel("first principal component", fontsize=8)
    axes.set_ylabel("second", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=9)
    _save(figure, path)


# --------------------------------------------------------------------------------------------------


def small(image: ImageLike) -> np.ndarray:
    """The image as (H, W, 3), reduced so that no side exceeds PIXELS."""
    x = read_image(Path(image), at_least=PIXELS) if isinstance(image, str | os.PathLike) else read(image)
    longest = max(x.shape[1:])
    if longest > PIXELS:
        size = [max(1, round(side * PIXELS / longest)) for side in x.shape[1:]]
        x = functional.resize(x, size, antialias=True)
    return _hwc(x)


def _hwc(x: Tensor) -> np.ndarray:
    return x.permute(1, 2, 0).numpy()


def _short(text: str) -> str:
    """A long name's end, which distinguishes files of a folder; what can't be drawn, and dollar signs, which start a formula, are escaped."""
    text = printable(text)
    text = text if len(text) <= LETTERS else f"…{text[1 - LETTERS :]}"
    return text.replace("$", r"\$")


def _remove_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: Figure, path: Path) -> None:
    _check_suffix(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
