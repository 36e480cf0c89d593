"""Computes a study's scores: means and spreads over seeds, cost, the floor, published numbers, the best experiment.

Nothing here is drawn or written. Results come from `aps.findings`, so only those that count for the study are used. It
imports nothing heavy and does not know pages, figures or files.

Letters: n test images, k of them right.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from aps import published
from aps.data.manifest import copies_in_train
from aps.errors import UserError
from aps.files import read_json
from aps.findings import NOT_RUN, Finding
from aps.layout import encoder_file, encoder_job, maker_of, manifest_of
from aps.results import upstream_of
from aps.seals import makers_of_run
from aps.settings.study import ExperimentSettings, Study
from aps.stages import STAGES
from aps.text import listed

Run = dict[str, Any]  # the content of a metrics.json

SMALL_TEST = 5000  # test images; with fewer, chance moves a score of 90 % by more than 0.8 points (95 % interval)
MOST_NAMES = 6  # in one sentence
Z = 1.959964  # 95 % of a normal distribution are within Z standard deviations


class Column(NamedTuple):
    """A score of a stage, as a column of this study's table."""

    stage: str
    metric: str
    label: str
    share: bool = False  # whether it is an accuracy over test images


class Sample(NamedTuple):
    """The values of one score over the seeds of one experiment."""

    values: tuple[float, ...]
    one_encoder: bool = False  # whether several seeds started from the same weights

    @property
    def lone(self) -> str:
        """In two words why there is no spread over encoders; empty where there is one."""
        return "one encoder" if self.one_encoder else "one seed" if len(self.values) == 1 else ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def range(self) -> float:
        """Largest minus smallest value."""
        return max(self.values) - min(self.values)

    def __str__(self) -> str:
        spread = f" ± {statistics.stdev(self.values):.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:.1f}{spread}"


class Interval(NamedTuple):
    """The 95 % interval of a score in percent, as it would be with endlessly many test images."""

    low: float
    high: float
    images: int

    def __str__(self) -> str:
        return f"{self.low:.1f} to {self.high:.1f}"


class Spent(NamedTuple):
    """The cost of one seed of an experiment: pretraining and all its evaluations."""

    seconds: Sample
    flops: Sample | None  # None if a stage's operations are unknown


class Verdict(NamedTuple):
    """Which experiment is best by a score, if one is."""

    score: Column
    dataset: str
    best: str | None
    reason: str  # a sentence that does not name score and dataset


