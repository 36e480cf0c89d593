"""Widths, depths and heads by name. A new architecture is one row here (imports nothing heavy: planning reads it)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aps.settings import EncoderSettings


class Arch(NamedTuple):
    dim: int
    depth: int
    heads: int


ARCHS = {
    "micro": Arch(96, 4, 3),  # for two CPU cores; not in the paper
    "tiny": Arch(192, 12, 3),  # method.md, Model
    "small": Arch(384, 12, 6),
    "base": Arch(768, 12, 12),
}


def dimensions(settings: EncoderSettings) -> Arch:
    """Width, depth and heads of an encoder: its row of ARCHS with the settings' own values laid over it."""
    row = ARCHS[settings.arch]
    return Arch(settings.dim or row.dim, settings.depth or row.depth, settings.heads or row.heads)
