"""A study's scores over its seeds: means and spreads, cost, the floor, published numbers, and which experiment is best.

Nothing here is drawn or written. Every figure comes from `aps.findings`, so it is the study's own. It imports nothing heavy
and does not know pages, figures or files.

Letters: n test images, k of them right.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from aps import published
from aps.errors import UserError
from aps.files import read_json
from aps.findings import NOT_RUN, Finding
from aps.layout import manifest_of
from aps.settings.study import ExperimentSettings, Study
from aps.stages import STAGES

Run = dict[str, Any]  # the content of a metrics.json

SMALL_TEST = 5000  # test images; of fewer, chance among them moves a score by more than 0.8 points (95 %, at 90 %)
Z = 1.959964  # of the normal distribution: 95 % lie within


class Column(NamedTuple):
    """A headline figure of a stage as this study has it."""

    stage: str
    metric: str
    label: str
    share: bool = False  # whether it is the percentage of test images that are right


class Sample(NamedTuple):
    """One figure over the seeds of one experiment."""

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


class Interval(NamedTuple):
    """Where the score of endless test images would lie, in percent, with 95 % probability."""

    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}"


class Spent(NamedTuple):
    """What one seed of an experiment cost: pretraining and all its evaluations."""

    seconds: Sample
    flops: Sample | None  # None where a stage's operations are unknown


class Verdict(NamedTuple):
    """What may be said of a score: who is best, if anybody is."""

    score: Column
    dataset: str
    best: str | None
    reason: str  # a sentence without its subject: what the score is of


class Table:
    """The study's scores: `cells[experiment][score]` over the seeds that have finished."""

    def __init__(self, study: Study, findings: Iterable[Finding]) -> None:
        self.study = study
        self.findings = {(f.experiment, f.seed, f.stage): f for f in findings}
        self.runs: list[Run] = [f.metrics for f in self.findings.values() if f.metrics is not None]
        self.scores = columns(study)
        self.test_images = cache(self._test_images)
        found: dict[str, dict[Column, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs:
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

    # -- chance -----------------------------------------------------------------------------------

    def interval(self, name: str, score: Column) -> Interval | None:
        """Of the mean score, by the test images alone (Wilson); None where there are many of them, or they don't count.

        Seeds share the test images, so more seeds do not narrow it.
        """
        if not score.share or score not in self.cells[name]:
            return None
        n = self.test_images(name, score.stage)
        if n is None or n >= SMALL_TEST:
            return None
        return Interval(*wilson(self.cells[name][score].mean / 100, n), n)

    def _test_images(self, name: str, stage: str) -> int | None:
        """How many a stage's score is over: by its own figures, else by the dataset's manifest, where that is still it."""
        run = next((r for r in self.runs if (r["experiment"], r["stage"]) == (name, stage)), None)
        if run is None:
            return None
        if isinstance(n := run["metrics"].get("test_images"), int):
            return n
        try:
            manifest = read_json(manifest_of(self.study, run["dataset"]["name"]))
            splits = manifest["splits"]
            own = splits.get("test") or splits["val"]
            return int(own["count"]) if manifest["digest"] == run["dataset"]["digest"] else None
        except (UserError, KeyError, TypeError, ValueError):
            return None

    def verdicts(self) -> list[Verdict]:
        """For each score, and each dataset it is of: which experiment is best beyond the spread, or why none is."""
        found = []
        for score in self.scores:
            groups: dict[str, list[str]] = defaultdict(list)
            for name in self.study.experiments:
                if score in self.cells[name]:
                    groups[self.study.experiments[name].dataset_of(score.stage)].append(name)
            found += [self._verdict(score, dataset, names) for dataset, names in groups.items() if len(names) > 1]
        return found

    def _verdict(self, score: Column, dataset: str, names: Sequence[str]) -> Verdict:
        def of(name: str) -> Sample:
            return self.cells[name][score]

        single = [name for name in names if len(of(name).values) == 1]
        several = sorted((name for name in names if name not in single), key=lambda name: -of(name).mean)
        if len(several) < 2:
            who = "one seed" if not several else f"one seed of all but {several[0]}"
            return Verdict(score, dataset, None, f"{who}, so there is no spread and no best")
        first, *others = several
        beside = f" (not compared, one seed: {', '.join(single)})" if single else ""
        for other in others:
            difference, spread = of(first).mean - of(other).mean, max(of(first).range, of(other).range)
            both = f"{first} {of(first)} and {other} {of(other)} differ by {difference:.1f}"
            if difference <= spread:
                why = f"none is best beyond the spread: {both}, seeds of one of them by {spread:.1f}"
                return Verdict(score, dataset, None, why + beside)
            ours, theirs = self.interval(first, score), self.interval(other, score)
            if ours is not None and theirs is not None and ours.low <= theirs.high:
                why = f"none is best for certain: {both}, but on {ours.images} test images their 95 % intervals overlap"
                return Verdict(score, dataset, None, why + beside)
        second = others[0]
        difference, spread = of(first).mean - of(second).mean, max(of(first).range, of(second).range)
        above = f"{difference:.1f} above {second} ({of(second)})"
        why = f"{first} is best: {of(first)}, {above}, while seeds differ by {spread:.1f} at most"
        return Verdict(score, dataset, first, why + beside)

    # -- cost -------------------------------------------------------------------------------------

    def spent(self, name: str) -> Spent | None:
        """Mean over the seeds of which everything has finished; None where no seed has."""
        experiment = self.study.experiments[name]
        costs = []
        for seed in experiment.seeds:
            runs = [self.findings[name, seed, stage].metrics for stage in experiment.stages]
            source = self.study.pretrain_source(name)
            made = self.findings.get((source, seed, "pretrain")) if source is not None else None
            if all(run is not None for run in runs) and (made is None or made.metrics is not None):
                costs.append(_of_seed([run for run in runs if run is not None], made.metrics if made else None))
        if not costs:
            return None
        flops = [flops for _, flops in costs if flops is not None]
        return Spent(
            Sample(tuple(seconds for seconds, _ in costs)),
            Sample(tuple(flops)) if len(flops) == len(costs) else None,
        )

    # -- beside ours ------------------------------------------------------------------------------

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
                                "column": score,
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
                        "compared": not differences,
                        "remark": "; ".join([*(["not compared: " + ", ".join(differences)] if differences else []),
                                             *filter(None, [entry.note])]),
                        "source": entry.source,
                        "runs": [r["mlflow_run_id"] or f"seed {r['seed']}" for r in made],
                        "made": made,
                    }
                )  # fmt: skip
        return rows


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent trials, in percent (Wilson, 1927): never outside 0 to 100."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def columns(study: Study) -> list[Column]:
    """The scores of every stage that some experiment runs (`aps.stages`)."""
    found = []
    for stage in STAGES.values():
        ran = [e for e in study.experiments.values() if stage.name in e.stages]
        for score in stage.scores if ran else ():
            values = getattr(getattr(ran[0], stage.name), "k", None) or (score.prefer,)
            k = score.prefer if score.prefer in values else values[0]
            found.append(Column(stage.name, score.metric.format(k=k), score.label.format(k=k), score.share))
    return found


