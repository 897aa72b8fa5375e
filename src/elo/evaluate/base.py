"""What a measure is: its settings, a check before any work, and the values that it gives a model.

A measure is one file in this package: a class with a `name`, settings as fields, and `measure`. Importing
`elo.evaluate.measures` imports every file here. A registered measure is a section `evaluation.<name>` of
configurations, and its values appear in every table and report.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elo.data.tokenizer import TextTokenizer


class MeasureValue(BaseModel):
    """The value of one benchmark in one language."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    measure: str = Field(description="Name of the benchmark, for example `cloze`.")
    name: str = Field("all", description="Subset of the items; `all` for the whole benchmark.")
    language: str = Field("", description="Language of the items; empty where they have none.")
    value: float = Field(description="Value in `unit`.")
    unit: Literal["share", "number"] = Field(
        "share", description="`share`: between 0 and 1, shown as a percentage; `number`: shown as it is."
    )
    higher_is_better: bool = Field(True, description="Direction of improvement.")
    standard_error: float | None = Field(
        None, ge=0, description="Standard error of `value`, with items taken as independent."
    )
    items: int | None = Field(None, ge=0, description="Number of items.")
    chance: float | None = Field(None, description="Expected value of guessing.")
    is_detail: bool = Field(False, description="Whether it is listed with the details, not in the results table.")
    per_item: tuple[float, ...] = Field(
        (),
        description="Values of the items, in the order that every model has, with the mean `value`; empty if unknown.",
    )


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Attributes:
        model: any causal LM; a measure leaves it as it was.
        tokenizer: the model's; None where no measure needs one.
        tokenizer_source: folder, hub id or object that `tokenizer` was made from.
        batch_size: sequences in a forward pass; None: as many as keep fp32 logits within 1 GiB.
        progress: whether progress is shown.
        files: path and stem of files that a measure writes beside the results; None: it writes none.
        finished: folder for finished parts of a measurement, from which the same command resumes; None: there is none.
        identity: what identifies the model between two commands.
    """

    model: "PreTrainedModel"
    tokenizer: "TextTokenizer | None"
    tokenizer_source: "str | Path | PreTrainedTokenizerBase | TextTokenizer | None" = None
    batch_size: int | None = None
    progress: bool = False
    files: Path | None = None
    finished: Path | None = None
    identity: Any = None
    trust_remote_code: bool = False

    @property
    def text_tokenizer(self) -> "TextTokenizer":
        """The tokenizer, for measures with `needs_tokenizer`."""
        assert self.tokenizer is not None
        return self.tokenizer


@dataclass(frozen=True)
class Outcome:
    """What a measure found: its values, and further keys of the results."""

    values: Sequence[MeasureValue] = ()
    record: dict[str, Any] = field(default_factory=dict)


class Measure(BaseModel):
    """A way to measure a model. The fields are its settings, written under `evaluation.<name>` in configurations."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, arbitrary_types_allowed=True
    )

    name: ClassVar[str]
    needs_tokenizer: ClassVar[bool] = True
    short_form: ClassVar[str] = "section"
    """How the section may be written in a configuration, besides key by key."""

    @classmethod
    def from_short(cls, value: Any) -> Any:
        """The section that a short form, such as true or a list, stands for; any other value as it is."""
        return value

    def check(self, where: str) -> None:
        """Raise EloError for what is wrong without a model; `where` is the key or option that holds the settings."""

    def files(self) -> list[Path]:
        """Files and folders that decide about the values, for fingerprints."""
        return []

    def measure(self, subject: Subject) -> Outcome:
        """Measure a model."""
        raise NotImplementedError


M = TypeVar("M", bound=Measure)
MEASURES: dict[str, type[Measure]] = {}
"""Every measure that configurations can ask for, by name."""


def register(measure: type[M]) -> type[M]:
    """Make a measure known under its name."""
    MEASURES[measure.name] = measure
    return measure


def share_error(share: float, items: int) -> float | None:
    """Standard error of a share of independent items."""
    return (share * (1 - share) / items) ** 0.5 if items else None


def mean_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None of fewer than two."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def weighted(items: Sequence[Sequence[float]], average: float) -> tuple[float, ...]:
    """Values of the items of all parts of a benchmark, weighted to have this mean; empty if the weights are unknown."""
    total = sum(map(len, items))
    for weights in ([1.0] * len(items), [total / (len(items) * max(1, len(each))) for each in items]):
        found = [weight * item for each, weight in zip(items, weights, strict=True) for item in each]
        if found and math.isclose(fmean(found), average, rel_tol=1e-6, abs_tol=1e-9):
            return tuple(found)
    return ()
