"""Exports weights to timm, to ONNX, to a folder for the Hub, and to ViTDet, each with a model card.

Every export returns the Python that loads it, with transform and class names. That Python needs nothing of this project,
runs as printed (tests/inference/test_export.py), and computes the same as this project.

Design: the name of a timm model cannot set LayerNorm's eps, which is 1e-5 here and 1e-6 in most of timm. So a folder for
the Hub names the family whose eps is 1e-5 (timm's CLIP towers), with its extra norm switched off; the Python for a single
file passes the norm as an argument.

Files whose names it chooses itself (cards, what a folder for the Hub holds) are replaced only where an export of the same
form wrote them: cards end in a line that says so, config.json has a key.
"""

from __future__ import annotations

import pprint
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aps.detection.placement import backbone_tensors
from aps.errors import UserError
from aps.files import atomic_path, check_is_no_folder, read_json, write_json
from aps.inference.cards import model_card
from aps.inference.convert import EPS_FAMILIES, FAMILY, timm_arguments
from aps.inference.model import Loaded, Model
from aps.models.archs import dimensions
from aps.models.encoder import Encoder
from aps.models.weights import encoder_metadata, save_tensors
from aps.seals import check_no_stage

LINE = 110  # characters of a printed list
MADE_BY, OURS = "made_by", "aps export"  # key and value in config.json


def export(model: Loaded, to: str, out: Path, licence: str | None = None) -> str:
    """Write `model` in the form `to` (a key of TARGETS), and its card; returns the Python that loads it.

    Args:
        out: a file, or a folder for `hub-folder`.
        licence: the weights' licence for the card, by the Hub's name (`apache-2.0`, `cc-by-nc-4.0`, ...).

    Raises:
        UserError: the network can't be exported in this form, a package is missing, or `out` can't be written.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: choose {', '.join(TARGETS)}")
    if not isinstance(model, Model):
        raise UserError(f"{model.source.address} is a detector, which can't be exported; export its encoder")
    suffixes, advice = SUFFIXES.get(to, ((), ""))
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: {advice}")
    card, mark = _check_place(to, out)
    loading = TARGETS[to](model, out)
    text = model_card(model, loading, licence, out.resolve().stem)
    with atomic_path(card) as temporary:
        temporary.write_text(f"{text}\n{mark}\n", encoding="utf-8", errors="backslashreplace")
    return loading


def _check_place(to: str, out: Path) -> tuple[Path, str]:
    """The path of the card and its last line, by which the next export knows it.

    Raises:
        UserError: `out` lies in a stage's folder, or a file is in the way that no export of this form wrote.
    """
    if to == "hub-folder":
        if out.is_file():
            raise UserError(f"--out {out} is a file; name a folder")
        folder, card, form = out, out / "README.md", to
        config = out / "config.json"
        ours = config.exists() and _is_ours(config)
        named = [] if ours else [config, out / "model.safetensors"]
    else:
        check_is_no_folder(out)
        folder, card, form, named = out.parent, out.with_suffix(".md"), f"{to}, {out.suffix}", []
    check_no_stage(folder)
    check_is_no_folder(card)
    mark = f"<!-- written by aps export: {form} -->"
    if card.exists() and mark not in card.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]:
        named.append(card)
    if foreign := [file for file in named if file.exists()]:
        raise UserError(f"{foreign[0]} is there, and no export to {to} wrote it; move it, or choose another --out")
    return card, mark


def _is_ours(config: Path) -> bool:
    try:
        found = read_json(config)
    except UserError:
        return False
    return isinstance(found, dict) and found.get(MADE_BY) == OURS


# --------------------------------------------------------------------------------------------------
# timm


def _export_timm(model: Model, out: Path) -> str:
    save_tensors(_state(model), out, _metadata(model))
    settings = model.source.settings
    name, arguments, norm = _timm_name(model), dict[str, Any](num_classes=len(model.classes)), list[str]()
    if settings is not None:
        name, arguments = FAMILY, timm_arguments(settings, len(model.classes))
        norm = [f"    norm_layer=partial(torch.nn.LayerNorm, eps={settings.layer_norm_eps!r}),"]
    arguments |= {"pretrained_cfg_overlay": model.preprocessing.timm_config(), "checkpoint_path": str(out)}
    creation = [
        "model = timm.create_model(",
        f'    "{name}",{"  # the family; every size is given below" if norm else ""}',
        *(f"    {key}={value!r}," for key, value in arguments.items()),
        *norm,
        ").eval()",
    ]
    return _script(model, ["import timm"], creation, partial_=bool(norm))


def _export_hub(model: Model, out: Path) -> str:
    """timm's layout: config.json and model.safetensors."""
    settings, classes = model.source.settings, len(model.classes)
    pooling = "token"
    layers = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    if settings is None:
        architecture, arguments = _timm_name(model).partition(".")[0], dict[str, Any]()
        network: Any = model.network
        pooling = getattr(network, "global_pool", "avg")
        layers = {key: network.pretrained_cfg[key] for key in layers if key in network.pretrained_cfg}
    elif settings.layer_norm_eps in EPS_FAMILIES:
        architecture, extra = EPS_FAMILIES[settings.layer_norm_eps]
        arguments = timm_arguments(settings, classes) | extra
        del arguments["num_classes"]  # the key stands below
    else:
        known = " or ".join(f"{eps:g}" for eps in EPS_FAMILIES)
        raise UserError(
            f"encoder.layer_norm_eps is {settings.layer_norm_eps:g}, and a folder for the Hub can only say {known}; use --to timm"
        )
    config: dict[str, Any] = {
        MADE_BY: OURS,
        "architecture": architecture,
        "num_classes": classes,
        "num_features": model.dim,
        "global_pool": pooling,
        "pretrained_cfg": {**model.preprocessing.timm_config(), "num_classes": classes, **layers},
        "model_args": arguments,
    }
    if model.classes:
        config["label_names"] = list(model.classes)
    write_json(out / "config.json", config)  # first: it tells the next export that the weights are ours
    save_tensors(_state(model), out / "model.safetensors", _metadata(model))
    creation = [f"model = timm.create_model({f'local-dir:{out}'!r}, pretrained=True).eval()"]
    return _script(model, ["import timm"], creation)


