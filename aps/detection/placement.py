"""Loads an encoder's weights into a detector by name, and says of each parameter: loaded, interpolated, repeated or new.

Design: encoder weights that a detector does not use are listed, not skipped silently: ViTDet uses neither the class token
nor the final norm (whose name could be confused with a pyramid's norm). Only relative positions may be new in the
backbone; any other difference in names or shapes is refused, and nothing is loaded.

It does not read files (`aps.models.weights`) nor know engines: both backbones have the same names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from aps.errors import UserError
from aps.settings.blocks import DetectionSettings

DROPPED = re.compile(r"cls_token|norm\.(weight|bias)|head\..*")  # full names of an encoder's tensors
RELATIVE = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]")


@dataclass(frozen=True)
class BackboneTensors:
    tensors: dict[str, Tensor]  # by timm's names
    dropped: tuple[str, ...]  # the encoder's tensors that a ViTDet backbone does not use


@dataclass(frozen=True)
class Placement:
    """Where the value of each parameter of the detector comes from."""

    loaded: tuple[str, ...]
    interpolated: tuple[str, ...]
    repeated: tuple[str, ...]
    new: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        return {status: len(names) for status, names in asdict(self).items()}


def backbone_tensors(encoder: nn.Module) -> BackboneTensors:
    """The tensors of an `Encoder` that a ViTDet backbone uses, and the names of the others."""
    state = encoder.state_dict()
    dropped = tuple(name for name in state if DROPPED.fullmatch(name))
    return BackboneTensors({name: x for name, x in state.items() if name not in dropped}, dropped)


def load_backbone(
    model: nn.Module, tensors: Mapping[str, Tensor], settings: DetectionSettings, prefix: str = "backbone.net."
) -> Placement:
    """Copy `tensors` to the parameters of `model` under `prefix`, all of them or none.

    Args:
        model: a detector of either engine, made with `settings`.
        tensors: from `backbone_tensors`.
        settings: `positions` says how the position embedding is used: it keeps its pretraining grid and is interpolated to
            the image's grid at each forward pass, or it is repeated over the image's grid here, once.

    Raises:
        UserError: a tensor has no parameter, a parameter has no tensor, or shapes differ (width, depth, patch size, bias).
    """
    backbone = {name.removeprefix(prefix): x for name, x in model.state_dict().items() if name.startswith(prefix)}
    if unknown := sorted(set(tensors) - set(backbone)):
        raise UserError(
            f"detection: the encoder's '{unknown[0]}' has no place in the backbone ({len(unknown)} such names); "
            "set encoder.depth and encoder.qkv_bias to those of its weights"
        )
    missing = sorted(name for name in set(backbone) - set(tensors) if not RELATIVE.fullmatch(name))
    if missing:
        raise UserError(
            f"detection: the backbone's '{missing[0]}' is not among the encoder's weights ({len(missing)} such names); "
            "set encoder.depth and encoder.qkv_bias to those of its weights"
        )
    pretrained = math.isqrt(tensors["pos_embed"].shape[1])
    grid = settings.image_size // backbone["patch_embed.proj.weight"].shape[-1]
    if settings.positions == "repeat":
        tensors = {**tensors, "pos_embed": repeat_positions(tensors["pos_embed"], grid)}
    for name, x in tensors.items():
        if backbone[name].shape != x.shape:
            raise UserError(
                f"detection: '{name}' has shape {tuple(x.shape)} in the encoder's weights and "
                f"{tuple(backbone[name].shape)} in the backbone; set encoder.dim, encoder.patch_size and "
                "encoder.image_size to those of its weights"
            )
    for name, x in tensors.items():
        backbone[name].copy_(x)  # tensors of a state dict share memory with the model
    resized = (f"{prefix}pos_embed ({pretrained}x{pretrained} -> {grid}x{grid})",) if pretrained != grid else ()
    return Placement(
        loaded=tuple(prefix + name for name in tensors if not (resized and name == "pos_embed")),
        interpolated=resized if settings.positions == "interpolate" else (),
        repeated=resized if settings.positions == "repeat" else (),
        new=tuple(name for name in model.state_dict() if name.removeprefix(prefix) not in tensors),
    )


def repeat_positions(learned: Tensor, side: int) -> Tensor:
    """learned: (1, G*G, D) -> (1, side*side, D): the grid repeated from the top left, cut at the image's edges."""
    G = math.isqrt(learned.shape[1])
    times = -(-side // G)
    grid = learned.view(1, G, G, -1).repeat(1, times, times, 1)[:, :side, :side]
    return grid.reshape(1, side * side, -1)


def table(placement: Placement, dropped: tuple[str, ...], source: str) -> str:
    """A placement as text for the log: every name, those of one block or module on one line."""
    rows = [(status, name) for status, names in asdict(placement).items() for name in names]
    rows += [("left behind", name) for name in dropped]
    grouped: dict[tuple[str, str], list[str]] = {}
    for status, name in rows:
        module = re.match(r"(backbone\.net\.blocks\.\d+\.)|([\w]+\.[\w]+\.)|", name).group()  # type: ignore[union-attr]
        grouped.setdefault((status, module), []).append(name.removeprefix(module))
    counts = ", ".join(f"{count} {status}" for status, count in placement.counts().items() if count)
    lines = [f"weights of the detector, encoder from {source}: {counts}, {len(dropped)} left behind"]
    lines += [f"  {status:<12} {module}{{{', '.join(names)}}}" for (status, module), names in grouped.items()]
    return "\n".join(lines)
