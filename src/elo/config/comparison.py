"""Configuration models of a comparison: the keys of its YAML file."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from elo.config.schema import AnyMethod, Section, whole_number
from elo.methods import METHODS, Method

Rate = Annotated[float, Field(gt=0, le=1)]


class Contestant(Section):
    """One of the methods in a comparison."""

    method: AnyMethod | None = None
    """Adaptation method; null is the method with the contestant's name."""
    model: str | None = Field(None, min_length=1)
    """Base model of this contestant, to compare bases; null is the run's."""
    tokenizer: str | None = Field(None, min_length=1)
    """Tokenizer for `model`; null is the model's own."""
    label: str | None = None
    """Name in the report."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Keys of the run to change for this contestant, as key.path: value."""
    tokens_per_second: float | None = Field(None, gt=0)
    """Training speed in tokens per second (CPU second for a `cpu_seconds` budget), measured on an idle machine with
    benchmarks/methods_speed.py. A time budget is then converted to tokens at this speed. null measures the speed in
    trial runs."""
    fixed_seconds: float = Field(0.0, ge=0)
    """Time of the stages without training, such as detach and the search of a scale. It is deducted from a time budget
    before `tokens_per_second` is applied."""
    learning_rates: list[Rate] | dict[str, list[Rate]] | None = None
    """Learning rates to try, for all phases or by phase; null is the comparison's list."""


class Budget(Section):
    """The budget of each contestant: tokens, or time."""

    tokens: Annotated[int | None, BeforeValidator(whole_number)] = Field(None, gt=0, le=10**15)
    """Number of training tokens."""
    seconds: float | None = Field(None, gt=0)
    """Wall time of all stages except evaluation, in seconds."""
    cpu_seconds: float | None = Field(None, gt=0)
    """CPU time of all stages except evaluation, in seconds, summed over cores. Other work on the machine distorts it
    less than wall time."""

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if sum(value is not None for value in (self.tokens, self.seconds, self.cpu_seconds)) != 1:
            raise ValueError("a budget is one of tokens, seconds and cpu_seconds; write exactly one of them")
        return self

    @property
    def kind(self) -> Literal["tokens", "seconds", "cpu_seconds"]:
        return "tokens" if self.tokens is not None else "seconds" if self.seconds is not None else "cpu_seconds"

    @property
    def value(self) -> float:
        return float(getattr(self, self.kind))

    @property
    def name(self) -> str:
        return {
            "tokens": f"{self.value:,.0f} tokens",
            "seconds": f"{self.value:g} s",
            "cpu_seconds": f"{self.value:g} CPU s",
        }[self.kind]


class CompareConfig(Section):
    """A comparison of methods, or of base models, on the same training text and held-out text."""

    run: str | dict[str, Any]
    """Configuration of a run that all contestants share, or the path of its file."""
    output: str = Field(min_length=1)
    """Folder of the comparison."""
    contestants: dict[str, Contestant] = Field(min_length=1)
    budgets: list[Budget] = Field(min_length=1)
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    """Seeds, one training per seed. Learning rates are tuned with the first. One seed supports no difference."""
    learning_rates: list[Rate] = Field([1e-4, 3e-4, 1e-3], min_length=1)
    """Learning rates to try for each phase of each contestant, with `tuning_share` of the budget. If the lowest or
    highest is best, up to two more beyond it are tried."""
    tuning_share: float = Field(1.0, gt=0, le=1)
    """Length of a tuning run as a share of the budget. 1 is the most faithful, since the best rate depends on the
    length of the training."""
    source_limit: float = Field(0.02, ge=0)
    """Bits per byte that each source language may lose. A contestant that loses more is not ranked, and learning rates
    are chosen among those that lose no more on validation text, if there are any."""
    title: str | None = None

    @field_validator("contestants", mode="before")
    @classmethod
    def _empty_is_plain(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {str(name): {} for name in value}
        return {name: item or {} for name, item in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _known(self) -> "CompareConfig":
        for name, contestant in self.contestants.items():
            for key in ("model", "tokenizer"):
                if key in contestant.changes:
                    raise ValueError(f"contestants.{name}.changes: {key}: write {key} beside changes, not in it")
            if contestant.tokenizer and not contestant.model:
                raise ValueError(f"contestants.{name}.tokenizer: needs a model of the contestant; add model")
            if contestant.method is None and name not in METHODS:
                raise ValueError(f"contestants.{name}: is not a method; set method to one of {', '.join(METHODS)}")
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("."):
                raise ValueError(f"contestants: name {name!r} may contain only letters, digits, -, _ and .")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} contains a seed twice; remove it")
        return self

    def method(self, name: str) -> Method:
        """Return the method of contestant `name`."""
        return self.contestants[name].method or METHODS[name].model_validate({"name": name})
