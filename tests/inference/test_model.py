"""What a loaded network says: embeddings, classes, boxes, attention; and what it cannot, in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from aps.detection.annotations import CocoSplit, result_rows
from aps.detection.engine import Prediction
from aps.errors import UserError
from aps.inference.convert import class_attention
from aps.inference.load import load
from aps.inference.model import Detector, Model


def some(count: int, side: int = 40) -> list[Tensor]:
    return [torch.rand(3, side, side + i % 3, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_batches_of_any_size_give_the_same_embeddings_in_order(stages: Path) -> None:
    model, images = load(stages / "pretrain"), some(7)
    whole = model.embed(images)
    assert whole.shape == (7, 48) and whole.dtype == torch.float32 and not whole.requires_grad
    for batch_size in (1, 3, 100):
        assert torch.allclose(model.embed(images, batch_size=batch_size), whole, atol=1e-5)
    assert torch.allclose(model.embed(images[3]), whole[3:4], atol=1e-5)


def test_what_a_batch_gives_holds_no_more_memory_than_it_shows(stages: Path) -> None:
    """A view of the class token would keep every token of every image until the last batch."""
    model = load(stages / "finetune")
    for compute in (model.features_of, model.attention_of, model.probabilities_of):
        for count in (1, 5):
            found = compute([torch.rand(3, 32, 32) for _ in range(count)])
            assert found.untyped_storage().nbytes() == found.nbytes


def test_mixed_images_are_embedded_together(stages: Path, finished: Path) -> None:
    model, file = load(stages / "pretrain"), finished / "photos/red/000.jpg"
    found = model.embed([file, str(file), PIL.Image.open(file), some(1)[0]])
    assert torch.equal(found[0], found[1]) and torch.allclose(found[0], found[2], atol=0.05)
    assert not torch.allclose(found[0], found[3], atol=0.05)


def test_a_wrong_image_among_many_is_named(stages: Path) -> None:
    with pytest.raises(UserError, match="image 2 has shape"):
        load(stages / "pretrain").embed([*some(2), torch.zeros(5, 5, 5)])


def test_predictions_are_probabilities_in_the_order_of_the_classes(stages: Path) -> None:
    model = load(stages / "finetune")
    found = model.predict(some(5))
    assert found.probabilities.shape == (5, 3) and torch.allclose(found.probabilities.sum(1), torch.ones(5))
    assert found.classes == [model.classes[i] for i in found.probabilities.argmax(1)]
    for best, top, row in zip(found.classes, found.top(2), found.probabilities, strict=True):
        assert top[0] == (best, pytest.approx(float(row.max()))) and len(top) == 2 and top[0][1] >= top[1][1]
    assert len(found.top(99)[0]) == 3


def test_progress_is_shown_for_many_images_and_not_for_few(stages: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load(stages / "pretrain")
    model.embed(some(3))
    assert "embed" not in capfd.readouterr().err
    model.embed(some(3), batch_size=2)
    assert "embed by pretrain" in capfd.readouterr().err


def test_attention_is_what_the_class_token_gives_each_patch(stages: Path) -> None:
    model, images = load(stages / "pretrain"), some(3)
    assert isinstance(model, Model)
    for block in (-1, 0, 1):
        maps = model.attention(images, block)
        assert maps.shape == (3, 3, 4, 4) and bool((maps >= 0).all())
        assert bool((maps.sum((2, 3)) < 1).all())  # the rest goes to the class token itself
    assert torch.equal(model.attention(images), model.attention(images, 1))


def test_attention_weights_reproduce_what_the_layer_computes(stages: Path) -> None:
    model = load(stages / "pretrain")
    layer = model.network.blocks[1].attn
    x = torch.randn(2, 17, 48)
    B, N, _ = x.shape
    q, k, v = layer.qkv(x).view(B, N, 3, 3, 16).permute(2, 0, 3, 1, 4)
    full = (q @ k.transpose(-2, -1) / 4).softmax(-1)
    out = layer.proj((full @ v).transpose(1, 2).reshape(B, N, 48))
    assert torch.allclose(out, layer(x), atol=1e-5)
    assert torch.allclose(class_attention(layer, x, 1).flatten(2), full[:, :, 0, 1:], atol=1e-6)


def test_a_block_that_is_not_there_is_a_sentence(stages: Path) -> None:
    with pytest.raises(UserError, match="block 2: the network has blocks 0 to 1"):
        load(stages / "pretrain").attention(some(1), block=2)


def test_detections_are_those_that_the_stage_scored(finished: Path, stages: Path) -> None:
    model = load(stages / "detection")
    assert isinstance(model, Detector)
    split = CocoSplit(finished / "results/data/digits_coco/manifest.json", "val", training=False)
    stored = json.loads((stages / "detection/predictions.json").read_text())
    indices = range(4)  # in the stage's own batches of two, so that nearly equal scores keep their order
    found = model.detect([split.path(i) for i in indices], threshold=0.0, batch_size=2)
    rows = []
    for i, own in zip(indices, found, strict=True):
        labels = torch.tensor([model.classes.index(name) for name in own.labels])
        rows += result_rows(split, split.ids[i], own.boxes, own.scores, labels, own.masks)
    expected = [row for row in stored if row["image_id"] in {split.ids[i] for i in indices}]
    assert len(rows) == len(expected) and {row["image_id"] for row in rows} == {split.ids[i] for i in indices}
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["category_id"] == theirs["category_id"] and ours["segmentation"] == theirs["segmentation"]
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2) and ours["score"] == pytest.approx(
            theirs["score"], abs=1e-3
        )


@pytest.mark.parametrize("wrong", [0, -1, 1.5, float("nan"), "8", True, None])
@pytest.mark.parametrize("verb", ["embed", "predict", "attention", "detect"])
def test_a_batch_size_that_is_none_is_a_sentence(stages: Path, verb: str, wrong: Any) -> None:
    model = load(stages / ("detection" if verb == "detect" else "finetune"))
    with pytest.raises(UserError, match=rf"^batch_size is {wrong!r}; give a whole number from 1$"):
        getattr(model, verb)(some(1), batch_size=wrong)


def test_numbers_of_other_libraries_and_large_ones_are_taken(stages: Path) -> None:
    model = load(stages / "finetune")
    for batch_size in (np.int64(1), torch.tensor(1), 10**30):
        assert model.embed(some(2), batch_size=batch_size).shape == (2, 48)
    assert len(model.predict(some(1)).top(10**30)[0]) == 3
    assert load(stages / "detection").detect(some(1), threshold=np.float32(0.5)) is not None


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True, None])
def test_a_number_of_classes_that_is_none_is_a_sentence(stages: Path, wrong: Any) -> None:
    with pytest.raises(UserError, match=rf"^k is {wrong!r}; give a whole number from 1$"):
        load(stages / "finetune").predict(some(1)).top(wrong)


@pytest.mark.parametrize("wrong", [0.0, "0", None, True])
def test_a_block_that_is_no_number_is_a_sentence(stages: Path, wrong: Any) -> None:
    with pytest.raises(UserError, match=rf"^block is {wrong!r}; give a whole number$"):
        load(stages / "pretrain").attention(some(1), block=wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True, None])
def test_a_threshold_that_no_score_has_is_a_sentence(stages: Path, wrong: Any) -> None:
    with pytest.raises(UserError, match=rf"^threshold is {wrong!r}; give a number from 0 to 1$"):
        load(stages / "detection").detect(some(1), threshold=wrong)


def test_a_threshold_leaves_out_what_scores_less(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever so small a detector finds: here it is given two detections of each image."""
    model, image = load(stages / "detection"), some(1, 60)[0]
    boxes, masks = torch.tensor([[1.0, 2, 30, 40], [5, 5, 20, 20]]), torch.zeros(2, *image.shape[1:], dtype=torch.bool)
    found = Prediction(boxes, torch.tensor([0.8, 0.3]), torch.tensor([2, 0]), masks)
    monkeypatch.setattr(model.engine, "predict", lambda images: [found for _ in images])
    assert len(model.detect(image, threshold=0.0)[0]) == 2
    few = model.detect(image, threshold=0.5)[0]
    assert few.scores.tolist() == pytest.approx([0.8]) and few.labels == [model.classes[2]]
    assert few.boxes.tolist() == [[1, 2, 30, 40]] and few.masks.shape == (1, *image.shape[1:])


