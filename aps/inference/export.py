"""Weights that travel: to timm, to ONNX, to a folder for the Hub, to ViTDet; each with a model card.

Every export returns the Python that loads it, transform and class names included; it needs nothing of this project, runs
as it is printed (tests/inference/test_export.py) and gives what this project gives.

Peculiar: a plain timm name cannot ask for LayerNorm's eps, which is 1e-5 here and 1e-6 in most of timm. A folder for the
Hub therefore names the family whose eps is 1e-5 (timm's CLIP towers) with its extra norm switched off; the Python of a
single file gives the norm itself.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pprint
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from aps.config import EncoderSettings
from aps.detection.placement import backbone_tensors
from aps.errors import UserError
from aps.files import atomic_path, write_json
from aps.inference.cards import model_card
from aps.inference.images import Transform
from aps.inference.model import Loaded, Model, features
from aps.models.archs import dimensions
from aps.models.encoder import Encoder
from aps.models.weights import INFO_KEY, encoder_metadata, save_tensors

FAMILY = "vit_base_patch16_224"  # of timm; every size is given beside it
EPS_FAMILIES = {1e-6: (FAMILY, {}), 1e-5: ("vit_base_patch16_clip_224", {"pre_norm": False})}
LINE = 110  # characters of a printed list


def export(model: Loaded, to: str, out: Path, licence: str | None = None) -> str:
    """Write `model` in the form `to` (a key of TARGETS), and its card; returns the Python that loads it.

    Args:
        out: a file, or a folder for `hub-folder`.
        licence: of the weights, for the card, as the Hub names it (`apache-2.0`, `cc-by-nc-4.0`, ...).

    Raises:
        UserError: the network has no such form, a package for it is missing, or `out` can't be written.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: choose {', '.join(TARGETS)}")
    if not isinstance(model, Model):
        raise UserError(f"{model.source.address} is a detector, which can't be exported; export its encoder")
    loading = TARGETS[to](model, out)
    card = out / "README.md" if to == "hub-folder" else out.with_suffix(".md")
    with atomic_path(card) as temporary:
        temporary.write_text(model_card(model, loading, licence, out.stem), encoding="utf-8")
    return loading


# --------------------------------------------------------------------------------------------------
# timm


def to_timm(model: Model) -> nn.Module:
    """A plain timm model on the CPU, in evaluation mode."""
    if not isinstance(model.network, Encoder):
        return copy.deepcopy(model.network).cpu()
    settings = _settings(model)
    norm = partial(nn.LayerNorm, eps=settings.layer_norm_eps)
    network = timm.create_model(FAMILY, **_arguments(settings, len(model.classes)), norm_layer=norm)
    network.load_state_dict(_state(model), strict=True)
    return network.eval()


def _export_timm(model: Model, out: Path) -> str:
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: timm's weights are a .safetensors file; name one")
    save_tensors(_state(model), out, _metadata(model))
    settings = model.source.settings
    if settings is None:
        name, arguments, norm = _timm_name(model), {"num_classes": len(model.classes)}, []
    else:
        name, arguments = FAMILY, _arguments(settings, len(model.classes))
        norm = [f"    norm_layer=partial(torch.nn.LayerNorm, eps={settings.layer_norm_eps!r}),"]
    arguments |= {"pretrained_cfg_overlay": _pixels(model.preprocessing), "checkpoint_path": str(out)}
    creation = [
        "model = timm.create_model(",
        f'    "{name}",{"  # the family; every size is given below" if norm else ""}',
        *(f"    {key}={value!r}," for key, value in arguments.items()),
        *norm,
        ").eval()",
    ]
    return _script(model, ["import timm"], creation, partial_=bool(norm))


