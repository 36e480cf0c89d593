"""Every printed snippet runs as it is printed, without this project, and gives what this project gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL.Image
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from aps.detection.placement import load_backbone
from aps.detection.vitdet import SimpleFeaturePyramid
from aps.errors import UserError
from aps.inference.export import export
from aps.inference.load import load
from aps.inference.model import Model
from aps.models.encoder import build_encoder
from aps.models.weights import save_encoder
from aps.settings.blocks import DetectionSettings, EncoderSettings

STAGES = ("pretrain", "finetune", "linear_probe")
FILES = {"timm": "weights.safetensors", "onnx": "model.onnx", "hub-folder": "folder"}


@dataclass(frozen=True)
class Export:
    model: Model
    path: Path
    snippet: str


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Export]:
    """Every kind of network in every form, by (form, stage)."""
    made = {}
    for stage in STAGES:
        model = load(finished / "results/photos/mine/seed0" / stage)
        assert isinstance(model, Model)
        for to, name in FILES.items():
            path = tmp_path_factory.mktemp("exported") / name
            made[to, stage] = Export(model, path, export(model, to, path))
    return made


@pytest.mark.parametrize("to", FILES)
def test_the_printed_lines_give_the_same_features_and_classes(
    finished: Path, exported: dict[tuple[str, str], Export], tmp_path: Path, to: str
) -> None:
    """In an interpreter of its own, into which nothing of this project is imported."""
    file = finished / "photos/green/003.jpg"
    snippets = {stage: exported[to, stage].snippet for stage in STAGES}
    asking = f"""
import json, sys, torch
found = {{}}
for stage, snippet in {snippets!r}.items():
    names = {{}}
    exec(snippet, names)
    found[stage] = [torch.as_tensor(names["embed"]({str(file)!r})).tolist()]
    found[stage] += names["predict"]({str(file)!r}) if "predict" in names else []
assert not any(name.split(".")[0] == "aps" for name in sys.modules)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", asking], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage, (features, *classified) in json.loads(done.stdout.splitlines()[-1]).items():
        model = exported[to, stage].model
        assert np.abs(np.array(features) - model.embed(file).numpy()).max() < 1e-4
        if model.classes:
            found = model.predict(file)
            assert classified == [found.classes[0], pytest.approx(float(found.probabilities.max()), abs=1e-4)]
        else:
            assert not classified


@pytest.mark.parametrize("stage", STAGES)
def test_onnx_agrees_with_torch_for_any_batch(exported: dict[tuple[str, str], Export], stage: str) -> None:
    model = exported["onnx", stage].model
    session = onnxruntime.InferenceSession(exported["onnx", stage].path)
    names = [output.name for output in session.get_outputs()]
    assert names == (["probabilities", "features"] if model.classes else ["features"])
    (given,) = session.get_inputs()
    assert given.name == "images" and given.shape[1:] == [3, 32, 32] and isinstance(given.shape[0], str)
    for batch in (1, 2, 5, 33):
        images = [torch.rand(3, 48, 40, generator=torch.Generator().manual_seed(i)) for i in range(batch)]
        x = torch.stack([model.transform(image) for image in images])
        found = dict(zip(names, session.run(None, {"images": x.numpy()}), strict=True))
        assert np.abs(found["features"] - model.embed(images).numpy()).max() < 1e-4
        if model.classes:
            assert np.abs(found["probabilities"] - model.predict(images).probabilities.numpy()).max() < 1e-4


def test_an_onnx_file_names_its_classes_and_transform(exported: dict[tuple[str, str], Export]) -> None:
    model = exported["onnx", "finetune"].model
    session = onnxruntime.InferenceSession(exported["onnx", "finetune"].path)
    stored = session.get_modelmeta().custom_metadata_map
    assert json.loads(stored["classes"]) == list(model.classes)
    assert json.loads(stored["transform"])["input_size"] == [3, 32, 32]


