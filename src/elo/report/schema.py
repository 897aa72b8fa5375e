"""The results schema: `elo run` and `elo compare` write it as results.json, `elo report` reads it.

A run is a comparison with one contestant, one budget and one seed. docs/results.md is generated from the docstrings of
this file by `python -m elo.report.schema_markdown`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from elo.evaluate.base import MeasureValue

FILE_NAME = "results.json"
SCHEMA_VERSION = 2
MIN_DOCUMENTS = 30
"""Number of held-out documents, or of items, below which no difference counts as supported."""
MIN_SEEDS = 2
"""Number of seeds below which no difference counts as supported: with one, the spread over seeds is unknown."""

Count = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
ByLanguage = dict[str, NonNegative]


class Record(BaseModel):
    """Known keys are validated; unknown keys are ignored, so that later versions can add some."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class TextSize(Record):
    """An amount of text."""

    documents: Count | None = Field(None, description="Number of documents.")
    tokens: Count | None = Field(None, description="Number of tokens.")
    bytes: Count | None = Field(None, description="Number of UTF-8 bytes.")
    lost_text: float | None = Field(None, ge=0, le=1, description="Share of the text that the tokenizer loses.")
    special_tokens: Count | None = Field(None, description="Number of special tokens that the text spells.")

    @property
    def bytes_per_token(self) -> float | None:
        return self.bytes / self.tokens if self.bytes and self.tokens else None


class Sample(Record):
    """A greedy continuation of a prompt."""

    language: str = Field(description="Language of the prompt.")
    prompt: str = Field(description="Text that the model continues.")
    text: str = Field(description="Continuation, without the prompt.")


class Generation(Record):
    """Speed of writing the samples."""

    characters: Count = Field(description="Characters written, greedily, one prompt at a time.")
    seconds: NonNegative = Field(description="Wall time of writing them.")


class Measured(Record):
    """Everything measured of one model."""

    bpb: ByLanguage = Field({}, description="Bits per byte of held-out text by language; lower is better.")
    heldout: dict[str, TextSize] = Field({}, description="Held-out text behind `bpb`, by language.")
    document_nats: dict[str, tuple[NonNegative, ...]] = Field(
        {}, description="Summed negative log-likelihood of each held-out document, in nats, by language."
    )
    document_bytes: dict[str, tuple[Count, ...]] = Field(
        {}, description="UTF-8 bytes of each held-out document, by language, in the order of `document_nats`."
    )
    measures: tuple[MeasureValue, ...] = Field((), description="Benchmark values.")
    samples: tuple[Sample, ...] = Field((), description="Continuations of the configured prompts.")
    generation: dict[str, Generation] = Field({}, description="Speed of writing the samples, by language.")

    @model_validator(mode="after")
    def _documents_match(self) -> "Measured":
        for language, nats in self.document_nats.items():
            sizes = self.document_bytes.get(language, ())
            if len(sizes) != len(nats):
                raise ValueError(f"document_bytes.{language}: {len(sizes)} values for {len(nats)} documents")
            if nats and not sum(sizes):
                raise ValueError(f"document_bytes.{language}: all documents are empty")
        return self


class StageCost(Record):
    """What one stage of a trial did and cost."""

    name: str = Field(description="Stage, for example `detach`, `elo_pretraining`, `attach`, `full`.")
    seconds: NonNegative = Field(description="Wall time of the stage without evaluation, in seconds.")
    cpu_seconds: NonNegative | None = Field(
        None, description="CPU time of the stage over all its threads, without evaluation, in seconds."
    )
    tokens: Count = Field(0, description="Tokens trained on in the stage.")
    tokens_per_second: NonNegative | None = Field(None, description="Training tokens per second of wall time.")
    peak_memory_bytes: Count | None = Field(None, description="Peak memory of the stage, in bytes.")
    flops: NonNegative | None = Field(
        None, description="Matmul FLOPs of training, with a multiply and an add counted as two."
    )
    trainable_parameters: Count | None = Field(None, description="Number of parameters that train in the stage.")
    detached: bool = Field(
        False,
        description="Whether a detached model trains: `losses` and `evaluations` of the stage are of that model alone.",
    )


