"""A comparison as a terminal shows it."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elo.reporting.pareto_results import ComparisonResults, read_comparison
from elo.reporting.pareto_tables import Column, budget_tables, lines_of
from elo.reporting.pareto_verdict import Judgement, judge, progress

_NOTE = "± half the distance between the lowest and the highest seed; in brackets the change from the base."
_WIDE = {"before", "scale"}
"""Columns left to the page."""
_HEADINGS = {"rates": "learning rates", "tokens": "tokens", "wall": "wall time", "flops": "FLOPs", "memory": "memory"}


def render_pareto(results: ComparisonResults | dict[str, Any] | str | Path) -> RenderableType:
    """One table a budget, lowest target bits per byte first, and what the seeds support in words.

    Args:
        results: as read, or as in comparison.json, or where it is.
    """
    read = results if isinstance(results, ComparisonResults) else read_comparison(results)
    judgements = judge(read)
    # Names come from files: brackets in them are no markup.
    parts: list[RenderableType] = [Text(read.title, style="bold")]
    if (unfinished := progress(read)) is not None:
        parts.append(Text(unfinished, style="yellow"))
    for judgement, columns in zip(judgements, budget_tables(read, judgements), strict=True):
        parts += ["", _table(judgement, [column for column in columns if column.key not in _WIDE])]
        parts += [Text(sentence) for sentence in judgement.sentences]
        parts += [Text(f"! {warning}", style="yellow") for warning in judgement.warnings]
    parts += [
        "",
        Text("± half the distance between the lowest and the highest seed; in brackets the change from the base."),
    ]
    return Group(*parts)


def _table(judgement: Judgement, columns: list[Column]) -> Table:
    table = Table(title=Text(f"At {judgement.budget.name}"), title_justify="left", pad_edge=False)
    for column in columns:
        heading = _HEADINGS.get(column.key, column.heading.removesuffix(", change").lower())
        left = column.key in ("contestant", "rates")
        table.add_column(Text(heading), justify="left" if left else "right", no_wrap=not left)
    for index, line in enumerate(lines_of(columns)):
        cells = [Text(str(cell), style="bold" if cell.best else "") for cell in line]
        table.add_row(*cells, end_section=index == 0)
    return table
