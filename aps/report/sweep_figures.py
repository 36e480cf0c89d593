"""Draws the figures of swept settings: each score over the values of a setting, a line for each value of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes

from aps.report.differences import Sweep, shown, sweeps
from aps.report.drawing import LEAST_POINTS, Panel, Picture, Style, axis_limits, grid_lines, make_styles, short
from aps.report.table import Column, Table

MOST_LINES = 8  # in one panel


def sweep_figures(table: Table) -> Iterator[Picture]:
    """A picture for each setting that the study sweeps, with a panel for each score."""
    for number, sweep in enumerate(sweeps(table)):
        lines = dict(list(sweep.lines.items())[:MOST_LINES])
        styles, panels = make_styles(list(lines)), []
        for score in table.scores:
            scored = {
                label: {name: value for name, value in values.items() if score in table.cells[name]}
                for label, values in lines.items()
            }
            scored = {label: values for label, values in scored.items() if len(values) > 1}
            if scored:
                panels.append(Panel(f"{score.label} for each {sweep.key}", _sweep(table, score, sweep, scored, styles)))
        if not panels:
            continue
        caption = "Means over seeds, dots are seeds; an axis of percentages spans ten points or more."
        if sweep.with_it:
            caption = f"{', '.join(sweep.with_it)} changes with it. {caption}"
        if len(sweep.lines) > MOST_LINES:
            caption += f" The first {MOST_LINES} of {len(sweep.lines)} lines."
        caption += table.remarks(dict.fromkeys(n for values in lines.values() for n in values), table.scores)
        yield Picture(
            f"sweep-{sweep.key}{f'-{number}' if number else ''}",
            "sweeps",
            f"What {sweep.key} does",
            caption,
            panels,
            styles if len(lines) > 1 else {},
        )


def _sweep(
    table: Table, score: Column, sweep: Sweep, lines: dict[str, dict[str, Any]], styles: dict[str, Style]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        ticks = list(dict.fromkeys(shown(value) for values in lines.values() for value in values.values()))
        if sweep.numeric:
            ticks = [
                shown(number) for number in sorted({value for values in lines.values() for value in values.values()})
            ]
        numbers = [float(text) for text in ticks] if sweep.numeric else []
        logarithmic = bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= 8
        for label, values in lines.items():
            style = styles[label]
            points = sorted(
                (float(value) if sweep.numeric else float(ticks.index(shown(value))), table.cells[name][score])
                for name, value in values.items()
            )
            for x, sample in points:
                axes.plot(
                    [x] * len(sample.values),
                    sample.values,
                    "o",
                    color=style.colour,
                    markersize=3.5,
                    alpha=0.5,
                    markeredgewidth=0,
                )
            axes.plot(
                [x for x, _ in points],
                [s.mean for _, s in points],
                linestyle=style.dash if sweep.numeric else "none",
                marker=style.marker,
                color=style.colour,
                linewidth=1.2,
                markersize=4.5,
            )
        if not sweep.numeric:
            axes.set_xticks(
                range(len(ticks)),
                [short(text) for text in ticks],
                rotation=30 if max(map(len, ticks)) > 6 else 0,
                ha="right" if max(map(len, ticks)) > 6 else "center",
            )
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        elif logarithmic:
            axes.set_xscale("log")
            axes.set_xticks(numbers, ticks)
            axes.set_xticks([], minor=True)
        else:
            axes.set_xticks(_apart(numbers))
        axes.set_ylim(
            axis_limits(
                [v for names in lines.values() for name in names for v in table.cells[name][score].values], LEAST_POINTS
            )
        )
        axes.set_xlabel(sweep.key)
        axes.set_title(f"{score.label}, %")
        grid_lines(axes, "y")

    return draw


def _apart(numbers: Sequence[float]) -> list[float]:
    """Of ascending numbers, those whose labels don't overlap on an axis."""
    kept: list[float] = []
    for x in numbers:
        if not kept or x - kept[-1] >= 0.1 * (numbers[-1] - numbers[0]):
            kept.append(x)
    return kept
