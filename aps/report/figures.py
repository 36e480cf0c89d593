"""Draws the report's figures of numbers: scores, curves, accuracy against cost, sweeps, confusions, map of features.

Each function returns a picture, or None if no run has what it shows. They read metrics.json, history.jsonl and
features.parquet. Figures that need a network are in `aps.report.examples`.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from aps.findings import Finding
from aps.journal import read_history
from aps.report.drawing import (
    COLOURS,
    LEAST_POINTS,
    MOST_PANELS,
    Panel,
    Picture,
    Style,
    axis_limits,
    grid_lines,
    make_styles,
    of_the_first,
    short,
)
from aps.report.sweep_figures import sweep_figures
from aps.report.table import SMALL_TEST, Column, Table, not_all_seeds
from aps.stages import STAGES

MONITOR = "knn_train_top1"
MOST_WITH_NUMBERS = 12  # classes of a confusion matrix; with more, numbers do not fit in its cells
ROW = 0.4  # inches for each experiment

IsIntact = Callable[[Finding, str], bool]  # whether a file of a run is the one that was written


class Curve(NamedTuple):
    """The line of one run in a panel."""

    experiment: str
    x: list[float]
    y: list[float]


def all_figures(table: Table, is_intact: IsIntact) -> list[Picture]:
    """All figures for which there are results, in the order of the page."""
    pictures = [
        scores(table),
        *sweep_figures(table),
        during_pretraining(table, is_intact),
        against_cost(table),
        curves(table, is_intact),
        *confusions(table),
        *maps(table, is_intact),
    ]
    return [picture for picture in pictures if picture is not None]


# --------------------------------------------------------------------------------------------------


def scores(table: Table) -> Picture | None:
    """A panel for each score: every seed as a dot, the mean as a tick, the interval of a small test set as a line."""
    styles, panels = make_styles(list(table.study.experiments)), []
    intervals = False
    for score in table.scores:
        names = [name for name in table.evaluated() if score in table.cells[name]]
        if names:
            lined = any(table.interval(name, score) for name in names)
            intervals |= lined
            height = 0.55 + ROW * len(names) + 0.2 * lined
            panels.append(Panel(_description(table, score, names), _rows(table, score, names, styles), height))
    if not panels:
        return None
    caption = "Dots are seeds, ticks their means; an axis spans ten points or more."
    if intervals:
        caption += (
            f" A thin line is not the seeds' spread: it is the 95 % interval of the mean (Wilson's) where there are fewer "
            f"than {SMALL_TEST:,} test images."
        )
    return Picture("scores", "scores", "Scores", caption, panels)


def _description(table: Table, score: Column, names: Sequence[str]) -> str:
    def described(name: str) -> str:
        interval = table.interval(name, score)
        return f"{name} {table.text(name, score)}" + (f" (95 %: {interval})" if interval else "")

    return f"{score.label}, percent: " + ", ".join(map(described, names))


def _rows(table: Table, score: Column, names: Sequence[str], styles: dict[str, Style]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for row, name in enumerate(names):
            sample, style = table.cells[name][score], styles[name]
            axes.plot(
                sample.values,
                [row] * len(sample.values),
                "o",
                color=style.colour,
                markersize=4.5,
                alpha=0.65,
                markeredgewidth=0,
            )
            axes.plot(sample.mean, row, "|", color=style.colour, markersize=12, markeredgewidth=2)
            if interval := table.interval(name, score):
                axes.plot([interval.low, interval.high], [row, row], color=style.colour, linewidth=1, alpha=0.5)
        _name_rows(axes, [f"{short(name)}  {table.text(name, score)}" for name in names])
        values = [value for name in names for value in table.cells[name][score].values]
        values += [edge for name in names if (interval := table.interval(name, score)) for edge in interval[:2]]
        axes.set_xlim(axis_limits(values, LEAST_POINTS))
        grid_lines(axes, "x")
        axes.set_title(f"{score.label}, %")
        if any(table.interval(name, score) for name in names):
            axes.set_xlabel("thin lines: 95 % intervals of a small test set")

    return draw


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write each row's name above it, instead of an axis. Rows go from the top down."""
    for row, name in enumerate(names):
        axes.text(0, row - 0.36, name, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.6, -0.75)


