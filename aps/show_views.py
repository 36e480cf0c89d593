"""Draws what the encoder sees: sources, boxes, views, kept cells and coverage (the paper's Figure 1).

Everything comes from the functions that training calls, with an experiment's settings. So the picture shows mistakes in
boxes, flips or cells: in the last column, cells of view 2 should avoid those of view 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from torch import Tensor

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.files import atomic_path
from aps.registry import METHODS
from aps.sampling import coverage, sample
from aps.settings.study import Blocks, ExperimentSettings
from aps.views import apply_view, draw_parameters

COLORS = ("#1f6feb", "#f0640c")  # view 1 and view 2, in every panel
COLUMNS = (
    "source, boxes",
    "view 1",
    "kept of view 1",
    "view 2",
    "covered by view 1",
    "kept of view 2",
    "both, in the source",
)
PAIRS = 2000
FADED = 0.12  # opacity of pixels that the encoder does not see

Box = tuple[float, float, float, float]  # top, left, height, width in source pixels


class View(NamedTuple):
    pixels: np.ndarray  # (S, S, 3) in [0, 1], augmented, not normalized
    box: Box
    flip: bool
    kept: list[int]  # cells, row-major as seen in the view

    def cells(self, grid: int) -> list[Box]:
        """The boxes of the kept cells in the source."""
        top, left, height, width = self.box
        tall, wide = height / grid, width / grid
        positions = [(cell // grid, grid - 1 - cell % grid if self.flip else cell % grid) for cell in self.kept]
        return [(top + row * tall, left + column * wide, tall, wide) for row, column in positions]


class Example(NamedTuple):
    """One image, its two views and their first sampling."""

    source: np.ndarray  # (H, W, 3) uint8
    view1: View
    view2: View
    covered: np.ndarray  # (G, G) share of each cell of view 2, as the sampler sees it


class Shared(NamedTuple):
    """The share of view 2 that the kept cells of view 1 cover, in [0, 1]: means over many pairs of views."""

    all: float  # over all cells of view 2, as for a random choice
    kept: float  # over the cells of view 2 that the strategy keeps

    def __str__(self) -> str:
        return (
            f"the kept cells of view 1 cover {self.all:.1%} of view 2, and {self.kept:.1%} of its kept cells "
            f"(mean of {PAIRS:,} pairs of views)"
        )


def samples(settings: Blocks) -> bool:
    """Whether an experiment's method keeps cells by the block `sampling`."""
    return "sampling" in METHODS.load(settings.pretrain.method).blocks


def show_views(manifest: Path, settings: ExperimentSettings, out: Path, images: int, seed: int) -> Shared:
    """Draw `images` training images, spread over the classes, into the file `out`; return what pairs of views share.

    Raises:
        UserError: the method keeps no cells by the block `sampling`, `images` is below 1, the dataset is not prepared or is for detection, or `out` names a file of another kind than PNG or can't be written.
    """
    if not samples(settings):
        raise UserError(
            f"pretrain.method {settings.pretrain.method} does not choose cells by `sampling`, which is what show-views draws; choose "
            "another --experiment"
        )
    if out.suffix.lower() not in (".png", ""):
        raise UserError(f"--out {out}: the picture is written as PNG; name a .png file")
    if images < 1:
        raise UserError(f"--images {images} leaves nothing to draw; give 1 or more")
    images = min(images, Manifest.read(manifest).splits["train"].count)
    split = load_split(manifest, "train", images, seed)
    write_picture(out, split, settings, seed)
    return shared([tuple(split.read(i).shape[1:]) for i in range(len(split))], settings, seed)


def write_picture(out: Path, split: ArraySplit | FileSplit, settings: Blocks, seed: int) -> None:
    """Write a PNG file with a row for each image of a split."""
    figure = draw(examples(split, settings, seed), settings.encoder.grid)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png", pil_kwargs={"optimize": True})