def _timm_name(model: Model) -> str:
    return model.source.address.removeprefix("timm:")


def _state(model: Model) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in model.network.state_dict().items()}


def _metadata(model: Model) -> dict[str, str]:
    """Metadata from which `aps.load` can load the export, if the network is one of this project."""
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


def _export_onnx(model: Model, out: Path) -> str:
    model.to_onnx(out)
    lines = [
        *_imports(["import onnxruntime"]),
        "",
        f"session = onnxruntime.InferenceSession({str(out)!r})",
        *_pre(model),
    ]
    if model.classes:
        lines += [
            "def predict(path):",
            '    """The likeliest class of an image file, and its probability."""',
            '    (probabilities,) = session.run(["probabilities"], {"images": transform(opened(path))[None].numpy()})',
            "    best = int(probabilities[0].argmax())",
            "    return classes[best], float(probabilities[0, best])",
            "",
            "",
        ]
    lines += [
        "def embed(path):",
        '    """The features of an image file, float32 (1, ' + str(model.dim) + ')."""',
        '    return session.run(["features"], {"images": transform(opened(path))[None].numpy()})[0]',
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# ViTDet


def _export_vitdet(model: Model, out: Path) -> str:
    """A checkpoint for detectron2, with the backbone's names in its ViTDet."""
    settings = model.source.settings
    if settings is None or not isinstance(model.network, Encoder):
        raise UserError(f"{model.source.address} is no encoder of this project; only those go to ViTDet")
    backbone = backbone_tensors(model.network)
    state = {f"backbone.net.{name}": x.detach().cpu().clone() for name, x in backbone.tensors.items()}
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
# The Python that is printed


def _script(model: Model, imports: list[str], creation: list[str], partial_: bool = False) -> str:
    lines = [*(["from functools import partial", ""] if partial_ else []), *_imports([*imports]), ""]
    lines += [*creation, *_pre(model)]
    if model.classes:
        lines += [
            "def predict(path):",
            '    """The likeliest class of an image file, and its probability."""',
            "    with torch.inference_mode():",
            "        probabilities = model(transform(opened(path))[None]).softmax(1)[0]",
            "    return classes[int(probabilities.argmax())], float(probabilities.max())",
            "",
            "",
        ]
    lines += [
        "def embed(path):",
        '    """The features of an image file, float32 (1, ' + str(model.dim) + ')."""',
        "    with torch.inference_mode():",
        "        return model.forward_head(model.forward_features(transform(opened(path))[None]), pre_logits=True)",
    ]
    return "\n".join(lines)


def _imports(lines: list[str]) -> list[str]:
    """Import statements: `lines`, and those that every script needs."""
    from_imports = ["from PIL import Image, ImageOps", "from torchvision.transforms import v2"]
    return [*sorted([*lines, "import numpy as np", "import torch"]), *from_imports]


def _pre(model: Model) -> list[str]:
    """Lines that define the transform, the class names, and how a file is opened."""
    return [*model.preprocessing.code().split("\n"), *_classes(model), "", "", *OPENED.splitlines()]


def _classes(model: Model) -> list[str]:
    if not model.classes:
        return []
    return ["classes = " + pprint.pformat(list(model.classes), width=LINE, compact=True)]


# As aps.data.images, which the printed lines can't import; a test compares them over Pillow's modes.
OPENED = '''\
def opened(path):
    """An image file in 8-bit RGB, upright; of 16 bits, the upper 8 are kept."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"{path}: its pixels are no whole numbers of 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")


'''


TARGETS: dict[str, Callable[[Model, Path], str]] = {
    "timm": _export_timm,
    "onnx": _export_onnx,
    "hub-folder": _export_hub,
    "vitdet": _export_vitdet,
}
SUFFIXES = {  # of the file that a form writes, and what to say of others
    "timm": ((".safetensors",), "timm's weights are a .safetensors file; name one"),
    "onnx": ((".onnx",), "name an .onnx file"),
    "vitdet": ((".pth", ".pt"), "detectron2 reads .pth files; name one"),
}
