"""The report's tables, built once and rendered as HTML, Markdown and on the terminal."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from elo.format import count, duration, flops, learning_rate, memory, signed
from elo.report.schema import Budget, BudgetVerdict, Contestant, Data, Measured, Results, TextSize, Trial, mean
from elo.report.verdict import BASE, contestant_warnings, title_of

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A value, smaller print below it, and whether the statistics support it."""

    text: str = NOTHING
    detail: str = ""
    bold: bool = False
    swatch: str = ""
    """Contestant whose colour is shown."""
    tone: str = ""
    """`good` or `bad`."""


@dataclass(frozen=True)
class Column:
    """A heading with its unit."""

    title: str
    unit: str = ""
    is_text: bool = False
    is_brief: bool = True
    """Whether it is shown on the terminal."""


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns; the first column is text."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def results_table(results: Results, budget: Budget, verdict: BudgetVerdict) -> Table:
    """The base model, then every contestant, lowest target bits per byte first."""
    trials = {each.name: results.finished(each.name, budget.name) for each in results.contestants}
    order = sorted(results.contestants, key=lambda each: _target(results, trials[each.name]))
    columns: list[tuple[Column, Cell, list[Cell]]] = [_names(results, budget, order)]
    for language in results.languages.all:
        columns += _bpb_columns(results, language, order, trials, verdict)
    costs: tuple[tuple[str, Callable[[Trial], float | None], Callable[[float], str]], ...] = (
        ("Tokens", lambda trial: trial.tokens, count),
        ("CPU time", lambda trial: trial.cpu_seconds, duration),
        ("Wall time", lambda trial: trial.seconds, duration),
        ("Compute", lambda trial: trial.flops, flops),
        ("Peak memory", lambda trial: trial.peak_memory_bytes, memory),
    )
    for title, value, shown in costs:
        column = Column(title, is_brief=title not in ("Wall time", "Compute"))
        columns.append((column, Cell(), [_mean_cell(trials[each.name], value, shown) for each in order]))
    columns += _measure_columns(results, order, trials)
    flags = [len(contestant_warnings(results, each, budget)) for each in order]
    columns.append(
        (Column("Warnings", is_brief=False), Cell(), [Cell(str(flag)) if flag else Cell() for flag in flags])
    )
    return _table(columns, _note(results, verdict))


def _table(columns: Sequence[tuple[Column, Cell, list[Cell]]], note: str) -> Table:
    """From (heading, base's cell, contestants' cells); columns in which contestants have nothing are left out."""
    shown = [each for each in columns if any(cell.text != NOTHING for cell in each[2])] or list(columns[:1])
    rows = zip(*([base, *cells] for _, base, cells in shown), strict=True)
    return Table(tuple(column for column, _, _ in shown), tuple(rows), note)


def _names(results: Results, budget: Budget, order: Sequence[Contestant]) -> tuple[Column, Cell, list[Cell]]:
    cells = []
    for contestant in order:
        reported = results.reported(contestant.name, budget.name)
        failed = sum(trial.failed is not None for trial in reported)
        seeds = f"{len(reported)} seed{'s' * (len(reported) != 1)}" + (f", {failed} failed" if failed else "")
        cells.append(Cell(contestant.title, seeds, swatch=contestant.name))
    return Column("Contestant", is_text=True), Cell("Base model"), cells


def _target(results: Results, trials: Sequence[Trial]) -> float:
    value = mean([results.target_bpb(trial.measured) or 0.0 for trial in trials])
    return float("inf") if value is None else value


def _bpb_columns(
    results: Results,
    language: str,
    order: Sequence[Contestant],
    trials: dict[str, list[Trial]],
    verdict: BudgetVerdict,
) -> list[tuple[Column, Cell, list[Cell]]]:
    role = "target" if language in results.languages.targets else "source"
    before = results.base.bpb.get(language)
    differences = {each.contestant: each for each in verdict.differences if each.languages == (language,)}
    values, against = [], []
    for contestant in order:
        after = mean([t.measured.bpb[language] for t in trials[contestant.name] if language in t.measured.bpb])
        best = verdict.best_is_supported and contestant.name == verdict.best and role == "target"
        change = "" if after is None or before is None else signed(after - before)
        values.append(Cell() if after is None else Cell(f"{after:.3f}", change, bold=best))
        each = differences.get(contestant.name)
        interval = "" if each is None else f"{signed(each.low)} to {signed(each.high)}"
        against.append(
            Cell("reference" if contestant.name == verdict.reference and differences else NOTHING)
            if each is None
            else Cell(signed(each.value), interval, each.is_supported, tone="good" if each.value < 0 else "bad")
        )
    found = [
        (
            Column(f"{language}, {role}", "bpb ↓, change"),
            Cell() if before is None else Cell(f"{before:.3f}"),
            values,
        )
    ]
    if differences:
        versus = "base model" if verdict.reference == BASE else title_of(results, verdict.reference)
        found.append((Column(f"{language} − {versus}", "bpb ↓, 95 % interval"), Cell(), against))
    return found


def _mean_cell(trials: Sequence[Trial], value: Callable[[Trial], float | None], shown: Callable[[float], str]) -> Cell:
    average = mean([each for trial in trials if (each := value(trial)) is not None])
    return Cell() if not average else Cell(shown(average))


