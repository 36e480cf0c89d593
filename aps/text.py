"""Text for terminals and figures: tables with aligned columns, and long text cut short."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; each column is as wide as its longest cell."""
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *body]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def number_of(count: int, noun: str) -> str:
    """`1 image`, `2,000 images`; the noun is one whose plural ends in s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(texts: Sequence[str], most: int) -> str:
    """At most `most` texts in a row, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def shorten(text: str, letters: int, ellipsis: str = "…") -> str:
    """`text`, cut at its end to at most `letters` letters. Errors use `...`, since logs may not be UTF-8."""
    return text if len(text) <= letters else text[: letters - len(ellipsis)] + ellipsis
