"""What a comparison's numbers support, in words, budget by budget.

A winner is named only where every one of its seeds is below every seed of every other contestant, with two seeds of
each at least; a failed seed is above all others. Elsewhere the text says who cannot be told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from elo.reporting.comparison import count, duration, rate, signed
from elo.reporting.pareto_results import Budget, ComparisonResults
from elo.reporting.pareto_rows import (
    OFF_BUDGET,
    ParetoRow,
    budget_rows,
    edges,
    off_budget,
    separated,
    stage_name,
)


@dataclass(frozen=True)
class Judgement:
    """What is said of one budget."""

    budget: Budget
    rows: tuple[ParetoRow, ...]
    """Lowest target bits per byte first."""
    sentences: tuple[str, ...]
    """On the target language, on the source language, on both."""
    warnings: tuple[str, ...]
    """Failures, trials off the budget, learning rates at the edge of their sweep."""
    winners: frozenset[tuple[str, str]]
    """(contestant, "target" or "source"), where one is named."""


def judge(results: ComparisonResults) -> list[Judgement]:
    """One judgement a budget, in the comparison's order."""
    return [_judge(results, index) for index in range(len(results.budgets))]


def progress(results: ComparisonResults) -> str | None:
    """How far the comparison has come; None once every trial is done."""
    done, planned = results.trials_done, results.trials_planned
    if done >= planned:
        return None
    return f"Not finished: {done} of {planned} trials done. What follows may change."


def headline(results: ComparisonResults, judgement: Judgement) -> str:
    """The winners at a budget, or that there are none."""
    if not any(row.finished for row in judgement.rows):
        return "every trial failed." if any(row.trials for row in judgement.rows) else "no trial is done yet."
    parts = []
    for role, language in (("target", results.languages.target), ("source", results.languages.source)):
        winner = next((row for row in judgement.rows if (row.contestant.name, role) in judgement.winners), None)
        if winner is not None:
            parts.append(f"lowest in {language} is {winner.title}, {winner.bpb[language]}")
        elif any(language in row.bpb for row in judgement.rows):
            parts.append(f"no winner can be named in {language}")
    return f"{'; '.join(parts)}."


def chance_of_a_winner(seeds: Sequence[int]) -> float:
    """How often contestants that are all alike, with so many seeds each, would bring forth a winner by chance."""
    return sum(1 / comb(sum(seeds), own) for own in seeds)


def _judge(results: ComparisonResults, index: int) -> Judgement:
    budget, rows = results.budgets[index], budget_rows(results, index)
    target, source = results.languages.target, results.languages.source
    winners = {
        (winner.contestant.name, role)
        for role, language in (("target", target), ("source", source))
        if (winner := winner_of(rows, language)) is not None
    }
    sentences = [_standing(rows, target)]
    if any(source in row.bpb for row in rows):
        sentences += [_standing(rows, source), *_against_base(results, rows), *_on_both(results, rows)]
    warnings = [*_failures(rows), *_off_budget(budget, rows), *_edges(results, index, rows)]
    return Judgement(budget, tuple(rows), tuple(sentences), tuple(warnings), frozenset(winners))


def winner_of(rows: Sequence[ParetoRow], language: str) -> ParetoRow | None:
    """Who is below all others with every seed; None where nobody is, or nobody to be compared with."""
    if len(rows) < 2:
        return None
    return next(
        (row for row in rows if all(separated(row, other, language) for other in rows if other is not row)), None
    )


def _standing(rows: Sequence[ParetoRow], language: str) -> str:
    """Who is lowest in a language, as far as the seeds tell."""
    measured = sorted((row for row in rows if language in row.bpb), key=lambda row: row.bpb[language].mean)
    if not measured:
        return "Every trial failed." if any(row.trials for row in rows) else "No trial is done yet."
    leader, others = measured[0], [row for row in rows if row is not measured[0]]
    lead = f"{leader.title}, {leader.bpb[language]}"
    if not others:
        return f"{language}: {lead} bits per byte. There is no other contestant to compare it with."
    if max(len(row.trials) for row in rows) == 1:
        return f"{language}: no winner can be named from one seed. Lowest with it: {lead} bits per byte."
    lacking = [row.title for row in rows if len(row.trials) < 2]
    if lacking:
        verb = "has" if len(lacking) == 1 else "have"
        return (
            f"{language}: no winner can be named while {listed(lacking)} {verb} fewer than two seeds. "
            f"Lowest mean so far: {lead} bits per byte."
        )
    if leader.failed:
        stable = [f"{row.title}, {row.bpb[language]}" for row in measured if not row.failed]
        rest = f" Of those that never failed the lowest is {stable[0]}." if stable else ""
        return (
            f"{language}: no winner. Lowest is {lead} bits per byte, but {len(leader.failed)} of its "
            f"{len(leader.trials)} seeds failed.{rest}"
        )
    alike = [row for row in others if not separated(leader, row, language)]
    if alike:
        tied = listed([f"{row.title} ({row.bpb.get(language, 'not measured')})" for row in (leader, *alike)])
        higher = len(others) - len(alike)
        who = "The other contestant is" if higher == 1 else f"The other {higher} are"
        rest = f" {who} higher, with every seed, than {leader.title} with any." if higher else ""
        return f"{language}: no single winner. The seeds cannot tell apart {tied}.{rest}"
    behind = ""
    if len(measured) > 1:
        following = measured[1].bpb[language]
        gap = signed(following.mean - leader.bpb[language].mean)
        behind = f" Next is {measured[1].title}, {following} ({gap})."
    return (
        f"{language}: {lead} bits per byte, is the winner: each of its {len(leader.trials)} seeds is below every seed "
        f"of the others.{behind}"
    )


