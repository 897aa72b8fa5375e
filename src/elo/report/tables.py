"""Build the report's tables, which are rendered as HTML, as Markdown and on the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isinf

from elo.format import count, duration, flops, learning_rate, mean_of, memory, signed
from elo.report.schema import (
    MIN_SEEDS,
    Budget,
    BudgetVerdict,
    ChatModel,
    Contestant,
    Data,
    Measured,
    PairedDifference,
    Results,
    StageCost,
    Trial,
    mean,
    mean_bpb,
)
from elo.report.verdict import contestant_warnings, score, title_of, tuned

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        detail: small print below the text.
        bold: whether the statistics support the value.
        swatch: contestant whose colour is shown.
        tone: `good`, `bad` or empty.
    """

    text: str = NOTHING
    detail: str = ""
    bold: bool = False
    swatch: str = ""
    tone: str = ""


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
    """Rows with one cell per column; the first column is text."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


_Parts = tuple[Column, Cell, list[Cell]]
"""A column: heading, cell of the base model, cells of the contestants."""


def results_table(results: Results, budget: Budget, verdict: BudgetVerdict) -> Table:
    """Return the table of results: the base model, then all contestants, lowest target bits per byte first."""
    trials = {each.name: results.finished(each.name, budget.name) for each in results.contestants}
    bpb = {name: results.mean_bpb(name, budget.name, results.languages.targets) for name in trials}
    order = sorted(results.contestants, key=lambda each: (bpb[each.name] is None, bpb[each.name]))
    columns = [_names(results, budget, order)]
    targets = results.languages.targets
    for languages in ([targets] if len(targets) > 1 else []) + [(language,) for language in results.languages.all]:
        columns += _bpb_columns(results, languages, order, verdict)
    for title, value, shown in _COSTS:
        column = Column(title, is_brief=title not in ("Wall time", "Compute"))
        columns.append((column, Cell(), [_mean_cell(trials[each.name], value, shown) for each in order]))
    columns += _measure_columns(results, order, trials)
    flags = [len(contestant_warnings(results, each, budget)) for each in order]
    columns.append((Column("Warnings", is_brief=False), Cell(), [_cell(flag or None, str) for flag in flags]))
    return _table(columns, _note(results, verdict))


_COSTS: tuple[tuple[str, Callable[[Trial], float | None], Callable[[float], str]], ...] = (
    ("Tokens", lambda trial: trial.tokens, count),
    ("CPU time", lambda trial: trial.cpu_seconds, duration),
    ("Wall time", lambda trial: trial.seconds, duration),
    ("Compute", lambda trial: trial.flops, flops),
    ("Peak memory", lambda trial: trial.peak_memory_bytes, memory),
)


def _table(columns: Sequence[_Parts], note: str) -> Table:
    """Return the table of these columns, without those in which no contestant has a value."""
    shown = [each for each in columns if any(cell.text != NOTHING for cell in each[2])] or list(columns[:1])
    rows = zip(*([base, *cells] for _, base, cells in shown), strict=True)
    return Table(tuple(column for column, _, _ in shown), tuple(rows), note)


def _names(results: Results, budget: Budget, order: Sequence[Contestant]) -> _Parts:
    cells = []
    for contestant in order:
        reported = results.reported(contestant.name, budget.name)
        failed = sum(trial.failed is not None for trial in reported)
        seeds = f"{len(reported)} seed{'s' * (len(reported) != 1)}" + (f", {failed} failed" if failed else "")
        cells.append(Cell(contestant.title, seeds, swatch=contestant.name))
    base = (
        f"Base model of {results.contestants[0].title}"
        if any(each.model for each in results.contestants)
        else "Base model"
    )
    return Column("Contestant", is_text=True), Cell(base), cells


def _bpb_columns(
    results: Results, languages: tuple[str, ...], order: Sequence[Contestant], verdict: BudgetVerdict
) -> list[_Parts]:
    """Return columns of the mean over `languages` and, if there is a reference, of the difference from it."""
    differences = {each.contestant: each for each in verdict.differences if each.languages == languages}
    values, against = [], []
    for contestant in order:
        after = results.mean_bpb(contestant.name, verdict.budget, languages)
        change = results.change(contestant.name, verdict.budget, *languages)
        ranked = languages == results.languages.targets
        best = ranked and verdict.best_is_supported and contestant.name == verdict.ranked[0]
        detail = "" if change is None else signed(change)
        values.append(Cell() if after is None else Cell(f"{after:.3f}", detail, best))
        if each := differences.get(contestant.name):
            tone = "good" if each.value < 0 else "bad"
            interval = f"{signed(each.low)} to {signed(each.high)}"
            against.append(Cell(signed(each.value), interval, each.is_supported, tone=tone))
        else:
            against.append(Cell("reference" if contestant.name == verdict.reference else NOTHING))
    role = "target" if languages[0] in results.languages.targets else "source"
    heading = Column(f"{mean_of(languages)}, {role}", "bpb ↓, change")
    found = [(heading, _cell(mean_bpb(results.base, languages), lambda value: f"{value:.3f}"), values)]
    if differences:
        versus = Column(f"{mean_of(languages)} − {title_of(results, verdict.reference)}", "bpb ↓, 95 % interval")
        found.append((versus, Cell(), against))
    return found


def _mean_cell(trials: Sequence[Trial], value: Callable[[Trial], float | None], shown: Callable[[float], str]) -> Cell:
    return _cell(mean([each for trial in trials if (each := value(trial)) is not None]) or None, shown)


def _measure_columns(
    results: Results, order: Sequence[Contestant], trials: dict[str, list[Trial]], *, subsets: bool = False
) -> list[_Parts]:
    """Return one column per benchmark, language and, with `subsets`, subset of its items."""
    measured = [results.base, *(trial.measured for each in trials.values() for trial in each)]
    keys = dict.fromkeys(
        (value.language, value.measure, value.name)
        for each in measured
        for value in each.measures
        if (value.name != "all" or value.is_detail) == subsets
        and not (results.chat and value.measure.startswith("chat_"))
    )
    found = []
    for key in sorted(keys, key=lambda key: (key[0] not in results.languages.targets, not key[0], key[0])):
        base = _measure_cell([results.base], key)
        cells = [_measure_cell([trial.measured for trial in trials[each.name]], key) for each in order]
        found.append((_measure_column(measured, key), base, cells))
    return found


def _measure_column(measured: Sequence[Measured], key: tuple[str, str, str]) -> Column:
    """Return the heading of a benchmark, with its direction and the value of guessing."""
    language, measure, name = key
    values = [value for each in measured for value in each.measures if _is(value, key)]
    arrow = "↑" if values[0].higher_is_better else "↓"
    chance = next((value.chance for value in values if value.chance is not None), None)
    unit = arrow if chance is None else f"{arrow}, chance {chance:.{0 if chance >= 0.01 else 2}%}"
    title = f"{measure} {language}".strip() + ("" if name == "all" else f": {name}")
    return Column(title.replace("_", " "), unit)


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
    notes = ["Means over seeds." if len(results.seeds) > 1 else "One seed."]
    notes.append("bpb: bits per byte of held-out text, lower is better; small: change from the base model.")
    notes.append("Costs are of training, without evaluation.")
    tests = len(verdict.differences)
    correction = f" over {tests} comparison{'s' * (tests != 1)}"
    return " ".join(notes) + _bold(verdict.differences, correction)


def _bold(differences: Sequence[PairedDifference], correction: str = "") -> str:
    """Return what bold means, to be added to a note; empty if nothing can be bold."""
    if all(each.seeds < MIN_SEEDS for each in differences):
        return ""
    return f" Bold: significant at 5 % after Holm's correction{correction}."


def bases_table(results: Results, budget: Budget) -> Table | None:
    """Return a table of the base models before and after training; None if all contestants share one."""
    if not any(each.model for each in results.contestants):
        return None
    rows = []
    for contestant in results.contestants:
        model = contestant.model or results.model
        base, trials = results.base_of(contestant.name), results.finished(contestant.name, budget.name)
        cells = [Cell(contestant.title, model.name, swatch=contestant.name), _cell(model.parameters, count)]
        cells.append(_cell(model.vocabulary_size, lambda value: f"{value:,}"))
        for language in results.languages.all:
            size = base.heldout.get(language)
            cells.append(_cell(size.bytes_per_token if size else None, lambda value: f"{value:.2f}"))
            cells.append(_cell(base.bpb.get(language), lambda value: f"{value:.3f}"))
            after = results.mean_bpb(contestant.name, budget.name, (language,))
            change = results.change(contestant.name, budget.name, language)
            cells.append(Cell() if after is None else Cell(f"{after:.3f}", "" if change is None else signed(change)))
        cells += [_mean_cell(trials, value, shown) for _, value, shown in _COSTS]
        rows.append(tuple(cells))
    columns = [Column("Contestant", is_text=True), Column("Parameters"), Column("Vocabulary", "tokens")]
    for language in results.languages.all:
        columns.append(Column(language, "bytes per token ↑"))
        columns += [Column(f"{language} before", "bpb ↓"), Column(f"{language} after", "bpb ↓, change")]
    columns += [Column(title) for title, _, _ in _COSTS]
    note = "All values are measured on the same held-out bytes, so they can be compared across tokenizers."
    return Table(tuple(columns), tuple(rows), note)


def measures_table(results: Results, budget: Budget) -> Table | None:
    """Return the table of benchmark values by subset of the items; None without subsets."""
    trials = {each.name: results.finished(each.name, budget.name) for each in results.contestants}
    columns = _measure_columns(results, results.contestants, trials, subsets=True)
    if all(cell.text == NOTHING for _, _, cells in columns for cell in cells):
        return None
    rows = tuple((Cell(column.title, column.unit), base, *cells) for column, base, cells in columns)
    heads = (Column("Benchmark", is_text=True), Column("Base model"), *(Column(c.title) for c in results.contestants))
    note = "±: one standard error, of shares in percentage points, assuming that items are independent."
    if any("margin" in column.title for column, _, _ in columns):
        note += " Margin: log-likelihood of the right choice minus that of the most likely wrong one, in nats per byte."
    return Table(heads, rows, note)


def paired_table(results: Results, verdict: BudgetVerdict) -> Table | None:
    """Return the table of differences from the reference in each benchmark, over the same items; None if empty."""
    rows = [
        (
            Cell(title_of(results, each.contestant), swatch=each.contestant),
            Cell(f"{each.measure} {each.language}".strip().replace("_", " ")),
            Cell(
                _change(each.value, each.unit),
                f"{_change(each.low, each.unit)} to {_change(each.high, each.unit)}",
                each.is_supported,
                tone="good" if (each.value > 0) == each.higher_is_better else "bad",
            ),
            Cell(f"{each.adjusted_p_value:.2g}", each.test),
            Cell(f"{each.items:,}"),
        )
        for each in verdict.measure_differences
    ]
    columns = (
        Column("Contestant", is_text=True),
        Column("Benchmark", is_text=True),
        Column(f"Difference from {title_of(results, verdict.reference)}", "95 % interval"),
        Column("p, corrected", "test"),
        Column("Items"),
    )
    note = "Shares in percentage points, margins in nats per byte." + _bold(verdict.measure_differences)
    return Table(columns, tuple(rows), note) if rows else None


def retention_table(results: Results, verdict: BudgetVerdict) -> Table | None:
    """Return the table of retention: each contestant against the base outside the target languages; None if empty."""
    rows = [
        (
            Cell(title_of(results, kept.contestant), swatch=kept.contestant),
            Cell(f"{part.measure} {part.language}".strip().replace("_", " ")),
            Cell(f"{part.before:.1%}" if part.unit == "share" else f"{part.before:.3f}"),
            Cell(
                _change(part.change, part.unit),
                f"{_change(part.low, part.unit)} to {_change(part.high, part.unit)}",
                tone={"lost": "bad", "improved": "good"}.get(part.outcome, ""),
            ),
            Cell(f"{100 * part.limit:g} points" if part.unit == "share" else f"{part.limit:g}"),
            Cell(part.outcome),
        )
        for kept in verdict.retention
        for part in kept.parts
    ]
    columns = (
        Column("Contestant", is_text=True),
        Column("Measure", is_text=True),
        Column("Base model"),
        Column("Change", "95 % interval"),
        Column("Limit"),
        Column("Outcome"),
    )
    note = "Bits per byte: lower is better. Accuracies: higher is better; changes in percentage points."
    return Table(columns, tuple(rows), note) if rows else None


def _change(value: float, unit: str) -> str:
    return signed(100 * value, 1) if unit == "share" else signed(value)


Measurement = tuple[str, Measured, StageCost | None]
"""Display name of a model, what was measured of it, and what it cost."""


def chat_measurements(results: Results, trials: Sequence[Trial]) -> list[Measurement]:
    """Return what was measured of the base, the adapted model and the chat models; empty without chat models."""
    if not results.chat:
        return []
    adapted = [("Adapted model", trial.measured, None) for trial in trials if trial.failed is None]
    return [("Base model", results.base, None), *adapted[:1], *named_chat_models(results.chat)]


def named_chat_models(models: Sequence[ChatModel]) -> list[Measurement]:
    """Return what was measured of chat models, with display names."""
    return [(_CHAT_TITLES.get(each.name, each.name), each.measured, each.stage) for each in models]


def chat_table(named: Sequence[Measurement]) -> Table | None:
    """Return the table of bits per byte, chat ability and benchmarks, one row per model; None without models."""
    if not named:
        return None
    columns: list[_Parts] = []
    for language in dict.fromkeys(each for _, measured, _ in named for each in measured.bpb):
        cells = [_cell(measured.bpb.get(language), lambda value: f"{value:.3f}") for _, measured, _ in named]
        columns.append((Column(language, "bpb ↓"), cells[0], cells[1:]))
    models = [measured for _, measured, _ in named]
    keys = {
        (value.measure.startswith("chat_"), value.measure, value.language, value.name)
        for measured in models
        for value in measured.measures
        if value.measure.startswith("chat_") or (value.name == "all" and not value.is_detail)
    }
    for _, measure, language, name in sorted(keys, key=lambda key: (not key[0], *key[1:])):
        cells = [_measure_cell([measured], (language, measure, name)) for measured in models]
        columns.append((_measure_column(models, (language, measure, name)), cells[0], cells[1:]))
    times = [_cell(stage.seconds if stage else None, duration) for _, _, stage in named]
    columns.append((Column("Wall time"), times[0], times[1:]))
    names = [Cell(title) for title, _, _ in named]
    return _table([(Column("Model", is_text=True), names[0], names[1:]), *columns], _CHAT_NOTE)


_CHAT_TITLES = {
    "adapted": "Adapted model",
    "chat_model": "Given chat model",
    "chat_vector": "Chat vector",
    "sft": "SFT",
}
_CHAT_NOTE = (
    "chat ended: generated answers to held-out conversations that end the turn as the template does; chat language: "
    "generated answers in the language of the conversation (reference: the true answers); chat nats: loss per token of "
    "the true answers. ±: one standard error, of shares in percentage points."
)


def stages_table(results: Results, trials: Sequence[Trial]) -> Table | None:
    """Return the table of the costs of each stage of the given trials; None without stages."""
    columns = ("Contestant", "Stage", "Wall time", "CPU time", "Tokens", "Tokens/s", "Compute", "Peak memory")
    titles = {each.name: each.title for each in results.contestants}
    rows = []
    for trial in trials:
        for index, stage in enumerate(trial.stages):
            name = Cell(titles[trial.contestant], swatch=trial.contestant) if index == 0 else Cell("")
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
    if not rows:
        return None
    kept = [index for index in range(len(columns)) if any(row[index].text not in (NOTHING, "") for row in rows)]
    return Table(
        tuple(Column(columns[index], is_text=index < 2) for index in kept),
        tuple(tuple(row[i] for i in kept) for row in rows),
    )


def tuning_table(results: Results) -> Table | None:
    """Return the table of the learning rates used, and of all that were tried with their validation score."""
    parts: list[tuple[Cell, Cell, Cell, Cell]] = []
    for budget in results.budgets:
        for contestant in results.contestants:
            reported = results.reported(contestant.name, budget.name)
            if not reported or not reported[0].learning_rates:
                continue
            tried = tuned(results, contestant.name, budget.name)
            tried.sort(key=lambda trial: list(trial.learning_rates.values()))
            parts.append((
                Cell(contestant.title, budget.name, swatch=contestant.name),
                Cell(" / ".join(reported[0].learning_rates).replace("_", " ")),
                Cell(_rates(reported[0])),
                Cell(", ".join(f"{_rates(trial)}: {_score(results, trial)}" for trial in tried) or NOTHING),
            ))  # fmt: skip
    if not parts:
        return None
    columns = (Column("Contestant", is_text=True), Column("Learning rate of", is_text=True), Column("Used"))
    if all(row[3].text == NOTHING for row in parts):
        return Table(columns, tuple(row[:3] for row in parts))
    unit = "validation bpb ↓; in brackets: a source language's excess over the limit"
    return Table((*columns, Column("Tried", unit, is_text=True)), tuple(parts))


def _rates(trial: Trial) -> str:
    return " / ".join(map(learning_rate, trial.learning_rates.values()))


def _score(results: Results, trial: Trial) -> str:
    excess, target = score(trial, results.languages.targets)
    if isinf(target):
        return "failed"
    return f"{target:.3f}" + (f" ({signed(excess)})" if excess else "")


def data_table(data: Data, base: Measured) -> Table | None:
    """Return the table of amounts of text: for training, held out, and measured on."""
    shares = {language: f"{share:.3g} of training tokens" for language, share in data.shares.items()}
    parts = (("training", data.train), ("held out", data.heldout), ("measured on", base.heldout))
    rows = [
        (
            Cell(f"{language}, {use}", shares.get(language, "") if use == "training" else ""),
            *(_cell(number, lambda value: f"{value:,}") for number in (size.documents, size.tokens, size.bytes)),
            _cell(size.bytes_per_token, lambda value: f"{value:.2f}"),
        )
        for use, sizes in parts
        for language, size in sizes.items()
    ]
    columns = map(Column, ("Documents", "Tokens", "UTF-8 bytes", "Bytes per token"))
    return Table((Column("Text", is_text=True), *columns), tuple(rows)) if rows else None


def _cell(value: float | None, shown: Callable[[float], str]) -> Cell:
    return Cell() if value is None else Cell(shown(value))
