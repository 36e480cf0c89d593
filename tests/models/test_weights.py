"""Weights go out and come back whole; whatever differs is one sentence naming it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aps.errors import UserError
from aps.models import weights
from aps.models.encoder import Encoder, build_encoder
from aps.models.weights import SETTINGS_KEY, load_encoder, read_info, read_tensors, save_encoder, save_tensors
from aps.settings.blocks import EncoderSettings

SETTINGS = EncoderSettings(arch="micro", image_size=16, patch_size=4, depth=2)


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(SETTINGS).eval()


@pytest.fixture
def file(encoder: Encoder, tmp_path: Path) -> Path:
    save_encoder(encoder, SETTINGS, tmp_path / "encoder.safetensors", {"mean": [0.5] * 3, "stage": "pretrain"})
    return tmp_path / "encoder.safetensors"


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def changed(**keys: Any) -> EncoderSettings:
    return EncoderSettings.model_validate({**SETTINGS.model_dump(), **keys})


def test_a_saved_encoder_comes_back_with_the_same_features(encoder: Encoder, file: Path, images: Tensor) -> None:
    torch.manual_seed(7)
    assert torch.equal(load_encoder(file, SETTINGS).eval()(images), encoder(images))
    assert read_info(file) == {"mean": [0.5] * 3, "stage": "pretrain"}
    assert set(load_file(file)) == set(encoder.state_dict())


def test_equal_encoders_are_equal_files(encoder: Encoder, tmp_path: Path) -> None:
    """An evaluation is repeated when its encoder's bytes change, so they must not change by themselves."""
    info = {"experiment": 'Grün\t"1"', "mean": [0.5] * 3, "classes": ["ä", "b\n"]}
    for i in range(8):  # the library's order of three keys differs in most of them
        save_encoder(encoder, SETTINGS, tmp_path / f"{i}.safetensors", info)
    assert len({file.read_bytes() for file in tmp_path.glob("*.safetensors")}) == 1
    tensors, metadata = read_tensors(tmp_path / "0.safetensors")
    assert json.loads(metadata["aps_info"]) == info
    assert all(torch.equal(tensors[name], value) for name, value in encoder.state_dict().items())


def test_random_loads_nothing_and_depends_on_the_seed_only(encoder: Encoder, images: Tensor) -> None:
    torch.manual_seed(0)
    assert torch.equal(load_encoder("random", SETTINGS).eval()(images), encoder(images))


def test_drop_path_reaches_a_loaded_encoder(file: Path) -> None:
    encoder = load_encoder(file, SETTINGS, drop_path=0.1)
    assert encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arch": "tiny"}, "dim 96, the settings ask for encoder.dim 192"),
        ({"depth": 3}, "depth 2, the settings ask for encoder.depth 3"),
        ({"heads": 4}, "heads 3, the settings ask for encoder.heads 4"),
        ({"patch_size": 2}, "patch_size 4, the settings ask for encoder.patch_size 2"),
        ({"qkv_bias": True}, "qkv_bias False, the settings ask for encoder.qkv_bias True"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 4.0, the settings ask for encoder.mlp_ratio 2.0"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-05, the settings ask for encoder.layer_norm_eps 1e-06"),
        ({"image_size": 32}, "image_size 16 (a 4x4 grid), the settings ask for encoder.image_size 32 (8x8)"),
    ],
)
def test_a_difference_in_settings_names_key_and_both_values(file: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_encoder(file, changed(**keys))
    assert message in str(error.value) and str(file) in str(error.value)


def test_how_weights_began_is_no_property_of_a_finished_encoder(file: Path, encoder: Encoder, images: Tensor) -> None:
    assert torch.equal(load_encoder(file, changed(init="timm")).eval()(images), encoder(images))
    assert "init" not in json.loads(read_tensors(file)[1][SETTINGS_KEY])


def test_the_grid_is_resampled_only_when_asked_and_the_log_says_so(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        larger = load_encoder(file, changed(image_size=32), interpolate=True)
    assert "pos_embed interpolated 4x4 -> 8x8" in caplog.text
    assert larger(torch.zeros(1, 3, 32, 32)).shape == (1, 96)
    smooth = torch.linspace(0, 1, 4).view(1, 1, 4).expand(1, 4, 4)  # columns rise from left to right
    state = load_file(file)
    state["pos_embed"] = smooth.reshape(1, 16, 1).expand(-1, -1, 96).contiguous()
    weights.load_state(larger, state, changed(image_size=32), "a test", interpolate=True)
    columns = larger.pos_embed.view(8, 8, 96)[:, :, 0]
    assert (columns.diff(dim=1) > 0).all() and columns.std(dim=0).max() < 1e-5  # rows and columns not exchanged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.norm2.bias"), "'blocks.1.norm2.bias' is missing"),
        (lambda s: s.pop("cls_token"), "'cls_token' is missing; these are not the weights of a Vision Transformer"),
        (lambda s: s.update({"blocks.0.ls1.gamma": torch.ones(96)}), "'blocks.0.ls1.gamma' has no place"),
        (lambda s: s.update({"norm.bias": torch.ones(95)}), r"'norm.bias' has shape \(95,\), the encoder's is \(96,\)"),
    ],
)
def test_every_name_of_a_file_is_accounted_for(file: Path, tmp_path: Path, change: Any, message: str) -> None:
    state = load_file(file)
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        load_encoder(tmp_path / "other.safetensors", SETTINGS)


