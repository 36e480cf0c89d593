"""Makes results.csv: one row for each run, with its scores, its cost and every setting that it depends on.

Columns of settings have names as in a study's file (`sampling.gamma`). The row of an evaluation also has the settings
of the runs that made its encoder, so one table shows which setting gave which score.
"""

from __future__ import annotations

import csv
import io
from typing import Any

from aps.layout import makers_of
from aps.report.differences import NOT_COMPARED, shown
from aps.report.table import Run, Table, machine
from aps.results import flatten
from aps.tracking.describing import inherit

FIXED = ("experiment", "seed", "stage", "dataset", "headline", "value", "wall_seconds", "finished", "version", "commit",
         "settings_digest", "dataset_digest", "hardware", "mlflow_run_id")  # fmt: skip


def content(table: Table) -> str:
    """The text of the file. Scores of single classes are only in metrics.json."""
    rows = [_row(table, run) for run in table.runs]
    groups: list[dict[str, Any]] = [{}, {}, {}]  # columns of metrics, cost and settings
    for row in rows:
        for group, values in zip(groups, row[1:], strict=True):
            group |= dict.fromkeys(values)
    out = io.StringIO()
    writer = csv.DictWriter(out, [*FIXED, *(key for group in groups for key in group)], lineterminator="\n")
    writer.writeheader()
    for parts in rows:
        writer.writerow({key: value for part in parts for key, value in part.items()})
    return out.getvalue()


def settings_columns(table: Table, run: Run) -> dict[str, str]:
    """The settings of a run and of those that made its encoder, by their names in a study's file."""
    tree = {key: value for key, value in run["settings"].items() if key not in NOT_COMPARED}
    makers = [table.findings.get(job) for job in makers_of(table.study, (run["experiment"], run["seed"], run["stage"]))]
    tree = inherit(
        tree, *(made.metrics["settings"] for made in makers if made is not None and made.metrics is not None)
    )
    return {key: shown(value) for key, value in flatten(tree).items()}


def _row(table: Table, run: Run) -> tuple[dict[str, Any], ...]:
    metrics = {key: value for key, value in run["metrics"].items() if isinstance(value, int | float)}
    scores = [s.metric for s in table.scores if s.stage == run["stage"]] or ["loss"]
    headline = next((metric for metric in scores if metric in metrics), scores[0])
    fixed = {key: run[key] for key in FIXED if key in run and key != "dataset"} | {
        "dataset": run["dataset"]["name"],
        "dataset_digest": run["dataset"]["digest"],
        "headline": headline,
        "value": metrics.get(headline),
        "hardware": machine(run),
    }
    cost = {f"cost.{key}": value for key, value in (run.get("cost") or {}).items()}
    return fixed, metrics, cost, settings_columns(table, run)
