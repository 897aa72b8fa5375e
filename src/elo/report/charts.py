"""Draw the charts of a report: gain over cost, retention, and training curves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from elo.format import count, mean_of
from elo.report.drawing import (
    COLOURS,
    INK,
    MARKERS,
    SPARE_COLOURS,
    STYLE,
    Chart,
    Point,
    Style,
    drawable,
    finish,
    lighter,
    new_figure,
    time_axis,
)
from elo.report.paired import whole_values
from elo.report.schema import Budget, EvaluationPoint, Measured, Results, Trial, mean_bpb

_LABEL_CHARACTERS = 40
_END = 0.995
"""Share of a trial's time after which a measurement during training is that of the final model."""
_DASHED = " Dashed: the detached model alone, if it is within the chart."


@dataclass(frozen=True)
class Segment:
    """A part of a curve; `detached` if it shows the detached model."""

    points: tuple[Point, ...]
    detached: bool


@dataclass(frozen=True)
class _Group:
    """A contestant's finished trials at one budget."""

    contestant: str
    points: tuple[Point, ...]

    @property
    def mean(self) -> Point:
        xs, ys = zip(*self.points, strict=True)
        return sum(xs) / len(xs), sum(ys) / len(ys)


def draw_charts(results: Results) -> list[Chart]:
    """Return all charts that the results have points for, in reading order."""
    charts: list[Chart | None] = []
    with matplotlib.rc_context(STYLE):
        charts.append(_cost_chart(results))
        charts += [_retention_chart(results, budget, index) for index, budget in enumerate(results.budgets, 1)]
        charts += [_curve_chart(results, language) for language in results.languages.all]
        charts += _measure_charts(results)
        charts.append(_loss_chart(results))
    return [chart for chart in charts if chart is not None]


