"""Writes the report: report.html, results.csv and a PNG file of every figure.

It reads what finished runs left and nothing else, so a report can be made anywhere, at any time, of whatever has finished.
The page is one file that asks for no other: it can be mailed, printed, and read on a telephone. Beside each number stands
what made it: its files, its run in MLflow, its settings, and the command that makes it again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
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
from aps.report.drawing import Picture
from aps.report.figures import all_figures
from aps.report.table import SMALL_TEST, Column, Run, Table, machine
from aps.results import flatten
from aps.seals import damage
from aps.settings.study import Study
from aps.tracking.addresses import run_page, settled
from aps.tracking.browsing import how_to_look
from aps.tracking.state import read_state

TEMPLATE = Path(__file__).with_name("page.html.j2")
NAMED = 6  # results that are not shown for one reason
FIGURES = "figures"  # of the report's folder: CATEGORY/NAME.png


def write_report(study: Study, folder: Path, address: str, options: str = "") -> tuple[list[Path], list[Run]]:
    """Writes report.html, results.csv and figures/CATEGORY/NAME.png into `folder`; returns these files and the runs shown.

    Args:
        address: of MLflow's server or store, for the page to link to.
        options: of the command line that name the study, for the commands that the page shows.

    Raises:
        UserError: a metrics.json is broken, a published entry is unknown, or the folder can't be written.
    """
    findings = Findings(study)
    table = Table(study, findings)
    pictures = all_figures(table, whole) + _examples(table)
    _remove_figures(folder)
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    files = [folder / "report.html", folder / "results.csv"]
    for picture in pictures:
        file = folder / FIGURES / picture.category / f"{picture.name}.png"
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, picture.png())
        files.append(file)
    with atomic_path(folder / "results.csv") as temporary:
        temporary.write_text(csv_file.content(table))
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(_page(table, pictures, folder, address, options))
    return files, table.runs


def _remove_figures(folder: Path) -> None:
    """Those of an earlier report, by what it said to have written: the folder may be somebody's own."""
    try:
        names = [str(name) for name in read_json(folder / STAMP)["files"] if str(name).endswith(".png")]
    except (UserError, KeyError, TypeError):
        return
    for name in names:
        if ".." not in name:
            (folder / name).unlink(missing_ok=True)


def whole(finding: Finding, file: str) -> bool:
    """Whether the run's figures are the study's, and this file of it is the one that was written."""
    if finding.metrics is None or file not in finding.metrics["files"]:
        return False
    problem = damage(finding.folder, {"files": {file: finding.metrics["files"][file]}}, whole=True)
    if problem is not None:
        print(f"{finding.label}: left out of the report: {finding.folder}: {problem}", file=sys.stderr)
    return problem is None


def _examples(table: Table) -> list[Picture]:
    """Figures of images need torch, which is imported where there are some to draw."""
    if not any(
        run["files"].get("encoder.safetensors")
        or run["files"].get("features.parquet")
        or run["files"].get("predictions.json")
        for run in table.runs
    ):
        return []
    from aps.report.examples import examples

    return examples(table, whole)


# --------------------------------------------------------------------------------------------------


def _page(table: Table, pictures: Sequence[Picture], folder: Path, address: str, options: str) -> str:
    study = table.study
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"flop": operations, "shown": shown, "id": id}
    floor = table.above_floor()
    published = table.beside_published(table.runs)
    verdicts = table.verdicts()
    return environment.from_string(TEMPLATE.read_text()).render(
        study=study,
        table=table,
        rows=table.evaluated(),
        beside={
            (name, score): _beside(table, name, score, floor, published)
            for name in study.experiments
            for score in table.scores
        },
        best={(verdict.best, verdict.score) for verdict in verdicts},
        verdicts=verdicts,
        datasets=len({v.dataset for v in verdicts}) > 1,
        spent={name: table.spent(name) for name in study.experiments},
        small=SMALL_TEST,
        floor=floor,
        published=published,
        pictures=[(picture, [(label, Markup(svg)) for label, svg in picture.inline()]) for picture in pictures],
        chips={id(picture): _chips(picture) for picture in pictures},
        differing=differing(table),
        planned=len(study.jobs()),
        facts=_facts(table),
        groups=_groups(table, folder, address, options),
        pages=_neighbours(table, folder),
        stale=_reasons(table),
        look=how_to_look(study, address),
        options=options,
        version=__version__,
    )


