"""The report's charts: each drawn once, given as SVG for the page and as PNG beside it.

Only what matplotlib's own font can draw is drawn (it has no Hangul, kana or kanji): other labels give way to plain
names.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from elo.reporting.comparison import count, signed
from elo.reporting.results import Method, Results

# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = {
    "elo": "#0072B2",
    "full": "#D55E00",
    "full_at_wall_time": "#E69F00",
    "align_only": "#009E73",
    "frozen": "#CC79A7",
}
_SPARE_COLOURS = ("#56B4E9", "#000000", "#8C6D31", "#7B4FA3")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "h")
_INK, _FAINT, _GRID = "#1f2933", "#7b8794", "#e8ebef"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "elo",
    "svg.fonttype": "path",
}
_SIZE_INCHES = (5.8, 3.9)
_LEGEND_CHARACTERS = 100
"""Of legend text that fit side by side, each label's line counted as six."""
_PNG_DPI = 200
DETACHED_STAGE = "elo_pretraining"
_LABEL_MARGIN, _LABEL_GAP = 0.03, 0.07

Clock = Literal["seconds", "tokens"]
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
class Segment:
    """A stretch of a method's curve; `detached` while it is the detached model that is measured: another model."""

    points: tuple[Point, ...]
    detached: bool


@dataclass(frozen=True)
class _Style:
    label: str
    colour: str
    marker: str


def draw_charts(results: Results) -> list[Chart]:
    """Every chart that the results have points for, in reading order."""
    languages = ((results.languages.target, "target"), (results.languages.source, "source"))
    clocks: tuple[Clock, ...] = ("seconds", "tokens")
    charts: list[Chart | None] = []
    with matplotlib.rc_context(_STYLE):
        charts += [_bpb_chart(results, language, role, clock) for clock in clocks for language, role in languages]
        charts += [_loss_chart(results), _trade_off_chart(results)]
    return [chart for chart in charts if chart is not None]


def bpb_segments(method: Method, language: str, clock: Clock, base: float | None) -> list[Segment]:
    """A method's bits per byte over its own clock: the detached model's stretch, if any, then the whole model's.

    The whole model's stretch starts from the base where nothing was detached, and from the attached model before
    alignment where something was; it ends at the final model.
    """
    measured = [(getattr(e, clock), e.bpb[language], e.stage) for e in method.evaluations if language in e.bpb]
    detached = [(at, bpb) for at, bpb, stage in measured if stage == DETACHED_STAGE]
    whole = [(at, bpb) for at, bpb, stage in measured if stage != DETACHED_STAGE]
    pretraining = method.stage(DETACHED_STAGE)
    if pretraining is None:
        start = (0.0, base) if base is not None else None
    else:
        attached = method.before_alignment.bpb.get(language) if method.before_alignment else None
        start = (float(getattr(pretraining, clock)), attached) if attached is not None else None
    end = float(method.wall_seconds if clock == "seconds" else method.tokens)
    final = method.bpb.get(language)
    if start is not None and (not whole or whole[0][0] > start[0]):
        whole.insert(0, start)
    if final is not None and end > 0:
        whole = [(at, bpb) for at, bpb in whole if at < 0.995 * end]
        whole.append((end, final))
    segments = [Segment(tuple(detached), True), Segment(tuple(whole), False)]
    return [segment for segment in segments if segment.points]


def _bpb_chart(results: Results, language: str, role: str, clock: Clock) -> Chart | None:
    base = results.base.bpb.get(language)
    curves = {method.name: bpb_segments(method, language, clock, base) for method in results.methods}
    if not any(len(segment.points) > 1 for segments in curves.values() for segment in segments):
        return None
    figure, axes = _new_figure()
    unit, scale = _axis_of(clock, [point for segments in curves.values() for s in segments for point in s.points])
    if base is not None:
        axes.axhline(base, color=_INK, linestyle=":", linewidth=1.3, label="base model")
    for method in results.methods:
        style = _style(results, method)
        for segment in curves[method.name]:
            _plot(axes, segment, style, scale, main=method is results.methods[0])
    cut_off = _limit_bpb(axes, [s for segments in curves.values() for s in segments], base)
    name = _drawable(language, role)
    over = "wall time" if clock == "seconds" else "tokens"
    axes.set_xlabel(f"training wall time ({unit})" if clock == "seconds" else "tokens trained on")
    axes.set_ylabel(f"{name}: bits per byte")
    if clock == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    caption = "Lower is better."
    if cut_off is not None and cut_off[0] > axes.get_ylim()[1]:
        caption += f" The detached model by itself is above the chart, going from {cut_off[1]:.2f} to {cut_off[0]:.2f}."
    elif any(segment.detached for segments in curves.values() for segment in segments):
        caption += " Dashed: the detached model by itself, without the middle layers, before they are put back."
        caption += f" It starts above the chart, at {cut_off[1]:.2f}." if cut_off is not None else ""
    title = f"{role.capitalize()} language ({language}) over {over}"
    return _finish(figure, f"{role}_bpb_over_{over.replace(' ', '_')}", title, caption)


