"""A comparison's report as HTML and as Markdown, from a checked comparison and drawn charts."""

from collections.abc import Sequence
from typing import Any

import yaml

from elo.reporting.drawing import Chart
from elo.reporting.markup import (
    CHART_FOLDER,
    data_table,
    escaped,
    facts,
    model_text,
    render,
    stylesheet,
    table,
    texts,
)
from elo.reporting.pareto_charts import contestant_styles
from elo.reporting.pareto_results import ComparisonResults
from elo.reporting.pareto_rows import OFF_BUDGET
from elo.reporting.pareto_tables import Cell, Column, budget_tables, lines_of
from elo.reporting.pareto_verdict import chance_of_a_winner, headline, judge, progress


def pareto_html_page(results: ComparisonResults, charts: Sequence[Chart]) -> str:
    """One self-contained page: style and charts inside, no script, nothing fetched."""
    return render("pareto.html.j2", _context(results, charts))


def pareto_markdown_page(results: ComparisonResults, charts: Sequence[Chart]) -> str:
    """The same for a README or a pull request; its charts are the PNG files in `CHART_FOLDER`."""
    context = _context(results, charts)
    more = {"markdown_table": _markdown_table, "data": data_table(context["texts"]), "chart_folder": CHART_FOLDER}
    return render("pareto.md.j2", {**context, **more})


def _context(results: ComparisonResults, charts: Sequence[Chart]) -> dict[str, Any]:
    judgements = judge(results)
    tables = budget_tables(results, judgements)
    return {
        "results": results,
        "target": results.languages.target,
        "source": results.languages.source,
        "css": stylesheet(),
        "about": _about(results),
        "progress": progress(results),
        "headlines": [(judgement.budget, headline(results, judgement)) for judgement in judgements],
        "sections": list(zip(judgements, tables, strict=True)),
        "lines_of": lines_of,
        "table_note": _table_note(results),
        "charts": charts,
        "colours": {name: style.colour for name, style in contestant_styles(results).items()},
        "texts": texts(results.data),
        "definitions": _definitions(results),
        "facts": facts(results, results.seeds),
        "config": yaml.safe_dump(results.config, allow_unicode=True, sort_keys=False) if results.config else "",
    }


def _about(results: ComparisonResults) -> str:
    """What was compared, on what, in one line."""
    languages, data = results.languages, results.data
    parts = [model_text(results.model), f"{languages.target} taught, {languages.source} to be kept"]
    if data.replay_ratio is not None:
        parts.append(f"{data.replay_ratio:.0%} of the training tokens {languages.source}")
    sizes = ((results.contestants, "contestant"), (results.budgets, "budget"), (results.seeds, "seed"))
    parts.append(", ".join(f"{len(each)} {name}{'' if len(each) == 1 else 's'}" for each, name in sizes))
    if device := results.hardware.get("gpu") or results.hardware.get("cpu"):
        parts.append(str(device))
    if results.created:
        parts.append(results.created[:10])
    return " · ".join(parts)


def _table_note(results: ComparisonResults) -> str:
    target = results.languages.target
    return (
        f"Lowest mean in {target} first. ± is half the distance between the lowest and the highest seed; in brackets: "
        "the mean's change from the base. Marked: a winner by the rule below. Tokens, wall time and FLOPs are means "
        "over the seeds, peak memory is the largest of them; seeds that failed count in none of these."
    )


def _definitions(results: ComparisonResults) -> list[str]:
    contestants, seeds = len(results.contestants), len(results.seeds)
    criterion = f"by the bits per byte of {results.languages.target}"
    if results.source_weight:
        criterion += f" plus {results.source_weight:g} x those of {results.languages.source}"
    rule = (
        "A winner is named only where every one of its seeds is below every seed of every other contestant at the "
        "budget, with at least two seeds each. A seed that failed counts as above all others. Contestants can be told "
        "apart by the same rule, pair by pair; one beats another in both languages if the rule holds in each."
    )
    if contestants > 1 and seeds > 1:
        chance = chance_of_a_winner([seeds] * contestants)
        rule += (
            f" Were all {contestants} contestants alike, chance would still name one in {chance:.1%} of such "
            f"comparisons with {seeds} seeds, for each budget and language."
        )
    return [
        rule,
        f"Each contestant's learning rates were chosen on validation text at the budget, {criterion}, as far as a "
        "sweep is shown; the tables are measured on held-out text. A chosen rate at the edge of what was tried says "
        "that the contestant may do better than it is shown.",
        "Bits per byte (bpb) is the summed negative log-likelihood of the text's tokens, in nats, over ln 2 times the "
        "UTF-8 bytes of the text. Lower is better. It can be compared across tokenizers, never across languages.",
        "Wall time and tokens are those of the training stages; evaluation and the sweeps are not counted. A trial is "
        f"reported as off its budget when it missed it by more than {OFF_BUDGET:.0%}.",
    ]


def _markdown_table(columns: Sequence[Column]) -> str:
    headings = [escaped(column.heading) for column in columns]
    return table(headings, ([_markdown_cell(cell) for cell in line] for line in lines_of(columns)))


def _markdown_cell(cell: Cell) -> str:
    return f"**{escaped(str(cell))}**" if cell.best else escaped(str(cell))
