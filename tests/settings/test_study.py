"""Settings: inheritance, includes, messages, digests. Whatever a user writes, only UserError comes out."""

from __future__ import annotations

import json
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aps.errors import UserError
from aps.settings.blocks import ResourceSettings
from aps.settings.reading import MAY_BE_NULL, _read, check_names, load_study, parse_overrides
from aps.settings.reference import markdown, schema, tables
from aps.settings.study import ExperimentSettings, StageSettings, Study, blocks_of
from aps.stages import STAGES

# Every key of a study in use, with values that are all allowed and none of them a default.
WHOLE: dict[str, Any] = {
    "study": "whole",
    "results": "out",
    "tracking_uri": "none",
    "sources": {"cifar10": {"path": "/data/cifar", "download": False}},
    "resources": {"default": {"threads": 2}, "pretrain": {"gpus": 1, "mem_mb": 4000}},
    "defaults": {"dataset": "digits", "pretrain": {"epochs": 5, "warmup_epochs": 1}},
    "experiments": {
        "base": {
            "description": "the method",
            "seeds": [0, 1],
            "stages": list(STAGES),
            "dataset": {"train_limit": 1000, "statistics": "published"},
            "encoder": {"arch": "micro", "image_size": 16, "patch_size": 4, "dim": 24, "depth": 3, "heads": 3},
            "views": {"crop_scale": [0.2, 0.9], "color_jitter": [0.1, 0.2, 0.3, 0.4], "blur": [1.0, 0.1]},
            "sampling": {"strategy": "random", "ratio": 0.5, "samplings": 2, "gamma": 2, "flip_aware": False},
            "pretrain": {"lr": 2e-3, "betas": [0.8, 0.99], "projector": [16, 16, 128], "precision": "fp32"},
            "finetune": {"rand_augment": None, "ema": 0.0, "crop": "resized"},
            "linear_probe": {"lrs": [0.1, 1.0], "holdout": 0.2},
            "knn": {"k": [1, 5], "temperature": 0.1},
            "detection": {"image_size": 64, "pyramid_scales": [2.0, 1.0], "global_blocks": [1], "lr_drops": [0.5]},
            "resources": {"pretrain": {"mem_mb": 8000}},
        },
        "floor": {"inherits": "base", "stages": ["knn"], "encoder": {"weights": "random"}},
        "taken": {"inherits": "base", "stages": ["finetune"], "encoder": {"weights": "experiment:base"}},
    },
}


def write(folder: Path, content: Any, name: str = "study.yaml") -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return file


def load(folder: Path, content: Any, **overrides: Any) -> Study:
    return load_study([write(folder, content)], overrides)


def message(folder: Path, content: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, content)
    return str(caught.value).replace(f"{folder}/", "")


