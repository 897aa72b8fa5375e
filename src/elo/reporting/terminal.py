"""The comparison table as a terminal shows it."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from elo.reporting.comparison import Row, compare, count, duration, memory, signed, verdict
from elo.reporting.results import read_results


def render_comparison(results: dict[str, Any]) -> RenderableType:
    """One row a method: tokens, wall time, speed-up, bits per byte with their change, cloze accuracy, peak memory.

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
    return Group(table, note, "", verdict(read))


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
    return [*cells, memory(method.peak_memory_bytes)]


def _bpb(value: float | None, change: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + ("" if change is None else f" ({signed(change)})")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _accuracy(cloze: Any, language: str) -> float | None:
    return cloze[language].accuracy if language in cloze else None
