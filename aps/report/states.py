"""Draws `python -m aps status --picture`: experiments by stages, with a square for each seed, coloured by state.

The graph of `snakemake --dag` is too large to read for a whole study.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from aps.errors import UserError
from aps.files import write_bytes
from aps.report.drawing import standalone
from aps.settings.study import Study
from aps.stages import STAGES
from aps.status import DONE, FAILED, OUTDATED, QUEUED, RUNNING, STATES, Status, counts

KINDS = ("svg", "png")
COLOURS = {DONE: "#1a8a5c", RUNNING: "#2a7fd4", QUEUED: "#87939a", FAILED: "#c8382f", OUTDATED: "#b3650b"}
SIGNS = {DONE: "\N{HEAVY CHECK MARK}", RUNNING: "\N{BLACK RIGHT-POINTING TRIANGLE}", QUEUED: "\N{HORIZONTAL ELLIPSIS}",
         FAILED: "\N{MULTIPLICATION X}", OUTDATED: "\N{ANTICLOCKWISE OPEN CIRCLE ARROW}"}  # fmt: skip
COLUMN, ROW = 1.15, 0.3  # inches for a stage and for an experiment
MOST_WITH_SIGNS = 12  # seeds; with more, signs do not fit in the squares


def draw_status(study: Study, statuses: list[Status], file: Path) -> None:
    """Write the picture. Raises UserError if the file is neither .svg nor .png, or can't be written."""
    kind = file.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise UserError(f"--picture {file}: pictures are written as SVG or PNG; name a .svg or .png file")
    write_bytes(file, standalone(lambda: _figure(study, statuses), kind))


def _figure(study: Study, statuses: list[Status]) -> Figure:
    stages = [stage for stage in STAGES if any(status.stage == stage for status in statuses)]
    names = list(study.experiments)
    left = 0.25 + 0.072 * max(len(name) for name in names)
    width = max(left + COLUMN * len(stages) + 0.15, 5.4)  # the legend's
    top, bottom = 0.75, 0.5
    height = top + ROW * len(names) + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, COLUMN * len(stages) / width, ROW * len(names) / height))
    axes.set(xlim=(0, COLUMN * len(stages)), ylim=(ROW * len(names), 0))
    axes.axis("off")
    by_job = {(status.experiment, status.seed, status.stage): status for status in statuses}
    for column, stage in enumerate(stages):
        axes.text(COLUMN * (column + 0.46), -0.08, stage, ha="center", va="bottom", fontsize=8.5)
        for row, name in enumerate(names):
            seeds = [seed for seed in study.experiments[name].seeds if (name, seed, stage) in by_job]
            side = (COLUMN - 0.1) / max(1, len(seeds))
            for number, seed in enumerate(seeds):
                _square(
                    axes,
                    by_job[name, seed, stage],
                    COLUMN * column + side * number,
                    ROW * row + 0.03,
                    side - 0.025,
                    ROW - 0.06,
                    len(seeds),
                )
    for row, name in enumerate(names):
        axes.text(-0.1, ROW * (row + 0.5), name.replace("$", r"\$"), ha="right", va="center", fontsize=8.5)
    figure.text(
        0.15 / width, 1 - 0.14 / height, f"Study {study.study}: {counts(statuses)}", ha="left", va="top", fontsize=10
    )
    figure.text(0.15 / width, 1 - 0.35 / height, "a square is a seed", ha="left", va="top", fontsize=7.5)
    _legend(figure, width, height)
    return figure


def _square(axes, status: Status, x: float, y: float, width: float, height: float, seeds: int) -> None:  # type: ignore[no-untyped-def]
    partly = status.state == RUNNING and status.share is not None
    axes.add_patch(
        Rectangle((x, y), width, height, color=COLOURS[status.state], alpha=0.45 if partly else 1, linewidth=0)
    )
    if partly:
        axes.add_patch(Rectangle((x, y), width * (status.share or 0), height, color=COLOURS[status.state], linewidth=0))
    label = f"{SIGNS[status.state]} {status.share:.0%}" if partly and seeds <= 2 else SIGNS[status.state]
    if seeds <= MOST_WITH_SIGNS:
        axes.text(
            x + width / 2,
            y + height / 2,
            label,
            ha="center",
            va="center",
            color="white",
            fontsize=8 if seeds <= 4 else 5,
        )


def _legend(figure: Figure, width: float, height: float) -> None:
    axes = figure.add_axes((0, 0, 1, 0.42 / height))
    axes.set(xlim=(0, width), ylim=(0, 0.42))
    axes.axis("off")
    for number, state in enumerate(STATES):
        x = 0.15 + 1.02 * number
        axes.add_patch(Rectangle((x, 0.12), 0.22, 0.2, color=COLOURS[state], linewidth=0))
        axes.text(x + 0.11, 0.22, SIGNS[state], ha="center", va="center", color="white", fontsize=8)
        axes.text(x + 0.29, 0.22, state, ha="left", va="center", fontsize=8.5)
