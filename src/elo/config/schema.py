"""Configuration models of a run: the keys of its YAML file."""

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, field_validator, model_validator

from elo.checkpoint.layers import DEFAULT_LAYERS, PROBE_LENGTH, PROBE_TOKENS
from elo.config.chat import ChatConfig
from elo.data.filters import Filters
from elo.data.mixture import names_of
from elo.data.parallel import DEFAULT_TEMPLATE, Parallel, template_problem
from elo.evaluate.measures import MEASURES, Measure
from elo.evaluate.translation import Translation
from elo.methods import METHODS, Method, Phase, section_of_name
from elo.methods.lora import Lora
from elo.train.settings import EXECUTION, TrainingSection, TrainingSettings, execution_keys


def whole_number(value: Any) -> Any:
    """Convert 1e9, which YAML 1.1 reads as text, to a whole number, and reject true, which Python treats as 1."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number, not true or false")
    if isinstance(value, str | float):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() else value
    return value


def _languages(value: Any) -> Any:
    """Check the languages of a role here, because pydantic reports each form of a union as an error of its own."""
    names = value if isinstance(value, dict | list) else [value]
    for name in names or [value]:
        if not isinstance(name, str) or not name:
            hint = " (YAML reads bare no, yes, on and off as true or false: quote it)" if isinstance(name, bool) else ""
            raise ValueError(f"got {value!r}; write a language, a list of languages, or a mapping to shares{hint}")
    if len(set(names)) < len(names):
        raise ValueError(f"got {value!r}, which names a language twice; remove one")
    for name, share in value.items() if isinstance(value, dict) else ():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1e6:
            raise ValueError(f"the share of {name!r} is {share!r}; write a number above 0, at most 1e6")
    return value


Languages = Annotated[str | list[str] | dict[str, float], BeforeValidator(_languages)]


if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name"), BeforeValidator(section_of_name)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class CorpusConfig(Section):
    """One corpus. A bare string is the path."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .parquet, .txt, each also .gz or .zst), a folder, a glob, each also in object storage (s3://,
    gs://), or a Hugging Face dataset id."""
    kind: Literal["text", "parallel"] = "text"
    """`parallel`: each row holds a sentence and its translation. A document of such a corpus ends in the language that
    lists the corpus, and all its tokens count for that language."""
    weight: float = Field(1.0, gt=0, le=1e6)
    """Number of passes over this corpus, relative to the other corpora of its language."""
    text_column: str = "text"
    """JSON field or table column with the text of a document."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of a parallel corpus by language: the one that lists the corpus, and one other."""
    templates: list[str] = Field([DEFAULT_TEMPLATE], min_length=1)
    """Layouts of a pair in a parallel corpus, used in turn, with `{source}`, `{source_language}`, `{target_language}`
    and, at the end, `{target}`."""
    pairs: int = Field(1, ge=1, le=1024)
    """Consecutive rows of a parallel corpus that form a document."""
    code_switched: float = Field(0.0, ge=0, le=1)
    """Share of a parallel corpus' documents that are code-switched: consecutive sentences, alternating between the
    languages, without a template. It needs at least two `pairs`, and rows in the order of a text."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parallel_or_not(self) -> "CorpusConfig":
        if self.kind == "text":
            plain = (self.columns, self.templates, self.pairs, self.code_switched) == ({}, [DEFAULT_TEMPLATE], 1, 0.0)
            if not plain:
                raise ValueError("columns, templates, pairs and code_switched belong to kind: parallel; add it")
            return self
        if len(self.columns) != 2:
            raise ValueError(f"columns: got {self.columns}; name the columns of two languages, as in {{en: a, ko: b}}")
        for template in self.templates:
            if problem := template_problem(template):
                raise ValueError(f"templates: {problem}")
        if self.code_switched and self.pairs < 2:
            raise ValueError("code_switched: a code-switched document needs several sentences; set pairs to 2 or more")
        return self

    def parallel(self, language: str) -> Parallel | None:
        """Return how rows become documents that end in `language`; None for ordinary text."""
        if self.kind == "text":
            return None
        other = next(name for name in self.columns if name != language)
        return Parallel(
            (self.columns[other], self.columns[language]),
            (other, language),
            tuple(self.templates),
            self.pairs,
            self.code_switched,
        )


class PartConfig(Section):
    """A part of the training with its own shares. Keys that it leaves out are those of `data`."""

    share: float = Field(gt=0, le=1e6)
    """Length of the part in training tokens, relative to the other parts."""
    target: Languages | None = None
    """Target languages of the part, in the forms of `data.target`."""
    source: Languages | None = None
    """Source languages of the part, in the forms of `data.source`."""
    replay_ratio: float | None = Field(None, ge=0, lt=1)
    """Share of the part's tokens in the source languages together."""
    weights: dict[str, list[Annotated[float, Field(ge=0, le=1e6)]]] = Field(default_factory=dict)
    """Weights of a language's corpora in the part, in the order of `data.corpora`; 0 leaves a corpus out."""