def test_a_classifier_head_is_left_behind_and_the_log_says_so(
    encoder: Encoder, tmp_path: Path, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encoder(images)
    encoder.reset_classifier(10)
    save_encoder(encoder, SETTINGS, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO):
        assert torch.equal(load_encoder(tmp_path / "model.safetensors", SETTINGS).eval()(images), expected)
    assert "left behind: head.bias, head.weight" in caplog.text


def timm_vit(**kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **{**size, **kwargs}).eval()
    torch.nn.init.normal_(model.cls_token)
    torch.nn.init.normal_(model.pos_embed)
    return model


TIMM = {"qkv_bias": True, "layer_norm_eps": 1e-6}


def test_timm_weights_with_a_class_position_give_timms_features(
    monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    model = timm_vit()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    ours = load_encoder("timm:vit_x", changed(**TIMM)).eval()
    torch.testing.assert_close(ours(images), model.forward_features(images)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("key", "value"), [("qkv_bias", False), ("layer_norm_eps", 1e-5), ("heads", 4)])
def test_timm_weights_of_other_settings_are_refused(monkeypatch: pytest.MonkeyPatch, key: str, value: Any) -> None:
    model = timm_vit()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    with pytest.raises(UserError, match=rf"timm:vit_x: .*encoder\.{key} {value}"):
        load_encoder("timm:vit_x", changed(**{**TIMM, key: value}))


def test_timm_models_that_are_no_plain_vit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="timm:no_such_model: timm can't give these weights"):
        load_encoder("timm:no_such_model", SETTINGS)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="a Linear, not a VisionTransformer"):
        load_encoder("timm:resnet18", SETTINGS)


def test_a_file_in_timms_layout_loads_too(tmp_path: Path, images: Tensor) -> None:
    model = timm_vit()
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    ours = load_encoder(tmp_path / "timm.safetensors", changed(**TIMM)).eval()
    torch.testing.assert_close(ours(images), model.forward_features(images)[:, 0], rtol=1e-5, atol=1e-5)


def test_missing_and_broken_files_are_one_sentence(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_encoder(tmp_path / "none.safetensors", SETTINGS)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_encoder(file, SETTINGS)


def test_stored_settings_that_make_no_sense_are_one_sentence(encoder: Encoder, tmp_path: Path) -> None:
    save_tensors(encoder.state_dict(), tmp_path / "x.safetensors", {"aps_encoder": json.dumps({"heads": -1})})
    with pytest.raises(UserError, match="stored encoder settings are not valid"):
        load_encoder(tmp_path / "x.safetensors", SETTINGS)


def test_a_failed_write_leaves_the_old_file(encoder: Encoder, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*; free space"):
        save_encoder(encoder, SETTINGS, file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "cls_token", "norm.bias", "head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error_that_names_the_tensor(file: Path, name: str, value: float) -> None:
    state, metadata = weights.read_tensors(file)
    state.setdefault("head.weight", torch.zeros(2, 96))
    state[name].view(-1)[3] = value
    save_tensors(state, file, metadata)
    with pytest.raises(
        UserError, match=rf"encoder.safetensors: '{name}': 1 of [\d,]+ numbers are NaN or infinite; make it"
    ):
        load_encoder(file, SETTINGS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_not_floating_point_are_an_error_that_names_the_tensor(file: Path, dtype: torch.dtype) -> None:
    state, metadata = weights.read_tensors(file)
    state["norm.weight"] = state["norm.weight"].to(dtype)
    save_tensors(state, file, metadata)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"'norm.weight' holds {kind} instead of floating-point numbers"):
        load_encoder(file, SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_another_precision_are_read(file: Path, encoder: Encoder, dtype: torch.dtype) -> None:
    state, metadata = weights.read_tensors(file)
    save_tensors({name: x.to(dtype) for name, x in state.items()}, file, metadata)
    loaded = load_encoder(file, SETTINGS)
    assert torch.allclose(loaded.pos_embed, encoder.pos_embed, atol=1e-2) and loaded.pos_embed.dtype == torch.float32