def _against_base(results: ComparisonResults, rows: Sequence[ParetoRow]) -> list[str]:
    """Who keeps the source language where the base had it."""
    source = results.languages.source
    base, measured = results.base.bpb.get(source), [row for row in rows if source in row.bpb]
    if base is None:
        return []
    below = [row.title for row in measured if max(row.bpb[source].values) <= base]
    above = [row.title for row in measured if min(row.bpb[source].values) > base]
    between = [row.title for row in measured if row.title not in {*below, *above}]
    if not below and not between:
        least = min(measured, key=lambda row: row.change[source])
        return [
            f"{source} against the base ({base:.3f}): every contestant forgets with every seed; by mean {least.title} "
            f"the least ({signed(least.change[source])})."
        ]
    parts = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("every seed at or below it", below),
            ("some seeds above it and some not", between),
            ("every seed above it", above),
        )
        if names
    ]
    return [f"{source} against the base ({base:.3f}): {'; '.join(parts)}."]


def _on_both(results: ComparisonResults, rows: Sequence[ParetoRow]) -> list[str]:
    """Who beats whom in both languages, and who is left to choose from."""
    if all(len(row.trials) < 2 for row in rows):
        return []
    target, source = results.languages.target, results.languages.source
    beaten = dominated(rows, target, source)
    losers = {row.contestant.name for _, lost in beaten for row in lost}
    if not beaten:
        return [f"{target} and {source} together: no contestant beats another in both with all of its seeds."]
    parts = [f"{row.title} beats {listed([other.title for other in lost])}" for row, lost in beaten]
    left = [row.title for row in rows if row.contestant.name not in losers and row.bpb]
    return [f"{target} and {source} together, with all seeds: {'; '.join(parts)}. Beaten by nobody: {listed(left)}."]


def dominated(rows: Sequence[ParetoRow], target: str, source: str) -> list[tuple[ParetoRow, list[ParetoRow]]]:
    """Who is below whom with all seeds in both languages; contestants that beat nobody are left out."""
    found = []
    for row in rows:
        lost = [other for other in rows if separated(row, other, target) and separated(row, other, source)]
        if lost:
            found.append((row, lost))
    return found


def _failures(rows: Sequence[ParetoRow]) -> list[str]:
    return [f"{row.title}, seed {trial.seed}, failed: {trial.failed}" for row in rows for trial in row.failed]


def _off_budget(budget: Budget, rows: Sequence[ParetoRow]) -> list[str]:
    found = []
    for row in rows:
        missed = []
        for trial in row.trials:
            if (share := off_budget(budget, trial)) is not None:
                spent = duration(trial.wall_seconds) if budget.kind == "seconds" else f"{count(trial.tokens)} tokens"
                missed.append(f"seed {trial.seed} with {spent} ({share:+.0%})".replace("-", "−"))
        if missed:
            found.append(
                f"{row.title} is more than {OFF_BUDGET:.0%} off the budget of {budget.name}: {listed(missed)}."
            )
    return found


def _edges(results: ComparisonResults, index: int, rows: Sequence[ParetoRow]) -> list[str]:
    titles = {row.contestant.name: row.title for row in rows}
    sweeps = [sweep for sweep in results.sweeps if sweep.budget == index]
    at_edge = [
        f"{titles[sweep.contestant]}, {stage_name(edge.stage)} {rate(edge.chosen)} "
        f"(the {'highest' if edge.highest else 'lowest'} of {edge.tried})"
        for sweep in sweeps
        for edge in edges(sweep)
    ]
    found = []
    if at_edge:
        found.append(
            f"Learning rates chosen at the edge of what was tried: {'; '.join(at_edge)}. Further out may be better, so "
            "these contestants may be shown too weak."
        )
    found += [
        f"{titles[sweep.contestant]}: every learning rate tried failed."
        for sweep in sweeps
        if sweep.trials and all(trial.failed is not None for trial in sweep.trials)
    ]
    return found


def listed(names: Sequence[str]) -> str:
    """A, B and C."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