class LossPoint(Record):
    """One point of the training loss."""

    stage: str = Field(description="Stage that logged it.")
    tokens: Count = Field(description="Tokens trained on since the start of the trial.")
    seconds: NonNegative = Field(description="Wall time since the start of the trial without evaluation, in seconds.")
    loss: Finite = Field(description="Mean training loss since the previous point, in nats per token.")
    internal: dict[str, Finite] = Field({}, description="Mean loss at each supervised internal layer, unweighted.")


class EvaluationPoint(Record):
    """One evaluation during training, possibly on fewer held-out documents than the final one."""

    stage: str = Field(description="Stage that ran it.")
    tokens: Count = Field(description="Tokens trained on since the start of the trial.")
    seconds: NonNegative = Field(description="Wall time since the start of the trial without evaluation, in seconds.")
    bpb: ByLanguage = Field(description="Bits per byte of held-out text by language.")
    measures: tuple[MeasureValue, ...] = Field((), description="Values of `evaluation.during_training`.")


class Trial(Record):
    """One training of a contestant within a budget."""

    contestant: str = Field(description="Name of the contestant.")
    budget: str = Field(description="Name of the budget.")
    seed: int = Field(description="Seed of data order, initialisation and everything else that is random.")
    learning_rates: dict[str, Positive] = Field({}, description="Peak learning rate by phase.")
    tuning: bool = Field(
        False, description="Whether the trial only served to choose learning rates and is not in the results table."
    )
    failed: str | None = Field(None, description="Reason why the trial has no result.")
    measured: Measured = Field(
        Measured(), description="The final model on held-out text; empty for a tuning trial of its own length."
    )
    before_alignment: Measured | None = Field(
        None, description="The attached model before layer alignment, on held-out text."
    )
    validation: Measured | None = Field(
        None, description="The final model on validation text, used to choose learning rates and never reported."
    )
    source_excess_bpb: NonNegative | None = Field(
        None,
        description="How far the source language that lost most on validation text is above "
        "`endpoint.source_limit_bpb`; 0 if all are within it. Learning rates are chosen by the lowest excess, then by "
        "the lowest target bits per byte. null: by the latter alone.",
    )
    attach_scale: NonNegative | None = Field(
        None, description="Factor on the trained change when the layers were attached; 0 is the base."
    )
    stages: tuple[StageCost, ...] = Field((), description="Stages in the order in which they ran.")
    losses: tuple[LossPoint, ...] = Field((), description="Training loss.")
    evaluations: tuple[EvaluationPoint, ...] = Field((), description="Evaluations during training.")
    warnings: tuple[str, ...] = Field((), description="Warnings raised during the trial.")

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def cpu_seconds(self) -> float | None:
        return _total([stage.cpu_seconds for stage in self.stages])

    @property
    def flops(self) -> float | None:
        return _total([stage.flops for stage in self.stages if stage.tokens])

    @property
    def peak_memory_bytes(self) -> int | None:
        return max((stage.peak_memory_bytes for stage in self.stages if stage.peak_memory_bytes), default=None)


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if values and len(known) == len(values) else None


class Budget(Record):
    """What each contestant may spend."""

    name: str = Field(description="Unique display name.")
    kind: Literal["tokens", "seconds", "cpu_seconds"] = Field(
        description="Unit of `value`: training tokens, seconds of wall time or seconds of CPU time, without evaluation."
    )
    value: Positive = Field(description="Size of the budget.")


class NewRows(Record):
    """Vocabulary rows that were added."""

    start: Count = Field(description="First new token id.")
    stop: Count = Field(description="One past the last new token id.")


class Vocabulary(Record):
    """What `elo vocab extend` did to the base model."""

    rows: NewRows = Field(description="New vocabulary rows.")
    embedding_init: str | None = Field(None, description="Initialisation of the new embedding rows.")
    head_init: str | None = Field(None, description="Initialisation of the new LM head rows; null if they are tied.")
    source_identity: dict[str, Any] | None = Field(
        None, description="Comparison of both tokenizers on text of the source languages."
    )
    target_bytes_per_token: tuple[float, float] | None = Field(
        None, description="Bytes per token of the target languages, before and after."
    )
    source_bytes_per_token: tuple[float, float] | None = Field(
        None, description="Bytes per token of the source languages, before and after."
    )


