"""What a run and a comparison are described by: the keys of their YAML files."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, field_validator, model_validator

from elo.checkpoint.layers import DEFAULT_LAYERS
from elo.evaluate.measures import MEASURES, Measure
from elo.methods import METHODS, Method, Phase
from elo.methods.lora import Lora
from elo.train.settings import TrainingSection, TrainingSettings

Rate = Annotated[float, Field(gt=0, le=1)]


def _whole_number(value: Any) -> Any:
    """1e9 is text to YAML 1.1, and true is 1 to Python: take the first for a number, and the second for a mistake."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number, not true or false")
    if isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


def _named(value: Any) -> Any:
    """A method written as its bare name has its default settings."""
    return {"name": value} if isinstance(value, str) else value


if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name"), BeforeValidator(_named)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class CorpusConfig(_Section):
    """One corpus; written as a bare string it is its path."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .parquet, .txt, each also .gz or .zst), a folder, a glob, or a Hugging Face dataset id."""
    weight: float = Field(1.0, gt=0, le=1e6)
    """Relative number of passes over this corpus among those of its language."""
    text_column: str = "text"
    """Field or column that holds a document's text."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataConfig(_Section):
    """What is trained on."""

    target: str
    """Key of the target language in `corpora`."""
    source: str
    """Key of the source language in `corpora`, replayed and watched for forgetting."""
    corpora: dict[str, list[CorpusConfig]]
    heldout: dict[str, CorpusConfig] = Field(default_factory=dict)
    """Text to measure on, by language. A language without it has `heldout_share` of its documents cut out."""
    heldout_share: float = Field(0.005, gt=0, lt=0.5)
    """Share of a language's documents cut out to measure on, where `heldout` names no text of it."""
    validation_share: float = Field(0.005, ge=0, lt=0.5)
    """Share of each language's training documents cut out for choosing learning rates."""
    replay_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of training tokens in the source language."""
    sequence_length: int = Field(2048, ge=8, le=1 << 24)
    """Tokens in a packed sequence."""
    packing: bool = True
    """Pack documents end to end into sequences, kept apart; otherwise one document a sequence, padded."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a document that cannot be read does: `stop` the run, or `skip` it and count it. A file that breaks off is
    then read up to there, with a warning; a file of which nothing can be read stops the run all the same."""
    split_special_tokens: bool = True
    """Tokenise special tokens that are spelled in a document, such as `<|endoftext|>`, as text; otherwise they become
    the tokens."""
    allow_lost_text: bool = False
    """Accept text of which the tokenizer loses more than 5 %, by unknown tokens or dropped characters. The loss is
    measured by decoding all held-out text and, of training text, the first 256 documents and one in 16 after them."""
    workers: int | None = Field(None, ge=1, le=4096)
    """Processes that tokenise; by default chosen by the number of cores."""

    @field_validator("corpora", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: item if isinstance(item, list) else [item] for name, item in value.items()}
        return value

    @model_validator(mode="after")
    def _languages(self) -> "DataConfig":
        for language in (*self.corpora, *self.heldout):
            if not language.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"language name {language!r} may hold letters, digits, - and _ alone")
        if self.target == self.source:
            raise ValueError(f"target and source are both {self.target!r}; they must be two languages")
        for role in ("target", "source"):
            language = getattr(self, role)
            needed = role == "target" or self.replay_ratio > 0
            if needed and not self.corpora.get(language):
                raise ValueError(
                    f"{role}: {language!r} has no corpus; corpora holds {', '.join(self.corpora) or 'none'}"
                )
        unknown = [language for language in self.heldout if language not in (self.target, self.source)]
        unknown += [language for language in self.corpora if language not in (self.target, self.source)]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is neither the target {self.target!r} nor the source {self.source!r} language"
            )
        return self


class _EvaluationConfig(_Section):
    """What is measured before and after."""

    max_bytes: Annotated[int | None, BeforeValidator(_whole_number)] = Field(400_000, ge=1000)
    """Held-out bytes a language, shared among its documents, during training as well; null takes all."""
    cloze: dict[str, str] = Field(default_factory=dict)
    """Cloze items (.jsonl) by language."""
    prompts: dict[str, list[str]] = Field(default_factory=dict)
    """Prompts by language, for samples before and after."""
    max_new_tokens: int = Field(48, gt=0)
    """Length of a sample, in tokens."""

    @property
    def measures(self) -> list[Measure]:
        """The registered measures that are asked for."""
        found = [getattr(self, name) for name in MEASURES]
        return [measure for measure in found if measure is not None]


def _measure_field(measure: type[Measure]) -> Any:
    """The section of a registered measure, null unless it is asked for."""
    section = Annotated[measure | None, BeforeValidator(measure.from_short)]  # type: ignore[valid-type]
    return (section, Field(None, description=" ".join((measure.__doc__ or "").split())))


if TYPE_CHECKING:
    EvaluationConfig = _EvaluationConfig
else:
    EvaluationConfig = create_model(
        "EvaluationConfig",
        __base__=_EvaluationConfig,
        __doc__=_EvaluationConfig.__doc__,
        **{name: _measure_field(measure) for name, measure in MEASURES.items()},
    )


class RunConfig(_Section):
    """A whole run."""

    model: str = Field(min_length=1)
    """Folder of a Hugging Face checkpoint, or a hub id."""
    output: str = Field(min_length=1)
    """Run folder: every artefact of the run is in it."""
    data: DataConfig
    method: AnyMethod = Lora()
    """How the model is adapted: a name, or a section with a name and that method's settings (docs/methods.md)."""
    layers: str | int | list[int] = DEFAULT_LAYERS
    """Decoder layers that train: first:K, last:K, indices and ranges, joined by commas."""
    tokens: Annotated[int | None, BeforeValidator(_whole_number)] = Field(None, gt=0, le=10**15)
    """The run's token budget; null: one pass over the target language."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of data order and of everything that is drawn."""
    tokenizer: str | None = Field(None, min_length=1)
    """Folder or hub id of the tokenizer; null is the model's own."""
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationConfig = EvaluationConfig()
    trust_remote_code: bool = False
    """Run code that ships with the checkpoint. Only for checkpoints you trust."""
    title: str | None = None
    """Heading of the report."""

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which Python takes for 1
            raise ValueError("write layers such as first:1,last:1, got " + repr(value))
        return value

    @model_validator(mode="after")
    def _known_phases(self) -> "RunConfig":
        known = [phase.name for phase in self.method.phases]
        for name in self.training.phases:
            if name not in known:
                raise ValueError(
                    f"training.phases: {name!r} is not a phase of method {self.method.name}, which has "
                    f"{', '.join(known)}"
                )
        return self

    def settings(self, phase: Phase) -> TrainingSettings:
        """Training settings of one of the method's phases."""
        return self.training.for_phase(phase.name, phase.learning_rate)


