"""The report as HTML and as Markdown, from checked results and drawn charts.

Whatever comes from corpora, models or configurations is escaped: HTML by jinja's autoescape, Markdown by `_escaped`.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from elo.reporting.charts import DETACHED_STAGE, Chart, method_colours
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
    standard_error,
    verdict,
)
from elo.reporting.results import Cloze, ClozeGroup, Method, Results, Stage, TextSize

_HERE = Path(__file__).parent
CHART_FOLDER = "charts"


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
    return _render("report.html.j2", _context(results, charts))


def markdown_page(results: Results, charts: Sequence[Chart]) -> str:
    """The same for a README or a pull request; its charts are the PNG files in `CHART_FOLDER`."""
    context = _context(results, charts)
    tables = {
        "comparison": _comparison_table(results, context["rows"], context["has"]),
        "cloze_groups": _group_table(results, context["group_columns"]),
        "stages": _stage_table(context["bars"], context["full_rate"]),
        "data": _data_table(context["texts"]),
    }
    page = _render("report.md.j2", {**context, **tables, "chart_folder": CHART_FOLDER})
    return re.sub(r"\n{3,}", "\n\n", page)


def _render(template: str, context: dict[str, Any]) -> str:
    page = _environment().get_template(template).render(context)
    # JSON can spell half a surrogate pair, UTF-8 cannot.
    return page.encode("utf-8", "replace").decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "signed": signed,
        "duration": duration,
        "count": count,
        "memory": memory,
        "accuracy": _accuracy,
        "standard_error": _standard_error,
        "base64": lambda data: base64.b64encode(data).decode(),
        "md": _escaped,
        "fenced": _fenced,
    }
    return environment


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
        "css": Markup((_HERE / "report.css").read_text(encoding="utf-8")),  # our own file
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
        "texts": _texts(results),
        "definitions": _definitions(results),
        "facts": _facts(results),
        "config": yaml.safe_dump(results.config, allow_unicode=True, sort_keys=False) if results.config else "",
    }


def _about(results: Results) -> str:
    """What was run, on what, in one line."""
    model, data, own = results.model, results.data, results.methods[0]
    sizes = [] if model.parameters is None else [f"{count(model.parameters)} parameters"]
    sizes += [] if model.num_layers is None else [f"{model.num_layers} decoder layers"]
    size = ", ".join(sizes)
    parts = [f"{model.name} ({size})" if size else model.name]
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
            if stage.name == DETACHED_STAGE:
                colour = _lighter(colour, 0.45)
            if not stage.tokens:
                colour = "#9aa5b1"
            parts.append(_Part(stage, 100 * stage.seconds / longest, colour, _ink_on(colour)))
        bars.append(_Bar(method, tuple(parts)))
    return bars


def _ink_on(colour: str) -> str:
    """White or dark text, whichever can be read on `colour` (weights: Rec. 709 luma)."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#1f2933" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 140 else "#ffffff"


def _lighter(colour: str, share: float) -> str:
    channels = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * share):02x}" for channel in channels)


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


def _texts(results: Results) -> list[tuple[str, TextSize]]:
    return [
        (f"{language}, {use}", size)
        for use, sizes in (("training", results.data.train), ("held out", results.data.heldout))
        for language, size in sizes.items()
    ]


def _definitions(results: Results) -> list[str]:
    found = [
        "Bits per byte (bpb) is the summed negative log-likelihood of the held-out text's tokens, in nats, over ln 2 "
        "times the UTF-8 bytes of that text. Every text token counts once, predicted from the tokens before it in its "
        "own document; the end-of-text token does not count. Lower is better. It can be compared across tokenizers, "
        "never across languages.",
        "Wall time and tokens are those of the training stages; evaluation is not counted. Every method starts from "
        "the same base and draws on the same rows of the same text.",
    ]
    stages = {evaluation.stage for method in results.methods for evaluation in method.evaluations}
    if DETACHED_STAGE in stages:
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


def _facts(results: Results) -> list[tuple[str, str]]:
    model, data = results.model, results.data
    facts = [("Model", model.name)]
    if model.layers:
        trained = f"; {model.trainable_parameters:,} parameters train" if model.trainable_parameters else ""
        facts.append(("Layers kept in the detached model", ", ".join(map(str, model.layers)) + trained))
    if data.sequence_length is not None:
        facts.append(("Sequence length", f"{data.sequence_length:,} tokens"))
    if data.replay_ratio is not None:
        facts.append(("Replay ratio", f"{data.replay_ratio:g}"))
    if results.seed is not None:
        facts.append(("Seed", str(results.seed)))
    if results.hardware:
        shown = {**results.hardware}
        size = shown.pop("memory_bytes", None)
        parts = [f"{key} {value}" for key, value in shown.items()]
        parts += [f"memory {memory(size)}"] if isinstance(size, int | float) else []
        facts.append(("Hardware", ", ".join(parts)))
    if results.versions:
        facts.append(("Versions", ", ".join(f"{name} {number}" for name, number in results.versions.items())))
    if results.created:
        facts.append(("Created", results.created))
    return facts


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
        cells = [_accuracy(each.cloze.get(language)) for each in (base, *results.methods)]
        columns.append((f"Cloze {language}", key, key, cells))
    peaks = [row.method.peak_memory_bytes for row in rows]
    columns.append(("Peak memory", "memory", "memory", ["–", *("–" if p is None else memory(p) for p in peaks)]))
    columns = [column for column in columns if not column[1] or has[column[1]]]
    lines = [[_escaped(column[3][0]) for column in columns]]
    for index, row in enumerate(rows, 1):
        marked = [(_escaped(column[3][index]), column[2] in row.best) for column in columns]
        lines.append([f"**{cell}**" if best else cell for cell, best in marked])
    return _table([_escaped(column[0]) for column in columns], lines)


def _group_table(results: Results, columns: Sequence[GroupColumn]) -> str:
    if not columns:
        return ""
    headings = [_escaped(f"{column.language}: {column.name} ({column.items:,} items)") for column in columns]
    lines = []
    for index, title in enumerate(("Base model, before", *(method.title for method in results.methods))):
        groups = [column.groups[index] for column in columns]
        cells = [f"{_accuracy(group)} {_standard_error(group)}".rstrip() for group in groups]
        lines.append([_escaped(title), *cells])
    return _table(["Method", *headings], lines)


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
                _escaped(bar.method.title),
                _escaped(stage.name.replace("_", " ")),
                duration(stage.seconds),
                count(stage.tokens) if stage.tokens else "–",
                "–" if rate is None else count(rate),
                "–" if peak is None else memory(peak),
            ]
            line += ["–" if rate is None else f"{rate / full_rate:.2f}×"] if full_rate else []
            lines.append(line)
    return _table(headings, lines)


def _data_table(texts: Sequence[tuple[str, TextSize]]) -> str:
    if not texts:
        return ""
    lines = [
        [
            _escaped(name),
            *("–" if number is None else f"{number:,}" for number in (size.documents, size.tokens, size.bytes)),
        ]
        for name, size in texts
    ]
    return _table(["Text", "Documents", "Tokens", "UTF-8 bytes"], lines)


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *lines))


def _bpb(value: float | None, change: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + ("" if change is None else f" ({signed(change)})")


def _accuracy(cloze: Cloze | ClozeGroup | None) -> str:
    return "–" if cloze is None else f"{cloze.accuracy:.1%}"


def _standard_error(group: ClozeGroup | None) -> str:
    """In points."""
    error = standard_error(group)
    return "" if error is None else f"±{100 * error:.1f}"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    lines = " ⏎ ".join(text.splitlines())
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", lines)


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"
