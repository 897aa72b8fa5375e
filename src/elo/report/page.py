"""Render the report of a run or a comparison as HTML, as Markdown and on the terminal, from the same sections.

Text from corpora, models and configurations is escaped: in HTML by jinja's autoescape, in Markdown by `escaped`.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from elo.format import count, listed, mean_of, memory
from elo.report.charts import contestant_styles, last_trials
from elo.report.drawing import Chart
from elo.report.schema import Results, Trial, Verdict
from elo.report.tables import (
    NOTHING,
    Table,
    bases_table,
    chat_measurements,
    chat_table,
    data_table,
    measures_table,
    paired_table,
    results_table,
    retention_table,
    stages_table,
    tuning_table,
)
from elo.report.verdict import judge, title_of

CHART_FOLDER = "charts"
_HERE = Path(__file__).parent
_SAMPLES_BY = 3
_REFRESH_S = 30
_UNFINISHED = "This report is not finished: trainings in progress are shown with their last measurement."
_BPB = (
    "Bits per byte (bpb) is the summed negative log-likelihood of the text tokens, in nats, divided by ln 2 times the "
    "UTF-8 bytes of the text. Each text token is predicted once, from the tokens before it in its own document. Values "
    "can be compared across tokenizers, never across languages."
)


@dataclass(frozen=True)
class Sample:
    """A prompt, and its continuations as pairs of model and text."""

    language: str
    prompt: str
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """A heading and its content; empty parts are left out."""

    title: str
    paragraphs: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    table: Table | None = None
    charts: tuple[Chart, ...] = ()
    samples: tuple[Sample, ...] = ()
    code: tuple[str, ...] = ()


def html_page(results: Results, charts: Sequence[Chart]) -> str:
    """Return the report as a self-contained page: style and charts inside, no scripts, nothing to fetch."""
    return _rendered("report.html.j2", _context(results, charts))


def markdown_page(results: Results, charts: Sequence[Chart]) -> str:
    """Return the report as Markdown, with links to the PNG files of the charts in `CHART_FOLDER`."""
    return render_markdown("report.md.j2", _context(results, charts))


def render_markdown(template: str, context: dict[str, Any]) -> str:
    """Render a Markdown template of this folder."""
    return re.sub(r"\n{3,}", "\n\n", _rendered(template, context))


def _rendered(template: str, context: dict[str, Any]) -> str:
    page = _environment().get_template(template).render(context)
    return page.encode("utf-8", "replace").decode()  # JSON can contain half a surrogate pair, UTF-8 cannot


def terminal(results: Results) -> RenderableType:
    """Return warnings, results tables and verdict for the terminal."""
    verdict = judge(results)
    shown: list[RenderableType] = [Text(f"warning: {warning}", style="yellow") for warning in verdict.warnings]
    for budget, judged in zip(results.budgets, verdict.budgets, strict=True):
        made = results_table(results, budget, judged)
        name = budget.name if results.kind == "comparison" else results.title
        sentences = (*judged.sentences, *judged.retention_sentences)
        shown += [rich_table(made, name), Text(made.note, style="dim"), *map(Text, sentences), Text("")]
    chats = chat_table(chat_measurements(results, last_trials(results)))
    if chats is not None:
        shown += [rich_table(chats, "Chat models"), Text(chats.note, style="dim"), Text("")]
    return Group(*shown)


def rich_table(made: Table, title: str) -> RichTable:
    """Return a table for the terminal, without the columns that only reports show."""
    table = RichTable(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    kept = [index for index, column in enumerate(made.columns) if column.is_brief]
    for index in kept:
        table.add_column(Text(made.columns[index].title), justify="left" if made.columns[index].is_text else "right")
    for number, row in enumerate(made.rows):
        cells = []
        for cell in (row[index] for index in kept):
            text = Text("" if cell.text == NOTHING else cell.text, style="bold" if cell.bold else "")
            cells.append(text.append(f"\n{cell.detail}" if cell.detail else "", style="dim not bold"))
        table.add_row(*cells, end_section=number == 0)
    return table


def _context(results: Results, charts: Sequence[Chart]) -> dict[str, Any]:
    verdict = judge(results)
    several = len(results.budgets) > 1
    return {
        "title": results.title,
        "about": _about(results),
        "css": Markup((_HERE / "report.css").read_text(encoding="utf-8")),  # our own file: nothing to escape
        "verdict": [(f"{each.budget}: " if several else "", each.sentences) for each in verdict.budgets],
        "warnings": [*([_UNFINISHED] if results.in_progress else []), *verdict.warnings],
        "refresh": _REFRESH_S if results.in_progress else None,
        "sections": [each for each in _sections(results, verdict, charts) if _has_content(each)],
        "colours": {name: style.colour for name, style in contestant_styles(results).items()},
        "chart_folder": CHART_FOLDER,
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "md": escaped,
        "table": _markdown_table,
        "fenced": _fenced,
    }
    return environment


def _has_content(section: Section) -> bool:
    parts = (section.paragraphs, section.facts, section.charts, section.samples, section.code)
    return any(parts) or section.table is not None


def _sections(results: Results, verdict: Verdict, charts: Sequence[Chart]) -> list[Section]:
    last = last_trials(results)
    several = len(results.budgets) > 1
    settings = yaml.safe_dump(results.config, allow_unicode=True, sort_keys=False) if results.config else ""
    found = [Section("What was compared", facts=tuple(_compared(results)))]
    for budget, judged in zip(results.budgets, verdict.budgets, strict=True):
        title = f"Results, {budget.name}" if several else "Results"
        found.append(Section(title, table=results_table(results, budget, judged)))
        found.append(Section(title.replace("Results", "Base models"), table=bases_table(results, budget)))
    found.append(Section("Charts", charts=tuple(charts)))
    for budget, judged in zip(results.budgets, verdict.budgets, strict=True):
        at = f", {budget.name}" if several else ""
        found.append(Section("Retention" + at, judged.retention_sentences, table=retention_table(results, judged)))
        found.append(Section("Benchmarks compared" + at, table=paired_table(results, judged)))
        found.append(Section("Benchmarks in detail" + at, table=measures_table(results, budget)))
    return [
        *found,
        Section("Chat models", table=chat_table(chat_measurements(results, last))),
        Section("Cost by stage", table=stages_table(results, last)),
        Section("Samples", tuple(_writing(results, last)), samples=tuple(_samples(results, last))),
        Section("Learning rates", table=tuning_table(results)),
        Section("Data", table=data_table(results.data, results.base)),
        Section("How this was measured", paragraphs=(verdict.rule, _BPB)),
        Section("How to reproduce", facts=tuple(setting_facts(results)), code=tuple(filter(None, (results.command,)))),
        Section("Settings", code=tuple(filter(None, (settings,)))),
    ]


def _about(results: Results) -> str:
    parts = [results.model.name, f"target {listed(results.languages.targets)}"]
    if results.languages.sources:
        parts.append(f"source {listed(results.languages.sources)}")
    device = results.hardware.get("gpu") or results.hardware.get("cpu")
    return " · ".join([*parts, *filter(None, (device and str(device), (results.created or "")[:10]))])


def _compared(results: Results) -> list[tuple[str, str]]:
    model = results.model
    sizes = [f"{count(model.parameters)} parameters"] if model.parameters else []
    sizes += [f"{model.num_layers} decoder layers"] if model.num_layers else []
    found = [("Base model", f"{model.name}" + (f" ({', '.join(sizes)})" if sizes else ""))]
    if model.vocabulary is not None:
        found.append(("Vocabulary", f"extended by {model.vocabulary.rows.stop - model.vocabulary.rows.start:,} tokens"))
    for contestant in results.contestants:
        text = f"base model {contestant.model.name}, " if contestant.model else ""
        text += f"method {contestant.method}"
        text += f", layers {', '.join(map(str, contestant.layers))}" if contestant.layers else ""
        text += f": {contestant.layers_reason}" if contestant.layers_reason else ""
        text += f"; {changes_text(contestant.changes)}" if contestant.changes else ""
        found.append((contestant.title, text))
    sizes = [
        f"{language} {size.documents:,} documents" for language, size in results.base.heldout.items() if size.documents
    ]
    found.append(("Measured on", ", ".join(sizes)))
    found.append(("Budget" + "s" * (len(results.budgets) > 1), ", ".join(each.name for each in results.budgets)))
    found.append(("Seed" + "s" * (len(results.seeds) > 1), ", ".join(map(str, results.seeds))))
    if results.languages.sources and len(results.contestants) > 1:
        limit = f"{listed(results.languages.sources)} at most {results.endpoint.source_limit_bpb:g} bpb above the base"
        found.append(("Ranked by", f"bits per byte in {mean_of(results.languages.targets)}, with {limit}"))
    return [(name, text) for name, text in found if text]


def changes_text(changes: dict[str, Any]) -> str:
    """Return changed keys, nested or dotted, as `key.path=value`."""

    def walk(value: Any, path: str) -> list[str]:
        if isinstance(value, dict) and value:
            return [each for key, item in value.items() for each in walk(item, f"{path}.{key}" if path else str(key))]
        shown = str(value).lower() if isinstance(value, bool) or value is None else str(value)
        return [f"{path}={shown}"]

    return ", ".join(walk(changes, ""))


def setting_facts(results: Results) -> list[tuple[str, str]]:
    """Return machine, versions and settings of the data, as names and texts."""
    hardware, data = dict(results.hardware), results.data
    size = hardware.pop("memory_bytes", None)
    parts = [f"{name} {value}" for name, value in hardware.items()]
    parts += [f"memory {memory(size)}"] if isinstance(size, int | float) else []
    found = [
        ("Hardware", ", ".join(parts)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())),
        ("Sequence length", f"{data.sequence_length:,} tokens" if data.sequence_length else ""),
        ("Replay ratio", f"{data.replay_ratio:g} of training tokens" if data.replay_ratio is not None else ""),
        ("Created", results.created or ""),
    ]
    return [(name, text) for name, text in found if text]


def _samples(results: Results, trials: Sequence[Trial]) -> list[Sample]:
    """Return the samples of the base model and the first contestants, target languages first."""
    written: dict[tuple[str, str], list[tuple[str, str]]] = {}
    adapted = [(title_of(results, t.contestant), t.measured) for t in trials if t.measured.samples][:_SAMPLES_BY]
    for who, measured in (("Base model", results.base), *adapted):
        for sample in measured.samples:
            written.setdefault((sample.language, sample.prompt), []).append((who, sample.text))
    if not adapted:
        return []
    order = {language: index for index, language in enumerate(results.languages.all)}
    keys = sorted(written, key=lambda key: order.get(key[0], len(order)))
    return [Sample(language, prompt, tuple(written[language, prompt])) for language, prompt in keys]


def _writing(results: Results, trials: Sequence[Trial]) -> list[str]:
    if not any(trial.measured.samples for trial in trials):
        return []
    found = ["Greedy continuations illustrate the numbers, but prove nothing."]
    for language, base in results.base.generation.items() if trials else ():
        adapted = trials[0].measured.generation.get(language)
        if adapted and adapted.seconds and base.seconds:
            rates = (
                f"{base.characters / base.seconds:.0f} characters/s before, {adapted.characters / adapted.seconds:.0f}"
            )
            found.append(f"{language}: {rates} with {title_of(results, trials[0].contestant)}.")
    return found


def escaped(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ⏎ ".join(text.splitlines()))


def _markdown_table(table: Table) -> str:
    heads = [
        escaped(" ".join(filter(None, (column.title, f"({column.unit})" * bool(column.unit)))))
        for column in table.columns
    ]
    lines = [heads, ["---", *("---:" for _ in heads[1:])]]
    for row in table.rows:
        cells = [
            f"{escaped(cell.text)} ({escaped(cell.detail)})" if cell.detail else escaped(cell.text) for cell in row
        ]
        lines.append([f"**{text}**" if cell.bold else text for text, cell in zip(cells, row, strict=True)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str) -> str:
    """Return text as a Markdown code block."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
