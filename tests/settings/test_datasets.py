"""A study's own datasets, a dataset for each stage, and numbers as people write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from aps.errors import UserError
from aps.settings.blocks import SourceSettings, UserDataset, minutes
from aps.settings.reading import load_study, parse_overrides, read_value
from aps.settings.reference import schema
from aps.settings.study import StageSettings, Study

ENCODER = {"arch": "micro", "image_size": 16, "patch_size": 4}
COCO = {split: {"images": f"{split}/", "annotations": f"{split}.json"} for split in ("train", "val")}
OWN = {
    "pool": {"folder": "/data/pool", "labels": False},
    "eval": {"folder": "/data/labelled"},
    "scans": {"arrays": "/data/scans.npz"},
    "cells": {"coco": COCO},
}


def load(tmp_path: Path, **content: Any) -> Study:
    text = yaml.safe_dump({"datasets": OWN, "defaults": {"encoder": ENCODER}} | content, sort_keys=False)
    (tmp_path / "study.yaml").write_text(text)
    return load_study([tmp_path / "study.yaml"])


def one(tmp_path: Path, **settings: Any) -> Study:
    return load(tmp_path, experiments={"e": settings})


def test_pretraining_on_one_and_evaluating_on_another_takes_three_lines(tmp_path: Path) -> None:
    study = one(tmp_path, dataset="pool", finetune={"dataset": "eval"}, knn={"dataset": "eval"}, linear_probe={"dataset": "scans"})  # fmt: skip
    names = {stage: study.stage_settings("e", 0, stage).dataset_name for stage in study.experiments["e"].stages}
    assert names == {"pretrain": "pool", "finetune": "eval", "linear_probe": "scans", "knn": "eval"}
    assert study.dataset_names() == ["eval", "pool", "scans"]
    assert study.source("pool") == UserDataset(folder="/data/pool", labels=False)
    assert study.source("digits") == SourceSettings()


def test_a_stages_dataset_may_have_settings_of_its_own(tmp_path: Path) -> None:
    study = one(tmp_path, dataset={"name": "pool", "train_limit": 1000}, stages=["pretrain", "knn", "finetune"],
                knn={"dataset": {"name": "eval", "train_limit": 7}}, finetune={"dataset": "eval"})  # fmt: skip
    assert study.stage_settings("e", 0, "pretrain").dataset.train_limit == 1000
    assert study.stage_settings("e", 0, "knn").dataset.train_limit == 7
    finetuned = study.stage_settings("e", 0, "finetune").dataset
    # as the encoder saw its images, unless it says otherwise
    assert (finetuned.name, finetuned.train_limit, finetuned.statistics) == ("eval", None, "encoder")


def test_a_stages_dataset_inherits_and_is_overridden_like_the_others(tmp_path: Path) -> None:
    study = load(tmp_path, defaults={"encoder": ENCODER, "dataset": "pool", "stages": ["pretrain", "knn"], "knn": {"dataset": "eval"}},
                 experiments={"a": {}, "b": {"knn": {"dataset": {"train_limit": 5}}}, "c": {"inherits": "b", "knn": {"dataset": "scans"}}})  # fmt: skip
    found = {name: study.stage_settings(name, 0, "knn").dataset for name in "abc"}
    assert [(d.name, d.train_limit) for d in found.values()] == [("eval", None), ("eval", 5), ("scans", 5)]


def test_the_dataset_of_a_stage_is_in_its_digest_and_travels_as_json(tmp_path: Path) -> None:
    plain = one(tmp_path, dataset="eval").stage_settings("e", 0, "knn")
    named = one(tmp_path, dataset="pool", stages=["pretrain", "knn"], knn={"dataset": {"name": "eval", "statistics": "measured"}})  # fmt: skip
    mine = named.stage_settings("e", 0, "knn")
    assert mine.dataset == plain.dataset
    back = StageSettings.from_json(mine.to_json())
    assert back.dataset == mine.dataset and back.digest == mine.digest
    assert "dataset" not in json.loads(mine.to_json())["knn"]
    other = one(tmp_path, dataset="pool", stages=["pretrain", "knn"], knn={"dataset": "scans"}).stage_settings("e", 0, "knn")  # fmt: skip
    assert other.digest != mine.digest
    pretraining = {study.stage_settings("e", 0, "pretrain").digest for study in (named, one(tmp_path, dataset="pool", stages=["pretrain"]))}  # fmt: skip
    assert len(pretraining) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "finetune without labels": (
        {"experiments": {"e": {"dataset": "pool"}}},
        "experiment 'e': finetune needs labels and dataset 'pool' has none (datasets.pool.labels: false); give the stage a "
        "labelled dataset by finetune.dataset, or remove it from stages",
    ),
    "knn of its own without labels": (
        {"experiments": {"e": {"dataset": "eval", "stages": ["pretrain", "knn"], "knn": {"dataset": "pool"}}}},
        "experiment 'e': knn needs labels and knn.dataset 'pool' has none",
    ),
    "pretraining on boxes": (
        {"experiments": {"e": {"dataset": "cells", "stages": ["pretrain"]}}},
        "pretrain needs images of classes or without labels, and dataset 'cells' is for detection; name another dataset",
    ),
    "detection without boxes": (
        {"experiments": {"e": {"dataset": "eval", "stages": ["detection"], "detection": {"dataset": "eval"}}}},
        "detection needs images with boxes, and detection.dataset 'eval' is for classification",
    ),
    "unknown": (
        {"experiments": {"e": {"dataset": "pol", "stages": ["pretrain"]}}},
        "dataset 'pol' is unknown; did you mean 'pool'?",
    ),
    "unknown of a stage": (
        {"experiments": {"e": {"dataset": "eval", "knn": {"dataset": "scan"}}}},
        "knn.dataset 'scan' is unknown; did you mean 'scans'?",
    ),
    "unknown of detection": (
        {"experiments": {"e": {"dataset": "eval", "stages": ["detection"], "detection": {"dataset": "cell"}}}},
        "detection.dataset 'cell' is unknown; did you mean 'cells'?",
    ),
    "published statistics": (
        {"experiments": {"e": {"dataset": {"name": "eval", "statistics": "published"}, "stages": ["pretrain"]}}},
        "dataset 'eval' is your own, so it has no published statistics; set dataset.statistics: measured",
    ),
    "shrunk below the encoder's size": (
        {
            "datasets": {"small": {"folder": "a", "shrink": 31}},
            "experiments": {"e": {"dataset": "small", "stages": ["pretrain"], "encoder": {"image_size": 32, "patch_size": 4}}},
        },
        "dataset 'small' keeps 31 pixels on the shorter side (datasets.small.shrink), fewer than encoder.image_size 32; raise",
    ),
    "an encoder's statistics for pretraining": (
        {"experiments": {"e": {"dataset": {"name": "eval", "statistics": "encoder"}}}},
        "dataset.statistics is 'encoder' but stages lists pretrain, which starts from none",
    ),
    "a known name": ({"datasets": {"digits": {"folder": "x"}}}, "datasets.digits has the name of a known dataset"),
    "a source too": ({"sources": {"pool": {"path": "x"}}}, "sources names dataset 'pool', which datasets.pool describes"),
    "no source": ({"datasets": {"x": {}}}, "datasets.x: names no source; give one of folder (a tree of images), arrays"),
    "two sources": (
        {"datasets": {"x": {"folder": "a", "arrays": "b"}}},
        "datasets.x: names folder and arrays; give one of folder",
    ),
    "coco without labels": ({"datasets": {"x": {"coco": COCO, "labels": False}}}, "labels: false is for folder and arrays"),
    "masks of a folder": ({"datasets": {"x": {"folder": "a", "masks": False}}}, "datasets.x: masks: false is for coco"),
    "arrays that shrink": ({"datasets": {"x": {"arrays": "a.npz", "shrink": 64}}}, "datasets.x: shrink is for folder; remove it"),
    "shrunk to nothing": ({"datasets": {"x": {"folder": "a", "shrink": 2}}}, "datasets.x.shrink"),
    "a folder without a name": ({"datasets": {"x": {"folder": ""}}}, "datasets.x.folder"),
    "a file without a name": ({"datasets": {"x": {"arrays": ""}}}, "datasets.x.arrays"),
    "images without a name": (
        {"datasets": {"x": {"coco": {**COCO, "val": {"images": "", "annotations": "b"}}}}}, "datasets.x.coco.val.images",
    ),
    "annotations without a name": (
        {"datasets": {"x": {"coco": {**COCO, "val": {"images": "a", "annotations": ""}}}}}, "datasets.x.coco.val.annotations",
    ),
    "a source without a name": ({"sources": {"cifar10": {"path": ""}}}, "sources.cifar10.path"),
    "coco without val": ({"datasets": {"x": {"coco": {"train": COCO["train"]}}}}, "'datasets.x.coco.val' is missing; add it"),
    "a misspelt key": ({"datasets": {"x": {"foldr": "a"}}}, "unknown key 'datasets.x.foldr'; did you mean 'datasets.x.folder'?"),
    "a misspelt key of coco": (
        {"datasets": {"x": {"coco": {**COCO, "val": {"images": "a", "anotations": "b"}}}}},
        "unknown key 'datasets.x.coco.val.anotations'; did you mean 'datasets.x.coco.val.annotations'?",
    ),
    "a name that is no folder": ({"datasets": {"a/b": {"folder": "x"}}}, "datasets.a/b"),
}  # fmt: skip


@pytest.mark.parametrize("rule", REFUSED)
def test_what_can_not_be_is_one_sentence_at_planning(tmp_path: Path, rule: str) -> None:
    content, said = REFUSED[rule]
    with pytest.raises(UserError) as found:
        load(tmp_path, **({"experiments": {"e": {"dataset": "digits"}}} | content))
    assert said in str(found.value) and "\n" not in str(found.value) and "study.yaml" in str(found.value)


def test_an_unlabelled_dataset_may_ask_for_knn_readings_which_are_then_off(tmp_path: Path) -> None:
    one(tmp_path, dataset="pool", stages=["pretrain"], pretrain={"knn_every": 1})


def test_editors_know_the_new_keys(tmp_path: Path) -> None:
    study = {
        "datasets": OWN,
        "resources": {"default": {"runtime": "36h"}, "knn": {"runtime": 30}},
        "experiments": {
            "e": {"dataset": "pool", "knn": {"dataset": "eval"}, "finetune": {"dataset": {"name": "eval"}}}
        },
    }
    jsonschema.validate(study, schema())
    for wrong in ({"datasets": {"x": {"foldr": "a"}}}, {"experiments": {"e": {"knn": {"dataset": 3}}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())


def test_the_identity_of_own_data_is_what_makes_them_and_not_how_they_are_looked_at() -> None:
    one = UserDataset(folder="a")
    assert one.identity == UserDataset(folder="a", trust=True).identity
    assert len({one.identity, UserDataset(folder="b").identity, UserDataset(folder="a", labels=False).identity}) == 3
    assert UserDataset.from_json(one.model_dump_json(exclude_defaults=True)) == one


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("007", 7), ("-08", -8), ("+012", 12), ("1_000", 1000), ("0x10", 16), ("0o10", 8), ("0b11", 3), ("0", 0),
        ("24:00:00", "24:00:00"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("190:20:30", "190:20:30"),
        ("1e-3", 0.001), ("1.5", 1.5), (".5", 0.5), ("01.5", 1.5), ("1.", 1.0), ("1.5e+3", 1500.0), ("-.5", -0.5),
        ("1-12:00:00", "1-12:00:00"), ("36h", "36h"), ("[010, 9]", [10, 9]), ("1.2.3", "1.2.3"), ("0x", "0x"), ("09a", "09a"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_mean_them(text: str, value: Any) -> None:
    found = read_value(text, "here")
    assert found == value and type(found) is type(value)


def test_seeds_with_a_leading_zero_are_decimal(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("experiments: {e: {dataset: digits, seeds: [010, 08]}}")
    assert load_study([tmp_path / "s.yaml"]).experiments["e"].seeds == (10, 8)
    overrides = parse_overrides(["defaults.pretrain.epochs=020"])
    assert load_study([tmp_path / "s.yaml"], overrides).experiments["e"].pretrain.epochs == 20


@pytest.mark.parametrize("text", ["24:00:00", "1:30"])
def test_a_number_of_base_sixty_is_refused_where_a_number_is_meant(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(f"experiments: {{e: {{dataset: digits, pretrain: {{epochs: {text}}}}}}}")
    with pytest.raises(UserError, match=f'pretrain.epochs = "{text}": should be a whole number'):
        load_study([tmp_path / "s.yaml"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-12:00:00", 2160), ("24:00:00", 1440), ("12:00:01", 721), ("36h", 2160), ("90m", 90), ("90min", 90), ("2d", 2880),
        ("1h30m", 90), ("1d 2h", 1560), ("1.5h", 90), ("30:00", 30), ("30:30", 31), ("1-6", 1800), ("1-6:30", 1830),
        ("120", 120), (120, 120), (" 36H ", 2160), ("0.5m", 1),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_and_people_write_them(text: Any, expected: int, tmp_path: Path) -> None:
    assert minutes(text) == expected
    shown = json.dumps(text)
    (tmp_path / "s.yaml").write_text(
        f"resources: {{knn: {{runtime: {shown}}}}}\nexperiments: {{e: {{dataset: digits}}}}"
    )
    assert load_study([tmp_path / "s.yaml"]).stage_resources("knn").runtime == expected


def test_a_time_limit_needs_no_quotes(tmp_path: Path) -> None:
    for text, expected in (("1-12:00:00", 2160), ("24:00:00", 1440), ("36h", 2160), ("0090", 90)):
        (tmp_path / "s.yaml").write_text(
            f"resources: {{knn: {{runtime: {text}}}}}\nexperiments: {{e: {{dataset: digits}}}}"
        )
        assert load_study([tmp_path / "s.yaml"]).stage_resources("knn").runtime == expected


@pytest.mark.parametrize("text", ["soon", "", "1w", "1:2:3:4", "h", "-5", "1-", "1.2.3h", "0", "0h"])
def test_what_is_no_time_limit_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        f"resources: {{knn: {{runtime: '{text}'}}}}\nexperiments: {{e: {{dataset: digits}}}}"
    )
    with pytest.raises(UserError, match=r"s.yaml: resources.knn.runtime(: '.*' is no time limit; write minutes|.*should be greater than 0)"):  # fmt: skip
        load_study([tmp_path / "s.yaml"])
