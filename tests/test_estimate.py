"""What the estimate says: totals of known recipes, how they follow from settings, and the command as a user runs it."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aps import estimate as module
from aps.cost import Cost, Counts
from aps.errors import UserError
from aps.estimate import DATASETS, Gpu, estimate, stage_cost, stage_flops
from aps.methods import Method
from aps.registry import DATASETS as CLASSIFICATION
from aps.registry import DETECTION_DATASETS, METHODS
from aps.settings.blocks import PretrainSettings
from aps.settings.reading import load_study
from aps.settings.study import ExperimentSettings, experiment_model, method_of
from aps.training.cost import step_flops
from aps.views import View


def experiment(encoder: dict[str, Any], **blocks: Any) -> ExperimentSettings:
    return experiment_model(method_of(blocks)).model_validate({"dataset": "cifar10", "encoder": encoder, **blocks})


MICRO = {"arch": "micro", "image_size": 32, "patch_size": 4}

# PFLOP of a run as formulas of each network had them, which agreed with counted steps within 2%.
PUBLISHED = {
    ("config/cifar.yaml", "cifar10-tiny-1600", "pretrain"): 1406,
    ("config/cifar.yaml", "cifar10-tiny-1600", "finetune"): 51.7,
    ("config/cifar.yaml", "cifar10-tiny-1600", "linear_probe"): 15.1,
    ("config/cifar.yaml", "cifar10-tiny-1600", "knn"): 0.2,
    ("config/cifar.yaml", "cifar10-base-3200", "pretrain"): 42_819,
    ("config/imagenet.yaml", "imagenet-small-300", "pretrain"): 20_277,
    ("config/imagenet.yaml", "imagenet-base-300", "linear_probe"): 4014,
    ("config/coco.yaml", "coco-small-100ep", "detection"): 32_207,
}


@pytest.mark.parametrize(("file", "name", "stage"), PUBLISHED)
def test_totals_of_the_published_recipes_are_those_of_the_formulas(file: str, name: str, stage: str) -> None:
    e = load_study([file]).experiment(name)
    counts = DATASETS[e.detection.dataset if stage == "detection" else e.dataset.name]
    assert stage_flops(e, stage, counts) / 1e15 == pytest.approx(PUBLISHED[file, name, stage], rel=0.02)


def test_the_step_is_cheaper_by_about_the_sampling_ratio() -> None:
    dense = experiment({"arch": "base"}, sampling={"strategy": "full"})
    sparse = experiment({"arch": "base"}, sampling={"ratio": 0.25})
    assert 3.5 < step_flops(dense) / step_flops(sparse) < 4.5


def test_a_step_is_counted_for_the_whole_batch_however_it_is_cut() -> None:
    whole, cut = (experiment(MICRO, pretrain={"batch_size": 512, "accumulate": parts}) for parts in (1, 4))
    logits = 2 * 2 * 2 * 512 * 512 * 128  # two directions, forward and the gradient of the queries
    assert step_flops(whole) - step_flops(cut) == pytest.approx(3 / 4 * logits)


def test_settings_that_change_no_network_are_counted_once() -> None:
    from aps.training.cost import _count_pretraining

    first = step_flops(experiment(MICRO))
    misses = _count_pretraining.cache_info().misses
    other = experiment(MICRO, pretrain={"epochs": 7, "lr": 0.1, "warmup_epochs": 1, "knn_every": 2})
    assert step_flops(other) == first and _count_pretraining.cache_info().misses == misses
    assert step_flops(experiment({**MICRO, "depth": 3})) < 0.8 * first


class Siamese(Method):
    """Three views, a momentum copy of the encoder, two kinds of step: what a new method's file could hold."""

    class Settings(PretrainSettings):
        width: int = 7

    calls = 0

    @property
    def steps(self) -> int:
        return 3

    def views(self) -> list[View]:
        augmentation = self.experiment.views
        return [View(32, augmentation), View(32, augmentation), View(16, augmentation)]

    def networks(self, encoder: Any) -> nn.ModuleDict:
        teacher = copy.deepcopy(encoder).requires_grad_(False)
        return nn.ModuleDict({"encoder": encoder, "teacher": teacher, "head": nn.Linear(96, self.settings.width)})

    def sample(self, geometries: Any, noise: Any) -> list[tuple[Tensor, ...]]:
        return [(noise(n).argsort(1),) for n in (8, 8, 64)]

    def forward(self, networks: Any, views: Any, sampled: Any) -> Any:
        type(self).calls += 1
        with torch.no_grad():
            target = networks["head"](networks["teacher"](views[1]))
        return {"own": networks["head"](networks["encoder"](views[0], sampled[0])), "target": target}

    def loss(self, outputs: Any, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        return (outputs["own"] - outputs["target"]).square().mean(), {}


@pytest.fixture
def siamese(monkeypatch: pytest.MonkeyPatch) -> type[Siamese]:
    monkeypatch.setitem(METHODS._rows, "siamese", f"{__name__}:Siamese")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Siamese.__module__])
    return Siamese


