"""The authors' released layout in, and from there out to timm; each with the same features as before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aps.errors import UserError
from aps.inference.export import export
from aps.inference.load import load
from aps.models.encoder import Encoder, build_encoder
from aps.models.transfer import import_weights
from aps.models.weights import load_encoder, read_info, save_encoder, save_tensors
from aps.settings.blocks import EncoderSettings

# The release's encoder in little: width 128 of two heads of 64, as every width of the release divides by 64.
SETTINGS = EncoderSettings(image_size=32, patch_size=8, dim=128, depth=2, heads=2)


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    encoder = build_encoder(SETTINGS)
    for p in encoder.parameters():  # zeros and ones would not show an exchange of two names
        torch.nn.init.normal_(p, std=0.1)
    return small.pretraining(encoder).networks.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def encoder_in_release_layout(encoder: Encoder, prefix: str) -> dict[str, Tensor]:
    """Written out from method.md, name by name."""
    state = {
        "cls_token": encoder.cls_token,
        "pos_embedding": encoder.pos_embed.permute(1, 0, 2),
        "patchify.weight": encoder.patch_embed.proj.weight,
        "patchify.bias": encoder.patch_embed.proj.bias,
        "layer_norm.weight": encoder.norm.weight,
        "layer_norm.bias": encoder.norm.bias,
    }
    for i, block in enumerate(encoder.blocks):
        state |= {f"transformer.{i}.attn.qkv.weight": block.attn.qkv.weight}
        for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            for kind in ("weight", "bias"):
                state[f"transformer.{i}.{part}.{kind}"] = block.get_submodule(part).get_parameter(kind)
    return {prefix + name: x.detach().clone() for name, x in state.items()}


def pretrained(model: nn.ModuleDict) -> dict[str, Tensor]:
    state = encoder_in_release_layout(model.encoder, "base_encoder.")
    state |= {f"base_encoder.fc.{name}": x for name, x in model.projector.state_dict().items()}
    return state | {f"predictor.{name}": x for name, x in model.predictor.state_dict().items()}


def finetuned(model: nn.ModuleDict) -> dict[str, Tensor]:
    state = encoder_in_release_layout(model.encoder, "")
    return state | {f"fc.{name}": x for name, x in model.encoder.get_classifier().state_dict().items()}


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": x for name, x in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        prefixed,
        lambda s: {"state_dict": prefixed(s)},
    ],
    ids=["bare", "state_dict", "model", "module.", "state_dict of module."],
)
def test_a_released_pretraining_checkpoint_gives_the_same_features(
    model: nn.ModuleDict, images: Tensor, tmp_path: Path, wrap: Any
) -> None:
    torch.save(wrap(pretrained(model)), tmp_path / "release.pth")
    files = import_weights(tmp_path / "release.pth", tmp_path / "out")
    assert [f.name for f in files] == ["encoder.safetensors", "heads.safetensors"]
    encoder = load_encoder(files[0], SETTINGS).eval()
    assert torch.equal(encoder(images), model.encoder(images))
    heads = load_file(files[1])
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    assert heads.keys() == expected.keys() and all(torch.equal(heads[k], expected[k]) for k in heads)
    assert read_info(files[0])["mean"] == [0.4914, 0.4822, 0.4465]


def test_a_finetuned_state_dict_comes_with_its_classifier(model: nn.ModuleDict, images: Tensor, tmp_path: Path) -> None:
    model.encoder.reset_classifier(10)
    torch.save(finetuned(model), tmp_path / "finetuned.pth")
    (file,) = import_weights(tmp_path / "finetuned.pth", tmp_path / "out")
    state = load_file(file)
    restored = build_encoder(SETTINGS).eval()
    restored.reset_classifier(10)
    restored.load_state_dict(state, strict=True)
    assert torch.equal(restored(images), model.encoder(images))
    info = read_info(file)  # the release finetunes on ImageNet's statistics
    assert info["classes"] == 10 and info["mean"] == [0.485, 0.456, 0.406]


def test_sizes_of_the_release_are_read_off_the_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = EncoderSettings(arch="tiny", image_size=32, patch_size=2, depth=1)
    encoder = build_encoder(settings)
    torch.save(pretrained(small.pretraining(encoder).networks), tmp_path / "release.pth")
    file, _ = import_weights(tmp_path / "release.pth", tmp_path)
    load_encoder(file, settings)  # 3 heads, 256 cells, eps 1e-5: refused if they differed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base_encoder.transformer.1.norm2.bias"), "'blocks.1.norm2.bias' is missing"),
        (lambda s: s.pop("base_encoder.pos_embedding"), "no 'pos_embedding' among its names"),
        (lambda s: s.pop("base_encoder.patchify.weight"), "no 'patchify.weight' among its names"),
        (lambda s: s.pop("base_encoder.fc.3.weight"), "projector.3.weight' is missing"),
        (lambda s: s.pop("predictor.1.running_var"), "predictor is not the release's: .*running_var"),
        (
            lambda s: s.update({"momentum_encoder.cls_token": torch.ones(1)}),
            "'momentum_encoder.cls_token' is not a name",
        ),
        (
            lambda s: s.update({"base_encoder.fc.7.weight": torch.ones(128)}),
            "projector is not the release's: .*7.weight",
        ),
        (lambda s: s.update({"base_encoder.layer_norm.bias": torch.ones(9)}), r"'norm.bias' has shape \(9,\)"),
        (
            lambda s: s.update({"base_encoder.pos_embedding": torch.ones(15, 1, 128)}),
            "15 rows, which is no square grid",
        ),
    ],
)
def test_every_name_is_accounted_for_and_nothing_is_written_in_part(
    model: nn.ModuleDict, tmp_path: Path, change: Any, message: str
) -> None:
    state = pretrained(model)
    change(state)
    torch.save(state, tmp_path / "release.pth")
    with pytest.raises(UserError, match=message):
        import_weights(tmp_path / "release.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    """What a malicious checkpoint holds: opening it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_whole_pickled_module_is_refused_with_the_way_out(model: nn.ModuleDict, tmp_path: Path) -> None:
    torch.save(model.encoder, tmp_path / "whole.pth")
    with pytest.raises(UserError) as error:
        import_weights(tmp_path / "whole.pth", tmp_path)
    assert "pickled Python object (aps.models.encoder.Encoder)" in str(error.value)
    command = re.search(r'python -c "(.*)" and import', str(error.value))
    assert command is not None and "weights_only=False" in command[1]


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="pickled Python object"):
        import_weights(tmp_path / "bomb.pth", tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)  # the bomb is a real one
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "has no state dict"),
        ([torch.ones(1)], "has no state dict"),
        ({"weight": torch.ones(3)}, "'weight' is not a name of the APS release"),
    ],
)
def test_other_files_are_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        import_weights(tmp_path / "x.pth", tmp_path)
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:200])
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        import_weights(tmp_path / "x.pth", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        import_weights(tmp_path / "none.pth", tmp_path)
    (tmp_path / "x.pth").write_bytes(b"\x89PNG, say")  # nothing to be trusted and opened all the same
    with pytest.raises(UserError, match=r"not a PyTorch file; give a state dict"):
        import_weights(tmp_path / "x.pth", tmp_path)
    torch.save({"weight": torch.ones(3)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="'weight' is not a name of the APS release"):
        import_weights(tmp_path / "x.pth", tmp_path)


def test_a_width_that_does_not_tell_its_heads_needs_them_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(arch="micro", image_size=32, patch_size=8, depth=1))
    torch.save(pretrained(small.pretraining(encoder).networks), tmp_path / "x.pth")
    with pytest.raises(UserError, match="give --attention-heads"):
        import_weights(tmp_path / "x.pth", tmp_path)
    import_weights(tmp_path / "x.pth", tmp_path, heads=3)


# ----------------------------------------------------------------------------------------------------------------------


def export_timm(weights: Path, out: Path) -> str:
    return export(load(weights, "cpu"), "timm", out)


def run(snippet: str) -> Any:
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    return scope["model"].eval()


@pytest.mark.parametrize("settings", [SETTINGS, EncoderSettings(arch="micro", depth=2, mlp_ratio=3.0, qkv_bias=True)])
def test_the_printed_python_gives_a_timm_model_with_the_same_features(
    settings: EncoderSettings, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(settings).eval()
    save_encoder(encoder, settings, tmp_path / "encoder.safetensors", {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)})
    model = run(export_timm(tmp_path / "encoder.safetensors", tmp_path / "timm.safetensors"))
    assert type(model).__module__ == "timm.models.vision_transformer" and type(model) is not Encoder
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), encoder(images), rtol=1e-5, atol=1e-5)
    assert model.pretrained_cfg["mean"] == (0.5, 0.4, 0.3) and model.pretrained_cfg["input_size"] == (3, 32, 32)
    model.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)