def test_others_can_read_every_export(exported: dict[tuple[str, str], Export], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mode = (tmp_path / "file").stat().st_mode
    for export_ in exported.values():
        files = [path for path in export_.path.parent.rglob("*") if path.is_file()]
        assert len(files) > 1 and {path.stat().st_mode for path in files} == {mode}


def test_onnx_without_its_packages_is_a_sentence(stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aps.inference.convert.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"ONNX needs onnx and onnxscript; install them by `pip install 'aps-vit\[onnx\]'`"
    ):
        load(stages / "pretrain").to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("bias", [False, True])
def test_a_plain_timm_model_computes_the_same(tmp_path: Path, eps: float, bias: bool) -> None:
    settings = EncoderSettings(arch="micro", image_size=16, patch_size=4, depth=2, layer_norm_eps=eps, qkv_bias=bias)
    torch.manual_seed(0)
    encoder = build_encoder(settings)
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.05)  # so small that eps shows
    info = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "crop": "whole"}
    save_encoder(encoder, settings, tmp_path / "encoder.safetensors", info)
    model = load(tmp_path / "encoder.safetensors")
    image = torch.rand(3, 16, 16)
    twin = model.to_timm()
    assert type(twin).__module__.startswith("timm.")
    x = model.transform(image)[None]
    assert torch.allclose(twin(x), model.embed(image), atol=1e-5)
    export(model, "hub-folder", tmp_path / "hub")
    hub = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.allclose(hub(x), model.embed(image), atol=1e-5)
    assert list(timm.data.resolve_model_data_config(hub)["mean"]) == [0.5] * 3


def test_an_eps_that_the_hub_cannot_say_is_a_sentence(tmp_path: Path) -> None:
    settings = EncoderSettings(arch="micro", image_size=16, patch_size=4, depth=1, layer_norm_eps=1e-3)
    info = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "crop": "whole"}
    save_encoder(build_encoder(settings), settings, tmp_path / "encoder.safetensors", info)
    with pytest.raises(UserError, match=r"layer_norm_eps is 0\.001, and a folder for the Hub can only say"):
        export(load(tmp_path / "encoder.safetensors"), "hub-folder", tmp_path / "hub")