def test_a_method_of_another_file_is_counted_without_an_edit(siamese: type[Siamese]) -> None:
    def pretraining(**settings: Any) -> ExperimentSettings:
        return experiment(MICRO, pretrain={"method": "siamese", "batch_size": 64, **settings})

    def seen(cells: int) -> float:  # of the student: aps reads two views with so many cells
        heads = {"projector": (1, 1, 2), "predictor": (1, 1, 2)}
        sampling = {"ratio": cells / 64, "samplings": 1}
        return step_flops(experiment(MICRO, sampling=sampling, pretrain={"batch_size": 64, **heads})) / 2

    teacher = 64 * stage_flops(experiment(MICRO), "linear_probe", Counts(0, 1, 10, 0))
    flops = step_flops(pretraining())
    assert flops == pytest.approx(teacher + (2 * seen(8) + seen(64)) / 3, rel=0.01)
    assert siamese.calls == 2  # one for each kind of step
    assert step_flops(pretraining(epochs=3)) == flops and siamese.calls == 2
    assert step_flops(pretraining(width=700)) > flops
    run = stage_flops(pretraining(epochs=2), "pretrain", Counts(6400, 0, 0, 0))
    assert run == pytest.approx(2 * 100 * 3 * flops)


def test_a_method_that_can_not_be_counted_is_named_under_the_table(
    siamese: type[Siamese], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        siamese, "loss", lambda self, outputs, progress: (outputs["own"][0].sum(), outputs["own"][0, 0].item())
    )
    (tmp_path / "study.yaml").write_text(
        "experiments: {mine: {dataset: cifar10, encoder: {arch: micro, patch_size: 4}, pretrain: {method: siamese}}}"
    )
    text = estimate(load_study([tmp_path / "study.yaml"]))
    assert "not in this table: mine pretrain: operations can't be counted" in text
    assert re.search(r"^mine +finetune", text, re.MULTILINE)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_is_counted(name: str) -> None:
    assert step_flops(experiment(MICRO, pretrain={"method": name, "batch_size": 16})) > 1e9


def test_the_settings_of_a_run_count_as_its_experiment(study_file: Path) -> None:
    study = load_study([study_file])
    run, counts = study.stage_settings("tiny", 0, "finetune"), DATASETS["cifar10"]
    assert stage_flops(run, "finetune", counts) == stage_flops(study.experiments["tiny"], "finetune", counts)
    assert step_flops(study.stage_settings("huge", 0, "pretrain")) == step_flops(study.experiments["huge"])