class Model(Record):
    """The base model."""

    name: str = Field(description="Folder or Hugging Face Hub id.")
    parameters: Count | None = Field(None, description="Number of parameters.")
    num_layers: Count | None = Field(None, description="Number of decoder layers.")
    vocabulary_size: Count | None = Field(None, description="Number of vocabulary rows.")
    vocabulary: Vocabulary | None = Field(None, description="Vocabulary extension, if there was one.")


class Contestant(Record):
    """One way of training."""

    name: str = Field(description="Unique name.")
    label: str | None = Field(None, description="Display name; by default `name`.")
    method: str = Field(description="Method, for example `elo`, `full`, `lora`.")
    layers: tuple[int, ...] = Field((), description="0-based decoder layers to train; empty if the method chooses.")
    layers_reason: str = Field("", description="Why `layers: auto` chose these layers.")
    changes: dict[str, Any] = Field({}, description="Configuration keys that differ from the shared run.")

    model: Model | None = Field(None, description="Its base model, if base models are compared.")
    base: Measured | None = Field(None, description="`model` on held-out text, before any training.")

    @property
    def title(self) -> str:
        return self.label or self.name


class Languages(Record):
    """Keys of the languages, as used in every table by language."""

    targets: tuple[str, ...] = Field(min_length=1, description="Target languages: what is taught.")
    sources: tuple[str, ...] = Field((), description="Source languages: what is to be kept.")

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.targets, *self.sources)


class Data(Record):
    """What was trained and measured on."""

    train: dict[str, TextSize] = Field({}, description="Prepared training text by language.")
    heldout: dict[str, TextSize] = Field({}, description="Prepared held-out text by language.")
    replay_ratio: Share | None = Field(None, description="Share of training tokens in the source languages.")
    shares: dict[str, Share] = Field({}, description="Share of training tokens by language that is trained on.")
    sequence_length: Count | None = Field(None, description="Tokens in a packed sequence.")


class Endpoint(Record):
    """How contestants are ranked and tuned."""

    source_limit_bpb: NonNegative = Field(
        0.02,
        description="A contestant is ranked only if its mean bits per byte in each source language are at most this "
        "much above the base model's.",
    )
    source_limit_share: NonNegative = Field(
        0.02, description="Loss of accuracy against the base model up to which a benchmark counts as kept."
    )


class PairedDifference(Record):
    """`contestant` minus `reference`, paired over what both were measured on."""

    contestant: str = Field(description="Name of the contestant.")
    reference: str = Field(description="Name of the other contestant, or `base` for the base model.")
    value: Finite = Field(description="Mean difference over seeds.")
    low: Finite = Field(description="Lower end of the 95 % confidence interval.")
    high: Finite = Field(description="Upper end of the 95 % confidence interval.")
    p_value: Share = Field(description="Two-sided p-value.")
    adjusted_p_value: Share = Field(description="p-value after Holm's correction within its family of comparisons.")
    seeds: Count = Field(description="Seeds that both have in common; with one, the difference is not supported.")

    def _supported_over(self, size: int) -> bool:
        return self.adjusted_p_value < 0.05 and self.seeds >= MIN_SEEDS and size >= MIN_DOCUMENTS


class Difference(PairedDifference):
    """A paired difference in bits per byte: `contestant` minus `reference`; negative is better."""

    languages: tuple[str, ...] = Field(description="Languages over which the difference is averaged.")
    documents: Count = Field(description="Number of held-out documents in the language with the fewest.")

    @property
    def is_supported(self) -> bool:
        """Whether the difference is significant at 5 % after correction, over enough seeds and documents."""
        return self._supported_over(self.documents)


class MeasureDifference(PairedDifference):
    """A paired difference in a benchmark over the same items: `contestant` minus `reference`."""

    measure: str = Field(description="Name of the benchmark.")
    language: str = Field("", description="Language of the items; empty where they have none.")
    unit: Literal["share", "number"] = Field(description="Unit of the benchmark.")
    higher_is_better: bool = Field(description="Direction of improvement.")
    test: Literal["McNemar", "t"] = Field(
        description="`McNemar`: exact test of right-or-wrong items, with one seed; `t`: the test of the interval."
    )
    items: Count = Field(description="Number of items.")

    @property
    def is_supported(self) -> bool:
        """Whether the difference is significant at 5 % after correction, over enough seeds and items."""
        return self._supported_over(self.items)


