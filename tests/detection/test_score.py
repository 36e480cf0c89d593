"""COCO metrics, by pycocotools and by detectron2's evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from aps.detection.annotations import CocoSplit, result_rows
from aps.detection.engine import Task
from aps.detection.score import coco_metrics, metrics_by_key


def truth(val: CocoSplit) -> list[dict[str, Any]]:
    rows = []
    for index in range(len(val)):
        target = val.target(index)
        rows += result_rows(
            val, val.ids[index], target.boxes, torch.ones(len(target.labels)), target.labels, target.masks.bool()
        )
    return rows


def imperfect(val: CocoSplit, seed: int = 0) -> list[dict[str, Any]]:
    """Detections as a mediocre detector would make them: moved, missing, doubled, of the wrong class."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(len(val)):
        target = val.target(index)
        for box, label, mask in zip(target.boxes, target.labels, target.masks, strict=True):
            for _ in range(int(rng.integers(0, 4))):
                shift = rng.integers(-2, 3, size=2)
                moved = torch.roll(mask.bool(), tuple(shift.tolist()), dims=(0, 1))
                wrong = rng.random() < 0.2
                rows += result_rows(
                    val,
                    val.ids[index],
                    (box + torch.tensor([shift[1], shift[0]] * 2))[None],
                    torch.tensor([rng.random()]),
                    torch.tensor([(int(label) + wrong) % len(val.classes)]),
                    moved[None],
                )
    return rows


def test_the_truth_scores_a_hundred(val: CocoSplit):
    metrics = coco_metrics(val, truth(val))
    assert metrics["box_AP"] == metrics["mask_AP"] == pytest.approx(100)
    assert metrics["mask_AR100"] == pytest.approx(100) and min(metrics["per_class"]["mask_AP"].values()) > 99.9
    assert "box_AP_large" not in metrics  # there is no large digit


def test_nothing_found_scores_zero(val: CocoSplit):
    metrics, perfect = coco_metrics(val, []), coco_metrics(val, truth(val))
    assert set(metrics) == set(perfect) and set(metrics["per_class"]["box_AP"].values()) == {0.0}
    assert {value for key, value in metrics.items() if key != "per_class"} == {0.0}


def test_worse_detections_score_less(val: CocoSplit):
    rows = truth(val)
    half = [row for row in rows if row["image_id"] % 2]
    metrics = coco_metrics(val, half)
    assert 5 < metrics["mask_AP"] < 95
    assert coco_metrics(val, imperfect(val))["mask_AP"] < 60


def test_undefined_numbers_are_left_out():
    assert metrics_by_key("box", [0.5, -1, *[0.1] * 10]) == pytest.approx(
        {"box_AP": 50}
        | {
            f"box_{k}": 10
            for k in (
                "AP75",
                "AP_small",
                "AP_medium",
                "AP_large",
                "AR1",
                "AR10",
                "AR100",
                "AR_small",
                "AR_medium",
                "AR_large",
            )
        }
    )


@pytest.mark.detectron2
@pytest.mark.parametrize("seed", [0, 1])
def test_both_engines_evaluators_give_the_same_figures_for_the_same_detections(task: Task, seed: int):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from aps.detection.engines import detectron2, torchvision

    rows = imperfect(task.val, seed)
    ours, theirs = (module.Engine(task).score(rows) for module in (torchvision, detectron2))
    assert 1 < ours["mask_AP"] < 99 and 1 < ours["box_AP"] < 99
    assert theirs.pop("per_class") == {kind: pytest.approx(values) for kind, values in ours.pop("per_class").items()}
    assert theirs == pytest.approx(ours)


@pytest.mark.detectron2
def test_both_evaluators_score_nothing_found_as_zero(task: Task):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from aps.detection.engines import detectron2

    assert detectron2.Engine(task).score([]) == coco_metrics(task.val, [])