def _loss_chart(results: Results) -> Chart | None:
    curves: list[tuple[Method, Segment]] = []
    for method in results.methods:
        for stage in dict.fromkeys(loss.stage for loss in method.losses):
            points = tuple((float(loss.tokens), loss.loss) for loss in method.losses if loss.stage == stage)
            curves.append((method, Segment(points, stage == DETACHED_STAGE)))
    if not any(len(segment.points) > 1 for _, segment in curves):
        return None
    figure, axes = _new_figure()
    smoothed = False
    named: set[str] = set()
    for method, segment in curves:
        style = _style(results, method)
        smooth = _smoothed(segment.points)
        if smooth != segment.points:
            smoothed = True
            axes.plot(*zip(*segment.points, strict=True), color=style.colour, linewidth=0.6, alpha=0.22)
        axes.plot(
            *zip(*smooth, strict=True),
            color=style.colour,
            linewidth=2.0 if method is results.methods[0] else 1.4,
            alpha=0.6 if segment.detached else 1.0,
            label=_legend_name(style, segment, named),
            linestyle="--" if segment.detached else "-",
        )
    values = sorted(loss for _, segment in curves for _, loss in segment.points)
    low, high = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]
    axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.08 * (high - low or 1))
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    caption = "On the training mix, so not comparable with the charts above." + (
        " Thin: as logged; thick: running mean." if smoothed else ""
    )
    if any(segment.detached for _, segment in curves):
        caption += " Dashed: the detached model."
    return _finish(figure, "training_loss", "Training loss", caption)


