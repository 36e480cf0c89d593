"""Whatever a stage left, wherever it lies, gives the network whose score the stage reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import timm
import torch

from aps.data.load import FileSplit, load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.files import write_json
from aps.inference.load import load
from aps.inference.model import Detector, Model
from aps.models.encoder import build_encoder
from aps.models.weights import INFO_KEY, load_encoder, read_tensors, save_encoder, save_tensors
from aps.seals import contents, seal
from aps.settings.blocks import EncoderSettings
from aps.training.linear_probe import Heads


def metrics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def accuracy(model: Model, manifest: Path) -> float:
    """On the test split, image by image as a user would."""
    split = load_split(manifest, "test")
    images: list[Any] = (
        [split.path(i) for i in range(len(split))] if isinstance(split, FileSplit) else list(split.images)
    )
    found = model.predict(images, progress=False)
    labels = [split.classes[i] for i in split.labels]
    return 100 * sum(a == b for a, b in zip(found.classes, labels, strict=True)) / len(labels)


@pytest.mark.parametrize("stage", ["finetune", "linear_probe"])
def test_a_classifier_reaches_the_accuracy_that_its_stage_reported(finished: Path, stages: Path, stage: str) -> None:
    model = load(stages / stage)
    assert isinstance(model, Model) and model.classes == ("blue", "green", "red")
    reported = metrics(stages / stage)["metrics"]["test_top1"]
    assert accuracy(model, finished / "results/data/folder/manifest.json") == pytest.approx(reported)
    assert reported > 50  # of three classes, so that the comparison says something


def test_a_dataset_in_memory_is_seen_whole_as_its_stage_saw_it(finished: Path) -> None:
    model = load(finished / "results/photos/digits/seed0/finetune")
    assert isinstance(model, Model) and model.preprocessing.resize is None
    reported = metrics(finished / "results/photos/digits/seed0/finetune")["metrics"]["test_top1"]
    assert accuracy(model, finished / "results/data/digits/manifest.json") == pytest.approx(reported)


def test_a_probe_of_random_weights_is_loaded_with_those_weights(finished: Path) -> None:
    folder = finished / "results/photos/floor/seed0/linear_probe"
    model = load(folder)
    assert isinstance(model, Model)
    reported = metrics(folder)["metrics"]["test_top1"]
    assert accuracy(model, finished / "results/data/folder/manifest.json") == pytest.approx(reported)


def test_a_probe_is_its_encoder_and_the_head_that_was_picked(stages: Path) -> None:
    model, encoder = load(stages / "linear_probe"), load(stages / "pretrain")
    from safetensors.torch import load_file

    heads = Heads(48, 3, 2, batch_norm=True).eval()
    heads.load_state_dict(load_file(stages / "linear_probe/heads.safetensors"))
    made = metrics(stages / "linear_probe")
    pick = made["settings"]["linear_probe"]["lrs"].index(made["metrics"]["lr"])
    images = [torch.rand(3, 50, 60, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = heads(encoder.embed(images))[pick].softmax(1)
    assert torch.allclose(model.predict(images).probabilities, expected, atol=1e-5)
    assert torch.allclose(model.embed(images), encoder.embed(images))


def test_a_probe_whose_head_has_diverged_is_refused(finished: Path, tmp_path: Path) -> None:
    """Such a head of an earlier version may have been the one that was picked."""
    folder = shutil.copytree(finished / "results/photos/floor/seed0/linear_probe", tmp_path / "probe")
    tensors, metadata = read_tensors(folder / "heads.safetensors")
    info = json.loads(metadata[INFO_KEY])
    tensors[f"heads.{info['lrs'].index(info['lr'])}.weight"][0, 0] = float("nan")
    (folder / "heads.safetensors").unlink()
    save_tensors(tensors, folder / "heads.safetensors", metadata)
    made = metrics(folder)
    write_json(folder / "metrics.json", seal(made | {"files": contents(folder)}))
    with pytest.raises(UserError, match=r"its head of learning rate .* has diverged; lower linear_probe\.lrs"):
        load(folder)


def test_an_encoder_embeds_as_its_stage_did(finished: Path, stages: Path) -> None:
    model = load(stages / "pretrain")
    own = Manifest.read(finished / "results/data/folder/manifest.json")
    assert isinstance(model, Model) and not model.classes
    assert (model.preprocessing.mean, model.preprocessing.std) == own.normalization()
    settings = EncoderSettings(arch="micro", image_size=32, patch_size=8, dim=48, depth=2, heads=3)
    encoder = load_encoder(stages / "pretrain/encoder.safetensors", settings).eval()
    image = torch.rand(3, 50, 60)
    assert torch.allclose(model.embed(image), encoder(model.transform(image)[None]), atol=1e-6)


def test_a_file_alone_is_enough(stages: Path, tmp_path: Path) -> None:
    images = [torch.rand(3, 40, 40)]
    for stage, name in (("pretrain", "encoder"), ("finetune", "model")):
        shutil.copy(stages / stage / f"{name}.safetensors", tmp_path / f"{stage}.safetensors")
        alone, whole = load(tmp_path / f"{stage}.safetensors"), load(stages / stage)
        assert torch.equal(alone.embed(images), whole.embed(images)) and alone.classes == whole.classes
        assert alone.provenance["experiment"] == "mine" and alone.digest == whole.digest
    shutil.copy(stages / "detection/model.safetensors", tmp_path / "detector.safetensors")
    assert load(tmp_path / "detector.safetensors").classes == load(stages / "detection").classes


def test_a_probe_finds_its_encoder_where_results_were_moved(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "results", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    image = torch.rand(3, 40, 40)
    moved = load("elsewhere/photos/mine/seed0/linear_probe")
    assert torch.equal(
        moved.predict(image).probabilities,
        load(finished / "results/photos/mine/seed0/linear_probe").predict(image).probabilities,
    )


def test_a_probe_refuses_an_encoder_that_was_trained_anew(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "results/photos/mine", tmp_path / "results/photos/mine")
    monkeypatch.chdir(tmp_path)
    settings = EncoderSettings(arch="micro", image_size=32, patch_size=8, dim=48, depth=2, heads=3)
    save_encoder(build_encoder(settings), settings, tmp_path / "results/photos/mine/seed0/pretrain/encoder.safetensors")
    with pytest.raises(UserError, match=r"its encoder .* is not there, or another training has replaced it"):
        load("results/photos/mine/seed0/linear_probe")


@pytest.mark.parametrize("file", ["finetune/model.safetensors", "linear_probe/heads.safetensors"])
def test_weights_that_were_changed_since_are_refused(finished: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(finished / "results/photos/mine", tmp_path / "mine")
    changed = tmp_path / "mine/seed0" / file
    tensors, metadata = read_tensors(changed)
    save_tensors({name: x + 1 for name, x in tensors.items()}, changed, metadata)
    with pytest.raises(UserError, match="so it was changed or damaged; run the stage again"):
        load(changed.parent)


def test_knn_has_no_weights_so_its_encoder_is_loaded(stages: Path) -> None:
    image = torch.rand(3, 40, 40)
    assert torch.equal(load(stages / "knn").embed(image), load(stages / "pretrain").embed(image))


def test_a_detector_is_loaded_whole(stages: Path) -> None:
    model = load(stages / "detection")
    assert isinstance(model, Detector) and model.classes == tuple("0123456789")


def test_provenance_says_what_made_the_weights(stages: Path) -> None:
    made = load(stages / "finetune").provenance
    assert (made["experiment"], made["seed"], made["stage"], made["dataset"]["name"]) == (
        "mine",
        0,
        "finetune",
        "folder",
    )
    assert made["metrics"]["test_top1"] == metrics(stages / "finetune")["metrics"]["test_top1"]


WRONG = {
    "nothing there": ("nowhere", "nowhere does not exist; give a stage's folder"),
    "a folder above": ("results/photos/mine/seed0", "is no stage's folder; give one inside it, such as .*mine/seed0/"),
    "a folder of images": ("photos", "has neither model.safetensors nor encoder.safetensors"),
    "a projector": ("results/photos/mine/seed0/pretrain/heads.safetensors", "holds heads without their encoder"),
    "another file": ("study.yaml", "no .safetensors file; `aps import-weights`"),
    "an unknown timm model": ("timm:nothing_at_all", "timm:nothing_at_all: timm can't give these weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_loaded_is_one_sentence(finished: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(finished)
    address, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        load(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["", " ", "\n"])
def test_an_empty_address_is_called_empty(address: str) -> None:
    with pytest.raises(UserError, match=r"^the address of weights is empty; give a stage's folder"):
        load(address)


def test_foreign_and_broken_files_are_one_sentence(tmp_path: Path, stages: Path) -> None:
    save_tensors({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="has no encoder settings, so it was not written by this software"):
        load(tmp_path / "foreign.safetensors")
    whole = (stages / "pretrain/encoder.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(tmp_path / "cut.safetensors")


def test_weights_that_do_not_say_their_normalization_get_imagenets_and_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = EncoderSettings(arch="micro", image_size=16, patch_size=4, depth=1)
    save_encoder(build_encoder(settings), settings, tmp_path / "silent.safetensors")
    model = load(tmp_path / "silent.safetensors")
    assert isinstance(model, Model) and model.preprocessing.mean == (0.485, 0.456, 0.406)
    assert "does not say how its images are normalized; taking ImageNet's" in caplog.text


def test_an_unusable_device_is_one_sentence(stages: Path) -> None:
    with pytest.raises(UserError, match="device abacus can't be used"):
        load(stages / "pretrain", device="abacus")


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """timm as if its weights had been downloaded; what it made, by name."""
    made: dict[str, Any] = {}
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **more: Any) -> Any:
        torch.manual_seed(0)
        made[name] = create(name, pretrained=False, **more)
        return made[name]

    monkeypatch.setattr(timm, "create_model", offline)
    return made


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_small_patch14_dinov2.lvd142m", "resnet18.a1_in1k"]
)
def test_public_encoders_of_timm_work_like_own_ones(public: dict[str, Any], finished: Path, name: str) -> None:
    model = load(f"timm:{name}")
    assert isinstance(model, Model)
    files = sorted((finished / "photos/red").glob("*.jpg"))[:2]
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(public[name]), is_training=False)
    image = theirs(PIL.Image.open(files[0]))[None]
    assert (model.transform(files[0]) - image[0]).abs().max() < 0.05  # Pillow's bicubic and torch's, a level or two
    network = public[name].eval()
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(model.transform(files[0])[None]), pre_logits=True)
    assert torch.allclose(model.embed(files)[:1], expected, atol=1e-4)
    if network.num_classes:
        assert len(model.classes) == 1000 and model.classes[0].startswith("tench")
        assert model.predict(files).probabilities.shape == (2, 1000)


def test_public_encoders_show_attention_if_they_have_a_class_token(public: dict[str, Any]) -> None:
    assert load("timm:vit_small_patch14_dinov2.lvd142m").attention(torch.rand(3, 60, 60)).shape == (1, 6, 37, 37)
    with pytest.raises(UserError, match="a ResNet without a class token has no attention"):
        load("timm:resnet18.a1_in1k").attention(torch.rand(3, 60, 60))
