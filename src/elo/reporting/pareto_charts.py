"""A comparison's charts: what bits per byte were had for which cost, and how the learning rates were chosen."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from elo.reporting.comparison import rate
from elo.reporting.drawing import (
    COLOURS,
    INK,
    MARKERS,
    SPARE_COLOURS,
    STYLE,
    Chart,
    Style,
    axis_of,
    drawable,
    finish,
    lighter,
    new_figure,
)
from elo.reporting.pareto_results import ComparisonResults, Sweep, SweepTrial, Trial
from elo.reporting.pareto_rows import pareto_front, stage_name, varied_rates

_FRONT = "#c3cad2"
_LOG_FROM = 8.0
"""Largest over smallest value from which a cost is drawn on a logarithmic axis."""
_PREFIXES = (("G", 9), ("T", 12), ("P", 15), ("E", 18), ("Z", 21))
_LABEL_CHARACTERS = 44
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class _Group:
    """A contestant's finished trials at a budget, as points."""

    contestant: str
    points: tuple[tuple[float, float], ...]
    whole: bool
    """No seed failed."""

    @property
    def mean(self) -> tuple[float, float]:
        return (
            sum(x for x, _ in self.points) / len(self.points),
            sum(y for _, y in self.points) / len(self.points),
        )


def draw_pareto_charts(results: ComparisonResults) -> list[Chart]:
    """Every chart that the comparison has points for, in reading order."""
    charts: list[Chart | None] = []
    with matplotlib.rc_context(STYLE):
        charts.append(_time_chart(results))
        charts += [_languages_chart(results, index) for index in range(len(results.budgets))]
        charts += [_flops_chart(results), _memory_chart(results)]
        charts += [_sweep_chart(results, index) for index in range(len(results.budgets))]
        charts += [_reach_chart(results, index) for index in range(len(results.budgets))]
    return [chart for chart in charts if chart is not None]


def contestant_styles(results: ComparisonResults) -> dict[str, Style]:
    """The colour and the marker that stand for each contestant throughout the report."""
    names = [contestant.name for contestant in results.contestants]
    spare = [colour for name, colour in COLOURS.items() if name not in names] + list(SPARE_COLOURS)
    others = [name for name in names if name not in COLOURS]
    styles: dict[str, Style] = {}
    for index, contestant in enumerate(results.contestants):
        name = contestant.name
        colour = COLOURS.get(name) or spare[others.index(name) % len(spare)]
        label = _short(drawable(contestant.title, drawable(name, f"contestant {index + 1}")))
        # Colours that come again have another marker.
        taken = {style.marker for style in styles.values() if style.colour == colour}
        free = [marker for marker in MARKERS[index % len(MARKERS) :] + MARKERS if marker not in taken]
        styles[name] = Style(label, colour, (free or MARKERS)[0])
    return styles


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "…"


def _time_chart(results: ComparisonResults) -> Chart | None:
    groups = _groups(results, lambda trial: trial.wall_seconds)
    unit, scale = axis_of("seconds", [point for group in groups for point in group.points])
    label = f"training wall time ({unit})"
    return _cost_chart(results, groups, scale, "wall_time", "Bits per byte for wall time", label)


def _flops_chart(results: ComparisonResults) -> Chart | None:
    groups = _groups(results, lambda trial: trial.flops)
    unit, scale = _unit(groups, (("FLOP", 1.0), *((f"{name}FLOP", 10.0**power) for name, power in _PREFIXES)))
    return _cost_chart(results, groups, scale, "flops", "Bits per byte for compute", f"training compute ({unit})")


def _memory_chart(results: ComparisonResults) -> Chart | None:
    groups = _groups(results, lambda trial: trial.peak_memory_bytes)
    unit, scale = _unit(groups, (("MiB", 2.0**20), ("GiB", 2.0**30)))
    return _cost_chart(results, groups, scale, "memory", "Bits per byte for memory", f"peak memory ({unit})")