def _measure_columns(
    results: Results, order: Sequence[Contestant], trials: dict[str, list[Trial]], *, subsets: bool = False
) -> list[tuple[Column, Cell, list[Cell]]]:
    """One column per benchmark, language and, with `subsets`, subset of its items."""
    measured = [results.base, *(trial.measured for each in trials.values() for trial in each)]
    keys = dict.fromkeys(
        (value.language, value.measure, value.name)
        for each in measured
        for value in each.measures
        if (value.name != "all") == subsets
    )
    found = []
    for key in sorted(keys, key=lambda key: (key[0] not in results.languages.targets, key[0])):
        arrow = "↓" if any(_is(v, key) and not v.higher_is_better for m in measured for v in m.measures) else "↑"
        base = _measure_cell([results.base], key)
        cells = [_measure_cell([trial.measured for trial in trials[each.name]], key) for each in order]
        title = f"{key[0]}: {key[2]}".replace("_", " ") if subsets else f"{key[1]} {key[0]}"
        chance = next((v.chance for m in measured for v in m.measures if _is(v, key) and v.chance is not None), None)
        unit = arrow if chance is None else f"{arrow}, chance {chance:.0%}"
        found.append((Column(title, unit), base, cells))
    return found


def _is(value: object, key: tuple[str, str, str]) -> bool:
    return tuple(getattr(value, name) for name in ("language", "measure", "name")) == key


def _measure_cell(measured: Sequence[Measured], key: tuple[str, str, str]) -> Cell:
    values = [value for each in measured for value in each.measures if _is(value, key)]
    average = mean([value.value for value in values])
    if average is None:
        return Cell()
    error, share = values[0].standard_error, values[0].unit == "share"
    detail = "" if not error else f"±{100 * error:.1f}" if share else f"±{error:.3g}"
    return Cell(f"{average:.1%}" if share else f"{average:.3f}", detail)


def _note(results: Results, verdict: BudgetVerdict) -> str:
    several = len(results.seeds) > 1
    notes = ["Means over seeds." if several else "One seed: intervals cover the choice of documents alone."]
    notes.append("bpb: bits per byte of held-out text, lower is better; small: change from the base model.")
    notes.append("Costs are of training, without evaluation.")
    if verdict.differences:
        tests = len(verdict.differences)
        notes.append(f"Bold: significant at 5 % after Holm's correction over {tests} comparison{'s' * (tests != 1)}.")
    return " ".join(notes)


def measures_table(results: Results, budget: Budget) -> Table | None:
    """Benchmark values by subset of the items; None without subsets."""
    trials = {each.name: results.finished(each.name, budget.name) for each in results.contestants}
    columns = _measure_columns(results, results.contestants, trials, subsets=True)
    if all(cell.text == NOTHING for _, _, cells in columns for cell in cells):
        return None
    note = "±: one standard error in percentage points, with items taken as independent."
    return _table([_names(results, budget, results.contestants), *columns], note)


def stages_table(results: Results, trials: Sequence[Trial]) -> Table:
    """What each stage of the given trials cost."""
    columns = ("Contestant", "Stage", "Wall time", "CPU time", "Tokens", "Tokens/s", "Compute", "Peak memory")
    rows = []
    for trial in trials:
        for index, stage in enumerate(trial.stages):
            name = Cell(title_of(results, trial.contestant), swatch=trial.contestant) if index == 0 else Cell("")
            rows.append((
                name,
                Cell(stage.name.replace("_", " ")),
                Cell(duration(stage.seconds)),
                _cell(stage.cpu_seconds, duration),
                _cell(stage.tokens or None, count),
                _cell(stage.tokens_per_second, count),
                _cell(stage.flops, flops),
                _cell(stage.peak_memory_bytes, memory),
            ))  # fmt: skip
    kept = [index for index in range(len(columns)) if any(row[index].text not in (NOTHING, "") for row in rows)]
    return Table(
        tuple(Column(columns[index], is_text=index < 2) for index in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
    )


def rates_table(results: Results) -> Table | None:
    """Learning rates of the reported trials, and how many were tried."""
    rows = []
    for budget in results.budgets:
        for contestant in results.contestants:
            reported = results.reported(contestant.name, budget.name)
            own = [t for t in results.trials if (t.contestant, t.budget) == (contestant.name, budget.name)]
            if reported and reported[0].learning_rates:
                rates = [f"{name} {learning_rate(rate)}" for name, rate in reported[0].learning_rates.items()]
                tried = len({tuple(trial.learning_rates.items()) for trial in own})
                name = Cell(contestant.title, swatch=contestant.name)
                rows.append((name, Cell(budget.name), Cell(", ".join(rates)), Cell(str(tried))))
    columns = [Column(title, is_text=True) for title in ("Contestant", "Budget", "Learning rates used")]
    return Table((*columns, Column("Settings tried")), tuple(rows)) if rows else None


def data_table(data: Data, base: Measured) -> Table | None:
    """Amounts of text: training, held out, and measured on."""
    parts = (("training", data.train), ("held out", data.heldout), ("measured on", base.heldout))
    rows = [_size_row(f"{language}, {use}", size) for use, sizes in parts for language, size in sizes.items()]
    columns = map(Column, ("Documents", "Tokens", "UTF-8 bytes", "Bytes per token"))
    return Table((Column("Text", is_text=True), *columns), tuple(rows)) if rows else None


def _size_row(name: str, size: TextSize) -> tuple[Cell, ...]:
    numbers: Iterable[int | None] = (size.documents, size.tokens, size.bytes)
    return (Cell(name), *(_cell(number, lambda value: f"{value:,}") for number in numbers),
            _cell(size.bytes_per_token, lambda value: f"{value:.2f}"))  # fmt: skip


def _cell(value: float | None, shown: Callable[[float], str]) -> Cell:
    return Cell() if value is None else Cell(shown(value))
