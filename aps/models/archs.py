"""Architectures by name: width, depth and heads. A new one is a constant here and a row of `aps.registry.ARCHS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aps.registry import ARCHS
from aps.settings.base import WIDEST

if TYPE_CHECKING:
    from aps.settings.blocks import EncoderSettings
    from aps.settings.study import ExperimentSettings


class Arch(NamedTuple):
    dim: int
    depth: int
    heads: int


MICRO = Arch(96, 4, 3)  # for two CPU cores; not in the paper
TINY = Arch(192, 12, 3)  # method.md, Model
SMALL = Arch(384, 12, 6)
BASE = Arch(768, 12, 12)


def dimensions(settings: EncoderSettings) -> Arch:
    """Width, depth and heads of an encoder: those of its arch, unless the settings set other values."""
    row: Arch = ARCHS.load(settings.arch)
    return Arch(settings.dim or row.dim, settings.depth or row.depth, settings.heads or row.heads)


def check(experiment: ExperimentSettings) -> None:
    """Raises ValueError where the encoder's width does not divide among its heads."""
    dim, _, heads = dimensions(experiment.encoder)
    if dim % heads:
        raise ValueError(f"encoder: width {dim} is not a multiple of {heads} heads; change dim or heads")
    if dim > WIDEST:
        raise ValueError(f"encoder.dim {dim} is above {WIDEST:,}; lower it")
    if int(dim * (ratio := experiment.encoder.mlp_ratio)) < 1:  # timm would take the width instead
        raise ValueError(f"encoder.mlp_ratio {ratio:g} of width {dim} leaves the MLP no hidden unit; raise it")