class Retained(Record):
    """What became of one ability of the base model."""

    measure: str = Field(description="`bits per byte`, or the name of a benchmark.")
    language: str = Field("", description="Source language; empty where the benchmark has none.")
    unit: Literal["share", "number"] = Field(description="Unit of the measure.")
    before: Finite = Field(description="Value of the base model.")
    change: Finite = Field(description="Mean change over seeds.")
    low: Finite = Field(description="Lower end of the 95 % confidence interval of the change.")
    high: Finite = Field(description="Upper end of the 95 % confidence interval of the change.")
    limit: NonNegative = Field(description="Loss up to which it counts as kept.")
    outcome: Literal["improved", "kept", "lost", "undecided"] = Field(
        description="`improved`: the interval contains only gains; `kept`: it stays within the limit; `lost`: it "
        "contains only losses; `undecided`: otherwise."
    )


class Retention(Record):
    """What a contestant kept of what the base model could do besides the target languages."""

    contestant: str = Field(description="Name of the contestant.")
    parts: tuple[Retained, ...] = Field(description="Bits per byte of each source language, then benchmarks.")


class BudgetVerdict(Record):
    """What the statistics support at one budget."""

    budget: str = Field(description="Name of the budget.")
    reference: str = Field(
        description="What the contestants are compared with: full CPT if it takes part, else the first contestant; "
        "`base` if there is only one contestant."
    )
    differences: tuple[Difference, ...] = Field(
        (), description="Each contestant against the reference in each language; one family for Holm's correction."
    )
    ranked: tuple[str, ...] = Field(
        (),
        description="Contestants without a failed seed whose source languages stay within `endpoint.source_limit_bpb` "
        "of the base model, lowest mean target bits per byte first.",
    )
    best_against: tuple[Difference, ...] = Field(
        (), description="The first of `ranked` against each other one, in the target languages; one family."
    )
    best_is_supported: bool = Field(False, description="Whether the first of `ranked` is significantly below the rest.")
    measure_differences: tuple[MeasureDifference, ...] = Field(
        (), description="Each contestant against the reference in each benchmark; one family for Holm's correction."
    )
    retention: tuple[Retention, ...] = Field((), description="What each contestant kept.")
    sentences: tuple[str, ...] = Field((), description="Ranking and differences in words.")
    retention_sentences: tuple[str, ...] = Field((), description="Retention in words.")


class Verdict(Record):
    """What the statistics support."""

    rule: str = Field(description="The statistical rule in words.")
    budgets: tuple[BudgetVerdict, ...] = Field((), description="One verdict per budget.")
    warnings: tuple[str, ...] = Field((), description="What a reader has to know before using the results.")


class ChatModel(Record):
    """A chat model that was measured: the given one, or what a stage of the section `chat` made."""

    name: str = Field(description="`chat_model` (the given one), or the stage: `chat_vector`, `sft`.")
    stage: StageCost | None = Field(None, description="What the stage cost; null for the given chat model.")
    measured: Measured = Field(description="The chat model on the held-out text and conversations.")


