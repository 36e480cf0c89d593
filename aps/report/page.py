"""Writes the report: report.html, results.csv and a PNG file of every figure.

It reads only the files of finished runs, so a report can be made at any time, on any machine, of the runs that have
finished. The page is a single file that can be mailed, printed and read on a telephone. Beside each number it shows
where the number comes from: its files, its run in MLflow, its settings, and the command that computes it again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from aps import __version__
from aps.errors import UserError
from aps.files import atomic_path, read_json, write_bytes
from aps.findings import STAMP, Finding, Findings
from aps.report import csv_file
from aps.report.differences import differing, shown
from aps.report.drawing import DASHES, MARKERS, Picture
from aps.report.figures import IsIntact, all_figures
from aps.report.table import MOST_NAMES, SMALL_TEST, Column, Run, Table, machine
from aps.results import flatten
from aps.seals import damage
from aps.settings.study import Study
from aps.text import listed
from aps.tracking.addresses import run_page, settled
from aps.tracking.browsing import how_to_browse
from aps.tracking.state import read_state

TEMPLATE = Path(__file__).with_name("page.html.j2")
FIGURES = "figures"  # in the report's folder, with CATEGORY/NAME.png


def write_report(
    study: Study, folder: Path, address: str, options: str = "", findings: Findings | None = None
) -> tuple[list[Path], list[Run]]:
    """Write report.html, results.csv and figures/CATEGORY/NAME.png into `folder`; return the files and the runs shown.

    Args:
        address: address of MLflow's server or store, for links.
        options: options of the command line that name the study, for the commands that the page shows.
        findings: those of the study; None: look for them here.

    Raises:
        UserError: a metrics.json is broken, a published entry is unknown, or the folder can't be written.
    """
    findings = findings or Findings(study, sources=True, gone=True)
    table = Table(study, findings)
    intact = partial(is_intact, options=options, told=set())
    pictures = all_figures(table, intact) + _examples(table, intact)
    other_code, without_files = findings.other_code(options), findings.without_files()
    if without_files is not None:
        print(f"warning: {without_files}", file=sys.stderr)
    _remove_figures(folder)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    files = [folder / "report.html", folder / "results.csv"]
    for picture in pictures:
        file = folder / FIGURES / picture.category / f"{picture.name}.png"
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, picture.png())
        files.append(file)
    with atomic_path(folder / "results.csv") as temporary:
        temporary.write_text(csv_file.content(table), encoding="utf-8")
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(
            _page(table, pictures, folder, address, options, other_code, without_files), encoding="utf-8"
        )
    return files, table.runs


def _remove_figures(folder: Path) -> None:
    """Delete the figures that an earlier report lists as its files. Others may be the user's."""
    try:
        names = [str(name) for name in read_json(folder / STAMP)["files"] if str(name).endswith(".png")]
    except (UserError, KeyError, TypeError):
        return
    for name in names:
        if ".." not in name:
            (folder / name).unlink(missing_ok=True)


def is_intact(finding: Finding, file: str, options: str = "", told: set[Path] | None = None) -> bool:
    """Whether the run's result counts and this file of it is the one that was written; if it is another, prints a message.

    Args:
        options: as of `write_report`.
        told: the files of which a message was printed, so that there is one for each, however many pictures want it.
    """
    if finding.metrics is None or file not in finding.metrics["files"] or file in finding.gone:
        return False
    problem = damage(finding.folder, {"files": {file: finding.metrics["files"][file]}}, whole=True)
    told = set() if told is None else told
    if problem is not None and (path := finding.folder / file) not in told:
        told.add(path)
        print(
            f"{finding.label}: left out of the report: pictures of it, not its scores, since in {finding.folder} {problem}; "
            f"`{again(finding, options)}` makes it again",
            file=sys.stderr,
        )
    return problem is None


def again(finding: Finding, options: str) -> str:
    """The command that makes a run's result again."""
    command = f"python -m aps {finding.stage} --experiment {finding.experiment} --seed {finding.seed} --again {options}"
    return command.strip()


def _examples(table: Table, intact: IsIntact) -> list[Picture]:
    """The figures of images. They need torch, which is imported only if there are some to draw."""
    if not any(
        run["files"].get("encoder.safetensors")
        or run["files"].get("features.parquet")
        or run["files"].get("predictions.json")
        for run in table.runs
    ):
        return []
    from aps.report.examples import examples

    return examples(table, intact)


# --------------------------------------------------------------------------------------------------


def _page(
    table: Table, pictures: Sequence[Picture], folder: Path, address: str, options: str, other_code: Sequence[str],
    without_files: str | None,
) -> str:  # fmt: skip
    study = table.study
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"flop": operations, "shown": shown, "id": id}
    floor = table.above_floor()
    published = table.beside_published(table.runs)
    verdicts = table.verdicts()
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        study=study,
        table=table,
        rows=table.evaluated(),
        beside={
            (name, score): _notes(table, name, score, floor, published)
            for name in study.experiments
            for score in table.scores
        },
        best={(verdict.best, verdict.score) for verdict in verdicts},
        verdicts=verdicts,
        datasets=len({v.dataset for v in verdicts}) > 1,
        spent={name: table.spent(name) for name in study.experiments},
        small=SMALL_TEST,
        shared=any(sample.one_encoder for cells in table.cells.values() for sample in cells.values()),
        copies=table.copies(),
        floor=floor,
        published=published,
        pictures=[(picture, [(label, Markup(svg)) for label, svg in picture.inline()]) for picture in pictures],
        chips={id(picture): _chips(picture) for picture in pictures},
        differing=differing(table),
        planned=len(study.jobs()),
        facts=_facts(table),
        groups=_groups(table, folder, address, options),
        pages=_neighbour_pages(table, folder),
        stale=_reasons(table),
        other_code=other_code,
        without_files=without_files,
        mlflow=how_to_browse(study, address),
        options=options,
        version=__version__,
    )


