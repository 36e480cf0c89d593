"""A table in a terminal."""

from __future__ import annotations


def columns_of(header: list[str], body: list[list[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they must be."""
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *body]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
