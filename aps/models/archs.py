"""Widths, depths and heads by name. A new architecture is one row here (imports nothing: planning reads it)."""

from typing import NamedTuple


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