def test_a_finetuned_model_exports_with_its_head(model: nn.ModuleDict, images: Tensor, tmp_path: Path) -> None:
    model.encoder.reset_classifier(7)
    torch.nn.init.normal_(model.encoder.head.weight)
    save_encoder(model.encoder, SETTINGS, tmp_path / "model.safetensors")
    exported = run(export_timm(tmp_path / "model.safetensors", tmp_path / "timm.safetensors"))
    assert exported(images).shape == (2, 7)
    torch.testing.assert_close(exported(images), model.encoder(images), rtol=1e-5, atol=1e-5)


def test_export_loads_strictly(model: nn.ModuleDict, tmp_path: Path) -> None:
    """The printed Python must fail on a file that lacks a tensor, or 'loads strictly' would mean nothing."""
    save_encoder(model.encoder, SETTINGS, tmp_path / "encoder.safetensors")
    snippet = export_timm(tmp_path / "encoder.safetensors", tmp_path / "timm.safetensors")
    state = load_file(tmp_path / "timm.safetensors")
    del state["norm.bias"]
    save_tensors(state, tmp_path / "timm.safetensors")
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        run(snippet)


def test_files_of_other_software_are_not_exported(model: nn.ModuleDict, tmp_path: Path) -> None:
    save_tensors(model.encoder.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no encoder settings"):
        export_timm(tmp_path / "x.safetensors", tmp_path / "y.safetensors")


def test_what_was_imported_exports(model: nn.ModuleDict, images: Tensor, tmp_path: Path) -> None:
    torch.save(pretrained(model), tmp_path / "release.pth")
    encoder, _ = import_weights(tmp_path / "release.pth", tmp_path)
    exported = run(export_timm(encoder, tmp_path / "timm.safetensors"))
    torch.testing.assert_close(exported(images), model.encoder(images), rtol=1e-5, atol=1e-5)
