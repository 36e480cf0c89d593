"""What the engines share: schedule, decay, data, interface. Those of detectron2 are skipped aloud without it."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
import torch

import aps.detection
from aps.detection import check_engine, load_engine
from aps.detection.annotations import CocoSplit, Target, image_at
from aps.detection.augment import jitter
from aps.detection.engine import Engine, Task, lr_factor
from aps.errors import UserError
from aps.registry import ENGINES as REGISTERED
from aps.settings.blocks import DetectionSettings

ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


def build(name: str, task: Task) -> Engine:
    if name == "detectron2":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    return importlib.import_module(f"aps.detection.engines.{name}").Engine(task)


def test_every_engine_file_is_a_name_of_the_settings():
    assert REGISTERED.names() == ["detectron2", "torchvision"]


def test_a_missing_library_is_one_sentence_with_the_install_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aps.detection, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"detectron2 is not installed; install it by `pip install --no-build-isolation"
    ):
        check_engine("detectron2")
    check_engine("torchvision")


def test_a_library_built_for_another_torch_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aps.detection, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "aps.detection.engines.detectron2", raising=False)
    monkeypatch.setitem(sys.modules, "detectron2.config", None)
    with pytest.raises(UserError, match=r"detectron2 is installed but does not import \(.*\); build it for the torch"):
        load_engine("detectron2")


def test_checking_an_engine_imports_neither_torch_nor_detectron2():
    import subprocess

    code = "import sys, aps.detection as d; d.check_engine('torchvision'); sys.exit(bool({'torch', 'detectron2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_learning_rate_warms_up_and_drops_where_the_recipe_says():
    recipe = DetectionSettings()
    assert lr_factor(recipe, 0) == 0.001
    assert lr_factor(recipe, 125) == pytest.approx(0.5005)
    assert lr_factor(recipe, 250) == lr_factor(recipe, 163888) == 1
    assert lr_factor(recipe, 163889) == pytest.approx(0.1) == lr_factor(recipe, 177545)
    assert lr_factor(recipe, 177546) == pytest.approx(0.01) == lr_factor(recipe, 184374)


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "changes", [{"lr_drops": (0.7, 0.9)}, {"warmup_iterations": 0}, {"lr_drops": ()}, {"lr_drops": (0.5, 1.0)}], ids=str
)
def test_detectron2s_schedule_is_ours_at_every_iteration(changes: dict[str, object]):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import instantiate

    from aps.detection.engines.detectron2 import schedule_config

    settings = DetectionSettings(**{"iterations": 400, "warmup_iterations": 30, **changes})
    theirs = instantiate(schedule_config(settings))
    for iteration in range(400):
        assert theirs(iteration / 400) == pytest.approx(lr_factor(settings, iteration)), iteration


def decays(engine: Engine) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of each parameter by name."""
    names = {parameter: name for name, parameter in engine.model.named_parameters()}
    optimizer = engine.trainer.optimizer if hasattr(engine, "trainer") else engine.optimizer
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_learning_rates_decay_layer_by_layer_and_norms_and_positions_are_not_decayed(task: Task):
    found = decays(build("torchvision", task))
    settings = task.settings
    assert found["backbone.net.pos_embed"] == (pytest.approx(settings.lr * 0.7**3), 0)
    assert found["backbone.net.patch_embed.proj.weight"] == (pytest.approx(settings.lr * 0.7**3), 0.1)
    assert found["backbone.net.blocks.0.attn.qkv.weight"] == (pytest.approx(settings.lr * 0.7**2), 0.1)
    assert found["backbone.net.blocks.1.attn.rel_pos_h"] == (pytest.approx(settings.lr * 0.7), 0.1)
    assert found["backbone.net.blocks.1.norm1.weight"] == (pytest.approx(settings.lr * 0.7), 0)
    assert found["backbone.simfp_1.0.weight"] == (settings.lr, 0.1)
    assert found["roi_heads.mask_head.0.0.weight"] == (settings.lr, 0.1)
    assert set(found) == {name for name, _ in build("torchvision", task).model.named_parameters()}


@pytest.mark.detectron2
def test_both_engines_give_every_backbone_parameter_the_same_rate_and_decay(task: Task):
    ours, theirs = (
        {
            name: pytest.approx(value)
            for name, value in decays(build(name, task)).items()
            if name.startswith("backbone.")
        }
        for name in ("torchvision", "detectron2")
    )
    assert set(ours) == set(theirs)
    assert all(ours[name].expected == theirs[name] for name in ours)


