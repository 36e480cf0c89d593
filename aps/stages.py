"""The table of stages: one row each. Nothing else in the project lists them.

Command line, rules, settings, results, report and estimate read this table. A new evaluation is a module
with `run(job)`, a row here and a rule in workflow/rules (docs/extending.md shows one in ten lines).

It imports no torch and does not know how a stage works: its module is imported when the stage runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from aps.registry import file_of, resolve, shown_file


class Score(NamedTuple):
    """A score of a stage, a column of the tables. In percent; higher is better.

    `{k}` in `metric` and `label` stands for a value of the stage's list setting `k`: one that all experiments have,
    `prefer` before others; where they share none, there are as many columns as it takes.
    """

    metric: str
    label: str
    prefer: int | None = None
    share: bool = False  # whether it is an accuracy over test images, so that an interval can be given
    optional: bool = False  # whether some runs have none

    def keys(self, block: Any) -> list[str]:
        """Its keys in metrics.json for a stage's block of settings; that of the preferred k comes first."""
        if "{k}" not in self.metric:
            return [self.metric]
        return [self.metric.format(k=k) for k in sorted(block.k, key=lambda k: k != self.prefer)]


class Curve(NamedTuple):
    """A key of history.jsonl that the report draws over the steps."""

    key: str
    label: str


class Picture(NamedTuple):
    """A PNG file that a finished run draws among its outputs; MLflow shows it too."""

    file: str
    function: str  # dotted path of a function of the job, the content of metrics.json and the file to write


@dataclass(frozen=True)
class Stage:
    """What the rest of the project knows of a stage."""

    name: str  # the verb, the target, the folder of its results, its block of settings
    module: str  # has `run(job: StageJob) -> None`
    help: str
    settings: str  # the class of its block of settings: a dotted path to a subclass of Section
    uses: tuple[str, ...]  # the shared blocks that its result depends on
    outputs: tuple[str, ...]  # files beside history.jsonl and metrics.json
    scores: tuple[Score, ...] = ()
    curves: tuple[Curve, ...] = ()
    encoder: bool = True  # whether it starts from an encoder
    labels: bool = True  # whether it needs the labels of its images
    detects: bool = False  # whether its images come from `detection.dataset` and not from `dataset`
    small: bool = False  # whether it takes only minutes: on a cluster, the small stages of an encoder share one job
    traced: bool = False  # whether --profile can record its batches
    picture: Picture | None = None  # drawn when a run is finished
    check: str | None = None  # a function of the experiment that raises ValueError if the stage can't work
    cost: str | None = None  # a function that counts what a run costs (aps/cost.py); None: not estimated

    @property
    def files(self) -> tuple[str, ...]:
        """Every file it writes. metrics.json comes last: where it exists, all are complete."""
        return (*self.outputs, "history.jsonl", "metrics.json")

    @property
    def rule(self) -> str:
        """The name of the Snakemake rule that runs it."""
        return f"{self.name}_encoder"

    def block(self) -> Any:
        """The class of its block of settings."""
        return resolve(self.settings, self.described)

    @property
    def described(self) -> str:
        """For sentences about a mistake in it: `stage 'x' (FILE)`."""
        return f"stage '{self.name}' ({shown_file(file_of(self.module))})"


ROWS = (
    Stage(
        name="pretrain",
        module="aps.training.pretrain",
        help="pretrain an encoder without labels, by asymmetric patch sampling or another method",
        settings="aps.settings.blocks:PretrainSettings",
        uses=("dataset", "encoder", "views"),  # and the blocks that the method names
        outputs=("encoder.safetensors", "heads.safetensors"),
        curves=(
            Curve("loss", "pretraining loss"),
            Curve("positive_cosine", "cosine of positive pairs"),
            Curve("knn_train_top1", "kNN on held-out train images, %"),
        ),
        encoder=False,
        labels=False,
        traced=True,
        picture=Picture("views.png", "aps.report.run_pictures:views"),
        cost="aps.training.cost:pretrain",
    ),
    Stage(
        name="finetune",
        module="aps.training.finetune",
        help="finetune an encoder on the labels of its dataset",
        settings="aps.settings.blocks:FinetuneSettings",
        uses=("dataset", "encoder"),
        outputs=("model.safetensors",),
        scores=(Score("test_top1", "finetuned top-1", share=True),),
        curves=(Curve("loss", "finetuning loss"),),
        traced=True,
        picture=Picture("confusion.png", "aps.report.run_pictures:confusion"),
        check="aps.training.schedule:check_finetuning",
        cost="aps.training.cost:finetune",
    ),
    Stage(
        name="linear_probe",
        module="aps.training.linear_probe",
        help="train linear classifiers on a frozen encoder",
        settings="aps.settings.blocks:LinearProbeSettings",
        uses=("dataset", "encoder"),
        outputs=("heads.safetensors",),
        scores=(Score("test_top1", "linear probe top-1", share=True),),
        traced=True,
        small=True,
        cost="aps.training.cost:linear_probe",
    ),
    Stage(
        name="knn",
        module="aps.training.knn",
        help="classify by the nearest neighbours of a frozen encoder's features",
        settings="aps.settings.blocks:KnnSettings",
        uses=("dataset", "encoder"),
        outputs=(),
        scores=(Score("knn_top1_k{k}", "kNN top-1, k = {k}", prefer=20, share=True),),
        small=True,
        picture=Picture("neighbours.png", "aps.report.run_pictures:neighbours"),
        cost="aps.training.cost:knn",
    ),
    Stage(
        name="embed",
        module="aps.inference.stage",
        help="write the features of images, of a study's test split or of any (WEIGHTS IMAGES)",
        settings="aps.settings.blocks:EmbedSettings",
        uses=("dataset", "encoder"),
        outputs=("features.parquet", "neighbours.html", "map.png"),
        small=True,
        cost="aps.training.cost:embed",
    ),
    Stage(
        name="detection",
        module="aps.detection.stage",
        help="train and score Mask R-CNN on an encoder (COCO transfer)",
        settings="aps.settings.blocks:DetectionSettings",
        uses=("encoder",),
        outputs=("model.safetensors", "predictions.json", "predictions.png"),
        scores=(Score("box_AP", "box AP"), Score("mask_AP", "mask AP", optional=True)),
        curves=(Curve("loss", "detection loss"),),
        detects=True,
        check="aps.detection.geometry:check",
        cost="aps.detection.cost:detection",
    ),
)
STAGES = {row.name: row for row in ROWS}  # in the order of the DAG