def _export_hub(model: Model, out: Path) -> str:
    """timm's own layout: config.json and model.safetensors."""
    if out.is_file():
        raise UserError(f"--out {out} is a file; name a folder")
    settings = model.source.settings
    if settings is None:
        architecture, arguments = _timm_name(model).partition(".")[0], {"num_classes": len(model.classes)}
    elif settings.layer_norm_eps in EPS_FAMILIES:
        architecture, extra = EPS_FAMILIES[settings.layer_norm_eps]
        arguments = _arguments(settings, len(model.classes)) | extra
    else:
        known = " or ".join(f"{eps:g}" for eps in EPS_FAMILIES)
        raise UserError(
            f"encoder.layer_norm_eps is {settings.layer_norm_eps:g}, and a folder for the Hub can only say {known}; use --to timm"
        )
    classes = len(model.classes)
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": model.dim,
        "global_pool": "token" if settings is not None else getattr(model.network, "global_pool", "avg"),
        "pretrained_cfg": {
            **_pixels(model.preprocessing),
            "num_classes": classes,
            "fixed_input_size": settings is not None,
            "first_conv": "patch_embed.proj" if settings is not None else model.network.pretrained_cfg.get("first_conv"),  # type: ignore[union-attr]
            "classifier": "head" if settings is not None else model.network.pretrained_cfg.get("classifier"),  # type: ignore[union-attr]
        },
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
    }
    if model.classes:
        config["label_names"] = list(model.classes)
    save_tensors(_state(model), out / "model.safetensors", _metadata(model))
    write_json(out / "config.json", config)
    creation = [f'model = timm.create_model("local-dir:{out}", pretrained=True).eval()']
    return _script(model, ["import timm"], creation)


def _arguments(settings: EncoderSettings, classes: int) -> dict[str, Any]:
    """Of `timm.create_model`, for an encoder of ours; without the norm."""
    dim, depth, heads = dimensions(settings)
    return {
        "img_size": settings.image_size,
        "patch_size": settings.patch_size,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": settings.mlp_ratio,
        "qkv_bias": settings.qkv_bias,
        "no_embed_class": True,
        "num_classes": classes,
    }


def _pixels(transform: Transform) -> dict[str, Any]:
    """timm's words for a transform."""
    return {
        "input_size": (3, transform.size, transform.size),
        "mean": transform.mean,
        "std": transform.std,
        "interpolation": transform.interpolation,
        "crop_pct": 1.0 if transform.resize is None else transform.size / transform.resize,
        "crop_mode": "squash" if transform.resize is None else "center",
    }


def _timm_name(model: Model) -> str:
    return model.source.address.removeprefix("timm:")


def _state(model: Model) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in model.network.state_dict().items()}


def _settings(model: Model) -> EncoderSettings:
    settings = model.source.settings
    assert isinstance(settings, EncoderSettings)
    return settings


def _metadata(model: Model) -> dict[str, str]:
    """So that `aps.load` takes the export back, where the network is one of ours."""
    settings = model.source.settings
    if settings is None:
        return {"format": "pt"}
    transform, made = model.preprocessing, model.provenance
    info: dict[str, Any] = {
        "mean": transform.mean,
        "std": transform.std,
        "crop": "whole" if transform.resize is None else "centre",
        "stage": model.source.stage,
        "experiment": made.get("experiment"),
        "digest": made.get("settings_digest"),
        "origin": made.get("origin"),
    }
    if model.classes:
        info["classes"] = list(model.classes)
    known = {key: value for key, value in info.items() if value is not None}
    return {"format": "pt", **encoder_metadata(settings, known)}


# --------------------------------------------------------------------------------------------------
# ONNX


class _Outputs(nn.Module):
    """What an ONNX file computes."""

    def __init__(self, network: nn.Module, classifies: bool) -> None:
        super().__init__()
        self.network, self.classifies = network, classifies

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, S, S) normalized -> probabilities (B, C) and features (B, D), or features alone."""
        found = features(self.network, images)
        return (self.network(images).softmax(1), found) if self.classifies else found


def to_onnx(model: Model, out: Path) -> Path:
    """See `Model.to_onnx`."""
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UserError(f"ONNX needs {' and '.join(missing)}; install them by `pip install 'aps-vit[onnx]'`")
    import onnx

    classifies, S = bool(model.classes), model.preprocessing.size
    network = _Outputs(copy.deepcopy(model.network).cpu().float(), classifies).eval()
    names = ["probabilities", "features"] if classifies else ["features"]
    with atomic_path(out) as temporary:
        with _quiet():
            torch.onnx.export(
                network,
                (torch.zeros(2, 3, S, S),),
                str(temporary),
                input_names=["images"],
                output_names=names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        written = onnx.load(str(temporary))
        about = {"classes": list(model.classes), "transform": _pixels(model.preprocessing), "weights": model.digest}
        onnx.helper.set_model_props(written, {key: json.dumps(value) for key, value in about.items()})
        onnx.save(written, str(temporary))
    return out


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter talks about its own future."""
    old = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(old)


