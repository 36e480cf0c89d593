"""Reads and writes encoders as safetensors files with timm's names, and with the settings as metadata.

Design: weights are loaded completely or not at all. Every name in the file must be a parameter of the model, and the other
way round; a difference in shape is an error that names the setting and both values. Only a classifier head may be left
out, and the log says so.

It does not read the authors' release; `aps.models.transfer` converts that into a file of this kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from aps.errors import UserError
from aps.files import check_weights, expanded, safetensors_path
from aps.models.archs import dimensions
from aps.models.encoder import Encoder, build_encoder
from aps.settings.blocks import EncoderSettings
from aps.text import shorten

log = logging.getLogger(__name__)

RGB = tuple[float, float, float]

SETTINGS_KEY = "aps_encoder"
INFO_KEY = "aps_info"
SEAL_KEY = "aps_sha256"
AT_ONCE = 65_536  # rows whose numbers are checked at once


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically: a reader sees the old file or the whole new one. Equal content, equal bytes.

    Names that share a tensor, such as tied weights, get a copy each.

    Raises:
        UserError: the folder can't be written or the disk is full.
    """
    plain: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, x in tensors.items():
        saved = x.detach().cpu().contiguous()
        storage = saved.untyped_storage().data_ptr()
        plain[name] = saved.clone() if storage in known else saved  # the library refuses what shares memory
        known.add(storage)
    sealed = dict(metadata or {}) | {SEAL_KEY: _seal(plain, metadata or {})}
    with safetensors_path(Path(path)) as temporary:
        save_file(plain, temporary, sealed)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file. The library's order is random, but a run's key depends on a file's bytes."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the library writes compact JSON too"
        file.seek(8)
        file.write(text.ljust(length))


def save_encoder(
    encoder: nn.Module, settings: EncoderSettings, path: Path, info: Mapping[str, Any] | None = None
) -> None:
    """Write an encoder, with its classifier head if it has one.

    Args:
        encoder: an `Encoder`; its state dict is stored under timm's names.
        settings: what it was built from; `load_encoder` compares them.
        info: other plain data for later readers: {"mean": ..., "std": ..., "classes": ..., "experiment": ...,
            "stage": ..., "digest": ...}. `export` prints the normalization from it.

    Raises:
        UserError: the folder can't be written or the disk is full.
    """
    save_tensors(encoder.state_dict(), path, encoder_metadata(settings, info or {}))


