"""Imports weights from the authors' released checkpoints. Export to other software is in `aps.inference.export`.

Design: checkpoints of the release are read as tensors only. Pickled modules are refused, because opening them runs the
code that they name; the message says how to extract the tensors.

The names of the release are those of method.md ("The release's checkpoints"). Nothing else of the release is used.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aps.errors import UserError
from aps.models.encoder import build_encoder
from aps.models.heads import projection_head
from aps.models.weights import check_finite, load_state, save_encoder, save_tensors
from aps.settings.blocks import EncoderSettings

# Normalization of 32-pixel images in the release: CIFAR's statistics in pretraining, but ImageNet's in finetuning
# (method.md, Views and Traps).
PRETRAINING_PIXELS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
FINETUNING_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

ENCODER_NAMES = {"cls_token": "cls_token", "pos_embedding": "pos_embed"}
ENCODER_PREFIXES = {"patchify.": "patch_embed.proj.", "transformer.": "blocks.", "layer_norm.": "norm."}


def import_weights(checkpoint: Path, out: Path, heads: int | None = None) -> list[Path]:
    """Convert a checkpoint of the authors' release into this project's files.

    A pretraining checkpoint becomes `out`/encoder.safetensors and `out`/heads.safetensors, a finetuned one
    `out`/model.safetensors (the encoder and its classifier). Sizes are inferred from shapes.

    Args:
        checkpoint: a state dict, bare or under 'state_dict' or 'model', with or without a 'module.' prefix.
        out: folder.
        heads: number of attention heads, which shapes do not show; default: width / 64, as in the whole release.

    Returns:
        The files written.

    Raises:
        UserError: the file is not a state dict, or a name or shape is not the release's.
    """
    state = read_checkpoint(checkpoint)
    pretrained = any(name.startswith("base_encoder.") for name in state)
    encoder_state, head_state = _split(state, "base_encoder." if pretrained else "", str(checkpoint))
    settings = infer_settings(encoder_state, heads, str(checkpoint))
    encoder = build_encoder(settings)
    load_state(encoder, encoder_state, settings, str(checkpoint))
    info: dict[str, Any] = {"origin": f"the authors' release, {checkpoint.name}"}
    if pretrained:
        _check_heads(head_state, encoder.embed_dim, str(checkpoint))
        info |= {"stage": "pretrain"} | (PRETRAINING_PIXELS if settings.image_size == 32 else {})
        save_encoder(encoder, settings, out / "encoder.safetensors", info)
        save_tensors(head_state, out / "heads.safetensors")
        return [out / "encoder.safetensors", out / "heads.safetensors"]
    classes = len(head_state["head.weight"])
    encoder.reset_classifier(classes)
    _load(encoder.get_classifier(), head_state, "head.", str(checkpoint))
    info |= {"stage": "finetune", "classes": classes} | (FINETUNING_PIXELS if settings.image_size == 32 else {})
    save_encoder(encoder, settings, out / "model.safetensors", info)
    return [out / "model.safetensors"]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pt/.pth file, read without executing any of its code.

    Raises:
        UserError: the file is missing or broken, or holds more than tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        if not file.read(2).startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of older versions
            raise UserError(f"checkpoint {path} is not a PyTorch file; give a state dict (.pt, .pth)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"checkpoint {path} holds a pickled Python object{f' ({found[1]})' if found else ''}, not tensors alone, and "
            "opening it would run its code; if you trust it, save its tensors where that code is installed: "
            f"python -c \"import torch; x = torch.load('{path}', map_location='cpu', weights_only=False); "
            "torch.save(x.state_dict() if hasattr(x, 'state_dict') else x['state_dict'], 'state.pt')\" "
            "and import state.pt"
        ) from None
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {path} is not a whole PyTorch file ({reason}); download it again") from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not (isinstance(content, Mapping) and content and all(isinstance(x, Tensor) for x in content.values())):
        raise UserError(
            f"checkpoint {path} has no state dict, neither bare nor under 'state_dict' or 'model'; export one"
        )
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def infer_settings(state: Mapping[str, Tensor], heads: int | None, source: str) -> EncoderSettings:
    """Settings of an encoder from the shapes of its state dict (timm's names). Raises UserError for other shapes."""
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UserError(
                f"{source}: no '{_release_name(name)}' among its names; it is not a checkpoint of the APS release"
            )
    cells, dim = state["pos_embed"].shape[1:]
    grid, patch = math.isqrt(cells), state["patch_embed.proj.weight"].shape[-1]
    if grid * grid != cells:
        raise UserError(
            f"{source}: 'pos_embedding' has {cells} rows, which is no square grid; it is not a checkpoint of the APS release"
        )
    if heads is None and dim % 64:
        raise UserError(
            f"{source}: width {dim} is not a multiple of 64, so the number of attention heads can't be guessed; give --attention-heads"
        )
    return EncoderSettings(
        image_size=grid * patch,
        patch_size=patch,
        dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        heads=heads or dim // 64,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )


def _split(state: Mapping[str, Tensor], prefix: str, source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict with the release's names into the encoder's, with timm's names, and the heads', with ours.

    Raises UserError for a name that belongs to neither."""
    encoder: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for name, value in state.items():
        short = name.removeprefix(prefix) if name.startswith(prefix) else ""
        start = next((s for s in ENCODER_PREFIXES if short.startswith(s)), None)
        if short in ENCODER_NAMES:
            # (N, 1, d) in the release, (1, N, d) in timm
            encoder[ENCODER_NAMES[short]] = value.transpose(0, 1) if short == "pos_embedding" else value
        elif start is not None:
            encoder[ENCODER_PREFIXES[start] + short.removeprefix(start)] = value
        elif short.startswith("fc."):
            heads[("projector." if prefix else "head.") + short.removeprefix("fc.")] = value
        elif prefix and name.startswith("predictor."):
            heads[name] = value
        else:
            raise UserError(f"{source}: '{name}' is not a name of the APS release's checkpoints; nothing was imported")
    if not prefix and "head.weight" not in heads:
        raise UserError(
            f"{source}: neither 'base_encoder.*' (pretraining) nor 'fc.weight' (finetuned) is there; nothing was imported"
        )
    return encoder, heads


def _check_heads(state: Mapping[str, Tensor], dim: int, source: str) -> None:
    """Raises UserError where projector or predictor is not a complete head of the method, of any widths."""
    fan_in = dim
    for name in ("projector", "predictor"):
        try:
            widths = [len(state[f"{name}.{i}.weight"]) for i in (0, 3, 6)]
        except KeyError as missing:
            raise UserError(f"{source}: the {name}'s {missing} is missing; the checkpoint is not whole") from None
        head_state = {key: x for key, x in state.items() if key.startswith(f"{name}.")}
        _load(projection_head((fan_in, *widths)), head_state, f"{name}.", source)
        fan_in = widths[-1]


def _load(module: nn.Module, state: Mapping[str, Tensor], prefix: str, source: str) -> None:
    try:
        module.load_state_dict({name.removeprefix(prefix): x for name, x in state.items()}, strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{source}: its {prefix.rstrip('.')} is not the release's: {reason}") from None
    for name, x in state.items():
        if not name.endswith(".num_batches_tracked"):  # an integer
            check_finite(x, f"{source}: '{name}'")


def _release_name(name: str) -> str:
    back = {ours: theirs for theirs, ours in (ENCODER_NAMES | ENCODER_PREFIXES).items()}
    start = next((s for s in back if name.startswith(s)), "")
    return back.get(start, "") + name.removeprefix(start)