class Results(Record):
    """Top level of results.json."""

    schema_version: Literal[2] = Field(description="Version of this schema.")
    kind: Literal["run", "comparison"] = Field(description="Which command wrote the file.")
    title: str = Field("ELO", description="Heading of the report.")
    created: str | None = Field(None, description="Time of writing, ISO 8601 in UTC.")
    command: str | None = Field(None, description="Command that produced the results.")
    model: Model = Field(description="The base model; the first contestant's if base models are compared.")
    languages: Languages = Field(description="Target and source languages.")
    hardware: dict[str, Any] = Field({}, description="`cpu`, `cores`, `memory_bytes`, `gpu`, `gpus`, as far as known.")
    versions: dict[str, Any] = Field({}, description="Version by package.")
    data: Data = Field(Data(), description="What was trained and measured on.")
    config: dict[str, Any] = Field({}, description="The resolved configuration.")
    endpoint: Endpoint = Field(Endpoint(), description="How contestants are ranked and tuned.")
    base: Measured = Field(description="`model` on held-out text.")
    base_validation: Measured | None = Field(None, description="The base model on validation text.")
    contestants: tuple[Contestant, ...] = Field(
        min_length=1, description="Ways of training; in a run, the run's own method comes first."
    )
    budgets: tuple[Budget, ...] = Field(min_length=1, description="Budgets within which each contestant trains.")
    seeds: tuple[int, ...] = Field((), description="Seeds that each contestant trains with at each budget.")
    trials: tuple[Trial, ...] = Field(
        (), description="All trainings, including tuning trials; planned trials that are missing have not run yet."
    )
    in_progress: bool = Field(
        False, description="Whether the run or comparison is unfinished; an unfinished trial has its last measurement."
    )
    chat: tuple[ChatModel, ...] = Field((), description="Chat models of the section `chat`, in order.")
    verdict: Verdict | None = Field(None, description="What the statistics support; `elo report` computes it again.")

    @model_validator(mode="after")
    def _consistent(self) -> "Results":
        contestants = [contestant.name for contestant in self.contestants]
        budgets = [budget.name for budget in self.budgets]
        for what, names in (("contestants", contestants), ("budgets", budgets), ("seeds", list(self.seeds))):
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: must differ, got {', '.join(map(str, names))}")
        if "base" in contestants:
            raise ValueError("contestants: `base` is the name of the base model")
        reported = set()
        for index, trial in enumerate(self.trials):
            where = f"trials.{index}"
            if trial.contestant not in contestants:
                raise ValueError(f"{where}.contestant: {trial.contestant!r} is not one of {', '.join(contestants)}")
            if trial.budget not in budgets:
                raise ValueError(f"{where}.budget: {trial.budget!r} is not one of {', '.join(budgets)}")
            if not trial.tuning:
                key = (trial.contestant, trial.budget, trial.seed)
                if key in reported:
                    raise ValueError(f"{where}: {key} occurs twice")
                reported.add(key)
            section = "validation" if trial.tuning else "measured"
            found = getattr(trial, section) or Measured()
            lacking = [each for each in self.languages.targets if each not in found.bpb]
            if trial.failed is None and lacking:
                raise ValueError(f"{where}.{section}.bpb: {', '.join(lacking)} missing, but the trial did not fail")
            for language, sizes in trial.measured.document_bytes.items():
                if sizes != self.base.document_bytes.get(language, sizes):
                    raise ValueError(
                        f"{where}.measured.document_bytes.{language}: the documents are not those of the base model"
                    )
        return self

    def base_of(self, contestant: str) -> Measured:
        """Return what was measured of a contestant's base model on held-out text."""
        return next((each.base for each in self.contestants if each.name == contestant and each.base), self.base)

    def reported(self, contestant: str, budget: str) -> list[Trial]:
        """Return the trials of the results table, including failed ones."""
        return [
            trial
            for trial in self.trials
            if (trial.contestant, trial.budget) == (contestant, budget) and not trial.tuning
        ]

    def finished(self, contestant: str, budget: str) -> list[Trial]:
        """Return the trials of the results table that did not fail."""
        return [trial for trial in self.reported(contestant, budget) if trial.failed is None]

    def mean_bpb(self, contestant: str, budget: str, languages: tuple[str, ...]) -> float | None:
        """Return the mean bits per byte over a contestant's finished trials and over `languages`; None if unknown."""
        values = [mean_bpb(trial.measured, languages) for trial in self.finished(contestant, budget)]
        return mean([value for value in values if value is not None])

    def change(self, contestant: str, budget: str, *languages: str) -> float | None:
        """Return the change of mean bits per byte over `languages` from a contestant's base model; None if unknown."""
        before, after = mean_bpb(self.base_of(contestant), languages), self.mean_bpb(contestant, budget, languages)
        return None if before is None or after is None else after - before


def mean_bpb(measured: Measured, languages: tuple[str, ...]) -> float | None:
    """Return the mean bits per byte over `languages`; None if one of them was not measured."""
    values = [measured.bpb[language] for language in languages if language in measured.bpb]
    return sum(values) / len(values) if values and len(values) == len(languages) else None


def mean(values: list[float]) -> float | None:
    """Return the arithmetic mean; None without values."""
    return sum(values) / len(values) if values else None