def shared(sizes: list[tuple[int, ...]], settings: ExperimentSettings, seed: int) -> Shared:
    """What PAIRS pairs of views share in their first sampling. sizes: (height, width) of each source, in pixels."""
    generator, grid = torch.Generator().manual_seed(seed), settings.encoder.grid
    shares = []
    for height, width in sizes:
        batch = -(-PAIRS // len(sizes))
        view1, view2 = (draw_parameters(i, batch, height, width, settings.views, generator).geometry() for i in (1, 2))
        kept = sample(settings.sampling, grid, view1, view2, generator)
        mask1 = torch.zeros(batch, 1, grid * grid).scatter_(2, kept.view1[:1].transpose(0, 1), 1)
        covered = coverage(view1, mask1, view2, grid)[:, 0]
        shares.append(torch.stack([covered.mean(1), covered.gather(1, kept.view2[0]).mean(1)]))
    return Shared(*torch.cat(shares, dim=1).mean(1).tolist())


def examples(split: ArraySplit | FileSplit, settings: Blocks, seed: int) -> list[Example]:
    """Two views and one sampling of every image of a split."""
    generator = torch.Generator().manual_seed(seed)
    return [_example(split.read(i), settings, generator) for i in range(len(split))]


def _example(source: Tensor, settings: Blocks, generator: torch.Generator) -> Example:
    """source: (3, H, W) uint8."""
    height, width = source.shape[1:]
    size, grid = settings.encoder.image_size, settings.encoder.grid
    parameters = [draw_parameters(view, 1, height, width, settings.views, generator) for view in (1, 2)]
    geometry1, geometry2 = (p.geometry() for p in parameters)
    kept = sample(settings.sampling, grid, geometry1, geometry2, generator)
    view1, view2 = (
        View(
            pixels=apply_view(source[None], p, size, (0.0,) * 3, (1.0,) * 3)[0].permute(1, 2, 0).clamp(0, 1).numpy(),
            box=tuple(p.boxes[0].tolist()),
            flip=bool(p.flips[0]),
            kept=cells[0, 0].tolist(),
        )
        for p, cells in zip(parameters, kept, strict=True)
    )
    mask1 = torch.zeros(1, 1, grid * grid).scatter_(2, kept.view1[:1], 1)
    covered = coverage(geometry1, mask1, geometry2, grid, settings.sampling.flip_aware)
    return Example(source.permute(1, 2, 0).numpy(), view1, view2, covered.view(grid, grid).numpy())


# --------------------------------------------------------------------------------------------------
# Drawing. Axes are in pixels of the source or cells of a view, so boxes and cells need no conversion.


def draw(shown: list[Example], grid: int) -> Figure:
    """One row for each example, one column for each of COLUMNS."""
    rows, columns = len(shown), len(COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure = Figure(figsize=(1.42 * columns, 1.62 * rows + 0.35), layout=layout, facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, example in zip(axes, shown, strict=True):
        draw_row(dict(enumerate(row)), example, grid)
    for ax, title, color in zip(axes[0], COLUMNS, ("0.2", *2 * COLORS[:1], *3 * COLORS[1:], "0.2"), strict=True):
        ax.set_title(title, fontsize=9, color=color, fontweight="bold")
    return figure


def draw_row(row: dict[int, Axes], example: Example, grid: int) -> None:
    """Draw an example. `row` has the axes of some or all COLUMNS, by column number."""
    views = (example.view1, example.view2)
    height, width, _ = example.source.shape
    side, source = max(height, width), example.source / 255
    pale = 1 - (1 - source.mean(2, keepdims=True).repeat(3, 2)) * 2 * FADED
    for column, image in ((0, source), (6, pale)):
        if (ax := row.get(column)) is not None:
            ax.imshow(image, extent=(0, width, height, 0))
            ax.set(xlim=((width - side) / 2, (width + side) / 2), ylim=((height + side) / 2, (height - side) / 2))
    for view, color in zip(views, COLORS, strict=True):
        if (ax := row.get(0)) is not None:
            _outline(ax, view.box, color, linewidth=2.2)
        for box in view.cells(grid) if (ax := row.get(6)) is not None else ():
            _outline(ax, box, color, linewidth=0.6, facecolor=(*to_rgb(color), 0.45))  # type: ignore[arg-type]
    for column, view in zip((1, 3), views, strict=True):
        if (ax := row.get(column)) is not None:
            ax.imshow(view.pixels, extent=(0, grid, grid, 0))
            ax.set_xlabel("flipped" if view.flip else " ", fontsize=8, labelpad=2)
    for column, view, color in zip((2, 5), views, COLORS, strict=True):
        if (ax := row.get(column)) is not None:
            _draw_kept(ax, view, color, grid)
    if (ax := row.get(4)) is not None:
        ax.imshow(example.covered, extent=(0, grid, grid, 0), cmap="Blues", vmin=0, vmax=1)
        for cell in example.view2.kept:
            _outline(ax, (cell // grid, cell % grid, 1, 1), COLORS[1], linewidth=0.9)
        kept = example.covered.ravel()[example.view2.kept].mean()
        ax.set_xlabel(f"all {example.covered.mean():.0%}, kept {kept:.0%}", fontsize=8, labelpad=2)
    for column, ax in row.items():
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set(color="0.8", linewidth=0.6, visible=column not in (0, 6) or height == width)


def _draw_kept(ax: Axes, view: View, color: str, grid: int) -> None:
    mask = np.zeros(grid * grid)
    mask[view.kept] = 1
    patch = len(view.pixels) // grid
    visible = np.kron(mask.reshape(grid, grid), np.ones((patch, patch)))[:, :, None]
    ax.imshow(1 - (1 - view.pixels) * np.where(visible > 0, 1, FADED), extent=(0, grid, grid, 0))
    for cell in view.kept:
        _outline(ax, (cell // grid, cell % grid, 1, 1), color, linewidth=0.6)


def _outline(ax: Axes, box: Box, color: str, linewidth: float, facecolor: Any = "none") -> None:
    top, left, height, width = box
    ax.add_patch(
        Rectangle((left, top), width, height, edgecolor=color, facecolor=facecolor, linewidth=linewidth, clip_on=False)
    )
