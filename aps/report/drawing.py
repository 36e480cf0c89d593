"""Draws figures from panels that fit a telephone's width: as SVG in a page, and as PNG files.

Design: each panel is a separate SVG in the page. So three stand side by side on a screen and one below the other on a
telephone, with letters of the same size. Ink has a placeholder colour that is replaced by the page's text colour, so a
figure follows dark mode and print. The PNG file has the same panels side by side, on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, LINE = "#010203", "#010204"  # placeholders, replaced by the page's colours; nothing else uses them
PAGE = {INK: "currentColor", LINE: "var(--line)"}
PAPER = {INK: "#1d2429", LINE: "#d5dce0"}
# Distinct also for people who do not see red or green, and legible on white and on black.
COLOURS = ("#2a7fd4", "#d9730d", "#1f9d6b", "#c2468f", "#8a63d2", "#a8860b", "#d0453c", "#2a9db0", "#7f8a91", "#9a6750")
WRONG = COLOURS[6]  # red: a neighbour of another class
# As matplotlib names them; in a page's legend a `stroke-dasharray` and a path, 10 units wide.
DASHES = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}
MARKERS = {
    "o": "M5 1a4 4 0 1 0 .01 0z",
    "s": "M1 1h8v8h-8z",
    "^": "M5 0l5 9h-10z",
    "D": "M5 0l5 5-5 5-5-5z",
    "v": "M0 1h10l-5 9z",
    "P": "M3.5 0h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    "X": "M2 0l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z",
    "*": "M5 0l1.5 3.3 3.5.4-2.6 2.4.7 3.6-3.1-1.8-3.1 1.8.7-3.6L0 3.7l3.5-.4z",
}
PANEL_WIDTH = 3.6  # inches
PANELS_IN_A_ROW = 3  # in a PNG file
MOST_PANELS = 24  # of a figure with one for each experiment: 24 take half a minute
LEAST_POINTS = 10.0  # percentage points that an axis spans

MATPLOTLIB_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.titlelocation": "left", "axes.axisbelow": True, "grid.linewidth": 0.5, "legend.frameon": False,
    "svg.fonttype": "path", "svg.hashsalt": "aps", "axes.formatter.limits": (-4, 5), "axes.formatter.use_mathtext": True,
}  # fmt: skip


class Style(NamedTuple):
    """How one experiment is drawn, the same in every figure."""

    colour: str
    dash: Any  # as matplotlib writes it
    marker: str


def make_styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each name. When all colours are used, they start again with another kind of line."""
    count, dashes, markers = len(COLOURS), list(DASHES), list(MARKERS)
    return {
        name: Style(COLOURS[i % count], dashes[i // count % len(dashes)], markers[i % len(markers)])
        for i, name in enumerate(names)
    }


@dataclass(frozen=True)
class Panel:
    """One pair of axes, or several that belong together.

    Attributes:
        label: what it shows, for readers who do not see it.
        draw: draws onto the axes it is given; the default colour is that of ink.
        height: in inches.
        shape: rows and columns of axes. If it is not (1, 1), `draw` gets an array of axes.
    """

    label: str
    draw: Callable[[Any], None]
    height: float = 2.6
    shape: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: name of its file.
        category: heading under which `snakemake --report` lists it.
        legend: the styles of all panels, by name.
        lines, marks: whether the panels have each style's line, and its marker.
    """

    name: str
    category: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Mapping[str, Style] = field(default_factory=dict)
    lines: bool = True
    marks: bool = False

    def inline(self) -> list[tuple[str, str]]:
        """(label, SVG for a page) of every panel."""
        return [(panel.label, _svg(panel, f"{self.name}{i}")) for i, panel in enumerate(self.panels)]

    def png(self) -> bytes:
        """A PNG of all panels on white, with legend and title."""
        columns = min(PANELS_IN_A_ROW, len(self.panels))
        rows = -(-len(self.panels) // columns)
        heights = [max(p.height for p in self.panels[i * columns : (i + 1) * columns]) for i in range(rows)]
        with matplotlib.rc_context(_style(PAPER)):
            longest = max((len(name) for name in self.legend), default=0)
            per_line = max(1, int(columns * PANEL_WIDTH / (0.5 + 0.075 * longest)))  # names of the legend
            legend = 0.2 * -(-len(self.legend) // per_line) + 0.1 * bool(self.legend)
            figure = Figure(figsize=(PANEL_WIDTH * columns, sum(heights) + legend + 0.3), layout="constrained", dpi=150)
            figure.suptitle(self.title, fontsize=10, x=0.01, ha="left")
            subfigures = figure.subfigures(rows, columns, squeeze=False, height_ratios=heights)
            for panel, subfigure in zip(self.panels, subfigures.flat, strict=False):
                panel.draw(_axes(panel, subfigure))
            if self.legend:
                lines = [
                    matplotlib.lines.Line2D(
                        [],
                        [],
                        color=style.colour,
                        marker=style.marker if self.marks else "none",
                        linestyle=style.dash if self.lines else "none",
                    )
                    for style in self.legend.values()
                ]
                names = [_escaped(name).lstrip("_") for name in self.legend]
                figure.legend(lines, names, loc="outside lower center", ncols=min(per_line, len(names)), fontsize=8)
            out = io.BytesIO()
            figure.savefig(out, format="png")
        return out.getvalue()


def of_the_first(caption: str, panels: Sequence[Panel]) -> str:
    """The caption of a figure with a panel for each experiment, MOST_PANELS at most."""
    shown = f" No more than the first {MOST_PANELS} experiments are shown." if len(panels) == MOST_PANELS else ""
    return caption + shown


def grid_lines(axes: Axes, axis: str) -> None:
    axes.grid(axis=axis, color=matplotlib.rcParams["grid.color"])  # type: ignore[arg-type]


def axis_limits(values: Sequence[float], least: float, share: float = 0.12) -> tuple[float, float]:
    """Limits of an axis of percentages that holds `values`; at least `least` points, so that one point looks small.

    If the values are within 0 to 100, so are the limits. share: margin on each side, as a share of the values' range.
    """
    low, high = min(values), max(values)
    margin = max(least - (high - low), 2 * share * (high - low)) / 2
    low, high = low - margin, high + margin
    if min(values) >= 0 and low < 0:
        low, high = 0.0, max(high, least)
    if max(values) <= 100 and high > 100:
        high, low = 102.0, min(low, 100 - least)
    return low, high


def short(text: str, letters: int = 40) -> str:
    """A name for a figure; a long one is cut in the middle."""
    return _escaped(text if len(text) <= letters else f"{text[: letters - 9]}…{text[-8:]}")


def _escaped(text: str) -> str:
    """A dollar would start a formula."""
    return text.replace("$", r"\$")


def _axes(panel: Panel, figure: Any) -> Any:
    if panel.shape == (1, 1):
        return figure.subplots()
    return figure.subplots(*panel.shape, squeeze=False)


def _style(inks: Mapping[str, str]) -> Any:
    ink, line = (INK, LINE) if inks is PAGE else (inks[INK], inks[LINE])
    in_ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink
    )
    return MATPLOTLIB_STYLE | in_ink | {"grid.color": line}


def standalone(figure: Callable[[], Figure], kind: str) -> bytes:
    """The content of a file with one figure: `png` on white, or `svg` that follows its viewer's dark mode."""
    paper = kind == "png"
    with matplotlib.rc_context(_style(PAPER if paper else PAGE)):
        out, drawn = io.BytesIO(), figure()
        if paper:
            drawn.savefig(out, format="png", dpi=150)
            return out.getvalue()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    style = (
        "<style>:root{color:#1d2429;--line:#d5dce0;background:#fff}"
        "@media(prefers-color-scheme:dark){:root{color:#e3e8eb;--line:#3a444b;background:#14191d}}</style>"
    )
    text = re.sub(r"(<svg\b[^>]*>)", lambda m: m[1] + style, _coloured(out.getvalue().decode()), count=1)
    return text.encode()


def _svg(panel: Panel, name: str) -> str:
    with matplotlib.rc_context(_style(PAGE)):
        figure = Figure(figsize=(PANEL_WIDTH, panel.height), layout="constrained", dpi=200)  # dpi of the images in it
        panel.draw(_axes(panel, figure))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = _coloured(out.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # The ids of all figures in a page must differ.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return re.sub(r"url\(#", f"url(#{name}-", text)


def _coloured(text: str) -> str:
    for ink, colour in PAGE.items():
        text = text.replace(ink, colour)
    return text
