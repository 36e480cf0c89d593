"""Figures of swept settings: each score over the values of a setting, one line for each value of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes

from aps.report.differences import Sweep, shown, sweeps
from aps.report.drawing import LEAST_POINTS, Look, Panel, Picture, grid_lines, looks, room, short
from aps.report.table import Column, Table

LINES = 8  # in one panel


def sweep_figures(table: Table) -> Iterator[Picture]:
    """A picture for each setting that a study sweeps, a panel for each score."""
    for number, sweep in enumerate(sweeps(table)):
        lines = dict(list(sweep.lines.items())[:LINES])
        look, panels = looks(list(lines)), []
        for score in table.scores:
            present = {label: {n: v for n, v in own.items() if score in table.cells[n]} for label, own in lines.items()}
            present = {label: own for label, own in present.items() if len(own) > 1}
            if present:
                panels.append(Panel(f"{score.label} for each {sweep.key}", _sweep(table, score, sweep, present, look)))
        if not panels:
            continue
        caption = "Means over seeds, dots are seeds; an axis of percentages spans ten points or more."
        if sweep.with_it:
            caption = f"{', '.join(sweep.with_it)} changes with it. {caption}"
        if len(sweep.lines) > LINES:
            caption += f" The first {LINES} of {len(sweep.lines)} lines."
        yield Picture(
            f"sweep-{sweep.key}{f'-{number}' if number else ''}",
            "sweeps",
            f"What {sweep.key} does",
            caption,
            panels,
            look if len(lines) > 1 else {},
        )


def _sweep(
    table: Table, score: Column, sweep: Sweep, lines: dict[str, dict[str, Any]], looks_of: dict[str, Look]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        every = list(dict.fromkeys(shown(v) for own in lines.values() for v in own.values()))
        if sweep.numeric:
            every = [shown(v) for v in sorted({v for own in lines.values() for v in own.values()})]
        numbers = [float(text) for text in every] if sweep.numeric else []
        even = bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= 8  # their ratios count
        for label, own in lines.items():
            look = looks_of[label]
            points = sorted(
                (float(v) if sweep.numeric else float(every.index(shown(v))), table.cells[n][score])
                for n, v in own.items()
            )
            for x, sample in points:
                axes.plot(
                    [x] * len(sample.values),
                    sample.values,
                    "o",
                    color=look.colour,
                    markersize=3.5,
                    alpha=0.5,
                    markeredgewidth=0,
                )
            line = look.dash if sweep.numeric else "none"
            axes.plot(
                [x for x, _ in points],
                [s.mean for _, s in points],
                linestyle=line,
                marker=look.marker,
                color=look.colour,
                linewidth=1.2,
                markersize=4.5,
            )
        if not sweep.numeric:
            axes.set_xticks(
                range(len(every)),
                [short(text) for text in every],
                rotation=30 if max(map(len, every)) > 6 else 0,
                ha="right" if max(map(len, every)) > 6 else "center",
            )
            axes.set_xlim(-0.5, len(every) - 0.5)
        elif even:
            axes.set_xscale("log")
            axes.set_xticks(numbers, every)
            axes.set_xticks([], minor=True)
        else:
            axes.set_xticks(_apart(numbers))
        axes.set_ylim(
            room([v for own in lines.values() for n in own for v in table.cells[n][score].values], LEAST_POINTS)
        )
        axes.set_xlabel(sweep.key)
        axes.set_title(f"{score.label}, %")
        grid_lines(axes, "y")

    return draw


def _apart(numbers: Sequence[float]) -> list[float]:
    """Those of ascending numbers whose labels don't overlap on an axis."""
    kept: list[float] = []
    for x in numbers:
        if not kept or x - kept[-1] >= 0.1 * (numbers[-1] - numbers[0]):
            kept.append(x)
    return kept