def test_a_pretraining_run_is_its_steps() -> None:
    e = experiment(MICRO)  # 1600 epochs, B = 512, T = 4, the last batch dropped
    steps = 1600 * (50_000 // 512) * 4
    assert stage_flops(e, "pretrain", DATASETS["cifar10"]) == pytest.approx(steps * step_flops(e))
    limited = experiment(MICRO, dataset={"name": "cifar10", "train_limit": 5120})
    assert stage_flops(limited, "pretrain", DATASETS["cifar10"]) == pytest.approx(1600 * 10 * 4 * step_flops(e))


def test_evaluations_follow_their_epochs_and_splits() -> None:
    def flops(stage: str, train: int, test: int, **settings: Any) -> float:
        return stage_flops(experiment(MICRO, **{stage: settings}), stage, Counts(train, test, 10, 0))

    seen = flops("finetune", 0, 1000, ema=0.0) / 1000
    trained = flops("finetune", 1000, 0, epochs=1) / 1000
    assert 2.9 < trained / seen < 3.1
    expected = 7 * (45_000 * trained + 5_000 * seen) + 3 * 10_000 * seen  # last epoch, its average, the best one
    assert flops("finetune", 50_000, 10_000, epochs=7, holdout=0.1) == pytest.approx(expected)
    encoder = flops("linear_probe", 0, 1000) / 1000
    assert encoder == pytest.approx(seen, rel=0.001)
    heads = 6 * 2 * 2 * 96 * 10  # six rates, forward and the weights' gradient
    expected = 100 * 45_000 * (encoder + heads) + 15_000 * encoder
    assert flops("linear_probe", 50_000, 10_000) == pytest.approx(expected)
    assert flops("knn", 500, 100) == pytest.approx(600 * encoder + 2 * 500 * 100 * 96)


def test_monitoring_costs_its_features() -> None:
    counts = DATASETS["cifar10"]
    never, often = (
        stage_cost(experiment(MICRO, pretrain={"knn_every": every}), "pretrain", counts) for every in (0, 16)
    )
    seen = stage_flops(experiment(MICRO), "linear_probe", Counts(0, 1, 10, 0))
    assert never.readings == 0 and often.readings == pytest.approx(100 * 10_000 * seen)
    shares = stage_cost(experiment(MICRO, pretrain={"knn_readings": 7}), "pretrain", counts)
    assert shares.readings == pytest.approx(7 * 10_000 * seen) and shares.flops == never.flops
    assert often.flops == never.flops, "methods that are compared at equal operations are read equally often, or not"


def test_gpus_share_activations_but_not_weights() -> None:
    e, counts = experiment({"arch": "small"}), DATASETS["cifar10"]
    one, four = (stage_cost(e, "pretrain", counts, gpus).memory for gpus in (1, 4))
    assert one / 4 < four < one
    weights = 4 * 21e6
    assert four > 4 * weights  # weights, two moments, gradients
    assert stage_flops(e, "pretrain", counts) == stage_cost(e, "pretrain", counts, 4).flops


def test_memory_follows_precision_checkpointing_and_parts() -> None:
    def memory(gpu: bool = True, **pretrain: Any) -> float:
        return stage_cost(experiment(MICRO, pretrain=pretrain), "pretrain", DATASETS["cifar10"], 1, gpu).memory

    usual = memory()
    assert memory(precision="bf16", gpu=False) == usual
    assert usual < 0.8 * memory(gpu=False) and memory(gpu=False) == memory(precision="fp32")
    assert memory(activation_checkpointing=True) < 0.6 * usual
    assert memory(accumulate=4) < 0.5 * usual


def test_every_dataset_but_the_users_own_has_its_size() -> None:
    assert set(DATASETS) == {*CLASSIFICATION.names(), *DETECTION_DATASETS.names()} - {"folder"}


def test_sizes_stated_are_those_of_the_recipes() -> None:
    from aps.data.composites import RECIPES
    from aps.data.digits import TEST_IMAGES, scans

    assert DATASETS["digits"][:2] == (len(scans()[1]) - TEST_IMAGES, TEST_IMAGES)
    for name, recipe in RECIPES.items():
        assert DATASETS[name][:2] == (recipe.train, recipe.val)


STUDY = """
study: two
results: {results}
defaults: {{dataset: cifar10}}
resources: {{pretrain: {{gpus: 4}}}}
experiments:
  tiny: {{encoder: {{depth: 2}}, seeds: [0, 1, 2]}}
  huge: {{encoder: {{arch: micro, image_size: 512, patch_size: 4}}, sampling: {{strategy: full}}, stages: [pretrain]}}
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    (tmp_path / "study.yaml").write_text(STUDY.format(results=tmp_path / "results"))
    return tmp_path / "study.yaml"


def test_the_table_has_a_row_for_each_stage_and_adds_up(study_file: Path) -> None:
    study = load_study([study_file])
    text = estimate(study, "h100", share=0.5)
    rows = [line.split() for line in text.splitlines() if line.startswith(("tiny ", "huge "))]
    assert [(row[0], row[1]) for row in rows] == [
        ("tiny", "pretrain"), ("tiny", "finetune"), ("tiny", "linear_probe"), ("tiny", "knn"), ("huge", "pretrain")
    ]  # fmt: skip
    assert [row[2] for row in rows] == ["3"] * 4 + ["1"] and [row[5] for row in rows] == ["4", "1", "1", "1", "4"]
    flops = stage_flops(study.experiments["tiny"], "pretrain", DATASETS["cifar10"])
    numbers = [[float(x.replace(",", "")) for x in row[2:]] for row in rows]
    assert numbers[0][1] == pytest.approx(flops / 1e15, rel=0.01)
    assert numbers[0][2] == pytest.approx(flops / (0.5 * 989e12) / 3600, rel=0.01)
    total = float(re.search(r"all runs: ([\d.,e+]+) GPU hours", text)[1].replace(",", ""))
    assert total == pytest.approx(sum(row[0] * row[2] for row in numbers), rel=0.02)
    assert "more than a H100 SXM has: huge pretrain" in text


def test_hours_of_an_h100_are_those_that_were_measured_and_compiling_shortens_them(study_file: Path) -> None:
    def hours(**pretrain: Any) -> float:
        text = estimate(load_study([study_file], {"defaults": {"pretrain": pretrain}}), "h100")
        assert "of which 7% (width to 192), 16% (to 384), 28% (wider) was reached on an H100" in text
        return float(next(line.split()[4] for line in text.splitlines() if line.startswith("tiny  ")))

    flops = stage_flops(load_study([study_file]).experiments["tiny"], "pretrain", DATASETS["cifar10"])
    assert hours() == pytest.approx(flops / (0.07 * 989e12) / 3600, rel=0.01)
    assert hours() / hours(compile=True) == pytest.approx(1.6, rel=0.02)
    assert "assumed" in estimate(load_study([study_file]), "a100")


def test_a_prepared_dataset_is_counted_by_its_manifest(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aps.data.manifest import Manifest, Split, Statistics

    study = load_study(
        [study_file],
        {"experiments": {"own": {"dataset": "folder", "stages": ["knn"], "encoder": {"weights": "random"}}}},
    )
    with pytest.raises(
        UserError, match="size of dataset 'folder' is known once it is prepared; run `python -m aps data folder`"
    ):
        estimate(study)
    Manifest(
        name="folder", kind="classification", classes=("a", "b"), image_size=None,
        splits={"train": Split(count=1000), "test": Split(count=100)},
        statistics=Statistics(measured=None), digest="0", digest_of="", origin="",
    ).write(Path(study.results) / "data" / "folder" / "manifest.json")  # fmt: skip
    row = next(line.split() for line in estimate(study).splitlines() if line.startswith("own "))
    flops = stage_flops(study.experiments["own"], "knn", Counts(1000, 100, 2, 0))
    assert float(row[3]) == pytest.approx(flops / 1e15, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"gpu": "a1000"}, "--gpu a1000 is unknown; known: v100.*, cpu"), ({"share": 1.5}, r"not in \(0, 1\]")],
)
def test_bad_arguments_are_one_sentence(study_file: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate(load_study([study_file]), **arguments)


def test_hours_on_a_cpu_are_of_one_core_and_say_what_they_assume(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "this_cpu", lambda: Gpu("Some Processor, one core", 0.05, 16))
    text = estimate(load_study([study_file]), "cpu")
    assert "Some Processor, one core: 50 GFLOP/s in a float32 matrix product, measured now, of which 55%" in text
    rows = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("tiny ")}
    pflop, hours, processes = (float(x.replace(",", "")) for x in rows["pretrain"][3:6])
    assert hours == pytest.approx(pflop * 1e15 / (0.55 * 0.05e12) / 3600, rel=0.01)
    assert processes == 1  # its four GPUs are none here
    assert "core hours" in text and "more than this machine has: huge pretrain" in text


def test_a_core_is_measured_in_plausible_operations_a_second() -> None:
    threads = torch.get_num_threads()
    cpu = module.this_cpu()
    assert 1e-4 < cpu.tflops < 10 and cpu.gigabytes > 0.1 and cpu.name.endswith(", one core")
    assert torch.get_num_threads() == threads


def test_runs_in_float32_are_named_where_the_peak_is_that_of_16_bits(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "stage_cost", lambda *_: Cost(1e15, 1e9, 1e6))
    study = load_study([study_file], {"defaults": {"finetune": {"precision": "fp32"}}})
    assert "because precision is fp32 and the peak is that of 16 bits: tiny finetune" in estimate(study)
    assert "precision is fp32" not in estimate(load_study([study_file]))


def test_the_command_needs_no_data(study_file: Path) -> None:
    command = [sys.executable, "-m", "aps", "estimate", "--configfile", str(study_file), "--gpu", "a100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "study 'two' on A100 SXM 80 GB" in done.stdout and "tiny" in done.stdout