def contestant_styles(results: Results) -> dict[str, Style]:
    """Return the style of each contestant, which is the same throughout the report."""
    names = [contestant.name for contestant in results.contestants]
    spare = [colour for name, colour in COLOURS.items() if name not in names] + list(SPARE_COLOURS)
    others = [name for name in names if name not in COLOURS]
    styles: dict[str, Style] = {}
    for index, contestant in enumerate(results.contestants):
        name = contestant.name
        colour = COLOURS.get(name) or spare[others.index(name) % len(spare)]
        label = drawable(contestant.title, drawable(name, f"contestant {index + 1}"))
        label = label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "…"
        styles[name] = Style(label, colour, MARKERS[(index + index // len(MARKERS)) % len(MARKERS)])
    return styles


def cost_of(results: Results) -> tuple[str, Callable[[Trial], float | None]]:
    """Return the name of a trial's cost, and a function that reads it: CPU time if all trials have it, or wall time."""
    finished = [trial for trial in results.trials if not trial.tuning and trial.failed is None]
    if finished and all(trial.cpu_seconds is not None for trial in finished):
        return "CPU time", lambda trial: trial.cpu_seconds
    return "wall time", lambda trial: trial.seconds


def _groups(
    results: Results,
    x: Callable[[Trial], float | None],
    y: Callable[[Trial], float | None],
    budgets: Sequence[Budget],
) -> list[_Group]:
    found = []
    for contestant in results.contestants:
        for budget in budgets:
            points = [(x(trial), y(trial)) for trial in results.finished(contestant.name, budget.name)]
            known = tuple((a, b) for a, b in points if a is not None and b is not None)
            if known:
                found.append(_Group(contestant.name, known))
    return found


def _cost_chart(results: Results) -> Chart | None:
    """Draw target bits per byte over cost, for all budgets."""
    name, cost = cost_of(results)
    groups = _groups(results, cost, lambda trial: mean_bpb(trial.measured, results.languages.targets), results.budgets)
    if len(groups) < 2:
        return None
    figure, axes = new_figure()
    costs = [x for group in groups for x, _ in group.points]
    unit, scale = time_axis(costs)
    groups = [_Group(group.contestant, tuple((x / scale, y) for x, y in group.points)) for group in groups]
    caption = f"Lower and further left is better. {_dots(results)}"
    base = (
        None if any(each.model for each in results.contestants) else mean_bpb(results.base, results.languages.targets)
    )
    caption += _draw_base(axes, base, [y for group in groups for _, y in group.points])
    _draw_groups(axes, results, groups, joined=True)
    axes.set_xlabel(f"training {name} ({unit})")
    axes.set_ylabel(f"{_targets(results)}: bits per byte")
    return finish(figure, "target_over_cost", "Target language over cost", caption)


def _dots(results: Results) -> str:
    return "Small: one seed; large: mean over seeds." if len(results.seeds) > 1 else "One seed."


def _targets(results: Results) -> str:
    return drawable(mean_of(results.languages.targets), "target")


def _draw_base(axes: Axes, base: float | None, values: Sequence[float]) -> str:
    """Set limits that fit the values, and draw the base's line if it is near. Return an addition to the caption."""
    low, high = min(values), max(values)
    span = max(high - low, 0.02)
    near = base is not None and low - 1.5 * span <= base <= high + 1.5 * span
    if base is not None and near:
        low, high = min(low, base), max(high, base)
        axes.axhline(base, color=INK, linestyle=":", linewidth=1.3, label="base model")
    span = max(high - low, 0.02)
    axes.set_ylim(low - 0.08 * span, high + 0.08 * span)
    return "" if near or base is None else f" The base model is off the chart, at {base:.3f}."


def _draw_groups(axes: Axes, results: Results, groups: Sequence[_Group], *, joined: bool) -> None:
    for name, style in contestant_styles(results).items():
        own = sorted((group for group in groups if group.contestant == name), key=lambda group: group.mean)
        if not own:
            continue
        for group in own:
            if len(group.points) > 1:
                axes.plot(*zip(*group.points, strict=True), style.marker, color=style.colour, markersize=4, zorder=5,
                          markeredgecolor="white", markeredgewidth=0.4)  # fmt: skip
        axes.plot(
            *zip(*(group.mean for group in own), strict=True),
            color=style.colour,
            marker=style.marker,
            markersize=9,
            markerfacecolor=lighter(style.colour, 0.55),
            markeredgecolor=style.colour,
            markeredgewidth=1.2,
            linewidth=1.5 if joined else 0,
            label=style.label,
            zorder=4,
        )


def _change(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    """Return source loss and target gain."""
    return after[0] - before[0], before[1] - after[1]


def _retention_chart(results: Results, budget: Budget, number: int) -> Chart | None:
    """Draw target gain over source loss at one budget."""
    sources, targets = results.languages.sources, results.languages.targets
    before = {}
    for each in results.contestants:
        base_source, base_target = (mean_bpb(results.base_of(each.name), role) for role in (sources, targets))
        if base_source is None or base_target is None:
            return None
        before[each.name] = base_source, base_target

    groups = [
        _Group(group.contestant, tuple(_change(before[group.contestant], point) for point in group.points))
        for group in _groups(
            results,
            lambda trial: mean_bpb(trial.measured, sources),
            lambda trial: mean_bpb(trial.measured, targets),
            [budget],
        )
    ]
    if len(groups) < 2:
        return None
    figure, axes = new_figure()
    limit = results.endpoint.source_limit_bpb
    xs = [0.0, limit, *(x for group in groups for x, _ in group.points)]
    margin = 0.08 * (max(xs) - min(xs) or 0.02)
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    axes.axvspan(
        limit, max(xs) + margin, color="#fbeee0", zorder=0, linewidth=0, label=f"source worse by more than {limit:g}"
    )
    axes.plot(0, 0, "*", color=INK, markersize=12, linestyle="none", label="base model", clip_on=False, zorder=6)
    _draw_groups(axes, results, groups, joined=False)
    axes.axvline(0, color=INK, linestyle=":", linewidth=1.0)
    if min(y for group in groups for _, y in group.points) < 0:
        axes.axhline(0, color=INK, linestyle=":", linewidth=1.0)
    source = drawable(mean_of(sources), "source")
    axes.set_xlabel(f"loss in {source} (bits per byte)")
    axes.set_ylabel(f"gain in {_targets(results)} (bits per byte)")
    title = "Target gain over source loss" + (f", {budget.name}" if len(results.budgets) > 1 else "")
    return finish(figure, f"retention_{number}", title, f"Higher and further left is better. {_dots(results)}")


def last_trials(results: Results) -> list[Trial]:
    """Return each contestant's first finished trial at the last budget with one."""
    found = []
    for contestant in results.contestants:
        trials = [trial for budget in results.budgets for trial in results.finished(contestant.name, budget.name)[:1]]
        found += trials[-1:]
    return found


def bpb_segments(results: Results, trial: Trial, language: str) -> list[Segment]:
    """Return a trial's bits per byte over its seconds, for the detached model, if there is one, and the whole model.

    The curve of the whole model starts at the base, or at the attached model before alignment, and ends at the final
    model.
    """
    detached_stages = {stage.name for stage in trial.stages if stage.detached}
    measured = [(each.seconds, each.bpb[language], each.stage) for each in trial.evaluations if language in each.bpb]
    detached = [(at, bpb) for at, bpb, stage in measured if stage in detached_stages]
    whole = [(at, bpb) for at, bpb, stage in measured if stage not in detached_stages]
    start = 0.0
    for stage in trial.stages:
        if stage.tokens and not stage.detached:
            break
        start += stage.seconds
    before = trial.before_alignment if detached_stages else results.base_of(trial.contestant)
    first = before.bpb.get(language) if before else None
    if first is not None and (not whole or whole[0][0] > start):
        whole.insert(0, (start, first))
    final, end = trial.measured.bpb.get(language), trial.seconds
    if final is not None and end > 0:
        whole = [*((at, bpb) for at, bpb in whole if at < _END * end), (end, final)]
    segments = [Segment(tuple(detached), True), Segment(tuple(whole), False)]
    return [segment for segment in segments if segment.points]


def _curve_chart(results: Results, language: str) -> Chart | None:
    trials = [trial for trial in last_trials(results) if any(language in each.bpb for each in trial.evaluations)]
    curves = [(trial, bpb_segments(results, trial, language)) for trial in trials]
    if not curves:
        return None
    figure, axes = new_figure()
    unit, scale = time_axis(at for _, segments in curves for segment in segments for at, _ in segment.points)
    base = results.base.bpb.get(language)
    if base is not None:
        axes.axhline(base, color=INK, linestyle=":", linewidth=1.3, label="base model")
    styles = contestant_styles(results)
    for trial, segments in curves:
        for segment in segments:
            points = tuple((at / scale, bpb) for at, bpb in segment.points)
            _plot(axes, Segment(points, segment.detached), styles[trial.contestant], marked=True)
    # The detached model alone is often far worse, so it does not affect the scale.
    shown = [bpb for _, segments in curves for each in segments if not each.detached for _, bpb in each.points]
    shown += [base] if base is not None else []
    if not shown:
        return None
    low, high = min(shown), max(shown)
    span = max(high - low, 0.02)
    axes.set_ylim(low - 0.08 * span, high + 0.25 * span)
    role = "target" if language in results.languages.targets else "source"
    axes.set_xlabel(f"training wall time ({unit})")
    axes.set_ylabel(f"{drawable(language, role)}: bits per byte")
    name, title = f"curve_{results.languages.all.index(language) + 1}", f"{role.capitalize()} language {language}"
    return finish(figure, name, f"{title} during training", f"Lower is better.{_DASHED}")


def _measure_charts(results: Results) -> list[Chart]:
    """Draw a chart of each whole benchmark measured during training, from the base's value to the final one."""
    trials = [trial for trial in last_trials(results) if any(each.measures for each in trial.evaluations)]
    shown = {key: value for trial in trials for each in trial.evaluations for key, value in whole_values(each).items()}
    unit, scale = time_axis(trial.seconds for trial in trials)
    styles, charts = contestant_styles(results), []
    for number, (key, example) in enumerate(shown.items(), 1):
        figure, axes = new_figure()
        for trial in trials:
            measured: list[tuple[float, Measured | EvaluationPoint]] = [(0.0, results.base_of(trial.contestant))]
            measured += [(each.seconds, each) for each in trial.evaluations if each.seconds < _END * trial.seconds]
            measured.append((trial.seconds, trial.measured))
            found = {at / scale: value.value for at, each in measured if (value := whole_values(each).get(key))}
            _plot(axes, Segment(tuple(found.items()), False), styles[trial.contestant], marked=True)
        if example.chance is not None:
            axes.axhline(example.chance, color=INK, linestyle=":", linewidth=1.3, label="chance")
        axes.set_xlabel(f"training wall time ({unit})")
        title = " ".join(key).strip().replace("_", " ")
        axes.set_ylabel(drawable(title, f"benchmark {number}"))
        better = "Higher" if example.higher_is_better else "Lower"
        charts.append(finish(figure, f"measure_{number}", f"{title} during training", f"{better} is better."))
    return charts


def _loss_chart(results: Results) -> Chart | None:
    trials = [trial for trial in last_trials(results) if len(trial.losses) > 1]
    if not trials:
        return None
    figure, axes = new_figure()
    styles = contestant_styles(results)
    for trial in trials:
        detached = {stage.name for stage in trial.stages if stage.detached}
        for stage in dict.fromkeys(loss.stage for loss in trial.losses):
            points = tuple((float(loss.tokens), loss.loss) for loss in trial.losses if loss.stage == stage)
            _plot(axes, Segment(points, stage in detached), styles[trial.contestant], marked=False)
    values = sorted(loss.loss for trial in trials for loss in trial.losses)
    low, high = values[0], values[int(0.98 * (len(values) - 1))]  # the first steps may be far above
    axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.08 * (high - low or 1))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    return finish(figure, "loss", "Training loss", f"On the training text, not comparable with bpb.{_DASHED}")


def _plot(axes: Axes, segment: Segment, style: Style, *, marked: bool) -> None:
    label = style.label + (" (detached model)" if segment.detached else "")
    known = axes.get_legend_handles_labels()[1]
    axes.plot(
        *zip(*segment.points, strict=True),
        color=style.colour,
        marker=style.marker if marked else "",
        markersize=4 if segment.detached else 5,
        markerfacecolor="white" if segment.detached else style.colour,
        linestyle="--" if segment.detached else "-",
        linewidth=1.0 if not marked else 1.3 if segment.detached else 1.8,
        alpha=0.65 if segment.detached else 1.0,
        label=None if label in known else label,
    )