CANNOT = [
    ("pretrain", "predict", "has no classifier, so it can't predict classes; load the folder of a finetune"),
    ("pretrain", "detect", "has no detector, so it can't detect objects; load the folder of a detection stage"),
    ("finetune", "detect", "has no detector, so it can't detect objects; load the folder of a detection stage"),
    ("detection", "embed", "is a detector, so it can't embed images; load a pretrained"),
    ("detection", "predict", "is a detector, so it can't predict classes; load the folder of a finetune"),
    ("detection", "attention", "is a detector, so it can't show attention"),
    ("detection", "transform", "is a detector, so it can't prepare images"),
    ("detection", "to_timm", "is a detector, so it can't become a timm model"),
    ("detection", "to_onnx", "is a detector, so it can't become an ONNX file"),
]


@pytest.mark.parametrize(("stage", "verb", "message"), CANNOT, ids=[f"{a} {b}" for a, b, _ in CANNOT])
def test_what_a_network_is_not_made_for_is_a_sentence(stages: Path, stage: str, verb: str, message: str) -> None:
    arguments: dict[str, Any] = {"to_onnx": ["out.onnx"], "to_timm": []}
    with pytest.raises(UserError, match=message):
        getattr(load(stages / stage), verb)(*arguments.get(verb, some(1)))


def test_weights_have_one_digest_wherever_they_lie(stages: Path, tmp_path: Path) -> None:
    assert (
        load(stages / "pretrain").digest
        == load(stages / "pretrain/encoder.safetensors").digest
        == load(stages / "knn").digest
    )
    assert load(stages / "pretrain").digest != load(stages / "finetune").digest
