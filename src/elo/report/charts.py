"""Charts of a results file: what the cost bought, retention, training curves, tuning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from elo.format import count, learning_rate, listed
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
from elo.report.schema import Budget, Results, Trial, mean_bpb
from elo.report.verdict import score, tuned

_LOG_FROM = 8.0
"""Ratio of largest to smallest cost from which the axis is logarithmic."""
_LABEL_CHARACTERS = 40
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Segment:
    """A stretch of a curve; `detached` if it is of the detached model."""

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
    """Every chart that the results have points for, in reading order."""
    charts: list[Chart | None] = []
    with matplotlib.rc_context(STYLE):
        charts.append(_cost_chart(results))
        charts += [_retention_chart(results, budget, index) for index, budget in enumerate(results.budgets, 1)]
        charts += [_curve_chart(results, language) for language in results.languages.all]
        charts.append(_loss_chart(results))
        charts += [_tuning_chart(results, budget, index) for index, budget in enumerate(results.budgets, 1)]
    return [chart for chart in charts if chart is not None]


def contestant_styles(results: Results) -> dict[str, Style]:
    """Colour and marker of each contestant throughout the report."""
    names = [contestant.name for contestant in results.contestants]
    spare = [colour for name, colour in COLOURS.items() if name not in names] + list(SPARE_COLOURS)
    others = [name for name in names if name not in COLOURS]
    styles: dict[str, Style] = {}
    for index, contestant in enumerate(results.contestants):
        name = contestant.name
        colour = COLOURS.get(name) or spare[others.index(name) % len(spare)]
        label = drawable(contestant.title, drawable(name, f"contestant {index + 1}"))
        label = label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "…"
        taken = {style.marker for style in styles.values() if style.colour == colour}
        free = [marker for marker in MARKERS[index % len(MARKERS) :] + MARKERS if marker not in taken]
        styles[name] = Style(label, colour, (free or MARKERS)[0])
    return styles


def cost_of(results: Results) -> tuple[str, Callable[[Trial], float | None]]:
    """CPU time if every trial has it, else wall time: its name and how to read it from a trial."""
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
    """Target bits per byte over cost, all budgets."""
    name, cost = cost_of(results)
    groups = _groups(results, cost, lambda trial: results.target_bpb(trial.measured), results.budgets)
    if len(groups) < 2:
        return None
    figure, axes = new_figure()
    costs = [x for group in groups for x, _ in group.points]
    unit, scale = time_axis(costs)
    groups = [_Group(group.contestant, tuple((x / scale, y) for x, y in group.points)) for group in groups]
    if min(costs) > 0 and max(costs) / min(costs) >= _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    caption = f"Lower and further left is better. {_dots(results)}"
    caption += _draw_base(axes, results.target_bpb(results.base), [y for group in groups for _, y in group.points])
    _draw_groups(axes, results, groups, joined=True)
    axes.set_xlabel(f"training {name} ({unit})")
    axes.set_ylabel(f"{_targets(results)}: bits per byte")
    return finish(figure, "target_over_cost", "Target language over cost", caption)


def _dots(results: Results) -> str:
    return "Small: one seed; large: mean over seeds." if len(results.seeds) > 1 else "One seed."


def _targets(results: Results) -> str:
    return drawable(listed(results.languages.targets), "target")


def _draw_base(axes: Axes, base: float | None, values: Sequence[float]) -> str:
    """Limits with room for the values, and the base's line where it does not flatten them; addition to the caption."""
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


