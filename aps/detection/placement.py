"""An encoder's weights in a detector, by name, with a line for each parameter: loaded, interpolated, repeated or new.

Design: what the detector has no place for is named, not skipped: ViTDet uses neither the class token nor the final
norm (whose name would otherwise meet a pyramid's norm). Only relative positions may be new in the backbone; anything else
that does not meet its like refuses the whole.

It does not read files (`aps.models.weights`) nor know engines: both backbones carry the same names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from aps.errors import UserError
from aps.settings.blocks import DetectionSettings

DROPPED = re.compile(r"cls_token|norm\.(weight|bias)|head\..*")  # of an encoder, by full name
RELATIVE = re.compile(r"blocks\.\d+\.attn\.rel_pos_[hw]")


@dataclass(frozen=True)
class BackboneTensors:
    tensors: dict[str, Tensor]  # timm's names
    dropped: tuple[str, ...]  # names of the encoder that a ViTDet backbone has no use for


@dataclass(frozen=True)
class Placed:
    """What became of each parameter of the detector."""

    loaded: tuple[str, ...]
    interpolated: tuple[str, ...]
    repeated: tuple[str, ...]
    new: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        return {status: len(names) for status, names in asdict(self).items()}


def backbone_tensors(encoder: nn.Module) -> BackboneTensors:
    """What of an `Encoder` goes into a ViTDet backbone."""
    state = encoder.state_dict()
    dropped = tuple(name for name in state if DROPPED.fullmatch(name))
    return BackboneTensors({name: x for name, x in state.items() if name not in dropped}, dropped)


def place(
    model: nn.Module, tensors: Mapping[str, Tensor], settings: DetectionSettings, prefix: str = "backbone.net."
) -> Placed:
    """Copy `tensors` to the parameters of `model` under `prefix`, all of them or none.

    Args:
        model: a detector of either engine, made with `settings`.
        tensors: from `backbone_tensors`.
        settings: `positions` says what becomes of the position embedding: it keeps its pretraining grid and is interpolated
            to that of the image at each forward, or it is repeated over the image's grid here, once.

    Raises:
        UserError: a tensor has no place, a parameter gets none, or shapes differ (width, depth, patch size, bias).
    """
    own = {name.removeprefix(prefix): x for name, x in model.state_dict().items() if name.startswith(prefix)}
    if strange := sorted(set(tensors) - set(own)):
        raise UserError(
            f"detection: the encoder's '{strange[0]}' has no place in the backbone ({len(strange)} such names); "
            "set encoder.depth and encoder.qkv_bias to those of its weights"
        )
    missing = sorted(name for name in set(own) - set(tensors) if not RELATIVE.fullmatch(name))
    if missing:
        raise UserError(
            f"detection: the backbone's '{missing[0]}' is not among the encoder's weights ({len(missing)} such names); "
            "set encoder.depth and encoder.qkv_bias to those of its weights"
        )
    pretrained = math.isqrt(tensors["pos_embed"].shape[1])
    wanted = settings.image_size // own["patch_embed.proj.weight"].shape[-1]
    if settings.positions == "repeat":
        tensors = {**tensors, "pos_embed": repeat_positions(tensors["pos_embed"], wanted)}
    for name, x in tensors.items():
        if own[name].shape != x.shape:
            raise UserError(
                f"detection: '{name}' has shape {tuple(x.shape)} in the encoder's weights and {tuple(own[name].shape)} in "
                "the backbone; set encoder.dim, encoder.patch_size and encoder.image_size to those of its weights"
            )
    for name, x in tensors.items():
        own[name].copy_(x)  # tensors of a state dict share memory with the model
    resized = (f"{prefix}pos_embed ({pretrained}x{pretrained} -> {wanted}x{wanted})",) if pretrained != wanted else ()
    return Placed(
        loaded=tuple(prefix + name for name in tensors if not (resized and name == "pos_embed")),
        interpolated=resized if settings.positions == "interpolate" else (),
        repeated=resized if settings.positions == "repeat" else (),
        new=tuple(name for name in model.state_dict() if name.removeprefix(prefix) not in tensors),
    )


def repeat_positions(learned: Tensor, side: int) -> Tensor:
    """learned: (1, G*G, D) -> (1, side*side, D): the grid over and over from the top left, cut where the image ends."""
    G = math.isqrt(learned.shape[1])
    times = -(-side // G)
    grid = learned.view(1, G, G, -1).repeat(1, times, times, 1)[:, :side, :side]
    return grid.reshape(1, side * side, -1)


def table(placed: Placed, dropped: tuple[str, ...], source: str) -> str:
    """The log of a placement: every name, those of one block or module side by side."""
    rows = [(status, name) for status, names in asdict(placed).items() for name in names]
    rows += [("left behind", name) for name in dropped]
    grouped: dict[tuple[str, str], list[str]] = {}
    for status, name in rows:
        place = re.match(r"(backbone\.net\.blocks\.\d+\.)|([\w]+\.[\w]+\.)|", name).group()  # type: ignore[union-attr]
        grouped.setdefault((status, place), []).append(name.removeprefix(place))
    counts = ", ".join(f"{count} {status}" for status, count in placed.counts().items() if count)
    lines = [f"weights of the detector, encoder from {source}: {counts}, {len(dropped)} left behind"]
    lines += [f"  {status:<12} {place}{{{', '.join(names)}}}" for (status, place), names in grouped.items()]
    return "\n".join(lines)
