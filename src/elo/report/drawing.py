"""Palette, fonts and axes of all charts. Each chart is drawn once, and saved as SVG for the page and as PNG.

Matplotlib's own font has no Hangul, kana or kanji; `drawable` replaces labels that it cannot draw.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, distinguishable with any colour vision.
COLOURS = {"elo": "#0072B2", "full": "#D55E00", "lora": "#009E73", "lisa": "#CC79A7", "frozen": "#E69F00"}
SPARE_COLOURS = ("#56B4E9", "#000000", "#8C6D31", "#7B4FA3", "#5D6B7A")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
INK, FAINT, _GRID = "#1f2933", "#7b8794", "#e8ebef"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "elo",
    "svg.fonttype": "path",
}
_SIZE_INCHES = (5.8, 3.9)
_LEGEND_CHARACTERS = 90
"""Characters of legend text that fit on a line; the symbol of each label counts as eight."""
_PNG_DPI = 200

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """A drawn chart."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Style:
    """How a contestant is drawn."""

    label: str
    colour: str
    marker: str


def lighter(colour: str, share: float) -> str:
    """Return `colour` mixed with this share of white."""
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * share):02x}" for channel in channels)


def time_axis(seconds: Iterable[float]) -> tuple[str, float]:
    """Return the unit of a time axis, and its length in seconds."""
    longest = max(seconds, default=0.0)
    if longest <= 240:
        return "s", 1.0
    return ("min", 60.0) if longest <= 4 * 3600 else ("h", 3600.0)


def drawable(text: str, otherwise: str) -> str:
    """Return `text` if the font has all of its characters, else `otherwise`."""
    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    return text if text and all(ord(character) in known for character in text) else otherwise


def new_figure() -> tuple[Figure, Axes]:
    """Return an empty figure with one pair of axes."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    return figure, axes


def finish(figure: Figure, name: str, title: str, caption: str) -> Chart:
    """Add the legend and save the figure in both formats."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    top = figure.axes[0].get_ylim()[1]
    seen = [
        index for index, line in enumerate(handles) if not isinstance(line, Line2D) or np.min(line.get_ydata()) <= top
    ]
    handles, labels = [handles[index] for index in seen], [labels[index] for index in seen]
    if handles:
        columns = max(1, min(3, _LEGEND_CHARACTERS // (max(len(label) for label in labels) + 8)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.8)
    svg, png = io.BytesIO(), io.BytesIO()
    # Without date and version, the same results give the same bytes.
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return Chart(name, title, caption, svg.getvalue(), png.getvalue())