def _retention_chart(results: Results, budget: Budget, number: int) -> Chart | None:
    """Target gain over source loss at one budget."""
    sources, targets = results.languages.sources, results.languages.targets
    base_source, base_target = mean_bpb(results.base, sources), mean_bpb(results.base, targets)
    if base_source is None or base_target is None:
        return None

    def loss(trial: Trial) -> float | None:
        value = mean_bpb(trial.measured, sources)
        return None if value is None else value - base_source

    def gain(trial: Trial) -> float | None:
        value = mean_bpb(trial.measured, targets)
        return None if value is None else base_target - value

    groups = _groups(results, loss, gain, [budget])
    if len(groups) < 2:
        return None
    figure, axes = new_figure()
    limit = results.endpoint.source_limit_bpb
    xs = [0.0, limit, *(x for group in groups for x, _ in group.points)]
    margin = 0.08 * (max(xs) - min(xs) or 0.02)
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    axes.axvspan(limit, max(xs) + margin, color="#fbeee0", zorder=0, linewidth=0, label=f"source off by over {limit:g}")
    axes.plot(0, 0, "*", color=INK, markersize=12, linestyle="none", label="base model", clip_on=False, zorder=6)
    _draw_groups(axes, results, groups, joined=False)
    axes.axvline(0, color=INK, linestyle=":", linewidth=1.0)
    if min(y for group in groups for _, y in group.points) < 0:
        axes.axhline(0, color=INK, linestyle=":", linewidth=1.0)
    source = drawable(listed(sources), "source")
    axes.set_xlabel(f"loss in {source} (bits per byte)")
    axes.set_ylabel(f"gain in {_targets(results)} (bits per byte)")
    title = "Target gain over source loss" + (f", {budget.name}" if len(results.budgets) > 1 else "")
    return finish(figure, f"retention_{number}", title, f"Higher and further left is better. {_dots(results)}")


def last_trials(results: Results) -> list[Trial]:
    """Each contestant's first finished trial at the last budget that it finished one at."""
    found = []
    for contestant in results.contestants:
        trials = [trial for budget in results.budgets for trial in results.finished(contestant.name, budget.name)[:1]]
        found += trials[-1:]
    return found


def bpb_segments(results: Results, trial: Trial, language: str) -> list[Segment]:
    """A trial's bits per byte over its seconds: the detached model's stretch, if any, then the whole model's.

    The whole model starts from the base, or from the attached model before alignment; it ends at the final model.
    """
    detached_stages = {stage.name for stage in trial.stages if stage.detached}
    measured = [(each.seconds, each.bpb[language], each.stage) for each in trial.evaluations if language in each.bpb]
    detached = [(at, bpb) for at, bpb, stage in measured if stage in detached_stages]
    whole = [(at, bpb) for at, bpb, stage in measured if stage not in detached_stages]
    start, first = 0.0, results.base.bpb.get(language)
    if detached_stages:
        first = trial.before_alignment.bpb.get(language) if trial.before_alignment else None
        for stage in trial.stages:
            start += stage.seconds
            if stage.name == "attach":
                break
    if first is not None and (not whole or whole[0][0] > start):
        whole.insert(0, (start, first))
    final, end = trial.measured.bpb.get(language), trial.seconds
    if final is not None and end > 0:
        whole = [*((at, bpb) for at, bpb in whole if at < 0.995 * end), (end, final)]
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
    caption = "Lower is better." + _limit_curves(axes, [each for _, segments in curves for each in segments], base)
    role = "target" if language in results.languages.targets else "source"
    axes.set_xlabel(f"training wall time ({unit})")
    axes.set_ylabel(f"{drawable(language, role)}: bits per byte")
    number = results.languages.all.index(language) + 1
    return finish(figure, f"curve_{number}", f"{role.capitalize()} language {language} during training", caption)


def _limit_curves(axes: Axes, segments: Sequence[Segment], base: float | None) -> str:
    """Give the whole models' curves the room; the addition to the caption if a detached model's curve is cut off."""
    whole = [bpb for each in segments if not each.detached for _, bpb in each.points]
    whole += [base] if base is not None else []
    detached = [bpb for each in segments if each.detached for _, bpb in each.points]
    if not whole:
        return ""
    low, high = min(whole), max(whole)
    span = max(high - low, 0.02)
    ceiling = high + 0.5 * span
    hidden = bool(detached) and min(detached) > ceiling
    top = high if hidden else min(ceiling, max([high, *detached]))
    axes.set_ylim(min([low, *(bpb for bpb in detached if bpb <= top)]) - 0.08 * span, top + 0.08 * span)
    if hidden:
        return f" The detached model by itself is above the chart: {max(detached):.2f} to {min(detached):.2f}."
    return " Dashed: the detached model by itself." if detached else ""


