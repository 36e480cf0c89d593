"""Tables and figures over the finished runs of a study: a self-contained page, a CSV file, a table for the terminal.

It reads metrics.json and history.jsonl and nothing else, so a report can be made anywhere, at any time, of whatever has
finished. Means and sample standard deviations are over seeds. It imports no torch, and knows neither how a number was made
nor how Snakemake schedules.
"""

from __future__ import annotations

import base64
import csv
import io
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aps import published
from aps.files import atomic_path
from aps.findings import NOT_RUN, Finding, Findings
from aps.journal import read_history
from aps.layout import report_folder, study_folder
from aps.results import flatten
from aps.seals import damage
from aps.settings.study import ExperimentSettings, Study
from aps.stages import STAGES
from aps.tracking.browsing import how_to_look

Run = dict[str, Any]  # the content of a metrics.json

TEMPLATE = Path(__file__).with_name("report.html.j2")
COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
REASONS = 12  # lines in the terminal
PANELS = 3  # in a row of a figure
NOT_COMPARED = {"inherits", "description", "published", "seeds", "stages", "resources"}


class Column(NamedTuple):
    """A headline figure of a stage as this study has it."""

    stage: str
    metric: str
    label: str


class Sample(NamedTuple):
    """One score over the seeds of one experiment."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def range(self) -> float:
        """Greatest minus least."""
        return max(self.values) - min(self.values)

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.values):.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:.1f}{spread}"


class Table:
    """The study's scores: `cells[experiment][score]` over the seeds that have finished."""

    def __init__(self, study: Study, findings: Iterable[Finding]) -> None:
        self.study = study
        self.findings = {(f.experiment, f.seed, f.stage): f for f in findings}
        runs = [f.metrics for f in self.findings.values() if f.metrics is not None]
        self.scores = columns(study)
        found: dict[str, dict[Column, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in runs:
            for score in self.scores:
                if score.stage == run["stage"] and score.metric in run["metrics"]:
                    found[run["experiment"]][score].append(run["metrics"][score.metric])
        self.cells = {
            name: {score: Sample(tuple(values)) for score, values in found[name].items()} for name in study.experiments
        }

    def evaluated(self) -> list[str]:
        """Experiments that have a column at all: one may only pretrain for others."""
        stages = {score.stage for score in self.scores}
        return [name for name, e in self.study.experiments.items() if stages & set(e.stages)]

    def text(self, name: str, score: Column) -> str:
        """The score; or in two words why there is none."""
        if score in self.cells[name]:
            return str(self.cells[name][score])
        if score.stage not in self.study.experiments[name].stages:
            return ""
        runs = [(name, seed, score.stage) for seed in self.study.experiments[name].seeds]
        found = [self.findings[run] for run in runs if run in self.findings]
        return next((f.problem.partition(":")[0] for f in found if f.stale and f.problem), NOT_RUN)

    def stale(self) -> list[Finding]:
        """Runs that are there, but not the study's."""
        return [finding for finding in self.findings.values() if finding.stale]

    def above_floor(self) -> list[dict[str, Any]]:
        """Each experiment's scores against the same evaluation of a random encoder.

        `times` is the difference in units of the larger range over seeds of the two; None where only one seed ran.
        """
        rows = []
        for floor, experiment in self.study.experiments.items():
            if experiment.encoder.weights != "random":
                continue
            for name, other in self.study.experiments.items():
                if other.encoder.weights == "random":
                    continue
                for score in self.scores:
                    if not _same_evaluation(experiment, other, score.stage):
                        continue
                    if score in self.cells[name] and score in self.cells[floor]:
                        ours, base = self.cells[name][score], self.cells[floor][score]
                        spread = max(ours.range, base.range)
                        more = ours.mean - base.mean
                        rows.append(
                            {
                                "experiment": name, "floor": floor, "score": score.label, "ours": ours, "base": base,
                                "difference": more, "spread": spread, "times": more / spread if spread else None,
                            }
                        )  # fmt: skip
        return rows

    def beside_published(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """A row for each published number that an experiment repeats: theirs, ours, the difference, the runs."""
        repeats = {name: e for name, e in self.study.experiments.items() if e.published is not None}
        entries = published.load() if repeats else {}
        rows = []
        for name, experiment in repeats.items():
            entry = entries[str(experiment.published)]  # checked with the settings
            differences = published.differences(experiment, entry)
            for key, theirs in entry.metrics.items():
                stage, _, metric = key.partition(".")
                if stage not in experiment.stages:
                    continue
                made = [r for r in runs if (r["experiment"], r["stage"]) == (name, stage) and metric in r["metrics"]]
                ours = Sample(tuple(r["metrics"][metric] for r in made)) if made else None
                compared = ours is not None and not differences
                rows.append(
                    {
                        "experiment": name, "method": entry.method, "metric": key, "published": theirs, "ours": ours,
                        "difference": ours.mean - theirs if ours is not None and compared else None,
                        "remark": "; ".join([*(["not compared: " + ", ".join(differences)] if differences else []),
                                             *filter(None, [entry.note])]),
                        "source": entry.source,
                        "runs": [r["mlflow_run_id"] or f"seed {r['seed']}" for r in made],
                    }
                )  # fmt: skip
        return rows


def write_report(study: Study, folder: Path, address: str) -> tuple[list[Path], list[Run]]:
    """Writes report.html, results.csv, scores.png and curves.png into `folder`; returns these files and the runs shown.

    Args:
        address: of MLflow's server or store, for the page to name.

    Raises:
        UserError: a metrics.json is broken, a published entry is unknown, or the folder can't be written.
    """
    findings = Findings(study)
    runs = findings.runs()
    table = Table(study, findings)
    pictures = {
        name: picture for name, picture in (("scores", _scores_figure(table)), ("curves", _curves(findings))) if picture
    }
    files = [folder / "report.html", folder / "results.csv", *(folder / f"{name}.png" for name in pictures)]
    for name, picture in pictures.items():
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(picture)
    with atomic_path(folder / "results.csv") as temporary:
        temporary.write_text(_csv(table, runs))
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(_page(table, runs, pictures, address, folder))
    return files, runs


def terminal(study: Study, address: str) -> str:
    """The table of results, where everything lies and how to browse it in MLflow, for the terminal."""
    findings = Findings(study)
    table = Table(study, findings)
    header = ["experiment", *(score.label for score in table.scores)]
    body = [[name, *(table.text(name, score) for score in table.scores)] for name in table.evaluated()]
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *body]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    seeds = max((len(e.seeds) for e in study.experiments.values()), default=1)
    report = report_folder(study)
    return "\n".join(
        [
            "",
            f"Study '{study.study}': {len(findings.runs())} of {len(study.jobs())} runs finished. "
            f"In percent{', mean ± standard deviation over seeds' if seeds > 1 else ''}.",
            "",
            *lines,
            *_reasons(table),
            "",
            f"Report   {report / 'report.html'}" + ("" if (report / "report.html").exists() else " (not yet made)"),
            f"Table    {report / 'results.csv'}",
            f"Results  {study_folder(study)}/EXPERIMENT/seedN/STAGE/",
            f"MLflow   {how_to_look(study, address)}",
        ]
    )


def _reasons(table: Table) -> list[str]:
    """Why figures that are there are not shown."""
    stale = table.stale()
    if not stale:
        return []
    lines = [f"  {finding.label}: {finding.problem}" for finding in stale[:REASONS]]
    more = [f"  and {len(stale) - REASONS} more"] if len(stale) > REASONS else []
    return ["", "Not this study's figures, so not shown (`snakemake all` makes them again):", *lines, *more]


# --------------------------------------------------------------------------------------------------


def columns(study: Study) -> list[Column]:
    """The scores of every stage that some experiment runs (`aps.stages`)."""
    found = []
    for stage in STAGES.values():
        ran = [e for e in study.experiments.values() if stage.name in e.stages]
        for score in stage.scores if ran else ():
            values = getattr(getattr(ran[0], stage.name), "k", None) or (score.prefer,)
            k = score.prefer if score.prefer in values else values[0]
            found.append(Column(stage.name, score.metric.format(k=k), score.label.format(k=k)))
    return found


def _same_evaluation(a: ExperimentSettings, b: ExperimentSettings, stage: str) -> bool:
    """Whether a stage of two experiments differs in the encoder's weights alone."""
    if stage not in a.stages or stage not in b.stages or getattr(a, stage) != getattr(b, stage):
        return False
    if not STAGES[stage].detects and a.dataset_settings(stage) != b.dataset_settings(stage):
        return False
    return a.encoder.model_copy(update={"weights": ""}) == b.encoder.model_copy(update={"weights": ""})


def _differing(study: Study) -> tuple[list[str], dict[str, list[Any]]]:
    """Keys that are not the same in all experiments, and each experiment's values of them."""
    classify = [stage.name for stage in STAGES.values() if not stage.detects]
    flat = {
        name: flatten(e.model_dump(mode="json", exclude=NOT_COMPARED))
        | {f"{stage}.dataset": e.dataset_of(stage) for stage in classify if e.dataset_of(stage) != e.dataset.name}
        for name, e in study.experiments.items()
    }
    every = dict.fromkeys(key for values in flat.values() for key in values)
    flat = {name: {key: values.get(key) for key in every} for name, values in flat.items()}
    keys = [key for key in next(iter(flat.values())) if len({str(values[key]) for values in flat.values()}) > 1]
    return keys, {name: [values[key] for key in keys] for name, values in flat.items()}


def _csv(table: Table, runs: Sequence[Run]) -> str:
    """One row a run; every metric has its own column, those of one class left to metrics.json."""
    scalars = [{k: v for k, v in run["metrics"].items() if isinstance(v, int | float)} for run in runs]
    names = list(dict.fromkeys(key for row in scalars for key in row))
    fixed = ["experiment", "seed", "stage", "dataset", "headline", "value", "wall_seconds", "finished", "version", "commit",
             "settings_digest", "dataset_digest", "hardware", "mlflow_run_id"]  # fmt: skip
    out = io.StringIO()
    writer = csv.DictWriter(out, [*fixed, *names], lineterminator="\n")
    writer.writeheader()
    for run, metrics in zip(runs, scalars, strict=True):
        headline = next((s.metric for s in table.scores if s.stage == run["stage"]), "loss")
        writer.writerow(
            {
                **{key: run[key] for key in ("experiment", "seed", "stage", "wall_seconds", "finished", "version", "commit",
                                             "settings_digest", "mlflow_run_id")},
                "dataset": run["dataset"]["name"], "dataset_digest": run["dataset"]["digest"],
                "headline": headline, "value": metrics.get(headline), "hardware": _machine(run), **metrics,
            }
        )  # fmt: skip
    return out.getvalue()


def _machine(run: Run) -> str:
    hardware = run["hardware"]
    return f"{hardware.get('gpu') or hardware['cpu']}, {hardware['processes']} process" + "es" * (
        hardware["processes"] > 1
    )


def _page(table: Table, runs: Sequence[Run], pictures: Mapping[str, bytes], address: str, folder: Path) -> str:
    study = table.study
    keys, values = _differing(study)
    detections, maps = {}, {}
    for name, e in study.experiments.items():
        finding = table.findings.get((name, e.seeds[0], "embed"))
        if finding is not None and _whole(finding, "map.png"):
            page = os.path.relpath(finding.folder / "neighbours.html", folder)
            maps[name] = {
                "picture": _embedded((finding.folder / "map.png").read_bytes()),
                "page": Path(page).as_posix(),
            }
        finding = table.findings.get((name, e.seeds[0], "detection"))
        if finding is not None and _whole(finding, "predictions.png"):
            detections[name] = _embedded((finding.folder / "predictions.png").read_bytes())
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        study=study,
        table=table,
        rows=table.evaluated(),
        best={score: _best(table, score) for score in table.scores},
        floor=table.above_floor(),
        published=table.beside_published(runs),
        pictures={name: _embedded(picture) for name, picture in pictures.items()},
        detections=detections,
        maps=maps,
        keys=keys,
        values=values,
        runs=[run | {"machine": _machine(run), "scores": _run_scores(table, run)} for run in runs],
        planned=len(study.jobs()),
        stale=table.stale(),
        uri=address,
    )


def _best(table: Table, score: Column) -> float:
    return max((cells[score].mean for cells in table.cells.values() if score in cells), default=float("nan"))


def _run_scores(table: Table, run: Run) -> str:
    own = [(s.label, run["metrics"].get(s.metric)) for s in table.scores if s.stage == run["stage"]]
    shown = own or [("loss", run["metrics"].get("loss"))]
    return ", ".join(f"{label} {value:.2f}" for label, value in shown if value is not None)


def _whole(finding: Finding, file: str) -> bool:
    """Whether the run's figures are the study's, and this file of it is the one that was written."""
    if finding.metrics is None or file not in finding.metrics["files"]:
        return False
    problem = damage(finding.folder, {"files": {file: finding.metrics["files"][file]}}, whole=True)
    if problem is not None:
        print(f"{finding.label}: left out of the report: {finding.folder}: {problem}", file=sys.stderr)
    return problem is None


def _embedded(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


# --------------------------------------------------------------------------------------------------
# Figures


def _colours(names: Iterable[str]) -> dict[str, Any]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _scores_figure(table: Table) -> bytes | None:
    """Every seed as a dot, the mean as a tick, a panel for each score."""
    names, colours = table.evaluated(), _colours(table.study.experiments)
    panels = []
    for score in table.scores:
        present = [name for name in names if score in table.cells[name]]
        if present:
            panels.append((score, present))
    if not panels:
        return None
    tallest = max(len(present) for _, present in panels)
    figure, grid = _grid(len(panels), 0.9 + 0.34 * tallest)
    for axes, (score, present) in zip(grid, panels, strict=True):
        for row, name in enumerate(present):
            sample = table.cells[name][score]
            axes.plot(sample.values, [row] * len(sample.values), "o", color=colours[name], markersize=4, alpha=0.6)
            axes.plot(sample.mean, row, "|", color=colours[name], markersize=13, markeredgewidth=2)
            offset: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{sample.mean:.1f}", (max(sample.values), row), **offset)
        axes.set_yticks(range(len(present)), present, fontsize=8)
        axes.set_ylim(tallest - 0.5, -0.5)
        values = [value for name in present for value in table.cells[name][score].values]
        room = max(5.0, max(values) - min(values))
        axes.set_xlim(min(values) - 0.15 * room, max(values) + 0.25 * room)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_title(f"{score.label}, %", fontsize=9)
        _plain(axes)
    return _png(figure)


def _curves(findings: Findings) -> bytes | None:
    """Curves of history.jsonl over the share of training done: one thin line a seed, a panel for each kind."""
    colours = _colours(findings.study.experiments)
    curves = [(stage.name, *curve) for stage in STAGES.values() for curve in stage.curves]
    lines: dict[int, list[tuple[str, list[float], list[float]]]] = defaultdict(list)
    for finding in findings:
        name, stage = finding.experiment, finding.stage
        history = read_history(finding.folder / "history.jsonl") if _whole(finding, "history.jsonl") else []
        for panel, (own, key, _) in enumerate(curves):
            points = [(line["step"], line[key]) for line in history if key in line] if own == stage else []
            if len(points) > 1:
                lines[panel].append((name, [float(x) for x, _ in points], [float(y) for _, y in points]))
    if not lines:
        return None
    figure, grid = _grid(len(lines), 2.8)
    shown: dict[str, Any] = {}
    for axes, panel in zip(grid, sorted(lines), strict=True):
        for name, steps, values in lines[panel]:
            (shown[name],) = axes.plot(steps, values, color=colours[name], linewidth=1.1, alpha=0.8)
        axes.set_title(curves[panel][2], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        _plain(axes)
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=min(6, len(shown)), fontsize=8, frameon=False
    )
    return _png(figure)


def _grid(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes, at most PANELS in a row, each `height` inches high."""
    columns = min(PANELS, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.7 * columns, height * rows), layout="constrained")
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=130, format="png")
    return out.getvalue()
