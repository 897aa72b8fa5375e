"""The numbers of a comparison's tables: each contestant at each budget, summed up over its seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from elo.reporting.comparison import rate
from elo.reporting.pareto_results import Budget, ComparisonResults, Contestant, Entry, Sweep, Trial

OFF_BUDGET = 0.1
"""Relative difference from a budget above which a trial is reported as off it."""


@dataclass(frozen=True)
class Spread:
    """A number over the seeds that did not fail."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def half_range(self) -> float | None:
        """Half the distance between the lowest and the highest; None of one seed."""
        return (max(self.values) - min(self.values)) / 2 if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half_range is None else f" ±{self.half_range:.3f}")


@dataclass(frozen=True)
class ParetoRow:
    """A contestant at a budget; None where the comparison does not say."""

    contestant: Contestant
    learning_rates: Mapping[str, float]
    trials: tuple[Trial, ...]
    bpb: Mapping[str, Spread]
    """By language, of the final models."""
    change: Mapping[str, float]
    """By language, from the base to the mean."""
    before: Mapping[str, Spread]
    """By language, before layer alignment."""
    scale: Spread | None
    tokens: float | None
    """This and the costs below: means over the trials that did not fail; memory is the largest."""
    wall_seconds: float | None
    flops: float | None
    peak_memory_bytes: int | None

    @property
    def title(self) -> str:
        """The contestant's name for people, in quotes where a comma would make a list of names hard to read."""
        title = self.contestant.title
        return f"“{title}”" if "," in title else title

    @property
    def finished(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.failed is None)

    @property
    def failed(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.failed is not None)

    def scores(self, language: str) -> tuple[float, ...]:
        """Bits per byte of every seed, infinite where it failed; empty if one was not measured in the language."""
        found = [inf if trial.failed is not None else trial.bpb.get(language) for trial in self.trials]
        known = tuple(score for score in found if score is not None)
        return known if len(known) == len(found) else ()


def budget_rows(results: ComparisonResults, budget: int) -> list[ParetoRow]:
    """One row a contestant, lowest target bits per byte first; those without any last."""
    target = results.languages.target
    rows = [_row(results, contestant, results.entry(contestant.name, budget)) for contestant in results.contestants]
    return sorted(rows, key=lambda row: (row.bpb[target].mean if target in row.bpb else inf, not row.trials))


def _row(results: ComparisonResults, contestant: Contestant, entry: Entry | None) -> ParetoRow:
    trials = entry.trials if entry else ()
    done = [trial for trial in trials if trial.failed is None]
    languages = (results.languages.target, results.languages.source)
    bpb = _by_language(languages, [trial.bpb for trial in done])
    base = results.base.bpb
    costs = {
        name: _spread(getattr(trial, name) for trial in done)
        for name in ("tokens", "wall_seconds", "flops", "peak_memory_bytes")
    }
    peaks = costs["peak_memory_bytes"]
    mean = {name: spread.mean if spread else None for name, spread in costs.items()}
    return ParetoRow(
        contestant=contestant,
        learning_rates=entry.learning_rates if entry else {},
        trials=trials,
        bpb=bpb,
        change={language: spread.mean - base[language] for language, spread in bpb.items() if language in base},
        before=_by_language(languages, [trial.before_alignment.bpb for trial in done if trial.before_alignment]),
        scale=_spread(trial.scale for trial in done),
        tokens=mean["tokens"],
        wall_seconds=mean["wall_seconds"],
        flops=mean["flops"],
        peak_memory_bytes=int(max(peaks.values)) if peaks else None,
    )


def _by_language(languages: Iterable[str], measured: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    spreads = {language: _spread(bpb.get(language) for bpb in measured) for language in languages}
    return {language: spread for language, spread in spreads.items() if spread}


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known else None


def separated(lower: ParetoRow, higher: ParetoRow, language: str) -> bool:
    """Whether every seed of one is below every seed of the other, two at least of each; a failed seed is above all."""
    low, high = lower.scores(language), higher.scores(language)
    return min(len(low), len(high)) >= 2 and max(low) < min(high)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point is below in one number without being above in the other.

    In ascending order of the first number; of equal points the first alone.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


@dataclass(frozen=True)
class Edge:
    """A chosen learning rate with nothing tried beyond it."""

    stage: str
    chosen: float
    highest: bool
    """Otherwise it is the lowest."""
    tried: int


def edges(sweep: Sweep) -> list[Edge]:
    """Of the rates that were varied, those chosen at an end of what was tried; a failed try counts as tried."""
    chosen = next((trial for trial in sweep.trials if trial.chosen), None)
    found = []
    for stage, value in chosen.learning_rates.items() if chosen else ():
        tried = varied_rates(sweep).get(stage, [])
        if len(tried) > 1 and value in (tried[0], tried[-1]):
            found.append(Edge(stage, value, value == tried[-1], len(tried)))
    return found


def varied_rates(sweep: Sweep) -> dict[str, list[float]]:
    """By stage, the learning rates tried in ascending order; stages with one rate alone are left out."""
    stages = dict.fromkeys(stage for trial in sweep.trials for stage in trial.learning_rates)
    tried = {
        stage: sorted({t.learning_rates[stage] for t in sweep.trials if stage in t.learning_rates}) for stage in stages
    }
    return {stage: rates for stage, rates in tried.items() if len(rates) > 1}


def off_budget(budget: Budget, trial: Trial) -> float | None:
    """By what share of the budget a trial missed it, signed; None within `OFF_BUDGET` or if it failed."""
    spent = trial.wall_seconds if budget.kind == "seconds" else trial.tokens
    share = spent / budget.value - 1
    return share if trial.failed is None and abs(share) > OFF_BUDGET else None


def changes_text(changes: Mapping[str, Any], prefix: str = "") -> str:
    """Configuration changes on one line."""
    parts = []
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            parts.append(changes_text(value, f"{prefix}{key}."))
        else:
            shown = str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)
            parts.append(f"{prefix}{key}={shown}")
    return " · ".join(parts)


def rates_text(rates: Mapping[str, float]) -> str:
    """Learning rates by stage on one line."""
    return ", ".join(f"{stage_name(stage)} {rate(value)}" for stage, value in rates.items())


def stage_name(stage: str) -> str:
    return stage.replace("_", " ")