class Contestant(_Section):
    """One way of adapting that takes part in a comparison."""

    method: AnyMethod | None = None
    """How it adapts; by default the method with the contestant's name."""
    label: str | None = None
    """Name in the report."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Keys of the run that this contestant changes, as key.path: value."""
    tokens_per_second: float | None = Field(None, gt=0)
    """Training speed, in tokens per second of the budget's kind, measured beforehand on a quiet machine
    (benchmarks/methods_speed.py); a time budget is then worked out from it instead of trial runs."""
    learning_rates: list[Rate] | dict[str, list[Rate]] | None = None
    """Rates to try, for all its phases or by phase; by default those of the comparison."""


class Budget(_Section):
    """What every contestant may spend: tokens, or time in training."""

    tokens: Annotated[int | None, BeforeValidator(_whole_number)] = Field(None, gt=0, le=10**15)
    """Training tokens."""
    seconds: float | None = Field(None, gt=0)
    """Wall time of all stages, evaluation aside."""
    cpu_seconds: float | None = Field(None, gt=0)
    """CPU time of all stages, evaluation aside, summed over cores; what other work on the machine does not distort."""

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if sum(value is not None for value in (self.tokens, self.seconds, self.cpu_seconds)) != 1:
            raise ValueError("a budget is one of tokens, seconds and cpu_seconds: write one of them")
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


class CompareConfig(_Section):
    """A comparison of methods on one base, one corpus and one held-out text."""

    run: str | dict[str, Any]
    """What all contestants share: the configuration of a run, or its file."""
    output: str = Field(min_length=1)
    """Folder of the comparison."""
    contestants: dict[str, Contestant] = Field(min_length=1)
    budgets: list[Budget] = Field(min_length=1)
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    """Of the order of rows and all else that is drawn; learning rates are tuned with the first."""
    learning_rates: list[Rate] = Field([1e-4, 3e-4, 1e-3], min_length=1)
    """Rates that are tried for each phase of each contestant, on the budget itself. Where the lowest or the highest is
    best, the next beyond is tried too."""
    source_weight: float = Field(0.0, ge=0, le=10)
    """Rates are chosen by target bits per byte + this x source bits per byte, on validation text."""
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
            if contestant.method is None and name not in METHODS:
                raise ValueError(f"contestants.{name}: is not a method; write method: one of {', '.join(METHODS)}")
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum() or name.startswith("."):
                raise ValueError(f"contestants: name {name!r} may hold letters, digits, -, _ and . alone")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds one twice")
        return self

    def method(self, name: str) -> Method:
        """The method of contestant `name`."""
        return self.contestants[name].method or METHODS[name].model_validate({"name": name})