class DataConfig(Section):
    """Training and held-out text."""

    target: Languages
    """Target language, as named in `corpora`. Several are a list, each read in proportion to its tokens, or a mapping
    to their relative shares of training tokens, such as {ko: 2, ja: 1}."""
    source: Languages
    """Source language, or several in the same forms. Its text is replayed in training, and forgetting is measured on
    it."""
    corpora: dict[str, list[CorpusConfig]]
    heldout: dict[str, CorpusConfig] = Field(default_factory=dict)
    """Held-out text by language. Where it is missing, `heldout_share` of the language's documents is held out."""
    heldout_share: float = Field(0.005, gt=0, lt=0.5)
    """Share of a language's documents that is held out when `heldout` has no text for it."""
    validation_share: float = Field(0.005, ge=0, lt=0.5)
    """Share of each language's training documents set aside for choosing learning rates."""
    replay_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of training tokens in the source languages together."""
    schedule: list[PartConfig] = Field(default_factory=list)
    """Parts of the training with different shares, one after the other; by default all tokens have the same shares."""
    sequence_length: int = Field(2048, ge=8, le=1 << 24)
    """Length of a packed sequence, in tokens."""
    packing: bool = True
    """Pack several documents into a sequence, with attention limited to each document. If false, each sequence holds
    one document and padding."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a document that cannot be read: `stop` the run, or `skip` the document and count it. With
    `skip`, a truncated file is read up to its break, with a warning. A file that cannot be read at all always stops
    the run."""
    split_special_tokens: bool = True
    """Tokenise the names of special tokens in a document, such as `<|endoftext|>`, as ordinary text. If false, they
    become special tokens."""
    allow_lost_text: bool = False
    """Accept a corpus of which the tokenizer loses more than 5 %, as unknown tokens or dropped characters. The loss is
    measured by decoding: all held-out text, the first 256 training documents, and every 16th after them."""
    filters: Filters = Filters()
    workers: int | None = Field(None, ge=1, le=4096)
    """Number of processes that tokenise; null chooses it from the number of cores."""

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
                raise ValueError(f"language name {language!r} may contain only letters, digits, - and _")
        for language in self.targets:
            if language in self.sources:
                raise ValueError(f"{language!r} is both a target and a source language; name different languages")
        for language in self.languages:
            role = "target" if language in self.targets else "source"
            only_measured = role == "source" and not self._replays and language in self.heldout
            if not self.corpora.get(language) and not only_measured:
                raise ValueError(f"{role}: {language!r} has no corpus; corpora has {', '.join(self.corpora) or 'none'}")
        for language in (*self.heldout, *self.corpora):
            if language not in self.languages:
                raise ValueError(
                    f"{language!r} is neither a target nor a source language; choose among {', '.join(self.languages)}"
                )
        for language, corpora in self.corpora.items():
            for corpus in corpora:
                if corpus.kind == "parallel" and language not in corpus.columns:
                    raise ValueError(
                        f"corpora.{language}: {corpus.path}: columns has no {language!r}, only "
                        f"{' and '.join(corpus.columns)}; list the corpus under a language that it is written in"
                    )
        for number, part in enumerate(self.schedule):
            self._check_part(part, f"schedule.{number}")
        for language, heldout in self.heldout.items():
            if heldout.kind == "parallel":
                raise ValueError(
                    f"heldout.{language}: is a parallel corpus; give ordinary text, and parallel text to "
                    "evaluation.translation"
                )
        return self

    def _check_part(self, part: PartConfig, where: str) -> None:
        for key, known in (("target", self.targets), ("source", self.sources)):
            for language in names_of(getattr(part, key) or ()):
                if language not in known:
                    raise ValueError(
                        f"{where}.{key}: {language!r} is not in data.{key}; choose among {', '.join(known)}"
                    )
        for language, weights in part.weights.items():
            if len(weights) != len(self.corpora.get(language, ())):
                raise ValueError(
                    f"{where}.weights.{language}: got {len(weights)} weights for "
                    f"{len(self.corpora.get(language, ()))} corpora; write one for each"
                )
            if not any(weights):
                raise ValueError(
                    f"{where}.weights.{language}: leaves out every corpus; raise a weight, or leave the language out "
                    "of the part's target or source"
                )

    def decisive(self) -> dict[str, Any]:
        """Return the settings, besides corpora, that determine the token shards, for the fingerprint of their stage."""
        keys = {"heldout_share", "validation_share", "on_error", "split_special_tokens", "allow_lost_text"}
        filters = self.filters.plan()
        return self.model_dump(mode="json", include=keys) | ({"filters": filters} if filters else {})

    @property
    def parts(self) -> list[PartConfig]:
        """The schedule, of one part if there is none."""
        return self.schedule or [PartConfig(share=1)]

    @property
    def _replays(self) -> bool:
        """Whether any part reads text in the source languages."""
        return any(self.replay_ratio if part.replay_ratio is None else part.replay_ratio for part in self.parts)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the target languages."""
        return names_of(self.target)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source languages."""
        return names_of(self.source)

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of all languages, target languages first."""
        return (*self.targets, *self.sources)