def one(**settings: Any) -> dict[str, Any]:
    """A study of one experiment."""
    return {"experiments": {"e": {"dataset": "digits", **settings}}}


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `tree` with `value` at `path`; the last key is made where it is missing."""
    if not path:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = put(copy.get(path[0], {}) if isinstance(copy, dict) else copy[path[0]], path[1:], value)
    return copy


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield prefix
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*prefix, key))


# --------------------------------------------------------------------------------------------------
# Merging.


def test_a_study_needs_only_a_dataset_and_the_defaults_are_the_papers(tmp_path: Path) -> None:
    study = load(tmp_path, one())
    e = study.experiment("e")
    assert (e.sampling.strategy, e.sampling.ratio, e.sampling.samplings, e.sampling.gamma) == ("asymmetric", 0.25, 4, 3)
    assert (e.pretrain.epochs, e.pretrain.batch_size, e.pretrain.temperature) == (1600, 512, 0.1)
    assert (study.study, study.results, study.tracking_uri) == ("study", "results", None)
    assert study.jobs() == [("e", 0, stage) for stage in ("pretrain", "finetune", "linear_probe", "knn")]


def test_every_key_of_a_study_is_read(tmp_path: Path) -> None:
    study = load(tmp_path, WHOLE)
    base = study.experiment("base").model_dump(mode="json")
    for path in paths(WHOLE["experiments"]["base"]):
        given, read = WHOLE["experiments"]["base"], base
        for key in path:
            given, read = given[key], read[key]
        if not isinstance(given, dict):
            assert read == given, path
    assert study.dataset_names() == ["digits", "digits_coco"]
    assert study.pretrain_source("taken") == "base" and study.pretrain_source("floor") is None
    assert study.sources["cifar10"].path == "/data/cifar"


def test_defaults_lie_under_every_experiment_and_a_parent_under_its_child(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        {
            "defaults": {"dataset": "digits", "pretrain": {"epochs": 5, "lr": 1.0}, "seeds": [7]},
            "experiments": {
                "a": {"description": "parent", "pretrain": {"epochs": 6}, "knn": {"k": [1]}},
                "b": {"inherits": "a", "pretrain": {"batch_size": 64}},
                "c": {"inherits": "b", "knn": {"k": [2, 3]}},
            },
        },
    )
    c = study.experiment("c")
    assert (c.pretrain.epochs, c.pretrain.lr, c.pretrain.batch_size, c.seeds) == (6, 1.0, 64, (7,))
    assert c.knn.k == (2, 3)  # lists are replaced, not merged
    assert (c.description, study.experiment("a").description) == ("", "parent")


@settings(max_examples=50)
@given(st.permutations(range(5)))
def test_inheritance_does_not_depend_on_the_order_in_the_file(order: list[int]) -> None:
    chain: dict[str, dict[str, Any]] = {
        f"e{n}": {"inherits": f"e{n - 1}", "pretrain": {("epochs", "batch_size")[n % 2]: n + 1}} for n in range(1, 5)
    }
    chain["e0"] = {"dataset": "digits", "pretrain": {"lr": 0.5}}
    study = load_study([], {"experiments": {f"e{n}": chain[f"e{n}"] for n in order}})
    last = study.experiment("e4").pretrain
    assert (last.lr, last.epochs, last.batch_size) == (0.5, 5, 4)


def test_later_files_and_overrides_are_laid_over_earlier_ones(tmp_path: Path) -> None:
    first = write(tmp_path, one(pretrain={"epochs": 1, "lr": 0.1}), "first.yaml")
    second = write(tmp_path, {"experiments": {"e": {"pretrain": {"epochs": 2}}}}, "second.yaml")
    e = load_study([first, second]).experiment("e").pretrain
    assert (e.epochs, e.lr) == (2, 0.1)
    overrides = parse_overrides(["experiments.e.pretrain.epochs=3", "experiments.e.pretrain.lr=1e-3", "study=other"])
    study = load_study([first, second], overrides)
    assert (study.experiment("e").pretrain.epochs, study.experiment("e").pretrain.lr) == (3, 1e-3)
    assert study.study == "other"


def test_an_override_reaches_an_experiment_with_a_dot_in_its_name(tmp_path: Path) -> None:
    file = write(tmp_path, {"experiments": {"r-0.5": {"dataset": "digits"}}})
    overrides = parse_overrides(["experiments={r-0.5: {pretrain: {epochs: 3}}}"])
    assert load_study([file], overrides).experiment("r-0.5").pretrain.epochs == 3


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("epochs", "--set epochs: write KEY=VALUE, for example --set defaults.pretrain.epochs=10"),
        ("=3", "--set =3: write KEY=VALUE"),
        ("a={b", "--set a={b: not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_sentence(pair: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_overrides([pair])
    assert str(caught.value).startswith(said)


def test_included_studies_keep_their_own_defaults(tmp_path: Path) -> None:
    write(tmp_path, {"study": "a", "defaults": {"dataset": "digits", "pretrain": {"epochs": 3}}, "experiments": {"a": None, "a2": {"inherits": "a"}}}, "a.yaml")  # fmt: skip
    write(tmp_path, {"study": "b", "defaults": {"dataset": "cifar10"}, "experiments": {"b": {}}}, "b.yaml")
    study = load(tmp_path, {"study": "both", "include": ["a.yaml", "b.yaml"]})
    assert study.study == "both"
    assert [(name, e.dataset.name, e.pretrain.epochs) for name, e in study.experiments.items()] == [
        ("a", "digits", 3), ("a2", "digits", 3), ("b", "cifar10", 1600),
    ]  # fmt: skip


def test_includes_are_relative_to_their_file_and_lie_under_it(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", one(pretrain={"epochs": 1, "lr": 0.5}), "base.yaml")
    write(tmp_path / "inner", {"include": ["base.yaml"]}, "middle.yaml")
    study = load(tmp_path, {"include": ["inner/middle.yaml"], "experiments": {"e": {"pretrain": {"epochs": 2}}}})
    assert (study.experiment("e").pretrain.epochs, study.experiment("e").pretrain.lr) == (2, 0.5)


def test_an_empty_block_changes_nothing(tmp_path: Path) -> None:
    """All keys of a block commented out leave null."""
    study = load(
        tmp_path,
        {
            **{key: None for key in ("sources", "resources", "defaults", "include")},
            "experiments": {
                "a": {"dataset": "digits", "pretrain": {"epochs": 3}, "knn": None},
                "b": {"inherits": "a", "pretrain": None},
            },
        },
    )
    assert study.experiment("b").pretrain.epochs == 3
    assert study.experiment("a").knn == ExperimentSettings(dataset={"name": "digits"}).knn


BUDGET = {"defaults": {"dataset": "digits", "pretrain": {"epochs": 7, "budget": {"flops": 1e12}}}}
READINGS = {"defaults": {"dataset": "digits", "pretrain": {"epochs": 7, "knn_readings": 5}}}
ELSEWHERE = {"defaults": {"dataset": "digits", "knn": {"dataset": {"name": "fashion_mnist", "train_limit": 100}}}}


@pytest.mark.parametrize(
    ("study", "block", "key", "found"),
    [
        (BUDGET, "pretrain", {"budget": None}, {"budget": None}),
        (BUDGET, "pretrain", {"budget": {"minutes": 3}}, {"budget": {"minutes": 3, "flops": None}}),
        (BUDGET, "pretrain", {"budget": {"minutes": 3, "flops": None}}, {"budget": {"minutes": 3, "flops": None}}),
        (BUDGET, "pretrain", {"budget": {"flops": 2e12}}, {"budget": {"minutes": None, "flops": 2e12}}),
        (BUDGET, "pretrain", {"budget": {}}, {"budget": {"minutes": None, "flops": 1e12}}),
        (READINGS, "pretrain", {"knn_every": 2}, {"knn_every": 2, "knn_readings": None}),
        (READINGS, "pretrain", {"knn_every": 0}, {"knn_every": 0, "knn_readings": None}),
        (ELSEWHERE, "knn", {"dataset": None}, {"dataset": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "way", ["defaults", "parent", "--set", "--set in defaults", "a later file", "an included file"]
)
def test_null_and_another_kind_of_budget_replace_what_lies_under_them(
    study: dict[str, Any], block: str, key: dict[str, Any], found: dict[str, Any], way: str, tmp_path: Path
) -> None:
    files, pairs, name = [tmp_path / "study.yaml"], [], "e"
    ((inner, value),) = key.items()
    text = json.dumps(value)
    if way == "defaults":
        content = study | {"experiments": {"e": {block: key}}}
    elif way == "parent":
        content = study | {"experiments": {"a": {}, "e": {"inherits": "a", block: key}}}
    elif way == "a later file":
        content = study | {"experiments": {"e": {}}}
        files.append(write(tmp_path, {"experiments": {"e": {block: key}}}, "later.yaml"))
    elif way == "an included file":
        write(tmp_path, study | {"experiments": {"e": {}}}, "below.yaml")
        content = {"include": ["below.yaml"], "experiments": {"e": {block: key}}}
    else:
        content = study | {"experiments": {"e": {}}}
        pairs = [f"{'experiments.e' if way == '--set' else 'defaults'}.{block}.{inner}={text}"]
    write(tmp_path, content)
    got = getattr(load_study(files, parse_overrides(pairs)).experiment(name), block)
    if block == "pretrain":
        dump = got.model_dump()
        assert got.epochs == 7 and {key: dump.get(key) for key in found} == found
    else:
        assert got.dataset == found["dataset"]


def test_another_source_of_a_dataset_replaces_the_one_under_it(tmp_path: Path) -> None:
    content = {"datasets": {"own": {"folder": "a", "trust": True}}, "experiments": {"e": {"dataset": "own"}}}
    write(tmp_path, content, "a.yaml")
    study = load_study([tmp_path / "a.yaml"], parse_overrides(["datasets.own={arrays: b.npz}"]))
    own = study.datasets["own"]
    assert (own.folder, own.arrays, own.trust) == (None, "b.npz", True)
    splits = {split: {"images": "c", "annotations": "c.json"} for split in ("train", "val")}
    write(tmp_path, {"datasets": {"own": {"coco": splits}}, "experiments": {"e": {"dataset": "own"}}}, "b.yaml")
    study = load_study([tmp_path / "b.yaml"], parse_overrides(["datasets.own={coco: null, folder: a}"]))
    assert (study.datasets["own"].folder, study.datasets["own"].coco) == ("a", None)


def test_blocks_of_which_null_is_a_value_are_those_that_say_so() -> None:
    assert {f"{block}.{key}" for block, key in MAY_BE_NULL} == {
        "pretrain.budget", "datasets.NAME.coco", *(f"{stage}.dataset" for stage in STAGES if not STAGES[stage].detects and stage != "pretrain"),
    }  # fmt: skip


@pytest.mark.parametrize("key", ["experiments", "experiments.a", "defaults.pretrain", "defaults.knn"])
def test_an_override_that_empties_a_block_says_that_it_changes_nothing(key: str, tmp_path: Path) -> None:
    study = {"defaults": {"pretrain": {"epochs": 5}, "knn": {"k": [5]}}, "experiments": {"a": {"dataset": "digits"}}}
    write(tmp_path, study, "a.yaml")
    with pytest.raises(
        UserError, match=rf"a.yaml: {key} = null, laid over it, changes nothing, as an empty block never"
    ):
        load_study([tmp_path / "a.yaml"], parse_overrides([f"{key}=null"]))
    values = parse_overrides(["defaults.finetune.rand_augment=null", "experiments.b=null", "defaults.dataset=digits"])
    assert load_study([tmp_path / "a.yaml"], values).experiment("b").finetune.rand_augment is None


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.0e-3", "0.001", "1.e-3", "10e-4"])
def test_a_learning_rate_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    study = load(tmp_path, f"experiments: {{e: {{dataset: digits, pretrain: {{lr: {text}}}}}}}")
    assert study.experiment("e").pretrain.lr == 1e-3


def test_resources_are_laid_from_default_over_stage_to_experiment(tmp_path: Path) -> None:
    study = load(tmp_path, WHOLE)
    own = study.stage_resources("pretrain", "base")
    assert (own.threads, own.gpus, own.mem_mb) == (2, 1, 8000)
    assert study.stage_resources("pretrain").mem_mb == 4000
    assert study.stage_resources("knn", "base") == ResourceSettings(threads=2)


def test_loading_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from aps.settings.reading import load_study; load_study([sys.argv[1]]); " \
        "print([m for m in ('torch', 'torchvision', 'timm', 'mlflow', 'sklearn', 'matplotlib') if m in sys.modules])"  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code, write(tmp_path, WHOLE)], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_a_merge_key_lays_another_block_under_its_own(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        "defaults: {dataset: digits}\n"
        "experiments:\n"
        "  a: {pretrain: &short {epochs: 3, batch_size: 64}}\n"
        "  b: {pretrain: {<<: *short, epochs: 5}}\n"
    )
    study = load_study([file])
    assert (study.experiments["b"].pretrain.epochs, study.experiments["b"].pretrain.batch_size) == (5, 64)


# --------------------------------------------------------------------------------------------------
# What a mistake is told.

MISTAKES: dict[str, tuple[Any, str]] = {
    "defaults that are no block": ({**one(), "defaults": "digits"}, 'study.yaml: defaults = "digits": should be a block of settings'),
    "study named as a folder that all share": ({**one(), "study": "runs"}, 'study.yaml: study = "runs": is a folder of `results`'),
    "dataset of one's own that is no folder": (
        {**one(), "datasets": {"my photos": {"folder": "x"}}},
        'study.yaml: datasets.my photos: the name "my photos" should be at most 100 letters, digits, _ . and -',
    ),
    "no file's content": ("", "study.yaml: no experiments; add an 'experiments:' block with at least one"),
    "not a block": ("- a", "study.yaml: a study is a block of keys (study, defaults, experiments), not a list"),
    "broken YAML": ("a: {b", "study.yaml: not valid YAML: "),
    "key given twice": ("study: a\nstudy: b", "study.yaml: not valid YAML: key 'study' is given twice in"),
    "inner key given twice": ("experiments:\n  e: {dataset: digits, dataset: cifar10}", "key 'dataset' is given twice"),
    "name that is a number": ("experiments: {2024: {}}", "key 2024 is not text; quote it if it is a name"),
    "name that is no folder": ({"experiments": {"a/b": {}}}, "experiment name 'a/b' can't be used as a folder"),
    "name of another folder": ({"experiments": {"checkpoints": {}}}, "name 'checkpoints' can't be used as a folder"),
    "unknown parent": (
        {"experiments": {"base": {"dataset": "digits"}, "e": {"inherits": "bse"}}},
        "study.yaml: experiment 'e': inherits 'bse', which does not exist; did you mean 'base'?",
    ),
    "circle": (
        {"experiments": {"a": {"inherits": "b"}, "b": {"inherits": "a"}}},
        "study.yaml: experiment 'b': inherits itself through a -> b -> a",
    ),
    "experiment is a number": ({"experiments": {"e": 3}}, "experiment 'e': must be a block of settings, not 3"),
    "missing": ({"experiments": {"e": {}}}, "study.yaml: experiment 'e': 'dataset' is missing; add it"),
    "misspelt": (
        one(pretrain={"epoch": 3}),
        "study.yaml: experiment 'e': unknown key 'pretrain.epoch'; did you mean 'pretrain.epochs'?",
    ),
    "misspelt block": (one(smapling={}), "unknown key 'smapling'; did you mean 'sampling'?"),
    "misspelt top key": ({**one(), "defualts": {}}, "study.yaml: unknown key 'defualts'; did you mean 'defaults'?"),
    "a block of every experiment at the top": ({**one(), "pretrain": {"lr": 1.0}}, "unknown key 'pretrain'; did you mean 'defaults.pretrain'?"),
    "wrong place": (one(gamma=2), "unknown key 'gamma'; did you mean 'sampling.gamma'?"),
    "misspelt dataset key": (one(dataset={"nmae": "digits"}), "unknown key 'dataset.nmae'; did you mean 'dataset.name'?"),
    "like nothing": (one(knn={"zzz": 1}), "unknown key 'knn.zzz'; known keys: k, temperature, precision"),
    "stage of resources": (
        {**one(), "resources": {"pretrian": {"gpus": 1}}},
        "study.yaml: unknown key 'resources.pretrian'; did you mean 'pretrain'?",
    ),
    "key of resources": (
        one(resources={"knn": {"gpu": 1}}),
        "unknown key 'resources.knn.gpu'; did you mean 'resources.knn.gpus'?",
    ),
    "key of sources": ({**one(), "sources": {"digits": {"pth": "/"}}}, "did you mean 'sources.digits.path'?"),
    "unknown source": ({**one(), "sources": {"cifar": {}}}, "sources names dataset 'cifar'; did you mean 'cifar10'?"),
    "text": (
        one(pretrain={"epochs": "many"}),
        'study.yaml: experiment \'e\': pretrain.epochs = "many": should be a whole number',
    ),
    "number in quotes": (one(pretrain={"lr": "0.1"}), 'pretrain.lr = "0.1": should be a valid number'),
    "fraction": (one(pretrain={"epochs": 1.5}), "pretrain.epochs = 1.5: should be a whole number"),
    "true for a number": (one(pretrain={"epochs": True}), "pretrain.epochs = true: should be a whole number"),
    "true for a fraction": (one(pretrain={"lr": True}), "pretrain.lr = true: should be a valid number"),
    "number for true": (one(pretrain={"compile": 1}), "pretrain.compile = 1: should be true or false"),
    "number for text": ({**one(), "study": 3}, "study.yaml: study = 3: should be text"),
    "null": (one(pretrain={"epochs": None}), "pretrain.epochs = null: should be a whole number"),
    "list": (one(pretrain={"epochs": [1]}), "pretrain.epochs = [1]: should be a whole number"),
    "no list": (one(seeds=0), "seeds = 0: should be a list"),
    "no block": (one(pretrain=3), "pretrain = 3: should be a block of settings"),
    "too short a list": (one(views={"crop_scale": [1.0]}), "views.crop_scale.1' is missing"),
    "too long a list": (one(pretrain={"betas": [0, 0, 0]}), "pretrain.betas = [0, 0, 0]: should have at most 2 items"),
    "empty list": (one(seeds=[]), "seeds = []: should have at least 1 item"),
    "below": (one(pretrain={"epochs": 0}), "pretrain.epochs = 0: should be greater than 0"),
    "above": (one(sampling={"ratio": 1.5}), "sampling.ratio = 1.5: should be less than or equal to 1"),
    "far above": (one(sampling={"gamma": 1e39}), "sampling.gamma = 1e+39: should be less than or equal to 1000"),
    "far above without an end of its own": (
        one(finetune={"mixup": 1e300}),
        "finetune.mixup = 1e+300: should be less than or equal to 1000000",
    ),
    "far above in a list": (
        one(views={"color_jitter": [0.4, 1e39, 0, 0]}),
        "views.color_jitter.1 = 1e+39: should be less than or equal to 10",
    ),
    "as good as nothing": (
        one(encoder={"layer_norm_eps": 1e-300}),
        "encoder.layer_norm_eps = 1e-300: should be greater than or equal to",
    ),
    "infinite": ("experiments: {e: {dataset: digits, pretrain: {lr: .inf}}}", "pretrain.lr = Infinity: should be a finite number"),
    "not a number": ("experiments: {e: {dataset: digits, pretrain: {lr: .nan}}}", "lr = NaN: should be a finite number"),
    "choice": (one(pretrain={"schedule": "step"}), "pretrain.schedule = \"step\": should be 'release' or 'cosine'"),
    "stage": (one(stages=["pretain"]), "stages.0 = \"pretain\": should be 'pretrain', 'finetune'"),
    "several": (one(pretrain={"epochs": 0, "lr": 0}), "(and 1 more)"),
    "include that is no list": ("include: a.yaml", 'study.yaml: include = "a.yaml": should be a list of files'),
    "include that is not there": ("include: [a.yaml]", "a.yaml: cannot be read (No such file or directory)"),
    "include of itself": ("include: [study.yaml]", "study.yaml: includes itself through study.yaml"),
    "results that are a pattern": ({**one(), "results": "out/{x}"}, 'results = "out/{x}": should match'),
    "study that is no folder": ({**one(), "study": "a/b"}, 'study = "a/b": should be at most 100 letters, digits, _ . and -'),
}  # fmt: skip


@pytest.mark.parametrize(
    ("results", "way"),
    [
        ("taken", "taken"),
        ("taken/deeper", "taken"),
        ("link", "link"),
        (".", "demo"),
        ("folder", None),
        ("new/er", None),
    ],
)
def test_a_file_in_the_way_of_the_results_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: str, way: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("taken", "demo"):
        Path(file).touch()
    Path("link").symlink_to("nowhere")
    Path("folder").mkdir()
    content = {**one(), "study": "demo", "results": results}
    if way is None:
        assert load_study([write(tmp_path, content)]).results == results
    else:
        assert all(words in message(tmp_path, content) for words in (f'results = "{results}": ', f"move {way} away"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_file_key_value_and_what_is_allowed(tmp_path: Path, mistake: str) -> None:
    content, said = MISTAKES[mistake]
    text = message(tmp_path, content)
    assert said in text and "\n" not in text
    assert text.startswith(("study.yaml: ", "a.yaml: "))


# One for each check of a rule between settings: what breaks it, and what is said.
MICRO = {"encoder": {"arch": "micro", "image_size": 16, "patch_size": 4}}
DETECTION: dict[str, Any] = {"image_size": 32, "pyramid_scales": [2.0, 1.0], "global_blocks": [1], "window": 4}
CROSS: dict[str, tuple[dict[str, Any], str]] = {
    "arch": (one(encoder={"arch": "tinny"}), "encoder: arch 'tinny' is unknown; did you mean 'tiny'?"),
    "patch": (one(encoder={"image_size": 33}), "encoder: image_size 33 is not a multiple of patch_size 2"),
    "heads": (one(encoder={"dim": 100}), "encoder: width 100 is not a multiple of 3 heads; change dim or heads"),
    "weights": (one(encoder={"weights": "mae"}), "encoder: weights 'mae' is not one of pretrain, random, experiment:NAME"),
    "crop_scale": (one(views={"crop_scale": [0.5, 0.2]}), "views: crop_scale must be [low, high] with low <= high"),
    "crop_ratio": (one(views={"crop_ratio": [2.0, 1.0]}), "views: crop_ratio must be [low, high] with low <= high"),
    "crop area": (one(views={"crop_scale": [0.5, 1.5]}), "views: crop_scale is a share of the image's area: 1.5 is above 1"),
    "probe's crop": (one(linear_probe={"crop_scale": [1.0, 0.1]}), "linear_probe: crop_scale must be [low, high]"),
    "heads' widths": (one(pretrain={"predictor": [16, 8, 4]}), "pretrain: predictor ends in width 4, the projector in 128"),
    "all held out": (
        one(stages=["knn", "linear_probe"], dataset={"name": "digits", "train_limit": 200}, linear_probe={"holdout": 0.999}, encoder={"weights": "random"}),
        "linear_probe.holdout 0.999 of dataset.train_limit 200 leaves no image to train on; lower it",
    ),
    "rand_augment": (one(finetune={"rand_augment": "m9"}), 'finetune.rand_augment = "m9": should match pattern'),
    "rand_augment's numbers": (one(finetune={"rand_augment": "rand-n99999"}), '"rand-n99999": should match pattern rand-mN'),
    "strategy": (one(sampling={"strategy": "randon"}), "sampling.strategy: strategy 'randon' is unknown; did you mean 'random'?"),
    "keeps none": (one(**MICRO, sampling={"ratio": 0.01}), "sampling.ratio 0.01 of 16 cells keeps none; raise it"),
    "too many samplings": (
        one(**MICRO, sampling={"ratio": 0.5, "samplings": 3}),
        "sampling.samplings 3 x 8 kept cells exceed the 16 cells of a view; lower sampling.samplings or sampling.ratio",
    ),
    "pretrains what it takes": (one(encoder={"weights": "random"}), "encoder.weights is 'random' but stages lists pretrain"),
    "seed twice": (one(seeds=[1, 2, 1]), "seeds lists 1 twice; remove one"),
    "rate twice, as it is named": (one(linear_probe={"lrs": [0.1, 0.10000001]}), "linear_probe: lrs lists 0.1 twice; remove one"),
    "rate beyond reason": (one(linear_probe={"lrs": [0.1, 1e300]}), "linear_probe.lrs"),
    "minutes without an end": (one(pretrain={"budget": {"minutes": 1e308}}), "pretrain.budget.minutes"),
    "operations without an end": (one(pretrain={"budget": {"flops": 1e300}}), "pretrain.budget.flops"),
    "stage twice": (one(stages=["knn", "knn"], encoder={"weights": "random"}), "stages lists knn twice; remove one"),
    "dataset": (one(dataset="digts"), "study.yaml: experiment 'e': dataset 'digts' is unknown; did you mean 'digits'?"),
    "dataset of another kind": (one(dataset="digits_coco"), "dataset 'digits_coco' is unknown; did you mean 'digits'?"),
    "published": (one(published="cifar10-tiny-1601"), "published 'cifar10-tiny-1601' is no entry; did you mean 'cifar10-tiny-1600'?"),
    "lacks pretrain": (
        one(stages=["knn"]),
        "experiment 'e': takes its encoder from 'e', whose stages lack pretrain; add it, or set encoder.weights: random",
    ),
    "taken from nobody": (
        one(stages=["knn"], encoder={"weights": "experiment:f"}),
        "encoder.weights names experiment 'f', which does not exist; known: e",
    ),
    "taken seeds": (
        {"experiments": {
            "a": {"dataset": "digits"},
            "b": {"dataset": "digits", "stages": ["knn"], "seeds": [0, 3], "encoder": {"weights": "experiment:a"}},
        }},
        "experiment 'b': seeds [3] are not among the seeds [0] of 'a', whose encoder it takes",
    ),
    "taken shape": (
        {"experiments": {
            "a": {"dataset": "digits"},
            "b": {"dataset": "digits", "stages": ["knn"], "encoder": {"weights": "experiment:a", "depth": 3}},
        }},
        "experiment 'b': encoder.depth differs from that of 'a', whose weights it takes; set them alike",
    ),
    "too wide": (
        one(encoder={"dim": 3_000_000, "heads": 3}),
        "experiment 'e': encoder.dim 3000000 is above 1,000,000; lower it",
    ),
    "no hidden unit": (
        one(encoder={"dim": 32, "heads": 2, "mlp_ratio": 0.01}),
        "experiment 'e': encoder.mlp_ratio 0.01 of width 32 leaves the MLP no hidden unit; raise it",
    ),
    "readings of two kinds": (
        one(pretrain={"knn_every": 1, "knn_readings": 3}),
        "experiment 'e': pretrain: knn_every and knn_readings are both set; give one of them",
    ),
    "made of another shape": (
        {"experiments": {
            "a": {"dataset": "digits", "encoder": {"patch_size": 4, "image_size": 16}},
            "b": {"dataset": "digits", "stages": ["knn"],
                  "encoder": {"weights": "results/study/a/seed0/pretrain/encoder.safetensors", "patch_size": 8}},
        }},
        "experiment 'b': encoder.patch_size differs from that of 'a', whose weights it takes; set them alike",
    ),
    "made of itself": (
        one(stages=["finetune"], encoder={"weights": "results/study/e/seed0/finetune/model.safetensors"}),
        "experiment 'e': encoder.weights are made from themselves (e from e); name other weights",
    ),
    "made of each other": (
        {"defaults": {"dataset": "digits", "stages": ["finetune"]}, "experiments": {
            "a": {"encoder": {"weights": "./results/study/b/seed0/finetune/model.safetensors"}},
            "b": {"encoder": {"weights": "results/study/c/seed0/finetune/model.safetensors"}},
            "c": {"encoder": {"weights": "results/study/b/seed0/finetune/model.safetensors"}},
        }},
        "experiment 'a': encoder.weights are made from themselves (a from b from c from b); name other weights",
    ),
    "positions without their window": (
        one(**MICRO, stages=["pretrain", "detection"], detection=DETECTION | {"positions": "repeat", "window": 2}),
        "detection.positions: repeat repeats the pretraining grid of 4 x 4 cells in every window, and detection.window is 2; "
        "set detection.window to 4",
    ),
    **{
        f"detection {key}": (
            one(**MICRO, stages=["pretrain", "detection"], detection=DETECTION | {key: value}), said
        )
        for key, value, said in [
            ("pyramid_scales", [3.0], "detection.pyramid_scales [3.0] may hold 4.0, 2.0, 1.0 and 0.5"),
            ("pyramid_scales", [2.0, 0.5], "detection.pyramid_scales [2.0, 0.5] must halve from one level to the next"),
            ("pyramid_scales", [4.0, 2.0], "on patch_size 4 gives levels of 1, 2 pixels a cell; these must be powers of two"),
            ("image_size", 34, "detection.image_size 34 is not a multiple of 4 pixels, a cell of the coarsest pyramid level"),
            ("global_blocks", [4], "detection.global_blocks names block 4 of an encoder of 4 blocks (from 0)"),
            ("jitter_scale", [2.0, 1.0], "detection.jitter_scale must be [low, high] with low <= high, not [2.0, 1.0]"),
            ("iterations", 9, "detection.warmup_iterations 250 exceeds detection.iterations 9"),
            ("lr_drops", [0.9, 0.5], "detection.lr_drops [0.9, 0.5] must ascend"),
            ("dataset", "digits", "detection.dataset 'digits' is unknown; did you mean 'digits_coco'?"),
            ("engine", "torchvison", "detection.engine 'torchvison' is unknown; did you mean 'torchvision'?"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", CROSS)
def test_settings_that_do_not_fit_each_other_are_told_apart(tmp_path: Path, rule: str) -> None:
    content, said = CROSS[rule]
    text = message(tmp_path, content)
    assert said in text and text.startswith("study.yaml: experiment '") and "\n" not in text


def test_a_detector_without_a_limit_has_the_settings_of_runs_from_before_there_was_one(tmp_path: Path) -> None:
    alone = {"stages": ["detection"], "encoder": {"weights": "random"}}
    detection = {"dataset": "digits_coco", "pyramid_scales": [1.0, 0.5]}
    for limit in (None, 7):
        study = load(tmp_path, {"experiments": {"e": alone | {"detection": detection | {"train_limit": limit}}}})
        block = study.stage_settings("e", 0, "detection").relevant()["detection"]
        assert block.get("train_limit", "absent") == (limit or "absent") and "lr_drops" in block
        assert (
            StageSettings.from_json(study.stage_settings("e", 0, "detection").to_json()).detection.train_limit == limit
        )


def test_detections_rules_bind_only_where_detection_runs(tmp_path: Path) -> None:
    load(tmp_path, one(**MICRO, detection={"pyramid_scales": [3.0], "engine": "other", "dataset": "none"}))


def test_an_experiment_of_detection_alone_needs_no_other_images(tmp_path: Path) -> None:
    detection = {"dataset": "digits_coco", "pyramid_scales": [1.0, 0.5]}
    alone = {"stages": ["detection"], "detection": detection, "encoder": {"weights": "random"}}
    study = load(tmp_path, {"experiments": {"e": alone}})
    assert study.dataset_names() == ["digits_coco"]


def test_a_file_that_is_missing_a_folder_or_not_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in (("gone.yaml", "cannot be read"), ("", "cannot be read"), ("binary.yaml", "save it as UTF-8")):
        with pytest.raises(UserError, match=said):
            load_study([tmp_path / name])


def test_a_study_is_asked_for_what_it_does_not_have(tmp_path: Path) -> None:
    study = load(tmp_path, WHOLE)
    for arguments, said in [
        (("bse", 0, "knn"), "study 'whole' has no experiment 'bse'; did you mean 'base'?"),
        (("floor", 0, "pretrain"), "experiment 'floor' has no stage pretrain; its stages are knn"),
        (("base", 9, "knn"), r"experiment 'base' has no seed 9; its seeds are \[0, 1\]"),
    ]:
        with pytest.raises(UserError, match=said):
            study.stage_settings(*arguments)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1000),
    st.floats(),
    st.sampled_from(
        ["", "x", "1", "1e-3", "random", "digits", "a/b", "experiment:base", "experiment:", "{}", "~", "é"]
    ),
    st.text(string.printable, max_size=5),
    st.dates(),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name", "k", "base"]), inner),
    max_leaves=4,
)
KEYS = [*paths(WHOLE), ("include",), ("experiments", "floor", "inherits"), ("defaults", "zzz"), ("resources", "zzz")]


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(KEYS), junk=JUNK)
def test_whatever_stands_at_a_key_the_study_loads_or_says_why_in_a_sentence(
    tmp_path: Path, path: tuple[Any, ...], junk: Any
) -> None:
    try:
        study = load(tmp_path, put(WHOLE, path, junk))
    except UserError as error:
        assert str(error) and "Traceback" not in str(error)
        return
    for job in study.jobs():  # what loads can be planned
        assert StageSettings.from_json(study.stage_settings(*job).to_json()) == study.stage_settings(*job)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("experiments: {}[]&*a!<<-?|>'\"#,%@\n\t 1.eé\x00\x85"), max_size=30))
def test_no_text_gives_a_traceback(tmp_path: Path, text: str) -> None:
    for content in (text, f"experiments:\n  e: {{dataset: digits, {text}}}", f"experiments:\n  e:\n    {text}"):
        try:
            load(tmp_path, content)
        except UserError:
            continue


@pytest.mark.parametrize(
    "text", ["experiments: &e {a: *e}", "experiments: {a: &d {dataset: digits, views: *d}}", "a: &a [*a]\ninclude: *a"]
)
def test_a_block_that_holds_itself_gives_no_traceback(tmp_path: Path, text: str) -> None:
    message(tmp_path, text)


# --------------------------------------------------------------------------------------------------
# Digests: what reruns a stage.


def digests(folder: Path, content: Any) -> dict[tuple[str, int, str], str]:
    study = load(folder, content)
    return {job: study.stage_settings(*job).digest for job in study.jobs()}


def changed(folder: Path, content: Any) -> set[tuple[str, str]]:
    """(experiment, stage) whose digest is not that of WHOLE."""
    before, after = digests(folder, WHOLE), digests(folder, content)
    return {(name, stage) for (name, seed, stage), digest in before.items() if after[name, seed, stage] != digest}


EVERY_BASE = {("base", stage) for stage in STAGES} | {("taken", "finetune")}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("finetune.lr", 9.0, {("base", "finetune"), ("taken", "finetune")}),
        ("knn.k", [3], {("base", "knn"), ("floor", "knn")}),
        ("linear_probe.lrs", [0.3], {("base", "linear_probe")}),
        ("detection.iterations", 500, {("base", "detection")}),
        ("pretrain.epochs", 6, EVERY_BASE),  # and not the floor, which has random weights
        ("sampling.gamma", 1.0, EVERY_BASE),
        ("views.flip", 0.1, EVERY_BASE),
        ("dataset.train_limit", 900, {*EVERY_BASE, ("floor", "knn")}),
        ("encoder.qkv_bias", True, {*EVERY_BASE, ("floor", "knn")}),
        ("description", "other", set()),
        ("published", "cifar10-tiny-1600", set()),
        ("resources.knn.mem_mb", 1, set()),
    ],
)
def test_a_setting_changes_the_digests_of_the_stages_that_depend_on_it(
    tmp_path: Path, key: str, value: Any, expected: set[tuple[str, str]]
) -> None:
    assert changed(tmp_path, put(WHOLE, ("experiments", "base", *key.split(".")), value)) == expected


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("study",), "other"),
        (("results",), "elsewhere"),
        (("tracking_uri",), "http://localhost:5000"),
        (("sources", "cifar10", "path"), "/other"),
        (("resources", "default", "threads"), 8),
        (("experiments", "other"), {"inherits": "base"}),
    ],
)
def test_what_says_how_and_where_changes_no_digest(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    assert changed(tmp_path, put(WHOLE, path, value)) == set()


def test_renaming_an_experiment_changes_no_digest_and_another_seed_does(tmp_path: Path) -> None:
    before = digests(tmp_path, one(seeds=[0, 1]))
    after = digests(tmp_path, {"experiments": {"renamed": {"dataset": {"name": "digits"}, "seeds": [1, 0]}}})
    assert list(before.values()) != list(after.values())
    assert {(seed, stage): d for (_, seed, stage), d in before.items()} == {
        (seed, stage): d for (_, seed, stage), d in after.items()
    }
    assert len(set(before.values())) == len(before)


def test_a_default_written_out_changes_no_digest(tmp_path: Path) -> None:
    written = one(
        **{
            section: getattr(ExperimentSettings(dataset={"name": "digits"}), section).model_dump(mode="json")
            for section in ("encoder", "views", "sampling", "pretrain", "finetune", "linear_probe", "knn")
        }
    )
    assert digests(tmp_path, written) == digests(tmp_path, one())


def test_digests_are_those_of_finished_results() -> None:
    """A change of this value makes every finished result of every user stale: say so in the changelog."""
    study = load_study([], one(**MICRO))
    assert {stage: study.stage_settings("e", 0, stage).digest for _, _, stage in study.jobs()} == DIGESTS


DIGESTS = {
    "pretrain": "b892ac21af9e4d78",
    "finetune": "a2a42a9c501ace73",
    "linear_probe": "71f5f825cef25a00",
    "knn": "831af8c6ec819eb6",
}


# --------------------------------------------------------------------------------------------------


def test_every_stage_reads_blocks_that_an_experiment_has() -> None:
    for stage in STAGES:
        blocks = blocks_of(stage, "aps")
        assert stage in blocks and set(blocks) <= set(ExperimentSettings.model_fields)


def test_settings_cannot_be_changed_after_loading() -> None:
    study = load_study([], one())
    with pytest.raises(ValueError, match="frozen"):
        study.experiment("e").pretrain.epochs = 3  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------
# config/README.md.


def test_the_reference_for_users_is_made_of_the_settings() -> None:
    """`make reference` makes it again."""
    assert markdown() in (Path(__file__).parents[2] / "config" / "README.md").read_text()
    assert schema() == json.loads((Path(__file__).parents[2] / "config" / "schema.json").read_text())


def test_every_setting_is_described() -> None:
    assert not [row[0] for rows in tables().values() for row in rows if not row[3]]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "config").glob("*.yaml")), ids=lambda file: file.name
)
def test_the_schema_takes_every_study_of_the_project_and_refuses_a_misspelt_key(file: Path) -> None:
    if file.name == "published.yaml":
        return
    check = jsonschema.Draft202012Validator(schema())
    content = _read(file) | {"include": []}
    assert not list(check.iter_errors(json.loads(json.dumps(content))))
    assert list(check.iter_errors({"defaults": {"pretrain": {"epoch": 3}}}))


def test_the_schema_takes_what_the_settings_take_at_every_key() -> None:
    """It can't know what depends on other keys, so it takes more; but no name that can't be a folder."""
    check = jsonschema.Draft202012Validator(schema())
    whole = {**WHOLE, "datasets": {"own": {"folder": "x"}}}
    blocks = [("defaults", stage) for stage in STAGES]
    for path in [*list(paths(whole))[1:], *blocks]:
        for value in (None, True, 1, "x", []):
            content = put(whole, path, value)
            try:
                load_study([], content)
            except UserError:
                continue
            assert not (found := [error.message for error in check.iter_errors(content)]), (path, value, found)
    for content in (
        {"study": "data"},
        {"datasets": {"a b": {"folder": "x"}}},
        {"experiments": {"a/b": {}}},
        {"experiments": {"logs": {}}},
    ):
        with pytest.raises(UserError):
            load_study([], {**WHOLE, **content})
        assert list(check.iter_errors(content)), content


def test_the_example_for_users_loads(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "config" / "README.md").read_text()
    study = load(tmp_path, text.split("```yaml\n")[1].split("```")[0])
    assert study.experiment("random").sampling.strategy == "random" and study.study == "mine"


def test_an_override_of_an_experiment_that_is_none_is_refused_and_a_new_one_is_made_whole(tmp_path: Path) -> None:
    file = write(tmp_path, {"defaults": {"dataset": "digits"}, "experiments": {"aps": {}, "floor": None}})
    with pytest.raises(UserError) as caught:
        check_names([file], ["experiments.apps.knn.k=[3]"])
    assert str(caught.value) == (
        "--set experiments.apps.knn.k: the study has no experiment \"apps\"; did you mean 'aps'? (--set 'experiments.NAME={...}' "
        "makes a new one)"
    )
    for pairs in (["experiments.floor.knn.k=[3]"], ["experiments.new={}", "experiments.new.knn.k=[3]"], ["study=x"]):
        check_names([file], pairs)