def _trade_off_chart(results: Results) -> Chart | None:
    target, source = results.languages.target, results.languages.source
    shown = [method for method in results.methods if target in method.bpb]
    if len(shown) < 2:
        return None
    figure, axes = _new_figure()
    ends = [(method.wall_seconds, method.bpb[target]) for method in shown]
    unit, scale = _axis_of("seconds", ends)
    base = results.base.bpb.get(target)
    values = [bpb for _, bpb in ends] + ([base] if base is not None else [])
    span = max(max(values) - min(values), 0.02)
    bottom, top = min(values) - 0.12 * span, max(values) + 0.12 * span
    texts = [_trade_off_label(results, method) for method in shown]
    # Wide enough for the label to the right of each point.
    needed = [
        at / scale / max(0.97 - _LABEL_MARGIN - _text_width(text), 0.3)
        for (at, _), text in zip(ends, texts, strict=True)
    ]
    right = max(needed) or 1.0
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, right)
    if base is not None:
        axes.axhline(base, color=_INK, linestyle=":", linewidth=1.3)
        axes.annotate(
            "base model", (0.99, base), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    labels = []
    for method, text, (at, bpb) in zip(shown, texts, ends, strict=True):
        style = _style(results, method)
        axes.plot(
            at / scale, bpb, style.marker, color=style.colour, markersize=9, markeredgecolor="white", clip_on=False
        )
        labels.append((at / scale / right, (bpb - bottom) / (top - bottom), text, style.colour))
    _place_labels(axes, labels)
    axes.set_xlabel(f"training wall time ({unit})")
    axes.set_ylabel(f"{_drawable(target, 'target')}: bits per byte")
    caption = (
        f"Down and to the left is better. In brackets: what it did to {source}, in bits per byte (+ is forgetting)."
    )
    return _finish(figure, "cost_and_result", "What the time bought", caption)


def _trade_off_label(results: Results, method: Method) -> str:
    source, label = results.languages.source, _style(results, method).label
    if source not in method.bpb or source not in results.base.bpb:
        return label
    return f"{label}  ({_drawable(source, 'source')} {signed(method.bpb[source] - results.base.bpb[source])})"


def _text_width(text: str) -> float:
    """Width of a label as a share of the axes', roughly."""
    return 0.0125 * len(text)


def _place_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label to the right of its point (axes fractions), lifted until it covers no label below it."""
    placed: list[tuple[float, float, float]] = []  # from, to, height
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        start, end = x + _LABEL_MARGIN, x + _LABEL_MARGIN + _text_width(text)
        below = [height for left, right, height in placed if left < end and start < right]
        height = max([y, *(other + _LABEL_GAP for other in below if other + _LABEL_GAP > y)])
        placed.append((start, end, height))
        axes.annotate(
            text,
            (x, y),
            (start, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=_INK,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8} if height - y > 0.02 else None,
        )


def _plot(axes: Axes, segment: Segment, style: _Style, scale: float, *, main: bool) -> None:
    axes.plot(
        [at / scale for at, _ in segment.points],
        [bpb for _, bpb in segment.points],
        color=style.colour,
        marker=style.marker,
        markersize=4 if segment.detached else 5,
        markerfacecolor="white" if segment.detached else style.colour,
        linestyle="--" if segment.detached else "-",
        linewidth=(1.3 if segment.detached else 2.2) if main else 1.5,
        alpha=0.6 if segment.detached else 1.0,
        label=style.label + (" (detached model)" if segment.detached else ""),
        zorder=3 if main else 2,
    )


def _legend_name(style: _Style, segment: Segment, named: set[str]) -> str | None:
    name = style.label + (" (detached model)" if segment.detached else "")
    if name in named:
        return None
    named.add(name)
    return name


def _limit_bpb(axes: Axes, segments: Sequence[Segment], base: float | None) -> tuple[float, float] | None:
    """Give the whole models' curves the room; a detached model's lowest and highest are returned if it is cut off."""
    whole = [bpb for s in segments if not s.detached for _, bpb in s.points] + ([base] if base is not None else [])
    detached = [bpb for s in segments if s.detached for _, bpb in s.points]
    if not whole:
        return None
    low, high = min([*whole, *detached]), max(whole)
    span = max(high - low, 0.02)
    ceiling = high + 0.5 * span
    cut = bool(detached) and max(detached) > ceiling
    if cut and min(detached) > ceiling:
        ceiling = high + 0.08 * span
    axes.set_ylim(low - 0.08 * span, ceiling if cut else max([high, *detached]) + 0.08 * span)
    return (min(detached), max(detached)) if cut else None


def _smoothed(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """Centred running mean over a fortieth of the curve; short curves as they are."""
    half = len(points) // 80
    if half == 0:
        return points
    means = []
    for index, (at, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        window = points[index - reach : index + reach + 1]
        means.append((at, sum(loss for _, loss in window) / len(window)))
    return tuple(means)


def _axis_of(clock: Clock, points: Sequence[Point]) -> tuple[str, float]:
    """Unit of the horizontal axis and what to divide by."""
    longest = max((at for at, _ in points), default=0.0)
    if clock == "tokens" or longest <= 240:
        return "s", 1.0
    return ("min", 60.0) if longest <= 4 * 3600 else ("h", 3600.0)


def _style(results: Results, method: Method) -> _Style:
    names = [other.name for other in results.methods]
    index = names.index(method.name)
    spare = [name for name in names if name not in _COLOURS]
    colour = _COLOURS.get(method.name) or _SPARE_COLOURS[spare.index(method.name) % len(_SPARE_COLOURS)]
    label = _drawable(method.title, _drawable(method.name, f"method {index + 1}"))
    return _Style(label, colour, _MARKERS[index % len(_MARKERS)])


def method_colours(results: Results) -> dict[str, str]:
    """The colour that stands for each method throughout the report."""
    return {method.name: _style(results, method).colour for method in results.methods}


def _drawable(text: str, otherwise: str) -> str:
    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    return text if text and all(ord(character) in known for character in text) else otherwise


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    return figure, axes


def _finish(figure: Figure, name: str, title: str, caption: str) -> Chart:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    top = figure.axes[0].get_ylim()[1]
    seen = [
        index for index, line in enumerate(handles) if not isinstance(line, Line2D) or np.min(line.get_ydata()) <= top
    ]
    handles, labels = [handles[index] for index in seen], [labels[index] for index in seen]
    if handles:
        columns = max(1, min(3, _LEGEND_CHARACTERS // (max(len(label) for label in labels) + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.8)
    svg, png = io.BytesIO(), io.BytesIO()
    # No date and no version inside: the same results give the same bytes.
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return Chart(name, title, caption, svg.getvalue(), png.getvalue())