def _loss_chart(results: Results) -> Chart | None:
    trials = [trial for trial in last_trials(results) if len(trial.losses) > 1]
    if not trials:
        return None
    figure, axes = new_figure()
    styles = contestant_styles(results)
    values, smoothed, detached_stages = [], False, False
    for trial in trials:
        detached = {stage.name for stage in trial.stages if stage.detached}
        for stage in dict.fromkeys(loss.stage for loss in trial.losses):
            points = tuple((float(loss.tokens), loss.loss) for loss in trial.losses if loss.stage == stage)
            values += [loss for _, loss in points]
            smooth = _smoothed(points)
            if smooth != points:
                smoothed = True
                axes.plot(*zip(*points, strict=True), color=styles[trial.contestant].colour, linewidth=0.6, alpha=0.22)
            detached_stages |= stage in detached
            _plot(axes, Segment(smooth, stage in detached), styles[trial.contestant], marked=False)
    values.sort()
    low, high = values[0], values[min(len(values) - 1, int(0.98 * len(values)))]
    axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.08 * (high - low or 1))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    caption = "On the training mix, per token: not comparable with bits per byte."
    caption += " Thick: running mean." if smoothed else ""
    return finish(
        figure, "loss", "Training loss", caption + (" Dashed: the detached model." if detached_stages else "")
    )


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
        linewidth=1.3 if segment.detached else 1.8,
        alpha=0.65 if segment.detached else 1.0,
        label=None if label in known else label,
    )


def _smoothed(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """Centred running mean over a fortieth of the curve; short curves unchanged."""
    half = len(points) // 80
    means = []
    for index, (at, loss) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        window = points[index - reach : index + reach + 1]
        means.append((at, sum(value for _, value in window) / len(window) if reach else loss))
    return tuple(means)


def _tuning_chart(results: Results, budget: Budget, number: int) -> Chart | None:
    """Validation score over learning rate: for each rate, the best score over the other sections' rates."""
    tried = {each.name: tuned(results, each.name, budget.name) for each in results.contestants}
    scores = [value for trials in tried.values() for t in trials if (value := score(results, t.validation)) is not None]
    if not scores:
        return None
    figure, axes = new_figure()
    styles = contestant_styles(results)
    middle = sorted(scores)[len(scores) // 2]
    reach = max(middle - min(scores), 0.02)
    high = max(value for value in scores if value <= min(scores) + 4 * reach)
    room = high - min(scores) or reach
    top = high + 0.12 * room
    lost = 0
    for name, trials in tried.items():
        sections = dict.fromkeys(section for trial in trials for section in trial.learning_rates)
        varied = [each for each in sections if len({trial.learning_rates.get(each) for trial in trials}) > 1]
        for line, section in zip(_LINES, varied, strict=False):
            label = styles[name].label + (f": {drawable(section.replace('_', ' '), 'a section')}" if varied[1:] else "")
            lost += _draw_sweep(axes, results, trials, section, Style(label, styles[name].colour, styles[name].marker),
                                line, top)  # fmt: skip
    axes.set_ylim(min(scores) - 0.08 * room, top)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: learning_rate(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    weight = results.endpoint.source_weight
    source = f" + {weight:g} × {drawable(listed(results.languages.sources), 'source')}" if weight else ""
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"validation bits per byte: {_targets(results)}{source}")
    caption = "Lower is better. Ringed: chosen. Each point is the best over the other sections' rates."
    caption += f" Crosses: {lost} rates that failed or are above the chart." if lost else ""
    title = "Learning rates" + (f", {budget.name}" if len(results.budgets) > 1 else "")
    return finish(figure, f"learning_rates_{number}", title, caption)


def _draw_sweep(
    axes: Axes, results: Results, trials: Sequence[Trial], section: str, style: Style, line: str, top: float
) -> int:
    """Draw one contestant's sweep of one section; the number of rates without a point on the chart."""
    best: dict[float, float] = {}
    rates = {trial.learning_rates[section] for trial in trials if section in trial.learning_rates}
    for trial in trials:
        value, at = score(results, trial.validation), trial.learning_rates.get(section)
        if value is not None and at is not None and trial.failed is None:
            best[at] = min(value, best.get(at, value))
            if not trial.tuning:
                axes.plot(at, value, "o", markersize=13, markerfacecolor="none", markeredgecolor=style.colour,
                          markeredgewidth=1.6, zorder=4)  # fmt: skip
    if best:
        axes.plot(*zip(*sorted(best.items()), strict=True), color=style.colour, marker=style.marker, markersize=5,
                  linestyle=line, linewidth=1.5, label=style.label)  # fmt: skip
    lost = sorted(rate for rate in rates if best.get(rate, top + 1) > top)
    if lost:
        axes.plot(lost, [top] * len(lost), "x", color=style.colour, markersize=7, clip_on=False, zorder=5)
    return len(lost)
