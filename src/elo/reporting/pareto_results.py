"""comparison.json as read back: several ways of training at several budgets with several seeds.

docs/results.md is the prose of it. What a run's results share with it is in elo.reporting.results.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from elo.errors import EloError
from elo.reporting.results import (
    BeforeAlignment,
    BitsPerByteOf,
    Count,
    Record,
    Seconds,
    Setting,
    Stage,
    TextSize,
    checked,
    read_source,
)

FILE_NAME = "comparison.json"
SCHEMA = 1
KIND = "comparison"

Number = Annotated[float, Field(allow_inf_nan=False)]
LearningRates = dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
"""Of each stage that trains."""


class Base(Record):
    """The base model, before anything."""

    bpb: BitsPerByteOf = Field(default_factory=dict)
    heldout: dict[str, TextSize] = Field(default_factory=dict)
    documents_nats: dict[str, tuple[Seconds, ...]] = Field(default_factory=dict)
    documents_bytes: dict[str, tuple[Count, ...]] = Field(default_factory=dict)


class Budget(Record):
    """What every contestant may spend."""

    name: str
    kind: Literal["tokens", "seconds"]
    value: float = Field(gt=0, allow_inf_nan=False)


class Contestant(Record):
    """A way of training."""

    name: str
    label: str | None = None
    method: str
    changes: dict[str, Any] = Field(default_factory=dict)
    """What its configuration changes of the comparison's."""

    @property
    def title(self) -> str:
        return self.label or self.name


class Trial(Record):
    """One training of a contestant at a budget with one seed."""

    seed: int
    bpb: BitsPerByteOf = Field(default_factory=dict)
    """Of the final model on held-out text; empty when the trial failed."""
    heldout: dict[str, TextSize] = Field(default_factory=dict)
    documents_nats: dict[str, tuple[Seconds, ...]] = Field(default_factory=dict)
    documents_bytes: dict[str, tuple[Count, ...]] = Field(default_factory=dict)
    before_alignment: BeforeAlignment | None = None
    scale: Number | None = None
    """Factor on what was learned when it was put back."""
    tokens: Count = 0
    wall_seconds: Seconds = 0.0
    """Of the training stages, evaluation not counted."""
    flops: Seconds | None = None
    """Floating-point operations of training."""
    peak_memory_bytes: Count | None = None
    stages: tuple[Stage, ...] = ()
    failed: str | None = None
    """Why there is no result."""


class AtBudget(Record):
    """What belongs to a contestant at a budget."""

    contestant: str
    """Its name."""
    budget: Count
    """Index into the budgets."""


class Entry(AtBudget):
    """A contestant's trials at a budget."""

    learning_rates: LearningRates = Field(default_factory=dict)
    trials: tuple[Trial, ...] = ()


class SweepTrial(Record):
    learning_rates: LearningRates
    score: Number | None = None
    """What was minimised, on validation text."""
    bpb: BitsPerByteOf = Field(default_factory=dict)
    """On validation text."""
    failed: str | None = None
    chosen: bool = False


class Sweep(AtBudget):
    """The learning rates tried for a contestant at a budget."""

    trials: tuple[SweepTrial, ...] = ()


class ComparisonResults(Setting):
    kind: Literal["comparison"]
    title: str = "Comparison"
    seeds: tuple[int, ...] = Field(min_length=1)
    source_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Learning rates were chosen by target + source_weight x source bits per byte."""
    base: Base = Base()
    budgets: tuple[Budget, ...] = Field(min_length=1)
    contestants: tuple[Contestant, ...] = Field(min_length=1)
    entries: tuple[Entry, ...] = ()
    sweeps: tuple[Sweep, ...] = ()

    @model_validator(mode="after")
    def _parts_agree(self) -> "ComparisonResults":
        names = [contestant.name for contestant in self.contestants]
        if len(set(names)) < len(names):
            raise ValueError(f"contestants: names must differ, got {', '.join(names)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: must differ, got {', '.join(map(str, self.seeds))}")
        self._check_places("entries", self.entries, names)
        self._check_places("sweeps", self.sweeps, names)
        for index, entry in enumerate(self.entries):
            self._check_trials(f"entries.{index}.trials", entry)
        return self

    def _check_places(self, key: str, parts: Sequence[AtBudget], names: Sequence[str]) -> None:
        met = set()
        for index, part in enumerate(parts):
            where, place = f"{key}.{index}", (part.contestant, part.budget)
            if part.contestant not in names:
                raise ValueError(f"{where}.contestant: {part.contestant!r} is none of {', '.join(names)}")
            if part.budget >= len(self.budgets):
                raise ValueError(f"{where}.budget: {part.budget}, but there are {len(self.budgets)} budgets from 0")
            if place in met:
                raise ValueError(f"{where}: {part.contestant!r} at budget {part.budget} is there already")
            met.add(place)

    def _check_trials(self, where: str, entry: Entry) -> None:
        met = set()
        for index, trial in enumerate(entry.trials):
            if trial.seed not in self.seeds:
                raise ValueError(
                    f"{where}.{index}.seed: {trial.seed} is none of seeds {', '.join(map(str, self.seeds))}"
                )
            if trial.seed in met:
                raise ValueError(f"{where}.{index}.seed: {trial.seed} is there already")
            met.add(trial.seed)
            if trial.failed is None and self.languages.target not in trial.bpb:
                raise ValueError(f"{where}.{index}.bpb: lacks {self.languages.target}, though the trial did not fail")

    def entry(self, contestant: str, budget: int) -> Entry | None:
        return next((e for e in self.entries if e.contestant == contestant and e.budget == budget), None)

    @property
    def trials_done(self) -> int:
        """Failed ones among them."""
        return sum(len(entry.trials) for entry in self.entries)

    @property
    def trials_planned(self) -> int:
        return len(self.contestants) * len(self.budgets) * len(self.seeds)


def read_comparison(source: dict[str, Any] | str | Path) -> ComparisonResults:
    """Read and check a comparison from memory, a file, or the folder that holds `comparison.json`.

    Raises:
        UnfinishedError: there is no such file, or it is not JSON.
        EloError: it is something else than a comparison; the message names key and value.
    """
    name, value = read_source(source, FILE_NAME)
    kind = value.get("kind") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind != KIND:
        raise EloError(f'{name}: not a comparison: kind: must be "{KIND}", got {kind!r}')
    return checked(ComparisonResults, name, value, SCHEMA, "a comparison")