def operations(flops: float) -> str:
    """A number of operations, in a unit that leaves one to three digits before the point."""
    for power, unit in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{flops / 10**power:.3g} {unit}FLOP"
    return f"{flops:.0f} FLOP"


def anchor(experiment: str, stage: str) -> str:
    return f"run-{experiment}-{stage}"


def _notes(
    table: Table, name: str, score: Column, floor: Sequence[dict[str, Any]], published: Sequence[dict[str, Any]]
) -> list[str]:
    """The lines in small letters under a score."""
    lines = []
    if interval := table.interval(name, score):
        lines.append(f"95 %: {interval}")
    for row in floor:
        if row["experiment"] == name and row["column"] == score:
            missing = table.missing(row["floor"], score)
            lines.append(
                f"floor {row['base'].mean:.1f} ({row['difference']:+.1f})" + (f", {missing} seeds" if missing else "")
            )
            break
    for row in published:
        if row["experiment"] == name and row["metric"] == f"{score.stage}.{score.metric}":
            lines.append(f"published {row['published']}" + ("" if row["compared"] else " (other settings)"))
    return lines


def _chips(picture: Picture) -> list[tuple[str, str, str, str]]:
    """(name, colour, stroke-dasharray in SVG, marker as a path of SVG) of each entry of a picture's legend."""
    return [(name, style.colour, DASHES[style.dash], MARKERS[style.marker]) for name, style in picture.legend.items()]


def _facts(table: Table) -> dict[str, list[str]]:
    """When the runs finished, and the commits and machines that made them."""
    runs = table.runs
    if not runs:
        return {}
    ended = sorted(run["finished"] for run in runs)
    first, last = (time[:16].replace("T", " ") for time in (ended[0], ended[-1]))
    period = f"{last} UTC" if first == last else f"{first} to {last[11:] if first[:10] == last[:10] else last} UTC"
    return {
        "finished": [period],
        "commit": sorted({run["commit"] or f"version {run['version']}" for run in runs}),
        "machine": sorted({machine(run) for run in runs}),
    }


def _groups(table: Table, folder: Path, address: str, options: str) -> list[dict[str, Any]]:
    """For each stage of each experiment: its runs, where they come from, and their settings."""
    groups = []
    for name, experiment in table.study.experiments.items():
        for stage in experiment.stages:
            findings = [table.findings[name, seed, stage] for seed in experiment.seeds]
            runs = [
                _run(table, finding, folder, address, options) for finding in findings if finding.metrics is not None
            ]
            if runs:
                settings = next(f.metrics for f in findings if f.metrics is not None)["settings"]
                flat = flatten({k: v for k, v in settings.items() if k not in ("stage", "experiment", "seed")})
                groups.append(
                    {"id": anchor(name, stage), "experiment": name, "stage": stage, "runs": runs, "settings": flat}
                )
    return groups


def _run(table: Table, finding: Finding, folder: Path, address: str, options: str) -> dict[str, Any]:
    metrics = finding.metrics
    assert metrics is not None
    scores = [(s.label, metrics["metrics"].get(s.metric)) for s in table.scores if s.stage == finding.stage]
    figures = scores or [("loss", metrics["metrics"].get("loss"))]
    return {
        "seed": finding.seed,
        "figures": ", ".join(f"{label} {value:.2f}" for label, value in figures if value is not None),
        "seconds": metrics["wall_seconds"],
        "finished": metrics["finished"][:16].replace("T", " "),
        "commit": metrics["commit"] or metrics["version"],
        "machine": machine(metrics),
        "digest": metrics["settings_digest"],
        "dataset": f"{metrics['dataset']['name']} {metrics['dataset']['digest'][:12]}",
        "file": _relative(finding.folder / "metrics.json", folder),
        "mlflow": mlflow_page(finding, address),
        "mlflow_run_id": metrics["mlflow_run_id"],
        "command": again(finding, options),
    }


def mlflow_page(finding: Finding, address: str) -> str | None:
    """Address of the run's page in MLflow; None if no server has the run."""
    address = settled(address)
    state = read_state(finding.folder / "tracking.json") if address.startswith("http") else None
    if state is None or state.address != address or state.run_id is None or state.experiment_id is None:
        return None
    return f"{address}/{run_page(state.experiment_id, state.run_id)}"


def _reasons(table: Table) -> dict[str, str]:
    """Why results are not shown -> the labels of these results."""
    labels_of: dict[str, list[str]] = {}
    for finding in table.stale():
        labels_of.setdefault(finding.problem or "", []).append(finding.label)
    return {problem: listed(labels, MOST_NAMES) for problem, labels in labels_of.items()}


def _neighbour_pages(table: Table, folder: Path) -> list[tuple[str, str]]:
    """(experiment and seed, address) of each page that the embed stage wrote."""
    return [
        (f"{finding.experiment}, seed {finding.seed}", _relative(finding.folder / "neighbours.html", folder))
        for finding in table.findings.values()
        if finding.stage == "embed" and finding.metrics is not None
    ]


def _relative(file: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(file, folder)).as_posix())
