"""A run's report as HTML and as Markdown, from checked results and drawn charts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from elo.reporting.charts import method_colours
from elo.reporting.comparison import (
    LEVEL_BPB,
    GroupColumn,
    Row,
    compare,
    count,
    duration,
    figures,
    findings,
    group_columns,
    group_note,
    memory,
    signed,
    verdict,
)
from elo.reporting.drawing import Chart, lighter
from elo.reporting.markup import (
    CHART_FOLDER,
    accuracy,
    data_table,
    error_in_points,
    escaped,
    facts,
    model_text,
    render,
    stylesheet,
    table,
    texts,
)
from elo.reporting.results import Method, Results, Stage


@dataclass(frozen=True)
class _Part:
    """One stage's share of a method's bar."""

    stage: Stage
    percent: float
    colour: str
    ink: str


@dataclass(frozen=True)
class _Bar:
    method: Method
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Sample:
    language: str
    prompt: str
    texts: tuple[tuple[str, str], ...]
    """(who wrote it, what), the base first."""


def html_page(results: Results, charts: Sequence[Chart]) -> str:
    """One self-contained page: style and charts inside, no script, nothing fetched."""
    return render("report.html.j2", _context(results, charts))


def markdown_page(results: Results, charts: Sequence[Chart]) -> str:
    """The same for a README or a pull request; its charts are the PNG files in `CHART_FOLDER`."""
    context = _context(results, charts)
    tables = {
        "comparison": _comparison_table(results, context["rows"], context["has"]),
        "cloze_groups": _group_table(results, context["group_columns"]),
        "stages": _stage_table(context["bars"], context["full_rate"]),
        "data": data_table(context["texts"]),
    }
    return render("report.md.j2", {**context, **tables, "chart_folder": CHART_FOLDER})


def _context(results: Results, charts: Sequence[Chart]) -> dict[str, Any]:
    rows = compare(results)
    bars = _bars(results)
    full = results.method("full")
    full_stage = full.stage("full") if full else None
    target, source = results.languages.target, results.languages.source
    measured = [results.base, *results.methods]
    return {
        "results": results,
        "target": target,
        "source": source,
        "css": stylesheet(),
        "about": _about(results),
        "verdict": verdict(results),
        "figures": figures(results),
        "findings": findings(results),
        "rows": rows,
        "has": {
            "speed_up": any(row.speed_up is not None for row in rows) and len(rows) > 1,
            "target": any(target in each.bpb for each in measured),
            "source": any(source in each.bpb for each in measured),
            "cloze_target": any(target in each.cloze for each in measured),
            "cloze_source": any(source in each.cloze for each in measured),
            "memory": any(row.method.peak_memory_bytes is not None for row in rows),
        },
        "table_note": _table_note(results, rows),
        "group_columns": group_columns(results),
        "group_note": group_note(results),
        "charts": charts,
        "colours": method_colours(results),
        "bars": bars,
        "full_rate": full_stage.tokens_per_second if full_stage and len(results.methods) > 1 else None,
        "samples": _samples(results),
        "writing": _writing(results),
        "texts": texts(results.data),
        "definitions": _definitions(results),
        "facts": facts(results, [results.seed] if results.seed is not None else []),
        "config": yaml.safe_dump(results.config, allow_unicode=True, sort_keys=False) if results.config else "",
    }


def _about(results: Results) -> str:
    """What was run, on what, in one line."""
    data, own = results.data, results.methods[0]
    parts = [model_text(results.model)]
    parts.append(f"{own.title}: {results.languages.target} taught, {results.languages.source} to be kept")
    replay = f", {data.replay_ratio:.0%} of them {results.languages.source}" if data.replay_ratio is not None else ""
    parts.append(f"{count(own.tokens)} training tokens{replay}")
    if results.seed is not None:
        parts.append(f"seed {results.seed}")
    if device := results.hardware.get("gpu") or results.hardware.get("cpu"):
        parts.append(str(device))
    if results.created:
        parts.append(results.created[:10])
    return " · ".join(parts)


def _table_note(results: Results, rows: Sequence[Row]) -> str:
    notes = []
    if any(row.best for row in rows):
        notes.append("Marked: the best of its column.")
    notes.append("Wall time is training alone: evaluation is not counted.")
    if any(row.speed_up is not None for row in rows) and len(rows) > 1:
        notes.append("A ratio of wall times is given only where both methods trained on the same number of tokens.")
    notes.append(
        f"One seed: differences of less than {LEVEL_BPB} bits per byte are called level, and somewhat larger ones may "
        "be chance."
    )
    notes += [f"{method.title}: {method.note}" for method in results.methods if method.note]
    return " ".join(notes)


def _bars(results: Results) -> list[_Bar]:
    colours = method_colours(results)
    longest = max((sum(stage.seconds for stage in method.stages) for method in results.methods), default=0.0)
    bars = []
    for method in results.methods:
        if not method.stages or not longest:
            continue
        parts = []
        for stage in method.stages:
            colour = colours[method.name]
            if stage.name == method.detached_stage:
                colour = lighter(colour, 0.45)
            if not stage.tokens:
                colour = "#9aa5b1"
            parts.append(_Part(stage, 100 * stage.seconds / longest, colour, _ink_on(colour)))
        bars.append(_Bar(method, tuple(parts)))
    return bars


def _ink_on(colour: str) -> str:
    """White or dark text, whichever can be read on `colour` (weights: Rec. 709 luma)."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#1f2933" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 140 else "#ffffff"


