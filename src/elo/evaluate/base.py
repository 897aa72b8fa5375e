"""The base class of measures: settings, a check before any work, and the measurement of a model.

A measure is one file in this package: a class with a `name`, settings as fields, and `measure`. Importing
`elo.evaluate.measures` imports every file here. A registered measure has a section `evaluation.<name>` in
configurations, and its values appear in every table and report.
"""

import math
from abc import abstractmethod
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
    language: str = Field("", description="Language of the items; empty if they have none.")
    value: float = Field(description="Value in `unit`.")
    unit: Literal["share", "number"] = Field(
        "share", description="`share`: between 0 and 1, shown as a percentage; `number`: any other value."
    )
    higher_is_better: bool = Field(True, description="Direction of improvement.")
    standard_error: float | None = Field(
        None, ge=0, description="Standard error of `value`, assuming that items are independent."
    )
    items: int | None = Field(None, ge=0, description="Number of items.")
    chance: float | None = Field(None, description="Expected value of guessing.")
    is_detail: bool = Field(
        False, description="Whether reports list it under the details instead of in the results table."
    )
    per_item: tuple[float, ...] = Field(
        (),
        description="Value of each item, in the same order for every model, with mean `value`; empty if unknown.",
    )


@dataclass(frozen=True)
class Subject:
    """The model to measure.

    Attributes:
        model: any causal LM; measures do not change it.
        tokenizer: the model's tokenizer; None if no measure needs one.
        tokenizer_source: folder, hub id or object that `tokenizer` was made from.
        batch_size: sequences per forward pass; None takes as many as keep fp32 logits within 1 GiB.
        progress: whether to show progress.
        files: path, without suffix, of files that measures write next to the results; None writes none.
        finished: folder of finished parts of a measurement, from which the same command resumes; None keeps none.
        identity: JSON value that identifies the model across commands.
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
        """The tokenizer; only for measures with `needs_tokenizer`."""
        assert self.tokenizer is not None
        return self.tokenizer


@dataclass(frozen=True)
class Outcome:
    """The result of a measure: values, and further keys of the results."""

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
    """Forms that the section may have in a configuration, for docs/configuration.md."""

    @classmethod
    def from_short(cls, value: Any) -> Any:
        """Return the section that a short form, such as true or a list, stands for; keep any other value."""
        return value

    def check(self, where: str) -> None:
        """Raise EloError for mistakes that can be found without a model.

        Args:
            where: key or option that holds the settings, for the message.
        """

    def files(self) -> list[Path]:
        """Return the files and folders that affect the values, for fingerprints."""
        return []

    @abstractmethod
    def measure(self, subject: Subject) -> Outcome:
        """Measure a model."""


M = TypeVar("M", bound=Measure)
MEASURES: dict[str, type[Measure]] = {}
"""Measures that configurations can have, by name."""


def register(measure: type[M]) -> type[M]:
    """Register a measure under its name."""
    MEASURES[measure.name] = measure
    return measure


def share_error(share: float, items: int) -> float | None:
    """Return the standard error of a share of independent items; None without items."""
    return (share * (1 - share) / items) ** 0.5 if items else None


def mean_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of independent values; None for fewer than two."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def ratio_error(values: Sequence[float], sizes: Sequence[float]) -> float | None:
    """Return the standard error of sum(values) / sum(sizes) over independent items; None for fewer than two."""
    items, total = len(values), sum(sizes)
    if items < 2 or not total:
        return None
    ratio = sum(values) / total
    spread = sum((value - ratio * size) ** 2 for value, size in zip(values, sizes, strict=True))
    return float((spread * items / (items - 1)) ** 0.5 / total)


def weighted(items: Sequence[Sequence[float]], average: float) -> tuple[float, ...]:
    """Return the values of all items of a benchmark, weighted so that their mean is `average`.

    Either all items or all parts of the benchmark have the same weight. If neither gives `average`, the result is
    empty.

    Args:
        items: values of the items of each part.
    """
    total = sum(map(len, items))
    for weights in ([1.0] * len(items), [total / (len(items) * max(1, len(each))) for each in items]):
        found = [weight * item for each, weight in zip(items, weights, strict=True) for item in each]
        if found and math.isclose(fmean(found), average, rel_tol=1e-6, abs_tol=1e-9):
            return tuple(found)
    return ()