def operations(flops: float) -> str:
    """In a unit that leaves one to three digits before the point."""
    for power, unit in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if flops >= 10**power:
            return f"{flops / 10**power:.3g} {unit}FLOP"
    return f"{flops:.0f} FLOP"


def anchor(experiment: str, stage: str) -> str:
    return f"run-{experiment}-{stage}"


def _beside(
    table: Table, name: str, score: Column, floor: Sequence[dict[str, Any]], published: Sequence[dict[str, Any]]
) -> list[str]:
    """What stands in small letters under a score."""
    lines = []
    if interval := table.interval(name, score):
        lines.append(f"95 %: {interval}")
    for row in floor:
        if row["experiment"] == name and row["column"] == score:
            lines.append(f"floor {row['base'].mean:.1f} ({row['difference']:+.1f})")
            break
    for row in published:
        if row["experiment"] == name and row["metric"] == f"{score.stage}.{score.metric}":
            lines.append(f"published {row['published']}" + ("" if row["compared"] else " (other settings)"))
    return lines


def _chips(picture: Picture) -> list[tuple[str, str, str]]:
    """(name, colour, dashes of SVG) of a picture's legend."""
    dashes = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}
    return [(name, look.colour, dashes[look.dash]) for name, look in picture.legend.items()]


def _facts(table: Table) -> dict[str, list[str]]:
    """When, of which commit and where the runs were made."""
    runs = table.runs
    if not runs:
        return {}
    ended = sorted(run["finished"] for run in runs)
    first, last = (moment[:16].replace("T", " ") for moment in (ended[0], ended[-1]))
    when = f"{last} UTC" if first == last else f"{first} to {last[11:] if first[:10] == last[:10] else last} UTC"
    return {
        "finished": [when],
        "commit": sorted({run["commit"] or f"version {run['version']}" for run in runs}),
        "machine": sorted({machine(run) for run in runs}),
    }


def _groups(table: Table, folder: Path, address: str, options: str) -> list[dict[str, Any]]:
    """The runs of each stage of each experiment, and what made them."""
    groups = []
    for name, experiment in table.study.experiments.items():
        for stage in experiment.stages:
            found = [table.findings[name, seed, stage] for seed in experiment.seeds]
            runs = [_run(table, finding, folder, address, options) for finding in found if finding.metrics is not None]
            if runs:
                settings = next(f.metrics for f in found if f.metrics is not None)["settings"]
                flat = flatten({k: v for k, v in settings.items() if k not in ("stage", "experiment", "seed")})
                groups.append(
                    {"id": anchor(name, stage), "experiment": name, "stage": stage, "runs": runs, "settings": flat}
                )
    return groups


def _run(table: Table, finding: Finding, folder: Path, address: str, options: str) -> dict[str, Any]:
    metrics = finding.metrics
    assert metrics is not None
    own = [(s.label, metrics["metrics"].get(s.metric)) for s in table.scores if s.stage == finding.stage]
    figures = own or [("loss", metrics["metrics"].get("loss"))]
    command = f"python -m aps {finding.stage} --experiment {finding.experiment} --seed {finding.seed} --again {options}"
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
        "command": command.strip(),
    }


def mlflow_page(finding: Finding, address: str) -> str | None:
    """The run's page, where a server has it; a store without a server has no address."""
    address = settled(address)
    state = read_state(finding.folder / "tracking.json") if address.startswith("http") else None
    if state is None or state.address != address or state.run_id is None or state.experiment_id is None:
        return None
    return f"{address}/{run_page(state.experiment_id, state.run_id)}"


def _reasons(table: Table) -> dict[str, str]:
    """Why results that are there are not shown -> which these are."""
    found: dict[str, list[str]] = {}
    for finding in table.stale():
        found.setdefault(finding.problem or "", []).append(finding.label)
    return {
        problem: ", ".join(labels[:NAMED]) + (f" and {len(labels) - NAMED} more" if len(labels) > NAMED else "")
        for problem, labels in found.items()
    }


def _neighbours(table: Table, folder: Path) -> list[tuple[str, str]]:
    """(experiment and seed, address) of the pages that the embed stage wrote."""
    return [
        (f"{finding.experiment}, seed {finding.seed}", _relative(finding.folder / "neighbours.html", folder))
        for finding in table.findings.values()
        if finding.stage == "embed" and finding.metrics is not None
    ]


def _relative(file: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(file, folder)).as_posix())