def _samples(results: Results) -> list[_Sample]:
    """Base and own method side by side, prompt by prompt; target language first."""
    own = results.methods[0]
    written: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for who, measurement in (("Base model, before", results.base), (f"{own.title}, after", own)):
        for sample in measurement.samples:
            written.setdefault((sample.language, sample.prompt), []).append((who, sample.text))
    order = {results.languages.target: 0, results.languages.source: 1}
    keys = sorted(written, key=lambda key: order.get(key[0], 2))
    return [_Sample(language, prompt, tuple(written[language, prompt])) for language, prompt in keys]


def _writing(results: Results) -> str:
    """How fast base and own method wrote the samples, in characters: tokens are not alike across vocabularies."""
    rates = []
    for language in (results.languages.target, results.languages.source):
        found = [each.generation.get(language) for each in (results.base, results.methods[0])]
        speeds = [each.rate for each in found if each is not None and each.rate is not None]
        if len(speeds) == 2:
            rates.append(f"{language} {speeds[0]:.0f} characters/s before, {speeds[1]:.0f} after")
    return f"Speed of writing: {'; '.join(rates)}." if rates else ""


def _definitions(results: Results) -> list[str]:
    found = [
        "Bits per byte (bpb) is the summed negative log-likelihood of the held-out text's tokens, in nats, over ln 2 "
        "times the UTF-8 bytes of that text. Every text token counts once, predicted from the tokens before it in its "
        "own document; the end-of-text token does not count. Lower is better. It can be compared across tokenizers, "
        "never across languages.",
        "Wall time and tokens are those of the training stages; evaluation is not counted. Every method starts from "
        "the same base and draws on the same rows of the same text.",
    ]
    if any(
        evaluation.stage == method.detached_stage for method in results.methods for evaluation in method.evaluations
    ):
        found.append(
            "During ELO pretraining it is the detached model that is measured: a few layers between embedding and "
            "head, without the middle. Its bits per byte are not those of the model being made, so they are drawn "
            "apart; the whole model's curve begins when the layers have been put back. Measurements during training "
            "may be on fewer held-out documents than those in the table."
        )
    if any(each.cloze for each in (results.base, *results.methods)):
        chances = {
            language: cloze for each in (results.base, *results.methods) for language, cloze in each.cloze.items()
        }
        guessing = ", ".join(
            f"{language} {cloze.chance:.0%} on {cloze.items:,} items" for language, cloze in chances.items()
        )
        found.append(
            "Cloze accuracy is the share of items whose true continuation has a higher summed log-probability than "
            f"every false one. Guessing would give: {guessing}."
        )
    return found


def _comparison_table(results: Results, rows: Sequence[Row], has: dict[str, bool]) -> str:
    target, source = results.languages.target, results.languages.source
    base = results.base
    columns: list[tuple[str, str, str, list[str]]] = [  # heading, in `has`, in `best`, cells from the base on
        ("Method", "", "", ["Base model, before", *(row.method.title for row in rows)]),
        ("Tokens", "", "", ["–", *(count(row.method.tokens) for row in rows)]),
        ("Wall time", "", "wall", ["–", *(duration(row.method.wall_seconds) for row in rows)]),
        (
            "Wall time of full CPT over it, same tokens",
            "speed_up",
            "speed_up",
            ["–", *("–" if row.speed_up is None else f"{row.speed_up:.2f}×" for row in rows)],
        ),
        (
            f"Target bpb ({target}), change",
            "target",
            "target",
            [_bpb(base.bpb.get(target)), *(_bpb(row.target, row.target_change) for row in rows)],
        ),
        (
            f"Source bpb ({source}), change",
            "source",
            "source",
            [_bpb(base.bpb.get(source)), *(_bpb(row.source, row.source_change) for row in rows)],
        ),
    ]
    for language, key in ((target, "cloze_target"), (source, "cloze_source")):
        cells = [accuracy(each.cloze.get(language)) for each in (base, *results.methods)]
        columns.append((f"Cloze {language}", key, key, cells))
    peaks = [row.method.peak_memory_bytes for row in rows]
    columns.append(("Peak memory", "memory", "memory", ["–", *("–" if p is None else memory(p) for p in peaks)]))
    columns = [column for column in columns if not column[1] or has[column[1]]]
    lines = [[escaped(column[3][0]) for column in columns]]
    for index, row in enumerate(rows, 1):
        marked = [(escaped(column[3][index]), column[2] in row.best) for column in columns]
        lines.append([f"**{cell}**" if best else cell for cell, best in marked])
    return table([escaped(column[0]) for column in columns], lines)


def _group_table(results: Results, columns: Sequence[GroupColumn]) -> str:
    if not columns:
        return ""
    headings = [escaped(f"{column.language}: {column.name} ({column.items:,} items)") for column in columns]
    lines = []
    for index, title in enumerate(("Base model, before", *(method.title for method in results.methods))):
        groups = [column.groups[index] for column in columns]
        cells = [f"{accuracy(group)} {error_in_points(group)}".rstrip() for group in groups]
        lines.append([escaped(title), *cells])
    return table(["Method", *headings], lines)


def _stage_table(bars: Sequence[_Bar], full_rate: float | None) -> str:
    if not bars:
        return ""
    headings = ["Method", "Stage", "Wall time", "Tokens", "Tokens/s", "Peak memory"]
    headings += ["Tokens/s over full CPT's"] if full_rate else []
    lines = []
    for bar in bars:
        for stage in bar.method.stages:
            rate, peak = stage.tokens_per_second, stage.peak_memory_bytes
            line = [
                escaped(bar.method.title),
                escaped(stage.name.replace("_", " ")),
                duration(stage.seconds),
                count(stage.tokens) if stage.tokens else "–",
                "–" if rate is None else count(rate),
                "–" if peak is None else memory(peak),
            ]
            line += ["–" if rate is None else f"{rate / full_rate:.2f}×"] if full_rate else []
            lines.append(line)
    return table(headings, lines)


def _bpb(value: float | None, change: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if change is None else f" ({signed(change)})")