def _unit(groups: Sequence[_Group], units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The largest unit that the largest cost fills."""
    largest = max((x for group in groups for x, _ in group.points), default=0.0)
    return next((unit for unit in reversed(units) if largest >= unit[1]), units[0])


def _groups(
    results: ComparisonResults, cost: Callable[[Trial], float | None], budget: int | None = None
) -> list[_Group]:
    """(cost, target bits per byte) of all finished trials, or of one budget's, in the contestants' order."""
    target = results.languages.target
    found = []
    for contestant in results.contestants:
        for index in range(len(results.budgets)) if budget is None else (budget,):
            entry = results.entry(contestant.name, index)
            done = [trial for trial in entry.trials if trial.failed is None] if entry else []
            points = tuple((float(x), trial.bpb[target]) for trial in done if (x := cost(trial)) is not None)
            if entry and points:
                found.append(_Group(contestant.name, points, len(done) == len(entry.trials)))
    return found


def _cost_chart(
    results: ComparisonResults,
    groups: Sequence[_Group],
    scale: float,
    name: str,
    title: str,
    label: str,
) -> Chart | None:
    """Target bits per byte over a cost, all budgets: seeds, means joined by contestant, and their Pareto front."""
    if not groups:
        return None
    figure, axes = new_figure()
    target = results.languages.target
    groups = [replace(group, points=tuple((x / scale, y) for x, y in group.points)) for group in groups]
    costs = [x for group in groups for x, _ in group.points]
    if min(costs) > 0 and max(costs) / min(costs) >= _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    base = results.base.bpb.get(target)
    caption = "Down and to the left is better. Small: one seed; large: mean of the seeds, joined over the budgets."
    limits = _limits([y for group in groups for _, y in group.points], base)
    if base is not None and base <= limits[1]:
        axes.axhline(base, color=INK, linestyle=":", linewidth=1.3, label="base model")
    elif base is not None:
        axes.axhline(limits[1], color=INK, linestyle=":", linewidth=1.3)
        axes.annotate(
            f"base model: {base:.3f} ↑", (0.99, 0.985), xycoords="axes fraction", ha="right", va="top", fontsize=8
        )
        caption += f" The base model is above the chart, at {base:.3f}."
    _draw_groups(axes, results, groups, joined=True)
    caption += _draw_front(axes, groups, limits[1])
    axes.set_ylim(*limits)
    axes.set_xlabel(label)
    axes.set_ylabel(f"{drawable(target, 'target')}: bits per byte")
    return finish(figure, f"target_bpb_for_{name}", title, caption)


def _languages_chart(results: ComparisonResults, index: int) -> Chart | None:
    """Target over source bits per byte at one budget."""
    target, source = results.languages.target, results.languages.source
    groups = _groups(results, lambda trial: trial.bpb.get(source), index)
    if not groups:
        return None
    figure, axes = new_figure()
    base_x, base_y = results.base.bpb.get(source), results.base.bpb.get(target)
    bottom, top = _limits([y for group in groups for _, y in group.points], base_y)
    left, right = _limits([x for group in groups for x, _ in group.points], base_x)
    caption = "Down and to the left is better. Small: one seed; large: mean of the seeds."
    if base_x is not None and base_y is not None:
        caption += _draw_base(axes, (base_x, base_y), (left, right), (bottom, top))
    _draw_groups(axes, results, groups, joined=False)
    caption += _draw_front(axes, groups, top, right)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_xlabel(f"{drawable(source, 'source')}: bits per byte")
    axes.set_ylabel(f"{drawable(target, 'target')}: bits per byte")
    title = f"Both languages at {results.budgets[index].name}"
    return finish(figure, f"both_languages_{index + 1}", title, caption)


def _draw_base(axes: Axes, base: tuple[float, float], across: tuple[float, float], up: tuple[float, float]) -> str:
    """The base as a star with lines through it; where it is off the chart, what the caption says of it."""
    inside = across[0] <= base[0] <= across[1], up[0] <= base[1] <= up[1]
    if inside[0]:
        axes.axvline(base[0], color=INK, linestyle=":", linewidth=1.1)
        if not inside[1]:
            axes.annotate(
                f"base model: {base[1]:.3f} {'↑' if base[1] > up[1] else '↓'}",
                (base[0], 0.985 if base[1] > up[1] else 0.015),
                (4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top" if base[1] > up[1] else "bottom",
                fontsize=8,
            )
    if inside[1]:
        axes.axhline(base[1], color=INK, linestyle=":", linewidth=1.1)
    if all(inside):
        axes.plot(*base, "*", color=INK, markersize=11, markeredgecolor="white", label="base model", linestyle="none")
        return " Dotted: the base model."
    dotted = " Dotted: its value that is on the chart." if any(inside) else ""
    return f" The base model is off the chart, at {base[0]:.3f} across and {base[1]:.3f} up.{dotted}"


def _draw_groups(axes: Axes, results: ComparisonResults, groups: Sequence[_Group], *, joined: bool) -> None:
    for name, style in contestant_styles(results).items():
        own = sorted((group for group in groups if group.contestant == name), key=lambda group: group.mean)
        if not own:
            continue
        for group in own:
            axes.plot(
                *zip(*group.points, strict=True),
                style.marker,
                color=style.colour,
                markersize=4,
                zorder=5,
                markeredgecolor="white",
                markeredgewidth=0.4,
            )
        axes.plot(
            *zip(*(group.mean for group in own), strict=True),
            color=style.colour,
            marker=style.marker,
            markersize=9,
            markerfacecolor=lighter(style.colour, 0.6),
            markeredgecolor=style.colour,
            markeredgewidth=1.1,
            linewidth=1.5 if joined else 0,
            label=style.label,
            zorder=4,
        )


def _draw_front(axes: Axes, groups: Sequence[_Group], top: float, right: float | None = None) -> str:
    """The means that no other mean beats in both, as steps; what the caption says of it."""
    means = [group.mean for group in groups if group.whole]
    front = [means[index] for index in pareto_front(means)]
    if len(means) < 2:
        return ""
    end = max(x for group in groups for x, _ in group.points) if right is None else right
    xs, ys = [front[0][0], *(x for x, _ in front), end], [top, *(y for _, y in front), front[-1][1]]
    axes.step(
        xs,
        ys,
        where="post",
        color=_FRONT,
        linewidth=5,
        alpha=0.7,
        zorder=1,
        solid_joinstyle="round",
        label="Pareto front of the means",
    )
    left_out = "" if all(group.whole for group in groups) else " Contestants with a failed seed are not on it."
    return f" Grey: the Pareto front; no mean is better in both than one that is on it.{left_out}"


def _limits(values: Sequence[float], base: float | None) -> tuple[float, float]:
    """Room for the values, and for the base where that does not cost them most of the chart."""
    low, high = min(values), max(values)
    span = max(high - low, 0.02)
    if base is not None and low - 0.6 * span <= base <= high + 0.6 * span:
        low, high = min(low, base), max(high, base)
    span = max(high - low, 0.02)
    return low - 0.08 * span, high + 0.08 * span


def _sweep_chart(results: ComparisonResults, index: int) -> Chart | None:
    """Score over learning rate at one budget: for each rate, the best score over the other stages' rates."""
    curves = [
        (sweep, stage, number)
        for contestant in results.contestants
        for sweep in results.sweeps
        if sweep.contestant == contestant.name and sweep.budget == index
        for number, stage in enumerate(varied_rates(sweep))
    ]
    scores = [trial.score for sweep, _, _ in curves for trial in sweep.trials if trial.score is not None]
    if not scores:
        return None
    figure, axes = new_figure()
    styles = contestant_styles(results)
    bottom, top = _sweep_limits(scores)
    axes.set_xscale("log")
    for sweep, stage, number in curves:
        style = styles[sweep.contestant]
        several = any(len(trial.learning_rates) > 1 for trial in sweep.trials)
        name = f"{style.label}: {drawable(stage_name(stage), 'a stage')}" if several else style.label
        _draw_sweep(axes, sweep, stage, Style(name, style.colour, style.marker), _LINES[number % len(_LINES)], top)
    axes.set_ylim(bottom, top)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")
    target = drawable(results.languages.target, "target")
    if results.source_weight:
        source = drawable(results.languages.source, "source")
        axes.set_ylabel(f"bits per byte, validation: {target} + {results.source_weight:g} x {source}")
    else:
        axes.set_ylabel(f"{target}: bits per byte, validation")
    caption = "Lower is better. Ringed: chosen."
    if any(len(varied_rates(sweep)) > 1 for sweep, _, _ in curves):
        caption += " Where several stages' rates were varied, each point is the best over the other stages' rates."
    above = sum(score > top for score in scores)
    failed = sum(
        trial.failed is not None for sweep in _unique(sweep for sweep, _, _ in curves) for trial in sweep.trials
    )
    marks = [f"{above} above the chart"] if above else []
    marks += [f"{failed} failed"] if failed else []
    caption += (
        f" Crosses at the top edge: tries that are above the chart or failed ({', '.join(marks)})." if marks else ""
    )
    return finish(figure, f"learning_rates_{index + 1}", f"Learning rates at {results.budgets[index].name}", caption)


def _reach_chart(results: ComparisonResults, index: int) -> Chart | None:
    """Target over source bits per byte of every learning rate tried: what a contestant can be tuned to."""
    target, source = results.languages.target, results.languages.source
    styles = contestant_styles(results)
    fronts: dict[str, list[tuple[float, float]]] = {}
    for sweep in results.sweeps:
        tried = [trial.bpb for trial in sweep.trials if target in trial.bpb and source in trial.bpb]
        points = [(bpb[source], bpb[target]) for bpb in tried]
        if sweep.budget == index and len(points) > 1:
            fronts[sweep.contestant] = [points[at] for at in pareto_front(points)]
    if not fronts:
        return None
    figure, axes = new_figure()
    for contestant in results.contestants:
        if points := fronts.get(contestant.name, []):
            style = styles[contestant.name]
            axes.plot(
                *zip(*points, strict=True), color=style.colour, marker=style.marker, markersize=5, label=style.label
            )
    axes.set_xlabel(f"{drawable(source, 'source')}: bits per byte, validation")
    axes.set_ylabel(f"{drawable(target, 'target')}: bits per byte, validation")
    caption = (
        "Down and to the left is better. Each point is a learning rate that was tried (of those that no other of the "
        "same contestant beats in both languages), with one seed. A line below another's can be tuned to do better."
    )
    return finish(figure, f"reach_{index + 1}", f"What tuning can reach at {results.budgets[index].name}", caption)


def _unique(sweeps: Iterable[Sweep]) -> list[Sweep]:
    return list({id(sweep): sweep for sweep in sweeps}.values())


def _sweep_limits(scores: Sequence[float]) -> tuple[float, float]:
    """Room for the better half of the scores and what is not far above it: a diverging try is not to flatten them."""
    low, middle = min(scores), sorted(scores)[len(scores) // 2]
    reach = max(middle - low, 0.02)
    high = max(score for score in scores if score <= low + 4 * reach)
    return low - 0.08 * (high - low or reach), high + 0.12 * (high - low or reach)


def _draw_sweep(axes: Axes, sweep: Sweep, stage: str, style: Style, line: str, top: float) -> None:
    best: dict[float, SweepTrial] = {}
    lost = set()
    for trial in sweep.trials:
        if stage not in trial.learning_rates:
            continue
        at = trial.learning_rates[stage]
        if trial.score is None or trial.failed is not None:
            lost.add(at)
        elif at not in best or trial.score < (best[at].score or 0.0):
            best[at] = trial
    points = [(at, score) for at, trial in sorted(best.items()) if (score := trial.score) is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=style.colour,
            marker=style.marker,
            markersize=5,
            linestyle=line,
            linewidth=1.5,
            label=style.label,
        )
    lost = (lost - set(best)) | {at for at, score in points if score > top}
    if lost:
        axes.plot(sorted(lost), [top] * len(lost), "x", color=style.colour, markersize=7, clip_on=False, zorder=5)
    for trial in sweep.trials:
        if trial.chosen and trial.score is not None and stage in trial.learning_rates:
            axes.plot(
                trial.learning_rates[stage],
                trial.score,
                "o",
                markersize=13,
                markerfacecolor="none",
                markeredgecolor=style.colour,
                markeredgewidth=1.6,
                zorder=4,
            )