def encoder_metadata(settings: EncoderSettings, info: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an encoder's file."""
    return {SETTINGS_KEY: json.dumps(_as_built(settings)), INFO_KEY: json.dumps(dict(info))}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: the file is missing or not a safetensors file, or it was written here and changed or damaged since.
    """
    path = expanded(path)
    check_weights(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"weights file {path} is not a whole safetensors file ({_short(error)}); copy or make it again"
        ) from None
    seal = metadata.pop(SEAL_KEY, None)
    if seal is not None and seal != _seal(tensors, metadata):
        raise UserError(f"weights file {path}: its content is not what was written; copy or make it again")
    return tensors, metadata


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return shorten(text, 120, "...")


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and values of all tensors, and over the other metadata."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(x: Tensor, what: str, advice: str = "make it again") -> None:
    """Raises UserError where `x`, called `what` in the message, holds other values than finite floating-point numbers."""
    kind = str(x.dtype).removeprefix("torch.")
    if not x.is_floating_point():
        raise UserError(f"{what} holds {kind} instead of floating-point numbers; {advice}")
    if x.element_size() < 2:
        raise UserError(
            f"{what} holds {kind}, of which too little is left to compute with; store it as float32 or float16"
        )
    parts = x.split(AT_ONCE) if x.ndim else (x,)  # in one piece it would take twice the memory of `x` beside it
    if not all(bool(part.isfinite().all()) for part in parts):
        count = sum(int((~part.isfinite()).sum()) for part in parts)
        raise UserError(f"{what}: {count:,} of {x.numel():,} numbers are NaN or infinite; {advice}")


def read_settings(metadata: Mapping[str, str], path: Path) -> EncoderSettings | None:
    """The settings stored by `save_encoder`; None in a file of other software. Raises UserError for invalid ones."""
    if SETTINGS_KEY not in metadata:
        return None
    try:
        return EncoderSettings.model_validate_json(metadata[SETTINGS_KEY])
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(
            f"weights file {path}: its stored encoder settings are not valid ({reason}); make it again"
        ) from None


def read_info(path: Path) -> dict[str, Any]:
    """What the stage that wrote the file stored with the weights: normalization, experiment, stage, digest.

    Raises:
        UserError: the file is broken, or what it stores is damaged.
    """
    _, metadata = read_tensors(path)
    try:
        info = json.loads(metadata.get(INFO_KEY, "{}"))
        for key in {"mean", "std"} & info.keys():
            if len(info[key]) != 3 or not all(math.isfinite(x) and x >= 0 for x in info[key]):
                raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"weights file {path}: what is stored of its images ({INFO_KEY}) is damaged; copy or make it again"
        ) from None
    return dict(info)


def trained_with(spec: str | Path) -> tuple[RGB, RGB] | None:
    """(mean, std), in [0, 1] units, of the normalization that an encoder was trained with; None where it is not stored.

    Args:
        spec: as in `load_encoder`.
    """
    if str(spec).startswith("timm:"):
        config = timm.get_pretrained_cfg(str(spec).removeprefix("timm:"))
        return (config.mean, config.std) if config is not None else None  # type: ignore[return-value]
    info = read_info(Path(spec)) if str(spec) != "random" else {}
    return (tuple(info["mean"]), tuple(info["std"])) if {"mean", "std"} <= info.keys() else None  # type: ignore[return-value]


def load_encoder(
    spec: str | Path, settings: EncoderSettings, drop_path: float = 0.0, interpolate: bool = False
) -> Encoder:
    """An encoder of `settings` with the weights that `spec` names.

    Args:
        spec: a .safetensors file (ours, or of a timm model), `random`, or `timm:NAME` for timm's pretrained weights.
        settings: of the encoder; image_size may differ from that of the weights only with `interpolate`.
        drop_path: stochastic depth rate, for finetuning.
        interpolate: whether to resample the position embedding to another grid (bicubic) instead of refusing it.

    Raises:
        UserError: the file is missing or broken, or the weights differ from `settings`; names key and both values.
    """
    encoder = build_encoder(settings, drop_path)
    if str(spec) == "random":
        log.info("encoder: random initialization, nothing loaded")
        return encoder
    if str(spec).startswith("timm:"):
        state, stored = _timm_state(str(spec).removeprefix("timm:"))
    else:
        state, metadata = read_tensors(Path(spec))
        file_settings = read_settings(metadata, Path(spec))
        stored = _as_built(file_settings) if file_settings else {}
    load_state(encoder, state, settings, str(spec), stored, interpolate)
    return encoder


def load_state(
    encoder: Encoder,
    state: Mapping[str, Tensor],
    settings: EncoderSettings,
    source: str,
    stored: Mapping[str, Any] | None = None,
    interpolate: bool = False,
) -> None:
    """Load a state dict with timm's names into an encoder without head, completely or not at all.

    Args:
        encoder: built from `settings`.
        state: by timm's names; a row of pos_embed for the class token is added to cls_token, a classifier head is dropped.
        source: what to call the weights in error messages.
        stored: settings that shapes do not show (number of heads, LayerNorm eps).

    Raises:
        UserError: a setting, a name or a shape differs, or a tensor holds other values than finite numbers.
    """
    state = dict(state)
    found = {**(stored or {}), **_infer(state, source)}
    wanted = _as_built(settings)
    wanted["mlp_ratio"] = int(wanted["dim"] * settings.mlp_ratio) / wanted["dim"]  # the ratio after rounding
    for key in wanted:
        if key != "image_size" and key in found and wanted[key] != found[key]:
            raise UserError(
                f"{source}: its encoder has {key} {found[key]}, the settings ask for encoder.{key} {wanted[key]}; set them alike"
            )

    for name, value in state.items():
        check_finite(value, f"{source}: '{name}'")
    left = sorted(name for name in state if name.startswith("head."))
    for name in left:
        del state[name]
    rows = state["pos_embed"]
    side = math.isqrt(rows.shape[1])
    if rows.shape[1] == side * side + 1:  # most timm models have a row for the class token; adding it there is the same
        state["cls_token"] = state["cls_token"] + rows[:, :1]
        state["pos_embed"] = rows = rows[:, 1:]
    resampled = side * side == rows.shape[1] and side != settings.grid
    if resampled:
        if not interpolate:
            raise UserError(
                f"{source}: its encoder has image_size {side * wanted['patch_size']} (a {side}x{side} grid), the settings "
                f"ask for encoder.image_size {settings.image_size} ({settings.grid}x{settings.grid}); set them alike"
            )
        size, old = [settings.grid] * 2, [side] * 2
        state["pos_embed"] = resample_abs_pos_embed(rows, new_size=size, old_size=old, num_prefix_tokens=0)

    parameters = encoder.state_dict()
    if unknown := sorted(set(state) - set(parameters)):
        raise UserError(
            f"{source}: '{unknown[0]}' has no place in this encoder ({len(unknown)} such names); it is another architecture; give the weights of a plain Vision Transformer"
        )
    if missing := sorted(set(parameters) - set(state)):
        raise UserError(
            f"{source}: '{missing[0]}' is missing ({len(missing)} such names); the file is not a whole encoder; give one that is"
        )
    for name, value in parameters.items():
        if state[name].shape != value.shape:
            raise UserError(
                f"{source}: '{name}' has shape {tuple(state[name].shape)}, the encoder's is {tuple(value.shape)}; give a file that fits, or "
                "set the encoder's settings as in the file"
            )
    encoder.load_state_dict(state, strict=True)
    log.info(
        "encoder: %d tensors loaded from %s, %s, new: none%s",
        len(parameters),
        source,
        f"pos_embed interpolated {side}x{side} -> {settings.grid}x{settings.grid}"
        if resampled
        else "interpolated: none",
        f", left behind: {', '.join(left)}" if left else "",
    )


def _as_built(settings: EncoderSettings) -> dict[str, Any]:
    """Settings as plain data with width, depth and heads filled in, without `arch` and the origin of the weights."""
    dims = dimensions(settings)._asdict()
    return {**settings.model_dump(mode="json", exclude={"arch", "weights", "init"}), **dims}


def _infer(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The settings that the shapes of a ViT's state dict show. Raises UserError for a state dict of another model."""
    # name -> number of dimensions
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    for name in needed:
        if name not in state:
            raise UserError(
                f"{source}: '{name}' is missing; these are not the weights of a Vision Transformer with timm's names; give another file"
            )
        if state[name].ndim != needed[name] or 0 in state[name].shape:
            raise UserError(
                f"{source}: '{name}' has shape {tuple(state[name].shape)}, which no Vision Transformer's has; give another file"
            )
    blocks = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d{1,4})\.", name))]
    dim = state["cls_token"].shape[-1]
    return {
        "dim": dim,
        "depth": 1 + max(blocks),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


def _timm_state(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pretrained weights of a timm model, and the settings that their shapes do not show."""
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise UserError(
            f"encoder.weights timm:{name}: timm can't give these weights ({error}); check name and network"
        ) from error
    if not isinstance(model, timm.models.vision_transformer.VisionTransformer):
        raise UserError(
            f"encoder.weights timm:{name}: a {type(model).__name__}, not a VisionTransformer; choose another"
        )
    eps = getattr(model.norm, "eps", None)
    if eps is None:
        raise UserError(
            f"encoder.weights timm:{name}: it has no final norm before pooling; choose a model with class-token pooling"
        )
    heads = model.get_submodule("blocks.0.attn").num_heads
    return model.state_dict(), {"heads": heads, "layer_norm_eps": eps}
