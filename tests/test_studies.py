"""The study files in config/: they load, they say what they owe their reader, and they change what they claim to."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aps import published
from aps.errors import UserError
from aps.settings.reading import load_study
from aps.settings.study import ExperimentSettings, Study
from aps.training.schedule import oddities

CONFIG = Path(__file__).parents[1] / "config"
STUDIES = sorted(path.name for path in CONFIG.glob("*.yaml") if path.name != "published.yaml")
ENTRIES = published.load(CONFIG / "published.yaml")


def study(name: str):  # type: ignore[no-untyped-def]
    return load_study([CONFIG / name])


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_loads_and_every_stage_of_it_resolves(name: str) -> None:
    loaded = study(name)
    jobs = loaded.jobs()
    assert jobs
    for job in jobs:
        assert len(loaded.stage_settings(*job).digest) == 16


@pytest.mark.parametrize("name", STUDIES)
def test_no_studys_learning_rate_has_an_odd_course(name: str) -> None:
    for key, experiment in study(name).experiments.items():
        for stage in {"pretrain", "finetune"} & set(experiment.stages):
            assert not list(oddities(stage, getattr(experiment, stage))), key


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "config.yaml"])
def test_every_study_opens_with_its_source_cost_expectation_and_command(name: str) -> None:
    opening = "".join(line for line in (CONFIG / name).read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Source", "Cost", "Expected", "Command"):
        assert re.search(rf"^# {word}\b", opening, re.MULTILINE), f"{name} does not say its {word}"
    assert "snakemake" in opening


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_planned_without_importing_torch(name: str) -> None:
    code = (
        "import sys; from aps.settings.reading import load_study; from aps import published; "
        f"load_study([{str(CONFIG / name)!r}]).jobs(); published.load; "
        "sys.exit(', '.join({'torch', 'timm', 'mlflow', 'torchvision'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_paper_is_the_sum_of_its_studies() -> None:
    paper = study("paper.yaml")
    parts = [study(name) for name in ("cifar.yaml", "imagenet.yaml", "coco.yaml")]
    expected: dict[str, ExperimentSettings] = {}
    for part in parts:
        expected |= part.experiments
    assert set(paper.experiments) == set(expected)
    for part in parts:
        for name, _, stage in part.jobs():
            assert part.experiments[name] == paper.experiments[name], name
            asked, joined = part.stage_resources(stage, name), paper.stage_resources(stage, name)
            assert (asked.gpus, asked.nodes) == (joined.gpus, joined.nodes), (name, stage)
    assert {"cifar10", "cifar100", "imagenet1k", "coco2017"} <= set(paper.dataset_names())


def test_every_published_number_of_aps_is_repeated_by_one_experiment() -> None:
    paper = study("paper.yaml")
    named = [(e, e.published) for e in paper.experiments.values() if e.published is not None]
    keys = [key for e, key in named if not published.differences(e, ENTRIES[key])]
    assert len(keys) == len(set(keys))
    assert {key for key, entry in ENTRIES.items() if entry.method == "APS"} <= set(keys)


@pytest.mark.parametrize("name", STUDIES)
def test_an_experiment_that_names_a_published_result_is_what_was_published(name: str) -> None:
    for key, experiment in study(name).experiments.items():
        if experiment.published is not None:
            assert experiment.published in ENTRIES, key
            assert published.differences(experiment, ENTRIES[experiment.published]) == [], key


# --------------------------------------------------------------------------------------------------


def changed(experiment: ExperimentSettings, base: ExperimentSettings) -> set[str]:
    """Keys in which two experiments differ, as section.key."""
    keys = set()
    ours, theirs = experiment.model_dump(), base.model_dump()
    for section in ("dataset", "encoder", "views", "sampling", "pretrain", "finetune", "linear_probe", "knn"):
        keys |= {f"{section}.{key}" for key, value in ours[section].items() if value != theirs[section][key]}
    return keys


def steps_per_batch(experiment: ExperimentSettings) -> tuple[int, int, int]:
    """(epochs x T, warmup epochs x T, batch): equal where the optimizer takes equal steps at equal learning rates."""
    p, samplings = experiment.pretrain, experiment.sampling.samplings
    return p.epochs * samplings, p.warmup_epochs * samplings, p.batch_size


ABLATION = study("ablation.yaml").experiments


@pytest.mark.parametrize("name", [name for name in ABLATION if name != "base"])
def test_an_ablation_changes_one_thing(name: str) -> None:
    experiment = ABLATION[name]
    schedule = {"pretrain.epochs", "pretrain.warmup_epochs"}  # follows T
    changed_keys = changed(experiment, ABLATION[experiment.inherits]) - schedule  # type: ignore[index]
    assert len(changed_keys) == 1, changed_keys
    assert len(experiment.seeds) == 3


@pytest.mark.parametrize("name", [name for name, e in ABLATION.items() if "pretrain" in e.stages])
def test_ablations_take_equal_optimizer_steps(name: str) -> None:
    assert steps_per_batch(ABLATION[name]) == steps_per_batch(ABLATION["base"])
    assert steps_per_batch(ABLATION[name])[0] * (50_000 // 512) == 77_600  # what the file says


def test_the_ablation_covers_what_the_sampler_has() -> None:
    seen = set()
    for name, experiment in ABLATION.items():
        if name != "base":
            seen |= changed(experiment, ABLATION["base"])
    assert {f"sampling.{key}" for key in ("strategy", "ratio", "samplings", "gamma", "flip_aware")} <= seen
    assert {"views.crop_scale", "encoder.weights"} <= seen
    assert {e.sampling.strategy for e in ABLATION.values()} == {"asymmetric", "random", "full"}


def test_fashion_mnist_compares_four_encoders_at_equal_steps() -> None:
    experiments = study("fashion_mnist.yaml").experiments
    assert set(experiments) == {"aps", "random", "full", "random-weights"}
    trained = [e for e in experiments.values() if "pretrain" in e.stages]
    assert len(trained) == 3 and len({steps_per_batch(e) for e in trained}) == 1
    assert {e.sampling.strategy for e in trained} == {"asymmetric", "random", "full"}
    assert experiments["random-weights"].encoder.weights == "random"
    for experiment in experiments.values():
        assert len(experiment.seeds) == 3 and {"linear_probe", "knn"} <= set(experiment.stages)
        assert experiment.dataset.train_limit == 10_000 and experiment.encoder.arch == "micro"
        assert experiment.linear_probe == experiments["aps"].linear_probe and experiment.knn == experiments["aps"].knn


def test_cifar_on_two_cores_compares_at_equal_steps_and_detects_in_windows_of_the_pretraining_grid() -> None:
    experiments = study("cifar_cpu.yaml").experiments
    trained = [e for e in experiments.values() if "pretrain" in e.stages]
    assert {e.sampling.strategy for e in trained} == {"asymmetric", "random"}
    assert len({steps_per_batch(e) for e in trained}) == 1
    assert steps_per_batch(trained[0])[0] * (50_000 // 128) == 9_360  # what the file says
    detecting = {name: e for name, e in experiments.items() if "detection" in e.stages}
    assert {e.encoder.weights for e in detecting.values()} == {"experiment:aps", "random"}
    assert len({e.detection for e in detecting.values()}) == 1
    for experiment in detecting.values():
        assert experiment.detection.positions == "repeat" and experiment.detection.window == experiment.encoder.grid


def test_imagenet_stages_fit_their_batches_and_patches() -> None:
    for experiment in study("imagenet.yaml").experiments.values():
        cells = experiment.encoder.grid**2
        assert cells == 196 and experiment.sampling.samplings * int(cells * experiment.sampling.ratio) == cells
        assert experiment.pretrain.epochs == 300
        for stage in ("pretrain", "finetune", "linear_probe"):
            gpus = study("imagenet.yaml").stage_resources(stage, "imagenet-small-300").gpus
            assert getattr(experiment, stage).batch_size % gpus == 0


# --------------------------------------------------------------------------------------------------


def test_the_published_table_has_every_number_of_the_specification() -> None:
    finetuned = {
        (e.dataset, e.arch, e.pretrain_epochs): e.metrics["finetune.test_top1"]
        for e in ENTRIES.values()
        if e.method == "APS"
    }
    rows = {
        ("cifar10", 1600): (97.2, 98.1, 98.2),
        ("cifar10", 3200): (97.5, 98.2, 98.3),
        ("cifar100", 1600): (83.4, 84.9, 85.9),
        ("cifar100", 3200): (83.4, 85.3, 86.0),
    }
    assert finetuned == {
        (dataset, arch, epochs): value
        for (dataset, epochs), values in rows.items()
        for arch, value in zip(("tiny", "small", "base"), values, strict=True)
    }
    siblings = {key: sorted(entry.metrics.values()) for key, entry in ENTRIES.items() if entry.method != "APS"}
    assert siblings == {
        "patchmix-cifar100-small-800": [75.4, 78.7, 86.0],
        "patchmix-imagenet-small-300": [73.3, 77.4, 82.8],
        "mgc-coco-small": [38.0, 42.0],
    }


def test_differences_from_the_published_experiment_are_named() -> None:
    whole, entry = study("cifar.yaml").experiments["cifar10-tiny-1600"], ENTRIES["cifar10-tiny-1600"]
    assert published.differences(whole, entry) == []
    shorter = whole.model_copy(update={"pretrain": whole.pretrain.model_copy(update={"epochs": 100})})
    assert published.differences(shorter, entry) == ["pretrain.epochs 100 instead of 1600"]
    fewer = whole.model_copy(update={"dataset": whole.dataset.model_copy(update={"train_limit": 10})})
    assert published.differences(fewer, entry) == ["dataset.train_limit 10 instead of all images"]
    detects = next(e for e in study("coco.yaml").experiments.values() if e.published and "detection" in e.stages)
    before = published.differences(detects, ENTRIES[str(detects.published)])
    fewer = detects.model_copy(update={"detection": detects.detection.model_copy(update={"train_limit": 10})})
    after = published.differences(fewer, ENTRIES[str(detects.published)])
    assert set(after) - set(before) == {"detection.train_limit 10 instead of all images"}


ENCODER = {"arch": "tiny", "image_size": 32, "patch_size": 2}
SHORT = {"pretrain": {"epochs": 2}, "stages": ["pretrain"]}


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, []),
        ({"pretrain": {"budget": {"flops": 1e13}}}, ["pretrain.budget.flops 1e+13 instead of 1600 epochs"]),
        ({"pretrain": {"budget": {"minutes": 3.22}}}, ["pretrain.budget.minutes 3.22 instead of 1600 epochs"]),
        ({"pretrain": {"method": "simclr"}}, ["pretrain.method simclr instead of aps"]),
        ({"sampling": {"strategy": "random"}}, ["sampling.strategy random instead of asymmetric"]),
        ({"finetune": {"dataset": "cifar100"}}, ["finetune.dataset cifar100 instead of cifar10"]),
        (
            {"finetune": {"dataset": {"name": "cifar10", "train_limit": 500}}},
            ["finetune.dataset.train_limit 500 instead of all images"],
        ),
        ({"knn": {"dataset": "cifar100"}}, []),  # the entry has no number of kNN
        ({"dataset": "cifar100"}, ["dataset cifar100 instead of cifar10"]),
        ({"encoder": {"weights": "random"}, "stages": ["finetune"]}, ["encoder.weights random instead of pretrain"]),
        (
            {"encoder": {"weights": "timm:vit_tiny"}, "stages": ["finetune"]},
            ["encoder.weights timm:vit_tiny, of unknown pretraining, instead of pretrain"],
        ),
        (
            {"encoder": {"weights": "e.safetensors"}, "stages": ["finetune"]},
            ["encoder.weights e.safetensors, of unknown pretraining, instead of pretrain"],
        ),
        ({"encoder": {"depth": 2}}, ["encoder.depth 2 instead of 12"]),
        ({"encoder": {"dim": 192, "heads": 6}}, ["encoder.heads 6 instead of 3"]),
        ({"encoder": {"mlp_ratio": 2}}, ["encoder.mlp_ratio 2.0 instead of 4.0"]),
        ({"encoder": {"arch": "small"}}, ["encoder.arch small instead of tiny"]),
        ({"encoder": {"image_size": 16}}, ["encoder.image_size 16 instead of 32"]),
        (
            {"encoder": {"weights": "experiment:short"}, "stages": ["finetune"]},
            ["experiments.short.pretrain.epochs 2 instead of 1600"],
        ),
        (
            {"encoder": {"weights": "experiment:other"}, "stages": ["finetune"]},
            [
                "experiments.other.dataset.train_limit 5000 instead of all images",
                "experiments.other.dataset cifar100 instead of cifar10",
                "experiments.other.pretrain.method simclr instead of aps",
                "experiments.other.pretrain.budget.minutes 1 instead of 1600 epochs",
            ],
        ),
    ],
)
def test_whatever_makes_a_score_another_thing_than_the_published_one_is_a_difference(
    tmp_path: Path, settings: dict[str, Any], found: list[str]
) -> None:
    others = {
        "short": SHORT,
        "other": {
            "dataset": {"name": "cifar100", "train_limit": 5000},
            "pretrain": {"method": "simclr", "epochs": 1600, "budget": {"minutes": 1}},
            "stages": ["pretrain"],
        },
    }
    mine = {"published": "cifar10-tiny-1600", "pretrain": {"epochs": 1600}, "stages": ["pretrain", "finetune", "knn"]}
    base = {"dataset": "cifar10", "encoder": ENCODER}
    blocks = {key: {**mine[key], **value} if key == "pretrain" else value for key, value in settings.items()}
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"defaults": base, "experiments": {"mine": mine | blocks, **others}})
    )
    assert differences(load_study([tmp_path / "s.yaml"]), "mine") == found


def test_constants_of_the_method_and_the_recipe_other_than_the_published_ones_are_differences() -> None:
    defaults = {
        "sampling": {"gamma": 0, "ratio": 0.125, "samplings": 1, "flip_aware": False},
        "views": {"crop_scale": [0.9, 1.0]},
        "pretrain": {"temperature": 1.0, "accumulate": 2},
        "finetune": {"epochs": 1, "drop_path": 0.0},
    }
    changed = load_study([CONFIG / "cifar.yaml"], {"defaults": defaults})
    for name in changed.experiments:
        assert differences(changed, name) == [
            "views.crop_scale [0.9, 1.0] instead of [0.15, 1.0]",
            "sampling.ratio 0.125 instead of 0.25",
            "sampling.samplings 1 instead of 4",
            "sampling.gamma 0.0 instead of 3.0",
            "pretrain.accumulate 2 instead of 1",
            "pretrain.temperature 1.0 instead of 0.1",
            "finetune.epochs 1 instead of 100",
        ]
    whole, entry = changed.experiments["cifar10-tiny-1600"], ENTRIES["cifar10-tiny-1600"]
    assert not any(phrase.startswith("finetune.") for phrase in published.differences(whole, entry, stage="knn"))


def test_a_detector_of_another_length_than_the_published_one_is_not_compared_with_it() -> None:
    detectors, entry = study("coco.yaml").experiments, ENTRIES["mgc-coco-small"]
    longer = "detection.iterations 184375 instead of 22500"
    assert published.differences(detectors["coco-small-100ep"], entry) == [longer]
    assert published.differences(detectors["coco-small-1x"], entry) == []


# What may differ from the release in an experiment that repeats it: what is compared by other keys of an entry, what moves
# no score (kNN is no number of it, the EMA is beside the headline, jitter acts where RandAugment is off), and where ours
# deviates on purpose (flips, drop path), or the recipe names nothing (finetuning's flip).
MAY_DIFFER = {
    "encoder": {"arch", "image_size", "patch_size", "dim", "depth", "heads", "mlp_ratio", "weights"},
    "views": set(),
    "sampling": {"strategy", "flip_aware"},
    "pretrain": {
        "method", "epochs", "budget", "precision", "activation_checkpointing", "compile", "knn_every", "knn_readings",
    },
    "finetune": {"flip", "color_jitter", "drop_path", "ema", "precision", "compile", "dataset"},
}  # fmt: skip


@pytest.mark.parametrize("block", MAY_DIFFER)
def test_every_setting_of_the_release_is_compared_or_may_differ(block: str) -> None:
    keys = set(type(getattr(study("cifar.yaml").experiments["cifar10-tiny-1600"], block)).model_fields)
    for key, entry in ENTRIES.items():
        if entry.method == published.OURS:
            assert getattr(entry.settings, block).model_fields_set == keys - MAY_DIFFER[block], key


def differences(study: Study, name: str) -> list[str]:
    experiment, source = study.experiments[name], study.pretrain_source(name)
    pretraining = study.experiments[source] if source is not None else None
    return published.differences(experiment, ENTRIES[str(experiment.published)], pretraining)


def test_a_number_of_one_stage_is_compared_whatever_another_stage_has_for_a_dataset(tmp_path: Path) -> None:
    mine = {
        "published": "patchmix-cifar100-small-800", "dataset": "cifar100", "encoder": {**ENCODER, "arch": "small"},
        "pretrain": {"epochs": 800}, "linear_probe": {"dataset": "cifar10"},
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"experiments": {"mine": mine}}))
    experiment = load_study([tmp_path / "s.yaml"]).experiments["mine"]
    entry = ENTRIES["patchmix-cifar100-small-800"]
    assert published.differences(experiment, entry, stage="knn") == []
    for stage in ("linear_probe", None):
        assert published.differences(experiment, entry, stage=stage) == [
            "linear_probe.dataset cifar10 instead of cifar100"
        ]


@pytest.mark.parametrize("name", STUDIES)
def test_a_shipped_experiment_is_what_was_published_with_the_pretraining_it_starts_from(name: str) -> None:
    shipped = study(name)
    for key, experiment in shipped.experiments.items():
        assert experiment.published is None or differences(shipped, key) == [], key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {method: APS}", r"a.dataset: Field required"),
        ("a: 3", r"a: Input should be a valid dictionary"),
        ("[1]", r"must hold a block of entries"),
        ("a: {b", r"not valid YAML"),
        ("ENTRY, typo: 1}", r"a.typo: Extra inputs"),
        ("ENTRY, settings: {sampling: {gama: 3}}}", r"a.settings.sampling.gama: Extra inputs"),
        (
            "ENTRY, settings: {pretrain: {temperature: -1}}}",
            r"a.settings.pretrain.temperature: Input should be greater",
        ),
        ("ENTRY, settings: 3}", r"a.settings: Input should be a valid dictionary"),
        ("ENTRY, arch: huge}", r"a.arch: 'huge' is unknown; known: base, micro, small, tiny"),
        ("ENTRY, metrics: {top1: 3}}", r"a.metrics: 'top1' is not STAGE.METRIC"),
        ("ENTRY, metrics: {finetune.test_top1: 0.97e3}}", r"a.metrics: finetune.test_top1 = 970.0 is not a percentage"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    entry = "a: {<<: {method: m, dataset: d, arch: tiny, patch_size: 2, pretrain_epochs: 3, "
    entry += "metrics: {knn.knn_top1_k20: 50.0}, source: s}"
    (tmp_path / "p.yaml").write_text(text.replace("ENTRY", entry))
    with pytest.raises(UserError, match=rf"p.yaml: {message}"):
        published.load(tmp_path / "p.yaml")
    with pytest.raises(UserError, match=r"gone.yaml: cannot be read"):
        published.load(tmp_path / "gone.yaml")
