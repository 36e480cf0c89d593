"""How figures are drawn: panels of a telephone's width, as SVG within a page and as PNG files.

Design: a page shows each panel as an SVG of its own, so that panels flow, three in a row on a screen and one below the other
on a telephone, at the same size of letters. Ink is drawn in one colour that becomes the page's own, so a figure follows dark
mode and print. The same panels side by side are a PNG file, on white.
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

INK, LINE = "#010203", "#010204"  # no other colour is like them: they become the page's
PAGE = {INK: "currentColor", LINE: "var(--line)"}
PAPER = {INK: "#1d2429", LINE: "#d5dce0"}
# Told from each other by people who see no red or no green, and legible on white and on black.
COLOURS = ("#2a7fd4", "#d9730d", "#1f9d6b", "#c2468f", "#8a63d2", "#a8860b", "#d0453c", "#2a9db0", "#7f8a91", "#9a6750")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 3.6  # inches of a panel
IN_A_ROW = 3  # panels of a PNG file
LEAST_POINTS = 10.0  # that an axis of percentages spans

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.titlelocation": "left", "axes.axisbelow": True, "grid.linewidth": 0.5, "legend.frameon": False,
    "svg.fonttype": "path", "svg.hashsalt": "aps", "axes.formatter.limits": (-4, 5), "axes.formatter.use_mathtext": True,
}  # fmt: skip


class Look(NamedTuple):
    """Of one experiment in every figure."""

    colour: str
    dash: Any  # as matplotlib writes it
    marker: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Colours first; where they are used up, the kind of line changes."""
    count = len(COLOURS)
    return {
        name: Look(COLOURS[i % count], DASHES[i // count % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


@dataclass(frozen=True)
class Panel:
    """One pair of axes, or several that belong together.

    Attributes:
        draw: onto the axes; what it draws has the ink's colour unless it says otherwise.
        height: inches.
        shape: rows and columns of axes; `draw` gets an array of axes where it is not (1, 1).
        label: in words, for who does not see the figure.
    """

    label: str
    draw: Callable[[Any], None]
    height: float = 2.6
    shape: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: of its file.
        category: heading under which `snakemake --report` lists it.
        legend: what the colours of all panels mean.
        dots: whether these are colours of dots and not of lines.
    """

    name: str
    category: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Mapping[str, Look] = field(default_factory=dict)
    dots: bool = False

    def inline(self) -> list[tuple[str, str]]:
        """(label, SVG to stand in a page) of every panel."""
        return [(panel.label, _svg(panel, f"{self.name}{i}")) for i, panel in enumerate(self.panels)]

    def png(self) -> bytes:
        """All panels on white, with the legend and the title."""
        columns = min(IN_A_ROW, len(self.panels))
        rows = -(-len(self.panels) // columns)
        heights = [max(p.height for p in self.panels[i * columns : (i + 1) * columns]) for i in range(rows)]
        with matplotlib.rc_context(_style(PAPER)):
            longest = max((len(name) for name in self.legend), default=0)
            beside = max(1, int(columns * WIDTH / (0.5 + 0.075 * longest)))  # names in a line
            legend = 0.2 * -(-len(self.legend) // beside) + 0.1 * bool(self.legend)
            figure = Figure(figsize=(WIDTH * columns, sum(heights) + legend + 0.3), layout="constrained", dpi=150)
            figure.suptitle(self.title, fontsize=10, x=0.01, ha="left")
            places = figure.subfigures(rows, columns, squeeze=False, height_ratios=heights)
            for panel, place in zip(self.panels, places.flat, strict=False):
                panel.draw(_axes(panel, place))
            if self.legend:
                lines = [
                    matplotlib.lines.Line2D(
                        [],
                        [],
                        color=look.colour,
                        **({"marker": "o", "linestyle": "none"} if self.dots else {"linestyle": look.dash}),
                    )
                    for look in self.legend.values()
                ]
                names = [_plain(name) for name in self.legend]
                figure.legend(lines, names, loc="outside lower center", ncols=min(beside, len(names)), fontsize=8)
            out = io.BytesIO()
            figure.savefig(out, format="png")
        return out.getvalue()


def grid_lines(axes: Axes, axis: str) -> None:
    axes.grid(axis=axis, color=matplotlib.rcParams["grid.color"])  # type: ignore[arg-type]


def room(values: Sequence[float], least: float, share: float = 0.12) -> tuple[float, float]:
    """Limits of an axis of percentages that holds `values`, at least `least` points long, within 0 to 100 where they are:
    one point never looks like much."""
    low, high = min(values), max(values)
    margin = max(least - (high - low), 2 * share * (high - low)) / 2
    low, high = low - margin, high + margin
    if min(values) >= 0 and low < 0:
        low, high = 0.0, max(high, least)
    if max(values) <= 100 and high > 100:
        high, low = 102.0, min(low, 100 - least)
    return low, high


def short(text: str, letters: int = 40) -> str:
    """Of a name within a figure: cut in the middle where it is long; dollars would start a formula."""
    text = text if len(text) <= letters else f"{text[: letters - 9]}…{text[-8:]}"
    return text.replace("$", r"\$")


def _plain(text: str) -> str:
    return text.replace("$", r"\$").lstrip("_")


def _axes(panel: Panel, place: Any) -> Any:
    if panel.shape == (1, 1):
        return place.subplots()
    return place.subplots(*panel.shape, squeeze=False)


def _style(inks: Mapping[str, str]) -> Any:
    ink, line = (INK, LINE) if inks is PAGE else (inks[INK], inks[LINE])
    own = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), ink
    )
    return STYLE | own | {"grid.color": line}


def standalone(figure: Callable[[], Figure], kind: str) -> bytes:
    """A figure as a file of its own, `png` on white or `svg` that follows its viewer's dark mode."""
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
        figure = Figure(
            figsize=(WIDTH, panel.height), layout="constrained", dpi=200
        )  # the dpi is that of pictures in it
        panel.draw(_axes(panel, figure))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = _coloured(out.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Several figures stand in one page, and the page is one name space.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    return re.sub(r"url\(#", f"url(#{name}-", text)


def _coloured(text: str) -> str:
    for ink, colour in PAGE.items():
        text = text.replace(ink, colour)
    return text