def curves(table: Table, is_intact: IsIntact) -> Picture | None:
    """Curves of history.jsonl over the steps: a panel for each kind, a line for each seed."""
    styles = make_styles(list(table.study.experiments))
    by_kind: dict[tuple[str, str], list[Curve]] = defaultdict(list)
    for finding, history in _histories(table, is_intact):
        for key, label in STAGES[finding.stage].curves:
            points = [(float(line["step"]), float(line[key])) for line in history if key in line]
            if points:
                by_kind[finding.stage, label].append(
                    Curve(finding.experiment, [x for x, _ in points], [y for _, y in points])
                )
    ordered = [
        (label, by_kind[stage.name, label])
        for stage in STAGES.values()
        for _, label in stage.curves
        if (stage.name, label) in by_kind
    ]
    if not ordered:
        return None
    panels = [
        Panel(f"{label} over the steps", _lines(label, "optimizer step", lines, styles)) for label, lines in ordered
    ]
    return Picture(
        "curves", "curves", "Learning curves", "One line a seed, from each run's history.jsonl.", panels,
        _legend(styles, [line for _, lines in ordered for line in lines]),
    )  # fmt: skip


def _lines(
    label: str, x: str, lines: Sequence[Curve], styles: dict[str, Style], percent: bool = False
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, xs, ys in lines:
            marker = "o" if len(xs) == 1 else None  # a line of one point shows nothing
            style = styles[name]
            axes.plot(xs, ys, style.dash, color=style.colour, marker=marker, markersize=4, linewidth=1.1, alpha=0.85)
        axes.set_title(label)
        axes.set_xlabel(x)
        axes.set_xlim(left=0)
        if percent or "%" in label:
            axes.set_ylim(axis_limits([y for line in lines for y in line.y], LEAST_POINTS))
        grid_lines(axes, "y")

    return draw


def _legend(styles: dict[str, Style], lines: Sequence[Curve]) -> dict[str, Style]:
    drawn = {line.experiment for line in lines}
    return {name: style for name, style in styles.items() if name in drawn}


def during_pretraining(table: Table, is_intact: IsIntact) -> Picture | None:
    """kNN accuracy while pretraining, against operations and time; the last against the peak memory; the peak memory."""
    styles = make_styles(list(table.study.experiments))
    by_axis: dict[str, list[Curve]] = {"flops": [], "seconds": []}
    peaks: dict[str, list[float]] = defaultdict(list)
    last: dict[str, list[tuple[float, float]]] = defaultdict(list)  # of a seed: peak memory, accuracy
    seeds = Counter[str]()
    for finding, history in _histories(table, is_intact):
        if finding.stage != "pretrain" or finding.metrics is None:
            continue
        name = finding.experiment
        seeds[name] += 1
        points = [line for line in history if MONITOR in line]
        for axis, lines in by_axis.items():
            measured = [(line[axis], line[MONITOR]) for line in points if axis in line]
            if measured:
                lines.append(Curve(name, [x for x, _ in measured], [y for _, y in measured]))
        cost = finding.metrics.get("cost") or {}
        if peak := cost.get("peak_gpu_gb", cost.get("peak_memory_gb")):
            peaks[name].append(float(peak))
            last[name] += [(float(peak), line[MONITOR]) for line in points[-1:]]
    if not any(by_axis.values()):
        return None
    names = {"flops": "operations", "seconds": "seconds of training"}
    label, memory = "kNN on held-out train images, %", "peak memory of pretraining, GB"
    panels = [
        Panel(f"{label} against {names[axis]}", _lines(label, names[axis], lines, styles, percent=True))
        for axis, lines in by_axis.items()
        if lines
    ]
    caption = "One line a seed."
    samples = {name: tuple(zip(*of_seeds, strict=True)) for name, of_seeds in last.items() if of_seeds}
    compared = len(samples) > 1
    if compared:
        panels.append(
            Panel(f"The last {label} against peak memory", _with_ranges(f"last {label}", memory, samples, styles))
        )
        caption += " Beside memory, the last reading: means over seeds, with their range."
    if peaks:
        draw = _bars(table, memory, peaks, styles)
        panels.append(Panel("Peak memory of pretraining", draw, max(1.6, 0.6 + ROW * len(peaks))))
    caption += (
        " Operations are counted (a multiply-add is two); peak memory is the GPU's where there is one, else the process's, "
        "without that of these readings."
    )
    legend = _legend(styles, [line for lines in by_axis.values() for line in lines])
    caption += not_all_seeds(
        [n for n, count in seeds.items() if table.of_planned(n, count) and (n in legend or n in peaks)]
    )
    title = "Accuracy against cost, while pretraining"
    return Picture("knn-cost", "cost", title, caption, panels, legend, marks=compared)


def _bars(table: Table, title: str, values: dict[str, list[float]], styles: dict[str, Style]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        labels = []
        for row, (name, of_seeds) in enumerate(values.items()):
            mean, missing = statistics.fmean(of_seeds), table.of_planned(name, len(of_seeds))
            axes.barh(row, mean, height=0.3, color=styles[name].colour)
            labels.append(f"{short(name)}  {mean:.2f} GB" + (f" ({missing} seeds)" if missing else ""))
        _name_rows(axes, labels)
        axes.set_title(title)
        grid_lines(axes, "x")

    return draw


def against_cost(table: Table) -> Picture | None:
    """Final scores against the cost of one seed: the pretraining, and the stage that gave the score."""
    styles = make_styles(list(table.study.experiments))
    panels, legend = [], dict[str, Style]()
    for score in table.scores:
        names = [name for name in table.evaluated() if score in table.cells[name]]
        costs = {name: spent for name in names if (spent := table.spent(name, score.stage)) is not None}
        if len(costs) < 2:
            continue
        flops = {name: spent.flops.mean for name, spent in costs.items() if spent.flops is not None}
        counted = len(flops) == len(costs)
        cost = flops if counted else {name: spent.seconds.mean for name, spent in costs.items()}
        axis = "operations of one seed" if counted else "seconds of one seed"
        samples = {name: ([of_one_seed], table.cells[name][score].values) for name, of_one_seed in cost.items()}
        panels.append(Panel(f"{score.label} against {axis}", _with_ranges(f"{score.label}, %", axis, samples, styles)))
        legend |= {name: styles[name] for name in cost}
    if not panels:
        return None
    caption = "Means over seeds, with their range; cost is that of one seed's pretraining and of the stage that gave the score."
    caption += table.remarks(legend, table.scores)
    drawn = {name: style for name, style in styles.items() if name in legend}
    return Picture("score-cost", "cost", "Scores against cost", caption, panels, drawn, lines=False, marks=True)


def _with_ranges(
    title: str, axis: str, samples: Mapping[str, Sequence[Sequence[float]]], styles: dict[str, Style]
) -> Callable[[Axes], None]:
    """A point for each experiment, the mean of its seeds, and their range. samples: its values on both axes."""

    def draw(axes: Axes) -> None:
        for name, (xs, ys) in samples.items():
            x, y, style = statistics.fmean(xs), statistics.fmean(ys), styles[name]
            axes.plot([x, x], [min(ys), max(ys)], color=style.colour, linewidth=1)
            axes.plot([min(xs), max(xs)], [y, y], color=style.colour, linewidth=1)
            axes.plot(x, y, style.marker, color=style.colour, markersize=5.5)
        axes.set_ylim(axis_limits([y for _, ys in samples.values() for y in ys], LEAST_POINTS))
        axes.set_xlim(0, 1.08 * max(x for xs, _ in samples.values() for x in xs))
        axes.set_title(title)
        axes.set_xlabel(axis)
        grid_lines(axes, "y")

    return draw


# --------------------------------------------------------------------------------------------------


def confusions(table: Table) -> list[Picture]:
    """The confusion matrix of each experiment's finetuned models, summed over its seeds."""
    panels = []
    for name in table.study.experiments:
        runs = [run for run in table.runs if run["experiment"] == name and run.get("confusion")]
        if not runs:
            continue
        counts = np.sum([np.array(run["confusion"]["counts"]) for run in runs], axis=0)
        classes = runs[0]["confusion"]["classes"]
        panels.append(confusion_panel(name, counts, classes))
        if len(panels) == MOST_PANELS:
            break
    if not panels:
        return []
    caption = "Finetuned models on the test images, all seeds. Rows are the truth, columns the guess; shares of a row, in percent."
    return [Picture("confusion", "examples", "What is taken for what", of_the_first(caption, panels), panels)]


def confusion_panel(name: str, counts: np.ndarray, classes: Sequence[str]) -> Panel:
    """counts: (C, C), the number of images of the row's class that were classified as the column's."""
    return Panel(f"Confusion matrix of {name}. {_worst(counts, classes)}", _matrix(name, counts, classes), 3.7)


def _worst(counts: np.ndarray, classes: Sequence[str]) -> str:
    off = counts.copy()
    np.fill_diagonal(off, 0)
    if not off.any():
        return "No mistakes."
    row, column = divmod(int(off.argmax()), len(classes))
    return f"Most often {classes[row]} is taken for {classes[column]}."


def _matrix(name: str, counts: np.ndarray, classes: Sequence[str]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        c = len(classes)
        colours = np.concatenate([np.tile(to_rgb(COLOURS[0]), (c * c, 1)), 0.85 * shares.reshape(-1, 1)], axis=1)
        mesh = axes.pcolormesh(np.arange(c + 1), np.arange(c + 1), shares)
        mesh.set_array(None)
        mesh.set_facecolor(colours.tolist())  # transparent where the share is 0, so that the page's colour shows
        for i, j in np.ndindex(c, c) if c <= MOST_WITH_NUMBERS else ():
            if shares[i, j] >= 0.005:
                axes.text(j + 0.5, i + 0.5, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=7)
        labelled = range(0, c, max(1, -(-c // 20)))
        axes.set_xticks(
            [i + 0.5 for i in labelled],
            [short(classes[i], 14) for i in labelled],
            rotation=90 if max(len(x) for x in classes) > 2 else 0,
        )
        axes.set_yticks([i + 0.5 for i in labelled], [short(classes[i], 14) for i in labelled])
        axes.tick_params(length=0)
        axes.set_ylim(c, 0)
        axes.set_aspect("equal")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title(short(name))
        axes.set_xlabel("guess")
        axes.set_ylabel("truth")

    return draw


def maps(table: Table, is_intact: IsIntact) -> list[Picture]:
    """The first two principal components of the features, for each experiment's first seed with embeddings."""
    panels, legend = [], dict[str, Style]()
    for name, experiment in table.study.experiments.items():
        for seed in experiment.seeds:
            finding = table.findings.get((name, seed, "embed"))
            if finding is not None and is_intact(finding, "features.parquet"):
                points, labels = _points(finding.folder / "features.parquet")
                classes = sorted({label for label in labels if label is not None})
                class_styles = make_styles(classes) if 0 < len(classes) <= len(COLOURS) else {}
                legend |= class_styles
                panels.append(Panel(f"Map of the test images by {name}", _map(name, points, labels, class_styles), 3.2))
                break
        if len(panels) == MOST_PANELS:
            break
    if not panels:
        return []
    caption = "Every test image at its place on the plane of the first two principal components of its features."
    caption = of_the_first(caption, panels)
    return [Picture("map", "examples", "Map of the test images", caption, panels, legend, lines=False, marks=True)]


def _points(file: Path) -> tuple[np.ndarray, list[str | None]]:
    """Coordinates (N, 2) and labels of the embedded images."""
    import pyarrow.parquet as pq  # slow to import

    columns = pq.read_table(file, columns=["xy", "label"])
    return np.array(columns["xy"].to_pylist(), dtype=np.float32), columns["label"].to_pylist()


def _map(
    name: str, points: np.ndarray, labels: Sequence[str | None], styles: dict[str, Style]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        size = float(np.clip(3000 / max(1, len(points)), 1, 14))
        label_of = np.array([label or "" for label in labels])
        for label, (colour, _, marker) in (styles or {"": Style(COLOURS[0], "-", "o")}).items():
            rows = label_of == label if styles else slice(None)
            axes.scatter(
                points[rows, 0],
                points[rows, 1],
                s=size,
                color=colour,
                marker=marker,
                alpha=0.7,
                linewidths=0,
                rasterized=True,
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(short(name))

    return draw


# --------------------------------------------------------------------------------------------------


def _histories(table: Table, is_intact: IsIntact) -> Iterator[tuple[Finding, list[dict[str, Any]]]]:
    for finding in table.findings.values():
        if finding.metrics is not None and is_intact(finding, "history.jsonl"):
            yield finding, read_history(finding.folder / "history.jsonl")