@pytest.mark.detectron2
def test_both_engines_have_as_many_parameters(task: Task):
    def count(name: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        for key, parameter in build(name, task).model.named_parameters():
            part = key.split(".")[0].replace("proposal_generator", "rpn")
            counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    ours, theirs = count("torchvision"), count("detectron2")
    assert ours["backbone"] == theirs["backbone"] and ours["rpn"] == theirs["rpn"]
    # torchvision predicts boxes for background too and has biases in front of no norm; nothing else may differ
    assert abs(ours["roi_heads"] - theirs["roi_heads"]) < 0.02 * theirs["roi_heads"]


@pytest.mark.detectron2
@pytest.mark.parametrize("limit", [None, 5])
def test_both_engines_train_on_the_same_images_in_the_same_order(task: Task, limit: int | None):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from aps.detection.engines import detectron2, torchvision

    plain = dataclasses.replace(
        task,
        settings=task.settings.model_copy(update={"jitter_scale": (1.0, 1.0), "flip": 0.0}),
        train=CocoSplit(task.train.manifest, "train", training=True, limit=limit),
    )
    assert len(plain.train) == (limit or 24)
    detectron2.register(plain.train)
    loader = iter(detectron2.loader(plain, start=3))
    samples = torchvision._Samples(plain)
    for position in range(6, 12):
        if position % 2 == 0:
            batch = next(loader)
        image, target = samples[position]
        theirs = batch[position % 2]
        assert theirs["image_id"] == plain.train.ids[image_at(position, len(plain.train), plain.seed)]
        assert torch.equal(theirs["image"], image)
        instances = theirs["instances"]
        assert torch.equal(instances.gt_boxes.tensor, target["boxes"]) and torch.equal(
            instances.gt_classes, target["labels"] - 1
        )
        assert torch.equal(instances.gt_masks.tensor, target["masks"].bool())


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_trains_predicts_and_goes_on_from_its_state_as_if_undisturbed(
    task: Task, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("aps.detection.engine.LOG_EVERY", 1)
    whole, states = build(name, task), {}
    losses: dict[int, float] = {}

    def keep(done: int, found: dict[str, float] | None) -> None:
        if done == 22:
            states["middle"] = copied(whole.state())
        if found:
            losses[done] = found["loss"]

    whole.train(0, keep)
    curve = list(losses.values())
    assert list(losses) == list(range(1, 46)) and sum(curve[-10:]) < 0.9 * sum(curve[:10])
    again, resumed = build(name, task), {}
    start = again.resume(states["middle"])
    assert start == 22
    again.train(start, lambda done, found: resumed.update({done: found["loss"]} if found else {}))
    assert resumed == {done: loss for done, loss in losses.items() if done > 22}
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    found = whole.predict([task.val.read(0), task.val.read(1)[:, :20]])
    assert [x.masks.shape[1:] for x in found] == [(32, 32), (20, 32)]
    for prediction in found:
        assert len(prediction.boxes) == len(prediction.scores) == len(prediction.labels) == len(prediction.masks)
        assert (
            prediction.masks.dtype == torch.bool and (prediction.labels >= 0).all() and (prediction.labels < 10).all()
        )
        assert (prediction.scores.diff() <= 0).all()


def copied(state: object) -> object:
    """As a checkpoint gives it back: through a file, without arbitrary code."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ENGINES)
def test_at_the_start_both_engines_predict_from_the_same_backbone_features(task: Task, name: str):
    """The stage's preprocessing: normalization, square padding, names of the levels."""
    engine = build(name, task)
    engine.model.eval()
    image = task.val.read(0)[:, :24]
    seen = []
    engine.model.backbone.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    engine.predict([image])
    expected = torch.zeros(1, 3, 32, 32)
    expected[0, :, :24] = (image.float() / 255 - 0.2) / 0.3
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_images_are_scaled_in_evaluation_as_in_training(task: Task, name: str):
    engine = build(name, task)
    image = torch.randint(0, 256, (3, 64, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    still = task.settings.model_copy(update={"jitter_scale": (1.0, 1.0), "flip": 0.0})
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 40, dtype=torch.uint8))
    trained_on, _ = jitter(image, nothing, still, torch.Generator())
    seen = []
    engine.model.backbone.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    engine.predict([image])
    levels = (seen[0] * 0.3 + 0.2) * 255
    assert trained_on.shape == (3, 32, 20)
    assert (levels[:, :, :20] - trained_on).abs().max() <= 1.01  # detectron2 scales by Pillow


def test_detections_are_in_pixels_of_the_image_as_given(task: Task, monkeypatch: pytest.MonkeyPatch):
    engine = build("torchvision", task)
    inside = {
        "boxes": torch.tensor([[2.0, 4.0, 12.0, 30.0]]),  # of 32 x 20 pixels
        "scores": torch.ones(1),
        "labels": torch.tensor([3]),
        "crops": torch.ones(1, 1, 28, 28),
    }
    monkeypatch.setattr(engine.model.roi_heads, "forward", lambda *_: ([inside], {}))
    (found,) = engine.predict([torch.zeros(3, 64, 40, dtype=torch.uint8)])
    assert found.boxes.tolist() == [[4, 8, 24, 60]] and found.labels.tolist() == [2]
    expected = torch.zeros(1, 64, 40, dtype=torch.bool)
    expected[:, 8:60, 4:24] = True
    assert torch.equal(found.masks, expected)


def test_images_without_an_instance_train_and_have_no_mask_loss(task: Task):
    model = build("torchvision", task).model.train()
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 32, 32, dtype=torch.uint8),
    }
    losses = model([torch.rand(3, 32, 32)] * 2, [nothing, dict(nothing)])
    sum(losses.values()).backward()
    assert losses["loss_mask"] == 0 and all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.detectron2
def test_reduced_precision_on_a_cpu_is_refused_by_detectron2(task: Task):
    reduced = dataclasses.replace(task, settings=task.settings.model_copy(update={"precision": "bf16"}))
    with pytest.raises(UserError, match=r"detection\.precision bf16: engine detectron2 computes in fp32 on CPUs"):
        build("detectron2", reduced)


def test_boxes_are_float32_where_everything_else_is_bf16(task: Task):
    """In bf16 a box of 1,001 pixels is one of 1,000."""
    seen: list[torch.Tensor] = []
    engine = build(
        "torchvision",
        dataclasses.replace(task, settings=task.settings.model_copy(update={"precision": "bf16", "iterations": 1})),
    )
    engine.model.roi_heads.register_forward_pre_hook(lambda module, args: seen.extend(args[1]))
    engine.model.roi_heads.register_forward_hook(lambda module, args, out: seen.extend(x["boxes"] for x in out[0]))
    generator = engine.model.rpn.anchor_generator
    generator.register_forward_hook(lambda module, args, out: seen.extend(out))
    engine.train(0, lambda done, losses: None)
    engine.predict([task.val.read(0)])
    assert len(seen) == 3 * 2 + 1 and {x.dtype for x in seen} == {torch.float32}
