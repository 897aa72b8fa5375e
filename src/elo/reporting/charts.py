"""A run's charts: each drawn once, given as SVG for the page and as PNG beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from elo.reporting.comparison import count, signed
from elo.reporting.drawing import (
    COLOURS,
    INK,
    LABEL_MARGIN,
    MARKERS,
    SPARE_COLOURS,
    STYLE,
    Chart,
    Clock,
    Point,
    Style,
    axis_of,
    drawable,
    finish,
    new_figure,
    place_labels,
    text_width,
)
from elo.reporting.results import Method, Results


@dataclass(frozen=True)
class Segment:
    """A stretch of a method's curve; `detached` while it is the detached model that is measured: another model."""

    points: tuple[Point, ...]
    detached: bool


def draw_charts(results: Results) -> list[Chart]:
    """Every chart that the results have points for, in reading order."""
    languages = ((results.languages.target, "target"), (results.languages.source, "source"))
    clocks: tuple[Clock, ...] = ("seconds", "tokens")
    charts: list[Chart | None] = []
    with matplotlib.rc_context(STYLE):
        charts += [_bpb_chart(results, language, role, clock) for clock in clocks for language, role in languages]
        charts += [_loss_chart(results), _trade_off_chart(results)]
    return [chart for chart in charts if chart is not None]


def bpb_segments(method: Method, language: str, clock: Clock, base: float | None) -> list[Segment]:
    """A method's bits per byte over its own clock: the detached model's stretch, if any, then the whole model's.

    The whole model's stretch starts from the base where nothing was detached, and from the attached model before
    alignment where something was; it ends at the final model.
    """
    measured = [(getattr(e, clock), e.bpb[language], e.stage) for e in method.evaluations if language in e.bpb]
    detached = [(at, bpb) for at, bpb, stage in measured if stage == method.detached_stage]
    whole = [(at, bpb) for at, bpb, stage in measured if stage != method.detached_stage]
    pretraining = method.stage(method.detached_stage) if method.detached_stage else None
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
    figure, axes = new_figure()
    unit, scale = axis_of(clock, [point for segments in curves.values() for s in segments for point in s.points])
    if base is not None:
        axes.axhline(base, color=INK, linestyle=":", linewidth=1.3, label="base model")
    for method in results.methods:
        style = _style(results, method)
        for segment in curves[method.name]:
            _plot(axes, segment, style, scale, main=method is results.methods[0])
    cut_off = _limit_bpb(axes, [s for segments in curves.values() for s in segments], base)
    name = drawable(language, role)
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
    return finish(figure, f"{role}_bpb_over_{over.replace(' ', '_')}", title, caption)


def _loss_chart(results: Results) -> Chart | None:
    curves: list[tuple[Method, Segment]] = []
    for method in results.methods:
        for stage in dict.fromkeys(loss.stage for loss in method.losses):
            points = tuple((float(loss.tokens), loss.loss) for loss in method.losses if loss.stage == stage)
            curves.append((method, Segment(points, stage == method.detached_stage)))
    if not any(len(segment.points) > 1 for _, segment in curves):
        return None
    figure, axes = new_figure()
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
    return finish(figure, "training_loss", "Training loss", caption)


def _trade_off_chart(results: Results) -> Chart | None:
    target, source = results.languages.target, results.languages.source
    shown = [method for method in results.methods if target in method.bpb]
    if len(shown) < 2:
        return None
    figure, axes = new_figure()
    ends = [(method.wall_seconds, method.bpb[target]) for method in shown]
    unit, scale = axis_of("seconds", ends)
    base = results.base.bpb.get(target)
    values = [bpb for _, bpb in ends] + ([base] if base is not None else [])
    span = max(max(values) - min(values), 0.02)
    bottom, top = min(values) - 0.12 * span, max(values) + 0.12 * span
    texts = [_trade_off_label(results, method) for method in shown]
    # Wide enough for the label to the right of each point.
    needed = [
        at / scale / max(0.97 - LABEL_MARGIN - text_width(text), 0.3) for (at, _), text in zip(ends, texts, strict=True)
    ]
    right = max(needed) or 1.0
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, right)
    if base is not None:
        axes.axhline(base, color=INK, linestyle=":", linewidth=1.3)
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
    place_labels(axes, labels)
    axes.set_xlabel(f"training wall time ({unit})")
    axes.set_ylabel(f"{drawable(target, 'target')}: bits per byte")
    caption = (
        f"Down and to the left is better. In brackets: what it did to {source}, in bits per byte (+ is forgetting)."
    )
    return finish(figure, "cost_and_result", "What the time bought", caption)


def _trade_off_label(results: Results, method: Method) -> str:
    source, label = results.languages.source, _style(results, method).label
    if source not in method.bpb or source not in results.base.bpb:
        return label
    return f"{label}  ({drawable(source, 'source')} {signed(method.bpb[source] - results.base.bpb[source])})"


def _plot(axes: Axes, segment: Segment, style: Style, scale: float, *, main: bool) -> None:
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


def _legend_name(style: Style, segment: Segment, named: set[str]) -> str | None:
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


def _style(results: Results, method: Method) -> Style:
    names = [other.name for other in results.methods]
    index = names.index(method.name)
    spare = [name for name in names if name not in COLOURS]
    colour = COLOURS.get(method.name) or SPARE_COLOURS[spare.index(method.name) % len(SPARE_COLOURS)]
    label = drawable(method.title, drawable(method.name, f"method {index + 1}"))
    return Style(label, colour, MARKERS[index % len(MARKERS)])


def method_colours(results: Results) -> dict[str, str]:
    """The colour that stands for each method throughout the report."""
    return {method.name: _style(results, method).colour for method in results.methods}
