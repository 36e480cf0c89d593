"""An encoder's weights in a detector, by name, with a line for each parameter: loaded, interpolated or new.

Peculiar: what the detector has no place for is named, not skipped: ViTDet uses neither the class token nor the final
norm (whose name would otherwise meet a pyramid's norm). Only relative positions may be new in the backbone; anything else
that does not meet its like refuses the whole.

It does not read files (`aps.models.weights`) nor know engines: both backbones carry the same names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from aps.errors import UserError

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
    new: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        return {"loaded": len(self.loaded), "interpolated": len(self.interpolated), "new": len(self.new)}


def backbone_tensors(encoder: nn.Module) -> BackboneTensors:
    """What of an `Encoder` goes into a ViTDet backbone."""
    state = encoder.state_dict()
    dropped = tuple(name for name in state if DROPPED.fullmatch(name))
    return BackboneTensors({name: x for name, x in state.items() if name not in dropped}, dropped)


def place(model: nn.Module, tensors: Mapping[str, Tensor], image_size: int, prefix: str = "backbone.net.") -> Placed:
    """Copy `tensors` to the parameters of `model` under `prefix`, all of them or none.

    Args:
        model: a detector of either engine.
        tensors: from `backbone_tensors`.
        image_size: S of detection, for the table: the position embedding keeps its pretraining grid and is interpolated
            to that of the image at each forward, in both engines.

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
    for name, x in tensors.items():
        if own[name].shape != x.shape:
            raise UserError(
                f"detection: '{name}' has shape {tuple(x.shape)} in the encoder's weights and {tuple(own[name].shape)} in "
                "the backbone; set encoder.dim, encoder.patch_size and encoder.image_size to those of its weights"
            )
    for name, x in tensors.items():
        own[name].copy_(x)  # tensors of a state dict share memory with the model
    patch = own["patch_embed.proj.weight"].shape[-1]
    pretrained, wanted = math.isqrt(own["pos_embed"].shape[1]), image_size // patch
    interpolated = (
        (f"{prefix}pos_embed ({pretrained}x{pretrained} -> {wanted}x{wanted})",) if pretrained != wanted else ()
    )
    return Placed(
        loaded=tuple(prefix + name for name in tensors if not (interpolated and name == "pos_embed")),
        interpolated=interpolated,
        new=tuple(name for name in model.state_dict() if name.removeprefix(prefix) not in tensors),
    )


def table(placed: Placed, dropped: tuple[str, ...], source: str) -> str:
    """The log of a placement: every name, those of one block or module side by side."""
    rows = [("loaded", name) for name in placed.loaded] + [("interpolated", name) for name in placed.interpolated]
    rows += [("new", name) for name in placed.new] + [("left behind", name) for name in dropped]
    grouped: dict[tuple[str, str], list[str]] = {}
    for status, name in rows:
        place = re.match(r"(backbone\.net\.blocks\.\d+\.)|([\w]+\.[\w]+\.)|", name).group()  # type: ignore[union-attr]
        grouped.setdefault((status, place), []).append(name.removeprefix(place))
    counts = ", ".join(f"{count} {status}" for status, count in placed.counts().items())
    lines = [f"weights of the detector, encoder from {source}: {counts}, {len(dropped)} left behind"]
    lines += [f"  {status:<12} {place}{{{', '.join(names)}}}" for (status, place), names in grouped.items()]
    return "\n".join(lines)
