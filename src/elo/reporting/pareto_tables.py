"""A comparison's tables, one a budget, as page, Markdown and terminal all show them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from elo.reporting.comparison import count, duration, flops, memory, signed
from elo.reporting.pareto_results import ComparisonResults
from elo.reporting.pareto_rows import ParetoRow, Spread, changes_text, rates_text
from elo.reporting.pareto_verdict import Judgement

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    text: str = NOTHING
    detail: str = ""
    """What is said of it in smaller type."""
    best: bool = False
    """A winner, named by the rule."""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".strip()


@dataclass(frozen=True)
class Column:
    key: str
    heading: str
    cells: tuple[Cell, ...]
    """The base model's, then one a contestant."""


def budget_tables(results: ComparisonResults, judgements: Sequence[Judgement]) -> list[list[Column]]:
    """The columns of each budget's table: the same at every budget, and none that is empty at all of them."""
    tables = [_columns(results, judgement) for judgement in judgements]
    filled = {column.key for table in tables for column in table if any(cell.text != NOTHING for cell in column.cells)}
    return [[column for column in table if column.key in filled] for table in tables]


def lines_of(columns: Sequence[Column]) -> list[tuple[Cell, ...]]:
    """The table row by row, the base model first."""
    return list(zip(*(column.cells for column in columns), strict=True))


def _columns(results: ComparisonResults, judgement: Judgement) -> list[Column]:
    target, source = results.languages.target, results.languages.source

    def column(key: str, heading: str, cell_of: Callable[[ParetoRow], Cell], base: Cell = Cell()) -> Column:
        return Column(key, heading, (base, *(cell_of(row) for row in judgement.rows)))

    def bpb(role: str, language: str) -> Column:
        base = results.base.bpb.get(language)
        return column(
            role,
            f"{role.capitalize()} bpb ({language}), change",
            lambda row: _bpb(row, language, (row.contestant.name, role) in judgement.winners),
            Cell() if base is None else Cell(f"{base:.3f}"),
        )

    return [
        column("contestant", "Contestant", _name, Cell("Base model, before")),
        column("rates", "Learning rates", lambda row: Cell(rates_text(row.learning_rates) or NOTHING)),
        bpb("target", target),
        bpb("source", source),
        column("before", f"Before alignment, {target} / {source}", lambda row: _two(row.before, target, source)),
        column("scale", "Scale", lambda row: Cell(f"{row.scale.mean:.3g}") if row.scale else Cell()),
        column("tokens", "Tokens", lambda row: _number(row.tokens, count)),
        column("wall", "Wall time", lambda row: _number(row.wall_seconds, duration)),
        column("flops", "Training FLOPs", lambda row: _number(row.flops, flops)),
        column("memory", "Peak memory", lambda row: _number(row.peak_memory_bytes, memory)),
    ]


def _name(row: ParetoRow) -> Cell:
    details = [changes_text(row.contestant.changes)] if row.contestant.changes else []
    if row.failed:
        details.append(f"{len(row.failed)} of {len(row.trials)} seeds failed")
    elif not row.trials:
        details.append("not done yet")
    return Cell(row.contestant.title, f"({' · '.join(details)})" if details else "")


def _bpb(row: ParetoRow, language: str, best: bool) -> Cell:
    if language not in row.bpb:
        return Cell("failed") if row.trials and not row.finished else Cell()
    change = row.change.get(language)
    return Cell(str(row.bpb[language]), "" if change is None else f"({signed(change)})", best)


def _two(bpb: Mapping[str, Spread], target: str, source: str) -> Cell:
    if not bpb:
        return Cell()
    return Cell(" / ".join(f"{bpb[key].mean:.3f}" if key in bpb else NOTHING for key in (target, source)))


def _number(value: float | None, shown: Callable[[float], str]) -> Cell:
    return Cell() if value is None else Cell(shown(value))
