"""The views that MLflow's page shows first: for each stage, a table of its runs with scores and cost, and plots.

Design: MLflow stores a shared view as a tag of the experiment, and an address can name the view. The views are written
as such tags, so the first screen shows which setting is best, at what cost and over which seeds, without a click. A
later MLflow that does not know the tag shows its ordinary table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aps.layout import makers_of
from aps.settings.study import ExperimentSettings, Study
from aps.stages import ROWS, Stage
from aps.tracking.addresses import page
from aps.tracking.describing import EPOCH, RESULTS, metric_name, parameters, prefix

SHARED = "mlflow.sharedViewState."
MACHINE_LEARNING = "custom_model_development"  # otherwise MLflow shows its pages for language models
COSTS = ("cost/seconds", "cost/gpu_hours")
MOST_PARAMETERS = 5  # that a table shows, of those that differ


@dataclass(frozen=True)
class View:
    """The view of one stage's runs.

    Attributes:
        scores: final metrics, by MLflow's names.
        curves: metrics over the steps, by MLflow's names.
        varied: parameters that differ between experiments.
        apart: whether the runs of several results folders are there, which no average may mix.
    """

    stage: str
    scores: tuple[str, ...]
    curves: tuple[str, ...]
    varied: tuple[str, ...]
    apart: bool = False

    @property
    def search(self) -> str:
        """What finds the stage's runs."""
        return f"tags.stage = '{self.stage}'"

    @property
    def name(self) -> str:
        return f"aps-{prefix(self.stage)}"

    def state(self) -> dict[str, Any]:
        """The view as MLflow stores it: search, columns, groups, charts."""
        shown = self.scores or self.curves[:1]
        metrics = [*shown[:1], *COSTS, *shown[1:]]
        varied = list(self.varied[:MOST_PARAMETERS])
        groups = [{"mode": "param", "groupByData": "experiment"}]
        if self.apart:
            groups.append({"mode": "tag", "groupByData": RESULTS})
        columns = [*_columns("params", varied), *_columns("metrics", metrics), *_columns("params", ["seed"])]
        charts = [*self._charts(varied), *self._hidden()]
        return {
            "searchFilter": self.search,
            "orderByKey": f"metrics.`{metrics[0]}`",
            "orderByAsc": not self.scores,
            "selectedColumns": columns,
            "columnOrder": ["attributes.`Run Name`", *columns, "runDateAndNestInfo"],
            "columnWidths": {"attributes.`Run Name`": 230, **dict.fromkeys(columns, 140), "runDateAndNestInfo": 130},
            "groupBy": {"aggregateFunction": "average", "groupByKeys": groups},
            "runsHiddenMode": "SHOW_ALL",
            "useGroupedValuesInCharts": True,
            "compareRunCharts": charts,
            "compareRunSections": [
                {
                    "uuid": name,
                    "name": name,
                    "display": True,
                    "isReordered": True,
                    "deleted": False,
                    "isGenerated": False,
                }
                for name in dict.fromkeys(chart["metricSectionId"] for chart in charts)
            ],
            "isAccordionReordered": True,
        }

    def _charts(self, varied: Sequence[str]) -> list[dict[str, Any]]:
        section = prefix(self.stage)
        axis = [key for key in varied if "." in key] or ["seed"]
        charts = [self._chart("BAR", section, metricKey=key, displayName=key) for key in self.scores]
        if self.scores:
            charts.append(
                self._chart(
                    "SCATTER", section, xaxis=_axis(COSTS[0]), yaxis=_axis(self.scores[0]), runsCountToCompare=100
                )
            )
            charts.append(
                self._chart(
                    "PARALLEL",
                    section,
                    selectedParams=axis,
                    selectedMetrics=[self.scores[0], COSTS[0]],
                    showAllRuns=True,
                )
            )
        return charts + [
            self._chart("LINE", section, metricKey=key, selectedMetricKeys=[key], displayName=key)
            for key in self.curves
        ]

    def _hidden(self) -> list[dict[str, Any]]:
        """The epoch can be chosen as an axis, but has no chart."""
        return [self._chart("LINE", "Model metrics", metricKey=EPOCH, displayName=EPOCH) | {"deleted": True}]

    def _chart(self, kind: str, section: str, **fields: Any) -> dict[str, Any]:
        identity = hashlib.sha256(json.dumps([kind, section, fields], sort_keys=True).encode()).hexdigest()[:16]
        defaults = {"runsCountToCompare": 30, "deleted": False, "isGenerated": False}
        return {"type": kind, "uuid": identity, "metricSectionId": section} | defaults | fields


def views_of(study: Study) -> list[View]:
    """A view for each stage that the study runs, the evaluations first."""
    views = []
    for row in sorted(ROWS, key=lambda row: not row.scores):
        ran = [e for e in study.experiments.values() if row.name in e.stages]
        if not ran:
            continue
        first = {score.metric.format(k=score.prefer) for score in row.scores}
        keys = sorted(dict.fromkeys(key for e in ran for key in headlines(row, e)), key=lambda key: key not in first)
        scores = [metric_name(row.name, key) for key in keys]
        curves = [metric_name(row.name, curve.key) for curve in row.curves]
        views.append(View(row.name, tuple(scores), tuple(curves), varying(study_parameters(study, row.name))))
    return views


def headlines(row: Stage, experiment: ExperimentSettings) -> list[str]:
    """Keys of metrics.json that are a stage's scores. Of several k of kNN, the preferred one comes first."""
    return [key for score in row.scores for key in score.keys(getattr(experiment, row.name))]


def study_parameters(study: Study, stage: str) -> dict[str, dict[str, str]]:
    """MLflow's parameters of each experiment that runs a stage."""
    result = {}
    for name, experiment in study.experiments.items():
        if stage not in experiment.stages:
            continue
        job = (name, experiment.seeds[0], stage)
        makers = (study.stage_settings(*made).relevant() for made in makers_of(study, job))
        result[name] = parameters(study.stage_settings(*job).relevant(), *makers)
    return result


def _columns(kind: str, keys: Sequence[str]) -> list[str]:
    return [f"{kind}.`{key}`" for key in keys]


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def tags(views: Sequence[View], experiment_id: str) -> dict[str, str]:
    """Tags of the experiment: its views, and a description with a link to each."""
    links = " · ".join(f"[{view.stage}]({page(experiment_id, view.name)})" for view in views)
    return {
        "mlflow.experimentKind": MACHINE_LEARNING,
        "mlflow.note.content": f"The runs of each stage: {links}",
    } | {f"{SHARED}{view.name}": json.dumps(view.state()) for view in views}


def varying(parameters: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """The parameters that differ between experiments, those of the pretraining first.

    parameters: experiment -> its parameters.
    """
    first = ("method", "sampling.", "pretrain.", "views.", "encoder.")
    keys = dict.fromkeys(key for values in parameters.values() for key in values if key not in ("experiment", "seed"))
    differing = [key for key in keys if len({values[key] for values in parameters.values() if key in values}) > 1]
    rank = {key: next((i for i, start in enumerate(first) if key.startswith(start)), len(first)) for key in differing}
    return tuple(sorted((key for key in differing if key != "pretrain.method"), key=rank.__getitem__))
