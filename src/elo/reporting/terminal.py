"""The comparison table as a terminal shows it."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elo.reporting.comparison import (
    Row,
    compare,
    count,
    duration,
    group_columns,
    group_note,
    memory,
    signed,
    standard_error,
    verdict,
)
from elo.reporting.results import ClozeGroup, Results, read_results


def render_comparison(results: dict[str, Any]) -> RenderableType:
    """One row a method: tokens, wall time, speed-up, bits per byte with their change, cloze accuracy, peak memory.

    Where cloze items have groups, a table of the accuracy by group follows.

    Args:
        results: as in results.json.
    """
    read = read_results(results)
    target, source = read.languages.target, read.languages.source
    rows = compare(read)
    with_cloze = any(row.cloze_target is not None or row.cloze_source is not None for row in rows)
    table = Table(title=read.title, title_justify="left", pad_edge=False)
    table.add_column("method")
    for name in ("tokens", "wall time", "speed-up*", f"{target} bpb", f"{source} bpb"):
        table.add_column(name, justify="right")
    for name in (f"{target} cloze", f"{source} cloze") if with_cloze else ():
        table.add_column(name, justify="right")
    table.add_column("peak memory", justify="right")
    base = [_bpb(read.base.bpb.get(target), None), _bpb(read.base.bpb.get(source), None)]
    accuracies = [_percent(_accuracy(read.base.cloze, language)) for language in (target, source)]
    table.add_row("base model", "", "", "", *base, *(accuracies if with_cloze else []), "", end_section=True)
    for row in rows:
        table.add_row(*_cells(row, with_cloze))
    note = "* wall time of full CPT over the method's, on the same tokens. Wall time leaves evaluation out."
    return Group(table, note, *_by_group(read), "", verdict(read))


def _by_group(results: Results) -> list[RenderableType]:
    """One row a language and group: there may be many groups, but only a few methods."""
    columns = group_columns(results)
    if not columns:
        return []
    table = Table(title="Cloze accuracy by group", title_justify="left", pad_edge=False)
    table.add_column("group")
    for title in ("items", "base model", *(method.title for method in results.methods)):
        table.add_column(Text(title), justify="right")
    for column, following in zip(columns, [*columns[1:], None], strict=True):
        last_of_language = following is not None and following.language != column.language
        cells = [f"{column.items:,}", *(_group(group) for group in column.groups)]
        # Names come from files: brackets in them are no markup.
        table.add_row(Text(f"{column.language}: {column.name}"), *cells, end_section=last_of_language)
    return ["", table, Text(group_note(results))]


def _group(group: ClozeGroup | None) -> str:
    if group is None:
        return ""
    error = standard_error(group)
    return f"{group.accuracy:.0%}" + ("" if error is None else f" ±{100 * error:.0f}")


def _cells(row: Row, with_cloze: bool) -> list[str]:
    method = row.method
    cells = [
        method.title,
        count(method.tokens),
        duration(method.wall_seconds),
        "" if row.speed_up is None else f"{row.speed_up:.2f}x",
        _bpb(row.target, row.target_change),
        _bpb(row.source, row.source_change),
    ]
    if with_cloze:
        cells += [_percent(row.cloze_target), _percent(row.cloze_source)]
    return [*cells, "" if method.peak_memory_bytes is None else memory(method.peak_memory_bytes)]


def _bpb(value: float | None, change: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if change is None else f" ({signed(change)})")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _accuracy(cloze: Any, language: str) -> float | None:
    return cloze[language].accuracy if language in cloze else None