def _export_onnx(model: Model, out: Path) -> str:
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: name an .onnx file")
    to_onnx(model, out)
    lines = [*_imports(["import onnxruntime"]), "", f"session = onnxruntime.InferenceSession({str(out)!r})", *_pre(model)]
    if model.classes:
        lines += [
            "def predict(path):",
            '    """The likeliest class of an image file, and its probability."""',
            *_opened(),
            '    (probabilities,) = session.run(["probabilities"], {"images": transform(image)[None].numpy()})',
            "    best = int(probabilities[0].argmax())",
            "    return classes[best], float(probabilities[0, best])",
            "",
            "",
        ]
    lines += [
        "def embed(path):",
        '    """The features of an image file, float32 (1, ' + str(model.dim) + ')."""',
        *_opened(),
        '    return session.run(["features"], {"images": transform(image)[None].numpy()})[0]',
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# ViTDet


def _export_vitdet(model: Model, out: Path) -> str:
    """A checkpoint that detectron2 reads, with the names its ViTDet gives the backbone."""
    if out.suffix not in (".pth", ".pt"):
        raise UserError(f"--out {out}: detectron2 reads .pth files; name one")
    settings = model.source.settings
    if settings is None or not isinstance(model.network, Encoder):
        raise UserError(f"{model.source.address} is no encoder of this project; only those go to ViTDet")
    found = backbone_tensors(model.network)
    state = {f"backbone.net.{name}": x.detach().cpu().clone() for name, x in found.tensors.items()}
    with atomic_path(out) as temporary:
        torch.save({"model": state, "__author__": "aps", "matching_heuristics": False}, temporary)
    dim, depth, heads = dimensions(settings)
    mean, std = ([round(255 * x, 3) for x in values] for values in (model.preprocessing.mean, model.preprocessing.std))
    return "\n".join(
        [
            "from functools import partial",
            "",
            "import torch",
            "from detectron2.modeling import ViT",
            "",
            "# detectron2: these arguments in the model's configuration, and train.init_checkpoint = " + repr(str(out)),
            "net = ViT(",
            "    img_size=1024,  # of detection",
            f"    patch_size={settings.patch_size},",
            f"    embed_dim={dim},",
            f"    depth={depth},",
            f"    num_heads={heads},",
            f"    mlp_ratio={settings.mlp_ratio!r},",
            f"    qkv_bias={settings.qkv_bias!r},",
            f"    norm_layer=partial(torch.nn.LayerNorm, eps={settings.layer_norm_eps!r}),",
            f"    pretrain_img_size={settings.image_size},",
            "    pretrain_use_cls_token=False,  # the position embedding has no row for it",
            '    out_feature="last_feat",',
            ")",
            f'state = torch.load({str(out)!r}, weights_only=True)["model"]',
            'net.load_state_dict({name.removeprefix("backbone.net."): x for name, x in state.items()})',
            f"pixel_mean, pixel_std = {mean}, {std}  # of the model, in RGB",
            *_classes(model),
        ]
    )


# --------------------------------------------------------------------------------------------------
# What is printed


def _script(model: Model, imports: list[str], creation: list[str], partial_: bool = False) -> str:
    lines = [*(["from functools import partial", ""] if partial_ else []), *_imports([*imports]), ""]
    lines += [*creation, *_pre(model)]
    if model.classes:
        lines += [
            "def predict(path):",
            '    """The likeliest class of an image file, and its probability."""',
            *_opened(),
            "    with torch.inference_mode():",
            "        probabilities = model(transform(image)[None]).softmax(1)[0]",
            "    return classes[int(probabilities.argmax())], float(probabilities.max())",
            "",
            "",
        ]
    lines += [
        "def embed(path):",
        '    """The features of an image file, float32 (1, ' + str(model.dim) + ')."""',
        *_opened(),
        "    with torch.inference_mode():",
        "        return model.forward_head(model.forward_features(transform(image)[None]), pre_logits=True)",
    ]
    return "\n".join(lines)


def _imports(own: list[str]) -> list[str]:
    return sorted([*own, "import torch"]) + ["from PIL import Image, ImageOps", "from torchvision.transforms import v2"]


def _pre(model: Model) -> list[str]:
    """Transform and class names."""
    return [*model.preprocessing.code().split("\n"), *_classes(model), "", ""]


def _classes(model: Model) -> list[str]:
    if not model.classes:
        return []
    return ["classes = " + pprint.pformat(list(model.classes), width=LINE, compact=True)]


def _opened() -> list[str]:
    return ['    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")']


TARGETS: dict[str, Callable[[Model, Path], str]] = {
    "timm": _export_timm,
    "onnx": _export_onnx,
    "hub-folder": _export_hub,
    "vitdet": _export_vitdet,
}