class Table:
    """The study's scores: `cells[experiment][score]` is a Sample over the seeds that have finished."""

    def __init__(self, study: Study, findings: Iterable[Finding]) -> None:
        self.study = study
        self.findings = {(f.experiment, f.seed, f.stage): f for f in findings}
        self.runs: list[Run] = [f.metrics for f in self.findings.values() if f.metrics is not None]
        self.scores = columns(study)
        self.test_images = cache(self._test_images)
        self.manifest = cache(self._manifest)
        scored: dict[str, dict[Column, list[Run]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs:
            for score in self.scores:
                if score.stage == run["stage"] and score.metric in run["metrics"]:
                    scored[run["experiment"]][score].append(run)
        self.cells = {
            name: {score: _sample(of_seeds, score.metric) for score, of_seeds in scored[name].items()}
            for name in study.experiments
        }

    def evaluated(self) -> list[str]:
        """Experiments that have a score. Others may only pretrain for them."""
        stages = {score.stage for score in self.scores}
        return [name for name, e in self.study.experiments.items() if stages & set(e.stages)]

    def text(self, name: str, score: Column) -> str:
        """The score, or in two words why there is none."""
        if (sample := self.cells[name].get(score)) is not None:
            remark = self.remark(name, sample)
            return f"{sample}" + (f" ({remark})" if remark else "")
        return self.absent(name, score.stage, score.metric)

    def remark(self, name: str, sample: Sample) -> str:
        """What to know of a mean and its spread: `2 of 3 seeds`, `one encoder`; empty where there is nothing."""
        missing = self.of_planned(name, len(sample.values))
        seeds = f"{missing} seeds" if missing else ""
        return ", ".join(filter(None, [seeds, "one encoder" if sample.one_encoder else ""]))

    def missing(self, name: str, score: Column) -> str:
        """`2 of 3` where fewer seeds have the score than are planned, else empty."""
        have = len(self.cells[name][score].values) if score in self.cells[name] else 0
        return self.of_planned(name, have)

    def of_planned(self, name: str, seeds: int) -> str:
        """`2 of 3` where `seeds` are fewer than are planned of an experiment, else empty."""
        planned = len(self.study.experiments[name].seeds)
        return f"{seeds} of {planned}" if seeds < planned else ""

    def remarks(self, names: Iterable[str], scores: Iterable[Column]) -> str:
        """Sentences for a caption on the experiments of which a score lacks seeds, or has one encoder; empty without one."""
        samples = {name: [self.cells[name][score] for score in scores if score in self.cells[name]] for name in names}
        lacking = [n for n, of in samples.items() if any(self.of_planned(n, len(sample.values)) for sample in of)]
        alike = [n for n, of in samples.items() if any(sample.one_encoder for sample in of)]
        shared = f" One encoder for all seeds of {listed(alike, MOST_NAMES)}: their range is the evaluation's alone."
        return not_all_seeds(lacking) + (shared if alike else "")

    def absent(self, name: str, stage: str, metric: str) -> str:
        """In two words why an experiment has no such score yet; empty where its settings or its finished runs give none."""
        experiment, k = self.study.experiments[name], _k_of(stage, metric)
        if stage not in experiment.stages or (k is not None and k not in getattr(experiment, stage).k):
            return ""
        findings = [f for seed in experiment.seeds if (f := self.findings.get((name, seed, stage))) is not None]
        if any(finding.metrics is not None for finding in findings):
            return ""
        return next((f.problem.partition(":")[0] for f in findings if f.stale and f.problem), NOT_RUN)

    def stale(self) -> list[Finding]:
        """Results that are there but do not count for the study."""
        return [finding for finding in self.findings.values() if finding.stale]

    # -- chance -----------------------------------------------------------------------------------

    def interval(self, name: str, score: Column) -> Interval | None:
        """The interval of the mean score for the number of test images (Wilson); None if they are many or uncounted.

        All seeds have the same test images, so more seeds do not make it narrower.
        """
        if not score.share or score not in self.cells[name]:
            return None
        n = self.test_images(name, score.stage)
        if n is None or n >= SMALL_TEST:
            return None
        return Interval(*wilson(self.cells[name][score].mean / 100, n), n)

    def _test_images(self, name: str, stage: str) -> int | None:
        """The number of test images behind a score: from its metrics, or else from the manifest of the same dataset."""
        run = next((r for r in self.runs if (r["experiment"], r["stage"]) == (name, stage)), None)
        if run is None:
            return None
        if isinstance(n := run["metrics"].get("test_images"), int):
            return n
        manifest = self.manifest(run["dataset"]["name"])
        try:
            splits = manifest["splits"]
            split = splits.get("test") or splits["val"]
            return int(split["count"]) if manifest["digest"] == run["dataset"]["digest"] else None
        except (KeyError, TypeError, ValueError):
            return None

    def copies(self) -> list[str]:
        """A phrase for each dataset of which the images behind a score are in train too, as far as its manifest says."""
        stages, phrases = {score.stage for score in self.scores}, dict[str, None]()
        for run in self.runs:
            if run["stage"] not in stages:
                continue
            dataset = self.study.experiments[run["experiment"]].dataset_of(run["stage"])
            manifest = self.manifest(dataset)
            if manifest.get("digest") != run["dataset"]["digest"]:
                continue
            for split, count in copies_in_train(manifest.get("notes", ())).items():
                total = manifest["splits"][split]["count"]
                be = "images are" if total > 1 else "image is"
                phrases[f"{dataset}: {count:,} of {total:,} {split} {be} in train too, which flatters scores"] = None
        return list(phrases)

    def _manifest(self, dataset: str) -> dict[str, Any]:
        """The manifest of a dataset; empty if it is not prepared or broken."""
        try:
            manifest = read_json(manifest_of(self.study, dataset))
        except UserError:
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def verdicts(self) -> list[Verdict]:
        """For each score and dataset: which experiment is best by more than the spread over seeds, or why none is."""
        verdicts = []
        for score in self.scores:
            groups: dict[str, list[str]] = defaultdict(list)
            for name in self.study.experiments:
                if score in self.cells[name]:
                    groups[self.study.experiments[name].dataset_of(score.stage)].append(name)
            verdicts += [self._verdict(score, dataset, names) for dataset, names in groups.items() if len(names) > 1]
        return verdicts

    def _verdict(self, score: Column, dataset: str, names: Sequence[str]) -> Verdict:
        def sample(name: str) -> Sample:
            return self.cells[name][score]

        single = [name for name in names if sample(name).lone]
        partly = [name for name in names if name not in single and self.missing(name, score)]
        whole = [name for name in names if name not in (*single, *partly)]
        several = sorted(whole, key=lambda name: -sample(name).mean)
        lacking = ", ".join(f"{name} {self.missing(name, score)}" for name in partly)
        if len(several) < 2 and partly:
            return Verdict(score, dataset, None, f"seeds are missing ({lacking}), so none is best yet")
        if len(several) < 2:
            which = " or ".join(sorted({sample(name).lone for name in single}, reverse=True))
            which += f" of all but {several[0]}" if several else ""
            return Verdict(score, dataset, None, f"{which}, so there is no spread and no best")
        first, *others = several
        lone: dict[str, list[str]] = defaultdict(list)
        for name in single:
            lone[sample(name).lone].append(name)
        apart = [f"{words}: {', '.join(of)}" for words, of in lone.items()]
        apart += [f"seeds missing: {lacking}"] if partly else []
        not_compared = f" (not compared, {'; '.join(apart)})" if apart else ""
        close = sample(first).mean - sample(first).range
        rivals = [name for name in (*single, *partly) if max(sample(name).values) >= close]
        if rivals:
            rival = max(rivals, key=lambda name: sample(name).mean)
            seeds = sample(rival).lone or f"{self.missing(rival, score)} seeds"
            reason = f"none is best for certain: {rival} has {sample(rival)} with {seeds}, {first} {sample(first)}"
            todo = {"one seed": f"give {rival} more seeds", "one encoder": f"give each seed of {rival} its own encoder"}
            return Verdict(score, dataset, None, f"{reason}; {todo.get(seeds, f'run the other seeds of {rival}')}")
        for other in others:
            difference, spread = sample(first).mean - sample(other).mean, max(sample(first).range, sample(other).range)
            both = f"{first} {sample(first)} and {other} {sample(other)} differ by {difference:.1f}"
            if difference <= spread:
                reason = f"none is best beyond the spread: {both}, seeds of one of them by {spread:.1f}"
                return Verdict(score, dataset, None, reason + not_compared)
            ours, theirs = self.interval(first, score), self.interval(other, score)
            if ours is not None and theirs is not None and ours.low <= theirs.high:
                reason = (
                    f"none is best for certain: {both}, but on {ours.images} test images their 95 % intervals overlap"
                )
                return Verdict(score, dataset, None, reason + not_compared)
        second = others[0]
        difference, spread = sample(first).mean - sample(second).mean, max(sample(first).range, sample(second).range)
        above = f"{difference:.1f} above {second} ({sample(second)})"
        reason = f"{first} is best: {sample(first)}, {above}, while seeds differ by {spread:.1f} at most"
        return Verdict(score, dataset, first, reason + not_compared)

    # -- cost -------------------------------------------------------------------------------------

    def spent(self, name: str, stage: str | None = None) -> Spent | None:
        """The cost over the seeds of which all stages have finished; None if there is no such seed.

        stage: count only this evaluation, and the pretraining; None: all stages.
        """
        experiment = self.study.experiments[name]
        stages = [own for own in experiment.stages if own == "pretrain" or stage in (None, own)]
        costs = []
        for seed in experiment.seeds:
            runs = [self.findings[name, seed, own].metrics for own in stages if own != "pretrain"]
            finished, makers = [run for run in runs if run is not None], self._makers(name, seed)
            if len(finished) == len(runs) and makers is not None:
                costs.append(_seed_cost(finished, makers))
        if not costs:
            return None
        flops = [flops for _, flops in costs if flops is not None]
        return Spent(
            Sample(tuple(seconds for seconds, _ in costs)),
            Sample(tuple(flops)) if len(flops) == len(costs) else None,
        )

    def _makers(self, name: str, seed: int) -> list[Run] | None:
        """The runs that made the encoder, nearest first, of this study or beside a file from elsewhere; None: one is unfinished."""
        maker, makers = encoder_job(self.study, name, seed), list[Run]()
        while maker is not None:
            finding = self.findings.get(maker)
            if finding is None or finding.metrics is None:
                return None
            makers.append(finding.metrics)
            if not STAGES[maker[2]].encoder:
                return makers
            name, seed, maker = *maker[:2], maker_of(self.study, maker)
        file = encoder_file(self.study, name, seed)
        with contextlib.suppress(UserError, OSError):
            if file is not None and (elsewhere := upstream_of(file)):
                makers += [elsewhere, *makers_of_run(elsewhere, file.parent)]
        return makers

    # -- comparisons -----------------------------------------------------------------------------

    def above_floor(self) -> list[dict[str, Any]]:
        """Each experiment's scores compared with the same evaluation of a random encoder, the floor.

        `times` is the difference divided by the larger of the two ranges over seeds; None if that range is 0. `single`
        are those of the two that have one seed or one encoder, and so no range, with these words.
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
                        single = {n: of.lone for n, of in ((name, ours), (floor, base)) if of.lone}
                        spread = max(0.0 if of.lone else of.range for of in (ours, base))
                        difference = ours.mean - base.mean
                        rows.append(
                            {
                                "experiment": name, "floor": floor, "score": score.label, "ours": ours, "base": base,
                                "difference": difference, "spread": spread, "times": difference / spread if spread else None,
                                "column": score,
                                "single": single,
                            }
                        )  # fmt: skip
        return rows

    def beside_published(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """A row for each published number that an experiment repeats: the number, ours, the difference, the runs."""
        repeats = {name: e for name, e in self.study.experiments.items() if e.published is not None}
        entries = published.load() if repeats else {}
        rows = []
        for name, experiment in repeats.items():
            entry = entries[str(experiment.published)]  # checked with the settings
            source = self.study.pretrain_source(name)
            pretraining = self.study.experiments[source] if source is not None else None
            for key, theirs in entry.metrics.items():
                stage, _, metric = key.partition(".")
                if stage not in experiment.stages:
                    continue
                differences = published.differences(experiment, entry, pretraining, stage)
                repeated = [
                    r for r in runs if (r["experiment"], r["stage"]) == (name, stage) and metric in r["metrics"]
                ]
                ours = _sample(repeated, metric) if repeated else None
                compared = ours is not None and not differences
                rows.append(
                    {
                        "experiment": name, "method": entry.method, "metric": key, "published": theirs, "ours": ours,
                        "of_ours": self.remark(name, ours) if ours is not None else "",
                        "absent": self.absent(name, stage, metric) or "not measured",
                        "difference": ours.mean - theirs if ours is not None and compared else None,
                        "compared": not differences,
                        "remark": "; ".join([*(["not compared: " + ", ".join(differences)] if differences else []),
                                             *filter(None, [entry.note])]),
                        "source": entry.source,
                        "runs": [r["mlflow_run_id"] or f"seed {r['seed']}" for r in repeated],
                        "made": repeated,
                    }
                )  # fmt: skip
        return rows


def _sample(runs: Sequence[Run], metric: str) -> Sample:
    """A score of the runs of several seeds. Random weights, which have no file, are another encoder for each seed."""
    encoders = set()
    for run in runs:
        file = (run.get("encoder") or {}).get("sha256")
        weights = run["settings"].get("encoder", {}).get("weights", "")
        encoders.add(file or (weights if weights.startswith("timm:") else run["seed"]))
    return Sample(tuple(run["metrics"][metric] for run in runs), one_encoder=len(encoders) < 2 <= len(runs))


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval, in percent and within 0 to 100, of a share in [0, 1] of n independent trials (Wilson, 1927)."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def columns(study: Study) -> list[Column]:
    """The scores of every stage that an experiment of the study runs, so many that every run has one of them."""
    scores = []
    for stage in STAGES.values():
        ran = [e for e in study.experiments.values() if stage.name in e.stages]
        for score in stage.scores if ran else ():
            k_lists = [getattr(e, stage.name).k for e in ran] if "{k}" in score.metric else [(None,)]
            for k in _covering(k_lists, score.prefer):
                scores.append(Column(stage.name, score.metric.format(k=k), score.label.format(k=k), score.share))
    return scores


def not_all_seeds(names: Sequence[str]) -> str:
    """A sentence for a caption on the experiments of which seeds are missing; empty without one."""
    return f" Not all seeds have finished of {listed(names, MOST_NAMES)}." if names else ""


def _covering(lists: Sequence[Sequence[Any]], prefer: Any) -> list[Any]:
    """Values of which every list has one: a single one that all share, if there is one; `prefer` first, where a list has it."""
    values = list(dict.fromkeys(value for of in lists for value in of))
    values.sort(key=lambda value: value != prefer)
    if shared := [value for value in values if all(value in of for of in lists)]:
        return shared[:1]
    chosen = [prefer] if prefer in values else []
    while left := [of for of in lists if not set(of) & set(chosen)]:
        chosen.append(max(values, key=lambda value: sum(value in of for of in left)))
    return chosen


def _k_of(stage: str, metric: str) -> int | None:
    """The k in a metric's name, where its stage counts scores for a list `k`."""
    for score in STAGES[stage].scores:
        before, listed, after = score.metric.partition("{k}")
        number = metric.removeprefix(before).removesuffix(after)
        if listed and number.isdecimal() and metric == f"{before}{number}{after}":
            return int(number)
    return None


def machine(run: Run) -> str:
    hardware = run["hardware"]
    count = hardware["processes"]
    return f"{hardware.get('gpu') or hardware['cpu']}, {count} process{'es' * (count > 1)}"


def _seed_cost(evaluations: Sequence[Run], makers: Sequence[Run]) -> tuple[float, float | None]:
    """Seconds and operations of one seed; operations are None where they are unknown.

    Seconds are each run's own, because a pretraining that was run again may have taken longer than the one that an
    evaluation's cost includes; kNN readings are no part of them. Operations follow from settings, so those of the run that
    made the encoder, which include those before it, are taken off again.
    """
    runs = [*evaluations, *makers]
    seconds = sum(float(run["wall_seconds"] or 0.0) - run["metrics"].get("reading_seconds", 0.0) for run in runs)
    included = _flops(makers[0]) if makers else 0.0
    total = included
    for run in evaluations:
        flops = _flops(run)
        # Without the run that made the encoder, whose operations this run's include, they can't be told apart.
        lost = not makers and (run.get("encoder") or {}).get("settings_digest") is not None
        if total is None or included is None or flops is None or lost:
            return seconds, None
        total += flops - included
    return seconds, total


def _flops(run: Run) -> float | None:
    """Operations, with the pretraining's; None in results of earlier versions."""
    return (run.get("cost") or {}).get("flops")


def _same_evaluation(a: ExperimentSettings, b: ExperimentSettings, stage: str) -> bool:
    """Whether a stage of two experiments differs only in the encoder's weights."""
    if stage not in a.stages or stage not in b.stages or getattr(a, stage) != getattr(b, stage):
        return False
    if not STAGES[stage].detects and a.dataset_settings(stage) != b.dataset_settings(stage):
        return False
    return a.encoder.model_copy(update={"weights": ""}) == b.encoder.model_copy(update={"weights": ""})