class _EvaluationConfig(Section):
    """What is measured before and after."""

    max_bytes: Annotated[int | None, BeforeValidator(whole_number)] = Field(400_000, ge=1000)
    """Maximum size of held-out text per language, in bytes, shared among its documents; null takes all. It also applies
    to the measurements during training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format that measurements compute in. auto is the checkpoint's on a GPU and float32 on a CPU. On a CPU with
    bfloat16 in hardware, bfloat16 halves the time and changes bits per byte by some thousandths."""
    cloze: dict[str, str] = Field(default_factory=dict)
    """File with cloze items (.jsonl) by language."""
    prompts: dict[str, list[str]] = Field(default_factory=dict)
    """Prompts by language, for sample texts before and after training."""
    max_new_tokens: int = Field(48, gt=0)
    """Maximum length of a sample text, in tokens."""

    during_training: list[str] = Field(default_factory=list, json_schema_extra=EXECUTION)
    """Sections of `evaluation`, such as tasks or in_context, that are also measured at each of training.evaluations.
    After adding one, `elo run` does not repeat a finished training, but `elo compare` does."""

    def decisive(self) -> dict[str, Any]:
        """Return what determines the values of a measurement, for the fingerprint of its stage."""
        return self.model_dump(mode="json", exclude=execution_keys(type(self)))

    @property
    def measures(self) -> list[Measure]:
        """The registered measures that are asked for."""
        found = [getattr(self, name) for name in MEASURES]
        return [measure for measure in found if measure is not None]

    @property
    def measures_during_training(self) -> list[Measure]:
        """Those of `measures` that `during_training` names."""
        return [measure for measure in self.measures if measure.name in self.during_training]

    @model_validator(mode="after")
    def _measured_during_training_is_configured(self) -> "_EvaluationConfig":
        for name in self.during_training:
            if getattr(self, name, None) is None or name not in MEASURES:
                raise ValueError(
                    f"during_training: there is no section evaluation.{name}; name configured ones of "
                    f"{', '.join(MEASURES)}"
                )
        return self


def _measure_field(measure: type[Measure]) -> Any:
    """Return the field of a registered measure's section, by default null."""
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


class ProbeConfig(Section):
    """The probe of `layers: auto` and of `profile: probe`, on training text (docs/probe.md)."""

    tokens: Annotated[int, BeforeValidator(whole_number)] = Field(PROBE_TOKENS, gt=0)
    """Number of tokens per language."""
    sequence_length: int = Field(PROBE_LENGTH, ge=8)
    """Length of a sequence, in tokens."""
    parallel: str | None = Field(None, min_length=1)
    """File with parallel sentences, one column per language, for the criterion `parallel`."""


class RunConfig(Section):
    """A run."""

    model: str = Field(min_length=1)
    """Folder of a Hugging Face checkpoint, its hub id, or its address in object storage (s3://, gs://)."""
    output: str = Field(min_length=1)
    """Run folder, which holds all output of the run."""
    data: DataConfig
    method: AnyMethod = Lora()
    """Adaptation method: its name, or a section with `name` and the method's settings (docs/methods.md)."""
    layers: str | int | list[int] = DEFAULT_LAYERS
    """Decoder layers to train: first:K, last:K, indices or ranges, separated by commas. auto:K and auto:CRITERION:K
    take the K layers that a probe finds most important."""
    probe: ProbeConfig = ProbeConfig()
    tokens: Annotated[int | None, BeforeValidator(whole_number)] = Field(None, gt=0, le=10**15)
    """Number of training tokens of the run; null is one pass over the text in the target languages."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed for the order of the data and all other random choices."""
    tokenizer: str | None = Field(None, min_length=1)
    """Folder, hub id or address of the tokenizer; null is the model's tokenizer."""
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationConfig = EvaluationConfig()
    chat: ChatConfig | None = None
    """Stages after the adaptation that make a chat model: chat vector and supervised fine-tuning; null does none."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint. Set it only for checkpoints you trust."""
    title: str | None = None
    """Heading of the report."""

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which Python takes for 1
            raise ValueError(f"got {value!r}; write layers such as first:1,last:1")
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

    @model_validator(mode="after")
    def _translations_are_held_out(self) -> "RunConfig":
        trained = {corpus.path for corpora in self.data.corpora.values() for corpus in corpora}
        for measure in self.evaluation.measures:
            if isinstance(measure, Translation) and measure.path in trained:
                raise ValueError(
                    f"evaluation.translation: {measure.path} is also a training corpus; give held-out text"
                )
        return self

    def settings(self, phase: Phase) -> TrainingSettings:
        """Return the training settings of one phase of the method."""
        return self.training.for_phase(phase.name, phase.learning_rate)