def machine(run: Run) -> str:
    hardware = run["hardware"]
    count = hardware["processes"]
    return f"{hardware.get('gpu') or hardware['cpu']}, {count} process{'es' * (count > 1)}"


def _of_seed(runs: Sequence[Run], made: Run | None) -> tuple[float, float | None]:
    """Seconds and operations of one seed: an evaluation's cost has its pretraining's in it, which is counted once."""
    before = _cost(made) if made is not None else (0.0, 0.0)
    seconds, flops = before
    for run in runs:
        if run["stage"] == "pretrain":
            continue  # that is `made`
        own = _cost(run)
        shared = before if run.get("cost") else (0.0, 0.0)
        seconds += own[0] - shared[0]
        flops = None if None in (flops, own[1], shared[1]) else flops + own[1] - shared[1]  # type: ignore[operator]
    return seconds, flops


def _cost(run: Run) -> tuple[float, float | None]:
    """Seconds and operations so far; results of earlier versions have only the seconds of the run itself."""
    cost = run.get("cost") or {}
    return float(cost.get("seconds", run["wall_seconds"]) or 0.0), cost.get("flops")


def _same_evaluation(a: ExperimentSettings, b: ExperimentSettings, stage: str) -> bool:
    """Whether a stage of two experiments differs in the encoder's weights alone."""
    if stage not in a.stages or stage not in b.stages or getattr(a, stage) != getattr(b, stage):
        return False
    if not STAGES[stage].detects and a.dataset_settings(stage) != b.dataset_settings(stage):
        return False
    return a.encoder.model_copy(update={"weights": ""}) == b.encoder.model_copy(update={"weights": ""})