@pytest.mark.parametrize("to", ["timm", "hub-folder"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_export_can_be_loaded_again(exported: dict[tuple[str, str], Export], stage: str, to: str) -> None:
    made = exported[to, stage]
    back, image = load(made.path), torch.rand(3, 50, 44)
    assert torch.equal(back.embed(image), made.model.embed(image)) and back.classes == made.model.classes
    assert back.provenance["experiment"] == "mine"


def test_a_vitdet_file_fits_the_backbone_by_name(stages: Path, tmp_path: Path) -> None:
    model = load(stages / "finetune")
    snippet = export(model, "vitdet", tmp_path / "vitdet.pth")
    assert "use_cls_token=False" in snippet and "transform" not in snippet and "'green'" in snippet
    state = torch.load(tmp_path / "vitdet.pth", weights_only=True)["model"]
    assert all(name.startswith("backbone.net.") for name in state)
    detection = DetectionSettings(
        image_size=64, window=4, global_blocks=(1,), pyramid_scales=(2.0, 1.0), relative_position=False, pyramid_dim=8
    )

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = SimpleFeaturePyramid(model.source.settings, detection)

    tensors: dict[str, Tensor] = {name.removeprefix("backbone.net."): x for name, x in state.items()}
    placed = load_backbone(Holder(), tensors, detection)
    assert not [name for name in placed.new if name.startswith("backbone.net.")]


@pytest.mark.detectron2
def test_the_printed_vitdet_lines_run(stages: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    names: dict[str, Any] = {}
    exec(export(load(stages / "pretrain"), "vitdet", tmp_path / "vitdet.pth"), names)
    assert names["net"](torch.zeros(1, 3, 64, 64))["last_feat"].shape[1] == 48


def card(path: Path) -> tuple[dict[str, Any], str]:
    _, header, body = path.read_text().split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_card_says_what_it_is_what_it_reaches_and_how_to_load_it(stages: Path, tmp_path: Path) -> None:
    snippet = export(load(stages / "pretrain"), "hub-folder", tmp_path / "hub", licence="cc-by-4.0")
    header, body = card(tmp_path / "hub/README.md")
    assert header["license"] == "cc-by-4.0" and header["library_name"] == "timm" and header["datasets"] == ["folder"]
    assert snippet.strip() in body and "without labels on `folder`" in body
    for stage, metric in (("finetune", "test_top1"), ("linear_probe", "test_top1"), ("knn", "knn_top1_k3")):
        value = json.loads((stages / stage / "metrics.json").read_text())["metrics"][metric]
        assert f"| {stage} | {metric} | {value:.4g} |" in body
    assert "| `encoder.patch_size` | 8 |" in body and "| `pretrain.epochs` | 2 |" in body


def test_a_card_without_a_licence_says_so(stages: Path, tmp_path: Path) -> None:
    export(load(stages / "finetune"), "timm", tmp_path / "w.safetensors")
    header, body = card(tmp_path / "w.md")
    assert "license" not in header and "Not stated" in body and "blue, green, red" in body


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("timm", "w.pt", "timm's weights are a .safetensors file"),
        ("onnx", "w.safetensors", "name an .onnx file"),
        ("vitdet", "w.safetensors", "detectron2 reads .pth files"),
        ("tensorflow", "w", "choose timm, onnx, hub-folder, vitdet"),
    ],
)
def test_a_wrong_target_is_a_sentence_and_writes_nothing(
    stages: Path, tmp_path: Path, to: str, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(load(stages / "pretrain"), to, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_detector_is_not_exported(stages: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a detector, which can't be exported; export its encoder"):
        export(load(stages / "detection"), "timm", tmp_path / "w.safetensors")


def test_a_timm_file_has_timms_names(exported: dict[tuple[str, str], Export]) -> None:
    names = set(load_file(exported["timm", "linear_probe"].path))
    assert {"cls_token", "blocks.1.mlp.fc2.bias", "head.weight"} <= names


TAKEN = [("timm", "a.safetensors", "a.md"), ("onnx", "a.onnx", "a.md"), ("vitdet", "a.pth", "a.md"),
         ("hub-folder", ".", "README.md"), ("hub-folder", ".", "config.json"), ("hub-folder", ".", "model.safetensors")]  # fmt: skip


@pytest.mark.parametrize(("to", "out", "name"), TAKEN)
def test_a_file_that_no_export_wrote_is_not_replaced(
    stages: Path, tmp_path: Path, to: str, out: str, name: str
) -> None:
    """Its name is not the one that was given: the user does not know that the export writes it."""
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=rf"{name} is there, and no export to {to} wrote it; move it, or choose"):
        export(load(stages / "pretrain"), to, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("to", "out"), [("timm", "a.safetensors"), ("onnx", "a.onnx"), ("vitdet", "a.pth"), ("hub-folder", "a")]
)
def test_the_same_export_again_replaces_its_own_files(stages: Path, tmp_path: Path, to: str, out: str) -> None:
    model = load(stages / "pretrain")
    export(model, to, tmp_path / out)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    export(model, to, tmp_path / out, licence="mit")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files
    assert "license: mit" in next(path for path in files if path.suffix == ".md").read_text()


@pytest.mark.parametrize(("first", "second"), [("a.safetensors", "a.onnx"), ("a.onnx", "a.pth"), ("a.pth", "a.pt")])
def test_two_exports_share_no_card(stages: Path, tmp_path: Path, first: str, second: str) -> None:
    forms = {".safetensors": "timm", ".onnx": "onnx", ".pth": "vitdet", ".pt": "vitdet"}
    model = load(stages / "pretrain")
    export(model, forms[Path(first).suffix], tmp_path / first)
    card = (tmp_path / "a.md").read_text()
    with pytest.raises(UserError, match=r"a\.md is there"):
        export(model, forms[Path(second).suffix], tmp_path / second)
    assert (tmp_path / "a.md").read_text() == card and not (tmp_path / second).exists()


@pytest.mark.parametrize(
    ("to", "out"),
    [("timm", "model.safetensors"), ("timm", "new.safetensors"), ("onnx", "new.onnx"), ("hub-folder", ".")],
)
def test_nothing_is_exported_into_a_stages_folder(stages: Path, tmp_path: Path, to: str, out: str) -> None:
    shutil.copytree(stages / "finetune", tmp_path / "finetune")
    before = {path: path.read_bytes() for path in (tmp_path / "finetune").iterdir() if path.is_file()}
    with pytest.raises(UserError, match="finetune is a stage's folder, whose files are sealed; name another"):
        export(load(stages / "pretrain"), to, tmp_path / "finetune" / out)
    assert before == {path: path.read_bytes() for path in (tmp_path / "finetune").iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ['a"b', "a'b", "a\\b"])
@pytest.mark.parametrize("to", FILES)
def test_the_printed_lines_run_whatever_the_name_is(stages: Path, tmp_path: Path, to: str, name: str) -> None:
    out = tmp_path / (name + Path(FILES[to]).suffix)
    names: dict[str, Any] = {}
    exec(export(load(stages / "pretrain"), to, out), names)
    assert "embed" in names


def pictures(folder: Path) -> list[Path]:
    """A file of every kind of pixels that Pillow writes to PNG and TIFF; one stands on its side."""
    grey = np.random.default_rng(0).integers(0, 65536, (40, 48))
    colours = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    palette = colours.quantize(16)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    colours.save(folder / "turned.png", exif=exif)
    palette.save(folder / "transparent.png", transparency=3)
    for mode in ("1", "L", "LA", "RGB", "RGBA"):
        colours.convert(mode).save(folder / f"{mode}.png")
    palette.save(folder / "P.png")
    colours.convert("CMYK").save(folder / "CMYK.tiff")
    PIL.Image.fromarray(grey.astype(np.uint16)).save(folder / "grey16.png")
    PIL.Image.fromarray((grey % 4096).astype(np.uint16)).save(folder / "grey12.png")
    PIL.Image.fromarray(grey.astype(np.uint16)).save(folder / "grey16.tiff")
    PIL.Image.fromarray(grey.astype(np.int32)).save(folder / "grey32.tiff")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("to", FILES)
def test_the_printed_lines_read_every_kind_of_pixels_as_the_model_does(
    exported: dict[tuple[str, str], Export], tmp_path: Path, to: str
) -> None:
    names: dict[str, Any] = {}
    exec(exported[to, "finetune"].snippet, names)
    model = exported[to, "finetune"].model
    for file in pictures(tmp_path):
        assert np.abs(np.asarray(names["embed"](str(file))) - model.embed(file).numpy()).max() < 1e-4, file.name
        assert names["predict"](str(file))[0] == model.predict(file).classes[0]


@pytest.mark.parametrize(
    "pixels", [np.ones((8, 8), np.float32), np.full((8, 8), 70_000, np.int32)], ids=["float", "32 bits"]
)
def test_the_printed_lines_refuse_the_pixels_that_the_model_refuses(
    exported: dict[tuple[str, str], Export], tmp_path: Path, pixels: Any
) -> None:
    PIL.Image.fromarray(pixels).save(tmp_path / "a.tiff")
    names: dict[str, Any] = {}
    exec(exported["timm", "pretrain"].snippet, names)
    with pytest.raises(ValueError, match="no whole numbers of 8 or 16 bits"):
        names["embed"](str(tmp_path / "a.tiff"))
    with pytest.raises(UserError):
        exported["timm", "pretrain"].model.embed(tmp_path / "a.tiff")
