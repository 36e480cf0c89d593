"""Datasets whose instances have boxes and no masks: no mask head, no mask AP, and it is said."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SETTINGS, stage_settings

from aps.data.manifest import Manifest, with_sizes
from aps.detection.annotations import CocoSplit, Target, result_rows
from aps.detection.augment import jitter
from aps.detection.engine import Task
from aps.detection.score import coco_metrics
from aps.detection.stage import plain_names, run, with_classes
from aps.results import StageJob, saved_run
from aps.settings.blocks import DetectionSettings

ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


@pytest.fixture(scope="session")
def boxes(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """manifest.json of the tiny dataset without its masks."""
    folder = tmp_path_factory.mktemp("boxes")
    for split in ("train", "val"):
        for name in (split, f"{split}.tsv"):
            (folder / name).symlink_to(manifest.parent / name)
        coco = json.loads((manifest.parent / f"instances_{split}.json").read_text())
        for annotation in coco["annotations"]:
            del annotation["segmentation"]
        (folder / f"instances_{split}.json").write_text(json.dumps(coco))
    bare = Manifest.read(manifest).model_copy(update={"masks": False})
    with_sizes(bare, folder).write(folder / "manifest.json")
    return folder / "manifest.json"


@pytest.fixture
def bare_task(task: Task, boxes: Path) -> Task:
    splits = {s: CocoSplit(boxes, s, training=s == "train") for s in ("train", "val")}
    return dataclasses.replace(task, **splits)


def build(name: str, task: Task) -> Any:
    if name == "detectron2":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    return importlib.import_module(f"aps.detection.engines.{name}").Engine(task)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_has_no_mask_head_and_trains_predicts_and_scores_boxes(bare_task: Task, engine: str) -> None:
    settings = SETTINGS.model_copy(update={"iterations": 20})
    built = build(engine, dataclasses.replace(bare_task, settings=settings))
    assert not [name for name, _ in built.model.named_parameters() if "mask" in name]
    logged: list[dict[str, float]] = []
    built.train(0, lambda done, losses: logged.append(losses) if losses else None)
    assert set(logged[0]) == {"loss", "loss_proposal_class", "loss_proposal_box", "loss_class", "loss_box"}
    found = built.predict([bare_task.val.read(0)])[0]
    assert found.masks is None and found.boxes.shape == (len(found.scores), 4)
    metrics, rows = built.evaluate()
    assert all(set(row) == {"image_id", "category_id", "bbox", "score"} for row in rows)
    assert "box_AP" in metrics and not [key for key in metrics if key.startswith("mask")]
    assert set(metrics["per_class"]) == {"box_AP"}


@pytest.mark.parametrize("engine", ENGINES)
def test_with_masks_the_same_engine_has_its_mask_head(task: Task, engine: str) -> None:
    assert [name for name, _ in build(engine, task).model.named_parameters() if "mask" in name]


def test_the_stage_says_that_there_is_no_mask_ap(
    boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    settings = stage_settings(iterations=20)
    run(StageJob(settings=settings, manifest=boxes, out=tmp_path / "out", checkpoints=saved_run(tmp_path, settings, boxes, None)))  # fmt: skip
    assert "instances have boxes only, so there is no mask head and no mask AP" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["masks"] is False and "box_AP" in result["metrics"] and "mask_AP" not in result["metrics"]
    assert (tmp_path / "out" / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_perfect_boxes_score_100(boxes: Path) -> None:
    val = CocoSplit(boxes, "val", training=False)
    rows: list[dict[str, Any]] = []
    for index in range(len(val)):
        target = val.target(index)
        rows += result_rows(val, val.ids[index], target.boxes, torch.ones(len(target.labels)), target.labels, None)
    metrics = coco_metrics(val, rows)
    assert metrics["box_AP"] == pytest.approx(100) and "mask_AP" not in metrics
    assert coco_metrics(val, [])["box_AP"] == 0


def test_jitter_moves_boxes_as_it_moves_the_masks_that_they_bound() -> None:
    """A rectangle is its own box, so both ways must agree but for the pixels that resizing rounds."""
    masks = torch.zeros(2, 40, 60, dtype=torch.uint8)
    masks[0, 10:30, 20:50] = 1
    masks[1, 3:9, 2:12] = 1
    image = (masks[0] * 200).expand(3, -1, -1).contiguous()
    given, labels = torch.tensor([[20.0, 10, 50, 30], [2, 3, 12, 9]]), torch.tensor([4, 2])
    settings = DetectionSettings(image_size=60, jitter_scale=(0.3, 2.0))
    seen = set()
    for seed in range(60):
        (image1, with_masks), (image2, without) = (
            jitter(image, Target(given, labels, m), settings, torch.Generator().manual_seed(seed))
            for m in (masks, None)
        )
        assert torch.equal(image1, image2) and without.masks is None
        expected = dict(zip(with_masks.labels.tolist(), with_masks.boxes, strict=True))
        for label, box in zip(without.labels.tolist(), without.boxes, strict=True):
            assert (box - expected[label]).abs().max() <= 1
        lost = set(expected) - set(without.labels.tolist())  # a sliver thinner than a pixel
        assert all((expected[label][2:] - expected[label][:2]).min() <= 2 for label in lost)
        seen.add(len(without.labels))
    assert seen == {0, 1, 2} or seen == {1, 2}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["cat", "traffic light"], ["cat", "traffic light"]),
        (["猫", "犬"], ["猫", "犬"]),
        (["кот", "пёс", "naïve"], ["кот", "пёс", "naïve"]),
        (["a/b", "a:b", "a_b"], ["a_b", "a_b 2", "a_b 3"]),
        (["?", "!", "."], ["_", "_ 2", "_ 3"]),
        (["กา", "ก่า"], ["กา", "ก_า"]),
        (["a?", "a!", "a_ 2"], ["a_", "a_ 2", "a_ 2 2"]),
    ],
)
def test_class_names_in_any_script_keep_their_metrics_apart(labels: list[str], names: list[str]) -> None:
    assert [plain_names(labels)[label] for label in labels] == names


def test_metrics_of_classes_in_any_script_are_taken_by_mlflow(tmp_path: Path) -> None:
    from mlflow.utils.validation import _validate_metric_name

    labels = ["猫", "犬", "a/b", "a:b", "..", ".", " ", "ก่า", "x" * 400, "x" * 400 + "y", "e\u0301", "\u00e9"]
    per_class = {"box_AP": {label: float(number) for number, label in enumerate(labels)}}
    found = with_classes({"box_AP": 50.0, "per_class": per_class})
    assert sorted(found.values()) == sorted([50.0, *map(float, range(len(labels)))])
    for key in found:
        _validate_metric_name(key)
